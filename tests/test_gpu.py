"""What holds on GPUs and on many machines, as far as it can be checked without either."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, ok, refused
from families import tiny_model
from hypothesis import given
from hypothesis import strategies as st

import core.parallel as parallel
from bench import cost
from bench.flops import training_flops
from core.sampling import batches_of

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------- processes


@pytest.fixture
def cards(monkeypatch):
    """cards(count, rank): a machine that has so many, for the process of this rank."""
    def of(count: int, rank: int) -> None:
        for name in ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return of


def test_attention_of_cudnn_is_off_where_cuda_is_set_up(cards, monkeypatch):
    asked = []
    cards(4, 3)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)
    assert parallel.start_processes() == torch.device("cuda", 3)
    assert sorted(asked, key=str) == [False, torch.device("cuda", 3)]


def test_more_processes_than_cards_is_one_line(cards, capsys):
    cards(2, 2)
    line = refused(capsys, parallel.start_processes)
    assert "process 3 of this machine has no GPU, there are 2" in line and "NPROC" in line


@pytest.mark.parametrize("cpu, pays", [
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
    ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
    ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, False),
    ({"cpu_name": "Arm Neoverse"}, False),
])
def test_auto_is_bf16_only_where_that_is_faster(cpu, pays, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert parallel.in_bf16(CPU, "auto") == pays
    assert parallel.in_bf16(CPU, "bf16") and not parallel.in_bf16(CPU, "fp32")


# ----------------------------------------------------------------------------------------- sampling


@given(st.lists(st.tuples(st.integers(1, 3000), st.sampled_from([40, 50])), min_size=1))
def test_batches_are_bounded_by_tokens(sizes):
    """No prompt is padded to more than twice its tokens; the longest come first, for a card that is
    too small shows at once; answers of other lengths are batches of their own."""
    lengths, new = zip(*sizes)
    batches = batches_of(lengths, new, 2, 2000)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in batches:
        assert len({new[i] for i in batch}) == 1
        tokens = 2 * len(batch) * (max(lengths[i] for i in batch) + new[batch[0]])
        assert tokens <= 2000 or len(batch) == 1
        widths = [lengths[i] + new[i] for i in batch]
        assert max(widths) <= 2 * min(widths)
    for one, two in zip(batches, batches[1:]):
        if new[one[0]] == new[two[0]]:
            assert lengths[one[-1]] >= lengths[two[0]]
    assert list(map(len, batches_of([8] * 9, [2] * 9, 2, 80))) == [4, 4, 1]


# -------------------------------------------------------------------------------------------- costs


def test_costs_by_hand():
    """Mistral-7B: 7.24 B parameters; 32 layers of 8 key-value heads of width 128."""
    shape = cost.SHAPES["mistral-7b"]
    count = cost.count_of(cost.model_of(shape, "mistral"))
    assert count == 7_241_732_096  # as its model card says
    assert cost.kv_bytes(shape) == 2 * 32 * 8 * 128 * 2
    assert cost.checkpoint_gb(count) == pytest.approx(86.9, abs=0.1)
    assert cost.whole_gb(count) == pytest.approx(159.3, abs=0.1)
    assert cost.sharded_gb(shape, count, 8) == pytest.approx(23.4, abs=0.1)
    assert cost.activations_gb(shape, 2048) == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize("name", [name for name in cost.SHAPES if name != "demo"])
def test_every_config_fits_eighty_gigabytes(name):
    shape, chosen = cost.SHAPES[name], cost.settings(name)
    count = cost.count_of(cost.model_of(shape, chosen["ARCHITECTURE"]))
    micro, budget, new = (int(chosen[key]) for key in ("MICRO_TOKENS", "SAMPLE_TOKENS",
                                                       "MAX_NEW_TOKENS"))
    assert 4096 <= micro <= 8192
    room = 0.95 * 80
    assert cost.sharded_gb(shape, count, 8) + cost.activations_gb(shape, micro) < room
    assert cost.scoring_gb(shape, count) < room
    for rows in (2, 16, 128):  # a full batch of long prompts, or of short ones
        assert cost.sampling_gb(shape, count, rows, budget // rows - new, new) < room


# ------------------------------------------------------------------------------------------- timing


@pytest.mark.slow
def test_every_measurement_of_the_gpu_script(tmp_path):
    """On a tiny model, and the CPU if there is no GPU; TRL, which is not of the requirements, is
    left out."""
    (tmp_path / "trl.py").write_text("raise ImportError")
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    env.pop("REDO")
    done = subprocess.run(["bash", ROOT / "bench/gpu.sh", "--tiny"], env=env, capture_output=True,
                          text=True)
    lines = [json.loads(line) for line in ok(done).stdout.splitlines()]
    speeds = {line["name"]: line for line in lines if "tokens_per_s" in line}
    assert len(speeds) == 6 and lines[0]["matmul_tflops"] > 0
    # plain and recomputed steps are the same steps
    plain, recomputed = (speeds[f"ours{how}"] for how in ("", ", gradient checkpointing"))
    assert plain["losses"] == pytest.approx(recomputed["losses"], abs=1e-4)
    assert [line["status"] for line in lines if "status" in line] == [0] * 8


def test_training_flops_by_hand():
    """Hidden 32, 2 layers, 4 heads of 8, 2 KV heads, MLP 64: 9 216 + 64 weights a layer, a final
    norm of 32, a head of 384 · 32."""
    model, row = tiny_model("llama"), ([1, 2, 3], [[4, 5], [6]])
    body, head = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 64) + 32, 384 * 32
    # prompt 3 tokens, one response token read (the last of each is not): 4 tokens; 6 pairs in the
    # prompt, 3 + 1 for the response
    assert training_flops(model, [row], True) == 6 * body * 4 + 6 * head * 3 + 12 * 2 * 32 * 10
    # apart: 3 + 1 and 3 tokens, 10 and 6 pairs
    assert training_flops(model, [row], False) == 6 * body * 7 + 6 * head * 3 + 12 * 2 * 32 * 16

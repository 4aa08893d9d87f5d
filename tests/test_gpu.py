"""What holds on GPUs and on many machines, as far as it can be checked without either."""

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import ROOT, dump, jsonl, make_model, ok, run
from torch.utils._python_dispatch import TorchDispatchMode

import bench.train as bench_train
import core.parallel as parallel
import core.policy as policy
import core.sampling as sampling
import core.training as training
from bench import cost
from bench.flops import training_flops
from core.policy import ResponseLogps, pack
from core.sampling import batches_of, draw, sample, uniforms

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------- processes


@pytest.fixture
def one_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_attention_of_cudnn_is_off_where_cuda_is_set_up(one_process, monkeypatch):
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        assert parallel.start_processes() == torch.device("cuda", 3)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert asked == [torch.device("cuda", 3)]


def test_more_processes_than_cards_is_one_line(one_process, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as stop:
        parallel.start_processes()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "process 3 of this machine has no GPU, there are 2" in said and "NPROC" in said


def test_copies_of_a_policy_send_no_buffers_and_warn_of_nothing(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        monkeypatch.setattr(parallel, "WORLD", 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net = parallel.distribute(ResponseLogps(make_model()), False, False)
        assert isinstance(net, torch.nn.parallel.DistributedDataParallel)
        assert len(list(net.buffers())) > 0 and not net.will_sync_module_buffers()
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- passes


def test_a_mask_is_formed_on_the_device():
    """Nothing of the mask's size exists on the CPU: only what the pass is made from travels."""
    on_cpu = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type == "cpu":
                on_cpu.append(out.numel())
            return out

    rows = [(list(range(40)), [list(range(30)), list(range(20))])] * 2
    width = 40 + 29 + 19
    with Watch():
        batch = pack(rows, True, torch.device("meta"))
    assert batch["attention_mask"].shape == (2, 1, width, width)
    assert batch["attention_mask"].device.type == "meta"
    assert 2 * width in on_cpu and max(on_cpu) < width * width  # ids and parts, and nothing larger


# ----------------------------------------------------------------------------------------- sampling


def test_batches_are_bounded_by_tokens():
    dice = np.random.default_rng(0)
    lengths = dice.integers(1, 200, 300).tolist()
    batches = batches_of(lengths, [50] * 300, 2, 2000)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    wide = [max(lengths[i] for i in batch) + 50 for batch in batches]
    sizes = [2 * len(batch) * width for batch, width in zip(batches, wide)]
    assert max(sizes) <= 2000
    # None has room for one more.
    assert all(size + 2 * width > 2000 for size, width in zip(sizes[:-1], wide))
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(lengths, reverse=True)  # a card that is too small shows at once
    # a prompt beyond the limit is a batch of its own
    assert batches_of([5000, 10, 10], [50] * 3, 2, 2000) == [[0], [1, 2]]
    # answers of other lengths are batches of their own
    assert batches_of([7, 9, 8], [50, 40, 50], 2, 2000) == [[2, 0], [1]]


def test_text_does_not_depend_on_the_budget_of_tokens(folder, tmp_path):
    rows = [{"id": f"p{i}", "prompt": [{"role": "user", "content": "word " * (i % 5) + str(i)}]}
            for i in range(9)]
    command = ["generate.py", "--model", folder, "--prompts", dump(tmp_path / "p.jsonl", rows),
               "--max-new-tokens", "12", "--precision", "fp32", "-n", "2"]
    few = ["--sample-tokens", "150"]
    ok(run(*command, "--out", tmp_path / "all.jsonl"))
    ok(run(*command, "--out", tmp_path / "few.jsonl", *few))
    assert jsonl(tmp_path / "all.jsonl") == jsonl(tmp_path / "few.jsonl")
    # memory alone: another budget is no other output, and parts of a run that was killed are kept
    assert "complete, skipped" in run(*command, "--out", tmp_path / "all.jsonl", *few).stdout


@pytest.mark.parametrize("window", [None, 8])
def test_a_prefill_in_pieces_is_the_whole(window, monkeypatch):
    """Also where padding fills a piece of a row, and where a piece crosses the attention window."""
    model = make_model(transformers.MistralConfig, sliding_window=window)
    prompts = [list(range(3, 26)), [10, 11], [12, 13, 14, 15, 16, 17, 18]]
    u = torch.tensor(np.concatenate([uniforms(0, str(i), 2, 20) for i in range(3)]))
    heat, stop = torch.full((6,), 0.7), torch.tensor([2, 7, 40, 41])
    whole = sample(model, prompts, u, heat, stop)
    lengths = []
    forward = model.base_model.forward

    def watched(*args, **known):
        lengths.append(known["input_ids"].shape[1])
        return forward(*args, **known)

    watched.__signature__ = sampling.inspect.signature(forward)
    monkeypatch.setattr(model.base_model, "forward", watched)
    monkeypatch.setattr(sampling, "PREFILL", 15)
    assert sample(model, prompts, u, heat, stop) == whole
    assert lengths[:6] == [5, 5, 5, 5, 3, 1]


def test_draw_sums_in_float64():
    """Tokens below float32's precision at 1, behind a likely one; against numpy's float64."""
    size = 30000
    logits = torch.zeros(1, size)
    logits[0, 0] = 24.0
    p = logits.softmax(-1).numpy()[0].astype(np.float64)
    assert p[1] < 2**-26
    u = 1 - (1 - p[0]) * np.random.default_rng(0).random(16)  # all in the tail
    expected = np.searchsorted(p.cumsum(), u * p.sum(), side="right")
    tokens = draw(logits.expand(16, size), torch.tensor(u), torch.ones(16))
    assert len(set(tokens.tolist())) == 16 and tokens.tolist() == expected.tolist()


# ------------------------------------------------------------------------------------------- launch


def launched(tmp_path, **given) -> list[str]:
    """Every command of run.sh with a stand-in for Python that writes its arguments down; asked
    whether a stage has work, it says yes."""
    python, log = tmp_path / "python", tmp_path / "commands"
    log.unlink(missing_ok=True)
    python.write_text(
        '#!/bin/sh\n[ "$LOOK" != yes ] || { printf "to do\\t0\\n"; exit 3; }\n'
        f'echo "$0 $*" >> "{log}"\n')
    python.chmod(0o755)
    words = {"DATA": "x.jsonl", "MODEL": "model", "RUN": tmp_path / "run"} | given
    env = {"PATH": os.environ["PATH"], "PYTHON": str(python)}
    subprocess.run(["bash", ROOT / "run.sh", *(f"{name}={words[name]}" for name in words)],
                   cwd=ROOT, env=env, check=True, capture_output=True)
    return log.read_text().splitlines()


def stage_of(commands: list[str], name: str) -> str:
    return next(line for line in commands if f" {name}" in line)


STAGES = ("seed_dpo.py", "generate.py", "label.py", "train.py", "evaluate.py")


def test_stages_get_their_processes_and_the_budget(tmp_path):
    commands = launched(tmp_path, SAMPLE_TOKENS=777, NPROC=2)
    for name in STAGES:
        assert f" --nproc_per_node 2 {name} " in stage_of(commands, name)
    assert not any("nproc" in line for line in commands if " dro.py " in line)
    assert " --sample-tokens 777" in stage_of(commands, "generate.py")
    # vLLM has processes of its own.
    commands = launched(tmp_path, BACKEND="vllm", NPROC=2)
    assert "nproc" not in stage_of(commands, "generate.py")
    assert "nproc" in stage_of(commands, "label.py")


def test_a_launcher_is_given_the_stages_of_several_processes(tmp_path):
    """With its own words before theirs; where nothing is launched, one process runs a stage."""
    commands = launched(tmp_path, LAUNCH=f"env conf=1 {tmp_path}/python torchrun --nnodes 2")
    for name in STAGES:
        assert f" torchrun --nnodes 2 {name} " in stage_of(commands, name)
    assert not any("torchrun" in line for line in commands if " dro.py " in line)


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


def test_costs_print_a_line_for_each_config(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost.py", "--gpus", "16"])
    cost.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in cost.SHAPES]
    assert len({line.count("|") for line in lines}) == 1


# ------------------------------------------------------------------------------------------- timing


def test_measurements_see_one_card(monkeypatch):
    seen = []

    def process(command, env, **known):
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        return SimpleNamespace(stdout='{"seconds": 1}')

    monkeypatch.setattr(bench_train.subprocess, "run", process)
    for works, visible in ((True, None), (True, "2,3"), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_available", [works].pop)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert bench_train.child("--line", "ours") == {"seconds": 1}
    assert seen == ["0", "2", None]


@pytest.mark.slow
def test_every_measurement_of_the_gpu_script(tmp_path):
    """On a tiny model, and the CPU if there is no GPU; TRL, which is not of the requirements, is
    left out."""
    (tmp_path / "trl.py").write_text("raise ImportError")
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    env.pop("REDO")
    done = subprocess.run(["bash", ROOT / "bench/gpu.sh", "--tiny"], env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    ours = ["ours", "ours, noise detection", "ours, gradient checkpointing"]
    names = ["scoring", *ours, "sampling, ours", "sampling, plain"]
    speeds = {line["name"]: line for line in lines if "tokens_per_s" in line}
    assert list(speeds) == names
    for line in speeds.values():
        assert line["tokens_per_s"] > 0 and line["memory_gb"] > 0
    # plain and recomputed steps are the same steps
    assert speeds[ours[0]]["losses"] == pytest.approx(speeds[ours[2]]["losses"], abs=1e-4)
    assert lines[0]["matmul_tflops"] > 0
    programs = [line["name"] for line in lines if line.get("status") == 0]
    assert programs == [f"{name}, whole program" for name in ("model", *names, "demo")]


def test_a_step_is_timed_when_the_device_has_done_it(monkeypatch):
    """The clock stands still but while the device is waited for."""
    now = [10.0]

    def wait(device) -> None:
        now[0] += 5.0

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    pairs = {"loss": [1.0], "margin": [0.0], "round_margin": [0.0]}
    for kind, seconds in (("cuda", 7.0), ("cpu", 2.0)):
        now[0] = 10.0
        stage = SimpleNamespace(device=torch.device(kind), encoded=[([1, 2], [[3], [4]])],
                                shared=True)
        row = training.log_row(stage, 0, [0], pairs, 1e-6, 1.0, 8.0)
        assert row["seconds"] == seconds and row["tokens_per_s"] == 2 / seconds


def test_training_flops_by_hand():
    """Hidden 32, 2 layers, 4 heads of 8, 2 KV heads, MLP 64: 9 216 + 64 weights a layer, a final
    norm of 32, a head of 384 · 32."""
    model, row = make_model(), ([1, 2, 3], [[4, 5], [6]])
    body, head = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 64) + 32, 384 * 32
    # prompt 3 tokens, one response token read (the last of each is not): 4 tokens; 6 pairs in the
    # prompt, 3 + 1 for the response
    assert training_flops(model, [row], True) == 6 * body * 4 + 6 * head * 3 + 12 * 2 * 32 * 10
    # apart: 3 + 1 and 3 tokens, 10 and 6 pairs
    assert training_flops(model, [row], False) == 6 * body * 7 + 6 * head * 3 + 12 * 2 * 32 * 16


def test_scoring_keeps_no_copies(monkeypatch):
    """Autocast's cache is off while a frozen model scores."""
    seen = []
    real = policy.autocast

    def watched(device, precision, cache=True):
        seen.append(cache)
        return real(device, precision, cache)

    monkeypatch.setattr(policy, "autocast", watched)
    model = make_model().requires_grad_(False)
    policy.score(policy.ResponseLogps(model), [([5, 6], [[7], [8]])], "bf16")
    assert seen and not any(seen)



"""Sampling (distribution, seeding, resuming, processes) and labelling (implicit reward, best
against worst)."""

import copy
import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import core.sampling as stage
from conftest import dump, gold_rows, jsonl, make_model, ok, pair_rows, run
from core.chat import encode_prompt, encode_response, end_of_turn
from core.models import load_model, load_tokenizer
from core.policy import ResponseLogps, score
from core.sampling import draw, sample, stop_tokens, uniforms
from judges.judge import vader
from label import best_and_worst, implicit_reward

STOP = torch.tensor([2])


def test_draw_follows_the_distribution():
    logits, n = torch.tensor([0.0, 1.0, 2.0, -1.0]), 20000
    tokens = draw(
        logits.expand(n, 4),
        torch.tensor(np.random.default_rng(0).random(n)),
        temperature=torch.full((n,), 0.7),
    )
    expected = (logits / 0.7).softmax(-1).numpy() * n
    assert (
        chisquare(torch.bincount(tokens, minlength=4).numpy(), expected, sum_check=False).pvalue
        > 1e-3
    )


def test_draw_at_the_ends():
    logits = torch.tensor([[-1e9, 0.0, 0.0, -1e9]])
    assert [
        draw(logits, torch.tensor([u]), torch.ones(1)).item() for u in (0.0, 0.49, 0.51, 1 - 1e-12)
    ] == [1, 1, 2, 2]
    greedy = draw(
        torch.tensor([[0.0, 3.0, 3.0]]).expand(3, 3),
        torch.tensor([0.0, 0.5, 1 - 1e-12]),
        torch.tensor([0.0, 0.0, 0.0]),
    )
    assert greedy.tolist() == [1, 1, 1]


def test_sampling_equals_uncached_one_at_a_time():
    """Against whole forward passes of one sequence: no padding, cache, sharing or compaction."""
    model = make_model()
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    u = np.concatenate([uniforms(0, str(i), 2, 30) for i in range(3)])
    stop = torch.tensor(
        [2, 7, 40, 41, 42, 43, 99, 100, 300, 310]
    )  # enough stop tokens that rows end at different times
    heat = torch.tensor([0.7, 0.7, 0.0, 1.0, 0.7, 0.2])
    ours = sample(model, prompts, torch.tensor(u), heat, stop)
    for k, tokens in enumerate(ours):
        ids = list(prompts[k // 2])
        for t in range(30):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1:]
            ids.append(draw(logits, torch.tensor(u[k, t : t + 1]), heat[k : k + 1]).item())
            if ids[-1] in stop:
                break
        assert tokens == ids[len(prompts[k // 2]) :]
    assert len({len(t) for t in ours}) > 2


def test_uniforms_differ_by_id_sample_and_seed():
    drawn = {
        uniforms(seed, i, 2, 3)[j].tobytes() for seed in (0, 1) for i in ("a", "b") for j in (0, 1)
    }
    assert len(drawn) == 8 and (uniforms(0, "a", 1, 3)[0] == uniforms(0, "a", 5, 3)[0]).all()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [
        {
            "id": f"p{i}",
            "prompt": [{"role": "user", "content": "word " * (i % 5) + str(i)}],
            "extra": i,
        }
        for i in range(11)
    ]
    return dump(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


FLAGS = ["--max-new-tokens", "12", "-n", "2", "--batch-size", "4", "--precision", "fp32"]


def test_two_processes_and_resuming_give_the_same_text(folder, prompts, tmp_path):
    command = ["generate.py", "--model", folder, "--prompts", prompts, *FLAGS]
    ok(run(*command, "--out", tmp_path / "one.jsonl"))
    whole = jsonl(tmp_path / "one.jsonl")
    assert [r["extra"] for r in whole] == list(range(11)) and all(
        len(r["responses"]) == 2 for r in whole
    )
    ok(run(*command, "--out", tmp_path / "two.jsonl", processes=2))
    assert jsonl(tmp_path / "two.jsonl") == whole and not list(tmp_path.glob("*.part*"))
    # what a kill leaves: some finished rows, the last line cut; also parts of a run with other
    # settings
    header = json.dumps(json.load(open(tmp_path / "one.jsonl.stats.json"))["settings"])
    lines = [json.dumps(r) for r in whole]
    (tmp_path / "three.jsonl.part0").write_bytes(
        "\n".join([header, *lines[3:6], lines[7][:20] + "é"]).encode()[:-1]
    )  # cut in a character
    (tmp_path / "three.jsonl.part1").write_text(
        "\n".join([header.replace('"seed": 42', '"seed": 1'), lines[0].replace("word", "old")])
    )
    assert (
        "3 of 11 prompts were done before"
        in ok(run(*command, "--out", tmp_path / "three.jsonl")).stdout
    )
    assert jsonl(tmp_path / "three.jsonl") == whole and not list(tmp_path.glob("*.part*"))


def test_ended_says_whether_the_model_stopped(folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        stage,
        "sample",
        lambda model, prompts, u, t, stop: [
            [50, 51, 2] if k % 2 else [50, 51] for k in range(len(u))
        ],
    )
    args = stage.argparse.Namespace(
        model=folder,
        prompts=prompts,
        out=str(tmp_path / "o.jsonl"),
        n=2,
        temperature=1.0,
        max_new_tokens=3,
        batch_size=4,
        sample_tokens=1000,
        precision="fp32",
        backend="transformers",
        fit=False,
        seed=0,
    )
    stage.generate(args, 0, 1, torch.device("cpu"))
    row = jsonl(tmp_path / "o.jsonl")[0]
    assert row["ended"] == [False, True] and row["responses"][0] == row["responses"][1]


def test_vllm_backend_writes_the_same_rows(folder, prompts, tmp_path, monkeypatch):
    """A stand-in with vLLM's interface that is transformers' own greedy search."""
    asked = []

    @dataclasses.dataclass
    class SamplingParams:
        temperature: float
        max_tokens: int
        seed: int
        stop_token_ids: list
        detokenize: bool

    class LLM:
        def __init__(self, model, dtype, tensor_parallel_size):
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

        def generate(self, prompts, settings, use_tqdm):
            for prompt, own in zip(prompts, settings, strict=True):
                ids = torch.tensor([prompt["prompt_token_ids"]])
                out = self.model.generate(
                    ids,
                    do_sample=False,
                    max_new_tokens=own.max_tokens,
                    eos_token_id=own.stop_token_ids,
                    pad_token_id=0,
                )
                asked.append(own)
                yield SimpleNamespace(
                    outputs=[SimpleNamespace(token_ids=tuple(out[0, ids.shape[1] :].tolist()))]
                )

    flags = [
        "--model",
        folder,
        "--prompts",
        prompts,
        "-n",
        "2",
        "--max-new-tokens",
        "12",
        "--temperature",
        "0",
        "--precision",
        "fp32",
    ]
    error = run("generate.py", *flags, "--backend", "vllm", "--out", tmp_path / "none.jsonl")
    assert error.returncode == 2 and error.stderr.endswith("pip install 'vllm>=0.30,<0.33'\n")
    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams)
    )
    ok(run("generate.py", *flags, "--backend", "vllm", "--out", tmp_path / "vllm.jsonl"))
    ok(run("generate.py", *flags, "--out", tmp_path / "own.jsonl"))
    assert jsonl(tmp_path / "vllm.jsonl") == jsonl(tmp_path / "own.jsonl") and {
        a.temperature for a in asked
    } == {0.0}
    assert len({a.seed for a in asked}) == len(asked) == 2 * len(jsonl(prompts)) and all(
        a.stop_token_ids == [2] for a in asked
    )


def test_a_turn_ends_as_the_template_says(tokenizer, folder):
    """Phi-3's way: the template writes another token after a turn than the tokenizer's end of
    sequence."""
    phi = copy.deepcopy(tokenizer)
    phi.eos_token = "<|pad|>"
    assert end_of_turn(tokenizer) == 2 and end_of_turn(phi) == 2 != phi.eos_token_id
    ask = [{"role": "user", "content": "?"}]
    assert encode_response(phi, ask, "x")[-1] == 2 != encode_response(phi, ask, "x", False)[-1]
    assert stop_tokens(folder, None, phi) == [0, 2]
    phi = copy.deepcopy(phi)
    phi.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(phi) == phi.eos_token_id
    assert encode_response(phi, ask, "x") == phi("x").input_ids + [phi.eos_token_id]


@pytest.mark.parametrize("new, most, room", [(60, 196, 60), (200, 128, 128)])
def test_what_the_context_leaves(any_folder, tmp_path, new, most, room):
    """With --fit a prompt that leaves too little of a context of 256 tokens loses its first ones
    but BOS, and an answer what is beyond the context, both marked: against transformers' own greedy
    search. Without --fit, and in the stages that learn, it is an error."""
    model, tokenizer = load_model(any_folder, torch.device("cpu")), load_tokenizer(any_folder)
    rows = []
    for tokens in (1, 200, 300):  # at least; 60 new ones fit beside the first alone
        text = "Say "
        while len(encode_prompt(tokenizer, [{"role": "user", "content": text}])) < tokens:
            text += "abc"
        rows.append({"id": f"{tokens}", "prompt": [{"role": "user", "content": text}]})
    prompts = dump(tmp_path / "p.jsonl", rows)
    out = tmp_path / "o.jsonl"
    command = ["generate.py", "--model", any_folder, "--prompts", prompts, "--precision", "fp32"]
    command += ["--max-new-tokens", new, "--out", out, "-n", "1", "--temperature", "0"]
    done = run(*command)
    assert done.returncode == 2 and "the model's context is 256" in done.stderr
    ok(run(*command, "--fit"))
    stops = stop_tokens(any_folder, model.config, tokenizer)
    for row in jsonl(out):
        ids = encode_prompt(tokenizer, row["prompt"])
        cut = max(0, len(ids) - most)
        if cut:
            bos = [i for i in tokenizer("a").input_ids[:1] if i == tokenizer.bos_token_id]
            ids = bos + ids[-most:][len(bos) :]
        length = room if cut else min(new, 256 - len(ids))
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=length, do_sample=False, eos_token_id=stops
        )
        assert row["response_ids"] == [expected[0, len(ids) :].tolist()]
        assert row.get("prompt_cut", 0) == cut and row.get("answer_cut", False) == (length < new)
    assert ["prompt_cut" in row for row in jsonl(out)] == [False, True, True]
    label = ["label.py", "--model", any_folder, "--reference-model", any_folder]
    done = run(*label, "--responses", out, "--out", tmp_path / "l.jsonl")
    assert done.returncode == 2 and "a prompt cut to the context" in done.stderr
    ok(run(*command[:4], dump(tmp_path / "s.jsonl", rows[:1]), *command[5:]))
    assert "prompt_cut" not in jsonl(out)[0] and "answer_cut" not in jsonl(out)[0]


def test_nan_while_sampling_is_one_line(folder, tmp_path, monkeypatch):
    """Logits that become NaN in mid-answer, greedy or not, end the stage with the model's name."""
    real = stage.draw

    def draw(logits, u, temperature):
        if len(u) == 6:  # the stage's batch; the model itself is sound
            logits = logits.clone()
            logits[1, 7] = float("nan")
        return real(logits, u, temperature)

    monkeypatch.setattr(stage, "draw", draw)
    rows = [{"id": f"p{i}", "prompt": [{"role": "user", "content": "Say."}]} for i in range(3)]
    command = ["generate.py", "--model", folder, "--prompts", dump(tmp_path / "p.jsonl", rows)]
    command += ["-n", "2", "--out", tmp_path / "o.jsonl", "--max-new-tokens", "8", "--temperature"]
    for temperature in ("0", "0.7"):
        done = run(*command, temperature)
        assert done.returncode == 2 and f"{folder}: its logits are not numbers" in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "o.jsonl").exists()

"""Sampling: distribution, seeding, stop tokens; and its stage: processes, resuming, rows."""

import copy
import importlib.machinery
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import dump, jsonl, ok, one_line, refused, run, sampled_without_cache
from families import tiny_config, tiny_model
from transformers import AutoModelForCausalLM

import core.sampling
import generate
from core.chat import encode_prompt, encode_response, encode_rows, end_of_turn
from core.models import load_model, load_tokenizer
from core.sampling import draw, sample, stop_tokens, uniforms

CPU = torch.device("cpu")


@pytest.mark.parametrize("size, spread, count", [
    (384, 3.0, 9000), (1000, 0.0, 2000), (30001, 4.0, 100)])
def test_draw_is_the_inverse_of_the_cumulative_distribution(size, spread, count):
    """Against numpy's sums in float64, token by token: at random, at borders and beside them. The
    first and the last tokens have no probability."""
    dice = np.random.default_rng(size)
    logits = torch.tensor(dice.normal(0, spread, (4, size)), dtype=torch.float32)
    logits[:, :9] = logits[:, -9:] = -1e9
    heat = torch.tensor([0.7, 1.0, 1.3, 0.2])
    p = (logits / heat[:, None]).softmax(-1).numpy().astype(np.float64)
    for row in range(4):
        borders = p[row].cumsum()
        at = (borders / borders[-1])[dice.integers(0, size, count // 10)]
        beside = [at + step for step in (0, 1e-16, -1e-16, 1e-9, -1e-9, 1e-7, -1e-7, 1e-6, -1e-6)]
        u = np.concatenate([dice.random(count), *beside, [0, 1 - 2**-53]]).clip(0, 1 - 2**-53)
        point = np.minimum(u * borders[-1], np.nextafter(borders[-1], 0))
        expected = np.searchsorted(borders, point, side="right")
        many = len(u)
        tokens = draw(logits[row].expand(many, size), torch.tensor(u), heat[row].expand(many))
        assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("window, room, prefill", [(None, 2, 99), (None, 64, 15), (8, 64, 15)])
def test_sampling_equals_uncached_one_at_a_time(window, room, prefill, monkeypatch):
    """Also where a cache grows, where padding fills a piece of a prompt, and where a piece crosses
    the attention window."""
    monkeypatch.setattr(core.sampling, "GROW_BY", room)
    monkeypatch.setattr(core.sampling, "PREFILL", prefill)
    model = tiny_model("mistral", sliding_window=window)
    prompts = [list(range(3, 26)), [10, 11], [12, 13, 14, 15, 16, 17, 18]]
    u = torch.tensor(np.concatenate([uniforms(0, str(i), 2, 30) for i in range(3)]))
    # Enough stop tokens that rows end at different times.
    stop = torch.tensor([2, 7, 40, 41, 42, 43, 99, 100, 300, 310])
    heat = torch.tensor([0.7, 0.7, 0.0, 1.0, 0.7, 0.2])
    ours = sample(model, prompts, u, heat, stop)
    assert ours == sampled_without_cache(model, prompts, u, heat, stop)
    assert len({len(tokens) for tokens in ours}) > 2


def test_uniforms_differ_by_id_sample_and_seed():
    drawn = {uniforms(seed, i, 2, 3)[j].tobytes()
             for seed in (0, 1) for i in ("a", "b") for j in (0, 1)}
    assert len(drawn) == 8
    assert (uniforms(0, "a", 1, 3)[0] == uniforms(0, "a", 5, 3)[0]).all()


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


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_stop_tokens_without_a_generation_config(tokenizer, tmp_path, architecture):
    """They are in config.json; in that of the text model where there are several."""
    config = tiny_config(architecture)
    config.get_text_config().eos_token_id = [2, 7]
    assert stop_tokens(str(tmp_path), config, tokenizer) == [2, 7]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [{"id": f"p{i}", "prompt": [{"role": "user", "content": "word " * (i % 5) + str(i)}],
             "extra": i} for i in range(11)]
    return dump(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


FLAGS = ["--max-new-tokens", "12", "-n", "2", "--sample-tokens", "160", "--precision", "fp32"]


def test_two_processes_and_resuming_give_the_same_text(folder, prompts, tmp_path, monkeypatch):
    """Finished rows are gone on from, behind a line that was cut in a character; other settings'
    are kept."""
    command = ["generate.py", "--model", folder, "--prompts", prompts, *FLAGS]
    ok(run(*command, "--out", tmp_path / "one.jsonl"))
    rows = jsonl(tmp_path / "one.jsonl")
    assert [row["extra"] for row in rows] == list(range(11))
    assert all(len(row["responses"]) == 2 for row in rows)
    ok(run(*command, "--out", tmp_path / "two.jsonl", processes=2))
    assert jsonl(tmp_path / "two.jsonl") == rows and not list(tmp_path.glob("*.unfinished"))
    killed = [*command, "--out", tmp_path / "killed.jsonl"]
    calls = []

    def deadly(*batch):
        calls.append(batch)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return sample(*batch)

    monkeypatch.setattr(generate, "sample", deadly)
    assert run(*killed, "--seed", "1").returncode == 2
    (other,) = tmp_path.glob("*.unfinished/*/part0")
    calls.clear()
    assert run(*killed).returncode == 2
    (part,) = set(tmp_path.glob("*.unfinished/*/part0")) - {other}
    text = other.read_bytes()
    finished = part.read_text().count('"id": ')
    with open(part, "ab") as file:
        file.write('{"id": "p0", "responses": ["é'.encode()[:-1])
    monkeypatch.setattr(generate, "sample", sample)
    done = ok(run(*killed))
    assert 0 < finished < 11 and f"{finished} of 11 prompts were done before" in done.stdout
    assert jsonl(tmp_path / "killed.jsonl") == rows
    assert list(tmp_path.glob("*.unfinished/*/*")) == [other]
    assert other.read_bytes() == text


def test_flags_that_cannot_be_meant(folder, prompts, tmp_path):
    command = ["generate.py", "--model", folder, "--prompts", prompts]
    one_line(run(*command, "--out", tmp_path / "o.jsonl", "--temperature", "0"), "-n 1")
    assert not list(tmp_path.iterdir())


def test_ended_says_whether_the_model_stopped(folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "sample", lambda model, prompts, u, *rest: [
        [50, 51, 2] if k % 2 else [50, 51] for k in range(len(u))])
    command = ["generate.py", "--model", folder, "--prompts", prompts, *FLAGS]
    ok(run(*command, "--out", tmp_path / "o.jsonl"))
    row = jsonl(tmp_path / "o.jsonl")[0]
    assert row["ended"] == [False, True] and row["responses"][0] == row["responses"][1]


def test_vllm_backend_writes_the_same_rows(folder, prompts, tmp_path, monkeypatch):
    """A stand-in with vLLM's interface that is transformers' own greedy search."""
    asked = []

    class LLM:
        def __init__(self, model, dtype, tensor_parallel_size):
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

        def generate(self, prompts, settings, use_tqdm):
            for prompt, own in zip(prompts, settings, strict=True):
                ids = torch.tensor([prompt["prompt_token_ids"]])
                out = self.model.generate(ids, do_sample=False, max_new_tokens=own.max_tokens,
                                          eos_token_id=own.stop_token_ids, pad_token_id=0)
                asked.append(own)
                answer = SimpleNamespace(token_ids=tuple(out[0, ids.shape[1]:].tolist()))
                yield SimpleNamespace(outputs=[answer])

    flags = ["--model", folder, "--prompts", prompts, "-n", "1", "--max-new-tokens", "12",
             "--temperature", "0", "--precision", "fp32"]
    vllm = ["generate.py", *flags, "--backend", "vllm", "--out", tmp_path / "vllm.jsonl"]
    one_line(run(*vllm), "pip install 'vllm>=")
    package = types.ModuleType("vllm")
    package.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    package.LLM, package.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", package)
    ok(run(*vllm))
    ok(run("generate.py", *flags, "--out", tmp_path / "own.jsonl"))
    assert jsonl(tmp_path / "vllm.jsonl") == jsonl(tmp_path / "own.jsonl")
    assert len({params.seed for params in asked}) == len(asked) == len(jsonl(prompts))


@pytest.mark.parametrize("new, most, room", [(60, 196, 60), (200, 128, 128)])
def test_what_the_context_leaves(any_folder, tmp_path, capsys, new, most, room):
    """With --fit a prompt that leaves too little of a context of 256 tokens loses its first ones
    but BOS, and an answer what is beyond the context, both marked: against transformers' own greedy
    search. Without --fit, and in the stages that learn, it is an error."""
    model, tokenizer = load_model(any_folder, CPU), load_tokenizer(any_folder)
    rows = []
    for tokens in (1, 200, 300):  # at least; 60 new ones fit beside the first alone
        text = "Say "
        while len(encode_prompt(tokenizer, [{"role": "user", "content": text}])) < tokens:
            text += "abc"
        rows.append({"id": f"{tokens}", "prompt": [{"role": "user", "content": text}]})
    out = tmp_path / "o.jsonl"
    command = ["generate.py", "--model", any_folder, "--precision", "fp32", "--max-new-tokens", new,
               "--out", out, "-n", "1", "--temperature", "0", "--prompts"]
    pairs = dump(tmp_path / "p.jsonl", rows)
    one_line(run(*command, pairs), "id '300'", "the model's context is 256")
    ok(run(*command, pairs, "--fit"))
    stops = stop_tokens(any_folder, model.config, tokenizer)
    for row in jsonl(out):
        ids = encode_prompt(tokenizer, row["prompt"])
        cut = max(0, len(ids) - most)
        if cut:
            bos = [i for i in tokenizer("a").input_ids[:1] if i == tokenizer.bos_token_id]
            ids = bos + ids[-most:][len(bos):]
        length = room if cut else min(new, 256 - len(ids))
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=length, do_sample=False, eos_token_id=stops)
        assert row["response_ids"] == [expected[0, len(ids):].tolist()]
        assert row.get("prompt_cut", 0) == cut and row.get("answer_cut", False) == (length < new)
    assert ["prompt_cut" in row for row in jsonl(out)] == [False, True, True]
    said = refused(capsys, encode_rows, model.config, tokenizer, jsonl(out), [[]] * 3, "file")
    assert "a prompt cut to the context" in said


def test_nan_while_sampling_is_one_line(folder, tmp_path, monkeypatch):
    """Logits that become NaN in mid-answer end the stage with the model's name."""
    def broken(logits, u, temperature):
        if len(u) == 5:  # the stage's batch; the model itself is sound
            logits = logits.clone()
            logits[1, 7] = float("nan")
        return draw(logits, u, temperature)

    monkeypatch.setattr(core.sampling, "draw", broken)
    rows = [{"id": f"p{i}", "prompt": [{"role": "user", "content": "Say."}]} for i in range(5)]
    command = ["generate.py", "--model", folder, "--prompts", dump(tmp_path / "p.jsonl", rows),
               "-n", "1", "--out", tmp_path / "o.jsonl", "--max-new-tokens", "8"]
    one_line(run(*command), f"{folder}: its logits are not numbers")
    assert not (tmp_path / "o.jsonl").exists()

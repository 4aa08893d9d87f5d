"""Loading and the probe: what is read rightly is found exact, all else is one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    dump,
    gold_rows,
    one_line,
    plain_logp,
    refused,
    run,
    sampled_without_cache,
    saved,
)
from families import tiny_model
from safetensors.torch import load_file, save_file

from core.models import context_of
from core.policy import ResponseLogps, score, shares_prompt
from core.probe import check_samples, check_scores, check_tokens, load_scorer
from core.sampling import sample

CPU = torch.device("cpu")
ROWS = [
    (list(range(5, 5 + n)), [list(range(40, 40 + m)), [60 + n, 61, 2]])
    for n, m in ((9, 7), (4, 2), (7, 5))
]

# What makes a family's own ways count: a factor that is not 1, a window that the rows pass.
CHANGES = {
    "falcon_h1": {"lm_head_multiplier": 2.0},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "granite": {"logits_scaling": 2.0},
    "hyperclovax": {"logits_scaling": 2.0},
    "mistral": {"sliding_window": 8},
}
FIVE = ["gemma2", "granite", "lfm2", "llama", "mistral"]
FAMILIES = sorted([*FIVE, *"""
    bamba bloom cohere cohere2 deepseek_v3 ernie4_5 exaone4 falcon falcon_h1 gemma gemma3
    gemma3_text glm4 gpt2 gpt_neox gpt_oss gptj granitemoe hunyuan_v1_dense hyperclovax jamba
    llama4_text mamba mamba2 minicpm3 mixtral mpt nanochat nemotron olmo olmo2 olmoe opt phi phi3
    qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma seed_oss smollm3 stablelm starcoder2
""".split()])


def outcome(capsys, check, *arguments) -> str:
    """exact, or refused in one line."""
    capsys.readouterr()
    try:
        check(*arguments)
    except SystemExit as stop:
        lines = capsys.readouterr().err.splitlines()
        assert stop.code == 2 and len(lines) == 1 and lines[0].startswith("error: name: ")
        return "refused"
    return "exact"


def assert_plain(model, prompt: list[int], responses: list[list[int]], logps: list[float]) -> None:
    with torch.no_grad():
        expected = [plain_logp(model, prompt, y).item() for y in responses]
    assert logps == pytest.approx(expected, abs=1e-3)


def assert_sampled_without_cache(model, prompts: list[list[int]], length: int, plain=None) -> None:
    u = torch.tensor(np.random.default_rng(0).random((2 * len(prompts), length)))
    heat, stop = torch.ones(len(u)), torch.arange(0, 384, 12)
    ours = sample(model, prompts, u, heat, stop)
    assert ours == sampled_without_cache(plain or model, prompts, u, heat, stop)


def try_family(capsys, family: str) -> list[str]:
    """A line of the table; what the probe lets through is compared with the test's own oracle."""
    model = tiny_model(family, **CHANGES.get(family, {}))
    scored = outcome(capsys, check_scores, "name", model, ROWS, "fp32")
    sampled = outcome(capsys, check_samples, "name", model, [prompt for prompt, _ in ROWS], 21)
    if scored == "exact":
        for (prompt, ys), logps in zip(ROWS, score(ResponseLogps(model), ROWS, "fp32")):
            assert_plain(model, prompt, ys, logps)
    if sampled == "exact":
        assert_sampled_without_cache(model, [prompt for prompt, _ in ROWS], 8)
    shared = scored == "exact" and shares_prompt(model, [([5], [[6, 7]])])
    return [family, scored, sampled, "yes" if shared else "no"]


@pytest.mark.parametrize("family", FIVE)
def test_family(capsys, family):
    expected = ["exact", "refused" if family == "lfm2" else "exact"]
    assert try_family(capsys, family)[1:3] == expected


@pytest.mark.slow
def test_table_of_families_is_up_to_date(capsys):
    """Rewrites the table of docs/models.md, and fails where it was another."""
    outcomes = {
        ("exact", "exact", "yes"): "exact, prompt shared",
        ("exact", "exact", "no"): "exact, a sequence a response",
        ("exact", "refused", "no"): "scored and trained, not sampled",
        ("refused", "refused", "no"): "refused",
    }
    families: dict[str, list[str]] = {name: [] for name in outcomes.values()}
    for family in FAMILIES:
        _, *outcome = try_family(capsys, family)
        families[outcomes[tuple(outcome)]].append(family)
    table = "".join(f"| {name} | {', '.join(which)} |\n" for name, which in families.items())
    path = ROOT / "docs/models.md"
    old = path.read_text(encoding="utf-8")
    head, _, rest = old.partition("| outcome | families |\n| --- | --- |\n")
    tail = rest.partition("\n\n")[2]
    new = f"{head}| outcome | families |\n| --- | --- |\n{table}\n{tail}"
    path.write_text(new, encoding="utf-8")
    assert new == old and f"the {len(FAMILIES)} families" in old


@pytest.mark.parametrize("scale, shift, expected", [(1.5, 0.0, "refused"), (1.0, 0.4, "exact")])
def test_transformed_head(capsys, scale, shift, expected):
    """A head that the model's own forward pass scales under a name that nobody knows is found. One
    that moves all logits together, as rounding in bf16 does, changes no probability."""
    model = tiny_model("llama")
    plain = model.forward

    def transformed(*arguments, **keywords):
        out = plain(*arguments, **keywords)
        out.logits = out.logits * scale + shift
        return out

    model.forward = transformed
    assert outcome(capsys, check_samples, "name", model, [[5, 6, 7]], 7) == expected
    assert outcome(capsys, check_scores, "name", model, ROWS, "fp32") == expected


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_eager_attention_in_the_config_is_not_used(copy):
    """Eager attention adds the boolean mask: siblings and the future would be seen."""
    for key in ("_attn_implementation", "attn_implementation"):
        edit_config(copy, **{key: "eager"})
    model = load_scorer(str(copy), CPU, ROWS, "fp32")
    assert model.config._attn_implementation == "sdpa" and shares_prompt(model, ROWS)
    model.set_attn_implementation("eager")  # as a family that has no other: a sequence a response
    assert not shares_prompt(model, ROWS)
    check_scores("name", model, ROWS, "fp32")


def test_missing_weights_are_named(copy, tmp_path):
    path, pairs = copy / "model.safetensors", dump(tmp_path / "pairs.jsonl", gold_rows(2))
    weights = load_file(path)
    weights["model.strange.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path, metadata={"format": "pt"})
    done = run("seed_dpo.py", "--model", copy, "--pairs", pairs, "--out", tmp_path / "out")
    one_line(done, "model.layers.1.mlp.up_proj.weight", "missing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
     "never run"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot load the model"),
    ({"hidden_size": 64}, "cannot load the model")])
def test_what_other_peoples_code_raises_is_one_line(copy, tmp_path, monkeypatch, changes, words):
    """Code of a folder is neither run nor asked about."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (copy / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(copy, **changes)
    pairs = dump(tmp_path / "pairs.jsonl", gold_rows(2))
    one_line(run("seed_dpo.py", "--model", copy, "--pairs", pairs, "--out", tmp_path / "o"), words)
    assert not (tmp_path / "ran").exists()


def test_tokens_that_a_model_does_not_have(capsys):
    model = tiny_model("llama", vocab_size=100)
    check_tokens("name", model, [([5], [[6, 99]])])
    for prompt, y, words in (([5], [6, 100], "token 100 has no embedding; the model has 100"),
                             ([], [6], "without any token")):
        assert words in refused(capsys, check_tokens, "name", model, [(prompt, [y])])


def stretched(kind: str, plain: bool = False):
    """A model whose positions are rotated otherwise from the 17th on; or, if `plain`, never."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4 if plain else [1.0, 4.0, 16.0, 64.0],
            "original_max_position_embeddings": 16,
        }
        return tiny_model("phi3", max_position_embeddings=64, original_max_position_embeddings=16,
                          sliding_window=None, rope_parameters=rope)
    if plain:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
    return tiny_model("llama", max_position_embeddings=16, rope_parameters=rope)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_up_to_its_context_a_rotation_is_plain(kind):
    """Also where responses together are more than the context."""
    model, plain = stretched(kind), stretched(kind, plain=True)
    assert context_of(model.config) == 16 == context_of(plain.config)
    rows = [(list(range(5, 14)), [list(range(20, 27)), list(range(40, 46))]),
            ([50, 51, 52], [[53, 54], list(range(55, 68))])]
    for row, logps in zip(rows, score(ResponseLogps(model), rows, "fp32")):
        assert_plain(plain, *row, logps)
    check_scores("name", model, rows, "fp32")
    prompts = [prompt for prompt, _ in rows]
    check_samples("name", model, prompts, 16)
    assert_sampled_without_cache(model, prompts, 7, plain)
    # not so beyond it
    ids = torch.arange(5, 25)[None]
    assert (model(ids).logits - plain(ids).logits).abs().max() > 0.01


def test_what_differs_ends_a_stage_before_any_work(tmp_path, tokenizer):
    """HyperCLOVA X multiplies by what Granite divides by."""
    model = saved(tmp_path / "model", tiny_model("hyperclovax", logits_scaling=2.0), tokenizer)
    pairs = dump(tmp_path / "pairs.jsonl", gold_rows(2))
    use = ["--model", model, "--out", tmp_path / "out"]
    one_line(run("seed_dpo.py", *use, "--pairs", pairs), "nats a token")
    one_line(run("generate.py", *use, "--prompts", pairs), "cannot be sampled from")
    assert not list(tmp_path.glob("out*"))

"""The demo's tables, measures and pictures over seeds, against scipy and numbers worked by hand."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    dump,
    gold_rows,
    jsonl,
    ok,
    plain_logp,
    run,
    stats_of,
    weights_of,
)
from scipy.stats import ttest_1samp, ttest_rel
from transformers import AutoModelForCausalLM

from bench import demo_measures, demo_plots, demo_table, extrapolate, stats
from core.chat import encode_prompt
from core.models import load_tokenizer

SCORES = {"spa": {1: 0.3, 2: 0.32, 10: 0.31}, "worst": {1: 0.41, 2: 0.4, 10: 0.44, 3: 0.9}}


@pytest.fixture
def call(monkeypatch):
    """Calls the main of a module of bench/ with flags."""

    def main(module, *flags):
        monkeypatch.setattr("sys.argv", [module.__name__, *map(str, flags)])
        module.main()
    return main


def test_intervals_against_scipy():
    rng = np.random.default_rng(0)
    one, other = rng.normal(0.3, 1, 20), rng.normal(0, 1, 20)
    gain, oracle = stats.interval(one - other), ttest_rel(one, other)
    bounds = oracle.confidence_interval(0.95)
    assert gain.p == pytest.approx(oracle.pvalue)
    assert (gain.mean - gain.half, gain.mean + gain.half) == pytest.approx(tuple(bounds))
    gains = [stats.Interval(m, 1, p) for m, p in ((1, 0.2), (-1, 0.001), (1, 0.04), (1, math.nan))]
    assert stats.by_chance(gains) == "2 of 3 differ at 95 %; 0.2 would by chance."
    assert [sum(map(f, gains)) for f in (stats.is_ahead, stats.is_behind)] == [1, 1]


@pytest.fixture
def table(tmp_path):
    """Reports of two arms at three and four seeds, one of which is not measured yet."""
    for arm, scores in SCORES.items():
        for seed, score in scores.items():
            folder = tmp_path / str(seed) / arm
            folder.mkdir(parents=True)
            policies = {"init": {"score": 0.1}, "seed": {"score": 0.2, "win_rate": 0.5}}
            policies |= {f"round{t}": {"score": score, "ended": 0.25} for t in (1, 2)}
            (folder / "report.md.stats.json").write_text(json.dumps({"policies": policies}))
            if seed < 10:
                measures = {name: {"kl": 4.0 * seed, "fluency": -2.0} for name in policies}
                (folder / "measures.json").write_text(json.dumps(measures))
    return tmp_path


def test_table_over_seeds(table, capsys, call):
    call(demo_table, table)
    printed = capsys.readouterr().out
    assert "| SPA | 3 | 0.310 ± 0.025 | – | 0.250 ± ? | – | – | – | 6.000 ± 25.412 |" in printed
    gains = ttest_1samp([0.11, 0.08, 0.13], 0)
    low, high = gains.confidence_interval()
    expected = f"+{0.32 / 3:.3f} ± {(high - low) / 2:.3f} | {gains.pvalue:.3f}"
    assert f"| worst case − SPA | 3 | {expected} |" in printed
    assert "flipped" not in printed and "replayed" not in printed
    assert "Gold score: 4 of 6 differ at 95 %" in printed


def test_a_row_beside_the_ray_at_its_own_kl():
    """√KL 2 lies halfway from 1 to 3, where the ray has 0.4; at the second seed no ray is that
    far."""
    runs = {("rays", "seed"): {"1": {"kl": 1, "score": 0.3}, "2": {"kl": 1, "score": 0.3}},
            ("rays", "ray3"): {"1": {"kl": 9, "score": 0.5}, "2": {"kl": 2, "score": 0.4}},
            ("spa", "round2"): {"1": {"kl": 4, "score": 0.25}, "2": {"kl": 4, "score": 0.25}}}
    assert demo_table.over_the_ray(runs, ("spa", "round2")) == pytest.approx([-0.15])


def test_picture_of_the_demo(table):
    """Methods without a run are left out."""
    curves = demo_plots.plot_kl(demo_table.read_runs(table))
    names = [text.get_text() for text in curves.legends[0].get_texts()]
    assert "gold pairs replayed" not in names
    spa = curves.axes[0].containers[names.index("SPA, 0 to 2 rounds")][0]
    # π_0 is known from a third seed, of the worst case
    assert spa.get_xdata() == pytest.approx([math.sqrt(8), math.sqrt(6), math.sqrt(6)])
    assert spa.get_ydata() == pytest.approx([0.2, 0.31, 0.31])


def test_measures_by_hand():
    """Two prompts, two answers each: gaps 1, 3 and 2, 2 have mean 2 and no spread over prompts."""
    policy, init = np.array([[-1.0, -2.0], [-3.0, -4.0]]), np.array([[-2.0, -5.0], [-5.0, -6.0]])
    measures = demo_measures.far_and_fluent(policy, init, np.array([[2, 4], [2, 4]]))
    assert measures["kl"] == 2 and measures["kl_error"] == 0
    assert measures["fluency"] == -18 / 12
    # sums of init + 1.5 tokens: 2 and −2, over 12 tokens; two prompts: √2 · √(4 + 4) / 12
    assert measures["fluency_error"] == pytest.approx(4 / 12)


def test_the_ray_at_the_kl_of_a_run(tmp_path, capsys, call):
    """From KL 6.25 at c = 1.5 to 16 at 2: √KL 3.25 lies halfway."""
    rays = {"init": 0, "seed": 4, "ray1.5": 6.25, "ray2": 16, "match": 99}
    spa = {"init": 0, "seed": 4, "round1": 5, "round2": 3.25 ** 2}
    for name, policies in (("rays", rays), ("spa", spa)):
        (tmp_path / name).mkdir()
        measures = {policy: {"kl": kl} for policy, kl in policies.items()}
        (tmp_path / name / "measures.json").write_text(json.dumps(measures))
    call(demo_measures, tmp_path / "rays", "--match", tmp_path / "spa")
    assert capsys.readouterr().out == "1.75\n"


def test_measures_of_a_run(tmp_path, call, folder, other_folder):
    """KL of tiny models from their own logits."""
    prompts = dump(tmp_path / "eval.jsonl", gold_rows(3))
    arm = tmp_path / "1/spa"
    for name, path in (("init", folder), ("seed", other_folder)):
        out = arm / f"eval/{name}.jsonl"
        ok(run("generate.py", "--model", path, "--prompts", prompts, "--out", out,
               "--max-new-tokens", 6))
    call(demo_measures, arm)
    measures = json.loads((arm / "measures.json").read_text())
    assert measures["init"]["kl"] == pytest.approx(0, abs=1e-6)
    model = stats_of(arm / "eval/seed.jsonl")["settings"]["model"]
    samples = tmp_path / "1/measured" / f"{model}.jsonl"
    settings = stats_of(samples)["settings"]
    assert settings["temperature"] == 1 and settings["max_new_tokens"] == 6
    policy, init = (AutoModelForCausalLM.from_pretrained(path) for path in (other_folder, folder))
    tokenizer, gaps, fluent, tokens = load_tokenizer(folder), [], 0.0, 0
    for row in jsonl(samples):
        prompt = encode_prompt(tokenizer, row["prompt"])
        for y in row["response_ids"]:
            logps = [plain_logp(model, prompt, y).item() for model in (policy, init)]
            gaps.append(logps[0] - logps[1])
            fluent += logps[1]
            tokens += len(y)
    assert measures["seed"]["kl"] == pytest.approx(np.mean(gaps), abs=1e-4)
    assert measures["seed"]["fluency"] == pytest.approx(fluent / tokens, abs=1e-5)


def test_extrapolated_weights(tmp_path, call, folder, other_folder):
    out = tmp_path / "ray"
    call(extrapolate, "--reference-model", folder, "--model", other_folder, "--scale", 2.5,
         "--out", out)
    start, end, ray = map(weights_of, (folder, other_folder, out))
    assert start.keys() == ray.keys()
    for name, weight in ray.items():
        torch.testing.assert_close(weight, 2.5 * end[name].float() - 1.5 * start[name].float())
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == Path(other_folder, name).read_bytes()

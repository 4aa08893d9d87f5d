"""The demo's tables, measures and pictures over seeds, against scipy and numbers worked by hand."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import CORPUS, dump

from bench import demo_measures, demo_plots, demo_table
from core.chat import vocabulary
from core.folder import fingerprint
from core.models import load_tokenizer


def test_table_over_seeds_against_scipy(tmp_path, capsys, monkeypatch):
    """The t-interval, its test, the seeds that a difference needs, the tables of a folder."""
    from scipy.stats import nct, t, ttest_1samp

    gains = [-0.114, 0.004, -0.052, -0.037, -0.039]
    test = ttest_1samp(gains, 0)
    assert demo_table.paired_t(gains) == pytest.approx(test.pvalue)
    assert demo_table.p_value(test.pvalue) == "0.067"
    low, high = test.confidence_interval()
    assert demo_table.interval(gains, "+") == f"−{-np.mean(gains):.3f} ± {(high - low) / 2:.3f}"
    effect = abs(np.mean(gains)) / np.std(gains, ddof=1)

    def power(n):
        return nct.sf(t.ppf(0.975, n - 1), n - 1, effect * math.sqrt(n))

    needed = demo_table.seeds_to_decide(gains)
    assert power(needed + 1) > 0.8 > power(needed - 2)
    assert demo_table.seeds_to_decide([0.1, -0.1]) is None
    assert demo_table.interval([1.0]) == "1.000 ± ?"
    quality = {"accuracy": 0.75, "wrong_among_flagged": 0.5, "wrong": 0.25}
    for arm, gain in (("one_spa_0", 0.0), ("one_iterdpo", 0.1)):
        for seed in (1, 2, 10) + (3,) * (gain == 0):  # alone at seed 3: no part of the table
            folder = tmp_path / str(seed) / arm
            folder.mkdir(parents=True)
            score = {"characters": 9.0, "win_rate": 0.5}
            policies = {
                "init": {"characters": 9.0, "score": 0.1},
                "seed": {**score, "score": 0.2},
                "round1": {**score, "score": 0.3 + gain * (1 + seed / 100)},
            }
            stats = {"policies": policies, "labels": {"round1": quality}}
            (folder / "report.md.stats.json").write_text(json.dumps(stats))
            loss = 0.5 + gain * (1 + seed / 100)
            measures = {
                "tenth": {"seed": 0.1, "round1": 0.2 - gain * seed},
                "labels": {"round1": {"all": [96.0, 72.0], "flagged": [seed, 1.0]}},
                "radii": [0.0, 0.1],
                "heldout": {"round1": {"loss": [loss, 2 * loss], "right": 0.75}},
            }
            if seed < 10:
                (folder / "measures.json").write_text(json.dumps(measures))
    monkeypatch.setattr("sys.argv", ["demo_table.py", str(tmp_path)])
    demo_table.main()
    printed = capsys.readouterr().out
    assert "| SPA | 3 | 0.300 ± 0.000 | 0.500 ± 0.000 | 9 | 0.750 ± 0.000 |" in printed
    assert "self-labels alone (DE) − SPA | 3 | +0.104 ± 0.012 | < 0.001 |" in printed
    assert "Two rounds" not in printed
    # the worst tenth: −0.1 and −0.2, p = 0.2048 of t = −3 with one degree of freedom
    assert "(DE) | 2 | 0.050 ± 0.635 | −0.150 ± 0.635 | 0.205 | 4 |" in printed
    assert "| SPA | 2 | 0.500 ± 0.000 | 1.000 ± 0.000 | 0.750 ± 0.000 |" in printed
    assert "(DE) − SPA | 2 | +0.101 ± 0.006 | +0.203 ± 0.013 | 0.750" in printed
    # 1 of 1 and 1 of 2 flagged labels are right; Σ 2 of Σ 3 pairs, 1.5 a round
    assert "| SPA | 2 | 0.750 ± 0.000 (96.0) | 0.667 ± 2.824 (1.5) | – |" in printed
    assert "2 runs are not measured yet" in printed


def test_ratio_over_seeds_by_hand():
    """3 of 5; residuals ∓0.2 of a mean of 2.5, t = 12.706. Alike wholes: the mean of the shares."""
    assert demo_table.ratio_interval([1.0, 2.0], [2.0, 3.0]) == "0.600 ± 1.016"
    assert demo_table.ratio_interval([1.0, 2.0, 2.0], [4.0] * 3) == demo_table.interval(
        [0.25, 0.5, 0.5]
    )
    assert demo_table.ratio_interval([1.0], [2.0]) == "0.500 ± ?"


def test_demo_measures_by_hand():
    """Of 20 prompts the worst two; a budget of 0.6 moves ξ = 0.5 and a sixth of ξ = 0.6."""
    scores = np.arange(40.0).reshape(20, 2)[::-1]
    assert demo_measures.worst_tenth(scores) == 1.5
    assert demo_measures.worst_tenth(scores[:5]) == 30.5
    moved = demo_measures.would_move(np.array([0.8, 0.6, 0.5]), 0.2)
    assert moved == pytest.approx([0, 1 / 6, 1])
    right, flagged = np.array([1.0, 0.5, 0.0, 1.0]), np.array([True, False, False, False])
    fractions = np.array([0.25, 0.5, 1.0, 0.0])
    counts = demo_measures.label_counts(right, flagged, fractions, {"would 0.01": 1 - fractions})
    assert counts == {
        "all": [4, 2.5],
        "flagged": [1, 1],
        "moved": [1.75, 0.5],
        "would 0.01": [2.25, 2],
        "others": [1.5, 1.25],
    }
    # ξ = ½ throughout: 0.1 moves a fifth of the mass to 0, where the loss is 1 + log 6
    losses = demo_measures.heldout_losses(np.zeros(3))
    assert demo_measures.RADII[0] == 0 and demo_measures.RADII[3] == 0.1
    assert losses[0] == pytest.approx(math.log(2))
    assert losses[3] == pytest.approx(0.8 * math.log(2) + 0.2 * (1 + math.log(6)))
    policy, init = [[-1.0, -4.0], [-2.0, -2.0], [-3.0, -5.0]], [[-2.0, -3.0]] * 3
    sides = [(0, 1), None, (1, 0)]
    assert demo_measures.heldout_margins(policy, init, sides, 0.1) == pytest.approx([0.2, -0.1])


def test_demo_measures_of_a_run(tmp_path, monkeypatch, folder, other_folder):
    """A run of tiny models: losses from the models' own logits; nothing is scored twice."""
    arm = tmp_path / "table/1/gold"
    shutil.copytree(other_folder, arm / "seed")
    (arm / "seed.stats.json").write_text(json.dumps({"settings": {"beta": 0.5}}))
    (arm / "eval").mkdir()
    rows = []
    for i, texts in enumerate([("good", "bad"), ("fine", "fine"), ("awful", "great")]):
        ids = [[5 + i, 7, 2], [9, 11 + i]]
        prompt = [{"role": "user", "content": CORPUS[i]}]
        rows.append({"id": str(i), "prompt": prompt, "responses": texts, "response_ids": ids})
        rows[-1] |= {"ended": [True, False], "vocabulary": vocabulary(load_tokenizer(folder))}
    for name in ("init", "seed"):
        dump(arm / f"eval/{name}.jsonl", rows)
    paths = {"init": folder, "seed": str(arm / "seed")}
    report = {
        "policies": {"init": {}, "seed": {}},
        "settings": {name: fingerprint(path) for name, path in paths.items()},
    }
    (arm / "report.md.stats.json").write_text(json.dumps(report))
    command = ["demo_measures.py", str(tmp_path / "table"), "--model", folder]
    monkeypatch.setattr("sys.argv", [*command, "--precision", "fp32"])
    demo_measures.main()

    tokenizer = load_tokenizer(folder)
    change = []
    for row, (w, l) in ((rows[0], (0, 1)), (rows[2], (1, 0))):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
        prompt = prompt["input_ids"] if not isinstance(prompt, list) else prompt
        sums = []
        for path in (paths["seed"], paths["init"]):
            model = transformers.AutoModelForCausalLM.from_pretrained(path)
            for y in (row["response_ids"][w], row["response_ids"][l]):
                logits = model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1:-1]
                sums.append(logits.log_softmax(-1)[range(len(y)), y].sum().item())
        change.append(0.5 * (sums[0] - sums[1] - sums[2] + sums[3]))
    found = json.loads((arm / "measures.json").read_text())
    assert found["heldout"]["pairs"] == 2 and found["labels"] == {}
    losses = demo_measures.heldout_losses(np.array(change))
    assert found["heldout"]["seed"]["loss"] == pytest.approx(losses, rel=1e-4)
    assert found["heldout"]["seed"]["right"] == np.mean(np.array(change) > 0)
    assert set(found["tenth"]) == {"init", "seed"}
    (arm / "measures.json").unlink()
    (arm / "seed/model.safetensors").unlink()
    demo_measures.main()
    assert json.loads((arm / "measures.json").read_text()) == found


def test_pictures_of_the_demo(tmp_path, monkeypatch):
    """A pair's p̃ and flag are found by its id; ε = 0.05 of four pairs moves ξ = 0.5 in part, and so
    does 0.01; methods and panels without a run are left out."""
    assert demo_plots.mean_and_half([1.0, 2.0]) == pytest.approx((1.5, 12.7062 * 0.5))
    assert demo_plots.mean_and_half([1.0]) == (1.0, 0.0)
    run = tmp_path / "1/worst"
    (run / "round1/policy").mkdir(parents=True)
    text = {"prompt": [{"role": "user", "content": "?"}], "chosen": "a", "rejected": "b"}
    rows = [
        {"id": i, "margin": margin, "chosen_logp": -1.0, "rejected_logp": -2.0, **text}
        for i, margin in zip("abcd", (2.0, 0.0, 1.0, 0.5))
    ]
    dump(run / "round1/worst.jsonl", rows)
    steps = [
        {"batch": ["c", "a"], "p_tilde": [0.3, 0.7], "flagged": [], "tau": None},
        {"batch": ["b", "d"], "p_tilde": [0.6, 0.4], "flagged": ["d"], "tau": 0.5},
    ]
    dump(run / "round1/policy/log.jsonl", steps)
    found = demo_plots.defences_of(run, 1)
    assert found["tilde"].tolist() == [0.7, 0.6, 0.3, 0.4]
    assert found["could"].tolist() == [False, True, False, True]
    assert found["flagged"].tolist() == [False, False, False, True]
    assert [own.tolist() for own in found["moved"]] == [[False, True, False, False]] * 2
    assert found["taus"] == [0.5]
    runs = {
        arm: {
            seed: {"policies": {"seed": {"score": 0.5}, "round1": {"score": 0.6 + gain * seed}}}
            for seed in seeds
        }
        for arm, gain, seeds in (("spa", 0.0, (1, 2, 3)), ("worst", -0.1, (3, 1)))
    }
    assert demo_plots.paired(runs, "worst", "spa", "round1") == pytest.approx([-0.3, -0.1])
    assert demo_plots.paired(runs, "worst", "spa", "round2") == []
    demo_plots.plot_defences(run, 1, tmp_path / "defences.png")
    assert (tmp_path / "defences.png").stat().st_size > 10_000
    figures = []
    monkeypatch.setattr(demo_plots, "save", lambda figure, path: figures.append(figure))
    demo_plots.plot_stages(runs, tmp_path)
    demo_plots.plot_stages({"spa": runs["spa"]}, tmp_path)
    both, alone = figures
    assert [len(figure.axes) for figure in figures] == [2, 1]
    names = [text.get_text() for text in both.axes[0].get_legend().get_texts()]
    assert names == ["SPA (3 seeds)", "worst case, ε = 0.01 (2 seeds)"]
    (paired,) = both.axes[1].get_legend().get_texts()
    assert paired.get_text() == "clean seed labels (2 seeds)"
    assert len(alone.axes[0].containers) == 1

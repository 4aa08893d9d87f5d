"""What is measured, against numbers worked by hand, the official leaderboard, and plain loops."""

import csv
import gzip
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import CORPUS, ROOT, dump, gold_rows, jsonl, ok, run
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from bench import demo_measures, demo_plots, demo_table
from core.chat import vocabulary
from core.models import load_tokenizer
from core.folder import fingerprint
from judges import judge, mt_bench, report
from judges.history import history, settings_by_name, stage_table
from judges.judge import wins
from judges.measures import (
    RIDGE,
    bootstrap_interval,
    label_quality,
    leaderboard,
    length_controlled,
    mean_and_error,
    mt_bench_scores,
    paired_p,
    rate_at_equal_length,
    read_difficulty,
    win_rate,
)

OFFICIAL = (
    ROOT.parent / "shared/data/alpaca_eval"
)  # annotations and leaderboard of AlpacaEval's repository, where they are at hand


def test_wins_and_errors_by_hand():
    w = wins(np.array([[1.0, 0.5], [0.2, 0.2]]), np.array([[0.5, 0.5], [0.3, 0.1]]))
    assert w.tolist() == [[1, 0.5], [0, 1]]
    mean, error = mean_and_error(w)  # prompts 0.75 and 0.5: mean 0.625, s.d. 0.1768, over √2
    assert mean == 0.625 and error == pytest.approx(0.125)
    assert math.isnan(mean_and_error(np.array([[1.0]]))[1])


def test_label_quality_by_hand():
    """Shares of pairs: 0.55 agrees as 1 does, ½ is half; base rate of what could be flagged."""
    preference = np.array([0.55, 0.0, 0.5, 1.0, 0.45])
    flagged = np.array([False, True, True, False, False])
    could = np.array([True, True, True, True, False])
    assert label_quality(preference, flagged, could) == {
        "pairs": 5,
        "accuracy": 0.5,
        "could_be_flagged": 4,
        "flagged": 2,
        "wrong_among_flagged": 0.75,
        "wrong": 0.375,
    }
    none = np.zeros(5, bool)
    quality = label_quality(preference, none, none)
    assert quality["wrong_among_flagged"] is None and quality["wrong"] is None


def test_rates_of_zero_and_one_have_an_exact_interval():
    """Clopper and Pearson's, over prompts: samples of one prompt count once."""
    from scipy.stats import binomtest

    for count in (1, 2, 50):
        for rate in (0, 1):
            exact = binomtest(rate * count, count).proportion_ci(method="exact")
            found = bootstrap_interval(np.full((count, 3), float(rate)))
            assert found == pytest.approx([exact.low, exact.high])
    assert 0 < bootstrap_interval(np.array([[0.0], [0.0], [1.0]]))[1] < 1.001


def test_interval_covers_and_paired_test_is_uniform_under_the_null():
    """Over 200 draws: 95 % intervals hold the truth in about 95 %, p < 0.1 in about 10 %; a paired
    difference is found."""
    dice = np.random.default_rng(0)
    held = small = 0
    for _ in range(200):
        first, second = (
            (dice.random((40, 2)) < 0.6).astype(float),
            (dice.random((40, 2)) < 0.6).astype(float),
        )
        low, high = bootstrap_interval(first)
        held += low <= 0.6 <= high
        small += paired_p(first, second) < 0.1
    assert 178 <= held <= 200 and 6 <= small <= 36
    common = dice.random((40, 1))
    assert paired_p(common + 0.05, common) < 1e-3 and paired_p(common, common) == 1
    assert (
        paired_p(np.array([[1.0], [1.0], [1.0]]), np.zeros((3, 1))) == 0.25
    )  # 2 of the 8 ways to choose signs
    assert all(math.isnan(v) for v in bootstrap_interval(np.full((1, 4), 0.25)))


def annotation(preference, one, two, model="mine", instruction="i"):
    return {
        "instruction": instruction,
        "output_1": one,
        "output_2": two,
        "generator_1": "base",
        "generator_2": model,
        "preference": preference,
    }


def test_win_rate_by_hand():
    score = win_rate([annotation(p, "a", "bcd") for p in (1.0, 2.0, 1.5, 0, None, 1.75, math.nan)])
    assert score["win_rate"] == pytest.approx(100 * np.mean([0, 1, 0.5, 0.5, 0.75]))
    assert score["standard_error"] == pytest.approx(
        100 * np.std([0, 1, 0.5, 0.5, 0.75], ddof=1) / math.sqrt(5)
    )
    assert [
        score[k] for k in ("n_wins", "n_wins_base", "n_draws", "n_total", "n_missing", "avg_length")
    ] == [2, 1, 2, 5, 2, 3]
    assert score["discrete_win_rate"] == pytest.approx(60)


@pytest.mark.skipif(
    not OFFICIAL.exists(), reason="AlpacaEval's official annotations are not at hand"
)
def test_win_rates_equal_the_official_leaderboard():
    table = {row[""]: row for row in csv.DictReader(open(OFFICIAL / "leaderboard.csv"))}
    scores = leaderboard([str(p) for p in sorted(OFFICIAL.glob("*.annotations.json.gz"))], None)
    assert len(scores) == 4
    for name, score in scores.items():
        for key in (
            "win_rate",
            "standard_error",
            "discrete_win_rate",
            "avg_length",
            "n_wins",
            "n_wins_base",
            "n_draws",
            "n_total",
        ):
            assert score[key] == pytest.approx(float(table[name][key]), abs=1e-6)


@pytest.mark.skipif(
    not OFFICIAL.exists(), reason="AlpacaEval's official annotations are not at hand"
)
@pytest.mark.parametrize(
    "name,controlled",
    [
        ("claude-2", 26.678997104662166),
        ("gemma-2b-it", 4.086377058718601),
        ("phi-2-sft", 5.303996537933407),
        ("pythia-12b-mix-sft", 2.98013647591139),
    ],
)
def test_length_control_equals_the_official_package(name, controlled, tmp_path):
    """Figures of alpaca_eval 0.6.6 (get_length_controlled_winrate, scikit-learn 1.7.2) for these
    annotations and this made-up df_gamed.csv."""
    dice = np.random.default_rng(1)
    difficulty = dice.normal(size=805) * 1.5
    with open(tmp_path / "df_gamed.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            [
                "model",
                "index",
                "preference",
                "std_delta_len",
                "instruction_difficulty",
                "not_gamed_baseline",
            ]
        )
        for model in ("g1", "g2"):
            out.writerows(
                [
                    model,
                    i,
                    float(np.clip(0.5 + 0.2 * dice.normal(), 0, 1)),
                    dice.normal() * 2,
                    difficulty[i],
                    False,
                ]
                for i in range(805)
            )
    path = [str(OFFICIAL / f"{name}.annotations.json.gz")]
    assert leaderboard(path, str(tmp_path / "df_gamed.csv"))[name][
        "length_controlled_winrate"
    ] == pytest.approx(controlled, abs=1e-4)


def synthetic(count=400, bias=1.5, skill=-0.5, hard=0.8, seed=0):
    """Annotations from the regression's own model: a judge that likes length, a weaker policy, some
    instructions harder."""
    dice = np.random.default_rng(seed)
    lengths, difficulty = dice.integers(50, 1500, (count, 2)), dice.normal(size=count)
    delta = lengths[:, 0] - lengths[:, 1]
    z = -bias * np.tanh(delta / delta.std(ddof=1)) + skill + hard * difficulty
    rows = [
        annotation(1 + float(1 / (1 + np.exp(-v))), "x" * a, "y" * b, instruction=str(i))
        for i, (v, (a, b)) in enumerate(zip(z, lengths))
    ]
    return rows, difficulty, 100 * float((1 / (1 + np.exp(-(skill + hard * difficulty)))).mean())


def test_length_control_recovers_the_rate_at_equal_length():
    rows, difficulty, truth = synthetic()
    score = length_controlled(rows, (difficulty, []))
    predicted = 1 / (1 + np.exp(-(-0.5 + 0.8 * difficulty)))
    assert score["length_controlled_winrate"] == pytest.approx(truth, abs=0.2)
    assert score["lc_standard_error"] == pytest.approx(100 * predicted.std(ddof=1) / 20, rel=0.02)
    plain, _, truth = synthetic(hard=0.0)
    score = length_controlled(plain)
    assert (
        score["length_controlled_winrate"] == pytest.approx(truth, abs=0.2)
        and 0 < score["lc_standard_error"] < 3
    )
    assert (
        length_controlled([annotation(1.2, "a", "b", model="base")])["length_controlled_winrate"]
        == 50
    )


def test_length_control_against_a_separate_optimiser():
    """The fit with gamed baselines is the minimum of C·Σ weight·log loss + |coefficients|₁ for one
    C of the grid."""
    from scipy.optimize import minimize

    rows, difficulty, _ = synthetic(seed=3)
    dice = np.random.default_rng(1)
    gamed = [
        {"instruction_difficulty": d, "std_delta_len": s, "preference": p}
        for d, s, p in zip([*difficulty] * 2, dice.normal(size=800), dice.random(800))
    ]
    ours = length_controlled(rows, (difficulty, gamed))["length_controlled_winrate"]
    delta = np.array([len(r["output_1"]) - len(r["output_2"]) for r in rows])
    x = np.vstack(
        [
            [[math.tanh(g["std_delta_len"]), g["instruction_difficulty"], 0] for g in gamed],
            np.column_stack([np.tanh(delta / delta.std(ddof=1)), difficulty, np.ones(400)]),
        ]
    )
    p = np.array([g["preference"] for g in gamed] + [r["preference"] - 1 for r in rows])
    weight = np.array([0.1] * 800 + [1.0] * 400)

    def rate(strength):
        def value(both):
            w = both[:3] - both[3:]
            z = x @ w
            slope = strength * x.T @ (weight * (1 / (1 + np.exp(-z)) - p))
            return strength * (
                weight * (np.logaddexp(0, z) - p * z)
            ).sum() + both.sum(), np.concatenate([slope + 1, 1 - slope])

        both = minimize(
            value,
            np.full(6, 0.1),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * 6,
            options={"ftol": 1e-14},
        ).x
        w = both[:3] - both[3:]
        return 100 * (1 / (1 + np.exp(-(difficulty * w[1] + w[2])))).mean()

    assert min(abs(rate(c) - ours) for c in np.logspace(-4, 4, 10)) < 0.02


def judged(count, samples, seed, spread=1.5):
    """Wins and losses at 0 or 1 by a judge that likes length; some prompts are harder."""
    dice = np.random.default_rng(seed)
    base = dice.integers(50, 1500, count)
    mine = dice.integers(50, 1500, (count, samples))
    delta = base[:, None] - mine
    z = -np.tanh(delta / delta.std()) + 0.3 + spread * dice.normal(size=(count, 1))
    won = dice.random((count, samples)) < 1 / (1 + np.exp(-z))
    return [
        annotation(1 + float(won[i, k]), "x" * base[i], "y" * mine[i, k], instruction=str(i))
        for i in range(count)
        for k in range(samples)
    ]


def turned(rows):
    """The same judgements with the models' places exchanged."""
    return [
        annotation(
            3 - row["preference"], row["output_2"], row["output_1"], instruction=row["instruction"]
        )
        for row in rows
    ]


def few_wins(count, wins, seed):
    dice = np.random.default_rng(seed)
    lengths = dice.integers(50, 1500, (count, 2))
    return [
        annotation(2.0 if i < wins else 1.0, "x" * a, "y" * b, instruction=str(i))
        for i, (a, b) in enumerate(lengths)
    ]


def separated(count):
    """The longer answer always wins: length alone tells who does."""
    return [
        annotation(1.0 + i % 2, "x" * 500, "y" * (480 + 120 * (i % 2)), instruction=str(i))
        for i in range(count)
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        judged(30, 2, 0),
        judged(200, 1, 1),
        synthetic(100)[0],
        few_wins(50, 1, 0),
        few_wins(50, 49, 1),
        few_wins(50, 0, 2),
        few_wins(3, 1, 3),
        separated(20),
        [annotation(1.5, "a", "b", instruction=str(i)) for i in range(4)],
        [annotation(1.001, "a", "bc", instruction=str(i)) for i in range(4)],
    ],
)
def test_length_control_is_symmetric_in_the_models(rows):
    there, back = length_controlled(rows), length_controlled(turned(rows))
    assert there["length_controlled_winrate"] + back["length_controlled_winrate"] == pytest.approx(
        100, abs=1e-6
    )
    assert there["lc_standard_error"] == pytest.approx(
        back["lc_standard_error"], abs=1e-6, nan_ok=True
    )
    low, high = back.get("lc_interval", (0, 0))
    assert there.get("lc_interval", [100, 100]) == pytest.approx([100 - high, 100 - low])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 0.3, 0.5, 1]), st.integers(1, 99)), min_size=2, max_size=30
    )
)
def test_length_control_is_symmetric_in_whatever_is_judged(found):
    test_length_control_is_symmetric_in_the_models(
        [
            annotation(1 + p, "x" * 50, "y" * length, instruction=str(i))
            for i, (p, length) in enumerate(found)
        ]
    )


@pytest.mark.filterwarnings("error")
def test_length_control_at_its_ends():
    """Losing everywhere is 0 with an exact bound, one win in 50 about 2, and equal judgements are
    their own rate whatever the lengths."""
    lost = length_controlled(few_wins(50, 0, 0))
    assert lost["length_controlled_winrate"] == 0
    assert lost["lc_interval"] == pytest.approx([0, 100 * (1 - 0.025 ** (1 / 50))])
    assert length_controlled(few_wins(50, 50, 0))["length_controlled_winrate"] == 100
    for seed in range(5):
        once = length_controlled(few_wins(50, 1, seed))
        assert 0 < once["length_controlled_winrate"] < 5 and 0 < once["lc_standard_error"] < 5
    thrice = length_controlled(few_wins(50, 0, 0) * 3)  # of the same prompts: no new evidence
    assert thrice["lc_interval"] == lost["lc_interval"]
    rows = [annotation(1.25, "a" * i, "b" * (9 - i), instruction=str(i)) for i in range(9)]
    score = length_controlled(rows)
    assert score["length_controlled_winrate"] == pytest.approx(25)
    none = length_controlled([annotation(None, "a", "b", instruction=str(i)) for i in range(9)])
    assert math.isnan(none["length_controlled_winrate"])
    published = length_controlled(few_wins(50, 1, 0), (np.zeros(50), []))
    assert 0 <= published["length_controlled_winrate"] < 10


def test_symmetric_fit_against_a_separate_optimiser():
    """Every row of weights has the minimum that scipy finds: samples, shares, separated."""
    from scipy.optimize import minimize

    dice = np.random.default_rng(2)
    for rows in (judged(60, 2, 5), synthetic(80)[0], few_wins(50, 2, 4), separated(20)):
        delta = np.array([len(r["output_1"]) - len(r["output_2"]) for r in rows])
        x = np.tanh(delta / delta.std(ddof=1))
        p = np.array([r["preference"] for r in rows]) - 1
        weight = dice.integers(0, 4, (3, len(rows))).astype(float)
        for w, rate in zip(weight, rate_at_equal_length(x, p, weight)):

            def loss(v):
                z = v[0] * x + v[1]
                return (w * (np.logaddexp(0, z) - p * z)).sum() + RIDGE * v[0] ** 2 / 2

            best = minimize(loss, np.zeros(2), method="Nelder-Mead", tol=1e-12).x[1]
            assert rate == pytest.approx(1 / (1 + math.exp(-best)), abs=1e-5)


def test_error_at_equal_length_is_that_of_replications():
    """± against the spread over 400 fresh sets of prompts, with one and with four samples a prompt;
    copies of a sample bring it no lower."""
    for samples in (1, 4):
        rates = [fitted(judged(64, samples, seed)) for seed in range(400)]
        errors = [
            length_controlled(judged(64, samples, seed))["lc_standard_error"] for seed in range(20)
        ]
        assert np.mean(errors) == pytest.approx(100 * np.std(rates, ddof=1), rel=0.2)
    one = judged(64, 1, 0)
    copies = length_controlled([row for row in one for _ in range(4)])["lc_standard_error"]
    assert copies == pytest.approx(length_controlled(one)["lc_standard_error"], rel=0.1)


def fitted(rows):
    delta = np.array([len(r["output_1"]) - len(r["output_2"]) for r in rows])
    p = np.array([r["preference"] for r in rows]) - 1
    return rate_at_equal_length(
        np.tanh(delta / delta.std(ddof=1)), p, np.ones((1, len(rows)))
    ).item()


def test_difficulty_files(tmp_path):
    path = tmp_path / "instruction_difficulty.csv"
    path.write_text("index,instruction_difficulty\n0,0.5\n1,-1\n")
    values, gamed = read_difficulty(str(path))
    assert values.tolist() == [0.5, -1] and gamed == []
    path.write_text(
        "model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
        "a,0,0.2,1.5,0.5,False\n"
        "b,0,0.3,-1,0.5,False\n"
    )
    values, gamed = read_difficulty(str(path))
    assert values.tolist() == [0.5] and gamed[1] == {
        "instruction_difficulty": 0.5,
        "std_delta_len": -1.0,
        "preference": 0.3,
    }


@pytest.mark.parametrize(
    "content,words",
    [
        ("[", "not JSON"),
        ("{}", "list of objects"),
        ("[]", "list of objects"),
        ("[3]", "entry 1"),
        ('[{"output_1": "a"}]', "output_2"),
        (json.dumps([annotation(1, "a", "b"), annotation(3, "a", "b")]), "entry 2: 'preference'"),
        (json.dumps([annotation("1", "a", "b")]), "'preference'"),
        (json.dumps([annotation(1, "a", "b"), annotation(1, "a", "b", "other")]), "several"),
        (json.dumps([annotation(None, "a", "b")]), "no annotation"),
    ],
)
def test_bad_annotations_are_one_line(content, words, tmp_path):
    (tmp_path / "a.json").write_text(content)
    done = run("evaluate.py", "--annotations", tmp_path / "a.json")
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_annotations_command(tmp_path):
    rows, *_ = synthetic(60)
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        json.dump(rows, file)
    printed = ok(run("evaluate.py", "--annotations", tmp_path / "a.json.gz")).stdout
    assert "| mine |" in printed and "symmetric" in printed
    (tmp_path / "lost.json").write_text(json.dumps(few_wins(50, 0, 0)))
    printed = ok(run("evaluate.py", "--annotations", tmp_path / "lost.json")).stdout
    assert "| mine | 0.00 [0.00, 7.11] | 0.00 [0.00, 7.11] |" in printed


def test_mt_bench_scores_by_hand():
    rows = [
        {"category": "math", "turn": 1, "score": 4.0},
        {"category": "math", "turn": 2, "score": math.nan},
        {"category": "stem", "turn": 1, "score": 9.0},
    ]
    assert mt_bench_scores(rows) == {
        "math": 4.0,
        "turn 1": 6.5,
        "turn 2": pytest.approx(math.nan, nan_ok=True),
        "stem": 9.0,
        "average": 6.5,
        "rated": 2,
        "unrated": 1,
    }


def test_stage_against_the_answers_it_wrote(folder, other_folder, tmp_path):
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    prompts = dump(
        tmp_path / "eval.jsonl",
        [{"id": str(i), "prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(6)],
    )
    command = [
        "evaluate.py",
        "--models",
        f"init={folder}",
        f"moved={other_folder}",
        "--prompts",
        prompts,
        "--out",
        tmp_path / "run",
        "--judge",
        "vader",
        "-n",
        "2",
        "--max-new-tokens",
        "20",
    ]
    printed = ok(run(*command)).stdout
    stats = json.load(open(tmp_path / "run/report.md.stats.json"))
    rows = {
        n: [json.loads(line) for line in open(tmp_path / f"run/eval/{n}.jsonl")]
        for n in ("init", "moved")
    }
    judge = SentimentIntensityAnalyzer().polarity_scores
    scores = {n: [[judge(t)["compound"] for t in r["responses"]] for r in rows[n]] for n in rows}
    for n in rows:
        assert stats["policies"][n]["score"] == pytest.approx(np.mean(scores[n]))
    expected = [
        (a > b) + 0.5 * (a == b)
        for m, i in zip(scores["moved"], scores["init"])
        for a, b in zip(m, i)
    ]
    moved = stats["policies"]["moved"]
    assert (
        moved["win_rate"] == pytest.approx(np.mean(expected))
        and "win_rate" not in stats["policies"]["init"]
    )
    assert (
        moved["ties"] == pytest.approx(np.mean([e == 0.5 for e in expected]))
        and moved["interval"][0] <= moved["win_rate"] <= moved["interval"][1]
    )
    outputs = json.load(
        open(tmp_path / "run/eval/moved.model_outputs.json")
    )  # what the official alpaca_eval reads
    assert [o["output"] for o in outputs] == [r["responses"][0] for r in rows["moved"]] and outputs[
        0
    ]["generator"] == "moved"
    assert leaderboard([str(tmp_path / "run/eval/moved.annotations.json")], None)["moved"][
        "win_rate"
    ] == pytest.approx(100 * np.mean(expected))
    assert "| moved |" in printed and (tmp_path / "run/report.png").stat().st_size > 10000
    assert (
        "| moved |" in ok(run(*command)).stdout
    )  # complete: the tables are shown again, nothing is generated
    assert "redoing" in ok(run(*["none" if c == "vader" else c for c in command])).stdout.lower()


def test_confidence_after_a_round_and_self_labels(folder, other_folder, tmp_path):
    """The confidence after training, from two reward computations that do not know of each other:
    label.py's on the trained policy."""
    rows = [
        {"id": g["id"], "prompt": g["prompt"], "responses": [g["chosen"], g["rejected"]]}
        for g in gold_rows(6)
    ]
    responses = dump(tmp_path / "r.jsonl", rows)
    fp32 = ["--precision", "fp32"]
    ok(
        run(
            "label.py",
            "--model",
            other_folder,
            "--reference-model",
            folder,
            "--responses",
            responses,
            "--out",
            tmp_path / "l.jsonl",
            *fp32,
        )
    )
    ok(
        run(
            "train.py",
            "--model",
            other_folder,
            "--pairs",
            tmp_path / "l.jsonl",
            "--out",
            tmp_path / "policy",
            "--lr",
            "1e-3",
            "--batch-size",
            "1",
            *fp32,
        )
    )
    args = evaluate.argparse.Namespace(judge="vader", precision="fp32", judge_model=None)
    quality, before, after = evaluate.judge_labels(
        args, str(tmp_path / "l.jsonl"), str(tmp_path / "policy"), 0, 1, torch.device("cpu")
    )
    labelled = jsonl(tmp_path / "l.jsonl")
    assert (
        before == pytest.approx([1 / (1 + math.exp(-r["margin"])) for r in labelled])
        and quality["pairs"] == 6
    )
    log = jsonl(tmp_path / "policy/log.jsonl")
    watched = [step for step in log if step["tau"] is not None]
    assert 0 < quality["could_be_flagged"] == len(watched) < 6  # of one pair each
    assert quality["flagged"] == sum(len(step["flagged"]) for step in watched)
    gold = dump(tmp_path / "p.jsonl", labelled)
    ok(
        run(
            "label.py",
            "--model",
            tmp_path / "policy",
            "--reference-model",
            folder,
            "--pairs",
            gold,
            "--out",
            tmp_path / "again.jsonl",
            *fp32,
        )
    )
    sign = {r["id"]: r["margin"] for r in jsonl(tmp_path / "again.jsonl")}
    assert [abs(math.log(a / (1 - a))) for a in after] == pytest.approx(
        [sign[r["id"]] for r in labelled], abs=1e-3
    )


def test_alpaca_eval_prompts_and_outputs_with_a_local_judge(folder, wide, tmp_path):
    questions = [
        {"instruction": CORPUS[i], "dataset": "d", "output": f"reference {i}", "generator": "gpt"}
        for i in range(7)
    ]
    (tmp_path / "eval.json").write_text(json.dumps(questions))
    command = [
        "evaluate.py",
        "--models",
        f"gpt={tmp_path / 'eval.json'}",
        f"mine={folder}",
        "--prompts",
        tmp_path / "eval.json",
        "--out",
        tmp_path / "run",
        "--judge",
        "llm",
        "--judge-model",
        wide,
        "--max-new-tokens",
        "8",
        "--precision",
        "fp32",
    ]
    ok(run(*command))
    outputs = json.load(open(tmp_path / "run/eval/mine.model_outputs.json"))
    assert [o["instruction"] for o in outputs] == CORPUS[:7] and {
        o["dataset"] for o in outputs
    } == {"d"}
    notes = json.load(open(tmp_path / "run/eval/mine.annotations.json"))
    assert [n["output_1"] for n in notes] == [f"reference {i}" for i in range(7)] and all(
        1 < n["preference"] < 2 for n in notes
    )
    mine = json.load(open(tmp_path / "run/report.md.stats.json"))["policies"]["mine"]
    assert (
        mine["win_rate"] == pytest.approx(np.mean([n["preference"] - 1 for n in notes]))
        and 0 <= mine["order_disagreement"] <= 1
    )
    assert "two orders named different winners" in (tmp_path / "run/report.md").read_text()
    (tmp_path / "few.json").write_text(json.dumps(questions[:3]))
    command[2] = f"gpt={tmp_path / 'few.json'}"
    assert "holds 3 outputs for 7 prompts" in run(*command).stderr
    turned = [*questions[:5], questions[6], questions[5]]
    (tmp_path / "few.json").write_text(json.dumps(turned))
    assert "entry 6: its instruction is not that of prompt '5'" in run(*command).stderr


def test_equal_instructions_keep_their_own_outputs(tmp_path):
    rows = [{"instruction": "Say.", "output": f"{i}"} for i in range(3)]
    (tmp_path / "o.json").write_text(json.dumps(rows))
    ask = [{"role": "user", "content": "Say."}]
    prompts = [{"id": str(i), "prompt": ask} for i in range(3)]
    found = evaluate.outputs_of(str(tmp_path / "o.json"), prompts, 2)
    assert [row["responses"] for row in found] == [["0"] * 2, ["1"] * 2, ["2"] * 2]


def test_no_verdict_is_null_in_annotations_and_counted(monkeypatch):
    """Three samples against the baseline: a win, no verdict in either order, one in one order."""
    verdicts = [1.0, math.nan, math.nan, 0.0, math.nan, 0.0]
    monkeypatch.setitem(judge.RANKERS, "llm", lambda *_: verdicts)
    rows = [{"prompt": [{"role": "user", "content": str(i)}], "responses": ["x"]} for i in range(3)]
    args = evaluate.argparse.Namespace(judge="llm", judge_model="m")
    answers = {"init": rows, "mine": rows}
    policies, found = evaluate.judge_policies(args, answers, 0, 1, torch.device("cpu"))
    assert [row["preference"] for row in found["mine"]] == [2.0, None, 1.75]
    assert policies["mine"]["no_verdict"] == 3
    assert policies["mine"]["win_rate"] == pytest.approx((1 + 0.5 + 0.75) / 3)


def mt_bench_folder(path, questions: list[dict]):
    """MT-Bench's files, with a reference answer to question 1."""
    path.mkdir()
    dump(path / "question.jsonl", questions)
    dump(
        path / "reference_gpt-4.jsonl",
        [{"question_id": 1, "choices": [{"index": 0, "turns": ["two", "four"]}]}],
    )
    single, multi = (
        "Q {question} A {answer}",
        "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    )
    dump(
        path / "judge_prompts.jsonl",
        [
            {"name": f"single{m}-v1{s}", "system_prompt": "Judge.", "prompt_template": t + r}
            for m, r1 in (("", ""), ("-math", " R {ref_answer_1}"))
            for s, t, r in (("", single, r1), ("-multi-turn", multi, r1 and r1 + " {ref_answer_2}"))
        ],
    )
    return path


def test_mt_bench_in_two_turns(folder, wide, tmp_path, monkeypatch):
    """Two turns with the first answer in the second's prompt, references for math, ratings parsed,
    failures counted."""
    folder = wide
    bench = mt_bench_folder(
        tmp_path / "bench",
        [
            {"question_id": 1, "category": "math", "turns": ["1+1?", "Twice that?"]},
            {"question_id": 2, "category": "writing", "turns": ["Write.", "Again {now}."]},
        ],
    )
    asked = []
    real = mt_bench.chat

    def chat(args, chats, *rest):
        asked.extend(chats)
        # the local model writes nonsense: the ratings below stand for a judge's
        assert len(real(args, chats, *rest)) == 4
        return ["Rating: [[8]]", "[[2.5]]", "no idea", "[[10]]"]

    monkeypatch.setattr(mt_bench, "chat", chat)
    monkeypatch.setattr("judges.mt_bench.RATING_TOKENS", 4)
    flags = [
        "--models",
        f"mine={folder}",
        "--mt-bench",
        bench,
        "--out",
        tmp_path / "run",
        "--max-new-tokens",
        "6",
        "--precision",
        "fp32",
    ]
    assert "--judge llm or --judge openai" in run("evaluate.py", *flags, "--judge", "vader").stderr
    printed = ok(run("evaluate.py", *flags, "--judge", "llm", "--judge-model", wide)).stdout
    scores = json.load(open(tmp_path / "run/report.md.stats.json"))["mt_bench"]["mine"]
    assert scores == {
        "math": 5.25,
        "writing": 10,
        "turn 1": 8,
        "turn 2": 6.25,
        "average": pytest.approx(20.5 / 3),
        "rated": 3,
        "unrated": 1,
        "prompts cut": 0,
        "answers cut": 0,
    }
    first, second = jsonl(tmp_path / "run/mt_bench/model_answer/mine.jsonl")
    one, two = first["choices"][0]["turns"]
    turn2 = jsonl(tmp_path / "run/mt_bench/mine.turn2.prompts.jsonl")
    assert [m["content"] for m in turn2[0]["prompt"]] == ["1+1?", one, "Twice that?"] and [
        r["temperature"] for r in turn2
    ] == [0, 0.7]
    assert (
        asked[0][1]["content"] == f"Q 1+1? A {one} R two"
        and asked[1][1]["content"] == f"Q 1+1? A {one} Q Twice that? A {two} R two four"
    )
    assert (
        asked[3][1]["content"].startswith("Q Write. A ")
        and "Again {now}." in asked[3][1]["content"]
    )
    judgments = jsonl(tmp_path / "run/mt_bench/model_judgment/mine.jsonl")
    assert [j["score"] for j in judgments] == [8, 2.5, -1, 10] and [
        j["judge"][1] for j in judgments
    ] == ["single-math-v1", "single-math-v1-multi-turn", "single-v1", "single-v1-multi-turn"]
    assert "| unrated | 1 |" in printed


def test_mt_bench_cuts_second_turns_alone(folder, tmp_path, monkeypatch):
    """A second turn whose prompt exceeds the context of 256 tokens is answered and counted; a first
    question that does not fit is an error."""
    monkeypatch.setattr(mt_bench, "chat", lambda args, chats, *rest: ["[[4]]"] * len(chats))
    long = "abcdefgh " * 40
    turns = [["1+1?", "Twice that?"], ["Write.", long], ["Say.", long]]
    asked = [
        {"question_id": k, "category": "math", "turns": both} for k, both in enumerate(turns, 1)
    ]
    bench = mt_bench_folder(tmp_path / "bench", asked)
    command = ["evaluate.py", "--models", f"mine={folder}", "--mt-bench", bench, "--judge", "llm"]
    command += ["--judge-model", folder, "--precision", "fp32", "--out", tmp_path / "run"]
    found = {}
    for new in (20, 150):
        printed = ok(run(*command, "--max-new-tokens", new)).stdout
        scores = json.load(open(tmp_path / "run/report.md.stats.json"))["mt_bench"]["mine"]
        found[new] = scores["prompts cut"], scores["answers cut"]
        rows = jsonl(tmp_path / "run/mt_bench/mine.turn2.jsonl")
        assert ["prompt_cut" in row for row in rows[1:]] == [True, True]
        assert all(0 < len(row["response_ids"][0]) <= min(new, 128) for row in rows[1:])
        assert f"| prompts cut | {found[new][0]} |" in printed
    # Of 150 new tokens the context has room for 128, and the first answer may be as long.
    assert found[20] == (2, 0) and found[150][1] >= 2
    dump(bench / "question.jsonl", [*asked, {**asked[1], "question_id": 4, "turns": [long, "So?"]}])
    done = run(*command, "--max-new-tokens", "20")
    assert done.returncode == 2 and "id '4 turn 1'" in done.stderr


# ------------------------------------------------------------------------------------- the report


def test_small_p_values_have_a_floor():
    assert [report.p_value(p) for p in (None, 2e-4, 9.99e-4, 1e-3, 0.0671)] == [
        None,
        "< 0.001",
        "< 0.001",
        "0.001",
        "0.067",
    ]
    policy = {"characters": 3.0, "win_rate": 1.0, "interval": [0.93, 1.0], "p": 2e-4}
    assert "| 1.000 [0.930, 1.000] | < 0.001 |" in report.policy_table({"mine": policy})
    alone = {"characters": 3.0, "win_rate": 0.5, "interval": [math.nan, math.nan], "p": 1.0}
    assert "| mine | 0.500 | 1.000 |" in report.policy_table({"mine": alone})


def test_answers_as_a_reader_notices_them():
    assert report.openings(["I love  it all", "I love it\nso", "I love cats", "No."]) == 0.75
    prompt = [{"role": "user", "content": "say"}]
    rows = [{"prompt": prompt, "responses": [text]} for text in ("a\nb", "c")]
    cut = [{**row, "ended": [ended]} for row, ended in zip(rows, (True, False))]
    text = report.side_by_side({"file": rows, "mine": cut}, [1, 0])
    assert text.splitlines()[2:4] == ["- **file**: c", "- **mine**: c ✂"]
    assert text.splitlines()[-1] == "- **mine**: a b"


def test_worst_prompts_stand_beside_the_first(tmp_path):
    """The three lowest scores of the last policy, lowest first; without a judge there is no such
    section."""
    texts = ["I love it.", "It is a table.", "I hate it!", "Great, good, happy.", "It is bad."]
    for name, outputs in (("init", ["Fine."] * 5), ("mine", texts)):
        rows = [{"instruction": f"say {i}", "output": text} for i, text in enumerate(outputs)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    command = ["evaluate.py", "--prompts", tmp_path / "mine.json", "--out", tmp_path / "run"]
    command += ["--models", f"init={tmp_path / 'init.json'}", f"mine={tmp_path / 'mine.json'}"]
    shown = {}
    for judge in ("vader", "none"):
        ok(run(*command, "--judge", judge))
        text = (tmp_path / "run/report.md").read_text()
        first, *worst = text.split("## Responses side by side")[1].split("does worst by the judge")
        shown[judge] = [re.findall(r"[*][*]say (\d)[*][*]", part) for part in (first, *worst)]
    assert shown == {"vader": [["0", "1", "2"], ["2", "4", "1"]], "none": [["0", "1", "2"]]}


def test_a_run_by_name(tmp_path):
    """From handmade stats: what labels the gold seed or trains a judge is not a round's; files of
    other programs are passed over."""
    made = {
        "data": ("-m data.prepare", {"data": "d.csv"}, {}, {"flipped": 0}),
        "answers": ("generate.py", {"prompts": "data/a"}, {"n": 4}, {"prompts": 9}),
        "gold": ("label.py", {"responses": "answers"}, {"judge": "vader", "model": None}, {}),
        "seed": ("seed_dpo.py", {"pairs": "gold"}, {"objective": "dpo", "lr": 1e-5}, {"pairs": 8}),
        "judge": ("seed_dpo.py", {"pairs": "gold"}, {"objective": "supervised", "lr": 0.1}, {}),
        "drawn": ("generate.py", {"model": "seed"}, {"n": 2}, {"prompts": 5}),
        "pairs": (
            "label.py",
            {"responses": "drawn", "judge_model": "judge", "model": "seed"},
            {"judge": "llm"},
            {},
        ),
        "policy": ("train.py", {"pairs": "pairs"}, {"anchor": "previous", "alpha": 0.0}, {}),
    }
    for k, (out, (program, inputs, own, counts)) in enumerate(made.items()):
        inputs = {key: x if "." in x else f"{tmp_path}/{x}" for key, x in inputs.items()}
        about = {"command": f"{program} --out {out}", "inputs": inputs, "seconds": 10.0 * 2**k}
        about |= {"processes": 1, "commit": "abc", "machine": "m"}
        stats = {**counts, "settings": dict.fromkeys(inputs, "hash") | own, "about": about}
        (tmp_path / f"{out}.stats.json").write_text(json.dumps(stats))
    (tmp_path / "other.stats.json").write_text("[1]")
    stages = history([f"{tmp_path}/other", f"{tmp_path}/policy", f"{tmp_path}/seed"])
    order = [one["out"].rpartition("/")[2] for one in stages]
    assert sorted(order) == sorted(made)
    for out, (_, inputs, *_) in made.items():
        read = [name.partition("/")[0] for name in inputs.values() if "." not in name]
        assert all(order.index(name) < order.index(out) for name in read)
    run = settings_by_name(stages)
    assert run["method"] == "spa" and run["data"] == "d.csv (hash)"
    assert (run["gold labels by"], run["labels by"]) == ("vader", "llm")
    assert (run["gold pairs"], run["seed stage: learning rate"]) == ("8", "1e-05")
    assert (run["prompts of each round"], run["n, answers a prompt"]) == ("5", "2")
    assert run["α, smoothing of flagged labels"] == "0"
    assert "gold labels turned wrong on purpose" not in run
    table = stage_table(stages)
    assert "| all | – | 2550 |" in table and f"| train | {tmp_path}/policy | 1280 | 1 |" in table


def panels(monkeypatch, tmp_path, *content):
    """The axes of the picture that the report draws."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    report.plot(str(tmp_path / "r.png"), *content)
    return kept[0].axes


def test_panels_of_what_there_is(monkeypatch, tmp_path):
    """No empty frames, integers on counts, ξ from ½ where it starts there, and π_init at ½ is a
    line, no measurement."""
    init = {"characters": 5.0, "score": 0.2, "score_error": 0.1}
    moved = {"win_rate": 1.0, "win_rate_error": 0.0, "interval": [0.9, 1.0]}
    moved |= {"length_controlled_winrate": 100.0, "lc_standard_error": math.nan}
    moved |= {"lc_interval": [90, 100]}
    policies = {"init": init, "moved": {**init, **moved}}
    quality = label_quality(np.ones(3), np.zeros(3, bool), np.ones(3, bool))
    log = [{"loss": 0.7}, {"loss": 0.6}]
    ratings = {"mine": {"math": 4.0, "turn 1": 4.0, "average": 4.0, "rated": 1, "unrated": 0}}
    before = np.array([0.5, 0.9, 1.0])
    axes = panels(
        monkeypatch,
        tmp_path,
        policies,
        {"moved": quality},
        {"moved": (before, None)},
        {"moved": log},
        ratings,
    )
    assert len(axes) == 6 and all(axis.has_data() for axis in axes)
    rates, _, loss, _, confidence, _ = axes
    measured = {c.get_label(): c.lines[0].get_xdata().tolist() for c in rates.containers}
    assert measured == {
        "win rate": [1],
        "mean gold score": [0, 1],
        "length-controlled win rate": [1],
    }
    assert all(tick == round(tick) for tick in loss.get_xticks())
    assert all(tick == round(tick) for tick in confidence.get_yticks())
    low, high = confidence.get_xlim()
    assert 0.48 < low < 0.5 and 1 < high < 1.02
    spread = panels(monkeypatch, tmp_path, {}, {}, {"moved": (before, before - 0.4)}, {}, {})
    assert len(spread) == 1 and -0.03 < spread[0].get_xlim()[0] < 0
    alone = {"init": {"characters": 5.0}}
    few = panels(monkeypatch, tmp_path, alone, {"init": {}}, {}, {}, ratings)
    assert [axis.get_title() for axis in few] == ["length of the answers", "MT-Bench"]


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

"""What is measured, against numbers worked by hand, the official leaderboard, and plain loops; the
report, and the commands of AlpacaEval and MT-Bench."""
import csv
import gzip
import json
import math
import os
import re

import numpy as np
import pytest
from conftest import CORPUS, ROOT, dump, jsonl, ok, run
from hypothesis import given, settings
from hypothesis import strategies as st

from core.rows import read_json_list
from judges import judge, mt_bench, report
from judges.alpaca_eval import scores
from judges.history import command_of, history, training_of
from judges.measures import (
    RIDGE,
    error_over_prompts,
    interval,
    label_quality,
    length_controlled,
    mean_and_error,
    paired_p,
    text_measures,
    wins,
)

# Annotations and leaderboard of AlpacaEval's repository, where they are at hand.
OFFICIAL = ROOT.parent / "shared/data/alpaca_eval"
official = pytest.mark.skipif(not OFFICIAL.exists(), reason="AlpacaEval's files are not at hand")


def test_wins_and_errors_by_hand():
    w = wins(np.array([[1.0, 0.5], [0.2, 0.2]]), np.array([[0.5, 0.5], [0.3, 0.1]]))
    assert w.tolist() == [[1, 0.5], [0, 1]]
    mean, error = mean_and_error(w)  # prompts 0.75 and 0.5: mean 0.625, s.d. 0.1768, over √2
    assert mean == 0.625 and error == pytest.approx(0.125)
    assert math.isnan(mean_and_error(np.array([[1.0]]))[1])
    # two samples of one prompt, one of another: deviations −0.5, −0.5 and 1 from the mean of 0
    error = error_over_prompts(np.array([-0.5, -0.5, 1.0]), np.array([0, 0, 1]))
    assert error == pytest.approx(math.sqrt(2 * (1 + 1)) / 3)


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


def test_a_second_lexicon_is_a_mean_over_words():
    """TextBlob's: words that it does not know and length change nothing."""
    pytest.importorskip("textblob")
    rows = [{"responses": ["great", "great table great"]}, {"responses": ["terrible", "table"]}]
    measures = text_measures(rows, second_lexicon=True)
    assert measures["second_score"] == pytest.approx((0.8 + 0.8 - 1.0 + 0.0) / 4)
    assert measures["second_score_error"] == pytest.approx(0.65)
    assert "second_score" not in text_measures(rows, second_lexicon=False)


@pytest.mark.parametrize("count,rate", [(12, 0.9), (40, 0.6), (128, 0.97)])
def test_intervals_hold_the_truth(count, rate):
    """In about 95 % of 300 draws; two samples of a prompt are alike."""
    dice = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        low, high = interval((dice.random((count, 1)) < rate).repeat(2, 1))
        held += low <= rate <= high
    assert held >= 275


def test_intervals_at_their_ends():
    """At 0 and 1 the exact interval's width, or less than half as much again; always in [0, 1] and
    around the rate."""
    from scipy.stats import binomtest

    for count in (1, 2, 50):
        exact = binomtest(count, count).proportion_ci(method="exact").low
        for rate, wide in ((0, slice(None)), (1, slice(None, None, -1))):
            near, far = np.abs(np.array(interval(np.full((count, 3), float(rate))))[wide] - rate)
            assert near == 0 and 0.8 * (1 - exact) < far < 1.5 * (1 - exact)
    low, high = interval(np.array([[0.5]] * 9 + [[1.0]]))
    assert 0 < low < 0.55 < high < 1


def test_paired_test_is_uniform_under_the_null():
    """p < 0.1 in about 10 % of 200 draws; a paired difference is found."""
    dice = np.random.default_rng(0)
    small = sum(paired_p(*(dice.random((2, 40, 2)) < 0.6).astype(float)) < 0.1 for _ in range(200))
    assert 6 <= small <= 36
    common = dice.random((40, 1))
    assert paired_p(common + 0.05, common) < 1e-3 and paired_p(common, common) == 1
    # 2 of the 8 ways to choose signs
    assert paired_p(np.ones((3, 1)), np.zeros((3, 1))) == 0.25
    assert math.isnan(paired_p(np.ones((1, 1)), np.zeros((1, 1))))


# ----------------------------------------------------------------------------------- equal lengths


def judged(count: int, samples: int, seed: int, bias: float = 1.0, spread: float = 1.5) -> tuple:
    """(Δ, wins and losses, prompts) by a judge that likes length; some prompts are harder."""
    dice = np.random.default_rng(seed)
    delta = dice.integers(50, 1500, (count, 1)) - dice.integers(50, 1500, (count, samples))
    z = 0.3 - bias * np.tanh(delta / delta.std()) + spread * dice.normal(size=(count, 1))
    won = dice.random((count, samples)) < 1 / (1 + np.exp(-z))
    return delta.ravel() * 1.0, won.ravel() * 1.0, np.arange(count).repeat(samples)


def few_wins(count: int, won: int, seed: int) -> tuple:
    delta, _, prompts = judged(count, 1, seed)
    return delta, (np.arange(count) < won) * 1.0, prompts


def separated(count: int) -> tuple:
    """The longer answer always wins: length alone tells who does."""
    i = np.arange(count)
    return 20.0 - 120 * (i % 2), i % 2 * 1.0, i


def alike(count: int, p: float) -> tuple:
    return np.zeros(count), np.full(count, p), np.arange(count)


def test_length_control_recovers_the_rate_at_equal_length():
    """From the regression's own model: preferences that are probabilities, not drawn."""
    delta, _, prompts = judged(400, 1, 0)
    p = 1 / (1 + np.exp(1.5 * np.tanh(delta / delta.std(ddof=1)) + 0.5))
    rate, error = length_controlled(delta, p, prompts)
    assert rate == pytest.approx(1 / (1 + math.exp(0.5)), abs=0.002) and 0 < error < 0.03
    assert length_controlled(np.arange(9.0), np.full(9, 0.25), np.arange(9))[0] == pytest.approx(
        0.25
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "sample",
    [judged(30, 2, 0), judged(200, 1, 1), few_wins(50, 1, 0), few_wins(50, 49, 1),
     few_wins(50, 0, 2), few_wins(3, 1, 3), separated(20), alike(4, 0.5), alike(4, 0.001)],
)
def test_length_control_is_symmetric_in_the_policies(sample):
    delta, p, prompts = sample
    rate, error = length_controlled(delta, p, prompts)
    turned, same_error = length_controlled(-delta, 1 - p, prompts)
    assert rate + turned == pytest.approx(1, abs=1e-8)
    assert error == pytest.approx(same_error, abs=1e-8, nan_ok=True)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 0.3, 0.5, 1]), st.integers(-49, 49)), min_size=2, max_size=30
    )
)
def test_length_control_is_symmetric_in_whatever_is_judged(rows):
    p, delta = np.array(rows, float).T
    test_length_control_is_symmetric_in_the_policies((delta, p, np.arange(len(p))))


@pytest.mark.filterwarnings("error")
def test_length_control_at_its_ends():
    """Losing everywhere is 0 and tells no error; one win in 50 is about 2 %."""
    rate, error = length_controlled(*few_wins(50, 0, 0))
    assert rate == 0 and math.isnan(error)
    assert length_controlled(*few_wins(50, 50, 0))[0] == 1
    for seed in range(5):
        rate, error = length_controlled(*few_wins(50, 1, seed))
        assert 0 < rate < 0.05 and 0 < error < 0.05
    one_prompt = length_controlled(np.zeros(2), np.array([0.0, 1.0]), np.zeros(2, int))
    assert all(map(math.isnan, one_prompt))


def test_symmetric_fit_against_a_separate_optimiser():
    """The minimum that a simplex finds, which knows no gradient."""
    from scipy.optimize import minimize

    for delta, p, prompts in (judged(60, 2, 5), few_wins(50, 2, 4), separated(20)):
        x = np.tanh(delta / delta.std(ddof=1))

        def loss(v):
            z = v[0] * x + v[1]
            return (np.logaddexp(0, z) - p * z).sum() + RIDGE * v[0] ** 2 / 2

        best = minimize(loss, np.zeros(2), method="Nelder-Mead", tol=1e-12).x[1]
        rate, _ = length_controlled(delta, p, prompts)
        assert rate == pytest.approx(1 / (1 + math.exp(-best)), abs=1e-5)


@pytest.mark.parametrize("samples", [1, 4])
def test_error_at_equal_length_is_that_of_replications(samples):
    """± against the spread over 400 fresh sets of prompts; copies of a sample bring it no lower."""
    rates, errors = np.array([length_controlled(*judged(64, samples, s)) for s in range(400)]).T
    assert errors.mean() == pytest.approx(rates.std(ddof=1), rel=0.1)
    copies = length_controlled(*(np.repeat(part, 4) for part in judged(64, samples, 0)))
    assert copies[1] == pytest.approx(errors[0], rel=0.1)


# -------------------------------------------------------------------------------------- AlpacaEval


def annotation(preference, one, two, model="mine", instruction="i"):
    return {
        "instruction": instruction,
        "output_1": one,
        "output_2": two,
        "generator_1": "base",
        "generator_2": model,
        "preference": preference,
    }


def test_scores_by_hand():
    score = scores([annotation(p, "a", "bcd", instruction=str(i)) for i, p in enumerate(
        (1.0, 2.0, 1.5, 0, None, 1.75, math.nan))])
    p = [0, 1, 0.5, 0.5, 0.75]
    assert score["win_rate"] == pytest.approx(100 * np.mean(p))
    assert score["standard_error"] == pytest.approx(100 * np.std(p, ddof=1) / math.sqrt(5))
    assert score["no_verdict"] == 2
    # four samples of each prompt are no more prompts
    one = [annotation(q, "a", "bcd", instruction=str(i)) for i, q in enumerate((1, 2, 1.5))]
    assert scores(one * 4)["standard_error"] == pytest.approx(scores(one)["standard_error"])


@official
def test_win_rates_equal_the_official_leaderboard():
    """And the official package's, where it is installed."""
    table = {row[""]: row for row in csv.DictReader(open(OFFICIAL / "leaderboard.csv"))}
    paths = sorted(OFFICIAL.glob("*.annotations.json.gz"))
    assert len(paths) == 4
    for path in paths:
        score = scores(read_json_list(str(path), "output_1"))
        own = table[path.name.removesuffix(".annotations.json.gz")]
        for key in ("win_rate", "standard_error"):
            assert score[key] == pytest.approx(float(own[key]), abs=1e-6)


@official
def test_win_rates_equal_the_official_package():
    metrics = pytest.importorskip("alpaca_eval.metrics")
    for path in OFFICIAL.glob("*.annotations.json.gz"):
        rows = read_json_list(str(path), "output_1")
        theirs = metrics.get_winrate(rows)
        ours = scores(rows)
        for key in ("win_rate", "standard_error"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-9)


@pytest.mark.parametrize(
    "content,words",
    [
        ("[", "not JSON"),
        ("{}", "list of objects"),
        ("[]", "list of objects"),
        ("[3]", "entry 1"),
        ('[{"output_1": "a"}]', "output_2"),
        (json.dumps([annotation(1, "a", "b"), annotation(3, "a", "b")]), "not from 1 to 2"),
        (json.dumps([annotation("x", "a", "b")]), "could not convert"),
        (json.dumps([annotation(None, "a", "b")]), "no preference"),
    ],
)
def test_bad_annotations_are_one_line(content, words, tmp_path):
    (tmp_path / "a.json").write_text(content)
    done = run("judges/alpaca_eval.py", "--annotations", tmp_path / "a.json")
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_annotations_command(tmp_path):
    """A row a model; losing everywhere has no error at equal length."""
    rows = [annotation(1.0 + (i % 4) / 3, "x" * (9 + i), "y" * 20, instruction=str(i))
            for i in range(20)]
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        json.dump(rows, file)
    lost = [annotation(1.0, "x", "y", "other", str(i)) for i in range(50)]
    (tmp_path / "lost.json").write_text(json.dumps(lost))
    files = [tmp_path / "a.json.gz", tmp_path / "lost.json"]
    printed = ok(run("judges/alpaca_eval.py", "--annotations", *files)).stdout
    score = scores(rows)
    assert f"| mine | {score['win_rate']:.3f} | {score['standard_error']:.3f} | " in printed
    assert f" | {score['length_controlled']:.3f} | " in printed
    assert "| other | 0.000 | 0.000 | 0.000 | – | 0 |" in printed


def test_alpaca_eval_files_there_and_back(folder, tmp_path):
    """Instructions to prompts, answers to outputs; equal instructions stay apart."""
    questions = [{"instruction": CORPUS[i // 2], "dataset": "d", "output": "r"} for i in range(4)]
    (tmp_path / "eval.json").write_text(json.dumps(questions))
    command = ["judges/alpaca_eval.py", "--instructions", tmp_path / "eval.json"]
    ok(run(*command, "--out", tmp_path / "p.jsonl"))
    flags = ["--max-new-tokens", 6, "-n", 1, "--model", folder, "--out", tmp_path / "r.jsonl"]
    ok(run("generate.py", "--prompts", tmp_path / "p.jsonl", *flags))
    command = ["judges/alpaca_eval.py", "--answers", f"mine={tmp_path / 'r.jsonl'}"]
    ok(run(*command, "--out", tmp_path / "out"))
    outputs = json.loads((tmp_path / "out/mine.model_outputs.json").read_text())
    answers = [row["responses"][0] for row in jsonl(tmp_path / "r.jsonl")]
    assert outputs == [
        {"dataset": "d", "instruction": q["instruction"], "output": answer, "generator": "mine"}
        for q, answer in zip(questions, answers)
    ]
    for bad in ("mine", "=x", "a/b=x"):
        done = run("judges/alpaca_eval.py", "--answers", bad, "--out", tmp_path / "out")
        assert done.returncode == 2 and "NAME=FILE" in done.stderr


# ---------------------------------------------------------------------------------------- MT-Bench


def mt_bench_folder(path, questions: list[dict]):
    """MT-Bench's files, with a reference answer to question 1."""
    path.mkdir()
    dump(path / "question.jsonl", questions)
    dump(
        path / "reference_gpt-4.jsonl",
        [{"question_id": "1", "choices": [{"index": 0, "turns": ["two", "four"]}]}],
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


def mt_bench_step(bench, out, *flags):
    return run("judges/mt_bench.py", "--folder", bench, "--out", out, *flags)


def test_mt_bench_in_two_turns(wide, tmp_path, monkeypatch):
    """Two turns with the first answer in the second's prompt, references for math, ratings parsed,
    failures counted; every step is a file."""
    bench = mt_bench_folder(
        tmp_path / "bench",
        [
            {"question_id": 1, "category": "math", "turns": ["1+1?", "Twice that?"]},
            {"question_id": 2, "category": "writing", "turns": ["Write.", "Again {now}."]},
        ],
    )
    asked = []

    def chat(args, chats):
        asked.extend(chats)
        assert args.judge_tokens == 2048
        return ["Rating: [[8]]", "[[2.5]]/[[10]]", "no idea", "[[10]]"]

    monkeypatch.setattr(mt_bench, "chat", chat)
    monkeypatch.setattr(mt_bench, "check_judge", lambda args: None)
    answers = []
    for t in (1, 2):
        prompts = tmp_path / f"{t}.prompts.jsonl"
        ok(mt_bench_step(bench, prompts, *(["--answers", *answers] if answers else [])))
        answers.append(tmp_path / f"{t}.jsonl")
        ok(run("generate.py", "--model", wide, "--prompts", prompts, "--out", answers[-1],
               "-n", 1, "--max-new-tokens", 6, "--precision", "fp32", "--fit"))
    turn2 = jsonl(tmp_path / "2.prompts.jsonl")
    one, two = (jsonl(path)[0]["responses"][0] for path in answers)
    assert [m["content"] for m in turn2[0]["prompt"]] == ["1+1?", one, "Twice that?"]
    assert [row["temperature"] for row in turn2] == [0, 0.7]
    judgements = tmp_path / "judgements/mine.jsonl"
    judge_by = ["--judge-model", "m", "--base-url", "http://host/v1"]
    printed = ok(mt_bench_step(bench, judgements, "--answers", *answers, *judge_by)).stdout
    scores_of = dict(re.findall(r"^. ([\w ]+) . ([\d.]+) .$", printed, re.M))
    assert scores_of == {"math": "5.250", "turn 1": "8.000", "average": "6.833",
                         "turn 2": "6.250", "writing": "10.000", "unrated": "1",
                         "prompts cut": "0", "answers cut": "0"}
    assert asked[0][1]["content"] == f"Q 1+1? A {one} R two"
    assert asked[1][1]["content"] == f"Q 1+1? A {one} Q Twice that? A {two} R two four"
    last = asked[3][1]["content"]
    assert last.startswith("Q Write. A ") and "Again {now}." in last
    rows = jsonl(judgements)
    assert [row["score"] for row in rows] == [8, 2.5, -1, 10]
    assert [row["judge"][1] for row in rows] == [
        "single-math-v1", "single-math-v1-multi-turn", "single-v1", "single-v1-multi-turn"]
    again = mt_bench_step(bench, judgements, "--answers", *answers, *judge_by)
    assert again.returncode == 2 and "mine.jsonl: is there" in again.stderr
    done = mt_bench_step(bench, tmp_path / "x.jsonl", "--answers", answers[1])
    assert done.returncode == 2
    assert "needs one answer (generate.py -n 1) to '1 turn 1'" in done.stderr


def test_mt_bench_cuts_second_turns_alone(folder, tmp_path, monkeypatch):
    """A second turn whose prompt exceeds the context of 256 tokens is answered and counted; a first
    question that does not fit is an error."""
    monkeypatch.setattr(mt_bench, "chat", lambda args, chats: ["[[4]]"] * len(chats))
    monkeypatch.setattr(mt_bench, "check_judge", lambda args: None)
    long = "abcdefgh " * 40
    turns = [["1+1?", "Twice that?"], ["Write.", long], ["Say.", long]]
    asked = [{"question_id": k + 1, "category": "math", "turns": turns[k]} for k in range(3)]
    bench = mt_bench_folder(tmp_path / "bench", asked)
    for new, cut in ((20, 0), (150, 2)):
        files = [tmp_path / f"{new}.{t}.jsonl" for t in (1, 2)]
        for t, answers in enumerate(files):
            prompts = tmp_path / f"{new}.{t}.prompts.jsonl"
            ok(mt_bench_step(bench, prompts, *(["--answers", *files[:t]] if t else [])))
            flags = ["--model", folder, "--prompts", prompts, "--out", answers, "-n", 1]
            flags += ["--max-new-tokens", new, "--precision", "fp32", *["--fit"] * t]
            ok(run("generate.py", *flags))
        done = ok(mt_bench_step(bench, tmp_path / f"{new}.rated.jsonl", "--answers", *files,
                                "--judge-model", "m"))
        found = {name: int(count) for name, count in
                 re.findall(r"^. (.+ cut) . (\d+) .$", done.stdout, re.M)}
        # of 150 new tokens the context has room for 128, and the first answer may be as long
        assert found["prompts cut"] >= 2 and found["answers cut"] >= cut
        assert new > 20 or (found["prompts cut"], found["answers cut"]) == (2, 0)
    dump(bench / "question.jsonl", [{**asked[1], "turns": [long, "So?"]}])
    ok(mt_bench_step(bench, tmp_path / "long.jsonl"))
    flags = ["--model", folder, "--max-new-tokens", "20", "-n", 1, "--out", tmp_path / "r.jsonl"]
    done = run("generate.py", "--prompts", tmp_path / "long.jsonl", *flags)
    assert done.returncode == 2 and "2 turn 1" in done.stderr


# --------------------------------------------------------------------------------------- the stage


def write_answers(path, answers: list[list[str]], **more) -> str:
    rows = []
    for i, texts in enumerate(answers):
        prompt = [{"role": "user", "content": f"say {i}"}]
        rows.append({"id": str(i), "prompt": prompt, "responses": texts, **more})
    return dump(path, rows)


TEXTS = [["I love it.", "Fine."], ["It is a table.", "Good."], ["I hate it!", "Bad."],
         ["Great, good, happy.", "A."], ["It is bad.", "Joy!"]]


def test_the_stage_against_plain_loops(tmp_path):
    """Scores, win rate and flags from the files alone; foreign files are refused; rerunning does
    nothing; a model's own training is found through the stats of its answers."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    files = {
        "init": write_answers(tmp_path / "init.jsonl", [["Fine."] * 2] * 5),
        "round1": write_answers(tmp_path / "round1.jsonl", TEXTS, ended=[True, False]),
    }
    policy = tmp_path / "run/policy"
    policy.mkdir(parents=True)
    log = [{"loss": 0.7, "accuracy": 0.5, "tau": None, "batch": ["0"], "flagged": []},
           {"loss": 9e9, "accuracy": 0.25, "tau": 0.4, "batch": ["1", "2"], "flagged": ["2"]}]
    dump(policy / "log.jsonl", log)
    made = {"command": "train.py --out policy", "seconds": 2.0, "processes": 2, "commit": "abc",
            "machine": "m", "inputs": {}}
    record = {"settings": {"anchor": "init", "lr": 5.0}, "about": made}
    record |= {"loss": 648.1, "accuracy": 0.0, "diverged": "; DIVERGED: its loss is 648"}
    (tmp_path / "run/policy.stats.json").write_text(json.dumps(record))
    sampled = {**made, "command": "generate.py", "inputs": {"model": str(policy)}}
    sampled = {"settings": {}, "about": sampled}
    (tmp_path / "round1.jsonl.stats.json").write_text(json.dumps(sampled))
    ask = [{"role": "user", "content": "?"}]
    pairs = [{"id": str(i), "prompt": ask, "chosen": a, "rejected": b,
              "margin": 0.5, "chosen_logp": -1.0, "rejected_logp": -2.0}
             for i, (a, b) in enumerate([("good", "bad"), ("bad", "good"), ("bad", "joy")])]
    labels = dump(tmp_path / "worst.jsonl", pairs)
    command = ["evaluate.py", "--answers", *(f"{name}={path}" for name, path in files.items()),
               "--labels", f"round1={labels}", "--judge", "vader", "--out", tmp_path / "run"]
    printed = ok(run(*command)).stdout

    stats = json.loads((tmp_path / "run/report.md.stats.json").read_text())
    judge_of = SentimentIntensityAnalyzer().polarity_scores
    scores_of = [[judge_of(text)["pos"] - judge_of(text)["neg"] for text in row] for row in TEXTS]
    fine = judge_of("Fine.")["pos"]
    expected = [[(s > fine) + 0.5 * (s == fine) for s in row] for row in scores_of]
    p = stats["policies"]["round1"]
    assert p["score"] == pytest.approx(np.mean(scores_of)) and p["preferences"] == expected
    assert p["win_rate"] == pytest.approx(np.mean(expected)) and p["ended"] == 0.5
    assert "win_rate" not in stats["policies"]["init"]
    assert stats["labels"]["round1"] == label_quality(
        np.array([1.0, 0, 0]), np.array([False, False, True]), np.array([False, True, True]))
    text = (tmp_path / "run/report.md").read_text()
    assert text.split("\n\n")[1] in printed and "| round1 |" in printed
    assert "Round 1 DIVERGED: its loss is 648." in text
    assert "--nproc_per_node 2 train.py --out policy\n" in text and "policy: 2 s" in text
    assert (tmp_path / "run/report.png").stat().st_size > 10_000
    assert "complete, skipped" in ok(run(*command)).stdout


def test_the_report_opens_with_sentences():
    first = {"characters": 200.0, "score": 0.47}
    p = {"characters": 190.0, "win_rate": 0.85, "interval": [0.8, 0.9], "p": 0.283, "ended": 0.81,
         "score": 0.874, "second_score": 0.31}
    policies = {"init": {**first, "second_score": 0.3}, "round1": p, "round2": p}
    text = report.opening(policies, {"round2": {"accuracy": 0.75}}, {})
    assert text == (
        "Round 2 is preferred to init on 85 % of the prompts [80, 90]; against round 1 p = 0.28; "
        "81 % of its answers end. Its mean gold score is 0.87, that of init 0.47. Its mean score "
        "by a second lexicon is 0.31, that of init 0.30. The judge agrees with 75 % of the "
        "self-labels of round 2.")
    assert report.opening({"init": first}, {}, {}) == "Init answers in 200 characters."


def test_outputs_of_other_models_and_no_verdicts(folder, tmp_path, monkeypatch):
    """AlpacaEval's outputs are a baseline; a comparison without verdict is null, counts ½ and is
    counted."""
    outputs = [{"instruction": f"say {i}", "output": "Fine."} for i in range(3)]
    (tmp_path / "gpt.json").write_text(json.dumps(outputs))
    mine = write_answers(tmp_path / "mine.jsonl", [texts[:1] for texts in TEXTS[:3]])
    verdicts = [1.0, math.nan, 1.0, 0.0, math.nan, math.nan]
    monkeypatch.setitem(judge.RANKERS, "llm", lambda args, asked, *place: verdicts)
    monkeypatch.setattr("judges.flags.check_judge", lambda args: None)
    command = ["evaluate.py", "--judge", "llm", "--judge-model", folder, "--out", tmp_path / "run",
               "--answers", f"gpt={tmp_path / 'gpt.json'}"]
    done = ok(run(*command, f"mine={mine}"))
    p = json.loads((tmp_path / "run/report.md.stats.json").read_text())["policies"]["mine"]
    assert p["preferences"] == [[1], [None], [0.75]]
    assert p["win_rate"] == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert p["no_verdict"] == 3 and ", 3 without verdict" in done.stdout
    assert "| without verdict |" in (tmp_path / "run/report.md").read_text()


def test_answers_that_do_not_fit_together_are_one_line(tmp_path):
    one = write_answers(tmp_path / "one.jsonl", TEXTS)
    turned = dump(tmp_path / "turned.jsonl", jsonl(one)[::-1])
    few = write_answers(tmp_path / "few.jsonl", TEXTS[:3])
    three = write_answers(tmp_path / "three.jsonl", [texts + ["x"] for texts in TEXTS])
    for other, words in ((turned, "in the same order"), (few, "its 3 prompts are not the 5"),
                         (three, "must have 2 samples a prompt")):
        done = run("evaluate.py", "--answers", f"a={one}", f"b={other}", "--out", tmp_path / "o")
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    for flags, words in ((["a"], "NAME=FILE"), (["a/b=x"], "without '/'"),
                         ([f"a={one}", "--labels", "b=x"], "--labels names b")):
        assert words in run("evaluate.py", "--out", tmp_path / "o", "--answers", *flags).stderr


def test_a_picture_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "report.png").write_text("mine")
    one = write_answers(tmp_path / "one.jsonl", TEXTS)
    done = run("evaluate.py", "--answers", f"a={one}", "--out", tmp_path)
    assert done.returncode == 2 and "report.png: is there" in done.stderr
    assert (tmp_path / "report.png").read_text() == "mine" and not (tmp_path / "report.md").exists()


# -------------------------------------------------------------------------------------- the report


def test_a_table_has_the_columns_that_somebody_has():
    """Small p-values have a floor; what is not known is –; errors and intervals stand behind."""
    first = {"characters": 190.4, "score": 0.5, "score_error": math.nan}
    won = {**first, "win_rate": 1.0, "win_rate_error": 0.0, "interval": [0.93, 1.0], "p": 2e-4}
    lines = report.table("policy", {"init": first, "mine": won}, report.OF_POLICIES).splitlines()
    assert lines[0] == "| policy | win rate [95 %] | p | gold score | characters |"
    assert lines[2] == "| init | – | – | 0.500 ± – | 190 |"
    assert lines[3] == "| mine | 1.000 [0.930, 1.000] | < 0.001 | 0.500 ± – | 190 |"
    assert report.measured({"p": 1e-3}, "p") == "0.001"
    assert report.measured({"p": math.nan}, "p") == "–"


def test_answers_as_a_reader_notices_them():
    prompt = [{"role": "user", "content": "say"}]
    rows = [{"prompt": prompt, "responses": [text]} for text in ("a\nb", "c")]
    cut = [{**row, "ended": [ended]} for row, ended in zip(rows, (True, False))]
    text = report.side_by_side({"file": rows, "mine": cut}, 2)
    assert text.splitlines()[2:4] == ["- **file**: a b", "- **mine**: a b"]
    assert text.splitlines()[-1] == "- **mine**: c ✂"


def test_how_a_run_came_about(tmp_path):
    """Its stages in the order in which they ended; files of other programs are passed over."""
    for k, out in enumerate(("seed", "data", "round1/worst.jsonl", "report.md")):
        about = {"command": f"{out}.py", "seconds": 1.0, "processes": 1 + k % 2, "inputs": {}}
        stats = tmp_path / f"{out}.stats.json"
        stats.parent.mkdir(exist_ok=True)
        stats.write_text(json.dumps({"about": about, "settings": {}}))
        os.utime(stats, (9 - k, 9 - k))
    (tmp_path / "other.stats.json").write_text("[1]")
    stages = history(str(tmp_path))
    outs = [stage["out"] for stage in stages]
    assert outs == [f"{tmp_path}/{out}" for out in ("round1/worst.jsonl", "data", "seed")]
    assert command_of(stages[0]["about"]).endswith("python round1/worst.jsonl.py")
    assert training_of(f"{tmp_path}/data") == ([], {})


def test_panels_of_what_there_is(monkeypatch):
    """No empty frames; scores and win rates have axes of their own; accuracy stands in the place of
    a loss that the anchor makes rise; nothing at the top is clipped."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure.axes))
    init = {"characters": 5.0, "score": 0.2, "score_error": 0.1}
    moved = {**init, "win_rate": 1.0, "win_rate_error": 0.1, "length_controlled": 1.0,
             "length_controlled_error": math.nan, "characters": 500.0}
    log = [{"loss": 0.7, "accuracy": 0.5}, {"loss": 0.9, "accuracy": 0.6}]
    quality = {"moved": {"accuracy": 0.7, "wrong": 0.3, "wrong_among_flagged": None}}
    report.plot("r.png", {"init": init, "moved": moved}, quality,
                {"init": ([], {}), "moved": (log, {})})
    wins_, scores_, lengths, labels, training = kept[-1]
    assert all(axis.has_data() for axis in kept[-1])
    assert training.lines[0].get_ydata().tolist() == [0.5, 0.6]
    assert all(tick == round(tick) for tick in training.get_xticks())
    measured = {c.get_label(): np.isfinite(c.lines[0].get_ydata()).tolist()
                for c in wins_.containers}
    assert measured == {"win rate": [False, True], "at equal length": [False, True]}
    assert [c.get_label() for c in scores_.containers] == ["gold score"]
    assert not wins_.containers[0].lines[0].get_clip_on() and lengths.get_ylim()[1] > 520
    assert {c.get_label(): c.lines[0].get_ydata().tolist() for c in labels.containers} == {
        "the judge agrees": [0.7], "wrong, of all that could be flagged": [0.3]}
    report.plot("r.png", {"init": {"characters": 5.0}}, {}, {"init": ([], {})})
    assert [axis.get_title() for axis in kept[-1]] == ["length of the answers"]

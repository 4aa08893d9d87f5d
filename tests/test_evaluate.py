"""What is measured, against numbers worked by hand, the official leaderboard, and plain loops; the
report, and the commands of AlpacaEval and MT-Bench."""
import csv
import importlib
import json
import math
import re

import numpy as np
import pytest
from conftest import CORPUS, ROOT, dump, jsonl, ok, one_line, run, stats_of
from scipy.optimize import minimize
from scipy.stats import binomtest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from core.rows import read_json_list
from judges import judge, mt_bench, report
from judges.alpaca_eval import scores
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


def test_openings_by_hand():
    """The first samples open alike, the second ones do not: (1 + 2) / 2 of two prompts."""
    rows = [{"responses": ["a b c d", "x y z"]}, {"responses": ["a b c e", "a b c"]}]
    assert text_measures(rows, second_lexicon=False)["openings"] == 0.75


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


@pytest.mark.parametrize("count", [1, 2, 50])
def test_intervals_at_their_ends(count):
    """At 0 and 1 the exact interval's width, or less than half as much again."""
    exact = 1 - binomtest(count, count).proportion_ci(method="exact").low
    for wins_, end in ((np.zeros((count, 3)), 0), (np.ones((count, 3)), 1)):
        near, far = sorted(abs(bound - end) for bound in interval(wins_))
        assert near == 0 and 0.8 * exact < far < 1.5 * exact


def test_paired_test_by_hand():
    """A paired difference is found, and a p-value is exact where prompts are few."""
    common = np.random.default_rng(0).random((40, 1))
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


def test_symmetric_fit_against_a_separate_optimiser():
    """The minimum that a simplex finds, which knows no gradient."""
    for delta, p, prompts in (judged(60, 2, 5), few_wins(50, 2, 4)):
        x = np.tanh(delta / delta.std(ddof=1))

        def loss(v):
            z = v[0] * x + v[1]
            return (np.logaddexp(0, z) - p * z).sum() + RIDGE * v[0] ** 2 / 2

        best = minimize(loss, np.zeros(2), method="Nelder-Mead", tol=1e-12).x[1]
        rate, _ = length_controlled(delta, p, prompts)
        assert length_controlled(-delta, 1 - p, prompts)[0] == pytest.approx(1 - rate, abs=1e-8)
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


@pytest.mark.skipif(not OFFICIAL.exists(), reason="AlpacaEval's files are not at hand")
def test_win_rates_equal_the_official_leaderboard():
    """And the official package's, where it is installed."""
    table = {row[""]: row for row in csv.DictReader(open(OFFICIAL / "leaderboard.csv"))}
    for path in OFFICIAL.glob("*.annotations.json.gz"):
        rows = read_json_list(str(path), "output_1")
        score = scores(rows)
        oracles = [table[path.name.removesuffix(".annotations.json.gz")]]
        if importlib.util.find_spec("alpaca_eval"):
            oracles.append(importlib.import_module("alpaca_eval.metrics").get_winrate(rows))
        for oracle in oracles:
            for key in ("win_rate", "standard_error"):
                assert score[key] == pytest.approx(float(oracle[key]), abs=1e-6)


@pytest.mark.parametrize("rows, words", [
    ([{"output_1": "a"}], "output_2"),
    ([annotation(1, "a", "b"), annotation(3, "a", "b")], "not from 1 to 2"),
    ([annotation("x", "a", "b")], "could not convert"),
    ([annotation(None, "a", "b")], "no preference")])
def test_bad_annotations_are_one_line(rows, words, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    one_line(run("judges/alpaca_eval.py", "--annotations", tmp_path / "a.json"), words)


def test_annotations_command(tmp_path):
    """A row a model; losing everywhere has no error at equal length."""
    rows = [annotation(1.0 + (i % 4) / 3, "x" * (9 + i), "y" * 20, instruction=str(i))
            for i in range(20)]
    lost = [annotation(1.0, "x", "y", "other", str(i)) for i in range(50)]
    files = [tmp_path / "a.json", tmp_path / "lost.json"]
    for path, content in zip(files, (rows, lost)):
        path.write_text(json.dumps(content))
    printed = ok(run("judges/alpaca_eval.py", "--annotations", *files)).stdout
    score = scores(rows)
    assert f"| mine | {score['win_rate']:.3f} | {score['standard_error']:.3f} | " in printed
    assert f" | {score['length_controlled']:.3f} | " in printed
    assert "| other | 0.000 | 0.000 | 0.000 | – | 0 |" in printed


def test_alpaca_eval_files_there_and_back(tmp_path):
    """Instructions to prompts, answers to outputs; equal instructions stay apart."""
    questions = [{"instruction": CORPUS[i // 2], "dataset": "d", "output": "r"} for i in range(4)]
    (tmp_path / "eval.json").write_text(json.dumps(questions))
    prompts = tmp_path / "p.jsonl"
    command = "judges/alpaca_eval.py"
    ok(run(command, "--instructions", tmp_path / "eval.json", "--out", prompts))
    rows = [{**row, "responses": [f"answer {i}"]} for i, row in enumerate(jsonl(prompts))]
    answers = dump(tmp_path / "r.jsonl", rows)
    ok(run(command, "--answers", f"mine={answers}", "--out", tmp_path / "out"))
    outputs = json.loads((tmp_path / "out/mine.model_outputs.json").read_text())
    assert outputs == [{"dataset": "d", "instruction": question["instruction"],
                        "output": f"answer {i}", "generator": "mine"}
                       for i, question in enumerate(questions)]
    one_line(run(command, "--answers", "mine", "--out", tmp_path / "out"), "NAME=FILE")


# ---------------------------------------------------------------------------------------- MT-Bench


def test_mt_bench_in_two_turns(tmp_path, monkeypatch):
    """Two turns with the first answer in the second's prompt, references for math, ratings parsed,
    failures and what the context cut counted; every step is a file."""
    questions = [{"question_id": 1, "category": "math", "turns": ["1+1?", "Twice that?"]},
                 {"question_id": 2, "category": "writing", "turns": ["Write.", "Again {now}."]}]
    one, two = "Q {question} A {answer}", "Q {question_1} A {answer_1} Q {question_2} A {answer_2}"
    templates = {"single-v1": one, "single-v1-multi-turn": two,
                 "single-math-v1": one + " R {ref_answer_1}",
                 "single-math-v1-multi-turn": two + " R {ref_answer_1} {ref_answer_2}"}
    dump(tmp_path / "question.jsonl", questions)
    dump(tmp_path / "reference_gpt-4.jsonl",
         [{"question_id": "1", "choices": [{"turns": ["two", "four"]}]}])
    dump(tmp_path / "judge_prompts.jsonl",
         [{"name": name, "system_prompt": "Judge.", "prompt_template": text}
          for name, text in templates.items()])
    asked = []

    def chat(args, chats):
        asked.extend(each[1]["content"] for each in chats)
        return ["Rating: [[8]]", "[[2.5]]/[[10]]", "no idea", "[[10]]"]

    def step(out, *flags):
        return run("judges/mt_bench.py", "--folder", tmp_path, "--out", tmp_path / out, *flags)

    def answer(turn: int, **cut) -> str:
        """The file of the answers to a turn's prompts."""
        rows = [{**row, **cut, "responses": [f"{turn}.{i}"]}
                for i, row in enumerate(jsonl(tmp_path / f"{turn}.prompts.jsonl"))]
        return dump(tmp_path / f"{turn}.jsonl", rows)

    monkeypatch.setattr(mt_bench, "chat", chat)
    monkeypatch.setattr(mt_bench, "check_judge", lambda args: None)
    ok(step("1.prompts.jsonl"))
    answers = ["--answers", answer(1)]
    ok(step("2.prompts.jsonl", *answers))
    turn2 = jsonl(tmp_path / "2.prompts.jsonl")
    assert [m["content"] for m in turn2[0]["prompt"]] == ["1+1?", "1.0", "Twice that?"]
    assert [row["temperature"] for row in turn2] == [0, 0.7]
    answers.append(answer(2, prompt_cut=9, answer_cut=True))
    rated = ok(step("rated/mine.jsonl", *answers, "--judge-model", "m"))
    assert asked == ["Q 1+1? A 1.0 R two", "Q 1+1? A 1.0 Q Twice that? A 2.0 R two four",
                     "Q Write. A 1.1", "Q Write. A 1.1 Q Again {now}. A 2.1"]
    assert dict(re.findall(r"^. ([\w ]+) . ([\d.]+) .$", rated.stdout, re.M)) == {
        "math": "5.250", "turn 1": "8.000", "average": "6.833", "turn 2": "6.250",
        "writing": "10.000", "unrated": "1", "prompts cut": "2", "answers cut": "2"}
    assert [row["score"] for row in jsonl(tmp_path / "rated/mine.jsonl")] == [8, 2.5, -1, 10]
    one_line(step("rated/mine.jsonl", *answers, "--judge-model", "m"), "is there")


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
    """Scores, win rate and flags from the files alone; rerunning does nothing; a model's own
    training is found through the stats of its answers."""
    init = write_answers(tmp_path / "init.jsonl", [["Fine."] * 2] * 5)
    round1 = write_answers(tmp_path / "round1.jsonl", TEXTS, ended=[False, True])
    policy = tmp_path / "run/policy"
    policy.mkdir(parents=True)
    dump(policy / "log.jsonl", [
        {"loss": 0.7, "accuracy": 0.5, "tau": None, "batch": ["0"], "flagged": []},
        {"loss": 9e9, "accuracy": 0.25, "tau": 0.4, "batch": ["1", "2"], "flagged": ["2"]}])
    made = {"command": "train.py --out policy", "seconds": 2.0, "processes": 2, "commit": "abc",
            "machine": "m", "inputs": {}}
    record = {"settings": {}, "about": made, "diverged": "; DIVERGED: its loss is 648"}
    (tmp_path / "run/policy.stats.json").write_text(json.dumps(record))
    (tmp_path / "run/other.stats.json").write_text("[1]")  # another program's
    sampled = {"settings": {}, "about": made | {"inputs": {"model": str(policy)}}}
    (tmp_path / "round1.jsonl.stats.json").write_text(json.dumps(sampled))
    ask = [{"role": "user", "content": "?"}]
    pairs = [{"id": str(i), "prompt": ask, "chosen": a, "rejected": b,
              "margin": 0.5, "chosen_logp": -1.0, "rejected_logp": -2.0}
             for i, (a, b) in enumerate([("good", "bad"), ("bad", "good"), ("bad", "joy")])]
    gold = pairs[0] | {"id": "gold", "margin_of": {"judge": "gold"}}  # no self-label
    labels = dump(tmp_path / "worst.jsonl", [*pairs, gold])
    command = ["evaluate.py", "--answers", f"init={init}", f"round1={round1}", "--labels",
               f"round1={labels}", "--judge", "vader", "--out", tmp_path / "run"]
    printed = ok(run(*command)).stdout

    stats = stats_of(tmp_path / "run/report.md")
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
    assert text.split("\n\n")[1] in printed
    assert "Round 1 DIVERGED: its loss is 648." in text
    assert "--nproc_per_node 2 train.py --out policy\n" in text and "policy: 2 s" in text
    assert " ✂" in text
    assert (tmp_path / "run/report.md.png").exists()
    assert "complete, skipped" in ok(run(*command)).stdout
    # another order is another baseline
    command[2:4] = command[3:1:-1]
    printed = ok(run(*command)).stdout
    assert "answers ['init', 'round1'] → ['round1', 'init']. Redoing" in printed
    command[command.index("--out") + 1] = tmp_path / "gold"
    dump(tmp_path / "worst.jsonl", [gold])
    one_line(run(*command), "worst.jsonl: holds gold pairs alone")


def test_the_report_opens_with_sentences():
    first = {"characters": 200.0, "score": 0.47}
    p = {"characters": 190.0, "win_rate": 0.85, "interval": [0.8, 0.9], "p": 0.283, "ended": 0.81,
         "score": 0.874}
    policies = {"init": first, "round1": p, "round2": p}
    text = report.summary(policies, {"round2": {"accuracy": 0.75}}, {})
    assert text == (
        "Round 2 is preferred to init in 85 % of the comparisons [80, 90]; against round 1 p = "
        "0.28; 81 % of its answers end. Its mean gold score is 0.87, that of init 0.47. The judge "
        "agrees with 75 % of the self-labels of round 2.")


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
    p = stats_of(tmp_path / "run/report.md")["policies"]["mine"]
    assert p["preferences"] == [[1], [None], [0.75]]
    assert p["win_rate"] == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert p["no_verdict"] == 3 and ", 3 without verdict" in done.stdout
    assert "| without verdict |" in (tmp_path / "run/report.md").read_text()


def test_answers_that_do_not_fit_together_are_one_line(tmp_path):
    one = write_answers(tmp_path / "one.jsonl", TEXTS)
    turned = dump(tmp_path / "turned.jsonl", jsonl(one)[::-1])
    few = write_answers(tmp_path / "few.jsonl", TEXTS[:3])
    three = write_answers(tmp_path / "three.jsonl", [texts + ["x"] for texts in TEXTS])
    for out, words, *flags in [
            ("o", "in the same order", f"a={one}", f"b={turned}"),
            ("o", "its 3 prompts are not the 5", f"a={one}", f"b={few}"),
            ("o", "2 samples a prompt", f"a={one}", f"b={three}"),
            ("o", "NAME=FILE", "a"), ("o", "without '/'", "a/b=x"),
            ("o", "--labels names b", f"a={one}", "--labels", "b=x")]:
        one_line(run("evaluate.py", "--out", tmp_path / out, "--answers", *flags), words)


# -------------------------------------------------------------------------------------- the report

"""What is measured, against numbers worked by hand."""
import json
import math

import numpy as np
import pytest
from conftest import dump, ok, run

from evaluate import label_quality, mean_and_error, wins


def test_wins_and_errors_by_hand():
    w = wins(np.array([[1.0, 0.5], [0.2, 0.2]]), np.array([[0.5, 0.5], [0.3, 0.1]]))
    assert w.tolist() == [[1, 0.5], [0, 1]]
    mean, error = mean_and_error(w)  # prompts 0.75 and 0.5: mean 0.625, s.d. 0.1768, over √2
    assert mean == 0.625 and error == pytest.approx(0.125)
    assert math.isnan(mean_and_error(np.array([[1.0]]))[1])


def test_label_quality_by_hand():
    q = label_quality(np.array([1.0, 0.2, 0.5, 0.9]), np.array([0.0, 0.4, 0.5, 0.1]), np.array([False, True, True, False]))
    assert q == {"pairs": 4, "accuracy": 0.625, "flagged": 2, "wrong_among_flagged": 0.75, "wrong": 0.375}
    assert label_quality(np.ones(2), np.zeros(2), np.zeros(2, bool))["wrong_among_flagged"] is None


def test_stage_against_the_answers_it_wrote(folder, other_folder, tmp_path):
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    prompts = dump(tmp_path / "eval.jsonl", [{"id": str(i), "prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(6)])
    command = ["evaluate.py", "--models", f"init={folder}", f"moved={other_folder}", "--prompts", prompts, "--out", tmp_path / "run",
               "--judge", "vader", "-n", "2", "--max-new-tokens", "20"]
    printed = ok(run(*command)).stdout
    stats = json.load(open(tmp_path / "run/report.md.stats.json"))
    rows = {n: [json.loads(line) for line in open(tmp_path / f"run/eval/{n}.jsonl")] for n in ("init", "moved")}
    judge = SentimentIntensityAnalyzer().polarity_scores
    scores = {n: [[judge(t)["compound"] for t in r["responses"]] for r in rows[n]] for n in rows}
    for n in rows:
        assert stats["policies"][n]["score"] == pytest.approx(np.mean(scores[n]))
    expected = np.mean([(a > b) + 0.5 * (a == b) for m, i in zip(scores["moved"], scores["init"]) for a, b in zip(m, i)])
    assert stats["policies"]["moved"]["win_rate"] == pytest.approx(expected) and stats["policies"]["init"]["win_rate"] is None
    assert "| moved |" in printed and (tmp_path / "run/report.png").stat().st_size > 10000
    assert "| moved |" in ok(run(*command)).stdout  # complete: the table is shown again, nothing is generated
    assert "redoing" in ok(run(*["none" if c == "vader" else c for c in command])).stdout.lower()

"""run.sh from end to end on the tiny model."""
import json
import os
import subprocess

from conftest import ROOT, dump, gold_rows, jsonl


def run_sh(*arguments, **variables) -> str:
    import sys
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in variables.items()}}
    done = subprocess.run(["bash", "run.sh", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_demo_on_a_tiny_model(folder, ranker, tmp_path):
    config = tmp_path / "tiny.env"
    config.write_text((ROOT / "configs/demo.env").read_text().replace(":=40}", ":=6}").replace(":=96 96}", ":=6 5}")
                      .replace(":=48}", ":=8}"))
    data = dump(tmp_path / "prompts.jsonl", jsonl(ROOT / "data/prompts.jsonl")[:24])
    # the babble of a random model means nothing to VADER, so a random reward model stands in for gold
    variables = dict(MODEL=folder, DATA=data, RUN=tmp_path / "run", GOLD="reward-model", GOLD_MODEL=ranker)
    first = run_sh(config, **variables)
    assert "| round2 |" in first and "dro: " in first
    assert [l["anchor"] for l in (json.load(open(tmp_path / f"run/round{t}/policy.stats.json")) for t in (1, 2))] == ["init", "init"]
    assert {n: len(jsonl(tmp_path / f"run/data/{n}.jsonl")) for n in ("seed_prompts", "prompts_1", "prompts_2", "eval")} == \
        {"seed_prompts": 6, "prompts_1": 6, "prompts_2": 5, "eval": 7}
    assert json.load(open(tmp_path / "run/round1/policy.stats.json"))["settings"]["lam"] == 0.5
    assert json.load(open(tmp_path / "run/round2/policy.stats.json"))["settings"]["lam"] == 0.25

    changed = run_sh(config, **variables, EPSILON=0)
    assert "worst.jsonl: changed since it was written: epsilon 0.01 → 0.0. Redoing." in changed
    assert "run/seed: complete, skipped" in changed and "round1/labelled.jsonl: complete, skipped" in changed
    assert "round2/responses.jsonl: changed" in changed
    assert json.load(open(tmp_path / "run/round2/policy.stats.json"))["anchor"] == "previous"


def test_own_preference_data_and_judge_on_two_processes(wide, tmp_path):
    data = dump(tmp_path / "pairs.jsonl", [{k: v for k, v in r.items() if k != "id"} for r in gold_rows(24)])
    out = run_sh(MODEL=wide, DATA=data, RUN=tmp_path / "run", SEED_SIZE=6, ROUNDS=5, MAX_NEW_TOKENS=8, NPROC=2, EPSILON=0, ALPHA=0, JUDGE="llm",
                 JUDGE_START="previous")
    assert "12 comparisons" in out and "5 pairs by llm" in out
    assert "| round1 |" in out and (tmp_path / "run/report.md").exists() and not (tmp_path / "run/gold").exists()

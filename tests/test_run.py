"""run.sh from end to end on the tiny model."""

import json
import os
import re
import socket
import subprocess

import pytest

from conftest import ROOT, dump, gold_rows, jsonl, warm_python


def start_sh(*arguments, cwd=ROOT, **variables) -> subprocess.CompletedProcess:
    python = warm_python()
    env = {
        **os.environ,
        "PYTHON": python,
        "PYTHON_EXEC": python,
        "INSTALL": "no",
        "OMP_NUM_THREADS": "1",
        **{key: str(value) for key, value in variables.items()},
    }
    if "NPROC" in variables:
        del env["OMP_NUM_THREADS"]  # torchrun would say that it sets it
    return subprocess.run(
        ["bash", ROOT / "run.sh", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=env,
    )


def run_sh(*arguments, **variables) -> str:
    done = start_sh(*arguments, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    # No library's progress bars, and none of its warnings.
    foreign = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert not foreign
    return done.stdout


@pytest.mark.parametrize(
    "variables, word",
    [
        ({"EPSILN": "0.1"}, "is EPSILON meant"),
        ({"MODLE": "x"}, "is MODEL meant"),
        ({"METHODS": "spa"}, "is METHOD meant"),
        ({"METHOD": "sap"}, "must be one of"),
        ({"JUDGE": "llm"}, "METHOD=spa"),
        ({"REFERENCE": "none"}, "METHOD=spa"),
        ({"METHOD": "spa", "ANCHOR": "init", "REFERENCE": "none"}, "ANCHOR=init"),
        ({"LENGTH_PENALTY": "0.01", "EPSILON": "0"}, "LENGTH_PENALTY=0.01"),
        ({"ANCHOR": "previous"}, "D6"),
        ({"METHOD": "spa", "JUDGE": "llm", "LENGTH_PENALTY": "0.1"}, "implicit reward"),
        ({"NPROC": "two"}, "whole"),
        ({"NNODES": "2", "EACH_NODE": "nosuchcommand"}, "nosuchcommand"),
    ],
)
def test_an_impossible_setting_is_one_line_before_the_first_stage(tmp_path, variables, word):
    done = start_sh(DATA="data.jsonl", RUN=tmp_path / "run", **variables)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and word in done.stderr, (
        done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_help_names_every_setting():
    text = start_sh("--help").stdout
    used = set(re.findall(r"\$\{?([A-Z][A-Z_]*[A-Z])\b", (ROOT / "run.sh").read_text())) - {"PWD"}
    assert len(used) > 25 and all(f"  {name} " in text for name in used)


def test_paths_are_the_callers_and_runs_are_named_apart(tmp_path):
    dump(tmp_path / "own.jsonl", [])
    done = start_sh(cwd=tmp_path, DATA="own.jsonl", MODEL="./name", METHOD="spa")
    assert f"data {tmp_path}/own.jsonl" in done.stdout and "→ runs/name-own-spa" in done.stdout
    assert done.returncode == 2  # there is no such model


def test_demo_on_a_tiny_model(folder, ranker, tmp_path):
    config = tmp_path / "tiny.env"
    config.write_text(
        (ROOT / "configs/demo.env")
        .read_text()
        .replace(":=40}", ":=6}")
        .replace(":=96 96}", ":=6 5}")
        .replace(":=48}", ":=8}")
    )
    data = dump(tmp_path / "prompts.jsonl", jsonl(ROOT / "data/prompts.jsonl")[:24])
    # the babble of a random model means nothing to VADER, so a random reward model stands in for
    # gold
    variables = dict(
        MODEL=folder, DATA=data, RUN=tmp_path / "run", GOLD="reward-model", GOLD_MODEL=ranker
    )
    first = run_sh(config, **variables)
    assert "| round2 |" in first and "dro: " in first
    assert [
        l["anchor"]
        for l in (json.load(open(tmp_path / f"run/round{t}/policy.stats.json")) for t in (1, 2))
    ] == ["init", "init"]
    assert {
        n: len(jsonl(tmp_path / f"run/data/{n}.jsonl"))
        for n in ("seed_prompts", "prompts_1", "prompts_2", "eval")
    } == {"seed_prompts": 6, "prompts_1": 6, "prompts_2": 5, "eval": 7}
    assert json.load(open(tmp_path / "run/round1/policy.stats.json"))["settings"]["lam"] == 0.5
    assert json.load(open(tmp_path / "run/round2/policy.stats.json"))["settings"]["lam"] == 0.25

    changed = run_sh(config, **variables, EPSILON=0)
    assert "worst.jsonl: changed since it was written: epsilon 0.01 → 0.0. Redoing." in changed
    assert (
        "run/seed: complete, skipped" in changed
        and "round1/labelled.jsonl: complete, skipped" in changed
    )
    assert "round2/responses.jsonl: changed" in changed
    assert (
        json.load(open(tmp_path / "run/round2/policy.stats.json"))["anchor"] == "init"
    )  # the method's, at every ε


def test_own_preference_data_and_judge_on_two_processes(wide, tmp_path):
    data = dump(
        tmp_path / "pairs.jsonl", [{k: v for k, v in r.items() if k != "id"} for r in gold_rows(24)]
    )
    out = run_sh(
        MODEL=wide,
        DATA=data,
        RUN=tmp_path / "run",
        SEED_SIZE=6,
        ROUNDS=5,
        MAX_NEW_TOKENS=8,
        NPROC=2,
        METHOD="spa",
        ALPHA=0,
        JUDGE="llm",
        JUDGE_START="previous",
    )
    assert "12 responses" in out and re.search(
        "[45] pairs by llm", out
    )  # an answer may hold a special token
    assert (
        "| round1 |" in out
        and (tmp_path / "run/report.md").exists()
        and not (tmp_path / "run/gold").exists()
    )


CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.env") if path.stem != "demo")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_launches(tmp_path, name):
    run_sh(f"configs/{name}.env", "--tiny", RUN=tmp_path / "run")
    run = tmp_path / "run-tiny"
    rounds = {"phi-2": 1, "llama3-8b": 2, "phi-3-14b": 2}.get(name, 3)
    assert sorted(p.name for p in run.glob("round*")) == [f"round{t}" for t in range(1, rounds + 1)]
    stats = json.load(open(run / f"round{rounds}/policy.stats.json"))
    model = {
        "mistral-7b": "mistral",
        "mistral-instruct-noseed": "mistral",
        "llama3-8b": "llama",
        "phi-2": "phi",
        "phi-3-14b": "phi3",
    }[name]
    assert json.load(open(run / f"round{rounds}/policy/config.json"))["model_type"] == model
    lr, beta = {"llama3-8b": (1e-6, 0.05), "phi-2": (5e-6, 0.1), "phi-3-14b": (1e-5, 0.01)}.get(
        name, (5e-7, 0.1)
    )
    assert (stats["settings"]["lr"], stats["settings"]["beta"]) == (lr, beta)
    assert "--gradient-checkpointing" in stats["about"]["command"]
    assert (
        (run / "seed").exists()
        == (run / "data/seed.jsonl").exists()
        == (name != "mistral-instruct-noseed")
    )


def test_spa_variant_on_two_machines(tmp_path):
    """EACH_NODE, here two copies on the loopback in the place of srun; sharded over both."""
    twice = tmp_path / "twice"
    twice.write_text('#!/bin/bash\n"$@" & other=$!\n"$@" && wait $other\n')
    twice.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_sh(
        "configs/llama3-8b.env",
        "--tiny",
        RUN=tmp_path / "run",
        METHOD="spa",
        ROUNDS=8000,
        NNODES=2,
        EACH_NODE=twice,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    stats = json.load(open(tmp_path / "run-tiny/round1/policy.stats.json"))
    assert [stats["settings"][k] for k in ("lr", "beta")] == [1e-5, 0.01] and stats[
        "anchor"
    ] == "previous"
    assert "--shard" in stats["about"]["command"] and stats["about"]["processes"] == 2
    assert (
        json.load(open(tmp_path / "run-tiny/round1/worst.jsonl.stats.json"))["settings"]["epsilon"]
        == 0
    )


def test_endpoint_judges_take_their_address(tmp_path):
    """BASE_URL reaches every stage that an endpoint judges, and no other."""
    calls = tmp_path / "calls"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    python.chmod(0o755)
    common = {"PYTHON": python, "DATA": "d", "MODEL": "m", "RUN": tmp_path / "run", "METHOD": "spa",
              "ROUNDS": "4", "BASE_URL": "http://host/v1"}
    for judge, gold, expected in (("openai", "openai", ["label.py", "evaluate.py"]),
                                  ("openai", "vader", ["label.py"]), ("implicit", "none", [])):
        calls.write_text("")
        run_sh(**common, JUDGE=judge, JUDGE_MODEL="j", GOLD=gold, GOLD_MODEL="g")
        told = [line.split()[0] for line in calls.read_text().splitlines()
                if "--base-url http://host/v1" in line]
        assert told == expected

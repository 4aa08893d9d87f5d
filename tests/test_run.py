"""run.sh from end to end on the tiny model: its settings, its first look, its rounds."""

import json
import os
import re
import socket
import subprocess

import pytest
from conftest import ROOT, dump, gold_rows, gpus_for, jsonl, ok, one_line, stats_of, warm_python


def start_sh(*arguments, cwd=ROOT, environment=None, **settings) -> subprocess.CompletedProcess:
    """run.sh with settings as arguments."""
    python = warm_python()
    several = {"NPROC", "LAUNCH"} & settings.keys()
    env = {**os.environ, "PYTHON": python, "PYTHON_EXEC": python, "OMP_NUM_THREADS": "1"}
    env |= {**(gpus_for(2) if several else {}), **(environment or {})}
    env.pop("REDO", None)
    words = [*map(str, arguments), *(f"{name}={value}" for name, value in settings.items())]
    return subprocess.run(
        ["bash", ROOT / "run.sh", *words], cwd=cwd, capture_output=True, text=True, env=env)


def run_sh(*arguments, **settings) -> str:
    done = ok(start_sh(*arguments, **settings))
    # No library's progress bars, and none of its warnings.
    lines = done.stderr.splitlines()
    assert not [line for line in lines if not line.startswith(("note: ", "warning: "))]
    return done.stdout


# ----------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("words, expected", [
    ("EPSILN=0.1", "EPSILN is no setting; is EPSILON meant"),
    ("lr=1e-4", "is LR meant"),
    ("LEARNING_RATE=1", "is LR meant"),
    ("NOTHING_LIKE_IT=1", "NOTHING_LIKE_IT is no setting ("),
    ("METHOD=sap", "METHOD=sap: must be one of: worst-case spa"),
    ("SHARD=maybe", "SHARD=maybe: must be one of: yes no"),
    ("JUDGE=llm", "METHOD=spa"),
    ("REPLAY=yes", "METHOD=spa"),
    ("METHOD=spa REPLAY=yes SEED_POLICY=x", "leaves no gold pairs to REPLAY=yes"),
    ("FLIP=0.25 SEED_POLICY=x", "leaves no gold pairs to REPLAY=yes, to FLIP"),
    ("METHOD=spa JUDGE=llm SEED_POLICY=x", "or to JUDGE=llm without JUDGE_MODEL"),
    ("LENGTH_PENALTY=0.01 EPSILON=0", "LENGTH_PENALTY=0.01"),
    ("METHOD=spa EPSILON=0.01", "D6"),
    ("NPROC=0", "NPROC=0: must be a whole number"),
    ("N=01", "N=01: a pair takes two"),
    ("PROMPTS_ALONE=yes", "say who judges the seed"),
    ("SEED_SIZE=0", "SEED_POLICY"),
    ("configs/nonsense.env", "nor one of: test --check --tiny --help configs/demo.env "),
    ("--chek", "(nearest: --check)"),
    ("tests", "(nearest: test)"),
    ("configs/demo.env configs/phi-2.env", "a second config"),
])
def test_a_mistaken_setting_is_one_line_before_any_stage(tmp_path, words, expected):
    done = start_sh(*words.split(), DATA="data.jsonl", RUN=tmp_path / "run")
    one_line(done, expected)
    assert not (tmp_path / "run").exists()


def test_a_run_has_a_folder_of_its_own():
    one_line(start_sh(RUN="data"), "RUN=data/: holds no run")


def test_settings_do_not_come_from_the_environment():
    done = start_sh(environment={"METHOD": "spa"})
    one_line(done, "bash run.sh METHOD='spa'", "env -u METHOD bash run.sh")


def test_a_config_is_lines_of_names_and_values(tmp_path):
    config = tmp_path / "mine.env"
    config.write_bytes(b'# a comment\r\n\r\nDATA="no such.jsonl"\r\n  ROUNDS= \nLR=1e-4\n'
                       b"LAUNCH='a b'\nGOLD=vader\nSYSTEM_TURN=empty")
    done = start_sh(config, "--check", LR="2e-4")
    assert "data no such.jsonl" in done.stdout and "lr 2e-4" in done.stdout
    assert "→ runs/mine" in done.stdout and "data.system_turn" in done.stdout
    # What belongs to a config's own model and data does not go with others.
    assert "data.system_turn" not in start_sh(config, "--check", MODEL="other").stdout
    config.write_text("DATA=x\nROUNDS 4\n")
    one_line(start_sh(config), f"{config}: not a line NAME=value: ROUNDS 4")


def test_help_names_every_setting():
    text = start_sh("--help").stdout
    used = set(re.findall(r"\$\{?([A-Z][A-Z_]*[A-Z])\b", (ROOT / "run.sh").read_text())) - {"PWD"}
    assert len(used) > 25 and all(f"\n{name}=" in text for name in used)


def test_runs_are_named_apart(tmp_path):
    dump(tmp_path / "own.jsonl", gold_rows(3))
    done = start_sh(DATA=f"{tmp_path}/own.jsonl", MODEL="./name", METHOD="spa", ROUNDS="")
    assert "→ runs/own-spa" in done.stdout
    assert done.returncode == 2  # there is no such model
    assert "configs/demo.env DATA=" in done.stderr  # no config and no GPU
    one_line(start_sh(cwd=tmp_path), f"cd '{ROOT}'")  # paths would be another folder's


# ----------------------------------------------------------------------------------- the first look


BAD = [
    ("EPSILON=abc ALPHA=2 EVAL_N=0 FLIP=2", ["epsilon", "alpha", "-n", "flip"]),
    ("PIECES=0 LAMS=b ROUNDS=x", ["pieces", "lam", "rounds"]),
    ("METHOD=spa GROUP=0 PERCENTILE=101 MAX_NEW_TOKENS=many LENGTH_PENALTY=-1",
     ["group", "percentile", "max-new-tokens", "length-penalty"]),
    ("BETA=0 EVAL_SIZE=0 LAMS= TEMPERATURE=0", ["beta", "eval-size", "lam", "temperature"]),
    ("SEED=-1 SEED_EPOCHS=0 SEED_FRACTION=2", ["seed", "epochs", "seed-fraction"]),
]


@pytest.mark.parametrize("words, flags", BAD)
def test_every_number_is_checked_by_its_stage_before_the_first(folder, tmp_path, words, flags):
    data = dump(tmp_path / "data.jsonl", gold_rows(8))
    sound = {"MODEL": folder, "DATA": data, "SEED_SIZE": 4, "RUN": tmp_path / "run"}
    done = start_sh(*words.split(), **({"ROUNDS": 2} | sound if "ROUNDS" not in words else sound))
    assert done.returncode == 2 and done.stdout.startswith("run: ")
    for flag in flags:
        assert f"{'' if flag[0] == '-' else '--'}{flag}" in done.stderr, flag
    assert not (tmp_path / "run").exists()


def test_what_a_run_needs_is_looked_for_before_the_first_stage(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    prompts = dump(tmp_path / "prompts.jsonl", [{"prompt": f"x {i}"} for i in range(9)])
    pairs = dump(tmp_path / "pairs.jsonl", gold_rows(8))
    small = {"SEED_SIZE": 2, "ROUNDS": "", "MAX_NEW_TOKENS": 8}
    table = [
        ({"DATA": prompts, **small}, "PROMPTS_ALONE=yes"),
        ({"DATA": prompts, "PROMPTS_ALONE": "yes", **small}, "say who judges the seed"),
        ({"DATA": pairs, "ROUNDS": 40, "SEED_SIZE": 2}, "need"),
        ({"DATA": pairs, "MODEL": tmp_path / "none", **small}, "none"),
        ({"DATA": pairs, "BACKEND": "vllm", **small}, "vllm"),
        ({"DATA": pairs, "GOLD": "llm", "GOLD_MODEL": f"{folder}/no", **small}, f"{folder}/no"),
        ({"DATA": pairs, "GOLD": "openai", "GOLD_MODEL": "m", **small}, "OPENAI_API_KEY"),
        ({"DATA": pairs, "GOLD_MODEL": "rm", **small}, "rm"),
    ]
    for settings, word in table:
        done = start_sh("--check", **{"MODEL": folder, "RUN": tmp_path / "run", **settings})
        assert done.returncode == 2 and word in done.stderr, (settings, done.stderr)
        assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "prompts.jsonl"]


# --------------------------------------------------------------------------------------- whole runs


def test_demo_on_a_tiny_model(folder, ranker, tmp_path):
    data = dump(tmp_path / "prompts.jsonl", jsonl(ROOT / "data/prompts.jsonl")[:24])
    run = tmp_path / "run"
    # The babble of a random model means nothing to VADER, so a random reward model stands in for
    # gold.
    settings = dict(MODEL=folder, DATA=data, RUN=run, GOLD="reward-model", GOLD_MODEL=ranker,
                    FLIP=0.5, SEED_SIZE=6, ROUNDS="6 5", MAX_NEW_TOKENS=8, PROMPTS_ALONE="yes")
    demo = ROOT / "configs/demo.env"
    before = start_sh(demo, "--check", **settings)
    assert before.returncode == 0 and before.stdout.count("to do") == 18 and not run.exists()
    first = run_sh(demo, **settings)
    assert "| round2 |" in first and "[18/18] evaluate.py" in first
    assert [stats_of(run / f"round{t}/policy")["anchor"] for t in (1, 2)] == ["init", "init"]
    assert [stats_of(run / f"round{t}/policy")["settings"]["lam"] for t in (1, 2)] == [0.5, 0.25]
    sizes = {"seed": 6, "prompts_1": 6, "prompts_2": 5, "eval": 7}
    assert {name: len(jsonl(run / f"data/{name}.jsonl")) for name in sizes} == sizes
    assert stats_of(run / "gold/seed")["flipped"] > 1

    again = run_sh(demo, **settings)
    assert again.count("  complete ") == 18 and "complete, skipped" in again
    assert "[1/18]" not in again and "| round2 |" in again
    # What would be redone is named, and nothing is, before REDO=yes asks for it.
    changed = start_sh(demo, "--check", **settings, EPSILON=0)
    one_line(changed, "round1/worst.jsonl: complete, but changed", "epsilon 0.01 → 0.0")
    states = [line.split()[0] for line in changed.stdout.splitlines()[1:]]
    assert states[:7] == ["complete"] * 7 and states[7] == "changed"
    assert start_sh(demo, **settings, EPSILON=0).stderr == changed.stderr

    redone = run_sh(demo, **settings, EPSILON=0, REDO="yes")
    assert "worst.jsonl: changed since it was written: epsilon 0.01 → 0.0. Redoing." in redone
    assert "run/seed: complete, skipped" in redone
    assert "round1/labelled.jsonl: complete, skipped" in redone
    assert "round2/responses.jsonl: changed" in redone
    assert stats_of(run / "round2/policy")["anchor"] == "init"  # the method's, at every ε


def test_own_preference_data_and_judge_on_two_processes(wide, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "id"} for row in gold_rows(24)]
    data = dump(tmp_path / "pairs.jsonl", rows)
    out = run_sh(MODEL=wide, DATA=data, RUN=tmp_path / "run", SEED_SIZE=6, ROUNDS=5,
                 MAX_NEW_TOKENS=8, NPROC=2, METHOD="spa", EPSILON="0.0e-3", ALPHA=0, JUDGE="llm",
                 JUDGE_START="previous", REPLAY="yes")
    processes = [stats_of(tmp_path / f"run/round1/{out}")["about"]["processes"]
                 for out in ("responses.jsonl", "labelled.jsonl", "worst.jsonl", "policy")]
    assert processes == [2, 2, 1, 2]
    assert "12 letters" in out
    assert re.search("[45] pairs by llm", out)  # an answer may be empty
    assert "6 gold pairs appended" in out
    assert "| round1 |" in out and (tmp_path / "run/report.md").exists()
    assert not (tmp_path / "run/gold").exists()


CONFIGS = {
    # rounds, model_type, lr, β
    "mistral-7b": [3, "mistral", 5e-7, 0.1],
    "mistral-instruct-noseed": [3, "mistral", 5e-7, 0.1],
    "llama3-8b": [2, "llama", 1e-6, 0.05],
    "llama3-8b-spa": [2, "llama", 1e-5, 0.01],
    "phi-2": [1, "phi", 5e-6, 0.1],
    "phi-3-14b": [2, "phi3", 1e-5, 0.01],
}


def test_every_config_is_tried():
    names = {path.stem for path in (ROOT / "configs").glob("*.env")}
    assert names - {"demo", "defaults"} == CONFIGS.keys()


def launched(tmp_path, name: str, **settings) -> dict:
    """Stats of the policy after one round of a config on a tiny model."""
    rounds, *expected = CONFIGS[name]
    planned = start_sh("--check", f"configs/{name}.env", "--tiny", RUN=tmp_path / "run").stdout
    assert planned.count(" train.py ") == rounds
    ok(start_sh(f"configs/{name}.env", "--tiny", RUN=tmp_path / "run", ROUNDS=6, **settings))
    policy = tmp_path / "run-tiny/round1/policy"
    stats = stats_of(policy)
    model = json.loads((policy / "config.json").read_text())["model_type"]
    assert [model, stats["settings"]["lr"], stats["settings"]["beta"]] == expected
    assert "--gradient-checkpointing" in stats["about"]["command"]
    return stats


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"llama3-8b-spa"}))
def test_every_config_launches(tmp_path, name):
    assert launched(tmp_path, name)["anchor"] == "init"
    run = tmp_path / "run-tiny"
    seeded = name != "mistral-instruct-noseed"
    assert (run / "seed").exists() == (run / "data/seed.jsonl").exists() == seeded


def test_spa_variant_on_two_machines(tmp_path):
    """LAUNCH, here two copies on the loopback in the place of srun; sharded over both."""
    twice = tmp_path / "twice"
    twice.write_text('#!/bin/bash\n"$@" & other=$!\n"$@" && wait $other\n')
    twice.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = f"--rdzv_backend c10d --rdzv_id 1 --rdzv_endpoint 127.0.0.1:{port}"
    torchrun = f"{warm_python()} -m torch.distributed.run --nnodes 2 --nproc_per_node 1 {meet}"
    stats = launched(tmp_path, "llama3-8b-spa", LAUNCH=f"{twice} {torchrun}")
    assert "--shard" in stats["about"]["command"] and stats["about"]["processes"] == 2
    assert stats["anchor"] == "previous"
    worst = stats_of(tmp_path / "run-tiny/round1/worst.jsonl")
    assert worst["settings"]["epsilon"] == 0


def test_what_a_stage_is_given(tmp_path):
    """Processes, but for vLLM, which has its own; an endpoint's address where a judge may be asked;
    a budget where there is sampling."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text('#!/bin/sh\n[ "$LOOK" != yes ] || { printf "to do\\t0\\n"; exit 3; }\n'
                      f'echo "$@" >> "{calls}"\n')
    python.chmod(0o755)
    start_sh(DATA="d", MODEL="m", RUN=tmp_path / "run", METHOD="spa", ROUNDS=4, NPROC=2,
             JUDGE="openai", JUDGE_MODEL="j", GOLD="openai", GOLD_MODEL="g", BACKEND="vllm",
             BASE_URL="http://host/v1", SAMPLE_TOKENS=777, environment={"PYTHON": str(python)})
    lines = calls.read_text().splitlines()
    for flag, *stages in [
        ("--nproc_per_node 2", "seed_dpo.py", "label.py", "train.py", "evaluate.py"),
        ("--base-url http://host/v1", "label.py", "evaluate.py"),
        ("--sample-tokens 777", *4 * ["generate.py"]),
    ]:
        given = [line for line in lines if flag in line]
        assert [re.search(r"\w+\.py", line)[0] for line in given] == stages

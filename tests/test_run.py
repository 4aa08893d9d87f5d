"""run.sh from end to end on the tiny model."""

import gzip
import json
import os
import re
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import huggingface_hub
import pytest
import transformers
from core import preflight

from conftest import ROOT, dump, gold_rows, gpus_for, jsonl, warm_python


def start_sh(*arguments, cwd=ROOT, **variables) -> subprocess.CompletedProcess:
    python = warm_python()
    env = {
        **os.environ,
        "PYTHON": python,
        "PYTHON_EXEC": python,
        "INSTALL": "no",
        "OMP_NUM_THREADS": "1",
        **(gpus_for(2) if {"NPROC", "NNODES"} & variables.keys() else {}),
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
        ({"EPSILOM": "0.1"}, "is EPSILON meant"),
        ({"DATAS": "x"}, "is DATA meant"),
        ({"SEED_EPOCH": "1"}, "is SEED_EPOCHS meant"),
        ({"GOLD_MODEL": "rm"}, "GOLD must name its kind"),
        ({"JUDGE_MODEL": "rm"}, "JUDGE must name its kind"),
        ({"METHODS": "spa"}, "is METHOD meant"),
        ({"METHOD": "sap"}, "must be one of"),
        ({"JUDGE": "llm"}, "METHOD=spa"),
        ({"REFERENCE": "none"}, "METHOD=spa"),
        ({"METHOD": "spa", "ANCHOR": "init", "REFERENCE": "none"}, "ANCHOR=init"),
        ({"LENGTH_PENALTY": "0.01", "EPSILON": "0"}, "LENGTH_PENALTY=0.01"),
        ({"ANCHOR": "previous"}, "D6"),
        ({"METHOD": "spa", "JUDGE": "llm", "LENGTH_PENALTY": "0.1"}, "implicit reward"),
        ({"NPROC": "two"}, "NPROC=two: must be a whole number"),
        ({"NNODES": "0"}, "NNODES=0: must be a whole number"),
        ({"N": "1"}, "N=1: a pair takes two"),
        ({"SEED_SIZE": "0"}, "SEED_POLICY"),
        ({"LAMS": " "}, "LAMS names no number"),
        ({"GOLD": "reward-model"}, "GOLD=reward-model needs GOLD_MODEL"),
        ({"GOLD": "llm"}, "GOLD=llm needs GOLD_MODEL"),
        ({"METHOD": "spa", "JUDGE": "openai"}, "JUDGE=openai needs JUDGE_MODEL"),
        ({"PYTHON": "nosuchpython"}, "PYTHON=nosuchpython: no such command"),
        ({"NNODES": "2", "EACH_NODE": "nosuchcommand"}, "nosuchcommand"),
    ],
)
def test_an_impossible_setting_is_one_line_before_the_first_stage(tmp_path, variables, word):
    done = start_sh(DATA="data.jsonl", RUN=tmp_path / "run", **variables)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and word in done.stderr, (
        done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_an_interpreter_without_packages_is_one_line(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    done = start_sh(DATA="data.jsonl", RUN=tmp_path / "run", PYTHON=bare)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"PYTHON={bare} lacks torch" in done.stderr


BAD = [
    {"EPSILON": "abc", "ALPHA": "2", "EVAL_N": "0", "FLIP": "2", "TEMPERATURE": "-1"},
    {"PIECES": "0", "LAMS": "0.5 b", "N": "0", "ROUNDS": "4 x", "JUDGE_TOKENS": "0"},
    {"GROUP": "0", "PERCENTILE": "101", "MAX_NEW_TOKENS": "many", "LENGTH_PENALTY": "-1",
     "JUDGE": "implicit", "METHOD": "spa"},
    {"BETA": "0", "EVAL_SIZE": "0"},
    {"SEED": "-1", "SEED_EPOCHS": "0", "SEED_FRACTION": "2"},
    {"METHOD": "spa", "JUDGE": "llm", "JUDGE_LR": "-1", "LR": "fast", "SAMPLE_TOKENS": "0",
     "GOLD_N": "-2"},
]


@pytest.mark.parametrize("variables", BAD, ids=lambda table: " ".join(table))
def test_every_number_is_checked_by_its_stage_before_the_first(folder, tmp_path, variables):
    data = dump(tmp_path / "data.jsonl", [{"prompt": "x"}])
    sound = {"MODEL": folder, "DATA": data, "GOLD": "vader", "RUN": tmp_path / "run"}
    done = start_sh(**sound, **variables)
    fine = {"METHOD": "spa", "JUDGE": "llm"}.items() | {"JUDGE": "implicit"}.items()
    bad = dict(variables.items() - fine)
    assert done.returncode == 2 and done.stdout.startswith("run: ")
    assert sorted(line.split(": ")[1] for line in done.stderr.splitlines()) == sorted(
        f"{name}={value}" for name, value in bad.items()
    ), done.stderr
    assert not (tmp_path / "run").exists()


def test_what_a_run_needs_is_looked_for_before_the_first_stage(folder, tmp_path):
    prompts = dump(tmp_path / "prompts.jsonl", [{"prompt": "x"}])
    pairs = dump(tmp_path / "pairs.jsonl", gold_rows(5))
    table = [
        ({"DATA": prompts}, ["has no chosen and rejected. Prompts alone need GOLD", "1 rows; "]),
        ({"DATA": pairs, "ROUNDS": 4},
         ["5 rows; the seed, ROUNDS and one for the evaluation need 2005"]),
        ({"DATA": "no.csv", "MODEL": tmp_path, "BACKEND": "vllm", "GOLD": "llm",
          "GOLD_MODEL": folder + "/no"}, ["no.csv: no such", "config.json", "BACKEND=vllm",
                                          f"GOLD=llm: {folder}/no: no such"]),
    ]
    sheet = tmp_path / "pairs.csv"
    sheet.write_text('prompt,chosen,rejected\n"a\nb",c,d\n')  # one row of two lines
    whole = tmp_path / "pairs.json"
    whole.write_text(json.dumps(gold_rows(3)))
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(open(pairs, "rb").read()))
    short = {"SEED_SIZE": 9, "ROUNDS": 4}
    table += [({"DATA": path, **short}, [f"{count} rows; the seed"])
              for path, count in ((sheet, 1), (whole, 3), (packed, 5))]
    huge = tmp_path / "huge"
    huge.mkdir()
    (huge / "config.json").write_text("{}")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [10**6, 10**6]}}).encode()
    (huge / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    fits = {"DATA": pairs, "MODEL": huge, "SEED_SIZE": 2, "ROUNDS": "1 1"}
    table.append((fits, ["needs 36000.0 GB (3 models, and checkpoints"]))  # (3 + 2·3) × 4 TB
    for variables, words in table:
        done = start_sh("--check", **{"MODEL": folder, "RUN": tmp_path / "run", **variables})
        assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
        assert len(done.stderr.splitlines()) == len(words)
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
        MODEL=folder,
        DATA=data,
        RUN=tmp_path / "run",
        GOLD="reward-model",
        GOLD_MODEL=ranker,
        FLIP=0.5,
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

    run = json.load(open(tmp_path / "run/report.md.stats.json"))["run"]
    seed = json.load(open(tmp_path / "run/seed.stats.json"))
    gold = json.load(open(tmp_path / "run/gold/seed.stats.json"))
    assert run["method"] == "worst-case" and run["ε, the follower's radius"] == "0.01"
    assert run["model"] == f"{folder} ({seed['settings']['model']})"
    assert run["data"].startswith(f"{data} (") and run["gold labels by"] == "reward-model"
    assert run["prompts of each round"] == "6, 5" and run["λ, extrapolation"] == "0.5, 0.25"
    assert int(run["gold labels turned wrong on purpose"]) == gold["flipped"] > 1
    inputs = {"model": folder, "pairs": str(tmp_path / "run/gold/seed/seed.jsonl")}
    assert seed["about"]["inputs"] == inputs
    text = (tmp_path / "run/report.md").read_text()
    table = text.split("## How it came about")[1].split("```")[0]
    of_a_round = ["generate", "label", "dro", "train"]
    ran = ["prepare", "generate", "label", "prepare", "seed_dpo", *2 * of_a_round, "evaluate"]
    assert re.findall(r"^[|] (\w+) [|] .*run/", table, re.MULTILINE) == ran
    assert f"| method | {run['method']} |" in text

    again = run_sh(config, **variables, REDO="no")
    assert again.count("complete, skipped") == 14 and "| round2 |" in again
    # what would be redone is named, and nothing is, before REDO=yes asks for it
    refused = start_sh(config, "--check", **variables, EPSILON=0, REDO="no")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "round1/worst.jsonl: complete, of other settings: epsilon 0.01 → 0.0" in refused.stderr
    after = "round1/policy, round2/responses.jsonl, round2/labelled.jsonl, round2/worst.jsonl, "
    assert f"after it: {after}round2/policy, report.md" in refused.stderr
    states = [line.split()[0] for line in refused.stdout.splitlines()[1:-1]]
    assert states == ["done"] * 7 + ["changed", "follows"] + ["follows"] * 2 + [
        "changed"] + ["follows"] * 2
    assert start_sh(config, **variables, EPSILON=0, REDO="no").stderr == refused.stderr

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
    done = start_sh(
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
    # what torch says of a rendezvous that ends is not ours to mend
    assert done.returncode == 0, done.stdout + done.stderr
    stats = json.load(open(tmp_path / "run-tiny/round1/policy.stats.json"))
    assert [stats["settings"][k] for k in ("lr", "beta")] == [1e-5, 0.01] and stats[
        "anchor"
    ] == "previous"
    assert "--shard" in stats["about"]["command"] and stats["about"]["processes"] == 2
    assert (
        json.load(open(tmp_path / "run-tiny/round1/worst.jsonl.stats.json"))["settings"]["epsilon"]
        == 0
    )


def test_judges_are_looked_for(folder, ranker, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "OPENAI_API_KEY" in preflight.missing_for("openai", "m")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # refuses every request
        monkeypatch.setenv("BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        Thread(target=server.handle_request).start()
        assert preflight.missing_for("openai", "m") is None
    assert "does not answer" in preflight.missing_for("openai", "m")
    monkeypatch.setenv("BASE_URL", "host/v1")
    assert "does not answer" in preflight.missing_for("openai", "m")

    assert preflight.missing_for("reward-model", ranker) is None
    assert "LlamaForCausalLM" in preflight.missing_for("reward-model", folder)
    assert preflight.missing_for("llm", folder) is None
    config = transformers.AutoConfig.from_pretrained(ranker, num_labels=2)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "two")
    assert "found 2" in preflight.missing_for("reward-model", str(tmp_path / "two"))
    assert "no such model" in preflight.missing_for("llm", str(tmp_path / "none"))
    assert "HF_HUB_OFFLINE is set" in preflight.missing_for("llm", "some/judge")
    monkeypatch.setattr(preflight, "hub_trouble", lambda: "")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: None)
    assert preflight.missing_for("llm", "some/judge") is None  # may be fetched

    class Absent(huggingface_hub.errors.RepositoryNotFoundError):
        def __init__(self):
            pass

    def absent(*_, **__):
        raise Absent

    monkeypatch.setattr(huggingface_hub, "model_info", absent)
    assert "the hub has no such model" in preflight.missing_for("llm", "some/judge")

    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    for judge, package in (("vader", "vaderSentiment"), ("pairrm", "llm-blender"),
                           ("openai", "openai")):
        assert f"package {package}" in preflight.missing_for(judge, "m")


def test_the_disk_that_a_run_needs(folder, tmp_path, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())  # tied weights once
    assert preflight.parameters(folder) == count
    run = tmp_path / "run"
    (run / "old").mkdir(parents=True)
    (run / "seed.checkpoint").write_bytes(bytes(1000))
    monkeypatch.setenv("RUN", str(run / "not/yet/there"))
    looks = [preflight.Look([program, "--out", f"{run}/{out}"], state, "")
             for program, out, state in (("seed_dpo.py", "old", preflight.DONE),
                                         ("seed_dpo.py", "seed", preflight.TO_DO),
                                         ("label.py", "rows", preflight.TO_DO),
                                         ("train.py", "policy", preflight.TO_DO))]
    # two models of 4 bytes a weight; weights and two moments of 4 bytes, an old and a new
    # checkpoint, of which 1 000 bytes are there
    models, needed, free = preflight.disk(looks, count)
    assert (models, needed) == (2, 2 * 4 * count + 2 * 12 * count - 1000) and free > 0
    assert preflight.disk(looks[:1], count)[1] == 0


@pytest.mark.parametrize("name, text, expected", [
    ("a.jsonl", '{"prompt": "x", "chosen": "y"}\n{', {"prompt", "chosen"}),
    ("a.json", '\n[ {"prompt": "x"}, 1]', {"prompt"}),
    ("a.csv", "prompt,chosen\nx,y\n", {"prompt", "chosen"}),
    ("a.jsonl", "", None),
    ("a.parquet", "{}", None),
])
def test_the_columns_of_data(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert preflight.columns(str(tmp_path / name)) == expected


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
        models = {} if judge == "implicit" else {"JUDGE_MODEL": "j", "GOLD_MODEL": "g"}
        run_sh(**common, JUDGE=judge, GOLD=gold, **models)
        told = [line.split()[0] for line in calls.read_text().splitlines()
                if "--base-url http://host/v1" in line]
        assert told == expected

"""A run that is killed again and again ends with the same bytes as one that nobody disturbs."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, dump, jsonl

# What logs and stats measure; `files`: sizes, also of logs. A commit may come in between.
MEASURED = ("seconds", "tokens_per_s", "files", "commit")
# Large enough that stages spend their time on work and not on starting alone.
SETTINGS = {"SEED_SIZE": 24, "ROUNDS": "24 24", "N": 4, "MAX_NEW_TOKENS": 32, "SAMPLE_TOKENS": 2048,
            "MICRO_TOKENS": 256, "BATCH_SIZE": 4, "LR": "1e-4", "EVAL_SIZE": 24, "EVAL_N": 2,
            "GOLD": "vader"}
KILLS = 8


def unmeasured(value):
    """A JSON value without what was measured."""
    if isinstance(value, dict):
        return {key: unmeasured(part) for key, part in value.items() if key not in MEASURED}
    return [unmeasured(part) for part in value] if isinstance(value, list) else value


def content(path: Path) -> object:
    """What must be the same in two runs."""
    if path.name.endswith(".stats.json"):
        return unmeasured(json.loads(path.read_text()))
    if path.name.endswith("log.jsonl"):
        return unmeasured(jsonl(path))
    text = path.read_bytes()
    if path.suffix == ".md":
        # The table of stages ends with seconds, processes, commit and machine.
        text = re.sub(rb"\| \d+ \|[^|]*\|[^|]*\|[^|]*\|\n", b"\n", text)
    return text


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path):
    """SIGKILL ends every process of run.sh at random moments; each time the same command goes on.
    Trainers keep a checkpoint after every step."""
    tiny = ["-m", "data.tiny", "--architecture", "llama", "--out", tmp_path / "tiny"]
    subprocess.run([sys.executable, *tiny], cwd=ROOT, check=True)
    prompts = [row["prompt"] for row in jsonl(ROOT / "data/prompts.jsonl")[:120]]
    dump(tmp_path / "pairs.jsonl", [{"prompt": prompt, "chosen": f"Good: {prompt[::-1]}",
                                     "rejected": prompt[3:20]} for prompt in prompts])
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n"
                      "case $1 in train.py | seed_dpo.py) set -- \"$@\" --save-every 1e-6 ;; esac\n"
                      f"exec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    given = SETTINGS | {"RUN": tmp_path / "run", "MODEL": tmp_path / "tiny/model",
                        "DATA": tmp_path / "pairs.jsonl"}
    command = ["bash", ROOT / "run.sh", *(f"{name}={value}" for name, value in given.items())]
    env = {**os.environ, "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    env.pop("REDO")

    def ends_within(seconds: float | None) -> bool:
        """Whether the run ends; if not within so many seconds, it is killed."""
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log,
                                       start_new_session=True)
        try:
            assert process.wait(seconds) == 0, (tmp_path / "log").read_text()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # Stages are no children of this process: they cannot be waited for.
            time.sleep(0.5)
            return False
        return True

    began = time.perf_counter()
    assert ends_within(None)
    total = time.perf_counter() - began
    undisturbed = (tmp_path / "run").rename(tmp_path / "undisturbed")
    dice = random.Random()  # new moments every time: any must do
    kills = 0
    while kills < KILLS:
        if ends_within(dice.uniform(0, total / 2)):
            shutil.rmtree(tmp_path / "run")
        else:
            kills += 1
    assert ends_within(None)
    files = [{path.relative_to(run) for path in run.rglob("*") if path.is_file()}
             for run in (undisturbed, tmp_path / "run")]
    assert files[0] == files[1] and len(files[0]) > 20
    for name in sorted(files[0]):
        assert content(undisturbed / name) == content(tmp_path / "run" / name), name

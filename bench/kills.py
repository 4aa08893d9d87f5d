"""Does a run that is killed again and again end with the same bytes as one that nobody disturbs?

    python bench/kills.py --kills 18 --seed 0       a few minutes on two cores

run.sh goes through all its stages with a tiny random model, once undisturbed. Then again, in a
folder of the same name: SIGKILL ends every process of the run at random moments of the undisturbed
one, and each time the same command goes on. Moments count from a stage's start, so that a stage
begun anew is hit where it would have been. Trainers keep a checkpoint after every step. Every file
is compared: rows, weights, tables and plots by their bytes, logs and stats but for what they
measure (times, speeds, memory). Exit status 1 if any differs. Stats name the commit: make none
meanwhile.
"""
import argparse
import bisect
import collections
import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What logs and stats measure; `files`: sizes and times beside a model's digest.
MEASURED = ("seconds", "tokens_per_s", "mfu", "memory_gb", "files")
DURATION = re.compile(rb", \d+ s\b")  # in the report, of each training
# Large enough that stages spend their time on work and not on starting alone.
SETTINGS = {"SEED_SIZE": "48", "ROUNDS": "48 48", "N": "4", "MAX_NEW_TOKENS": "32",
            "SAMPLE_TOKENS": "2048", "MICRO_TOKENS": "256", "BATCH_SIZE": "4", "LR": "1e-4",
            "GOLD": "vader", "EVAL_N": "2", "INSTALL": "no", "OMP_NUM_THREADS": "1"}


def prepare(folder: Path) -> dict[str, str]:
    """The environment of a run: a tiny model, pairs, and an interpreter that has the trainers keep
    a checkpoint after every step."""
    tiny = ["-m", "data.tiny", "--architecture", "llama", "--out", str(folder / "tiny")]
    subprocess.run([sys.executable, *tiny], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        for line in open(ROOT / "data/prompts.jsonl", encoding="utf-8"):
            prompt = json.loads(line)["prompt"]
            row = {"prompt": prompt, "chosen": f"Good: {prompt[::-1]}", "rejected": prompt[3:20]}
            file.write(json.dumps(row) + "\n")
            if file.tell() > 40_000:
                break
    python = folder / "python"
    python.write_text("#!/bin/sh\n"
                      "case $1 in train.py | seed_dpo.py) set -- \"$@\" --save-every 1e-6 ;; esac\n"
                      f"exec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    return {**os.environ, **SETTINGS, "PYTHON": str(python), "RUN": str(folder / "run"),
            "MODEL": str(folder / "tiny/model"), "DATA": str(folder / "pairs.jsonl")}


@contextlib.contextmanager
def running(folder: Path, env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """run.sh in a process group of its own, with its output in folder/log; what is left of it at
    the end is killed."""
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(["bash", "run.sh"], cwd=ROOT, env=env, stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # Stages are no children of this process: they cannot be waited for.
        for _ in range(100):
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.02)


def written(folder: Path) -> set[str]:
    """Complete outputs."""
    found = set()
    for place, _, names in os.walk(folder / "run"):
        found |= {os.path.relpath(f"{place}/{name}", folder / "run")[:-len(".stats.json")]
                  for name in names if name.endswith(".stats.json")}
    return found


def finish(process: subprocess.Popen, folder: Path) -> None:
    if process.wait():
        sys.exit((folder / "log").read_text())


def undisturbed(folder: Path, env: dict[str, str]) -> list[tuple[str, float]]:
    """(output, seconds that it took) of every stage, in order."""
    stages: list[tuple[str, float]] = []
    began = time.perf_counter()
    with running(folder, env) as process:
        over = False
        while not over:
            over = process.poll() is not None
            for name in written(folder) - {name for name, _ in stages}:
                stages.append((name, time.perf_counter() - began))
                began = time.perf_counter()
            time.sleep(0.02)
        finish(process, folder)
    return stages


def killed(folder: Path, env: dict[str, str], stage: int, wait: float) -> bool:
    """Go on with the run and kill it `wait` seconds after it has passed `stage` outputs; False if
    it came to its end before."""
    before = len(written(folder))
    due = math.inf
    with running(folder, env) as process:
        while process.poll() is None and time.perf_counter() < due:
            skipped = (folder / "log").read_text(errors="replace").count(": complete, skipped")
            if due == math.inf and skipped + len(written(folder)) - before >= stage:
                due = time.perf_counter() + wait
            time.sleep(0.02)
        if process.poll() is None:
            return True
        finish(process, folder)
    return False


def moments(stages: list[tuple[str, float]], count: int, dice: random.Random) -> list:
    """Random moments of the undisturbed run, in order: (stages passed, seconds into the next)."""
    ends = list(itertools.accumulate(seconds for _, seconds in stages))
    drawn = sorted(dice.uniform(0, ends[-1]) for _ in range(count))
    found = []
    for moment in drawn:
        stage = bisect.bisect(ends[:-1], moment)
        found.append((stage, moment - (ends[stage - 1] if stage else 0.0)))
    return found


def unmeasured(value):
    """A JSON value without what was measured."""
    if isinstance(value, dict):
        return {key: unmeasured(part) for key, part in value.items() if key not in MEASURED}
    return [unmeasured(part) for part in value] if isinstance(value, list) else value


def content(path: Path) -> object:
    """What must be the same in two runs."""
    if path.name.endswith((".stats.json", ".digest.json")):
        return unmeasured(json.loads(path.read_text()))
    if path.name.endswith("log.jsonl"):
        return [unmeasured(json.loads(line)) for line in path.open()]
    return DURATION.sub(b"", path.read_bytes()) if path.suffix == ".md" else path.read_bytes()


def compare(one: Path, two: Path) -> tuple[int, list[str]]:
    """(files compared, those that differ or are in one folder alone)."""
    files = {str(path.relative_to(folder)) for folder in (one, two) for path in folder.rglob("*")
             if path.is_file()}
    differ = [name for name in sorted(files)
              if not ((one / name).is_file() and (two / name).is_file()
                      and content(one / name) == content(two / name))]
    return len(files), differ


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--kills", type=int, default=18)
    cli.add_argument("--seed", type=int, default=0, help="decides the moments")
    args = cli.parse_args()
    dice = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    env = prepare(folder)
    stages = undisturbed(folder, env)
    whole = (folder / "run").rename(folder / "whole")
    hits: collections.Counter = collections.Counter()
    differ: list[str] = []
    # A moment may come after the end: what was begun anew goes on where it was. Then once more.
    while hits.total() < args.kills and not differ:
        shutil.rmtree(folder / "run", ignore_errors=True)
        for stage, wait in moments(stages, args.kills - hits.total(), dice):
            hits[stages[stage][0]] += killed(folder, env, stage, wait)
        with running(folder, env) as process:
            finish(process, folder)
        count, differ = compare(whole, folder / "run")
    for output, seconds in stages:
        print(f"{output}: {seconds:.1f} s, {hits[output]} kills")
    for name in differ:
        print(f"differs: {folder}/whole/{name} {folder}/run/{name}")
    print("| kills | stages hit | files compared | differing files |\n| --- | --- | --- | --- |")
    print(f"| {hits.total()} | {len(+hits)} of {len(stages)} | {count} | {len(differ)} |")
    if differ:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

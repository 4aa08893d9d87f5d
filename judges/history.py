"""How a run came about: the stages behind its answers, read from the OUT.stats.json that each of
them left. Needs no torch."""
import json
import os
import sys
from pathlib import Path

from core.rows import read_json_lines


def record_of(out: str) -> dict:
    """What the stage that wrote `out`, or the folder it lies in, left beside it, with `out` as that
    stage named it; {} where none did."""
    for path in (out, os.path.dirname(out)):
        try:
            record = json.loads(Path(f"{path}.stats.json").read_text(encoding="utf-8"))
            if "seconds" in record["about"]:
                return {**record, "out": path}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none, or another program's
    return {}


def inputs_of(record: dict) -> dict[str, str]:
    """flag → path or hub id of what a stage read."""
    return record.get("about", {}).get("inputs", {})


def training_of(answers: str) -> tuple[list[dict], dict]:
    """(what the policy that wrote a file of answers logged while it was trained, a row a step; the
    record of that training); both empty where it was not trained here."""
    policy = inputs_of(record_of(answers)).get("model", "")
    log = f"{policy}/log.jsonl"
    steps = [step for _, step in read_json_lines(log)] if os.path.isfile(log) else []
    return steps, record_of(policy) if steps else {}


def history(outs: list[str]) -> list[dict]:
    """The records of the stages behind `outs`, each after those whose outputs it read."""
    stages = []
    seen = set()

    def visit(out: str) -> None:
        record = record_of(out)
        if not record or record["out"] in seen:
            return
        seen.add(record["out"])
        for source in inputs_of(record).values():
            visit(source)
        stages.append(record)

    for out in outs:
        visit(out)
    return stages


def command_of(about: dict) -> str:
    """A stage's command, as it runs from the repository's folder."""
    python = sys.executable
    if python.startswith(os.getcwd() + os.sep):
        python = os.path.relpath(python)
    if about["processes"] > 1:
        python += f" -m torch.distributed.run --standalone --nproc_per_node {about['processes']}"
    return f"{python} {about['command']}"

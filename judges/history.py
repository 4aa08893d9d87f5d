"""How a run came about: its stages, read from the OUT.stats.json that each of them left. Needs no
torch."""
import os
import sys
from pathlib import Path

from core.rows import read_json_lines
from core.stage import record_of


def stage_of(out: str) -> dict:
    """What the stage that wrote `out`, or the folder it lies in, left beside it, with `out` as that
    stage named it; {} where none did."""
    for path in (out, os.path.dirname(out)):
        record = record_of(path)
        if record and "about" in record:
            return {**record, "out": path}
    return {}


def sources_of(stage: dict) -> dict[str, str]:
    """flag → path or hub id of what a stage read."""
    return stage["about"]["inputs"] if stage else {}


def training_of(answers: str) -> tuple[list[dict], dict]:
    """(what the policy that wrote a file of answers logged while it was trained, a row a step; the
    record of that training); both empty where it was not trained here."""
    policy = sources_of(stage_of(answers)).get("model", "")
    log = f"{policy}/log.jsonl"
    steps = [step for _, step in read_json_lines(log)] if os.path.isfile(log) else []
    return steps, stage_of(policy) if steps else {}


def history(folder: str) -> list[dict]:
    """The records of the stages whose outputs lie in a folder, in the order in which they ended."""
    files = sorted(Path(folder).rglob("*.stats.json"), key=lambda file: file.stat().st_mtime)
    stages = [stage_of(str(file).removesuffix(".stats.json")) for file in files
              if file.name != "report.md.stats.json"]
    return [stage for stage in stages if stage]


def command_of(about: dict) -> str:
    """A stage's command, as it runs from the repository's folder."""
    python = sys.executable
    if about["processes"] > 1:
        python += f" -m torch.distributed.run --standalone --nproc_per_node {about['processes']}"
    return f"{python} {about['command']}"

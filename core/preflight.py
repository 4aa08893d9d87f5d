"""Preflight: in seconds and before the first stage, whether a whole run can go through.

run.sh gives its stage calls on standard input, a line each, and its settings in the environment.
Every stage reads its flags by its own rules and looks whether it has work (LOOK, core/stage.py).
Then come models, judges, vLLM, data and the room on the disk. What is wrong is a line each in the
names of run.sh's settings, and the exit status is 2. Needs no torch.

With --check the plan is printed: every stage, what is done already, what it writes, parameters and
gigabytes.

    bash run.sh configs/NAME.env --check
"""
import contextlib
import csv
import http.client
import importlib
import importlib.util
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from core.rows import BROKEN_GZIP, opened
from core.stage import (
    LOOK,
    OTHER_SETTINGS,
    WORK,
    hub_trouble,
    is_hub_id,
    run_stage,
    snapshot_of,
)

# What a stage's output is: complete; not there; complete, of other settings; complete, but made
# from what is going to be written; not known, because the stage refuses its flags.
DONE, TO_DO, CHANGED, FOLLOWS, WRONG = "done", "to do", "changed", "follows", "wrong"

# The settings of run.sh that a flag may come from, where its name does not say it.
SETTINGS = {
    "-n": ["N", "GOLD_N", "EVAL_N"],
    "--epochs": ["SEED_EPOCHS"],
    "--lr": ["LR", "JUDGE_LR"],
    "--lam": ["LAMS"],
    "--judge": ["JUDGE", "GOLD"],
    "--judge-model": ["JUDGE_MODEL", "GOLD_MODEL"],
}
READ_HERE = re.compile(r"\.(jsonl?|csv)(\.gz)?$")  # data files; `datasets` loads the others
PACKAGES = {"vader": "vaderSentiment", "pairrm": "llm_blender", "openai": "openai"}
# A weight in fp32; in a checkpoint with two moments. The next is whole before the last one goes.
MODEL_BYTES = 4
CHECKPOINT_BYTES = 2 * 3 * 4


class Look(NamedTuple):
    """A stage that has looked."""
    call: list[str]  # the program and its flags
    state: str
    said: str

    @property
    def program(self) -> str:
        return self.call[1] if self.call[0] == "-m" else self.call[0]

    @property
    def out(self) -> str:
        return value_of(self.call, "--out")


def value_of(call: list[str], flag: str) -> str:
    """The word after a flag, "" without one."""
    return call[call.index(flag) + 1] if flag in call[:-1] else ""


def setting(name: str) -> str:
    return os.environ.get(name, "")


# ------------------------------------------------------------------------------------------- stages


def look(call: list[str]) -> Look:
    """Run a stage that only looks, in this very process: it leaves before it loads anything
    heavy."""
    said = io.StringIO()
    status = 0
    sys.argv = call[1:] if call[0] == "-m" else call
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            if call[0] == "-m":
                runpy.run_module(call[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(call[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except OSError as error:
        return Look(call, WRONG, f"{error.filename}: {error.strerror}")
    text = said.getvalue().strip().removeprefix("error: ")
    if OTHER_SETTINGS in text:
        return Look(call, CHANGED, text)
    return Look(call, {0: DONE, WORK: TO_DO}.get(status, WRONG), text)


def look_at_all(calls: list[list[str]]) -> list[Look]:
    """All stages in their order; what is complete after one that has work follows from it."""
    looks = []
    redo = setting("REDO")
    os.environ["REDO"] = "no"  # what has changed is said in one way
    for call in calls:
        found = look(call)
        if found.state == DONE and any(one.state != DONE for one in looks):
            found = found._replace(state=FOLLOWS)
        looks.append(found)
    os.environ["REDO"] = redo
    return looks


def in_settings(found: Look) -> str:
    """What a stage says of a flag, said of run.sh's setting."""
    said = re.sub(r" \(see \S+ --help\)$", "", found.said)
    about = re.match(r"argument (-\S+): (.*)", said)
    if not about:
        return said
    flag, reason = about.groups()
    names = SETTINGS.get(flag, [flag.strip("-").replace("-", "_").upper()])
    value = value_of(found.call, flag)
    name = next((n for n in names if value in [setting(n), *setting(n).split()]), names[0])
    return f"{name}={setting(name)}: {reason}"


def changes(looks: list[Look]) -> list[str]:
    """What would be redone: the first complete stage of other settings, and what follows it."""
    changed = [i for i, found in enumerate(looks) if found.state == CHANGED]
    if not changed or setting("REDO") == "yes":
        return []
    first = changed[0]
    after = [name_of(found) for found in looks[first + 1:] if found.state in (CHANGED, FOLLOWS)]
    complete = f". Complete and after it: {', '.join(after)}" if after else ""
    return [looks[first].said + complete]


def name_of(found: Look) -> str:
    """An output's name within the run's folder."""
    if found.program == "evaluate.py":
        return "report.md"
    return found.out.removeprefix(f"{setting('RUN')}/")


def plan_line(found: Look) -> str:
    """A stage of the plan: its state, its name, what it writes, and what has changed."""
    line = f"  {found.state:<8} {found.program:<18} → {name_of(found)}"
    changed = re.search(f"{OTHER_SETTINGS}: (.*?)\\. REDO", found.said)
    return f"{line}   ({changed[1]})" if changed else line


# ------------------------------------------------------------------------------------------- models


def folder_of(model: str) -> Path | None:
    """Where a model lies on this machine: its folder, or the hub's cache; None where it does
    not."""
    return Path(model) if os.path.isdir(model) else snapshot_of(model)


def not_on_the_hub(model: str) -> str | None:
    """Why a model that is not on this machine cannot be fetched."""
    import huggingface_hub  # slow to import, and needed for hub ids alone
    if trouble := hub_trouble():
        return f"no such model folder, nor can it be had from the hub: {trouble}"
    try:
        huggingface_hub.model_info(model, timeout=5)
    except huggingface_hub.errors.RepositoryNotFoundError:
        return "no such model folder, and the hub has no such model, or keeps it from you"
    except Exception:
        pass  # the stage that fetches it tries again, and says why it cannot
    return None


def wrong_model(model: str) -> str | None:
    """Why a model cannot be loaded, as far as its folder shows; a hub id may still be fetched."""
    folder = folder_of(model)
    if folder is None:
        if not is_hub_id(model):
            return "no such model folder, and not the id of a model on the hub"
        return not_on_the_hub(model)
    if not (folder / "config.json").is_file():
        return "not a model folder: it holds no config.json"
    if os.path.isdir(model) and not any(folder.glob("*.safetensors")):
        return "holds no weights (*.safetensors)"
    return None


def parameters(model: str) -> int | None:
    """How many weights a model has, by the headers of its safetensors files; None where it is not
    on this machine, or they cannot be read (whoever loads it says why)."""
    folder = folder_of(model)
    count = 0
    for file in folder.glob("*.safetensors") if folder else []:
        try:
            with open(file, "rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            header.pop("__metadata__", None)
            count += sum(math.prod(tensor["shape"]) for tensor in header.values())
        except (ValueError, OverflowError, KeyError, TypeError, AttributeError):
            return None
    return count or None


def model_problems(looks: list[Look]) -> list[str]:
    """MODEL and SEED_POLICY, but for what the run makes itself."""
    made = {found.out for found in looks}
    problems = []
    for name in ("MODEL", "SEED_POLICY"):
        model = setting(name)
        if model and model not in made and (why := wrong_model(model)):
            problems.append(f"{name}={model}: {why}")
    return problems


# ------------------------------------------------------------------------------------------- judges


def silent(url: str) -> str | None:
    """Why an endpoint does not answer; any HTTP answer, a refusal too, shows that it is there."""
    url = url or setting("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/models", timeout=5).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"BASE_URL={url} does not answer: {getattr(error, 'reason', error)}"
    return None


def missing_for(judge: str, model: str) -> str | None:
    """What a judge lacks: its package, its key, its endpoint, its model, or its one logit."""
    package = PACKAGES.get(judge)
    if package and importlib.util.find_spec(package) is None:
        return f"needs the package {package.replace('_', '-')}"
    if judge == "pairrm":
        try:  # it is not importable beside every release of transformers
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(package)
        except Exception as error:  # other people's code
            said = (str(error) or repr(error)).splitlines()[0]
            return f"the package llm-blender cannot be imported: {said}"
    if judge == "openai":
        if not setting("OPENAI_API_KEY"):
            return ("needs a key in the environment variable OPENAI_API_KEY (any word for a server "
                    "that asks for none)")
        return silent(setting("BASE_URL"))
    if judge not in ("reward-model", "llm") or not model:
        return None
    if why := wrong_model(model):
        return f"{model}: {why}"
    folder = folder_of(model)
    if folder is None or judge == "llm":
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return f"{model}: its config.json is not JSON"
    kinds = config.get("architectures") or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        return f"{model}: a reward model is a sequence classifier; this is {', '.join(kinds)}"
    logits = len(config.get("id2label") or range(config.get("num_labels", 2)))
    return f"{model}: a reward model needs one logit; found {logits}" if logits != 1 else None


def judge_problems(looks: list[Look]) -> list[str]:
    """The judges that a stage with work will ask."""
    asked = set()
    for found in looks:
        if found.state == DONE or found.program not in ("label.py", "evaluate.py"):
            continue
        gold = found.program == "evaluate.py" or found.out.startswith(f"{setting('RUN')}/gold/")
        asked.add("GOLD" if gold else "JUDGE")
    problems = []
    for name in sorted(asked):
        if why := missing_for(setting(name), setting(f"{name}_MODEL")):
            problems.append(f"{name}={setting(name)}: {why}")
    vllm = [found for found in looks if value_of(found.call, "--backend") == "vllm"]
    if any(found.state != DONE for found in vllm) and importlib.util.find_spec("vllm") is None:
        problems.append("BACKEND=vllm: the package vllm is not installed")
    return problems


# --------------------------------------------------------------------------------------------- data


# How a file's text is looked at.
TEXT = {"mode": "rt", "encoding": "utf-8-sig", "errors": "replace", "newline": ""}
# What reading it may raise.
UNREADABLE = (OSError, ValueError, TypeError, csv.Error, *BROKEN_GZIP)


def row_count(path: str) -> int | None:
    """Rows of a JSONL, JSON or CSV file; None where it cannot be read (data.prepare says why)."""
    try:
        with opened(path, **TEXT) as file:
            if ".csv" in path[-7:]:
                return sum(1 for row in csv.reader(file) if row) - 1
            if ".jsonl" in path[-9:]:
                return sum(1 for line in file if line.strip())
            return len(json.load(file))
    except UNREADABLE:
        return None


def columns(path: str) -> set[str] | None:
    """Column names of a JSONL, JSON or CSV file by its first row; None where `datasets` would load
    it, or it cannot be read (data.prepare says why)."""
    if not READ_HERE.search(path) or not os.path.isfile(path):
        return None
    try:
        with opened(path, **TEXT) as file:
            if ".csv" in path[-7:]:
                return set(next(csv.reader(file), []))
            start = file.read(1 << 20).lstrip().removeprefix("[").lstrip()
            return set(json.JSONDecoder().raw_decode(start)[0])
    except UNREADABLE:
        return None


def are_alone(prepare: Look) -> bool:
    """Whether the gold seed is prompts without preferences, for which run.sh has listed stages."""
    if setting("SEED_POLICY"):
        return False
    if prepare.state == DONE:
        return True  # run.sh has looked at what was written
    found = columns(setting("DATA"))
    return found is not None and not found & {"chosen", "rejected"} and "prompt" in found


def data_problems(numbers: bool) -> list[str]:
    """DATA before data.prepare has read it: whether it is there and, where the `numbers` are
    sound, not too short at the first glance."""
    path = setting("DATA")
    if not READ_HERE.search(path) or "://" in path:
        return []
    if not os.path.isfile(path):
        return [f"DATA={path}: no such file"]
    if not numbers:
        return []
    needed = sum(map(int, setting("ROUNDS").split())) + 1
    if not setting("SEED_FRACTION") and not setting("SEED_POLICY"):
        needed += int(setting("SEED_SIZE"))
    count = row_count(path)
    if count is not None and count < needed:
        return [f"DATA={path}: {count} rows; the seed, ROUNDS and one for the evaluation need "
                f"{needed}"]
    return []


# --------------------------------------------------------------------------------------------- disk


def size_of(path: str) -> int:
    """Bytes of a file, or of all in a folder."""
    files = [Path(path), *Path(path).rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def disk(looks: list[Look], count: int) -> tuple[int, int, int]:
    """(models to be written, bytes that the run needs, bytes that are free where it lies)."""
    training = [found.out for found in looks if found.state not in (DONE, WRONG)
                and found.program in ("seed_dpo.py", "train.py")]
    new = sum(not os.path.exists(out) for out in training)
    needed = MODEL_BYTES * new * count
    if training:
        kept = sum(size_of(f"{out}.checkpoint") for out in training)
        needed += max(0, CHECKPOINT_BYTES * count - kept)
    place = Path(os.path.abspath(setting("RUN")))
    while not place.exists():
        place = place.parent
    return new, needed, shutil.disk_usage(place).free


def main() -> None:
    os.environ[LOOK] = "yes"
    check = sys.argv[1:] == ["--check"]  # here: every stage that looks finds its own flags there
    run = setting("RUN")
    looks = look_at_all([shlex.split(line) for line in sys.stdin])
    prepare = next(found for found in looks if found.out == f"{run}/data")
    of_gold = [found for found in looks if found.out.startswith(f"{run}/gold/")]
    problems = []
    if of_gold and not are_alone(prepare):
        looks = [found for found in looks if found not in of_gold]
    elif of_gold and setting("GOLD") == "none":
        looks = [found for found in looks if found not in of_gold]
        others = (columns(setting("DATA")) or set()) - {"prompt"}
        found = f" (found: {', '.join(sorted(others))})" if others else ""
        problems.append(f"DATA={setting('DATA')} has no chosen and rejected{found}. Prompts alone "
                        "need GOLD, who labels the seed; votes or scores must be turned into "
                        "chosen and rejected first")
    refused = [in_settings(found) for found in looks if found.state == WRONG]
    problems += refused + changes(looks)
    if any(found.state != DONE for found in looks):
        problems += model_problems(looks) + judge_problems(looks)
    if prepare.state != DONE:
        problems += data_problems(numbers=not refused)
    count = parameters(setting("SEED_POLICY") or setting("MODEL"))
    models, needed, free = disk(looks, count or 0)
    gigabytes = f"{needed / 1e9:.1f} GB ({models} models, and checkpoints while one is trained)"
    if needed > free:
        problems.append(f"RUN={run}: needs {gigabytes}; {free / 1e9:.1f} GB are free there")

    if check:
        for found in looks:
            print(plan_line(found))
        size = f"{count / 1e6:.3g} M" if count else "unknown, the model is not here yet"
        room = gigabytes if count else "unknown"
        print(f"parameters: {size}; to be written: {room}; free: {free / 1e9:.1f} GB")
    for problem in dict.fromkeys(problems):
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(2 if problems else 0)


if __name__ == "__main__":
    run_stage(main)

"""What passes between the stages: rows, and how a stage checks, skips and publishes its work.

A row is one JSON object a line (UTF-8). Each kind of file holds an `id` and the keys of `ROWS`; extra keys pass through
every stage unchanged. A stage writes beside its output and renames, so a file that exists is whole; its settings lie in
OUT.stats.json, so the same command again has nothing to do, and a changed one says what changed. Needs no torch.
"""
import argparse
import contextlib
import gzip
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 2."""
    print("error:", *message.splitlines(), file=sys.stderr, flush=True)
    raise SystemExit(2)


ROWS = {  # what each kind of file must hold, key by key; extra keys pass through every stage unchanged
    "prompts": ["prompt"],
    "preferences": ["prompt", "chosen", "rejected"],
    "responses": ["prompt", "responses"],
    "labelled": ["prompt", "chosen", "rejected", "margin", "chosen_logp", "rejected_logp"],
}
OPTIONAL = ["temperature", "ended", "chosen_ended", "rejected_ended", "space"]  # checked where a row has them


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold: neither NaN nor infinite, nor an integer of 400 digits."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def wrong(key: str, value: object) -> str | None:
    """What `value` should have been under `key`, or None if it is right."""
    if key in ("id", "chosen", "rejected"):
        return None if isinstance(value, str) and value.strip() else "a non-empty string"
    if key == "prompt":
        turns = isinstance(value, list) and value and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
        return None if turns else 'a non-empty list of {"role": …, "content": …}'
    if key == "responses":
        return None if isinstance(value, list) and value and all(isinstance(r, str) for r in value) else "a list of strings"
    if key == "ended":
        return None if isinstance(value, list) and all(isinstance(e, bool) for e in value) else "a list of true and false"
    if key in ("chosen_ended", "rejected_ended"):
        return None if isinstance(value, bool) else "true or false"
    if key == "space":
        return None if value in ("confidence", "margin") else "confidence or margin"
    if key in ("margin", "temperature"):
        return None if is_number(value) and value >= 0 else "a finite number ≥ 0"
    return None if is_number(value) else "a finite number"


def read_json_lines(path: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) for every line of a JSONL file."""
    if not os.path.isfile(path):
        fail(f"{path}: no such file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if b"\\ud" in line or b"\\uD" in line:  # half of a surrogate pair is no text: no file or tokenizer takes it
                    json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                fail(f"{path}:{number}: not JSON in UTF-8 ({error}); expected one object a line")
            if not isinstance(row, dict):
                fail(f"{path}:{number}: expected an object, found {type(row).__name__}")
            yield number, row


def read_json_list(path: str, *keys: str) -> list[dict]:
    """A JSON file (.json or .json.gz) that is a list of objects which hold text under `keys`."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            rows = json.load(file)
    except (ValueError, EOFError, RecursionError, gzip.BadGzipFile) as error:
        fail(f"{path}: not JSON in UTF-8 ({error})")
    for number, row in enumerate(rows if isinstance(rows, list) and rows else [None], 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            fail(f"{path}: entry {number}: expected a list of objects with text under {', '.join(keys)}")
    return rows


def iterate_rows(path: str, kind: str) -> Iterator[dict]:
    """Rows of a JSONL file, each checked for its `id` and the keys of `ROWS[kind]`. The first bad line ends the program."""
    seen = {}
    for number, row in read_json_lines(path):
        for key in ["id", *ROWS[kind]]:
            if key not in row:
                fail(f"{path}:{number}: key '{key}' is missing; {kind} rows need id, {', '.join(ROWS[kind])}")
        for key in ["id", *ROWS[kind], *OPTIONAL]:
            if key in row and (expected := wrong(key, row[key])) is not None:
                fail(f"{path}:{number}: '{key}' must be {expected}, found {json.dumps(row[key])[:60]}")
        if row["id"] in seen:
            fail(f"{path}:{number}: id {row['id']!r} stands on line {seen[row['id']]} too; ids must differ")
        seen[row["id"]] = number
        yield row
    if not seen:
        fail(f"{path}: holds no rows")


def read_rows(path: str, kind: str) -> list[dict]:
    """All rows of a file, checked."""
    return list(iterate_rows(path, kind))


@contextlib.contextmanager
def beside(path: str) -> Iterator[str]:
    """A path to write to, beside `path`; what was written there is removed if anything goes wrong."""
    tmp = f"{path}.tmp"
    Path(tmp).parent.mkdir(parents=True, exist_ok=True)
    remove(tmp)
    try:
        yield tmp
    except BaseException:
        remove(tmp)
        raise


def remove(path: str) -> None:
    """Remove a file or a folder, if there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def write_rows(path: str, rows: Iterable[dict]) -> None:
    """Write JSONL beside `path`, then rename: a file that exists is whole."""
    with beside(path) as tmp:
        with open(tmp, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(tmp, path)


# ------------------------------------------------------------------------------- a stage: settings, skipping, stats


def fingerprint(path: str) -> str:
    """Digest of a file's content; of the names, sizes and times in a folder (models are large); of the text of a hub id."""
    digest = hashlib.sha256()
    if os.path.isfile(path):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    else:
        files = sorted(f for f in Path(path).rglob("*") if f.is_file())
        digest.update(repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files] or path).encode())
    return digest.hexdigest()[:16]


def settings_of(args: argparse.Namespace, *inputs: str) -> dict:
    """Everything that decides a stage's output: the arguments, with the paths named in `inputs` by their fingerprint."""
    return {key: fingerprint(value) if key in inputs and value else value
            for key, value in vars(args).items() if key not in ("out", "save_every")}


def is_done(out: str, settings: dict) -> bool:
    """True if `out` is complete from these very settings. Settings that changed are named; the stage then runs again."""
    try:
        old = json.loads(Path(f"{out}.stats.json").read_text())["settings"]
    except (OSError, ValueError, KeyError):
        return False
    changed = [f"{k} {old.get(k)!r} → {settings.get(k)!r}" for k in {**old, **settings} if old.get(k) != settings.get(k)]
    if os.path.exists(out) and int(os.environ.get("RANK", 0)) == 0:
        print(f"{out}: " + (f"changed since it was written: {'; '.join(changed)}. Redoing." if changed else "complete, skipped"))
    return os.path.exists(out) and not changed


def publish(out: str, settings: dict, stats: dict, write: Callable[[str], None]) -> None:
    """`write(tmp)`, rename to `out`, then write `out`.stats.json: at no moment do stats describe another output."""
    with beside(out) as tmp, beside(f"{out}.stats.json") as tmp_stats:
        write(tmp)
        Path(tmp_stats).write_text(json.dumps({**stats, "settings": settings}, indent=1, ensure_ascii=False) + "\n")
        remove(f"{out}.stats.json")
        if os.path.isdir(out):  # a file is replaced at once
            remove(out)
        os.replace(tmp, out)
        os.replace(tmp_stats, f"{out}.stats.json")


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage; a full disk or an unreadable file is one line, like every other error that a user can mend."""
    try:
        main()
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror or error}: cannot write; nothing finished is lost")
    except MemoryError as error:
        fail(f"out of memory: {error}")
    except RuntimeError as error:  # torch.OutOfMemoryError, without importing torch
        if type(error).__name__ != "OutOfMemoryError":
            raise
        fail(f"out of memory; lower --micro-tokens or --batch-size, or see --gradient-checkpointing. ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # gloo's threads can outlive the last collective and abort Python's teardown
        sys.stdout.flush()
        os._exit(0)


def parser(doc: str) -> argparse.ArgumentParser:
    """An argument parser whose --help is the module's docstring, then every flag with its default; an error is one line."""
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass
    cli = argparse.ArgumentParser(description=doc, formatter_class=Help)
    cli.error = lambda message: fail(f"{message} (see {cli.prog} --help)")
    return cli


def ranged(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A flag's type: an int or float from `low` (or `above` it) to `high`, and finite."""
    def parse(text: str) -> float:
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {'above' if above else 'at least'} {low}"
                                             f"{f' and at most {high}' if high < math.inf else ''}, found {text}")
        return value
    parse.__name__ = kind.__name__  # what argparse calls a text that is no number at all
    return parse


positive, share = ranged(float, 0, above=True), ranged(float, 0, 1)
natural = ranged(int, 1)

"""A stage: its flags, its settings, whether it has work, how it publishes and how it fails. Needs no torch.

The settings lie in OUT.stats.json, so the same command again has nothing to do, and a changed one says what changed.
"""
import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from core.rows import beside, fail, remove


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

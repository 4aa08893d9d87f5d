"""A stage: its flags, its settings, whether it has work, how it publishes and how it fails. Needs
no torch.

The settings lie in OUT.stats.json, so the same command again has nothing to do, and a changed one
says what changed.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from core.rows import atomic_path, fail, remove

STARTED = time.time()

# OpenMP threads that spin while they wait made a step take three to five times as long beside other
# programs. Read when torch is loaded, after this file.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# LOOK=yes: a stage only looks whether it has work. Its exit status says so: 0 none, WORK some.
LOOK = "LOOK"
WORK = 3
OTHER_SETTINGS = "complete, of other settings"
ABSENT = "absent"  # the fingerprint, while only looking, of what an earlier stage has yet to write

# Memory, not mathematics: what is written is the same to rounding whatever they are (D11).
MEMORY_ONLY = ("micro_tokens", "sample_tokens", "gradient_checkpointing", "shard", "save_every")


def fingerprint(path: str) -> str:
    """Digest of a file's or a folder's content, or of a hub id and its commit.

    A folder's is kept beside it, FOLDER.digest.json, or in the user's cache where nothing can be
    written beside it: names, sizes and times only decide whether it is computed anew, so that a
    copy is the same thing and a start costs no pass over a large model. Training logs and what
    downloads leave in hidden files are not looked at: they hold times.
    """
    if os.path.isfile(path):
        return digest_of([path], [os.path.basename(path)])
    if not os.path.isdir(path):
        if os.environ.get(LOOK) == "yes" and not commit_of(path):
            return ABSENT
        return hashlib.sha256(f"{path}{commit_of(path)}".encode()).hexdigest()[:16]
    files = {str(f.relative_to(path)): f for f in sorted(Path(path).rglob("*")) if f.is_file()}
    files = {name: f for name, f in files.items()
             if f.name != "log.jsonl" and not any(part[0] == "." for part in Path(name).parts)}
    seen = [[name, f.stat().st_size, f.stat().st_mtime_ns] for name, f in files.items()]
    places = kept_at(path)
    for place in places:
        try:
            known = json.loads(place.read_text())
            if known["files"] == seen:
                return known["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
    digest = digest_of(list(files.values()), list(files))
    for place in places:
        # Several processes may be at it.
        tmp = f"{place}.{os.getpid()}.tmp"
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            Path(tmp).write_text(json.dumps({"digest": digest, "files": seen}) + "\n")
            os.replace(tmp, place)
            break
        except OSError:
            with contextlib.suppress(OSError):
                remove(tmp)
    return digest


def kept_at(folder: str) -> list[Path]:
    """Where a folder's digest is kept: beside it, or else in the user's cache."""
    key = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [Path(f"{os.path.normpath(folder)}.digest.json"),
            Path(cache, "preference-digests", f"{key}.json")]


def is_hub_id(name: str) -> bool:
    """Whether a model or data set that is no path here may be one of the hub."""
    return name.count("/") == 1 and not name.startswith((".", "/"))


def snapshot_of(name: str) -> Path | None:
    """The hub's cache of a hub id; None where it is none that can be reached. While only looking
    nothing is fetched."""
    if not is_hub_id(name):
        return None
    import huggingface_hub  # slow to import, and needed for hub ids alone
    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json")
        looking = os.environ.get(LOOK) == "yes"
        if not isinstance(config, str) and not looking and not hub_trouble():
            config = huggingface_hub.hf_hub_download(name, "config.json")
    except Exception:
        # Whoever loads the model says what is wrong.
        return None
    return Path(config).parent if isinstance(config, str) else None


def commit_of(name: str) -> str:
    """The commit that a hub id stands for here; "" where it is none that can be reached."""
    snapshot = snapshot_of(name)
    return snapshot.name if snapshot else ""


@functools.cache
def hub_trouble() -> str:
    """Why nothing can be had from the hub, or "". Asked once: where it does not answer, the process
    goes on offline with what was downloaded before, instead of waiting for every file anew."""
    import huggingface_hub  # slow to import, and needed for hub ids alone
    from huggingface_hub import constants
    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE is set, and it was not downloaded before"
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        constants.HF_HUB_OFFLINE = True
        # For the processes that this one starts.
        os.environ["HF_HUB_OFFLINE"] = "1"
        said = str(error).splitlines() or [type(error).__name__]
        return (f"it was not downloaded before, and {constants.ENDPOINT} does not answer "
                f"({said[0]}); look at the connection or HF_ENDPOINT, or give a local path")
    return ""


def digest_of(files: list, names: list[str]) -> str:
    """Digest of files' names and bytes."""
    digest = hashlib.sha256()
    for file, name in zip(files, names):
        if len(files) > 1:
            digest.update(f"{name}\0{os.path.getsize(file)}\0".encode(errors="surrogatepass"))
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def settings_of(args: argparse.Namespace, *inputs: str) -> dict:
    """Everything that decides a stage's output: the arguments, but for where it goes and what only
    memory notices, with the paths named in `inputs` by their fingerprint."""
    settings = {}
    for key, value in vars(args).items():
        if key == "out" or key in MEMORY_ONLY:
            continue
        settings[key] = fingerprint(value) if key in inputs and value else value
    return settings


def inputs_of(args: argparse.Namespace, settings: dict) -> dict[str, str]:
    """What `settings` has by its fingerprint, as the command line named it: flag → path or hub
    id."""
    return {key: value for key, value in vars(args).items()
            if key in settings and settings[key] != value}


def is_done(out: str, settings: dict) -> bool:
    """True if `out` is complete from these very settings. A complete output of other settings is
    never replaced unasked: what differs is named, and the program ends, unless REDO=yes is set.
    What has no stats of ours is somebody else's, and is never replaced, but for an empty folder."""
    if not os.path.lexists(out) or os.path.isdir(out) and not os.listdir(out):
        return False
    try:
        old = dict(json.loads(Path(f"{out}.stats.json").read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        # A kill between the two renames of `publish` leaves the output and these.
        if os.path.exists(f"{out}.stats.json.tmp"):
            return False
        fail(f"{out}: is there, and {out}.stats.json, which says what it was written from, is "
             "missing or unreadable. It is not replaced: move it away, or name another --out (RUN)")
    changed = [f"{key} {old.get(key)!r} → {settings.get(key)!r}" for key in {**old, **settings}
               if key not in MEMORY_ONLY and settings.get(key) not in (old.get(key), ABSENT)]
    first = int(os.environ.get("RANK", 0)) == 0
    if not changed:
        if first:
            clean(out)
            print(f"{out}: complete, skipped")
        return True
    if os.environ.get("REDO") != "yes":
        fail(f"{out}: {OTHER_SETTINGS}: {'; '.join(changed)}. REDO=yes replaces it and "
             "all that follows from it; another --out (RUN) keeps both")
    if first:
        print(f"{out}: changed since it was written: {'; '.join(changed)}. Redoing.")
    return False


def exit_if_complete(out: str, settings: dict, *beside: str) -> None:
    """Ends the program where `out` is complete from these very settings."""
    if is_done(out, settings):
        raise SystemExit(0)


def exit_if_looking(out: str = "", writes: int = 0) -> None:
    """Ends the program where LOOK=yes: it has work, and it only looks."""
    if os.environ.get(LOOK) == "yes":
        raise SystemExit(WORK)


def clean(out: str) -> None:
    """Remove what only a run that is not finished needs."""
    for suffix in ("log.jsonl", "checkpoint", "checkpoint.tmp", "checkpoint.old"):
        remove(f"{out}.{suffix}")


def about(inputs: dict[str, str]) -> dict:
    """How an output came about: for readers, and no reason to do anything again. Paths stand here
    by name; their fingerprints are in the settings."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", here, "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    folder, program = Path(sys.argv[0]).absolute().parts[-2:]
    if folder in ("data", "judges"):
        program = f"-m {folder}.{program.removesuffix('.py')}"
    torch = sys.modules.get("torch")  # a stage that computes has loaded it
    gpu = torch is not None and torch.cuda.is_initialized()
    card = f", {torch.cuda.get_device_name()}" if gpu else ""
    return {"command": f"{program} {shlex.join(sys.argv[1:])}",
            "commit": commit or None,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{card}",
            "processes": int(os.environ.get("WORLD_SIZE", 1)),
            "seconds": round(time.time() - STARTED, 1),
            "inputs": inputs}


def publish(out: str, settings: dict, stats: dict, write: Callable[[str], None],
            inputs: dict[str, str] | None = None) -> None:
    """`write(tmp)`, rename to `out`, then write `out`.stats.json: at no moment do stats describe
    another output."""
    whole = {**stats, "about": about(inputs or {}), "settings": settings}
    text = json.dumps(whole, indent=1, ensure_ascii=False)
    with atomic_path(f"{out}.stats.json") as tmp_stats, atomic_path(out) as tmp:
        write(tmp)
        Path(tmp_stats).write_text(text + "\n", encoding="utf-8")
        remove(f"{out}.stats.json")
        # A file is replaced at once.
        if os.path.isdir(out):
            remove(out)


def run_stage(main: Callable[..., None], *given) -> None:
    """Run a stage; a full disk or an unreadable file is one line, like every other error that a
    user can mend."""
    try:
        main(*given)
    except OSError as error:
        if error.filename:
            fail(f"{error.filename}: {error.strerror}")
        fail(f"{error.strerror or error}: cannot write; nothing finished is lost")
    except MemoryError as error:
        fail(f"out of memory: {error}")
    except RuntimeError as error:
        # torch.OutOfMemoryError, without importing torch.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        fail("out of memory; lower --micro-tokens, --sample-tokens or --batch-size, or see "
             f"--gradient-checkpointing. ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import torch.distributed as dist  # a stage on several processes has loaded it
        if dist.is_initialized():
            # all leave together: where one machine's processes leave while rank 0 still writes, the
            # others' rendezvous ends, and rank 0 with it
            dist.barrier()
        # gloo's threads can outlive the last collective and abort Python's teardown
        sys.stdout.flush()
        os._exit(0)


def parser(doc: str) -> argparse.ArgumentParser:
    """An argument parser whose --help is the module's docstring, then every flag with its default;
    an error is one line."""
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass
    cli = argparse.ArgumentParser(description=doc, formatter_class=Help)
    cli.error = lambda message: fail(f"{message} (see {cli.prog} --help)")
    return cli


def ranged(kind: type, low: float, high: float = math.inf,
           above: bool = False) -> Callable[[str], float]:
    """A flag's type: an int or float from `low` (or `above` it) to `high`, and finite."""
    def parse(text: str) -> float:
        value = kind(text)
        large_enough = low < value if above else low <= value
        if not large_enough or not value <= high or value == math.inf:
            bounds = f"{'above' if above else 'at least'} {low}"
            if high < math.inf:
                bounds += f" and at most {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, found {text}")
        return value
    # What argparse calls a text that is no number at all.
    parse.__name__ = kind.__name__
    return parse


positive = ranged(float, 0, above=True)
share = ranged(float, 0, 1)
natural = ranged(int, 1)

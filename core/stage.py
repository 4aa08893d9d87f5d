"""A stage: its flags, its settings, whether it has work, how it publishes and how it fails. Needs
no torch.

Every stage goes through `start` (which ends it where OUT is complete), checks of its own,
`exit_if_looking`, its work, and `publish`.

OUT.stats.json says from which settings OUT was written, and how large its files are: so the same
command again has nothing to do, and a changed one says what changed. While a stage works, there is

    OUT.unfinished/lock         held by the one program that works on OUT
    OUT.unfinished/DIGEST/      what it goes on from after a kill; DIGEST is that of its settings
    OUT.unfinished/new/         what is going to stand in OUT's place, or beside it
    OUT.unfinished/stats.json   there once new/ is whole: the next start too may put it in place
    OUT.unfinished/old/         what stood there, until the new stands

LOOK=yes: a stage looks whether it has work, writes nothing, and prints its state, a tab, and the
bytes that it will write, or has written. core/folder.py reads what earlier stages promise. States,
exit status, and what run.sh does then:

    complete    0    starts it on one process, where it ends at once
    to do       3    runs it
    changed     3    runs it, with REDO=yes; without that an error, 2
    follows     3    runs it: complete, but an input will be written anew, or its own files are not
                     yet in place
    (no line)   2    says what is wrong, and runs nothing
"""
import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from core import RANK, WORLD
from core.folder import (
    ABSENT,
    check_model,
    check_tokenizer,
    files_of,
    fingerprint,
    is_looking,
    policy_bytes,
    promises,
    size_of,
)
from core.rows import fail, remove

STARTED = time.time()
ROOT = Path(__file__).resolve().parent.parent

# OpenMP threads that spin while they wait made a step take three to five times as long beside other
# programs. Read when torch is loaded, after this file.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Lengths differ from pass to pass: GPU memory in blocks of fixed size would be full of holes. The
# second name is the older one.
os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF",
                                                           "expandable_segments:True"))

# What cannot be written in the terminal's encoding is written as an escape, and ends nothing.
for stream in (sys.stdout, sys.stderr):
    # Whoever started this may have put something else there.
    with contextlib.suppress(AttributeError, OSError):
        stream.reconfigure(errors="backslashreplace")
# Process 0 says for all what a stage has to say; an error, on stderr, is anybody's.
if RANK > 0:
    sys.stdout = open(os.devnull, "w")

# The flags whose value is a path or a hub id that a stage reads, and what lies there.
READ = {
    "model": "model", "reference_model": "model", "judge_model": "model", "data": "dataset",
    "prompts": "file", "pairs": "file", "responses": "file", "answers": "file", "labels": "file",
    "gold": "file",
}

# The exit status of a stage that has looked and has work.
WORK = 3

# What decides no output: where things lie, and what only memory notices, for what is written is the
# same to rounding whatever it is (D11).
NOT_SETTINGS = ("out", "base_url", "micro_tokens", "sample_tokens", "gradient_checkpointing",
                "shard", "save_every")

# What lies in OUT.unfinished, beside folders whose names are digests.
UNFINISHED = {"lock", "new", "stats.tmp", "stats.json", "old"}
DIGEST = 16 * "[0-9a-f]"
# The lock that this program holds.
lock = None


# ------------------------------------------------------------------------------------------- flags


def parser(doc: str, out: str = "", precision: str = "") -> argparse.ArgumentParser:
    """An argument parser whose --help is the module's docstring, then every flag with its default;
    an error is one line. `out` says what will lie at --out and `precision` what --precision is of,
    where there are these flags."""
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass
    cli = argparse.ArgumentParser(f"python {program()}", description=doc, formatter_class=Help)
    cli.error = lambda message: fail(f"{message} (see {cli.prog} --help)")
    if out:
        cli.add_argument("--out", type=os.path.normpath, required=True, help=out)
    if precision:
        cli.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto",
                         help=precision)
    return cli


def program() -> str:
    """This program, as python is told to start it from the repository's folder."""
    path = Path(sys.argv[0]).resolve()
    return path.name if path.parent == ROOT else f"-m {path.parent.name}.{path.stem}"


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

# Of the stages that train: gradients of a larger norm are scaled down to this. No flag: the papers
# give no number, and 1.0 is TRL's default.
CLIP = 1.0


def training_flags(doc: str, epochs: int) -> argparse.ArgumentParser:
    """A parser with the flags that seed_dpo.py and train.py share; `doc` heads its help."""
    cli = parser(doc, out="folder of the trained policy",
                 precision="of matrix products; weights stay fp32")
    cli.add_argument("--model", required=True,
                     help="where training starts, and the reference: a folder or hub id")
    cli.add_argument("--pairs", required=True, help="rows with chosen and rejected (JSONL)")
    cli.add_argument("--beta", type=positive, default=0.1,
                     help="weight of the KL term (papers: 0.1; LLaMA-3 0.01 or 0.05)")
    cli.add_argument("--lr", type=positive, default=5e-7,
                     help="peak learning rate (papers: 5e-7 at 7 B, 5e-6 Phi-2)")
    cli.add_argument("--epochs", type=natural, default=epochs,
                     help=f"how often each pair is seen (papers: {epochs})")
    cli.add_argument("--batch-size", type=natural, default=32,
                     help="pairs an update, over all processes (papers: 32)")
    cli.add_argument("--seed", type=ranged(int, 0), default=42,
                     help="decides the order of the pairs")
    cli.add_argument("--micro-tokens", type=natural, default=2048,
                     help="tokens a forward pass and process: memory, not mathematics")
    cli.add_argument("--gradient-checkpointing", action="store_true",
                     help="recompute each layer in backward: less memory, a third more work")
    cli.add_argument("--shard", action="store_true",
                     help="split weights, gradients and Adam over the processes (FSDP2)")
    cli.add_argument("--save-every", type=ranged(float, 0), default=10.0,
                     help="minutes between checkpoints to go on from after a kill; 0: none")
    return cli


def start(args: argparse.Namespace, constants: dict | None = None) -> None:
    """The head of every stage. Ends the program where `args.out` is complete, or where a model that
    it reads cannot be loaded.

    The value of a flag of READ may be a table of paths by name; `constants` are settings that no
    flag has. For `publish` it writes into `args`

        settings    all that decides the output: of what is read a fingerprint
        inputs      what is read, as the command line names it
        record      what stood at OUT
    """
    settings = dict(constants or {})
    inputs = {}
    for key, value in vars(args).items():
        # The model of an endpoint is a name, and nothing to read.
        is_name = key == "judge_model" and vars(args).get("judge") == "openai"
        if key in READ and value is not None and not is_name:
            table = value if isinstance(value, dict) else {"": value}
            if isinstance(value, dict):
                settings[key] = list(value)  # their order: the first answers are the baseline
            for name, path in table.items():
                flag = f"{key} {name}".strip()
                inputs[flag] = path
                settings[flag] = fingerprint(path, READ[key])
        elif key not in NOT_SETTINGS:
            settings[key] = value
    args.record = exit_if_complete(args.out, settings)
    args.settings, args.inputs = settings, inputs
    for key, path in inputs.items():
        if READ.get(key) == "model":
            check_model(path)
    # A reference reads another's tokens, and a base model has no chat template.
    if "model" in inputs:
        check_tokenizer(args.model)


def start_training(args: argparse.Namespace) -> None:
    """Ends the program where the policy is complete or training could not begin, as far as files
    show, or where LOOK=yes. The policy stays on the disk, checkpoints go again."""
    start(args, {"clip": CLIP})
    policy = policy_bytes(args.model)
    checkpoints = 0
    if args.save_every:
        # Weights and Adam's two moments, and a new one is whole before the last one goes.
        checkpoints = max(0, 6 * policy - size_of(f"{work_folder(args)}/checkpoint"))
    exit_if_looking(args.out, writes=policy, passing=checkpoints)


# --------------------------------------------------------------------------- whether there is work


def unfinished(out: str) -> str:
    """The folder that a stage works in: beside what a link leads to, where `out` is a link."""
    return f"{os.path.realpath(out)}.unfinished"


def work_folder(args: argparse.Namespace) -> str:
    """Where a stage keeps what it goes on from after a kill. It goes when the output stands; no
    other settings find it, and theirs is kept beside it."""
    return f"{unfinished(args.out)}/{digest_of(args.settings)}"


def digest_of(settings: dict) -> str:
    """Digest of a stage's settings."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def record_of(out: str) -> dict | None:
    """The stats of what stands at `out`, or would but for a kill; None where they are not ours."""
    for path in (f"{unfinished(out)}/stats.json", f"{out}.stats.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            dict(record["settings"])
            return record
    return None


def is_empty(out: str) -> bool:
    """Whether nothing stands at `out`, or an empty folder."""
    return not os.path.exists(out) or os.path.isdir(out) and not os.listdir(out)


def damage(out: str, record: dict) -> list[str]:
    """The files of `out` that are not as large as its record says, each with both sizes."""
    differences = []
    for name, size in record.get("files", {}).items():
        file = os.path.normpath(os.path.join(os.path.realpath(out), name))
        now = os.path.getsize(file) if os.path.isfile(file) else "missing"
        if now != size:
            differences.append(f"{os.path.basename(file)} {size} bytes → {now}")
    return differences


def refuse_foreign(out: str) -> None:
    """Ends the program where it would replace what it did not write."""
    foreign = []
    if record_of(out) is None:
        foreign += [f"{out}.stats.json"] if is_empty(out) else [out]
    work = unfinished(out)
    try:
        names = os.listdir(work)
    except FileNotFoundError:
        # Process 0 of this very stage may make it at any moment.
        names = []
    except NotADirectoryError:
        names = [work]
    if not all(name in UNFINISHED or fnmatch(name, DIGEST) for name in names):
        foreign.append(work)
    for path in foreign:
        if os.path.lexists(path):
            fail(f"{path}: is there, and {out}.stats.json does not say that this program wrote it. "
                 "It is not replaced: move it away, bring that file along, or name another --out "
                 "(RUN)")


def print_look(state: str, size: int) -> None:
    """The line of a stage that only looks: `size` in bytes."""
    print(state, size, sep="\t")


def exit_if_complete(out: str, settings: dict) -> dict | None:
    """Ends the program where `out` is complete from these very settings; else returns the record of
    what stands there, if that is ours.

    A complete output of other settings, or whose files have other sizes now, is never replaced
    unasked: what differs is named, and the program ends, unless REDO=yes is set. Nor is what this
    program did not write.
    """
    refuse_foreign(out)
    record = record_of(out)
    pending = os.path.exists(f"{unfinished(out)}/stats.json")
    if record is None or is_empty(out) and not pending:
        return record
    old = record["settings"]
    # What is not there yet counts as unchanged.
    changed = [f"{key} {old.get(key)!r} → {settings.get(key)!r}" for key in {**old, **settings}
               if settings.get(key) not in (old.get(key), ABSENT)]
    if not pending:
        changed += damage(out, record)
    if not changed:
        follows = pending or ABSENT in settings.values()
        if is_looking():
            print_look("follows" if follows else "complete", size_of(out))
            raise SystemExit(WORK if follows else 0)
        if RANK == 0 and os.path.exists(unfinished(out)):
            # What a kill left whole is put in place.
            hold(out)
            release()
        print(f"{out}: complete, skipped")
        raise SystemExit(0)
    if os.environ.get("REDO") != "yes":
        if is_looking():
            print_look("changed", size_of(out))
        fail(f"{out}: complete, but changed since it was written: {'; '.join(changed)}. REDO=yes "
             "replaces it and all that follows from it (before a stage's own command: REDO=yes "
             "python …); another --out (RUN) keeps both")
    if not is_looking():
        print(f"{out}: changed since it was written: {'; '.join(changed)}. Redoing.")
    return record


def exit_if_looking(out: str, writes: int = 0, passing: int = 0) -> None:
    """Ends the program where LOOK=yes: it has work, and it only looks. In any case `out` can be
    written, and there is room for it: `writes` bytes that stay, and `passing` that go again."""
    check_place(out)
    # What other stages write before it takes room too.
    ahead = [count for path, count in promises().items() if not os.path.exists(path)]
    needed = sum(ahead) + writes + passing
    free = shutil.disk_usage(standing_above(os.path.realpath(out))).free
    if needed > free:
        fail(f"{out}: needs {math.ceil(needed / 1e6):,} MB, with what comes before it; "
             f"{free // 10**6:,} MB are free there: make room, or name another --out (RUN)")
    if is_looking():
        print_look("to do" if is_empty(out) else "changed", writes)
        raise SystemExit(WORK)


def standing_above(path: str) -> str:
    """The nearest path above `path` where something stands."""
    path = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def check_place(out: str) -> None:
    """Ends the program where `out` cannot be written; nothing is left there."""
    if out.endswith(".gz") or os.path.basename(out) in ("", ".", ".."):
        fail(f"{out}: must be a folder or an unpacked file with a name of its own")
    for path in (out, os.path.realpath(out)):
        above = standing_above(path)
        if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
            fail(f"{out}: cannot be written: {above} is no folder that takes files")
    try:
        out.encode()
        # Raises where the name is too long.
        os.lstat(os.path.join(above, os.path.basename(unfinished(out))))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        fail(f"{out!a}: cannot be written: {error}")


# -------------------------------------------------------------------------------------- publishing


def hold(out: str) -> None:
    """Take the lock of `out`: this program alone works on it. What a kill left is put right: what
    was whole is put in place, the rest goes."""
    global lock
    if lock:
        return
    work = unfinished(out)
    busy = f"{out}: another program is writing it; wait until that has ended"
    os.makedirs(work, exist_ok=True)
    file = open(f"{work}/lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(busy)
    except OSError:
        # Some file systems have no locks.
        pass
    # Whoever held it may have taken it away in between.
    if os.fstat(file.fileno()).st_nlink == 0:
        fail(busy)
    lock = file
    if os.path.exists(f"{work}/stats.json"):
        put_in_place(out)
    for name in UNFINISHED - {"lock"}:
        remove(f"{work}/{name}")


def release() -> None:
    """Give the lock back, if this program holds one."""
    global lock
    if lock:
        # Not while something unfinished lies beside it.
        with contextlib.suppress(OSError):
            os.remove(lock.name)
            os.rmdir(os.path.dirname(lock.name))
        lock.close()
        lock = None


def publish(args: argparse.Namespace, stats: dict, write: Callable[[str], None]) -> None:
    """Put at `args.out` what `write(tmp)` writes, and beside it what that writes beside tmp; then
    OUT.stats.json: `stats`, and what `start` found out. Process 0 does it for all.

    A reader may find the old output, the new one or, for an instant, none: after a kill between the
    renames, the next stage that works on OUT goes on with them. What was there before is removed
    when the new output stands. Where that cannot be put in place, it stays in OUT.unfinished.
    """
    if RANK > 0:
        return
    out = args.out
    hold(out)
    work = unfinished(out)
    new, stats_file = f"{work}/new", f"{work}/stats.tmp"
    tmp = os.path.join(new, os.path.basename(os.path.realpath(out)))
    os.makedirs(new)
    try:
        write(tmp)
        files = {os.path.relpath(file, tmp): file.stat().st_size for file in files_of(new)}
        record = {**stats, "files": files, "about": about(args.inputs), "settings": args.settings}
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        # An argument that is not UTF-8 becomes the escape that JSON has for it.
        Path(stats_file).write_text(text, encoding="utf-8", errors="backslashreplace")
    except BaseException:
        remove(new)
        raise
    os.replace(stats_file, f"{work}/stats.json")
    put_in_place(out)
    release()


def put_in_place(out: str) -> None:
    """Rename what is whole in OUT.unfinished to its places, the stats last. A kill between two
    steps leaves what is needed to go on."""
    work = unfinished(out)
    try:
        for name in os.listdir(f"{work}/new"):
            new, old = f"{work}/new/{name}", f"{work}/old/{name}"
            place = os.path.join(os.path.dirname(work), name)
            # A file replaces a file at once.
            if os.path.isdir(place) or os.path.isdir(new) and os.path.lexists(place):
                os.makedirs(f"{work}/old", exist_ok=True)
                os.rename(place, old)
            os.replace(new, place)
        remove(f"{work}/{digest_of(record_of(out)['settings'])}")
        # On another disk than `out` where that is a link.
        shutil.move(f"{work}/stats.json", f"{out}.stats.json")
    except OSError as error:
        fail(f"{out}: cannot be put in place ({error.filename}: {error.strerror}). What was "
             f"computed is whole and stays in {work}: put that right, and the same command goes on")
    # What cannot be removed now, because somebody reads it, is removed by the next start.
    for name in ("new", "old"):
        shutil.rmtree(f"{work}/{name}", ignore_errors=True)


def about(inputs: dict[str, str]) -> dict:
    """How an output came about: for readers, and no reason to do anything again. Paths stand here
    by name; their fingerprints are in the settings."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    torch = sys.modules.get("torch")  # a stage that computes has loaded it
    gpu = torch is not None and torch.cuda.is_initialized()
    card = f", {torch.cuda.get_device_name()}" if gpu else ""
    return {"command": f"{program()} {shlex.join(sys.argv[1:])}",
            "commit": commit,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{card}",
            "processes": WORLD,
            "seconds": round(time.time() - STARTED, 1),
            "inputs": inputs}


# ----------------------------------------------------------------------------------------- running


def run_stage(main: Callable[..., None], *given: argparse.Namespace) -> None:
    """Run a stage with the arguments that `start` has seen, if it has any, alone at its output."""
    try:
        for args in given:
            if RANK == 0 and "record" in args:
                hold(args.out)
                if record_of(args.out) != args.record:
                    fail(f"{args.out}: another program has just written it; give the same command "
                         "again")
        main(*given)
    finally:
        release()
    if WORLD > 1:
        import torch.distributed as dist  # a stage on several processes has loaded it
        if dist.is_initialized():
            # all leave together: where one machine's processes leave while rank 0 still writes, the
            # others' rendezvous ends, and rank 0 with it
            dist.barrier()
        # gloo's threads can outlive the last collective and abort Python's teardown
        sys.stdout.flush()
        os._exit(0)

"""What a stage remembers of its inputs, what makes it work again, and how it publishes."""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, gpus_for, one_line, warm_python

from core import stage
from judges.flags import JUDGES
from judges.judge import RANKERS, SCORERS

STAGE = """
import argparse, os, signal, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from core.stage import *

def flags():
    cli = parser("A stage.")
    cli.add_argument("--pairs")
    cli.add_argument("--out", type=os.path.normpath)
    cli.add_argument("--lr", type=float, default=1.0)
    cli.add_argument("--writes", type=int, default=0)
    cli.add_argument("--busy", type=float, default=0)
    args = cli.parse_args()
    writes, busy = args.writes, args.busy
    del args.writes, args.busy
    start(args)
    exit_if_looking(args.out, writes=writes)
    args.busy = busy
    return args

def main(args):
    print("working", flush=True)
    time.sleep(args.busy)
    publish(args, {{}}, lambda tmp: Path(tmp).write_text(str(args.lr)) and None)

if __name__ == "__main__":
    run_stage(main, flags())
"""


@pytest.fixture
def program(tmp_path) -> str:
    """A stage that writes one file from one."""
    path = tmp_path / "stage.py"
    path.write_text(STAGE.format(root=str(ROOT)))
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    return str(path)


def start(*command, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
    )


def begun(out, settings=None) -> argparse.Namespace:
    """What `start` makes of the arguments of a stage that reads nothing."""
    return argparse.Namespace(out=str(out), settings=settings or {}, inputs={})


def publish(out, settings=None, text="new", folder=False) -> None:
    """An output with a picture beside it."""
    def write(tmp):
        if folder:
            os.mkdir(tmp)
            (Path(tmp) / "weights").write_text(text)
        else:
            Path(tmp).write_text(text)
        Path(f"{tmp}.png").write_text(text)

    stage.publish(begun(out, settings), {}, write)


def ends(capsys, out, settings=None) -> tuple[int | None, str]:
    """Status and text of exit_if_complete; the status is None where there is work."""
    try:
        stage.exit_if_complete(str(out), settings or {})
        status = None
    except SystemExit as end:
        status = end.code
    text = capsys.readouterr()
    assert status != 2 or text.err.count("\n") == 1
    return status, text.out + text.err


def listing(folder) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*"))


# ------------------------------------------------------------------------------------ settings


def test_settings_are_what_decides_the_output(tmp_path, monkeypatch):
    """The digests of what came in, a table's value by value and its order, but no places nor
    memory; in `about` stand the names and the command."""
    (pairs := tmp_path / "pairs.jsonl").write_text("{}")
    digest = stage.fingerprint(str(pairs))
    unused = {"base_url": "b", "micro_tokens": 1, "sample_tokens": 1, "shard": False,
              "save_every": 1.0, "gradient_checkpointing": False}
    args = argparse.Namespace(lr=1.0, pairs=str(pairs), answers={"mine": str(pairs)}, model=None,
                              out=str(tmp_path / "out"), **unused)
    stage.start(args, {"clip": 1.0})
    settings = {"lr": 1.0, "clip": 1.0, "pairs": digest, "answers": ["mine"],
                "answers mine": digest, "model": None}
    assert args.settings == settings
    monkeypatch.setattr("sys.argv", [f"{ROOT}/data/prepare.py", "--out", "a b"])
    stage.publish(args, {}, os.mkdir)
    stats = json.loads((tmp_path / "out.stats.json").read_text())
    about = stats["about"]
    assert about["inputs"] == {"pairs": str(pairs), "answers mine": str(pairs)}
    assert stats["settings"] == settings and about["command"] == "-m data.prepare --out 'a b'"


@pytest.mark.parametrize("command, other, same", [
    ("label --responses rows --judge vader", "--beta 2 --precision fp32 --judge-tokens 9", True),
    ("label --responses rows --judge vader --model rows", "--precision fp32", False),
    ("label --responses rows --model rows --reference none", "--beta 2", False),
    ("label --responses rows --judge openai --judge-model m", "--judge-tokens 9", False),
    ("evaluate --answers a=rows", "--precision fp32 --judge-tokens 9 --base-url x", True),
    ("seed_dpo --model rows --pairs rows --objective judge", "--beta 2", True),
    ("train --model rows --pairs rows --alpha 0", "--lam 2 --percentile 5", True),
    ("train --model rows --pairs rows --percentile 0", "--lam 2 --alpha 0.5", True),
    ("train --model rows --pairs rows", "--lam 2", False),
    ("data.prepare --data rows", "--max-new-tokens 5", True)])
def test_what_a_stage_does_not_use_redoes_nothing(tmp_path, monkeypatch, command, other, same):
    monkeypatch.chdir(tmp_path)
    Path("rows").write_text("{}")
    found = []
    monkeypatch.setattr(stage, "exit_if_complete",
                        lambda out, settings: found.append(settings) or sys.exit())
    for more in ("", other):
        monkeypatch.setattr(sys, "argv", f"{command} --out out {more}".split())
        with pytest.raises(SystemExit):
            importlib.import_module(sys.argv[0]).flags()
    assert (found[0] == found[1]) == same


# ------------------------------------------------------------------------- whether there is work


@pytest.mark.parametrize("harm, wrong", [
    ("out/weights", "weights 3 bytes → 1"), ("out/weights gone", "weights 3 bytes → missing"),
    ("out.png gone", "out.png 3 bytes → missing")])
def test_a_damaged_output_is_not_complete(tmp_path, monkeypatch, capsys, harm, wrong):
    monkeypatch.delenv("REDO", raising=False)
    out = tmp_path / "out"
    publish(out, folder=True)
    harmed = tmp_path / harm.removesuffix(" gone")
    harmed.write_text("n")
    if harm.endswith("gone"):
        harmed.rename(harmed.with_name("else"))
    status, text = ends(capsys, out)
    assert status == 2 and wrong in text
    monkeypatch.setenv("REDO", "yes")
    assert ends(capsys, out)[0] is None
    publish(out, folder=True)
    assert ends(capsys, out)[0] == 0


@pytest.mark.parametrize("name, stats", [
    ("out/raw.jsonl", None), ("out", ""), ("out", "[]"), ("out", '{"settings": null}'),
    ("out.stats.json", None), ("out.unfinished", None), ("out.unfinished/mine", None)])
def test_what_is_not_ours_is_never_replaced(tmp_path, capsys, name, stats):
    """Nor is anything written beside it, whatever temporary names of ours lie there."""
    (tmp_path / "out.stats.json.tmp").write_text('{"settings": {}}')
    if stats is not None:
        (tmp_path / "out.stats.json").write_text(stats)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    before = listing(tmp_path)
    status, text = ends(capsys, tmp_path / "out")
    assert status == 2 and "not replaced" in text
    assert file.read_text() == "mine" and listing(tmp_path) == before


def test_a_stage_that_only_looks_says_whether_it_has_work(tmp_path, program):
    out = tmp_path / "run" / "worst.jsonl"
    pairs = tmp_path / "pairs.jsonl"
    command = [program, "--pairs", pairs, "--out", out]

    def look(*more, **environment):
        before = listing(tmp_path)
        done = start(*command, *more, LOOK="yes", REDO=environment.pop("REDO", "no"), **environment)
        assert listing(tmp_path) == before and "Traceback" not in done.stderr
        return done

    seen = look("--writes", 5)
    assert (seen.returncode, seen.stdout) == (stage.WORK, "to do\t5\n")
    assert start(*command).returncode == 0 and out.exists()
    seen = look()
    assert (seen.returncode, seen.stdout) == (0, "complete\t3\n")
    seen = look(PROMISED=f"{tmp_path}\t7\n")
    assert (seen.returncode, seen.stdout) == (stage.WORK, "follows\t3\n")
    seen = look("--lr", 2)
    assert (seen.returncode, seen.stdout) == (2, "changed\t3\n")
    assert "lr 1.0 → 2.0" in seen.stderr
    seen = look("--lr", 2, "--writes", 5, REDO="yes")
    assert (seen.returncode, seen.stdout, seen.stderr) == (stage.WORK, "changed\t5\n", "")
    # An input that is to come is no mistake, another missing one is.
    pairs.unlink()
    assert look(PROMISED=f"{pairs}\t7").returncode == stage.WORK
    seen = look()
    assert seen.returncode == 2 and seen.stderr == f"error: {pairs}: no such file or folder\n"


def test_room_on_the_disk_is_looked_at_with_what_comes_before(tmp_path, program):
    free = shutil.disk_usage(tmp_path).free
    command = [program, "--out", tmp_path / "out", "--writes", free // 2]
    there = f"{tmp_path / 'pairs.jsonl'}\t{free}\n"
    assert start(*command, LOOK="yes", PROMISED=there).returncode == stage.WORK
    done = start(*command, LOOK="yes", PROMISED=f"{there}{tmp_path / 'seed'}\t{free * 3}\n")
    one_line(done, "make room")
    needed = float(re.search(r"needs (\S+) MB", done.stderr)[1].replace(",", ""))
    assert needed == pytest.approx(3.5 * free / 1e6, rel=0.01)


@pytest.mark.parametrize("out, words", [
    ("pairs.jsonl/seed", "pairs.jsonl is no folder"), ("new/rows.jsonl.gz", "unpacked"),
    (".", "name of its own"), ("new/" + 250 * "x", "too long"),
    ("new/" + os.fsdecode(b"\xff"), "surrogates not allowed")])
def test_a_place_that_takes_no_output_is_refused_before_any_work(tmp_path, program, out, words):
    (tmp_path / "empty").mkdir()
    before = listing(tmp_path)
    cwd = tmp_path / "empty" if out == "." else tmp_path
    one_line(start(program, "--out", out, cwd=cwd, LOOK="yes"), words)
    assert listing(tmp_path) == before


# ---------------------------------------------------------------------------------- publishing


CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.move"}


@pytest.mark.parametrize("folder", [False, True])
def test_a_kill_at_any_step_of_publishing_loses_nothing(tmp_path, monkeypatch, capsys, folder):
    """SIGKILL before each call that may change the disk: the old output stands, or the next start
    has the new one in its place, each with the picture beside it; its own work alone is gone."""
    monkeypatch.delenv("REDO", raising=False)
    outcomes = []
    finished = False
    while not finished:
        place = tmp_path / str(len(outcomes))
        place.mkdir()
        out = place / "out"
        publish(out, {"lr": 1}, "old", folder)
        work = Path(stage.work_folder(begun(out, {"lr": 2})))
        other = work.with_name(16 * "0")
        for folder_of_work in (work, other):
            folder_of_work.mkdir(parents=True)
            (folder_of_work / "checkpoint").touch()
        if not (pid := os.fork()):
            steps = iter(range(len(outcomes)))

            def kill(event, given, steps=steps):
                if event in CHANGES and next(steps, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(kill)
            publish(out, {"lr": 2}, "new", folder)
            os.kill(os.getpid(), signal.SIGTERM)
        finished = os.waitpid(pid, 0)[1] == signal.SIGTERM
        status, text = ends(capsys, out, {"lr": 2})
        if status:
            assert "lr 1 → 2" in text and "REDO=yes" in text
            assert ends(capsys, out, {"lr": 1})[0] == 0
        content = (out / "weights" if folder else out).read_text()
        assert content == (place / "out.png").read_text() == ("old" if status else "new")
        outcomes.append(status)
        left = {"out", "out.stats.json", "out.png", "out.unfinished"}
        assert {path.name for path in place.iterdir()} == left
        assert set(work.parent.iterdir()) == ({work, other} if status else {other})
    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes.count(2) > 5 and outcomes.count(0) > 5


def test_what_cannot_be_put_in_place_stays_and_is_put_there_later(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    publish(out, {"lr": 1}, "old", folder=True)
    real = os.replace

    def refuse(source, target):
        if target == str(out):
            raise OSError(39, "Directory not empty", target)
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", refuse)
        publish(out, {"lr": 2}, "new", folder=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert "Directory not empty" in line and str(tmp_path / "out.unfinished") in line
    stage.release()
    for look, status in (("yes", stage.WORK), ("no", 0)):
        monkeypatch.setenv("LOOK", look)
        assert ends(capsys, out, {"lr": 2})[0] == status
    assert listing(tmp_path) == ["out", "out.png", "out.stats.json", "out/weights"]
    assert (out / "weights").read_text() == "new"


def test_a_link_stays_one_and_a_slash_changes_nothing(tmp_path, program):
    big = tmp_path / "big"
    big.mkdir()
    (tmp_path / "out").symlink_to(big / "rows")
    command = [program, "--pairs", tmp_path / "pairs.jsonl"]
    assert start(*command, "--out", tmp_path / "out").returncode == 0
    assert (tmp_path / "out").is_symlink() and listing(big) == ["rows"]
    done = start(*command, "--out", f"{tmp_path / 'out'}/")
    assert done.returncode == 0 and "complete, skipped" in done.stdout


def test_two_programs_never_write_one_output(tmp_path, program):
    out = tmp_path / "out"
    command = [sys.executable, program, "--out", out]
    first = subprocess.Popen([*command, "--busy", "60"], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "working\n"
    one_line(start(*command[1:]), "another program is writing it")
    assert start(*command[1:], LOOK="yes").returncode == stage.WORK
    first.kill()
    first.wait()
    first.stdout.close()
    assert start(*command[1:]).returncode == 0
    assert listing(tmp_path) == ["out", "out.stats.json", "pairs.jsonl", "stage.py"]


def test_who_finds_the_output_written_since_the_look_does_no_work(tmp_path, capsys):
    out = tmp_path / "out"
    args = argparse.Namespace(out=str(out))
    stage.start(args)
    other = ("import argparse, sys, core.stage as stage\n"
             "args = argparse.Namespace(out=sys.argv[1])\n"
             "stage.start(args)\n"
             "stage.publish(args, {}, lambda tmp: open(tmp, 'w'))")
    assert start("-c", other, out).returncode == 0
    with pytest.raises(SystemExit) as end:
        stage.run_stage(lambda args: publish(out), args)
    assert end.value.code == 2 and "has just written it" in capsys.readouterr().err
    assert out.read_text() == ""


# ------------------------------------------------------------------------------------- running


def test_no_process_leaves_before_process_0_has_published(tmp_path):
    """Else their machine ends, and some minutes later process 0 with it."""
    program = tmp_path / "slow.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import time\n"
        "from pathlib import Path\n"
        "from core import RANK\n"
        "from core.parallel import start_processes\n"
        "from core.stage import run_stage\n"
        "def main():\n"
        "    start_processes()\n"
        "    if RANK == 0:\n"
        "        time.sleep(1)\n"
        "        Path(sys.argv[1]).touch()\n"
        "run_stage(main)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    meet |= gpus_for(2)
    out = tmp_path / "out"
    both = [
        subprocess.Popen(
            [warm_python(), program, out], env=os.environ | meet | {"RANK": rank}, cwd=ROOT
        )
        for rank in ("0", "1")
    ]
    assert both[1].wait(60) == 0 and out.exists()
    assert both[0].wait(60) == 0


def test_a_terminal_that_is_not_utf_8_ends_no_stage(tmp_path, program):
    """Nor does a C locale, with an output whose name is not ASCII."""
    out = tmp_path / "läufe" / "π"
    for environment in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}):
        done = start(program, "--out", out, **environment)
        assert done.returncode == 0 and out.exists(), done.stderr
    assert "complete, skipped" in done.stdout and "\\u03c0" in done.stdout


def test_stopping_a_stage_that_still_loads_its_libraries_is_one_line(tmp_path, program):
    (tmp_path / "json.py").write_text("import time; print('loading', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, program, "--out", tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever starts the tests in the background may have it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "stopped; the same command goes on\n"
    assert process.returncode == 130


@pytest.mark.parametrize("package", ["numpy", "torch"])
def test_a_missing_package_is_one_line(package):
    """Another program's Python has none of them."""
    code = f"import sys; sys.modules[{package!r}] = None\nimport core.rows, torch"
    one_line(start("-c", code), package, "source .venv/bin/activate")
    one_line(start("-c", "import core; open('none')"), "none: No such file or directory")


@pytest.mark.parametrize("code", ["torch.empty(10 ** 15)", "numpy.empty(10 ** 15)"])
def test_a_lack_of_memory_is_one_line(code):
    one_line(start("-c", f"import core, numpy, torch; {code}"), "out of memory; lower --micro")


PROGRAMS = ["seed_dpo.py", "generate.py", "label.py", "dro.py", "train.py", "evaluate.py"]
MODULES = ["data.prepare", "data.demo", "data.tiny", "data.system_turn"]


@pytest.mark.parametrize("program", PROGRAMS + MODULES)
def test_flags_are_read_before_anything_heavy_is_loaded(program):
    module = program.removesuffix(".py")
    code = (
        "import atexit, runpy, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'scipy', 'matplotlib', 'huggingface_hub'}\n"
        "atexit.register(lambda: print('LOADED', *sorted(heavy & set(sys.modules))))\n"
        f"sys.argv = [{program!r}, '--help']\n"
        f"runpy.run_module({module!r}, run_name='__main__')\n"
    )
    done = start("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage") and done.stdout.splitlines()[-1] == "LOADED"
    assert "python " in done.stdout and "--out" in done.stdout


def test_the_judges_of_the_flags_are_those_there_are():
    assert sorted(JUDGES) == sorted([*SCORERS, *RANKERS])

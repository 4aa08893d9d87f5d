"""What a stage remembers of its inputs, and what makes it work again."""

import argparse
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import huggingface_hub
import pytest
from conftest import ROOT, dump, gold_rows, gpus_for, run, warm_python

from core import rows, stage
from core.models import check_path
from judges.flags import JUDGES
from judges.judge import RANKERS, SCORERS


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_bytes(b"abc")
    (folder / "deep/config").write_bytes(b"def")
    return folder


def test_a_copy_or_a_touch_is_the_same_content(model, tmp_path):
    digest = stage.fingerprint(str(model))
    shutil.copytree(model, tmp_path / "copy")
    os.utime(model / "weights", (1, 1))
    (model / "log.jsonl").write_text("times")
    (model / ".cache").mkdir()  # what a download leaves
    (model / ".cache/weights.metadata").write_text("times")
    assert stage.fingerprint(str(model)) == stage.fingerprint(f"{tmp_path / 'copy'}/") == digest
    (tmp_path / "copy/weights").write_bytes(b"abd")
    assert stage.fingerprint(str(tmp_path / "copy")) != digest
    (model / "weights").rename(model / "weight")
    assert stage.fingerprint(str(model)) != digest


def test_a_digest_is_computed_once(model, monkeypatch):
    digest = stage.fingerprint(str(model))
    kept = model.parent / "model.digest.json"
    assert json.loads(kept.read_text())["digest"] == digest
    monkeypatch.setattr(stage, "digest_of", None)  # nobody may read the files again
    assert stage.fingerprint(str(model)) == digest


def test_a_broken_digest_is_computed_again_and_kept_elsewhere(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = stage.fingerprint(str(model))
    kept = model.parent / "model.digest.json"
    kept.write_text("{")
    assert stage.fingerprint(str(model)) == digest
    assert not (tmp_path / "cache").exists()
    kept.unlink()
    kept.mkdir()  # no file can be put there
    assert stage.fingerprint(str(model)) == digest
    assert not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(stage, "digest_of", None)  # nobody may read the files again
    assert stage.fingerprint(str(model)) == digest


def test_a_hub_id_is_its_commit(tmp_path, monkeypatch):
    """As the cache knows it, without asking the hub."""
    digests = set()
    for commit in ("abc", "abd", "abc"):
        config = f"/cache/models--some--model/snapshots/{commit}/config.json"
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: config)
        digests.add(stage.fingerprint("some/model"))
    assert len(digests) == 2
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", None)  # for hub ids alone
    assert stage.fingerprint("gpt-4o") != stage.fingerprint("./some/model")


def test_an_unreachable_hub_is_one_line_in_seconds(tmp_path, monkeypatch, capfd):
    """Port 9 refuses; left alone, transformers asks it 18 times, with pauses, in 100 seconds."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    stage.hub_trouble.cache_clear()
    pairs = dump(tmp_path / "pairs.jsonl", gold_rows(1))
    for slow in ("datasets", "seed_dpo", "data.prepare"):
        importlib.import_module(slow)
    started = time.monotonic()
    for name, command in {
        "no-such/model": ["seed_dpo.py", "--pairs", pairs, "--model"],
        "no-such/data": ["data/prepare.py", "--data"],
    }.items():
        done = run(*command, name, "--out", tmp_path / "out")
        assert done.returncode == 2 and done.stderr.startswith(f"error: {name}: ")
        assert done.stderr.count("\n") == 1
        for word in ("http://127.0.0.1:9", "Connection refused", "HF_ENDPOINT", "local path"):
            assert word in done.stderr
    assert time.monotonic() - started < 5 and not any(capfd.readouterr())
    # What was downloaded before goes on, without asking again.
    assert huggingface_hub.is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "1"
    cached = "/cache/models--some--model/snapshots/abc/config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: cached)
    check_path("some/model")
    stage.hub_trouble.cache_clear()


def test_memory_decides_no_output(tmp_path):
    args = argparse.Namespace(
        lr=1.0, out="o", micro_tokens=1, shard=False, gradient_checkpointing=False, save_every=1.0
    )
    settings = stage.settings_of(args)
    assert settings == {"lr": 1.0}
    out = tmp_path / "out"
    stage.publish(
        str(out),
        settings | {"micro_tokens": 5},
        {},
        lambda tmp: out.with_suffix(".tmp").write_text("x") and None,
    )
    assert stage.is_done(str(out), settings) and not stage.is_done(str(out), settings | {"lr": 2.0})


def test_a_complete_stage_is_never_replaced_unasked(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert not stage.is_done(str(out), {"lr": 1.0})  # nothing there yet
    stage.publish(
        str(out), {"lr": 1.0}, {}, lambda tmp: out.with_suffix(".tmp").write_text("x") and None
    )
    assert stage.is_done(str(out), {"lr": 1.0})
    monkeypatch.delenv("REDO", raising=False)
    with pytest.raises(SystemExit) as stop:
        stage.is_done(str(out), {"lr": 2.0})
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and "lr 1.0 → 2.0" in error
    monkeypatch.setenv("REDO", "yes")
    assert not stage.is_done(str(out), {"lr": 2.0}) and out.read_text() == "x"


def test_what_came_in_stands_by_name_beside_its_digest(tmp_path, monkeypatch):
    """In `about`, with the card where there is one; settings, which decide, have the digest
    alone."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("{}")
    out = tmp_path / "out"
    args = argparse.Namespace(lr=1.0, pairs=str(pairs), model=None, out=str(out))
    settings = stage.settings_of(args, "pairs", "model")
    assert settings == {"lr": 1.0, "pairs": stage.fingerprint(str(pairs)), "model": None}
    cuda = argparse.Namespace(is_initialized=lambda: True, get_device_name=lambda: "a card")
    monkeypatch.setitem(sys.modules, "torch", argparse.Namespace(cuda=cuda))
    inputs = stage.inputs_of(args, settings)
    stage.publish(str(out), settings, {}, lambda tmp: os.mkdir(tmp), inputs)
    for argv, command in (
        (["/x/train.py", "--out", "a b"], "train.py --out 'a b'"),
        (["/x/data/prepare.py", "--rounds"], "-m data.prepare --rounds"),
    ):
        monkeypatch.setattr("sys.argv", argv)
        assert stage.about({})["command"] == command
    stats = json.loads((tmp_path / "out.stats.json").read_text())
    assert stats["about"]["inputs"] == {"pairs": str(pairs)} and stats["settings"] == settings
    assert stats["about"]["machine"].endswith(" cores, a card")


def test_no_process_leaves_before_process_0_has_published(tmp_path):
    """Else their machine ends, and some minutes later process 0 with it."""
    program = tmp_path / "slow.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import time\n"
        "from pathlib import Path\n"
        "from core.parallel import start_processes\n"
        "from core.stage import run_stage\n"
        "def main():\n"
        "    if start_processes()[0] == 0:\n"
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


PROGRAMS = ["seed_dpo.py", "generate.py", "label.py", "dro.py", "train.py", "evaluate.py"]
MODULES = ["data.prepare", "data.demo", "data.tiny", "data.system_turn", "judges.comparisons"]


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
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage") and done.stdout.splitlines()[-1] == "LOADED"


def test_the_judges_of_the_flags_are_those_there_are():
    assert sorted(JUDGES) == sorted([*SCORERS, *RANKERS])


def look(*command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "LOOK": "yes", **environment},
    )


def test_a_stage_that_only_looks_says_whether_it_has_work(tmp_path):
    rows = '{"id": "a", "prompt": [{"role": "user", "content": "x"}], "chosen": "y"'
    rows += ', "rejected": "z", "margin": 0.5, "chosen_logp": -1.0, "rejected_logp": -2.0}\n'
    (tmp_path / "pairs.jsonl").write_text(rows)
    out = tmp_path / "worst.jsonl"
    command = ["dro.py", "--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(out)]
    seen = look(*command)
    assert (seen.returncode, seen.stdout, seen.stderr) == (stage.WORK, "", "")
    assert not out.exists()
    assert look(*command, LOOK="no").returncode == 0 and out.exists()
    seen = look(*command)
    assert seen.returncode == 0 and "complete, skipped" in seen.stdout
    # what an earlier stage has yet to write is no difference
    (tmp_path / "pairs.jsonl").unlink()
    assert look(*command).returncode == 0
    seen = look(*command, "--epsilon", "0.1", REDO="no")
    assert seen.returncode == 2 and "epsilon 0.01 → 0.1" in seen.stderr
    seen = look(*command, "--epsilon", "0.1", REDO="yes")
    assert seen.returncode == stage.WORK and "Redoing" in seen.stdout
    assert look(*command, "--epsilon", "-1").returncode == 2


def test_openmp_waits_without_spinning():
    code = "import os, core.stage; print(os.environ['OMP_WAIT_POLICY'])"
    for given, found in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        plain = {key: text for key, text in os.environ.items() if key != "OMP_WAIT_POLICY"}
        env = plain | given
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env
        )
        assert done.stdout.strip() == found


def test_what_is_not_ours_is_never_replaced(tmp_path, capsys):
    """A folder, a file or a broken stats file that this program did not finish; but what a kill
    between the two renames left is done again."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/raw.jsonl").write_text("{}\n")
    out = str(tmp_path / "data")
    for text in (None, "", "[]", '{"settings": null}'):
        if text is not None:
            (tmp_path / "data.stats.json").write_text(text)
        with pytest.raises(SystemExit) as end:
            stage.is_done(out, {})
        assert end.value.code == 2 and "not replaced" in capsys.readouterr().err
    assert (tmp_path / "data/raw.jsonl").exists()
    (tmp_path / "data.stats.json.tmp").write_text("{}")
    assert not stage.is_done(out, {}) and not stage.is_done(str(tmp_path / "none"), {})


def test_an_unpacked_and_a_broken_gzip(tmp_path):
    """Rows come out of a whole one; one whose bytes are wrong is refused like one that is cut."""
    import gzip

    packed = gzip.compress(b'{"id": "a", "prompt": [{"role": "user", "content": "x"}]}\n' * 50)
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(packed[:30] + bytes(9) + packed[39:])
    with pytest.raises(SystemExit) as end:
        list(rows.read_json_lines(str(path)))
    assert end.value.code == 2
    path.write_bytes(packed)
    assert len(list(rows.read_json_lines(str(path)))) == 50

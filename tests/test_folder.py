"""What a path or hub id is, without loading it."""

import argparse
import importlib
import json
import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import dump, gold_rows, run
from safetensors.torch import load_file, save_file

from core import folder, stage

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def model(tmp_path):
    """A model's files, as small as they can be."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT}))
    weights = {name: torch.randn(200, 300) for name in ("a", "b")}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def refused(capsys, check, path) -> str:
    with pytest.raises(SystemExit) as end:
        check(str(path))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return error


# --------------------------------------------------------------------------------- fingerprints


def test_a_copy_or_a_touch_is_the_same_content(model, tmp_path):
    digest = folder.fingerprint(str(model))
    shutil.copytree(model, tmp_path / "copy")
    os.utime(model / "config.json", (1, 1))
    (model / "log.jsonl").write_text("times")
    (model / ".cache").mkdir()  # what a download leaves
    (model / ".cache/weights.metadata").write_text("times")
    assert folder.fingerprint(str(model)) == folder.fingerprint(f"{tmp_path / 'copy'}/") == digest
    assert sorted(os.listdir(tmp_path)) == ["copy", "model"]
    (tmp_path / "copy/config.json").write_text("[]")
    assert folder.fingerprint(str(tmp_path / "copy")) != digest
    (model / "config.json").rename(model / "config")
    assert folder.fingerprint(str(model)) != digest


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_step_of_an_optimizer_is_seen(model, name):
    """At a learning rate of 1e-7, in one tensor; so is another header over the same bytes."""
    digest = folder.fingerprint(str(model))
    weights = load_file(model / "model.safetensors")
    weight = torch.nn.Parameter(weights[name])
    weight.grad = torch.randn_like(weight)
    torch.optim.AdamW([weight], lr=1e-7).step()
    save_file(weights | {name: weight.detach()}, model / "model.safetensors", {"format": "pt"})
    assert folder.fingerprint(str(model)) != digest


def test_the_header_and_the_size_are_a_part_of_the_content(model):
    digest = folder.fingerprint(str(model))
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data.replace(b'"a"', b'"c"'))
    assert folder.fingerprint(str(model)) != digest
    (model / "model.safetensors").write_bytes(data[:-1])
    assert folder.fingerprint(str(model)) != digest


def test_rows_edited_at_equal_length_are_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(3_000_000 * "a" + "b")
    digest = folder.fingerprint(str(path))
    path.write_text(3_000_000 * "a" + "c")
    assert folder.fingerprint(str(path)) != digest


def test_a_large_folder_takes_no_time(tmp_path):
    save_file({str(i): torch.zeros(500_000) for i in range(270)}, tmp_path / "model.safetensors")
    assert os.path.getsize(tmp_path / "model.safetensors") > 540e6
    times = []
    for _ in range(5):
        started = time.process_time()
        folder.fingerprint(str(tmp_path))
        times.append(time.process_time() - started)
    assert min(times) < 0.05
    shutil.rmtree(tmp_path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, empty, and a hub that may not be asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "hub_trouble", lambda: "asked")
    folder.hub_info.cache_clear()
    return tmp_path / "cache"


def keep(cache, name: str, commit: str, source=None) -> None:
    """Put a hub id into the cache."""
    place = cache / name.replace("/", "--")
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs/main").write_text(commit)
    if source:
        shutil.copytree(source, place / "snapshots" / commit)


def test_a_hub_id_is_its_commit(cache, monkeypatch):
    """As the cache knows it, without asking the hub; of data sets too."""
    monkeypatch.setattr(folder, "hub_trouble", None)
    for kind in ("model", "dataset"):
        for commit in ("abc", "abd"):
            keep(cache, f"{kind}s--some/thing", commit)
            assert folder.fingerprint("some/thing", kind) == f"some/thing@{commit}"


def test_only_looking_asks_the_hub_for_no_commit(cache, monkeypatch):
    asked = []

    class Hub:
        def repo_info(self, name, repo_type, timeout):
            asked.append((name, repo_type))
            return huggingface_hub.hf_api.DatasetInfo(id=name, sha="abc", tags=[], downloads=0,
                                                      likes=0, private=False, disabled=False)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(folder, "hub_trouble", lambda: "")
    monkeypatch.setenv("LOOK", "yes")
    assert folder.fingerprint("some/data", "dataset") == folder.ABSENT and not asked
    monkeypatch.setenv("LOOK", "no")
    assert folder.fingerprint("some/data", "dataset") == "some/data@abc"
    assert asked == [("some/data", "dataset")]


def test_a_missing_input_is_an_error_but_for_what_is_promised(cache, tmp_path, monkeypatch, capsys):
    for path in ("a/b.jsonl", str(tmp_path / "none")):
        refused(capsys, lambda path: folder.fingerprint(path, "file"), path)
    assert "no such file" in refused(capsys, folder.fingerprint, tmp_path / "none")
    monkeypatch.setenv("PROMISED", f"{tmp_path}/none\t8\nruns/x\t9\n")
    for path in (f"{tmp_path}/none", "runs/x/", "./runs/x/a"):
        assert folder.fingerprint(path) == folder.ABSENT
        folder.check_model(path)
        folder.check_tokenizer(path)
    assert folder.policy_bytes("runs/x/") == 9
    refused(capsys, folder.fingerprint, "runs/x2/a")


# --------------------------------------------------------------------------------------- models


def test_a_whole_model_is_one(model, cache, capsys):
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    keep(cache, "models--some/model", "abc", model)
    for path in (str(model), f"{model}/", "some/model"):
        folder.check_model(path)
        folder.check_tokenizer(path)
        assert folder.parameters(path) == 120_000
        assert folder.policy_bytes(path) == 480_000
    assert not any(capsys.readouterr())
    (model / "adapter_config.json").write_text("{}")
    folder.check_model(str(model))
    assert capsys.readouterr().err == f"note: {model}: the adapter beside the weights is not used\n"


def test_checkpoints_take_room_while_a_model_is_trained(model, tmp_path, monkeypatch):
    """Those that there are take no more of it."""
    given = dict(model=str(model), pairs=None, out=str(tmp_path / "out"), save_every=1)
    args = argparse.Namespace(**given)
    seen = []
    monkeypatch.setattr(stage, "exit_if_looking", lambda out, **bytes: seen.append(bytes))
    stage.start_training(args)
    work = Path(stage.work_folder(args))
    work.mkdir(parents=True)
    (work / "checkpoint").write_bytes(bytes(1000))
    stage.start_training(argparse.Namespace(**given))
    assert [each["writes"] for each in seen] == [480_000] * 2
    assert [each["passing"] for each in seen] == [24 * 120_000, 24 * 120_000 - 1000]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    "files, words",
    [
        ({"model.safetensors": POINTER}, "git lfs pull"),
        ({"model.safetensors": "{}"}, "cut short or broken"),
        ({"config.json": None}, "config.json"),
        ({"config.json": "{"}, "cut short or broken"),
        ({"model.safetensors": None}, "weights (*.safetensors)"),
        ({"model.safetensors": None, "pytorch_model.bin": "x"}, "convert"),
        ({"model.safetensors": None, "model-q4.gguf": "x"}, "GGUF"),
        ({"model.safetensors": None, "config.json": None, "adapter_model.safetensors": "x",
          "adapter_config.json": "{}"}, "merge"),
    ],
)
def test_what_is_no_model_is_one_line_with_the_remedy(model, capsys, files, words):
    for name, text in files.items():
        (model / name).unlink() if text is None else (model / name).write_text(text)
    assert words in refused(capsys, folder.check_model, model)


def test_a_file_or_nothing_is_no_model(cache, tmp_path, capsys):
    (tmp_path / "m.gguf").write_text("GGUF")
    assert "GGUF" in refused(capsys, folder.check_model, tmp_path / "m.gguf")
    assert "no such model folder" in refused(capsys, folder.check_model, tmp_path / "none")
    assert "asked" in refused(capsys, folder.check_model, "some/model")


@pytest.mark.parametrize(
    "files, words",
    [
        ({"tokenizer.json": None, "tokenizer_config.json": None}, "no tokenizer"),
        ({"tokenizer.json": POINTER}, "git lfs pull"),
        ({"tokenizer_config.json": POINTER, "chat_template.jinja": "x"}, "git lfs pull"),
        ({"tokenizer.json": None, "tokenizer.model": POINTER}, "git lfs pull"),
        ({"chat_template.jinja": ""}, "no chat template"),
        ({"tokenizer_config.json": None}, "no chat template"),
        ({"tokenizer_config.json": "{}"}, "no chat template"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": ""}]}'},
         "none of them is the default"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "default", "template": "x"}]}'},
         None),
    ],
)
def test_a_tokenizer_needs_a_template(model, capsys, files, words):
    for name, text in files.items():
        (model / name).unlink() if text is None else (model / name).write_text(text)
    if words is None:
        folder.check_tokenizer(str(model))
    else:
        assert words in refused(capsys, folder.check_tokenizer, model)


def test_an_unreachable_hub_is_one_line_in_seconds(tmp_path, monkeypatch, capfd):
    """Port 9 refuses; left alone, transformers asks it 18 times, with pauses, in 100 seconds."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder.hub_trouble.cache_clear()
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
    folder.hub_trouble.cache_clear()

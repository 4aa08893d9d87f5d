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
from conftest import dump, gold_rows, one_line, refused, run
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


def step_of_an_optimizer(path: Path) -> None:
    weights = load_file(path)
    weight = torch.nn.Parameter(weights["b"])
    weight.grad = torch.randn_like(weight)
    torch.optim.AdamW([weight], lr=1e-7).step()
    save_file(weights | {"b": weight.detach()}, path, {"format": "pt"})


@pytest.mark.parametrize("name, change", [
    ("config.json", lambda path: path.write_text("[]")),
    ("config.json", lambda path: path.rename(path.with_name("config"))),
    ("rows.jsonl", lambda path: path.write_text(3_000_000 * "a" + "c")),  # at equal length
    ("model.safetensors", step_of_an_optimizer),
    ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    ("model.safetensors", lambda path: path.write_bytes(
        path.read_bytes().replace(b'"a"', b'"c"')))])  # another header over the same bytes
def test_a_change_is_seen(model, name, change):
    (model / "rows.jsonl").write_text(3_000_000 * "a" + "b")
    place = str(model / name if name == "rows.jsonl" else model)
    digest = folder.fingerprint(place)
    change(model / name)
    assert folder.fingerprint(place) != digest


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

    def repo_info(name, repo_type, timeout):
        asked.append((name, repo_type))
        return argparse.Namespace(sha="abc")

    hub = argparse.Namespace(repo_info=repo_info)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(folder, "hub_trouble", lambda: "")
    monkeypatch.setenv("LOOK", "yes")
    assert folder.fingerprint("some/data", "dataset") == folder.ABSENT and not asked
    monkeypatch.setenv("LOOK", "no")
    assert folder.fingerprint("some/data", "dataset") == "some/data@abc"
    assert asked == [("some/data", "dataset")]


def test_a_missing_input_is_an_error_but_for_what_is_promised(cache, tmp_path, monkeypatch, capsys):
    refused(capsys, folder.fingerprint, "a/b.jsonl", "file")
    assert "no such file" in refused(capsys, folder.fingerprint, f"{tmp_path}/none")
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


NAMED = '{"chat_template": [{"name": "%s", "template": "x"}]}'


@pytest.mark.parametrize("check, files, words", [
    ("model", {"model.safetensors": POINTER}, "git lfs pull"),
    ("model", {"model.safetensors": "{}"}, "cut short or broken"),
    ("model", {"config.json": None}, "config.json"),
    ("model", {"config.json": "{"}, "cut short or broken"),
    ("model", {"model.safetensors": None}, "weights (*.safetensors)"),
    ("model", {"model.safetensors": None, "pytorch_model.bin": "x"}, "convert"),
    ("model", {"model.safetensors": None, "model-q4.gguf": "x"}, "GGUF"),
    ("model", {"model.safetensors": None, "config.json": None, "adapter_model.safetensors": "x",
               "adapter_config.json": "{}"}, "merge"),
    ("tokenizer", {"tokenizer.json": None, "tokenizer_config.json": None}, "no tokenizer"),
    ("tokenizer", {"tokenizer.json": POINTER}, "git lfs pull"),
    ("tokenizer", {"tokenizer.json": None, "tokenizer.model": POINTER}, "git lfs pull"),
    ("tokenizer", {"chat_template.jinja": ""}, "no chat template"),
    ("tokenizer", {"tokenizer_config.json": "{}"}, "no chat template"),
    ("tokenizer", {"chat_template.jinja": "{% if x %}"}, "cannot be parsed"),
    ("tokenizer", {"tokenizer_config.json": NAMED % "rag"}, "none of them is the default"),
    ("tokenizer", {"tokenizer_config.json": NAMED % "default"}, None),
    ("tokenizer", {"chat_template.jinja": "{% for x in y %}{% generation %}{%- endgeneration -%}"
                   "{% break %}{% endfor %}"}, None)])
def test_what_is_no_model_is_one_line_with_the_remedy(model, capsys, check, files, words):
    for name, text in files.items():
        (model / name).unlink() if text is None else (model / name).write_text(text)
    look = {"model": folder.check_model, "tokenizer": folder.check_tokenizer}[check]
    if words is None:
        look(str(model))
    else:
        assert words in refused(capsys, look, str(model))


def test_a_file_or_nothing_is_no_model(cache, model, capsys):
    for path, words in (("config.json", "config.json"), ("a.gguf", "no such model")):
        assert words in refused(capsys, folder.check_model, str(model / path))
    assert "asked" in refused(capsys, folder.check_model, "some/model")


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
        one_line(run(*command, name, "--out", tmp_path / "out"), f"error: {name}: ",
                 "http://127.0.0.1:9", "Connection refused", "HF_ENDPOINT", "local path")
    assert time.monotonic() - started < 5 and not any(capfd.readouterr())
    # What was downloaded before goes on, without asking again.
    assert huggingface_hub.is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "1"
    folder.hub_trouble.cache_clear()

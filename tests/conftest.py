"""A tiny random model with a real tokenizer and chat template, in the layout of any Hugging Face
folder."""

import atexit
import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported: no test waits for a hub

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from families import tiny_config, tiny_model, tokenizer_of

from core import end_in_one_line
from core.sampling import draw
from core.stage import run_stage
from data.tiny import PROMPTS as CORPUS
from data.tiny import make_tokenizer

torch.set_num_threads(1)  # two workers share two cores
os.environ["REDO"] = "yes"  # most tests write over what they wrote; one tests the refusal


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also what takes long: pytest --slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --slow alone")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="--slow"))


def small_model() -> transformers.PreTrainedModel:
    """A policy whose context is 256 tokens."""
    return tiny_model("llama", tie_word_embeddings=True, max_position_embeddings=256)


def saved(path, *parts) -> str:
    """The folder of a model and its tokenizer."""
    for part in parts:
        part.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer) -> str:
    return saved(tmp_path_factory.mktemp("tiny"), small_model(), tokenizer)


@pytest.fixture(scope="session", params=["bytes", "sentencepiece"])
def any_tokenizer(request):
    """Each kind of tokenizer: a test of tokens runs with both."""
    return tokenizer_of(request.param)


@pytest.fixture(scope="session")
def any_folder(tmp_path_factory, any_tokenizer) -> str:
    """The tiny model with each kind of tokenizer."""
    return saved(tmp_path_factory.mktemp("any"), small_model(), any_tokenizer)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory, tokenizer) -> str:
    """A second policy: the same weights, moved a little."""
    model = small_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return saved(tmp_path_factory.mktemp("other"), model, tokenizer)


@pytest.fixture(scope="session")
def wide(tmp_path_factory, tokenizer) -> str:
    """A model whose context takes a judge's prompt."""
    return saved(tmp_path_factory.mktemp("wide"), tiny_model("llama"), tokenizer)


@pytest.fixture(scope="session")
def ranker(tmp_path_factory, tokenizer) -> str:
    """A random reward model: one logit from the last token."""
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(tiny_config("llama", num_labels=1))
    return saved(tmp_path_factory.mktemp("ranker"), model, tokenizer)


def run(script: str, *flags, processes: int = 1) -> subprocess.CompletedProcess:
    """A stage by its command line: in this very process (starting Python and torch takes seconds),
    or under torchrun."""
    flags = [str(flag) for flag in flags]
    if processes > 1:
        return launch([script, *flags], processes=processes)
    stage = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [script, *flags]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run_stage(stage.main, stage.flags())
            except Exception as error:
                end_in_one_line(type(error), error, error.__traceback__)
                raise
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess([script, *flags], code, out.getvalue(), err.getvalue())


@functools.cache
def warm_python() -> str:
    """An interpreter whose scripts, and torchrun's processes, start in forks of one that has torch
    imported (see forkserver.py)."""
    folder = tempfile.mkdtemp()
    shim, socket, server = f"{folder}/python", f"{folder}/socket", str(ROOT / "tests/forkserver.py")
    Path(shim).write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{server}" "{socket}" "$@"\n')
    os.chmod(shim, 0o755)
    process = subprocess.Popen([sys.executable, server, "serve", socket])
    atexit.register(shutil.rmtree, folder)
    atexit.register(process.kill)
    while not os.path.exists(socket):
        assert process.poll() is None
        time.sleep(0.1)
    return shim


def gpus_for(processes: int) -> dict[str, str]:
    """What hides the GPUs of a machine that has too few of them for these processes."""
    few = 0 < torch.cuda.device_count() < processes
    return {"CUDA_VISIBLE_DEVICES": ""} if few else {}


def launch(*commands: list, processes: int = 2, **environment: str) -> subprocess.CompletedProcess:
    """Stages by their command lines, one after the other in one launch (see launch.py)."""
    python = (
        sys.executable if processes > 1 and "DIE" in environment else warm_python()
    )  # torchrun's signals do not reach a fork
    script = [
        str(ROOT / "tests/launch.py"),
        json.dumps([[str(part) for part in command] for command in commands]),
    ]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    return subprocess.run(
        [python, *launcher, *script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON_EXEC": python, **gpus_for(processes), **environment},
    )


def ok(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    """The stage refused, with one line, notes aside, that has these words in it."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stdout + done.stderr
    for word in words:
        assert word in lines[0]


def refused(capsys, call, *given) -> str:
    """The one line with which a call ended the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*given)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ")
    return line


def jsonl(path) -> list[dict]:
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def pair_rows(path) -> list[dict]:
    """Preference rows of a file, each response as its text; there it is a message of the
    assistant's."""
    rows = jsonl(path)
    for row in rows:
        for side in ("chosen", "rejected"):
            (turn,) = row[side]
            assert turn.keys() == {"role", "content"} and turn["role"] == "assistant"
            row[side] = turn["content"]
    return rows


def dump(path, rows: list) -> str:
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def stats_of(out) -> dict:
    return json.load(open(f"{out}.stats.json"))


def weights_of(path) -> dict[str, torch.Tensor]:
    return load_file(Path(path, "model.safetensors"))


def plain_logp(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The plain way: whole logits of `prompt response`."""
    logps = model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + j - 1, token] for j, token in enumerate(response))


def gold_rows(count: int) -> list[dict]:
    return [
        {
            "id": f"g{i}",
            "prompt": [{"role": "user", "content": CORPUS[i]}],
            "chosen": f"Good, {CORPUS[2 * i][: 9 + i]}",
            "rejected": f"Bad {CORPUS[3 * i][: 30 - i]}",
        }
        for i in range(count)
    ]


def sampled_without_cache(model, prompts: list, u: torch.Tensor, heat: torch.Tensor,
                          stop: torch.Tensor) -> list[list[int]]:
    """What core.sampling.sample must return, by whole forward passes of one sequence each: no
    padding, cache, sharing or compaction."""
    answers = []
    for k, numbers in enumerate(u):
        prompt = prompts[k // (len(u) // len(prompts))]
        answer = []
        for number in numbers:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, -1:]
            answer.append(draw(logits, number[None], heat[k:k + 1]).item())
            if answer[-1] in stop:
                break
        answers.append(answer)
    return answers

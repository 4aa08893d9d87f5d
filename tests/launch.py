"""Several stages in one launch of torchrun, whose start takes longer than a tiny model's training:
a JSON list of command lines.

DIE=R,K kills rank R by SIGKILL at step K of its training; DIE=save,K kills the process half-way
into writing a checkpoint.
"""

import importlib
import io
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import seed_dpo

torch.set_num_threads(1)
WHO, WHEN = os.environ.get("DIE", "nobody,0").split(",")
lr_at, save, saves = seed_dpo.lr_at, torch.save, []


def deadly_lr_at(step, total, peak):
    if WHO == os.environ.get("RANK", "0") and step == int(WHEN):
        print(f"rank {WHO} dies at step {step}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return lr_at(step, total, peak)


def deadly_save(state, path):
    saves.append(path)
    if WHO == "save" and len(saves) == int(WHEN):
        save(state, whole := io.BytesIO())
        Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, path)


seed_dpo.lr_at, torch.save = deadly_lr_at, deadly_save
for script, *flags in json.loads(sys.argv[1]):
    sys.argv = [script, *flags]
    stage = importlib.import_module(script.removesuffix(".py"))
    try:
        stage.main(stage.flags())
    except SystemExit as stop:  # its output was complete
        if stop.code:
            raise
sys.stdout.flush()
os._exit(0)

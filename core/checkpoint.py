"""What a training run goes on from after a kill: one file, OUT.checkpoint.

It holds weights, the moments of Adam and the log, whole: gathered to process 0 and written by
`torch.save`, read with `weights_only=True`, which runs no code. So any number of processes goes on
from it, with shards or without. The price is 12 bytes a parameter of process 0's memory.

Nothing is drawn at random while training, so there is no generator to save: the order of the pairs
follows from (seed, epoch), the position from the length of the log, and so does τ's window.
"""
import hashlib
import json
import os

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from core import RANK, WORLD
from core.models import reason
from core.rows import fail, remove


def save_checkpoint(path: str, policy: torch.nn.Module, optimizer: torch.optim.Optimizer,
                    settings: dict, log: list[dict]) -> None:
    """Write everything that training goes on from, by one rename: a kill leaves the earlier
    checkpoint or this one. All processes take part; process 0 writes."""
    # Checksums of every byte would take seven times as long as writing.
    torch.serialization.set_crc32_options(False)
    whole_on_rank_0 = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(policy, optimizer, options=whole_on_rank_0)
    if RANK > 0:
        return
    state = {"settings": json.dumps(settings), "log": json.dumps(log), "weights": weights,
             "moments": moments}
    tmp = f"{path}.tmp"
    try:
        torch.save(state, tmp)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:
        # torch.save says RuntimeError where the disk is full.
        remove(tmp)
        fail(f"{path}: cannot be written; is the disk full? An earlier one, if any, is kept. "
             f"({reason(error)})")


def load_checkpoint(path: str, policy: torch.nn.Module, optimizer: torch.optim.Optimizer,
                    settings: dict) -> list[dict]:
    """The log up to where training goes on; weights and moments are set. Empty where there is no
    checkpoint of these settings; one of others is kept under a name of its own. Every process reads
    what it needs of the file."""
    exists = os.path.lexists(path)
    if exists:
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            saved = json.loads(state["settings"])
            log = json.loads(state["log"])
        except Exception as error:
            # torch raises many kinds.
            fail(f"{path}: not a checkpoint of this program ({reason(error)}); remove it to start "
                 "again")
    if WORLD > 1:
        # Nobody moves or replaces what another has yet to open.
        dist.barrier()
    if not exists:
        return []
    changed = [key for key in settings if saved.get(key) != settings[key]]
    if changed:
        aside = f"{path}-{hashlib.sha256(state['settings'].encode()).hexdigest()[:8]}"
        if RANK == 0:
            os.replace(path, aside)
            print(f"{path}: of other settings ({', '.join(changed)}); starting again. It is kept "
                  f"as {aside}", flush=True)
        return []
    set_state_dict(policy, optimizer, model_state_dict=state["weights"],
                   optim_state_dict=state["moments"],
                   options=StateDictOptions(full_state_dict=True))
    if RANK == 0:
        print(f"{path}: going on after step {len(log)}", flush=True)
    return log

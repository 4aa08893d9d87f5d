"""What a training run goes on from after a kill: one file, `checkpoint` in its work folder.

It holds weights, the moments of Adam and the log, whole: gathered to process 0 and written by
`torch.save`, read with `weights_only=True`, which runs no code. So any number of processes goes on
from it, with shards or without. The price is 12 bytes a parameter of process 0's memory.

Nothing is drawn at random while training, so there is no generator to save: the order of the pairs
follows from (seed, epoch), the position from the length of the log, and so does τ's window.
"""
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
from core.rows import in_one_line, remove


def save_checkpoint(path: str, policy: torch.nn.Module, optimizer: torch.optim.Optimizer,
                    log: list[dict]) -> None:
    """Write everything that training goes on from, by one rename: a kill leaves the earlier
    checkpoint or this one. All processes take part; process 0 writes."""
    # Checksums of every byte would take seven times as long as writing.
    torch.serialization.set_crc32_options(False)
    whole_on_rank_0 = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(policy, optimizer, options=whole_on_rank_0)
    if RANK > 0:
        return
    state = {"log": json.dumps(log), "weights": weights, "moments": moments}
    tmp = f"{path}.tmp"
    with in_one_line(f"{path}: cannot be written; is the disk full? An earlier one is kept"):
        try:
            torch.save(state, tmp)
            os.replace(tmp, path)
        finally:
            remove(tmp)


def load_checkpoint(path: str, policy: torch.nn.Module,
                    optimizer: torch.optim.Optimizer) -> list[dict]:
    """The log up to where training goes on; weights and moments are set. Empty where there is no
    checkpoint. Every process reads what it needs of the file."""
    exists = os.path.lexists(path)
    if exists:
        with in_one_line(f"{path}: not a checkpoint of this program; remove it to start again"):
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            log = json.loads(state["log"])
    if WORLD > 1:
        # Nobody replaces what another has yet to open.
        dist.barrier()
    if not exists:
        return []
    set_state_dict(policy, optimizer, model_state_dict=state["weights"],
                   optim_state_dict=state["moments"],
                   options=StateDictOptions(full_state_dict=True))
    print(f"{path}: going on after step {len(log)}", flush=True)
    return log

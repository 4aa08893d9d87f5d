"""The machine: processes, precision, the yardsticks of speed and memory in a training log, and the checkpoint that outlives a kill."""
import contextlib
import ctypes
import json
import os
import resource
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from data.rows import fail


def start_processes() -> tuple[int, int, torch.device]:
    """(rank, world size, device). Under torchrun joins the process group; alone there is none and nothing changes."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif sys.platform == "linux":
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():  # the limit covers one stage's slowest rank, not one collective: ranks meet only when work is done
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=3))
    return int(os.environ.get("RANK", 0)), world, device


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of returning it to the system and faulting it in again page by page, which takes a
    third of a training step's time on two cores. Elsewhere (musl) nothing changes."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2 ** 30)      # M_MMAP_THRESHOLD


def merge(mine: dict[int, object], world: int) -> dict[int, object]:
    """All processes' {row: value}, on every process."""
    parts = [mine]
    if world > 1:
        dist.all_gather_object(parts := [None] * world, mine)
    return {row: value for part in parts for row, value in part.items()}


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 here: a recent GPU, or a CPU with AVX512-BF16 or AMX."""
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def autocast(device: torch.device, precision: str):
    """bf16 matrix products over fp32 weights where `precision` says so; norms, log-softmax and sums stay in fp32 (D8)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" or precision == "auto" and bf16_pays(device))


def training_flops(model, encoded: list, shared: bool) -> float:
    """FLOPs of a forward and a backward pass: 6 a weight and token, 12 a layer, channel and (query, key) pair.

    The head's weights count at response tokens alone, where it is applied. Recomputation and padding are not counted:
    they are work, and no progress.
    """
    head = model.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in model.base_model.parameters()) - head
    channels = model.config.num_hidden_layers * model.config.hidden_size
    total = 0
    for prompt, ys in encoded:
        n, lengths, prompts = len(prompt), [len(y) - 1 for y in ys], 1 if shared else len(ys)
        attended = prompts * n * (n + 1) / 2 + sum(m * n + m * (m + 1) / 2 for m in lengths)
        total += 6 * body * (prompts * n + sum(lengths)) + 6 * head * sum(map(len, ys)) + 12 * channels * attended
    return total


def matmul_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product here, the yardstick of model-FLOP utilisation (MFU)."""
    size = 4096 if device.type == "cuda" else 1024
    x, seconds = torch.randn(size, size, device=device), []
    for _ in range(4):  # the first warms up
        start = time.perf_counter()
        with autocast(device, precision):
            (x @ x)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size ** 3 / min(seconds)


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in 10⁹ bytes: the GPU's where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def save_state(path: str, net, optimizer, log: list[dict], settings: dict, rank: int) -> None:
    """Everything that training goes on from, by atomic rename. Nothing is drawn at random while training, so no RNG: the
    order of the pairs follows from (seed, epoch), the position from the length of the log, and so does τ's window."""
    weights, moments = get_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        try:
            torch.save({"settings": json.dumps(settings), "log": json.dumps(log), "weights": weights, "moments": moments}, f"{path}.tmp")
        except RuntimeError as error:  # what torch makes of a full disk
            fail(f"{path}: cannot be written ({str(error).splitlines()[0]}); an earlier one, if any, is kept")
        os.replace(f"{path}.tmp", path)


def restore_state(path: str, net, optimizer, settings: dict) -> list[dict]:
    """The log up to where training goes on: weights and optimizer are set from `path` if it is of these settings."""
    if not os.path.isfile(path):
        return []
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, ValueError, EOFError) as error:
        fail(f"{path}: not a checkpoint of this program ({str(error).splitlines()[0]}); remove it to start again")
    if json.loads(state["settings"]) != settings:
        return []
    set_state_dict(net, optimizer, model_state_dict=state["weights"], optim_state_dict=state["moments"],
                   options=StateDictOptions(full_state_dict=True))
    return json.loads(state["log"])

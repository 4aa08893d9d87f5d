"""Processes: how a stage runs on one or many, and in which precision."""
import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from core import RANK, WORLD
from core.rows import fail


def start_processes() -> torch.device:
    """This process's device. Under torchrun it joins the process group; alone there is none and
    nothing changes."""
    device = this_device()
    if WORLD > 1 and not dist.is_initialized():
        # Ranks meet only when work is done, and 60 000 calls of an endpoint by rank 0 alone may
        # take days; where a process dies, torchrun takes the others down.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return device


def this_device() -> torch.device:
    """The GPU of this process, or else the CPU, set up for what is computed here."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local >= (gpus := torch.cuda.device_count()):
            fail(f"process {local + 1} of this machine has no GPU, there are {gpus}: as many "
                 "processes as GPUs (--nproc_per_node, NPROC), or none (CUDA_VISIBLE_DEVICES=)")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        # torch prefers cuDNN's attention on H100 and later, which gives NaN gradients with an
        # explicit mask at some lengths and plans anew for every length; the others have neither.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        device = torch.device("cpu")
        if sys.platform == "linux":
            keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of returning it to the system and faulting it in again
    page by page, which takes a third of a training step's time on two cores. Elsewhere (musl)
    nothing changes."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # M_TRIM_THRESHOLD
        libc.mallopt(-1, 2 ** 31 - 1)
        # M_MMAP_THRESHOLD
        libc.mallopt(-3, 2 ** 30)


def distribute(net: torch.nn.Module, shard: bool, recompute: bool) -> torch.nn.Module:
    """`net` (ResponseLogps) over all processes: a copy on each, gradients averaged (DDP); or with
    `shard` layers in shards (FSDP2), where process 0 alone needs weights in its `net`. `recompute`:
    backward computes each layer again (--gradient-checkpointing)."""
    device = this_device()
    # The longest list of modules in the decoder is its layers.
    modules = net.model.get_decoder().modules()
    layers = max((m for m in modules if isinstance(m, torch.nn.ModuleList)), key=len)
    if recompute:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if shard:
        # A second of imports.
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        for part in (*layers, net):
            hand_out(part, device)
            fully_shard(part)
        register_fsdp_forward_method(net, "as_reference")
        return net
    net.to(device)
    if WORLD == 1 or not any(p.requires_grad for p in net.parameters()):
        return net
    ids = [device.index] if device.type == "cuda" else None
    net = torch.nn.parallel.DistributedDataParallel(net, ids, gradient_as_bucket_view=True)
    # Buffers (rotary frequencies) never change. As an attribute, because torch renamed the argument
    # after 2.11 and warns of the old name; this name reads and sets either.
    net.broadcast_buffers = False
    return net


def hand_out(part: torch.nn.Module, device: torch.device) -> None:
    """Give every process what process 0 holds of a part of the model: no other has read weights.
    What is sharded already stays as it is."""
    from torch.distributed.tensor import DTensor
    given = {}  # tied weights are one
    for module in part.modules():
        for table in (module._parameters, module._buffers):
            for name, own in table.items():
                if own is None or isinstance(own, DTensor):
                    continue
                if own not in given:
                    if RANK == 0:
                        value = own.detach().to(device).contiguous()
                    else:
                        value = torch.empty(own.shape, dtype=own.dtype, device=device)
                    dist.broadcast(value, 0)
                    if isinstance(own, torch.nn.Parameter):
                        value = torch.nn.Parameter(value, own.requires_grad)
                    given[own] = value
                table[name] = given[own]


def model_of(net: torch.nn.Module):
    """The Hugging Face model inside what `distribute` returned."""
    return getattr(net, "module", net).model


def progress(items: Iterable, title: str, unit: str, **how) -> tqdm:
    """`items` behind a bar, in a terminal and by the first process alone; `how` is tqdm's."""
    return tqdm(items, title, unit=unit, disable=None if RANK == 0 else True, **how)


def merge(mine: dict[int, object]) -> dict[int, object]:
    """All processes' {row: value}, on every process."""
    parts = [mine]
    if WORLD > 1:
        dist.all_gather_object(parts := [None] * WORLD, mine)
    return {row: value for part in parts for row, value in part.items()}


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 here: a recent GPU, or a CPU with AMX, or
    with AVX512-BF16 that is not Intel's, whose own is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # An older torch cannot say.
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    fast_avx512 = cpu.get("avx512_bf16", False) and "Intel" not in cpu["cpu_name"]
    return cpu.get("amx_bf16", False) or fast_avx512


def in_bf16(device: torch.device, precision: str) -> bool:
    """Whether matrix products are made in bf16 under --precision."""
    return precision == "bf16" or precision == "auto" and bf16_pays(device)


def autocast(device: torch.device, precision: str, cache: bool = True):
    """bf16 matrix products over fp32 weights where `precision` says so; norms, log-softmax and sums
    stay in fp32 (D8).

    `cache` keeps the bf16 weights of a forward pass: where they are gathered from shards, that
    would be the whole model.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(device, precision),
                          cache_enabled=cache)


def shared_casts(device: torch.device) -> torch.autocast:
    """Inside of this, which changes nothing itself, the bf16 weights of one `autocast` serve all
    that follow: they live until the outermost of such contexts ends."""
    return torch.autocast(device.type, enabled=False)

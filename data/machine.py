"""The machine: processes, loading, precision, the yardsticks of speed and memory in a training log, and the checkpoint that outlives a kill."""
import argparse
import contextlib
import ctypes
import functools
import json
import os
import pickle
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

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


def load_config(path: str):
    """A model's config.json, from a folder or the hub."""
    if not os.path.isdir(path) and (os.path.exists(path) or path.startswith((".", "/")) or path.count("/") != 1):
        fail(f"{path}: no such model folder, and not the id of a model on the hub")
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot load the model: {str(error).splitlines()[0]}")


def load_model(path: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """A causal LM from a folder or the hub: safetensors only, no remote code, dropout off.

    Dropout stays off in training too: policy and reference must be the same function of the same tokens (D8).
    """
    load_config(path)  # says so if there is no model
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        fail(f"{path}: cannot load the model: {str(error).splitlines()[0]}")
    if any(getattr(model.config, key, None) for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")):
        fail(f"{path}: not supported, because the logits of {model.config.model_type} are not lm_head(hidden)")
    return model.to(device).eval()


def load_tokenizer(path: str):
    """A tokenizer that knows how a chat is written and where a turn ends."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot load the tokenizer: {str(error).splitlines()[0]}")
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        fail(f"{path}: the tokenizer needs a chat template (chat_template.jinja in the model folder) and an end-of-sequence token")
    return tokenizer


def load(path: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """(model, tokenizer)."""
    return load_model(path, device, dtype), load_tokenizer(path)


def distribute(net: torch.nn.Module, device: torch.device, world: int, args: argparse.Namespace) -> torch.nn.Module:
    """`net` (seed_dpo.ResponseLogps) over all processes: a copy on each, gradients averaged (DDP), or layers in shards (FSDP2)."""
    layers = max((m for m in net.modules() if isinstance(m, torch.nn.ModuleList)), key=len)  # the decoder's
    if args.gradient_checkpointing:
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if args.shard:
        for layer in layers:
            fully_shard(layer)
        register_fsdp_forward_method(fully_shard(net), "hidden")
        return net
    net.to(device)
    if world == 1 or not any(p.requires_grad for p in net.parameters()):
        return net
    ids = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(net, ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def model_of(net: torch.nn.Module):
    """The Hugging Face model inside what `distribute` returned."""
    return getattr(net, "module", net).model


def merge(mine: dict[int, object], world: int) -> dict[int, object]:
    """All processes' {row: value}, on every process."""
    parts = [mine]
    if world > 1:
        dist.all_gather_object(parts := [None] * world, mine)
    return {row: value for part in parts for row, value in part.items()}


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 here: a recent GPU, or a CPU with AVX512-BF16 or AMX."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def autocast(device: torch.device, precision: str, cache: bool = True):
    """bf16 matrix products over fp32 weights where `precision` says so; norms, log-softmax and sums stay in fp32 (D8).

    `cache` keeps the bf16 weights of a forward pass: where they are gathered from shards, that would be the whole model.
    """
    enabled = precision == "bf16" or precision == "auto" and bf16_pays(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=cache)


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
    size, times = (4096, 10) if device.type == "cuda" else (1024, 3)
    with autocast(device, precision):
        x = torch.randn(size, size, device=device)
        x, seconds = x.to((x @ x).dtype), []  # cast beforehand: only the products are timed
        for _ in range(4):
            start = time.perf_counter()
            for _ in range(times):
                y = x @ x
            y[0, 0].item()  # waits for the device
            seconds.append((time.perf_counter() - start) / times)
    return 2 * size ** 3 / min(seconds)


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in 10⁹ bytes: the GPU's where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


MEMORY_ONLY = ("micro_tokens", "gradient_checkpointing", "shard")  # a run may go on with others: they change no mathematics


def save_state(path: str, net, optimizer, log: list[dict], settings: dict, rank: int) -> None:
    """Everything that training goes on from, by atomic rename. Nothing is drawn at random while training, so no RNG: the
    order of the pairs follows from (seed, epoch), the position from the length of the log, and so does τ's window."""
    weights, moments = get_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        try:
            torch.save({"settings": json.dumps(settings), "log": json.dumps(log), "weights": weights, "moments": moments}, f"{path}.tmp")
        except (OSError, RuntimeError) as error:  # torch's own words for a full disk do not say so
            Path(f"{path}.tmp").unlink(missing_ok=True)
            fail(f"{path}: cannot be written; is the disk full? An earlier one, if any, is kept. ({str(error).splitlines()[0]})")
        os.replace(f"{path}.tmp", path)


def restore_state(path: str, net, optimizer, settings: dict, rank: int) -> list[dict]:
    """The log up to where training goes on: weights and optimizer are set from `path` if it is of these settings."""
    if not os.path.isfile(path):
        return []
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        old, log = json.loads(state["settings"]), json.loads(state["log"])
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        fail(f"{path}: not a checkpoint of this program ({str(error).splitlines()[0]}); remove it to start again")
    if changed := [key for key in settings if key not in MEMORY_ONLY and old.get(key) != settings[key]]:
        if rank == 0:
            print(f"{path}: of other settings ({', '.join(changed)}); starting again", flush=True)
        return []
    set_state_dict(net, optimizer, model_state_dict=state["weights"], optim_state_dict=state["moments"],
                   options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        print(f"{path}: going on after step {len(log)}", flush=True)
    return log


def clean(out: str) -> None:
    """Remove what only a run that is not finished needs."""
    for suffix in ("log.jsonl", "checkpoint", "checkpoint.tmp"):
        Path(f"{out}.{suffix}").unlink(missing_ok=True)

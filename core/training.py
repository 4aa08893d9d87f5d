"""The verbs of a training loop: flags, start, checkpoint, yardsticks of speed and memory, and the published policy."""
import argparse
import json
import os
import pickle
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from core.chat import encode_rows, pair_of
from core.models import load
from core.parallel import autocast, distribute, model_of, start_processes
from core.policy import ResponseLogps
from core.rows import fail, read_rows, write_rows
from core.stage import natural, positive, publish, ranged


def training_flags(cli: argparse.ArgumentParser, epochs: int) -> None:
    """The flags that seed_dpo.py and train.py share."""
    cli.add_argument("--model", required=True, help="where training starts: a Hugging Face folder or hub id; also the reference")
    cli.add_argument("--pairs", required=True, help="preference rows (JSONL)")
    cli.add_argument("--out", type=os.path.normpath, required=True, help="folder of the trained policy")
    cli.add_argument("--beta", type=positive, default=0.1, help="weight of the KL term (papers: 0.1; LLaMA-3 0.01 or 0.05)")
    cli.add_argument("--lr", type=positive, default=5e-7, help="peak learning rate (papers: 5e-7 at 7 B, 5e-6 Phi-2)")
    cli.add_argument("--epochs", type=natural, default=epochs, help=f"passes over the pairs (papers: {epochs})")
    cli.add_argument("--batch-size", type=natural, default=32, help="pairs an update, over all processes (papers: 32)")
    cli.add_argument("--clip", type=positive, default=1.0, help="gradient norm above which gradients are scaled down")
    cli.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of matrix products; weights stay fp32")
    cli.add_argument("--seed", type=ranged(int, 0), default=42, help="decides the order of the pairs")
    cli.add_argument("--micro-tokens", type=natural, default=2048, help="tokens a forward pass and process: memory, not mathematics")
    cli.add_argument("--gradient-checkpointing", action="store_true", help="recompute each layer in backward: less memory, a third more work")
    cli.add_argument("--shard", action="store_true", help="split weights, gradients and Adam over the processes (FSDP2)")
    cli.add_argument("--save-every", type=ranged(int, 0), default=50, help="steps between checkpoints to go on from after a kill; 0: none")


def begin(args: argparse.Namespace, kind: str, rows_of: Callable[[list], list] = list) -> tuple:
    """What both trainers start with: (rows, encoded, net, tokenizer, device, rank, world); `rows_of` may rewrite the rows."""
    rows = rows_of(read_rows(args.pairs, kind))
    rank, world, device = start_processes()
    if args.shard and world == 1:
        fail("--shard needs several processes: torchrun --nproc_per_node=N …")
    model, tokenizer = load(args.model, torch.device("cpu") if args.shard else device)  # shards leave the CPU one by one
    encoded = encode_rows(model.config, tokenizer, rows, args.pairs, pair_of)
    return rows, encoded, distribute(ResponseLogps(model), device, world, args), tokenizer, device, rank, world


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


def save_policy(args: argparse.Namespace, net, tokenizer, pairs: int, log: list[dict], settings: dict, rank: int, **stats) -> dict:
    """Publish a Hugging Face folder (one safetensors file, fp32) with the tokenizer and log.jsonl; returns the stats."""
    weights = get_model_state_dict(model_of(net), options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    names = {name for values in (model_of(net).named_parameters(), model_of(net).named_buffers()) for name, _ in values}
    weights = {name: tensor for name, tensor in weights.items() if name in names}  # tied weights once

    def write(tmp: str) -> None:
        try:
            model_of(net).save_pretrained(tmp, state_dict=weights, max_shard_size="1TB")
        except SafetensorError as error:
            fail(f"{args.out}: cannot be written; is the disk full? ({error})")
        tokenizer.save_pretrained(tmp)
        write_rows(f"{tmp}/log.jsonl", log)
    last = log[-(len(log) // args.epochs):]
    stats |= {"pairs": pairs, "steps": len(log), **{k: sum(r[k] for r in last) / len(last) for k in ("loss", "accuracy")}}
    if rank == 0:
        publish(args.out, settings, stats, write)
        clean(args.out)
    return stats

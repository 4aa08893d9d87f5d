"""The verbs of a training loop, in its order: begin, resume, batch_at, micro_batches, note, gather,
update, log_row, keep, save_policy.

seed_dpo.py and train.py show the loop itself. What a training step means is there; how it is spread
over passes and processes, measured and kept is here.
"""
import argparse
import json
import math
import os
import pickle
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from tqdm import tqdm

from core.chat import encode_rows, pair_of, usable
from core.models import load_config, load_outline, load_tokenizer
from core.parallel import autocast, distribute, merge, model_of, start_processes
from core.policy import ResponseLogps, deal, pack, rope_switch, shares_prompt, tokens_of
from core.probe import load_scorer
from core.rows import fail, read_rows, remove, write_rows
from core.stage import clean, inputs_of, publish


class Run(NamedTuple):
    """What stays the same while a trainer runs."""
    args: argparse.Namespace
    settings: dict
    rows: list[dict]
    encoded: list                     # (prompt ids, [chosen ids, rejected ids]) of each row
    shared: bool                      # one sequence a pair, or one a response
    policy: torch.nn.Module           # π_θ as `ResponseLogps`, over all processes
    optimizer: torch.optim.Optimizer
    tokenizer: object
    device: torch.device
    rank: int
    world: int
    total: int                        # steps
    peak: float                       # FLOP/s of all processes' matrix products
    started: float                    # seconds, by time.perf_counter


def begin(args: argparse.Namespace, settings: dict, kind: str) -> Run:
    """Rows, policy and optimizer on every process."""
    rows = read_rows(args.pairs, kind)
    rank, world, device = start_processes()
    if args.shard and world == 1:
        fail("--shard needs several processes: torchrun --nproc_per_node=N …")
    tokenizer = load_tokenizer(args.model)
    encoded = encode_rows(load_config(args.model), tokenizer, rows, [pair_of(row) for row in rows],
                          args.pairs)
    rows, encoded = usable(rows, encoded, args.pairs)
    if args.shard and rank > 0:
        model = load_outline(args.model)  # process 0 reads, and hands out layer by layer
    else:
        place = torch.device("cpu") if args.shard else device
        # loaded frozen, and asked: is it read rightly?
        model = load_scorer(args.model, place, encoded, args.precision, tokenizer)
    model.requires_grad_(True)  # π_θ
    limit, _ = rope_switch(model.config)
    if args.shard and any(len(prompt) + len(y) > limit for prompt, ys in encoded for y in ys):
        fail(f"{args.pairs}: a row passes {limit} tokens, beyond which {model.config.model_type} "
             "needs a pass a response; processes that share weights must make equally many. Leave "
             "out such rows or --shard")
    shared = shares_prompt(model, encoded)
    policy = distribute(ResponseLogps(model), device, world, args)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    total = args.epochs * math.ceil(len(rows) / args.batch_size)
    peak = world * matmul_flops(device, args.precision)
    return Run(args, settings, rows, encoded, shared, policy, optimizer, tokenizer, device, rank,
               world, total, peak, time.perf_counter())


def resume(run: Run) -> list[dict]:
    """The log up to where training goes on, a row a step; weights and optimizer are set from
    OUT.checkpoint.

    Empty if no run of the same settings left one. While training runs, the log lies in
    OUT.log.jsonl.
    """
    log = restore_state(run)
    if run.rank == 0:
        write_rows(f"{run.args.out}.log.jsonl", log)
    if log and run.world > 1 and not run.args.shard:
        # DDP sorts gradients into other buckets after its first pass: let that not be at a later
        # step than in a run that was left alone, whose sums were added in that order.
        tokens = pack(run.encoded[:1], run.shared, run.device)
        (0 * run.policy(tokens)[0].sum()).backward()
        run.optimizer.zero_grad(set_to_none=True)
    return log


def steps(run: Run, log: list[dict]) -> tqdm:
    """A bar over the steps that are still to be made."""
    return tqdm(range(len(log), run.total), desc="train", unit="step", initial=len(log),
                total=run.total, disable=None if run.rank == 0 else True)


def batch_at(run: Run, step: int) -> list[int]:
    """Row numbers of the global batch of a step: alike on every process, and after a kill."""
    per_epoch = math.ceil(len(run.rows) / run.args.batch_size)
    epoch, k = divmod(step, per_epoch)
    order = np.random.default_rng([run.args.seed, epoch]).permutation(len(run.rows)).tolist()
    return order[k * run.args.batch_size:(k + 1) * run.args.batch_size]


def micro_batches(run: Run, batch: list[int]) -> Iterator[tuple[list[int], dict, float]]:
    """(row numbers [m], their tokens, what the sum of their losses is multiplied by) of this
    process's passes.

    Gradients are averaged over processes, and the update is the mean over the global batch (D7):
    hence world / B. A process with fewer passes than others takes part with a stand-in of scale 0.
    """
    passes = deal(run.encoded, batch, run.shared, run.args.micro_tokens, run.world)[run.rank]
    for number, own in enumerate(passes, 1):
        # DDP sums over processes once, after the last pass. Shards are summed after each: a whole
        # gradient would not fit.
        run.policy.require_backward_grad_sync = number == len(passes)
        rows = own or batch[:1]
        tokens = pack([run.encoded[i] for i in rows], run.shared, run.device)
        yield rows, tokens, run.world / len(batch) if own else 0.0


def precision(run: Run):
    """The context of a forward pass."""
    return autocast(run.device, run.args.precision, cache=not run.args.shard)


def note(seen: dict[int, dict], rows: list[int], scale: float, **columns: torch.Tensor) -> None:
    """Keep what a pass found of its pairs, columns [m], by row number; a stand-in's is not kept."""
    if scale > 0:
        values = zip(*(column.tolist() for column in columns.values()))
        seen.update({i: dict(zip(columns, own)) for i, own in zip(rows, values)})


def gather(run: Run, seen: dict[int, dict], batch: list[int]) -> dict[str, list[float]]:
    """What all processes noted: columns [B] in the order of the global batch, alike on every
    process."""
    merged = merge(seen, run.world)
    return {key: [merged[i][key] for i in batch] for key in merged[batch[0]]}


def update(run: Run, lr: float, step: int, batch: list[int], loss: list[float]) -> float:
    """One step of AdamW at rate `lr` on the clipped gradient, which the backward passes have left
    in the parameters; its norm before clipping is returned.

    Ends the program, with nothing saved, where loss or gradient is not finite; `step`, `batch` and
    `loss` [B] only serve to say so.
    """
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), run.args.clip)
    norm = getattr(norm, "full_tensor", lambda: norm)().item()
    mean = sum(loss) / len(loss)
    if not math.isfinite(mean + norm):
        saved = f"{run.args.out}.checkpoint"
        kept = f", {saved} is kept" if os.path.exists(saved) else ""
        ids = ", ".join(run.rows[i]["id"] for i in batch)
        fail(f"{run.args.pairs}: step {step + 1} of {run.total}: loss {mean}, "
             f"gradient norm {norm}; rows {ids}. "
             f"No weights are saved{kept}; lower --lr or look at these rows")
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def log_row(run: Run, step: int, batch: list[int], pairs: dict, norm: float, lr: float,
            started: float) -> dict:
    """A step in numbers, from the `loss`, `margin` and `gain` of its pairs.

    `gain` is the margin against π_ref, where training starts: accuracy counts what training itself
    did, and is ½ at step 1, but for rounding, whatever the margin is measured against.
    """
    if run.device.type == "cuda":
        # The device runs behind the program: this waits for the update, so that the step's time is
        # its own. The next step's stamp follows with nothing under way.
        torch.cuda.synchronize(run.device)
    seconds = time.perf_counter() - started
    rows = [run.encoded[i] for i in batch]
    margin = np.array(pairs["margin"])
    gain = np.array(pairs["gain"])
    mfu = training_flops(model_of(run.policy), rows, run.shared) / seconds / run.peak
    return {
        "step": step + 1,
        "loss": sum(pairs["loss"]) / len(batch),
        "accuracy": float(((gain > 0) + 0.5 * (gain == 0)).mean()),
        "margin": float(margin.mean()),
        "confidence": np.quantile(1 / (1 + np.exp(-margin)), [0.1, 0.5, 0.9]).tolist(),
        "gradient_norm": norm,
        "lr": lr,
        "seconds": seconds,
        "tokens_per_s": sum(tokens_of(row, run.shared) for row in rows) / seconds,
        # Above 1, other programs were busy while the yardstick was measured.
        "mfu": mfu if mfu <= 1 else None,
        "memory_gb": memory_gb(run.device),
    }


def keep(run: Run, log: list[dict], bar: tqdm) -> None:
    """Show and write the latest row of the log, and a checkpoint where one is due."""
    last = log[-1]
    shown = [key for key in ("loss", "accuracy", "tokens_per_s", "mfu") if last[key] is not None]
    bar.set_postfix({key: f"{last[key]:.3g}" for key in shown})
    if run.rank == 0:
        with open(f"{run.args.out}.log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(last) + "\n")
    if checkpoint_is_due(run, last["seconds"]) and len(log) < run.total:
        save_state(run, log)


def checkpoint_is_due(run: Run, seconds: float) -> bool:
    """Whether a boundary between two intervals of --save-every minutes fell into the step that has
    just taken `seconds`. Rank 0's clock decides for all."""
    interval = 60 * run.args.save_every
    if interval == 0:
        return False
    now = time.perf_counter() - run.started
    due = [now // interval > max(0.0, now - seconds) // interval]
    if run.world > 1:
        dist.broadcast_object_list(due)
    return due[0]


def training_flops(model, encoded: list, shared: bool) -> float:
    """FLOPs of a forward and a backward pass: 6 a weight and token, 12 a layer, channel and (query,
    key) pair.

    The head's weights count at response tokens alone, where it is applied. Recomputation and
    padding are not counted: they are work, and no progress.
    """
    head = model.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in model.base_model.parameters()) - head
    config = model.config.get_text_config()
    channels = config.num_hidden_layers * config.hidden_size
    total = 0
    for prompt, ys in encoded:
        n = len(prompt)
        lengths = [len(y) - 1 for y in ys]
        prompts = 1 if shared else len(ys)
        attended = prompts * n * (n + 1) / 2 + sum(m * n + m * (m + 1) / 2 for m in lengths)
        total += 6 * body * (prompts * n + sum(lengths))
        total += 6 * head * sum(map(len, ys))
        total += 12 * channels * attended
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
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def save_state(run: Run, log: list[dict]) -> None:
    """Everything that training goes on from, in OUT.checkpoint, by one rename.

    Nothing is drawn at random while training, so there is no generator to save: the order of the
    pairs follows from (seed, epoch), the position from the length of the log, and so does τ's
    window. Under --shard the checkpoint is a folder to which each process writes its own shard.
    """
    path = f"{run.args.out}.checkpoint"
    tmp = f"{path}.tmp"
    # a CRC32 of every byte takes seven times as long as writing them
    torch.serialization.set_crc32_options(False)
    text = {"settings": json.dumps(run.settings), "log": json.dumps(log)}
    try:
        if run.args.shard:
            if run.rank == 0:
                remove(tmp)  # what a kill left of an earlier one
            dist.barrier()
            weights, moments = get_state_dict(run.policy, run.optimizer)
            state = {"weights": weights, "moments": moments}
            dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp, sync_files=False))
            if run.rank == 0:
                Path(tmp, "run.json").write_text(json.dumps(text))
                put_in_place(tmp, path)
            dist.barrier()
            return
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = get_state_dict(run.policy, run.optimizer, options=whole)
        if run.rank == 0:
            remove(tmp)
            torch.save({**text, "weights": weights, "moments": moments}, tmp)
            put_in_place(tmp, path)
    except (OSError, RuntimeError, CheckpointException) as error:  # a full disk has many names
        if run.rank == 0:
            remove(tmp)
        fail(f"{path}: cannot be written; is the disk full? An earlier one, if any, is kept. "
             f"({str(error).splitlines()[0]})")


def put_in_place(tmp: str, path: str) -> None:
    """Rename a checkpoint to `path`. An earlier one, be it a file or a folder, goes only then."""
    old = f"{path}.old"
    remove(old)
    if os.path.exists(path):
        os.replace(path, old)
    os.replace(tmp, path)
    remove(old)


def restore_state(run: Run) -> list[dict]:
    """The log up to where training goes on: weights and optimizer are set from OUT.checkpoint if it
    is of these settings, however many processes wrote it, with shards or without."""
    path = f"{run.args.out}.checkpoint"
    old = f"{path}.old"
    if run.rank == 0 and os.path.exists(old) and not os.path.exists(path):
        os.replace(old, path)  # killed between two renames
    if run.world > 1:
        dist.barrier()
    if not os.path.exists(path):
        return []
    sharded = os.path.isdir(path)
    try:
        if sharded:
            state = json.loads(Path(path, "run.json").read_text())
        else:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        settings, log = json.loads(state["settings"]), json.loads(state["log"])
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        fail(f"{path}: not a checkpoint of this program ({str(error).splitlines()[0]}); remove it "
             "to start again")
    changed = [key for key in run.settings if settings.get(key) != run.settings[key]]
    if changed:
        if run.rank == 0:
            print(f"{path}: of other settings ({', '.join(changed)}); starting again", flush=True)
        return []
    whole = StateDictOptions(full_state_dict=not sharded)
    if sharded:
        weights, moments = get_state_dict(run.policy, run.optimizer)
        state = {"weights": weights, "moments": moments}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            dcp.load(state, checkpoint_id=path, no_dist=run.world == 1)
    set_state_dict(run.policy, run.optimizer, model_state_dict=state["weights"],
                   optim_state_dict=state["moments"], options=whole)
    if run.rank == 0:
        print(f"{path}: going on after step {len(log)}", flush=True)
    return log


def save_policy(run: Run, log: list[dict], **stats) -> dict:
    """Publish a Hugging Face folder (one safetensors file, fp32) with tokenizer and log.jsonl;
    returns the stats."""
    args, model = run.args, model_of(run.policy)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)
    names = {name for name, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}
    weights = {name: tensor for name, tensor in weights.items() if name in names}  # tied: once

    def write(tmp: str) -> None:
        try:
            model.save_pretrained(tmp, state_dict=weights, max_shard_size="1TB")
        except SafetensorError as error:
            fail(f"{args.out}: cannot be written; is the disk full? ({error})")
        run.tokenizer.save_pretrained(tmp)
        write_rows(f"{tmp}/log.jsonl", log)
    last = log[-(len(log) // args.epochs):]
    means = {key: sum(row[key] for row in last) / len(last) for key in ("loss", "accuracy")}
    stats |= {"pairs": len(run.rows), "steps": len(log), **means}
    if run.rank == 0:
        publish(args.out, run.settings, stats, write, inputs_of(args, run.settings))
        clean(args.out)
    return stats

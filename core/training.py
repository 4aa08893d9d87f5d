"""What surrounds the mathematics of a training step, in the order of the loop: begin, resume,
batches, micro_batches, gather, update, record_step, save_policy.

seed_dpo.py and train.py show the loop itself: what a step means is there. How it is spread over
passes and processes, measured and kept is here.
"""
import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from core import RANK, WORLD
from core.chat import encode_rows, learnable_pairs, pair_of
from core.checkpoint import load_checkpoint, save_checkpoint
from core.models import (
    copy_tokenizer,
    load_config,
    load_model,
    load_outline,
    load_tokenizer,
)
from core.parallel import (
    autocast,
    distribute,
    in_bf16,
    merge,
    model_of,
    progress,
    shared_casts,
    start_processes,
)
from core.policy import ResponseLogps, deal, pack, score, shares_prompt, tokens_of
from core.probe import load_scorer
from core.rows import fail, in_one_line, write_rows
from core.stage import CLIP, publish, work_folder


class Run(NamedTuple):
    """What stays the same while a trainer runs."""
    args: argparse.Namespace
    work: str                         # folder of its log and checkpoint while it trains
    rows: list[dict]
    encoded: list                     # (prompt ids, [chosen ids, rejected ids]) of each row
    shared: bool                      # one sequence a pair, or one a response
    shard: bool                       # weights in shards; one process has nobody to share with
    policy: torch.nn.Module           # π_θ as `ResponseLogps`, over all processes
    optimizer: torch.optim.Optimizer
    precision: str                    # "bf16" or "fp32"
    autocast: torch.autocast          # the context of a forward pass
    device: torch.device
    total: int                        # steps
    started: float                    # seconds, by time.perf_counter


def begin(args: argparse.Namespace, rows: list[dict]) -> Run:
    """Policy and optimizer on every process, and the rows as they are learnt."""
    device = start_processes()
    shard = args.shard and WORLD > 1
    tokenizer = load_tokenizer(args.model)
    encoded = encode_rows(load_config(args.model), tokenizer, rows, [pair_of(row) for row in rows],
                          args.pairs)
    rows, encoded = learnable_pairs(rows, encoded, args.pairs)
    if shard and RANK > 0:
        model = load_outline(args.model)  # process 0 reads, and hands out layer by layer
    else:
        target = torch.device("cpu") if shard else device
        # Compared with the model's own logits (core/probe.py).
        model = load_scorer(args.model, target, encoded, args.precision)
    # π_θ is what the loss reaches: a vision tower beside the decoder stays as it is.
    model.get_decoder().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)
    shared = shares_prompt(model, encoded)
    policy = distribute(ResponseLogps(model), shard, args.gradient_checkpointing)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0, fused=True)
    return Run(
        args, work_folder(args), rows, encoded, shared, shard, policy, optimizer,
        precision="bf16" if in_bf16(device, args.precision) else "fp32",
        autocast=autocast(device, args.precision, cache=not shard),
        device=device,
        total=args.epochs * math.ceil(len(rows) / args.batch_size),
        started=time.perf_counter())


def reference_logps(run: Run) -> torch.Tensor:
    """log π_ref [N, 2] of chosen and rejected. π_ref is where training starts and never changes:
    scored once, before the first update."""
    logps = score(run.policy, run.encoded, run.args.precision)
    return torch.tensor(logps, device=run.device)


def reference_policy(run: Run) -> torch.nn.Module:
    """π_ref as `ResponseLogps`, frozen, over all processes as the policy is."""
    args = run.args
    if run.shard and RANK > 0:
        model = load_outline(args.model)
    else:
        model = load_model(args.model, torch.device("cpu") if run.shard else run.device)
    return distribute(ResponseLogps(model), run.shard, args.gradient_checkpointing)


def resume(run: Run) -> list[dict]:
    """The log up to where training goes on, a row a step; weights and optimizer are set from
    the checkpoint. Empty if no run of the same settings left one.

    While training runs, log and checkpoint lie in OUT.unfinished.
    """
    log = load_checkpoint(f"{run.work}/checkpoint", run.policy, run.optimizer)
    if RANK == 0:
        write_rows(f"{run.work}/log.jsonl", log)
    if log and WORLD > 1 and not run.shard:
        # DDP rebuilds its buckets after the first backward; one dummy pass keeps a resumed run's
        # order of summation.
        tokens = pack(run.encoded[:1], run.shared, run.device)
        (0 * run.policy(tokens)[0].sum()).backward()
        run.optimizer.zero_grad(set_to_none=True)
    return log


def batches(run: Run, log: list[dict]) -> Iterator[tuple[int, list[int]]]:
    """(step, indices of its global batch) for the steps after those of the log, which the loop
    continues: the rows in a new order each epoch, alike on every process and after a kill."""
    size = run.args.batch_size
    per_epoch = math.ceil(len(run.rows) / size)
    bar = progress(range(len(log), run.total), "train", "step", initial=len(log), total=run.total,
                   bar_format="{desc} {n}/{total} |{bar}| {elapsed}<{remaining}{postfix}")
    for step in bar:
        epoch, k = divmod(step, per_epoch)
        order = np.random.default_rng([run.args.seed, epoch]).permutation(len(run.rows)).tolist()
        yield step, order[k * size:(k + 1) * size]
        bar.set_postfix_str(f"loss {log[-1]['loss']:.3f}, accuracy {log[-1]['accuracy']:.2f}")


def micro_batches(run: Run, batch: list[int]) -> Iterator[tuple[list[int], dict, float]]:
    """(indices [m], their tokens, what the sum of their losses is multiplied by) of this process's
    passes. While it runs, weights are cast to bf16 once for all passes.

    Gradients are averaged over processes, and the update is the mean over the global batch (D7):
    hence world / B. A process with fewer passes than others takes part with a stand-in of scale 0.
    """
    passes = deal(run.encoded, batch, run.shared, run.args.micro_tokens, WORLD)[RANK]
    with shared_casts(run.device) if len(passes) > 1 else nullcontext():
        for number, dealt in enumerate(passes, 1):
            # DDP reads this: it sums over processes once, after the last pass. Shards do not, and
            # are summed after each: a whole gradient would not fit.
            run.policy.require_backward_grad_sync = number == len(passes)
            indices = dealt or batch[:1]
            tokens = pack([run.encoded[i] for i in indices], run.shared, run.device)
            yield indices, tokens, WORLD / len(batch) if dealt else 0.0


def gather(per_pass: list[tuple], batch: list[int]) -> dict[str, list[float]]:
    """What all processes have found of the batch's pairs, as columns [B] in its order, alike on
    every process. `per_pass` holds (indices [m], scale, name → values [m]) of this process's
    passes; stand-ins, of scale 0, do not count."""
    mine = {}
    for indices, scale, columns in per_pass:
        if scale == 0:
            continue
        columns = {name: column.tolist() for name, column in columns.items()}
        for k, i in enumerate(indices):
            mine[i] = {name: values[k] for name, values in columns.items()}
    per_pair = merge(mine)
    return {name: [per_pair[i][name] for i in batch] for name in per_pair[batch[0]]}


def update(run: Run, lr: float) -> float:
    """One step of AdamW at rate `lr` on the clipped gradient, which the backward passes have left
    in the parameters. Returns the gradient's norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), CLIP)
    if hasattr(norm, "full_tensor"):  # a shard's share of it
        norm = norm.full_tensor()
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm.item()


def record_step(run: Run, log: list[dict], indices: list[int], pairs: dict, lr: float, norm: float,
                started: float, **more) -> None:
    """Append a step to the log, in memory and on disk; write a checkpoint where one is due.

    `pairs` has the `loss`, `margin` and `round_margin` of the rows `indices`, `more` what else the
    log says. `round_margin` is the margin against π_ref, where training starts: accuracy counts
    what training itself did, and is ½ at step 1, but for rounding, whatever `margin` is measured
    against. (An LLM judge has no reference: there it is the share of right letters.)

    Ends the program, with nothing saved, where loss or gradient is not finite.
    """
    if run.device.type == "cuda":
        # The device runs behind the program: this waits for the update, so that the step's time is
        # its own. The next step's stamp follows with nothing under way.
        torch.cuda.synchronize(run.device)
    seconds = time.perf_counter() - started
    saved = f"{run.work}/checkpoint"
    loss = sum(pairs["loss"]) / len(indices)
    if not math.isfinite(loss + norm):
        kept = f", {saved} is kept" if os.path.exists(saved) else ""
        ids = ", ".join(run.rows[i]["id"] for i in indices)
        fail(f"{run.args.pairs}: step {len(log) + 1} of {run.total}: loss {loss}, "
             f"gradient norm {norm}; rows {ids}. "
             f"No weights are saved{kept}; lower --lr or look at these rows")
    tokens = sum(tokens_of(run.encoded[i], run.shared) for i in indices)
    round_margin = np.array(pairs["round_margin"])
    row = {
        "step": len(log) + 1,
        "loss": loss,
        "accuracy": float(((round_margin > 0) + 0.5 * (round_margin == 0)).mean()),
        "margin": float(np.mean(pairs["margin"])),
        "gradient_norm": norm,
        "lr": lr,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        **more,
    }
    log.append(row)
    if RANK == 0:
        with open(f"{run.work}/log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    if checkpoint_is_due(run, seconds) and len(log) < run.total:
        save_checkpoint(saved, run.policy, run.optimizer, log)


def checkpoint_is_due(run: Run, seconds: float) -> bool:
    """Whether a boundary between two intervals of --save-every minutes fell into the step that has
    just taken `seconds`. Rank 0's clock decides for all."""
    interval = 60 * run.args.save_every
    if interval == 0:
        return False
    now = time.perf_counter() - run.started
    due = [now // interval > max(0.0, now - seconds) // interval]
    if WORLD > 1:
        dist.broadcast_object_list(due)
    return due[0]


def save_policy(run: Run, log: list[dict], **stats) -> dict:
    """Publish a Hugging Face folder: weights as one safetensors file in fp32, the parent's
    tokenizer, log.jsonl. Returns its stats; `loss`, `accuracy` and `margin` are means over the last
    epoch.

    Where the loss is twice that of the first step, when nothing was learnt, `diverged` says so in
    words; else it is empty.
    """
    args, model = run.args, model_of(run.policy)
    on_rank_0 = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=on_rank_0)
    names = {name for name, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}
    weights = {name: tensor for name, tensor in weights.items() if name in names}  # tied: once
    # Only a next step's loss would show what the last update did.
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        fail(f"{args.out}: the last update left weights that are not finite, and nothing is saved; "
             "lower --lr (LR)")

    def write(tmp: str) -> None:
        with in_one_line(f"{args.out}: cannot be written; is the disk full? A checkpoint, if there "
                         "is one, is kept: make room, and the same command goes on"):
            model.save_pretrained(tmp, state_dict=weights, max_shard_size="1TB")
        copy_tokenizer(args.model, tmp)
        write_rows(f"{tmp}/log.jsonl", log)
    last = log[-(len(log) // args.epochs):]  # the steps of the last epoch
    for key in ("loss", "accuracy", "margin"):
        stats[key] = sum(row[key] for row in last) / len(last)
    stats |= {"pairs": len(run.rows), "steps": len(log), "diverged": ""}
    if stats["loss"] > 2 * log[0]["loss"]:
        stats["diverged"] = (f"; DIVERGED: its loss is {stats['loss']:.3g}, that of a policy that "
                             f"learnt nothing {log[0]['loss']:.3g}; lower --lr (LR)")
    publish(args, stats, write)
    return stats

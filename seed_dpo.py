"""Seed stage: plain DPO on a small gold-labelled set, and the pieces that every later stage imports.

    π_0 ← DPO(π_init, D_0)                                                                   S6, from S1 to S5
    logp(y|x) = Σ_t log π(y_t | x, y_<t)                     response tokens only, end-of-turn token included
    margin    M = β[(log π_θ − log π_ref)(y_w) − (log π_θ − log π_ref)(y_l)]
    loss      −log σ(M) = softplus(−M)                       mean over the global batch

`--objective judge` fine-tunes an LLM judge on the same pairs instead: the letter of the better response after SPA's Listing 1.

This file is read first. It owns response log-probabilities, the DPO loss and the optimisation loop; `train.py` runs the
same loop with another loss. How rows become batches is in `core/policy.py`.

    python seed_dpo.py --model models/smollm2 --pairs runs/demo/gold/seed.jsonl --out runs/demo/seed
    torchrun --nproc_per_node=8 seed_dpo.py --model alignment-handbook/zephyr-7b-sft-full --pairs seed.jsonl --out pi_0
"""
import argparse
import json
import math
import os
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from core.parallel import autocast, merge, model_of
from core.policy import deal, pack, score, shares_prompt, tokens_of
from core.rows import fail, write_rows
from core.stage import is_done, parser, run_stage, settings_of
from core.training import (
    begin,
    clean,
    matmul_flops,
    memory_gb,
    restore_state,
    save_policy,
    save_state,
    training_flags,
    training_flops,
)
from judges.judge import judge_pairs



def dpo_margin(logps: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """M = β[(log π_θ − log π_ref)(y_w) − (log π_θ − log π_ref)(y_l)] [m], from log-probs [m, 2] (chosen, rejected)."""
    ratio = logps - reference
    return beta * (ratio[:, 0] - ratio[:, 1])


def dpo_loss(margin: torch.Tensor) -> torch.Tensor:
    """−log σ(M) (S6) as softplus(−M): finite and with a gradient for every finite M."""
    return F.softplus(-margin)


def lr_at(step: int, total: int, peak: float) -> float:
    """Learning rate of a step in 0 … total − 1: linear warm-up over the first 10 % of the steps, then a cosine to zero."""
    warmup = max(1, round(0.1 * total))
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, total - warmup))))


def optimise(net, encoded: list, ids: list[str], losses: Callable, args: argparse.Namespace, settings: dict, device: torch.device,
             rank: int, world: int, also: Callable = lambda step, batch: None, report: Callable = lambda log, rows, records: {}) -> list[dict]:
    """Minimise the mean over global batches of `losses(log, rows, logps, extra)`; returns the log, one row a step.

    `losses` gets the log so far, the row numbers [m] of a micro-batch, their log-probs [m, 2] and the sums [m, 2] of what
    `also(step, batch)` computes from logits; it returns losses [m] and a dict of per-pair records [m]. `report` gets the
    records of the whole global batch in its order, whatever the number of processes, and returns what else is to be logged.

    Goes on from OUT.checkpoint if a run of the same settings left one. While it runs, the log is in OUT.log.jsonl. Raises
    SystemExit if loss or gradient is not finite.
    """
    model, saved = model_of(net), f"{args.out}.checkpoint"
    shared = shares_prompt(model, encoded)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    log = restore_state(saved, net, optimizer, settings, rank)
    per_epoch = math.ceil(len(encoded) / args.batch_size)
    total, peak = per_epoch * args.epochs, world * matmul_flops(device, args.precision)
    if rank == 0:
        write_rows(f"{args.out}.log.jsonl", log)
    if log and world > 1 and not args.shard:  # DDP sorts gradients into other buckets after its first pass: not at a later step than before
        (0 * net(pack(encoded[:1], shared, device))[0].sum()).backward()
        optimizer.zero_grad(set_to_none=True)
    bar = tqdm(range(len(log), total), desc="train", unit="step", initial=len(log), total=total, disable=None if rank == 0 else True)
    for step in bar:
        (epoch, k), started = divmod(step, per_epoch), time.perf_counter()
        order = np.random.default_rng([args.seed, epoch]).permutation(len(encoded)).tolist()
        everyone = order[k * args.batch_size:(k + 1) * args.batch_size]
        passes = deal(encoded, everyone, shared, args.micro_tokens, world)[rank]
        mine = {}
        for number, rows in enumerate(passes, 1):
            # DDP sums over processes once, after the last pass. Shards are summed after each: a whole gradient would not fit.
            net.require_backward_grad_sync = number == len(passes)
            batch = pack([encoded[i] for i in rows or everyone[:1]], shared, device)
            with autocast(device, args.precision, not args.shard):
                logps, extra = net(batch, also(step, batch))
            if rows:
                loss, record = losses(log, rows, logps.view(-1, 2), extra if extra is None else extra.view(-1, 2))
                (loss.sum() * (world / len(everyone))).backward()  # processes are averaged; the update is the mean over pairs (D7)
                columns = {"loss": loss.detach(), **record}
                mine |= {i: dict(zip(columns, values)) for i, *values in zip(rows, *(c.tolist() for c in columns.values()))}
            else:
                (0 * logps.sum()).backward()  # a process without pairs takes part in the sum
        merged = merge(mine, world)
        records = {key: [merged[i][key] for i in everyone] for key in merged[everyone[0]]}
        gradient = torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        gradient = getattr(gradient, "full_tensor", lambda: gradient)().item()
        mean = sum(records["loss"]) / len(everyone)
        if not math.isfinite(mean + gradient):
            fail(f"step {step + 1} of {total}: loss {mean}, gradient norm {gradient}; rows {', '.join(ids[i] for i in everyone)}. "
                 f"No weights are saved{f', {saved} is kept' if os.path.exists(saved) else ''}; lower --lr or look at these rows")
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, total, args.lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        margins, seconds = np.array(records["margin"]), time.perf_counter() - started
        rows = [encoded[i] for i in everyone]
        log.append({
            "step": step + 1, "loss": mean, "accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()), "margin": float(margins.mean()),
            "confidence": np.quantile(1 / (1 + np.exp(-margins)), [0.1, 0.5, 0.9]).tolist(), "gradient_norm": gradient, "lr": group["lr"],
            "seconds": seconds, "tokens_per_s": sum(tokens_of(row, shared) for row in rows) / seconds,
            "mfu": training_flops(model, rows, shared) / seconds / peak, "memory_gb": memory_gb(device), **report(log, everyone, records)})
        bar.set_postfix({key: f"{log[-1][key]:.3g}" for key in ("loss", "accuracy", "tokens_per_s", "mfu")})
        if rank == 0:
            with open(f"{args.out}.log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(log[-1]) + "\n")
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < total:
            save_state(saved, net, optimizer, log, settings, rank)
    return log


def main() -> None:
    cli = parser(__doc__)
    training_flags(cli, epochs=3)
    cli.add_argument("--objective", choices=["dpo", "judge"], default="dpo", help="a policy; or an LLM judge (papers: --lr 2e-5)")
    args = cli.parse_args()
    settings = settings_of(args, "model", "pairs")
    if is_done(args.out, settings):
        return clean(args.out)
    judge = args.objective == "judge"
    rows, encoded, net, tokenizer, device, rank, world = begin(args, "preferences", judge_pairs if judge else list)
    reference = None
    if not judge:  # the reference is where training starts, and it never changes: its log-probs are computed once, before the first update
        reference = torch.tensor(score(net, encoded, args.precision, device, rank, world, "reference", not args.shard), device=device)
        if args.shard:
            net.reshard()  # the optimizer is to see shards, not what the last forward pass gathered

    def losses(log, indices, logps, extra):
        if judge:  # supervised: −log π(right letter)
            return -logps[:, 0], {"margin": (logps[:, 0] - logps[:, 1]).detach()}
        margin = dpo_margin(logps, reference[indices], args.beta)
        return dpo_loss(margin), {"margin": margin.detach()}

    log = optimise(net, encoded, [r["id"] for r in rows], losses, args, settings, device, rank, world)
    stats = save_policy(args, net, tokenizer, len(rows), log, settings, rank)
    if rank == 0:
        print(f"seed_dpo: {len(rows)} {'comparisons' if judge else 'gold pairs'}, {len(log)} steps; last epoch: loss {stats['loss']:.3f}, "
              f"accuracy {stats['accuracy']:.2f} → {args.out}")


if __name__ == "__main__":
    run_stage(main)

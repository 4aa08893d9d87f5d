"""Seed stage: plain DPO on a small gold-labelled set, and the pieces that every later stage imports.

    π_0 ← DPO(π_init, D_0)                                                                   S6, from S1 to S5
    logp(y|x) = Σ_t log π(y_t | x, y_<t)                     response tokens only, end-of-turn token included
    margin    M = β[(log π_θ − log π_ref)(y_w) − (log π_θ − log π_ref)(y_l)]
    loss      −log σ(M) = softplus(−M)                       mean over the global batch

`--objective judge` fine-tunes an LLM judge on the same pairs instead: the letter of the better response after SPA's Listing 1.

This file is read first. It owns response log-probabilities, the DPO loss and the optimisation loop; `train.py` runs the
same loop with another loss. How rows become batches is in `data/batches.py`.

    python seed_dpo.py --model models/smollm2 --pairs runs/demo/gold/seed.jsonl --out runs/demo/seed
    torchrun --nproc_per_node=8 seed_dpo.py --model alignment-handbook/zephyr-7b-sft-full --pairs seed.jsonl --out pi_0
"""
import argparse
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data.batches import deal, encode_rows, pack, pair_of, shares_prompt, tokens_of
from data.machine import (autocast, clean, distribute, load, matmul_flops, memory_gb, merge, model_of, restore_state,
                          save_state, start_processes, training_flops)
from data.judges import judge_pairs
from data.rows import (fail, is_done, natural, parser, positive, publish, ranged, read_rows, run_stage, settings_of,
                       write_rows)

if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()

# ------------------------------------------------------------------------------------------ response log-probabilities

def response_hidden(model, batch: dict) -> torch.Tensor:
    """Last hidden states [M, H] at the positions that predict response tokens. Prompt tokens never count."""
    out = model.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"],
                           attention_mask=batch["attention_mask"], use_cache=False)
    return out.last_hidden_state.flatten(0, 1)[batch["where"]]


def token_logps(head, hidden: torch.Tensor, target: torch.Tensor, also: Callable | None = None,
                chunk: int = 1024) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log π(target) [M], fp32 at least, from hidden states [M, H], `chunk` tokens of logits at a time, recomputed in backward.

    A [B, T, V] tensor of logits is the memory peak of naive code; here [chunk, V] is the largest that exists. Also
    returns what `also(logits, part)` makes of each chunk's logits [c, V], without gradient; `part` is its slice of 0 … M.
    """
    def piece(h: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = head(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logps = logits.log_softmax(-1).gather(-1, target[part, None])[:, 0]
        with torch.no_grad():  # last, because recomputation in backward stops where it has what the gradient needs
            return logps, also(logits.detach(), part) if also else None
    parts = [slice(i, i + chunk) for i in range(0, len(target), chunk)]
    run = functools.partial(checkpoint, piece, use_reentrant=False) if torch.is_grad_enabled() else piece
    logps, extra = zip(*(run(hidden[part], part) for part in parts))
    return torch.cat(logps), torch.cat(extra) if also else None


def sum_by_response(values: torch.Tensor, batch: dict) -> torch.Tensor:
    """Sums [R] of per-token values [M] over each response."""
    return torch.stack([own.sum() for own in values.split(batch["lengths"])])


class ResponseLogps(torch.nn.Module):
    """The model as the function that is trained: batch → response log-probs [R], and sums [R] of what `also` computes.

    DDP and FSDP must wrap exactly the forward pass that is used, or their hooks never fire.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def hidden(self, batch: dict) -> torch.Tensor:
        return response_hidden(self.model, batch)

    def forward(self, batch: dict, also: Callable | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden = response_hidden(self.model, batch)
        logps, extra = token_logps(self.model.get_output_embeddings(), hidden, batch["target"], also)
        return sum_by_response(logps, batch), extra if extra is None else sum_by_response(extra, batch)


@torch.no_grad()
def score(net: torch.nn.Module, encoded: list, precision: str, device: torch.device, rank: int = 0, world: int = 1,
          title: str = "score", cache: bool = True) -> list[list[float]]:
    """log-probs of every response of every row, on all processes; the rows are dealt out to them."""
    shared, budget = shares_prompt(model_of(net), encoded), 16384 if device.type == "cuda" else 2048  # tokens that keep it busy
    mine = {}
    for rows in tqdm(deal(encoded, range(len(encoded)), shared, budget, world)[rank], desc=title, unit="batch",
                     disable=None if rank == 0 else True):
        with autocast(device, precision, cache):
            values = iter(net(pack([encoded[i] for i in rows or [0]], shared, device))[0].tolist())
        mine.update({i: [next(values) for _ in encoded[i][1]] for i in rows})
    merged = merge(mine, world)
    return [merged[i] for i in range(len(encoded))]


# ------------------------------------------------------------------------------------------------- loss and optimisation


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

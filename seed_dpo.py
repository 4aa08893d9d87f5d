"""Seed stage: plain DPO on a small gold-labelled set, and the pieces that every later stage imports.

    π_0 ← DPO(π_init, D_0)                                                                   S6, from S1 to S5
    logp(y|x) = Σ_t log π(y_t | x, y_<t)                     response tokens only, end-of-turn token included
    margin    M = β[(log π_θ − log π_ref)(y_w) − (log π_θ − log π_ref)(y_l)]
    loss      −log σ(M) = softplus(−M)                       mean over the global batch

This file is read first. It owns response log-probabilities, the DPO loss and the optimisation loop; `train.py` runs the
same loop with another loss. Rows and their tokens are in `data/rows.py`.

    python seed_dpo.py --model models/smollm2 --pairs runs/demo/gold/seed.jsonl --out runs/demo/seed
    torchrun --nproc_per_node=8 seed_dpo.py --model alignment-handbook/zephyr-7b-sft-full --pairs seed.jsonl --out pi_0
"""
import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data.rows import (encode_rows, fail, is_done, natural, pair_of, parser, positive, publish, ranged, read_rows,
                       run_stage, settings_of, write_rows)

if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()

# ---------------------------------------------------------------------------------------------- processes and models


def start_processes() -> tuple[int, int, torch.device]:
    """(rank, world size, device). Under torchrun joins the process group; alone there is none and nothing changes."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:  # the limit covers one stage's slowest rank, not one collective: ranks meet only when work is done
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=3))
    return int(os.environ.get("RANK", 0)), world, device


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 here: a recent GPU, or a CPU with AVX512-BF16 or AMX."""
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def autocast(device: torch.device, precision: str):
    """bf16 matrix products over fp32 weights where `precision` says so; norms, log-softmax and sums stay in fp32 (D8)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" or precision == "auto" and bf16_pays(device))


def load(path: str, device: torch.device, dtype: torch.dtype = torch.float32):
    """(model, tokenizer) of a causal LM from a folder or the hub: safetensors only, no remote code, dropout off.

    Dropout stays off in training too: policy and reference must be the same function of the same tokens (D8).
    """
    if not os.path.isdir(path) and (os.path.exists(path) or path.startswith((".", "/")) or path.count("/") != 1):
        fail(f"{path}: no such model folder, and not the id of a model on the hub")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot load the model: {str(error).splitlines()[0]}")
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        fail(f"{path}: the tokenizer needs a chat template (chat_template.jinja in the model folder) and an end-of-sequence token")
    if any(getattr(model.config, key, None) for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")):
        fail(f"{path}: not supported, because the logits of {model.config.model_type} are not lm_head(hidden)")
    return model.to(device).eval(), tokenizer


# ------------------------------------------------------------------------------------------ response log-probabilities

# One sequence for all responses to a prompt needs attention that follows a given mask and given positions and nothing else.
SHARES_PROMPT = {"llama", "mistral", "phi3", "qwen2"}


def shares_prompt(model) -> bool:
    """Whether responses may share their prompt's forward pass: a plain-attention family, no sliding window in the way."""
    return model.config.model_type in SHARES_PROMPT and not getattr(model.config, "sliding_window", None)


def pack(encoded: list, shared: bool, device: torch.device) -> dict:
    """A batch of `encoded` rows: B sequences `prompt y_1 y_2 …` if `shared`, else one sequence per response.

    Siblings are hidden from one another by the mask and each starts at the position after the prompt, so every response
    sees what it would see alone (Wang & Hegde 2024), and the prompt is computed once. A response's last token is
    predicted, never read, so it is left out.

    Returns input_ids, position_ids [B, T]; attention_mask bool [B, 1, T, T], None where the causal mask is right already
    (padding stands on the right); and for the M response tokens of the R responses: where [M] (flat index of the position
    that predicts the token), target [M], owner [M] (which response, in row order), and R.
    """
    rows = encoded if shared else [(prompt, [y]) for prompt, ys in encoded for y in ys]
    width = max(len(p) + sum(len(y) - 1 for y in ys) for p, ys in rows)
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    part = torch.full((len(rows), width), -1)  # 0 the prompt, 1, 2, … its responses, −1 padding
    where, target, owner, count = [], [], [], 0
    for b, (prompt, ys) in enumerate(rows):
        n = end = len(prompt)
        ids[b, :n], positions[b, :n], part[b, :n] = torch.tensor(prompt), torch.arange(n), 0
        for j, y in enumerate(ys, 1):
            start, end = end, end + len(y) - 1
            ids[b, start:end], part[b, start:end] = torch.tensor(y[:-1], dtype=torch.long), j
            positions[b, start:end] = torch.arange(n, n + len(y) - 1)
            where += [b * width + n - 1, *range(b * width + start, b * width + end)]
            target, owner, count = target + y, owner + [count] * len(y), count + 1
    mask = None
    if shared and any(len(ys) > 1 for _, ys in rows):
        query, key = part[:, :, None], part[:, None, :]
        mask = ((key == 0) | (key == query)) & torch.ones(width, width, dtype=torch.bool).tril()
        mask = mask[:, None].to(device)
    flat = {k: torch.tensor(v, device=device) for k, v in {"where": where, "target": target, "owner": owner}.items()}
    return {"input_ids": ids.to(device), "position_ids": positions.to(device), "attention_mask": mask, **flat, "R": count}


def response_hidden(model, batch: dict) -> torch.Tensor:
    """Last hidden states [M, H] at the positions that predict response tokens. Prompt tokens never count."""
    out = model.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"],
                           attention_mask=batch["attention_mask"], use_cache=False)
    return out.last_hidden_state.flatten(0, 1)[batch["where"]]


def token_logps(head, hidden: torch.Tensor, target: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
    """log π(target) [M] fp32 from hidden states [M, H], `chunk` tokens of logits at a time, recomputed in backward.

    A [B, T, V] tensor of logits is the memory peak of naive code; here [chunk, V] is the largest that exists.
    """
    def piece(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return head(h).float().log_softmax(-1).gather(-1, t[:, None])[:, 0]
    return torch.cat([checkpoint(piece, h, t, use_reentrant=False) if torch.is_grad_enabled() else piece(h, t)
                      for h, t in zip(hidden.split(chunk), target.split(chunk))])


def sum_by_response(values: torch.Tensor, batch: dict) -> torch.Tensor:
    """Sums [R] of per-token values [M] over each response."""
    return torch.zeros(batch["R"], device=values.device).index_add(0, batch["owner"], values)


class ResponseLogps(torch.nn.Module):
    """The model as the function that is trained: batch → (response log-probs [R], hidden states [M, H]).

    DDP must wrap exactly the forward pass that is used, or its gradient hooks never fire.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = response_hidden(self.model, batch)
        return sum_by_response(token_logps(self.model.get_output_embeddings(), hidden, batch["target"]), batch), hidden


def in_order(mine: dict[int, object], world: int) -> list:
    """The values of all ranks' {index: value}, by index, on every rank."""
    parts = [mine]
    if world > 1:
        dist.all_gather_object(parts := [None] * world, mine)
    return [value for _, value in sorted(item for part in parts for item in part.items())]


@torch.no_grad()
def score(model, encoded: list, precision: str, rank: int = 0, world: int = 1, title: str = "score") -> list[list[float]]:
    """log-probs of every response of every row, in row order on all ranks; rows are split over ranks, longest first."""
    shared, budget = shares_prompt(model), 16384 if model.device.type == "cuda" else 2048  # tokens: what keeps the device busy
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]) - sum(map(len, encoded[i][1])))[rank::world]
    batches, tokens = [[]], 0
    for i in order:
        tokens += len(encoded[i][0]) * (1 if shared else len(encoded[i][1])) + sum(map(len, encoded[i][1]))
        if batches[-1] and tokens > budget * len(batches):
            batches.append([])
        batches[-1].append(i)
    mine = {}
    for indices in tqdm(batches if order else [], desc=title, unit="batch", disable=None if rank == 0 else True):
        with autocast(model.device, precision):
            batch = pack([encoded[i] for i in indices], shared, model.device)
            values = iter(ResponseLogps(model)(batch)[0].tolist())
        mine.update({i: [next(values) for _ in encoded[i][1]] for i in indices})
    return in_order(mine, world)


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


def optimise(model, encoded: list, ids: list[str], losses: Callable, after_step: Callable, args: argparse.Namespace,
             rank: int, world: int) -> list[dict]:
    """Minimise the mean over global batches of `losses(step, rows, batch, hidden, logps)`; returns one log row a step.

    `losses` gets the row numbers [m] of a micro-batch, its packed batch, hidden states [M, H] and log-probs [m, 2], and
    returns losses [m] and a dict of per-pair records [m]. `after_step(step, records)` gets the records of the whole global
    batch in its order, whatever the number of processes, and returns what else is to be logged. Raises SystemExit if the
    loss or the gradient is not finite.
    """
    device, shared = model.device, shares_prompt(model)
    net = ResponseLogps(model)
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    per_epoch = math.ceil(len(encoded) / args.batch_size)
    total, log = per_epoch * args.epochs, []
    bar = tqdm(range(total), desc="train", unit="step", disable=None if rank == 0 else True)
    for step in bar:
        (epoch, k), started = divmod(step, per_epoch), time.perf_counter()
        order = np.random.default_rng([args.seed, epoch]).permutation(len(encoded)).tolist()
        everyone = order[k * args.batch_size:(k + 1) * args.batch_size]
        mine = everyone[rank::world] or everyone[:1]  # a rank without pairs joins in the sum with a weight of zero
        weight = world / len(everyone) if everyone[rank::world] else 0.0  # DDP averages over ranks; D7 over pairs
        micros = [mine[i:i + args.micro_batch] for i in range(0, len(mine), args.micro_batch)]
        records, tokens = {}, 0
        for rows in micros:
            with contextlib.nullcontext() if rows is micros[-1] or world == 1 else net.no_sync():
                batch = pack([encoded[i] for i in rows], shared, device)
                with autocast(device, args.precision):
                    logps, hidden = net(batch)
                loss, record = losses(step, rows, batch, hidden, logps.view(-1, 2))
                (loss.sum() * weight).backward()
            tokens += batch["input_ids"].numel()
            for key, value in {"loss": loss, **record}.items():
                records.setdefault(key, []).extend(value.detach().tolist())
        if world > 1:
            dist.all_gather_object(parts := [None] * world, records)
            records = {key: [parts[i % world][key][i // world] for i in range(len(everyone))] for key in records}
        gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip).item()
        mean = sum(records["loss"]) / len(everyone)
        if not math.isfinite(mean + gradient):
            fail(f"step {step + 1} of {total}: loss {mean}, gradient norm {gradient}; rows "
                 f"{', '.join(ids[i] for i in everyone)}. No weights are saved; lower --lr or look at these rows")
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, total, args.lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        accuracy = sum((m > 0) + 0.5 * (m == 0) for m in records["margin"]) / len(everyone)
        log.append({"step": step + 1, "loss": mean, "accuracy": accuracy, "margin": sum(records["margin"]) / len(everyone),
                    "gradient_norm": gradient, "lr": group["lr"], "tokens_per_s": world * tokens / (time.perf_counter() - started),
                    **after_step(step, everyone, records)})
        bar.set_postfix(loss=f"{mean:.3f}", accuracy=f"{accuracy:.2f}", tok_s=f"{log[-1]['tokens_per_s']:.0f}")
    return log


def save_policy(args: argparse.Namespace, model, tokenizer, pairs: int, log: list[dict], settings: dict, **stats) -> dict:
    """Publish a Hugging Face folder (safetensors, fp32) with the tokenizer and log.jsonl, one line a step; returns the stats."""
    def write(tmp: str) -> None:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        write_rows(f"{tmp}/log.jsonl", log)
    last = log[-(len(log) // args.epochs):]
    stats |= {"pairs": pairs, "steps": len(log), **{k: sum(r[k] for r in last) / len(last) for k in ("loss", "accuracy")}}
    publish(args.out, settings, stats, write)
    return stats


def training_flags(cli: argparse.ArgumentParser, epochs: int) -> None:
    """The flags that seed_dpo.py and train.py share."""
    cli.add_argument("--model", required=True, help="where training starts: a Hugging Face folder or hub id; also the reference")
    cli.add_argument("--pairs", required=True, help="preference rows (JSONL)")
    cli.add_argument("--out", required=True, help="folder of the trained policy")
    cli.add_argument("--beta", type=positive, default=0.1, help="weight of the KL term (papers: 0.1; LLaMA-3 0.01 or 0.05)")
    cli.add_argument("--lr", type=positive, default=5e-7, help="peak learning rate (papers: 5e-7 at 7 B, 5e-6 Phi-2)")
    cli.add_argument("--epochs", type=natural, default=epochs, help=f"passes over the pairs (papers: {epochs})")
    cli.add_argument("--batch-size", type=natural, default=32, help="pairs an update, over all processes (papers: 32)")
    cli.add_argument("--micro-batch", type=natural, default=4, help="pairs a forward pass and process; memory, not mathematics")
    cli.add_argument("--clip", type=positive, default=1.0, help="gradient norm above which gradients are scaled down")
    cli.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of matrix products; weights stay fp32")
    cli.add_argument("--seed", type=ranged(int, 0), default=42, help="decides the order of the pairs")


def main() -> None:
    cli = parser(__doc__)
    training_flags(cli, epochs=3)
    args = cli.parse_args()
    settings = settings_of(args, "model", "pairs")
    if is_done(args.out, settings):
        return
    rows = read_rows(args.pairs, "preferences")
    rank, world, device = start_processes()
    model, tokenizer = load(args.model, device)
    encoded = encode_rows(model, tokenizer, rows, args.pairs, pair_of)
    # The reference is where training starts, and it never changes: its log-probs are computed once, before the first update.
    reference = torch.tensor(score(model, encoded, args.precision, rank, world, "reference"), device=device)

    def losses(step, indices, batch, hidden, logps):
        margin = dpo_margin(logps, reference[indices], args.beta)
        return dpo_loss(margin), {"margin": margin}

    log = optimise(model, encoded, [r["id"] for r in rows], losses, lambda *_: {}, args, rank, world)
    if rank == 0:
        stats = save_policy(args, model, tokenizer, len(rows), log, settings)
        print(f"seed_dpo: {len(rows)} gold pairs, {len(log)} steps; last epoch: loss {stats['loss']:.3f}, "
              f"accuracy {stats['accuracy']:.2f} → {args.out}")


if __name__ == "__main__":
    run_stage(main)

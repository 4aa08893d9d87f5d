"""Seed stage: plain DPO on a small gold-labelled set.

    π_0 ← DPO(π_init, D_0)                                                      S6, from S1 to S5
    logp(y|x) = Σ_t log π(y_t | x, y_<t)         response tokens only, end-of-turn token included
    margin    M = β[(log π_θ − log π_ref)(y_w) − (log π_θ − log π_ref)(y_l)]
    loss      −log σ(M) = softplus(−M)                                 mean over the global batch

Of the stages this is read first: it owns the DPO margin, its loss and the learning rate, and shows
the loop. train.py shows the same loop with SPA's refinement and the worst case in it. log-probs are
computed in core/policy.py; how a batch is spread over passes and processes, in core/training.py.

`--objective judge` makes an LLM judge: it learns −log π of the right letter, where each gold pair
is asked in both orders (judges/comparisons.py).

    python seed_dpo.py --model models/smollm2 --pairs runs/demo/gold/seed/seed.jsonl \\
        --out runs/alone --epochs 1 --lr 8e-6 --batch-size 16
    torchrun --nproc_per_node=8 seed_dpo.py --model MODEL --pairs seed.jsonl --out pi_0
"""
import argparse
import math
import time

from core.stage import run_stage, start_training, training_flags


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the output is complete."""
    # --model --pairs --out --beta --lr --epochs --batch-size --precision --seed; for memory
    # --micro-tokens --gradient-checkpointing --shard; for kills --save-every
    cli = training_flags(__doc__, epochs=3)
    cli.add_argument("--objective", choices=["dpo", "judge"], default="dpo",
                     help="or an LLM judge of these pairs (papers: --lr 2e-5)")
    args = cli.parse_args()
    if args.objective == "judge":
        # Unused: None, so that another value is no other setting.
        args.beta = None
    start_training(args)
    return args


if __name__ == "__main__":
    args = flags()  # here already: what is imported below takes seconds to load

import torch
import torch.nn.functional as F

from core.rows import read_rows
from core.training import (
    batches,
    begin,
    gather,
    micro_batches,
    record_step,
    reference_logps,
    resume,
    save_policy,
    update,
)
from judges.comparisons import comparisons


def dpo_margin(logps: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """M = β[(log π_θ − log π_ref)(y_w) − (log π_θ − log π_ref)(y_l)] [m], from log-probs [m, 2]
    (chosen, rejected)."""
    ratio = logps - reference
    return beta * (ratio[:, 0] - ratio[:, 1])


def dpo_loss(margin: torch.Tensor) -> torch.Tensor:
    """−log σ(M) (S6) as softplus(−M): finite and with a gradient for every finite M."""
    return F.softplus(-margin)


def lr_at(step: int, total: int, peak: float) -> float:
    """Learning rate of a step in 0 … total − 1: linear warm-up over the first 10 % of them, then a
    cosine to zero."""
    warmup = max(1, round(0.1 * total))
    done = max(0, step - warmup) / max(1, total - warmup)
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * done)))


def main(args: argparse.Namespace) -> None:
    rows = read_rows(args.pairs, "preferences")
    is_judge = args.objective == "judge"          # an LLM judge learns −log π of the right letter
    run = begin(args, comparisons(rows) if is_judge else rows)
    if is_judge:
        # No reference: the margin is only logged, and its sign is the accuracy.
        beta, logp_ref = 1.0, torch.zeros(len(run.rows), 2, device=run.device)
    else:
        beta, logp_ref = args.beta, reference_logps(run)

    log = resume(run)                                         # empty, unless a kill left some
    for step, batch in batches(run, log):                               # B ~ D_0
        started = time.perf_counter()
        per_pass = []
        for indices, tokens, scale in micro_batches(run, batch):
            with run.autocast:
                logp, _ = run.policy(tokens)
            logp = logp.view(-1, 2)                                     # chosen, rejected
            margin = dpo_margin(logp, logp_ref[indices], beta)
            # L = −log σ(M)                                                                    S6
            loss = -logp[:, 0] if is_judge else dpo_loss(margin)
            (scale * loss.sum()).backward()                             # ∇ of the mean over B    D7
            # One margin: training starts at the anchor.
            columns = {"loss": loss, "margin": margin, "round_margin": margin}
            per_pass.append((indices, scale, columns))
        pairs = gather(per_pass, batch)                                 # of all processes
        lr = lr_at(step, run.total, args.lr)
        norm = update(run, lr)                                          # θ ← θ − η∇L
        record_step(run, log, batch, pairs, lr, norm, started)

    stats = save_policy(run, log)
    print(f"seed_dpo: {len(run.rows)} {'letters' if is_judge else 'gold pairs'}, "
          f"{len(log)} steps; last epoch: loss {stats['loss']:.3f}, "
          f"accuracy {stats['accuracy']:.2f}{stats['diverged']} → {args.out}")


if __name__ == "__main__":
    run_stage(main, args)

"""Leader stage: preference learning on noise-refined labels (SPA) under the follower's worst case.

    h̃ = (1 + λ) h_θ − λ h_ref per token, renormalised; summed to log π̃(y)                      S12
    p̃_i = σ(β[(log π̃ − log π_ref)(y_w) − (log π̃ − log π_ref)(y_l)])
    z_i = 1 if p̃_i < τ, τ the 10th percentile of p̃ over the last 50 pairs                S9, S11, D3
    L_i = (1 − α z_i) Σ_j w_ij ℓ*(ξ_θ,i − shift_ij) + α z_i (−log(1 − ξ_θ,i))
                                                      S10 over the atoms of T2-5; D4, D5, D6
    ξ_θ,i = σ(m_i + β[(log π_θ − log π_ref)(y_w) − (log π_θ − log π_ref)(y_l)])               D6
    ℓ* = −log, straight below 1/K; an atom of shift 0 has −log ξ_θ,i itself                   D5

π_ref = π_{t−1} is where training starts; its log-probs are in the rows. m_i is the row's margin,
π_{t−1}'s against π_init, with --anchor init: ξ_θ is then measured against π_init, as the follower's
ξ was, and that is what dro.py's rows need unless its ε was 0. With --anchor previous, the default,
m_i = 0. Without atoms that is SPA; with --alpha 0 as well, DPO.

    python train.py --model runs/demo/seed --pairs worst.jsonl --out policy --anchor init --lam 0.5
    torchrun --nproc_per_node=8 train.py --model pi_0 --pairs worst.jsonl --out pi_1 --anchor init
"""
import argparse
import math
import time

from core.stage import ranged, run_stage, share, start_training, training_flags


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the output is complete."""
    # --model --pairs --out --beta --lr --epochs --batch-size --precision --seed; for memory
    # --micro-tokens --gradient-checkpointing --shard; for kills --save-every
    cli = training_flags(__doc__, epochs=1)
    cli.add_argument("--alpha", type=share, default=0.1,
                     help="label smoothing of flagged pairs (S10; papers: 0.1; 0 for none)")
    cli.add_argument("--lam", type=ranged(float, 0), default=0.5,
                     help="extrapolation (S12; papers: 1/2, 1/4, 1/8 by round; 0 for S9)")
    cli.add_argument("--percentile", type=ranged(float, 0, 100), default=10.0,
                     help="least confident share to flag, in percent (papers: K = 10)")
    cli.add_argument("--anchor", choices=["init", "previous"], default="previous",
                     help="ξ_θ is measured against π_init (worst case) or π_{t−1} (SPA) (D6)")
    args = cli.parse_args()
    # Without one of them nothing is flagged.
    if not args.alpha or not args.percentile:
        args.alpha = args.lam = args.percentile = 0.0
    start_training(args)
    return args


if __name__ == "__main__":
    args = flags()  # here already: what is imported below takes seconds to load

import torch

from core.rows import AGAINST_INIT, check_margins, fail, read_rows
from core.training import (
    batches,
    begin,
    gather,
    micro_batches,
    record_step,
    reference_policy,
    resume,
    save_policy,
    update,
)
from seed_dpo import dpo_loss, dpo_margin, lr_at

WINDOW = 50  # pairs that τ looks back on (SPA, B.4)
QUIET = 0.2  # share of the steps, the first, in which nothing is flagged (SPA, B.4)


def threshold(log: list[dict], percentile: float) -> float:
    """τ (S11): a percentile of p̃ over the latest pairs of the log; −∞, which flags nothing, while
    it has none."""
    # WINDOW watched steps hold WINDOW pairs or more.
    window = [p for row in log[-WINDOW:] for p in row["p_tilde"]][-WINDOW:]
    if not window:
        return -math.inf
    return torch.quantile(torch.tensor(window, dtype=torch.float64), percentile / 100).item()


def loss_star(xi: torch.Tensor, pieces: int) -> torch.Tensor:
    """ℓ* (D5): −log ξ, continued below 1/K by its tangent there; K is `pieces`. Convex, once
    differentiable, slope never beyond −K."""
    low = xi < 1 / pieces
    tangent = 1 + math.log(pieces) - pieces * xi
    return torch.where(low, tangent, -torch.log(torch.where(low, 1.0, xi)))


def leader_loss(margin: torch.Tensor, flag: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor,
                alpha: float, pieces: int) -> torch.Tensor:
    """L_i [m] from margins [m], noise flags z [m] (0 or 1) and atoms: weight, shift [m, A], padded
    with weight 0.

    An atom that the follower left in place has the exact −log ξ_θ, which is S10, and DPO without
    atoms; ℓ* is needed only where ξ_θ − shift can leave (0, 1]. −log(1 − ξ_θ) is the DPO loss of
    the opposite label.
    """
    xi = torch.sigmoid(margin)[:, None]
    atom = torch.where(shift == 0, dpo_loss(margin)[:, None], loss_star(xi - shift, pieces))
    return (1 - alpha * flag) * (weight * atom).sum(-1) + alpha * flag * dpo_loss(-margin)


def atoms_of(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and shifts [N, A] of the rows' atoms (T2-5); a row without any has one of weight 1 in
    place."""
    atoms = [row.get("atoms", [[1.0, 0.0]]) for row in rows]
    width = max(map(len, atoms))
    padded = torch.tensor([pair + [[0.0, 0.0]] * (width - len(pair)) for pair in atoms])
    weight, shift = padded.unbind(-1)
    return weight, shift


def needed_of(args: argparse.Namespace, policy: str, precision: str) -> tuple[dict, str]:
    """What the rows' `margin_of` must say (D10), and the remedy where it does not: log-probs of
    `policy` (a fingerprint) at this precision and, where the margin is used, one against π_init."""
    needed = {"policy": policy, "precision": precision}
    remedy = (f"label.py must score these rows by --model {args.model}, if that wrote them, with "
              f"--precision {precision} (PRECISION)")
    if args.anchor == "init":
        needed |= AGAINST_INIT | {"beta": args.beta}
        remedy += (f", judge implicit, reference init and --beta {args.beta} (D6), or take "
                   "--anchor previous")
    return needed, remedy


def main(args: argparse.Namespace) -> None:
    run = begin(args, read_rows(args.pairs, "labelled"))
    device = run.device
    needed, remedy = needed_of(args, args.settings["model"], run.precision)
    check_margins(run.rows, args.pairs, needed, remedy)
    weight, shift = atoms_of(run.rows)
    if args.anchor == "previous" and bool(((shift != 0) & (weight > 0)).any()):
        fail(f"{args.pairs} has a worst case of confidences against π_init: give --anchor init; "
             "against π_{t−1} it would be applied to others (D6)")
    all_pieces = {row.get("pieces", 1) for row in run.rows}   # without atoms any number would do
    if len(all_pieces) > 1:
        fail(f"{args.pairs}: 'pieces' (K) must be one number in all rows, found "
             f"{sorted(all_pieces)}")
    (pieces,) = all_pieces                                    # ℓ* is straight below 1/K
    weight, shift = weight.to(device), shift.to(device)
    logp_ref = torch.tensor([[row["chosen_logp"], row["rejected_logp"]] for row in run.rows],
                            device=device)
    # m: the margin of π_{t−1} against π_init, which label.py wrote; 0 where the anchor is π_{t−1}
    margin_init = torch.zeros(len(run.rows), device=device)
    if args.anchor == "init":
        margin_init = torch.tensor([row["margin"] for row in run.rows], device=device)
    detect = args.alpha > 0
    first_flag = math.ceil(QUIET * run.total)                 # before it every label is trusted
    first_seen = first_flag - math.ceil(WINDOW / args.batch_size)  # p̃ from here on fills τ's window
    extrapolate = detect and args.lam > 0                     # nothing else needs the model π_ref
    policy_ref = reference_policy(run) if extrapolate else None

    log = resume(run)                                         # empty, unless a kill left some
    for step, batch in batches(run, log):                               # B ~ D_t
        started = time.perf_counter()
        watching = detect and step >= first_seen
        flagging = detect and step >= first_flag
        tau = threshold(log, args.percentile) if flagging else -math.inf                 # S11, D3
        per_pass = []
        for indices, tokens, scale in micro_batches(run, batch):
            reference = None
            if extrapolate and watching:
                with torch.no_grad(), run.autocast:
                    reference = policy_ref.as_reference(tokens)
            with run.autocast:
                logp, logp_tilde = run.policy(tokens, reference, args.lam)                   # S12
            logp = logp.view(-1, 2)                                     # chosen, rejected
            logp_tilde = logp_tilde.view(-1, 2)
            # z: does the extrapolated policy doubt the label? Until `first_seen` p̃ is not used: no
            # reference model runs, and π̃ is π.                                       S9, S11
            p_tilde = torch.sigmoid(dpo_margin(logp_tilde, logp_ref[indices], args.beta))
            z = (p_tilde < tau).float()
            # L: the refined label under the worst case      S10, T2-5, D4, D5, D6
            round_margin = dpo_margin(logp, logp_ref[indices], args.beta)   # M against π_{t−1}
            margin = margin_init[indices] + round_margin                    # M against the anchor
            loss = leader_loss(margin, z, weight[indices], shift[indices], args.alpha, pieces)
            (scale * loss.sum()).backward()                             # ∇ of the mean over B, D7
            columns = {"loss": loss, "margin": margin, "round_margin": round_margin,
                       "p_tilde": p_tilde, "z": z}
            per_pass.append((indices, scale, columns))
        pairs = gather(per_pass, batch)                                 # of all processes
        lr = lr_at(step, run.total, args.lr)
        norm = update(run, lr)                                          # θ ← θ − η∇L
        flagged = [run.rows[i]["id"] for i, flag in zip(batch, pairs["z"]) if flag]
        record_step(run, log, batch, pairs, lr, norm, started,
                    tau=tau if math.isfinite(tau) else None,
                    batch=[run.rows[i]["id"] for i in batch],
                    flagged_share=len(flagged) / len(batch), flagged=flagged,
                    p_tilde=pairs["p_tilde"] if watching else [])

    flagged = sum(len(row["flagged"]) for row in log)
    stats = save_policy(run, log, anchor=args.anchor, flagged=flagged)
    print(f"train: {len(run.rows)} pairs, {len(log)} steps, anchor {args.anchor}; last epoch: "
          f"accuracy {stats['accuracy']:.2f}, margin {stats['margin']:.3f}; {flagged} labels "
          f"flagged as noise{stats['diverged']} → {args.out}")


if __name__ == "__main__":
    run_stage(main, args)

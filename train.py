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
import sys
import time

from core.flags import training_flags
from core.stage import (
    exit_if_complete,
    exit_if_looking,
    parser,
    ranged,
    run_stage,
    settings_of,
    share,
)


def flags() -> tuple[argparse.Namespace, dict]:
    """The arguments, and what decides the output. Ends the program where that is complete."""
    cli = parser(__doc__)
    training_flags(cli, epochs=1)
    cli.add_argument("--alpha", type=share, default=0.1,
                     help="label smoothing of flagged pairs (S10; papers: 0.1; 0 for none)")
    cli.add_argument("--lam", type=ranged(float, 0), default=0.5,
                     help="extrapolation (S12; papers: 1/2, 1/4, 1/8 by round; 0 for S9)")
    cli.add_argument("--percentile", type=ranged(float, 0, 100), default=10.0,
                     help="least confident share to flag, in percent (papers: K = 10)")
    cli.add_argument("--anchor", choices=["init", "previous"], default="previous",
                     help="ξ_θ is measured against π_init (worst case) or π_{t−1} (SPA) (D6)")
    args = cli.parse_args()
    settings = settings_of(args, "model", "pairs")
    exit_if_complete(args.out, settings)
    exit_if_looking()
    return args, settings


if __name__ == "__main__":
    args, settings = flags()  # here already: what is imported below takes seconds to load

import numpy as np
import torch

from core.chat import from_text, pair_of
from core.models import load_model, load_outline
from core.parallel import distribute
from core.policy import ResponseLogps
from core.rows import fail, margin_problem, is_number
from core.training import (
    Run,
    batch_at,
    begin,
    gather,
    keep,
    log_row,
    micro_batches,
    note,
    precision,
    resume,
    save_policy,
    steps,
    update,
)
from seed_dpo import dpo_loss, dpo_margin, lr_at

WINDOW = 50  # pairs that τ looks back on (SPA, B.4)
QUIET = 0.2  # share of the steps, the first, in which nothing is flagged (SPA, B.4)


def threshold(log: list[dict], percentile: float) -> float:
    """τ (S11): a percentile of p̃ over the latest pairs of the log; −∞, which flags nothing, while
    it has none."""
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


def atoms_of(rows: list[dict], path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and shifts [N, A] of the rows' atoms, checked; rows without any have one of weight 1
    in place."""
    atoms = [row.get("atoms", [[1.0, 0.0]]) for row in rows]
    for number, own in enumerate(atoms, 1):
        try:
            sound = all(is_number(w) and is_number(s) and w >= 0 for w, s in own)
            sound = sound and abs(sum(w for w, _ in own) - 1) < 1e-6
        except (TypeError, ValueError):
            sound = False
        if not sound:
            fail(f"{path}: row {number}: 'atoms' must be [[weight, shift], …], weights ≥ 0 that "
                 f"sum to 1; found {own!r:.80}")
    width = max(map(len, atoms))
    padded = torch.tensor([own + [[0.0, 0.0]] * (width - len(own)) for own in atoms])
    weight, shift = padded.unbind(-1)
    return weight, shift


def pieces_of(rows: list[dict], path: str) -> int:
    """K, where ℓ* becomes straight (D5), as dro.py wrote it. Rows without a moved atom need none,
    and 1 stands in."""
    found = {row["pieces"] for row in rows if "pieces" in row}
    moved = any(shift for row in rows for _, shift in row.get("atoms", []))
    if len(found) > 1 or moved and not all("pieces" in row for row in rows):
        fail(f"{path}: 'pieces' (K) must be one number in all rows, found {sorted(found)}")
    return found.pop() if found else 1


def check_margins(run: Run) -> int:
    """How many rows do not say what their margin is. Ends the program at a row whose log-probs are
    another policy's, or, where the margin is used, whose margin is not against π_init (D10)."""
    args = run.args
    silent = 0
    for row in run.rows:
        if "margin_of" not in row:
            silent += 1
            continue
        where = f"{args.pairs}: id {row['id']!r}: "
        policy = row["margin_of"]["policy"]
        if policy not in (None, run.settings["model"]):
            fail(f"{where}its margin_of has policy {policy}, {args.model} is "
                 f"{run.settings['model']}; label.py --model must name the same policy")
        other = margin_problem(row, args.beta) if args.anchor == "init" else None
        if other:
            fail(f"{where}{other}; --anchor init adds margins against π_init at --beta {args.beta} "
                 "(D6): label with judge implicit and reference init, or take --anchor previous")
    return silent


def reference_policy(run: Run) -> torch.nn.Module:
    """π_ref, frozen, over all processes as the policy is."""
    args = run.args
    if args.shard and run.rank > 0:
        model = load_outline(args.model)
    else:
        model = load_model(args.model, torch.device("cpu") if args.shard else run.device)
    return distribute(ResponseLogps(model), run.device, run.world, args)


def warn_if_far(run: Run, gain: list[float]) -> None:
    """Say so where the rows' log-probs are not the policy's: before the first update a gain is 0,
    but for rounding."""
    typical = float(np.median(np.abs(gain)))
    if run.rank == 0 and typical > 2.5 * run.args.beta:
        print(f"warning: {run.args.pairs}: log-probs in the rows are not those of {run.args.model} "
              f"(half of the first batch is off by more than {typical / run.args.beta:.1f} nats); "
              "label.py --model must name the same policy", file=sys.stderr, flush=True)


def main(args: argparse.Namespace, settings: dict) -> None:

    run = begin(args, settings, "labelled")
    device = run.device
    silent = check_margins(run)
    weight, shift = atoms_of(run.rows, args.pairs)
    pieces = pieces_of(run.rows, args.pairs)
    if args.anchor == "previous" and bool(((shift != 0) & (weight > 0)).any()):
        fail(f"{args.pairs} has a worst case of confidences against π_init: give --anchor init; "
             "against π_{t−1} it would be applied to others (D6)")
    weight, shift = weight.to(device), shift.to(device)
    logp_ref = torch.tensor([[row["chosen_logp"], row["rejected_logp"]] for row in run.rows],
                            device=device)
    # m: the margin of π_{t−1} against π_init, which label.py wrote; 0 where the anchor is π_{t−1}
    stored = torch.zeros(len(run.rows), device=device)
    if args.anchor == "init":
        stored = torch.tensor([r["margin"] for r in run.rows], device=device)
    detect = args.alpha > 0 and args.percentile > 0
    first_flag = math.ceil(QUIET * run.total)                 # before it every label is trusted
    first_seen = first_flag - math.ceil(WINDOW / args.batch_size)  # p̃ from here on fills τ's window
    extrapolate = detect and args.lam > 0                     # nothing else needs the model π_ref
    policy_ref = reference_policy(run) if extrapolate else None

    log = resume(run)                                         # empty, unless a kill left some
    bar = steps(run, log)
    for step in bar:
        started = time.perf_counter()
        batch = batch_at(run, step)                                     # B ~ D_t
        watching = detect and step >= first_seen
        flagging = detect and step >= first_flag
        tau = threshold(log, args.percentile) if flagging else -math.inf                 # S11, D3
        seen = {}
        for rows, tokens, scale in micro_batches(run, batch):
            reference = None
            if extrapolate and watching:
                with torch.no_grad(), precision(run):
                    reference = policy_ref.states(tokens)
            with precision(run):
                logp, logp_tilde = run.policy(tokens, reference, args.lam)                   # S12
            logp = logp.view(-1, 2)                                     # chosen, rejected
            logp_tilde = logp_tilde.view(-1, 2)
            # z: does the extrapolated policy doubt the label? Before `first_seen` there is no π_ref
            # to extrapolate from, and nobody looks.                                  S9, S11
            p_tilde = torch.sigmoid(dpo_margin(logp_tilde, logp_ref[rows], args.beta))
            z = (p_tilde < tau).float()
            # L: the refined label under the worst case      S10, T2-5, D4, D5, D6
            gain = dpo_margin(logp, logp_ref[rows], args.beta)          # M of this round alone
            margin = stored[rows] + gain                                # M against the anchor
            loss = leader_loss(margin, z, weight[rows], shift[rows], args.alpha, pieces)
            (scale * loss.sum()).backward()                             # ∇ of the mean over B, D7
            note(seen, rows, scale, loss=loss, margin=margin, gain=gain, p_tilde=p_tilde, z=z)
        pairs = gather(run, seen, batch)
        if step == 0:
            warn_if_far(run, pairs["gain"])
        lr = lr_at(step, run.total, args.lr)
        norm = update(run, lr, step, batch, pairs["loss"])              # θ ← θ − η∇L
        log.append(log_row(run, step, batch, pairs, norm, lr, started) | {
            "tau": tau if math.isfinite(tau) else None,
            "batch": [run.rows[k]["id"] for k in batch],
            "flagged_share": sum(pairs["z"]) / len(batch),
            "flagged": [run.rows[k]["id"] for k, flag in zip(batch, pairs["z"]) if flag],
            "p_tilde": pairs["p_tilde"] if watching else [],
        })
        keep(run, log, bar)

    flagged = sum(len(row["flagged"]) for row in log)
    save_policy(run, log, anchor=args.anchor, flagged=flagged, margins_taken_as_against_init=silent)
    if run.rank == 0:
        taken = ""
        if silent and args.anchor == "init":
            taken = f", {silent} margins taken as against π_init"
        pairs = [pair_of(row) for row in run.rows]
        print(f"train: {len(run.rows)} pairs, {from_text(run.tokenizer, run.rows, pairs)}, "
              f"{len(log)} steps, anchor {args.anchor}; "
              f"loss {log[0]['loss']:.3f} → {log[-1]['loss']:.3f}, "
              f"{flagged} labels flagged as noise{taken} → {args.out}")


if __name__ == "__main__":
    run_stage(main, args, settings)

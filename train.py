"""Leader stage: preference learning on noise-refined labels (SPA) under the follower's worst case.

    h̃ = (1 + λ) h_θ − λ h_ref per token, renormalised; summed to log π̃(y)                                         S12
    p̃_i = σ(β[(log π̃ − log π_ref)(y_w) − (log π̃ − log π_ref)(y_l)])
    z_i = 1 if p̃_i < τ, τ the K-percentile of p̃ over the 50 pairs before this batch (λ = 0: S9)            S9, S11, D3
    L_i = (1 − α z_i) Σ_j w_ij ℓ*(ξ_θ,i − shift_ij) + α z_i (−log(1 − ξ_θ,i))                  S10, T2-3, T2-5, T2-6, D4, D5

π_ref = π_{t−1} is where training starts; its log-probs are in the rows. ξ_θ is measured against π_init, as the follower's
ξ was, by adding the stored margin (D6). No atoms and α = 0: DPO. No atoms: SPA, against π_ref.

    python train.py --model runs/demo/seed --pairs worst.jsonl --out runs/demo/round1/policy --lam 0.5
    torchrun --nproc_per_node=8 train.py --model pi_0 --pairs worst.jsonl --out pi_1 --alpha 0.1 --lam 0.5 --percentile 10
"""
import math

import torch
import torch.nn.functional as F

from core.models import load_model
from core.parallel import autocast, distribute, model_of
from core.policy import ResponseLogps
from core.rows import fail, is_number
from core.stage import is_done, natural, parser, ranged, run_stage, settings_of, share
from core.training import begin, clean, save_policy, training_flags
from seed_dpo import dpo_margin, optimise

WINDOW, QUIET = 50, 0.2  # τ looks back on 50 pairs; no label is flagged in the first 20 % of the steps (SPA, B.4)


def extrapolated_logps(logits: torch.Tensor, logits_ref: torch.Tensor, target: torch.Tensor, lam: float) -> torch.Tensor:
    """log π̃(target) [c] (S12) from logits [c, V] of policy and reference."""
    return ((1 + lam) * logits - lam * logits_ref).log_softmax(-1).gather(-1, target[:, None])[:, 0]


def threshold(log: list[dict], percentile: float) -> float:
    """τ (S11): a percentile of p̃ over the latest pairs of the log; −∞, which flags nothing, while it has none."""
    window = [p for row in log[-WINDOW:] for p in row["extrapolated"]][-WINDOW:]
    if not window:
        return -math.inf
    return torch.quantile(torch.tensor(window, dtype=torch.float64), percentile / 100).item()


def loss_star(xi: torch.Tensor, pieces: int) -> torch.Tensor:
    """ℓ* (D5): −log ξ, continued below 1/K by its tangent there. Convex, once differentiable, slope never beyond −K."""
    low = xi < 1 / pieces
    return torch.where(low, 1 + math.log(pieces) - pieces * xi, -torch.log(torch.where(low, 1.0, xi)))


def leader_loss(margin: torch.Tensor, flag: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, alpha: float,
                pieces: int, printed: bool = False, margin_space: bool = False) -> torch.Tensor:
    """L_i [m] from margins [m], noise flags z [m] (0 or 1) and atoms: weight, shift [m, A], padded with weight 0.

    An atom that the follower left in place has the exact −log ξ_θ = softplus(−M), which is S10 and DPO without atoms; ℓ*
    is needed only where ξ_θ − shift can leave (0, 1]. Shifts of margins (dro.py --space margin) leave no domain. `printed`
    is T2-6 to the letter: each atom's weight inside the logarithm, so that an atom counts in full whatever its weight (D4).
    """
    xi, moved = torch.sigmoid(margin)[:, None], margin[:, None] - (shift if margin_space else 0.0)
    atom = torch.where((shift == 0) | margin_space, F.softplus(-moved), loss_star(xi - shift, pieces))
    if printed:
        atom = atom - torch.log(torch.where(weight > 0, weight, 1.0))
        weight = (weight > 0).to(weight.dtype)
    return (1 - alpha * flag) * (weight * atom).sum(-1) + alpha * flag * F.softplus(margin)


def atoms_of(rows: list[dict], path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and shifts [N, A] of the rows' atoms; rows without any have one of weight 1 in place. Checks them."""
    atoms = [row.get("atoms", [[1.0, 0.0]]) for row in rows]
    for number, own in enumerate(atoms, 1):
        try:
            sound = all(is_number(w) and is_number(s) and w >= 0 for w, s in own) and abs(sum(w for w, _ in own) - 1) < 1e-6
        except (TypeError, ValueError):
            sound = False
        if not sound:
            fail(f"{path}: row {number}: 'atoms' must be [[weight, shift], …], weights ≥ 0 that sum to 1; found {own!r:.80}")
    width = max(map(len, atoms))
    weight, shift = torch.tensor([own + [[0.0, 0.0]] * (width - len(own)) for own in atoms]).unbind(-1)
    return weight, shift


def main() -> None:
    cli = parser(__doc__)
    training_flags(cli, epochs=1)
    cli.add_argument("--alpha", type=share, default=0.1, help="label smoothing of flagged pairs (S10; papers: 0.1; 0 for none)")
    cli.add_argument("--lam", type=ranged(float, 0), default=0.5, help="extrapolation (S12; papers: 1/2, 1/4, 1/8 by round; 0 for S9)")
    cli.add_argument("--percentile", type=ranged(float, 0, 100), default=10.0, help="K, least confident share to flag, in percent (papers: 10)")
    cli.add_argument("--pieces", type=natural, default=6, help="K of dro.py: ℓ* is straight below 1/K (D5)")
    cli.add_argument("--leader", choices=["expected", "printed"], default="expected", help="expectation, or T2-6 as printed (D4)")
    cli.add_argument("--anchor", choices=["init", "previous"], help="what ξ_θ is measured against (D6); default: "
                     "init if the rows carry a worst case, else previous (SPA)")
    args = cli.parse_args()
    settings = settings_of(args, "model", "pairs")
    if is_done(args.out, settings):
        return clean(args.out)
    rows, encoded, net, tokenizer, device, rank, world = begin(args, "labelled")
    weight, shift = atoms_of(rows, args.pairs)
    spaces = {row.get("space", "confidence") for row in rows}
    if len(spaces) > 1:
        fail(f"{args.pairs}: 'space' must be margin in all rows or in none")
    worst_case = bool(((shift != 0) & (weight > 0)).any())
    anchor = args.anchor or ("init" if worst_case else "previous")
    if worst_case and anchor == "previous":
        fail(f"{args.pairs} carries a worst case of confidences against π_init; --anchor previous would apply it to others (D6)")

    reference = torch.tensor([[r["chosen_logp"], r["rejected_logp"]] for r in rows], device=device)
    stored = torch.tensor([r["margin"] for r in rows], device=device) if anchor == "init" else torch.zeros(len(rows), device=device)
    weight, shift = weight.to(device), shift.to(device)
    total = args.epochs * math.ceil(len(rows) / args.batch_size)
    active = math.ceil(QUIET * total)                          # first step that may flag a label
    watch = active - math.ceil(WINDOW / args.batch_size)       # the steps before it fill the window
    detect = args.alpha > 0 and args.percentile > 0
    net_ref = None
    if detect and args.lam > 0:  # nothing else needs the reference model: its log-probs are in the rows
        model_ref = load_model(args.model, torch.device("cpu") if args.shard else device).requires_grad_(False)
        net_ref = distribute(ResponseLogps(model_ref), device, world, args)

    def also(step, batch):
        if net_ref is None or step < watch:
            return None
        with torch.no_grad(), autocast(device, args.precision, not args.shard):
            hidden, head = net_ref.hidden(batch), model_of(net_ref).get_output_embeddings()
        return lambda logits, part: extrapolated_logps(logits, head(hidden[part]).float(), batch["target"][part], args.lam)

    def losses(log, indices, logps, extrapolated):
        plain = dpo_margin(logps, reference[indices], args.beta)
        if not log and plain.abs().mean() > 2.5 * args.beta:  # at the start it is 0, but for rounding
            fail(f"{args.pairs}: log-probs in the rows are not those of {args.model}; label.py --model must name the same policy")
        margin, noise = stored[indices] + plain, torch.full_like(plain, math.nan)
        if detect and len(log) >= watch:  # p̃ (S12); of the policy itself where λ = 0 (S9)
            noise = torch.sigmoid(dpo_margin(logps.detach() if extrapolated is None else extrapolated, reference[indices], args.beta))
        tau = threshold(log, args.percentile) if len(log) >= active else -math.inf
        flag = (noise < tau).float()
        loss = leader_loss(margin, flag, weight[indices], shift[indices], args.alpha, args.pieces, args.leader == "printed",
                           spaces == {"margin"})
        return loss, {"margin": margin.detach(), "noise": noise, "flag": flag}

    def report(log, indices, records):
        tau = threshold(log, args.percentile) if len(log) >= active else -math.inf
        return {"tau": tau if math.isfinite(tau) else None, "flagged_share": sum(records["flag"]) / len(indices),
                "flagged": [rows[i]["id"] for i, f in zip(indices, records["flag"]) if f],
                "extrapolated": [p for p in records["noise"] if not math.isnan(p)]}

    log = optimise(net, encoded, [r["id"] for r in rows], losses, args, settings, device, rank, world, also, report)
    flagged = sum(len(r["flagged"]) for r in log)
    save_policy(args, net, tokenizer, len(rows), log, settings, rank, anchor=anchor, flagged=flagged)
    if rank == 0:
        print(f"train: {len(rows)} pairs, {len(log)} steps, anchor {anchor}; loss {log[0]['loss']:.3f} → {log[-1]['loss']:.3f}, "
              f"{flagged} labels flagged as noise → {args.out}")


if __name__ == "__main__":
    run_stage(main)

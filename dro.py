"""Follower stage: the worst distribution of preference confidences within a Wasserstein ball.

    ξ_i = σ(margin_i)                          confidence of pair i against π_init (T2-2, D1)
    sup { E_Q[ℓ] : W_1(Q, P̂_N) ≤ ε, supp Q ⊆ [a, b] }                                                          T2-3
    ℓ(ξ) = −log ξ, here by its tangents at k/K: ℓ̃(ξ) = max_k (s_k ξ + c_k), s_k = −K/k, c_k = 1 − log(k/K)

`--solver lp` is the linear program T2-4, constraint by constraint. `--solver exact` is its closed form, by sorting:

    Let ℓ be convex and non-increasing on [a, b], and s_i = (ℓ(a) − ℓ(ξ_i)) / (ξ_i − a) the slope of the chord from ξ_i to a.
    Upper bound.  Moving mass of pair i from ξ_i to ξ' costs |ξ_i − ξ'|. Upwards gains nothing; for a ≤ ξ' ≤ ξ_i convexity
                  puts ℓ(ξ') under the chord: ℓ(ξ') − ℓ(ξ_i) ≤ s_i (ξ_i − ξ'). So d units of transport gain at most s_i d.
    Attained.     by moving the fraction f_i = d / (ξ_i − a) of pair i all the way to a.
    What is left  is max Σ s_i d_i subject to Σ d_i ≤ Nε, 0 ≤ d_i ≤ ξ_i − a: a fractional knapsack, solved greedily by
                  falling s_i. Chords that end in one point of a convex function get flatter with distance, so that order is
                  ascending ξ: the least certain pairs go to a whole, one by one, and the last is split.
    Dual.         min_{λ ≥ 0} λε + (1/N) Σ_i max(ℓ(ξ_i), ℓ(a) − λ(ξ_i − a)); λ* is the slope of the split pair's chord.

Every run certifies itself: primal against dual on all pairs, closed form against LP on a small file or a random group, and
the worst case of the loss itself from above by chords through the same knots. A relative gap over 1e-8 is an error.

Writes each row with `xi` and `atoms` [[weight, shift], …] (T2-5): the adversary puts `weight` of pair i at ξ_i − shift.
`--space margin` is the published version: the same on margins, with ℓ(m) = softplus(−m); shifts are then of margins.

    python dro.py --pairs labelled.jsonl --out worst.jsonl --epsilon 0.01 --pieces 6 --plot follower.png
"""
import json
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linprog
from scipy.special import expit

from core.rows import fail, iterate_rows
from core.stage import is_done, natural, parser, publish, ranged, run_stage, settings_of

LP_PAIRS = 1000  # how many pairs the linear program checks: about a second


class Loss(NamedTuple):
    """A convex, non-increasing loss: its value and its slope (a subgradient), elementwise."""
    value: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]


class WorstCase(NamedTuple):
    """A solution of T2-3 with its certificate. Atoms (T2-5) in three arrays [M], sorted by owner."""
    owner: np.ndarray   # pair
    weight: np.ndarray  # of the pair's unit mass; the weights of one owner sum to 1
    shift: np.ndarray   # the atom stands at ξ_owner − shift
    value: float        # E_Q[ℓ], attained by these atoms (primal)
    dual: float         # upper bound on E_Q[ℓ] for every Q in the ball
    lam: float          # λ*, what one more unit of ε would add
    transport: float    # (1/N) Σ weight |shift| ≤ ε


def minus_log(pieces: int) -> Loss:
    """−log ξ, continued below 1/K by its tangent there: the loss ℓ* that the leader trains on (D5), finite on [0, 1]."""
    return Loss(lambda x: np.where(x < 1 / pieces, 1 + np.log(pieces) - pieces * x, -np.log(np.maximum(x, 1 / pieces))),
                lambda x: -1 / np.maximum(x, 1 / pieces))


SOFTPLUS = Loss(lambda m: np.logaddexp(0, -m), lambda m: -expit(-m))  # −log σ(m)


def tangents(loss: Loss, knots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts [K] of the tangents at the knots. Their maximum is ℓ̃ ≤ ℓ."""
    slopes = loss.slope(knots)
    return slopes, loss.value(knots) - slopes * knots


def chords(loss: Loss, knots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts [K − 1] of the chords between ascending knots. Their maximum is ℓ̂ ≥ ℓ between the outer knots."""
    slopes = np.diff(loss.value(knots)) / np.diff(knots)
    return slopes, loss.value(knots[1:]) - slopes * knots[1:]


def maximum_of(slopes: np.ndarray, intercepts: np.ndarray) -> Loss:
    """The piecewise-linear loss max_k (s_k ξ + c_k)."""
    def value(x: np.ndarray) -> np.ndarray:
        result = np.full(np.shape(x), -np.inf)
        for s, c in zip(slopes, intercepts):
            np.maximum(result, s * x + c, out=result)
        return result
    return Loss(value, lambda x: slopes[np.argmax(np.multiply.outer(x, slopes) + intercepts, axis=-1)])


def dual_value(distance: np.ndarray, loss: np.ndarray, at_a: float, lam: float, epsilon: float) -> float:
    """The dual objective at λ, an upper bound on T2-3 for every λ ≥ 0; from ξ − a and ℓ(ξ) [N] and ℓ(a)."""
    bound = distance * -lam
    bound += at_a
    return float(lam * epsilon + np.maximum(bound, loss, out=bound).mean())


def solve_exact(xi: np.ndarray, loss: Loss, epsilon: float, a: float) -> WorstCase:
    """The closed form above, O(N log N), for any convex non-increasing loss. xi [N] ≥ a; mass never moves up, so b has no part."""
    n, distance = len(xi), xi - a
    ranked = np.sort(distance)
    spent = np.cumsum(ranked)
    whole = int(np.searchsorted(spent, n * epsilon, side="right"))  # how many pairs move whole
    edge = ranked[whole] if whole < n else np.inf                   # distance of the pair that is split
    rest = n * epsilon - (spent[whole - 1] if whole else 0.0)       # budget for it
    first = int(np.searchsorted(ranked, edge))
    del ranked, spent
    moved = distance < edge
    ties = np.flatnonzero(distance == edge)  # of pairs with one confidence, those that come first in the file move first
    moved[ties[:whole - first]] = True

    losses, at_a = loss.value(xi), float(loss.value(np.float64(a)))
    value = losses.sum() + (at_a - losses[moved]).sum()
    transport = distance[moved].sum()
    owner, weight, shift, lam = np.arange(n), np.ones(n), np.where(moved, distance, 0.0), 0.0
    if whole < n:
        split = int(ties[whole - first])
        fraction = rest / edge
        value += fraction * (at_a - losses[split])
        transport += rest
        # the chord's slope lies between those of the loss at its ends, which rounding forgets when they are close
        lam = float(np.clip((at_a - losses[split]) / edge, -loss.slope(xi[split]), -loss.slope(np.float64(a))))
        if fraction > 0:
            weight[split] = 1 - fraction
            owner, weight, shift = (np.insert(x, split + 1, y) for x, y in ((owner, split), (weight, fraction), (shift, edge)))
    return WorstCase(owner, weight, shift, float(value / n), dual_value(distance, losses, at_a, lam, epsilon), lam, float(transport / n))


def solve_lp(xi: np.ndarray, slopes: np.ndarray, intercepts: np.ndarray, epsilon: float, a: float, b: float) -> WorstCase:
    """The linear program T2-4 by HiGHS, for ℓ̃ = max_k (s_k ξ + c_k). Variables, each N·K long, pair by pair: α, q⁺, q⁻; q = q⁺ − q⁻."""
    n, k = len(xi), len(slopes)
    x, s, c = np.repeat(xi, k), np.tile(slopes, n), np.tile(intercepts, n)
    eye = sp.eye_array(n * k)
    # maximise (1/N) Σ_ik [ α_ik (s_k ξ_i + c_k) − s_k q_ik ]
    objective = np.concatenate([s * x + c, -s, s]) / n
    # Σ_k α_ik = 1 for every pair
    one = sp.hstack([sp.kron(sp.eye_array(n), np.ones((1, k))), sp.csr_array((n, 2 * n * k))])
    # (1/N) Σ_ik (q⁺_ik + q⁻_ik) ≤ ε
    ball = sp.csr_array(np.concatenate([np.zeros(n * k), np.ones(2 * n * k)])[None] / n)
    # a α_ik ≤ ξ_i α_ik − q_ik ≤ b α_ik
    above = sp.hstack([sp.diags_array(a - x), eye, -eye])
    below = sp.hstack([sp.diags_array(x - b), -eye, eye])
    limits = np.concatenate([[epsilon], np.zeros(2 * n * k)])
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}  # the default 1e-7 is a visible radius
    solution = linprog(-objective, A_ub=sp.vstack([ball, above, below]).tocsr(), b_ub=limits, A_eq=one.tocsr(), b_eq=np.ones(n),
                       bounds=(0, None), method="highs", options=tight)
    if solution.status != 0:
        fail(f"the linear program was not solved: {solution.message}")
    alpha, plus, minus = solution.x.reshape(3, n, k)
    used = alpha > 1e-12
    owner, piece = np.nonzero(used)
    loss, lam = maximum_of(slopes, intercepts), -float(solution.ineqlin.marginals[0])
    dual = dual_value(xi - a, loss.value(xi), float(loss.value(np.float64(a))), lam, epsilon)
    return WorstCase(owner, alpha[used], (plus - minus)[owner, piece] / alpha[used], -float(solution.fun), dual, lam,
                     float((plus + minus).sum() / n))


def solve_groups(xi: np.ndarray, group: int | None, solve: Callable[[np.ndarray], WorstCase]) -> WorstCase:
    """The thesis's way to scale: consecutive groups of `group` pairs (all of them if None), each in a ball of its own, averaged."""
    starts = range(0, len(xi), group or len(xi))
    parts = [solve(xi[start:start + (group or len(xi))]) for start in starts]
    if len(parts) == 1:
        return parts[0]
    sizes = np.diff([*starts, len(xi)]) / len(xi)
    means = (float(sizes @ np.array([getattr(part, key) for part in parts])) for key in ("value", "dual", "lam", "transport"))
    return WorstCase(np.concatenate([part.owner + start for part, start in zip(parts, starts)]),
                     np.concatenate([part.weight for part in parts]), np.concatenate([part.shift for part in parts]), *means)


def gap(lower: float, upper: float) -> float:
    """How far apart two values that should agree are, relative to their size."""
    return abs(upper - lower) / max(1.0, abs(lower))


def plot(path: str, xi: np.ndarray, solution: WorstCase, loss: Loss, lines: tuple, a: float, b: float, symbol: str) -> None:
    """Above: the loss, its tangents, and every moved atom's way to a. Below: confidences before and after."""
    import matplotlib  # slow to import, and the plot's alone
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 7), sharex=True, constrained_layout=True)
    x = np.linspace(a, b, 400)
    top.plot(x, loss.value(x), color="black", lw=2, label="loss ℓ")
    for s, c in zip(*lines):
        top.plot(x, s * x + c, color="tab:gray", lw=0.7)
    top.plot(x, maximum_of(*lines).value(x), color="tab:blue", lw=1, ls="--", label="its tangents ℓ̃")
    moved = np.flatnonzero(solution.shift)
    for atom in moved[:200]:
        start = xi[solution.owner[atom]]
        y = loss.value(np.array([start, start - solution.shift[atom]]))
        top.annotate("", (start - solution.shift[atom], y[1]), (start, y[0]),
                     arrowprops=dict(arrowstyle="->", color="tab:red", lw=0.4 + 1.2 * solution.weight[atom]))
    top.set(ylim=(-0.1, float(loss.value(np.float64(a))) * 1.1), ylabel="loss", title=(
        f"{len(np.unique(solution.owner[moved]))} of {len(xi)} pairs moved (red); mean loss "
        f"{maximum_of(*lines).value(xi).mean():.4f} → {solution.value:.4f}"))
    top.legend()
    bins = np.linspace(a, b, 61)
    bottom.hist(xi, bins, histtype="step", label="before", color="tab:blue")
    bottom.hist(xi[solution.owner] - solution.shift, bins, weights=solution.weight, histtype="stepfilled", alpha=0.4, label="worst case",
                color="tab:red")
    bottom.set(xlabel=symbol, ylabel="pairs")
    bottom.legend()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def with_atoms(path: str, xi: np.ndarray, solution: WorstCase, margin_space: bool) -> Iterator[str]:
    """The lines of the labelled file with `xi`, `atoms` (and `space`) added: one line in memory at a time, and not parsed again."""
    starts = np.searchsorted(solution.owner, np.arange(len(xi) + 1))
    with open(path, encoding="utf-8-sig") as file:
        for i, line in enumerate(file):
            own = slice(starts[i], starts[i + 1])
            added = {"xi": float(xi[i]), "atoms": np.stack([solution.weight[own], solution.shift[own]], 1).tolist()}
            if margin_space:
                added["space"] = "margin"
            row = line.rstrip()[:-1].rstrip()
            if '"atoms"' in row:  # from an earlier run of this stage, perhaps: only then is it worth looking
                row = json.dumps({k: v for k, v in json.loads(line).items() if k not in ("xi", "atoms", "space")}, ensure_ascii=False)[:-1]
            yield f"{row}, {json.dumps(added)[1:]}\n"


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--pairs", required=True, help="labelled rows (JSONL)")
    cli.add_argument("--out", type=os.path.normpath, required=True, help="worst-case rows (JSONL)")
    cli.add_argument("--epsilon", type=ranged(float, 0), default=0.01, help="radius of the ball (papers: 0.01; also 0 to 0.1)")
    cli.add_argument("--pieces", type=natural, default=6, help="K, tangents of the loss (papers: 6; also 5 and 7)")
    cli.add_argument("--solver", choices=["exact", "lp"], default="exact", help="closed form, or HiGHS")
    cli.add_argument("--group", type=natural, help="pairs a group (thesis: 100, 200, 300); default: all pairs in one")
    cli.add_argument("--space", choices=["confidence", "margin"], default="confidence", help="what moves: ξ (thesis) or margins (published)")
    cli.add_argument("--slack", type=ranged(float, 0, above=True), default=1.0, help="τ: margins move in [min − τ, max + τ]")
    cli.add_argument("--plot", help="picture of the worst case (PNG)")
    args = cli.parse_args()
    settings = settings_of(args, "pairs")
    if is_done(args.out, settings):
        return
    margins = np.fromiter((row["margin"] for row in iterate_rows(args.pairs, "labelled")), np.float64)
    xi, margin_space = expit(margins), args.space == "margin"
    if margin_space:
        points, a, b, loss = margins, margins.min() - args.slack, margins.max() + args.slack, SOFTPLUS
        knots = np.linspace(a, b, args.pieces + 1)[1:]
    else:
        points, a, b, loss = xi, 0.0, 1.0, minus_log(args.pieces)
        knots = np.arange(1, args.pieces + 1) / args.pieces
    lines = tangents(loss, knots)
    low, high = maximum_of(*lines), maximum_of(*chords(loss, np.concatenate([[a], knots])))

    def exact(x: np.ndarray) -> WorstCase:
        return solve_exact(x, low, args.epsilon, a)

    def lp(x: np.ndarray) -> WorstCase:
        return solve_lp(x, *lines, args.epsilon, a, b)

    solution = solve_groups(points, args.group, exact if args.solver == "exact" else lp)
    if not gap(solution.value, solution.dual) < 1e-8:
        fail(f"the follower's certificate failed: primal {solution.value!r}, dual {solution.dual!r}")
    some = points if len(points) <= LP_PAIRS else np.random.default_rng(0).choice(points, LP_PAIRS, replace=False)
    lp_gap = lp(some).value - exact(some).value
    if not gap(0.0, lp_gap) < 1e-8:
        fail(f"closed form and linear program differ by {lp_gap!r} on {len(some)} pairs")
    upper = solve_groups(points, args.group, lambda x: solve_exact(x, high, args.epsilon, a)).value

    def write(tmp: str) -> None:
        with open(tmp, "w", encoding="utf-8") as file:
            file.writelines(with_atoms(args.pairs, xi, solution, margin_space))

    moved = len(np.unique(solution.owner[solution.shift != 0]))
    stats = {"n": len(xi), "epsilon": args.epsilon, "pieces": args.pieces, "solver": args.solver, "space": args.space, "group": args.group,
             "empirical_loss": float(low.value(points).mean()), "worst_case_loss": solution.value, "dual": solution.dual,
             "gap": solution.dual - solution.value, "lambda": solution.lam, "upper_bound": upper, "transport": solution.transport,
             "moved": moved, "lp_checked_on": len(some), "lp_gap": lp_gap}
    if args.plot:
        plot(args.plot, points, solution, loss, lines, a, b, "margin m" if margin_space else "confidence ξ = σ(margin)")
    publish(args.out, settings, stats, write)
    print(f"dro: {moved} of {len(xi)} pairs moved within ε = {args.epsilon}; mean loss {stats['empirical_loss']:.4f} → worst case "
          f"{solution.value:.4f} (true loss: at most {upper:.4f}), duality gap {stats['gap']:.1e}, LP gap {lp_gap:.1e} → {args.out}")


if __name__ == "__main__":
    run_stage(main)

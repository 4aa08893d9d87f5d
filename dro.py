"""Follower stage: the worst distribution of preference confidences within a Wasserstein ball.

    ξ_i = σ(margin_i)                       confidence of pair i against π_init           T2-2, D1
    sup { E_Q[ℓ] : W₁(Q, P̂) ≤ ε, supp Q ⊆ [0, 1] }                                           T2-3
    ℓ = −log ξ is replaced by the maximum of its tangents at k/K, k = 1 … K:
    ℓ̃(ξ) = max_k (s_k ξ + c_k), s_k = −K/k, c_k = 1 − log(k/K)

`--solver lp` is the linear program T2-4, constraint by constraint. `--solver exact` is its closed
form, by sorting:

    Let ℓ be convex and non-increasing on [0, 1], and g_i = (ℓ(0) − ℓ(ξ_i)) / ξ_i ≥ 0 what a unit of
    transport gains along the chord from ξ_i to 0.
    Upper bound.  Moving mass of pair i from ξ_i to ξ' costs |ξ_i − ξ'|. Upwards gains nothing; for
                  ξ' ≤ ξ_i convexity puts ℓ(ξ') under the chord: the gain ℓ(ξ') − ℓ(ξ_i) is at most
                  g_i (ξ_i − ξ'), and d units of transport gain at most g_i d.
    Attained.     by moving the fraction f_i = d / ξ_i of pair i all the way to 0.
    What is left  is max Σ g_i d_i subject to Σ d_i ≤ Nε, 0 ≤ d_i ≤ ξ_i: a fractional knapsack,
                  solved greedily by falling g_i. Chords that end in one point of a convex function
                  get flatter with distance, so that order is ascending ξ: the least certain pairs
                  move with all their mass, one by one, and the last is split.
    Dual.         min_{λ ≥ 0} λε + (1/N) Σ_i max(ℓ(ξ_i), ℓ(0) − λ ξ_i); λ*, the price of transport,
                  is the split pair's g_i, the steepest chord that is left.

Every run certifies its worst case of ℓ̃: the primal value is the dual bound, or the program ends
where they differ by 1e-8 (of a value above 1, by that share). The greedy order is the same for
every such ℓ, so the closed form's atoms are the worst case of the leader's loss ℓ* (D5) too.

Writes each row with `xi`, `pieces` (K) and `atoms` [[weight, shift], …] (T2-5): the adversary puts
`weight` of pair i at ξ_i − shift.

    python dro.py --pairs labelled.jsonl --out worst.jsonl --epsilon 0.01 --pieces 6
"""
import argparse
from typing import NamedTuple

from core.folder import size_of
from core.stage import exit_if_looking, natural, parser, publish, run_stage, share, start


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the output is complete."""
    cli = parser(__doc__, out="worst-case rows (JSONL)")
    cli.add_argument("--pairs", required=True, help="labelled rows (JSONL)")
    cli.add_argument("--epsilon", type=share, default=0.01,
                     help="radius of the ball (papers: 0.01; also 0 to 0.1)")
    cli.add_argument("--pieces", type=natural, default=6,
                     help="K, tangents of the loss (papers: 6; also 5 and 7)")
    cli.add_argument("--solver", choices=["exact", "lp"], default="exact",
                     help="closed form, or the linear program by HiGHS, for comparison")
    cli.add_argument("--group", type=natural,
                     help="pairs a group (thesis: 100, 200, 300); default: all pairs in one")
    args = cli.parse_args()
    start(args)
    exit_if_looking(args.out, writes=size_of(args.pairs))
    return args


if __name__ == "__main__":
    args = flags()  # here already: what is imported below takes seconds to load

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linprog
from scipy.special import expit

from core.rows import (
    AGAINST_INIT,
    SIDES,
    answer_turn,
    check_margins,
    fail,
    read_rows,
    write_rows,
)


class WorstCase(NamedTuple):
    """A solution of T2-3 with its certificate. Atoms (T2-5) in three arrays, sorted by
    owner."""
    owner: np.ndarray   # pair, a position in ξ
    weight: np.ndarray  # of the pair's unit mass; the weights of one owner sum to 1
    shift: np.ndarray   # the atom stands at ξ_owner − shift
    value: float        # E_Q[ℓ], attained by these atoms (primal)
    dual: float         # upper bound on E_Q[ℓ] for every Q in the ball
    price: float        # λ*, what one more unit of ε would add
    transport: float    # (1/N) Σ weight |shift| ≤ ε


def tangents(pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """Slopes s and intercepts c [K] of the tangents of −log at k/K."""
    knots = np.arange(1, pieces + 1) / pieces
    return -1 / knots, 1 - np.log(knots)


def maximum_of(slopes: np.ndarray, intercepts: np.ndarray, x: np.ndarray) -> np.ndarray:
    """max_k (s_k x + c_k) at every x: ℓ̃(x), where the lines are the tangents."""
    return (np.multiply.outer(x, slopes) + intercepts).max(-1)


def dual_value(xi: np.ndarray, losses: np.ndarray, at_zero: float, price: float,
               epsilon: float) -> float:
    """The dual objective, an upper bound on T2-3 for every price λ ≥ 0; from ξ [N], ℓ(ξ) [N] and
    ℓ(0)."""
    return float(price * epsilon + np.maximum(at_zero - price * xi, losses).mean())


def solve_exact(xi: np.ndarray, losses: np.ndarray, at_zero: float, epsilon: float) -> WorstCase:
    """The closed form above, O(N log N), for any convex non-increasing ℓ; from ξ [N], ℓ(ξ) [N] and
    ℓ(0)."""
    n = len(xi)
    # the least certain first, ties in the order of the file
    order = np.argsort(xi, kind="stable")
    spent = np.cumsum(np.r_[0.0, xi[order]])
    count = int(np.searchsorted(spent, n * epsilon, side="right")) - 1  # pairs moved with all mass
    rest = n * epsilon - spent[count]                                   # for the pair that is split
    moved = np.zeros(n, bool)
    moved[order[:count]] = True
    # g of the split pair, as the maximum over all pairs that are left: rounding can spoil a single
    # one close to 0. Whatever the price, the dual bounds the worst case.
    chords = np.divide(at_zero - losses, xi, out=np.zeros(n), where=~moved)
    price = float(chords.max())
    dual = dual_value(xi, losses, at_zero, price, epsilon)

    owner = np.arange(n)
    weight = np.ones(n)
    shift = np.where(moved, xi, 0.0)
    if count < n and rest > 0:
        split = order[count]
        fraction = rest / xi[split]
        weight[split] = 1 - fraction
        owner = np.insert(owner, split + 1, split)
        weight = np.insert(weight, split + 1, fraction)
        shift = np.insert(shift, split + 1, xi[split])
    value = weight @ np.where(shift > 0, at_zero, losses[owner]) / n
    return WorstCase(owner, weight, shift, float(value), dual, price, float(weight @ shift / n))


def solve_lp(xi: np.ndarray, slopes: np.ndarray, intercepts: np.ndarray,
             epsilon: float) -> WorstCase:
    """The linear program T2-4 by HiGHS, for ℓ̃ = max_k (s_k ξ + c_k). Variables, each N·K long,
    pair by pair: α, q⁺, q⁻; q = q⁺ − q⁻."""
    n, k = len(xi), len(slopes)
    x = np.repeat(xi, k)
    s = np.tile(slopes, n)
    c = np.tile(intercepts, n)
    eye = sp.eye_array(n * k)
    # maximise (1/N) Σ_ik [ α_ik (s_k ξ_i + c_k) − s_k q_ik ]
    objective = np.r_[s * x + c, -s, s] / n
    # Σ_k α_ik = 1 for every pair
    one = sp.hstack([sp.kron(sp.eye_array(n), np.ones((1, k))), sp.csr_array((n, 2 * n * k))])
    # (1/N) Σ_ik (q⁺_ik + q⁻_ik) ≤ ε
    ball = sp.csr_array(np.r_[np.zeros(n * k), np.ones(2 * n * k)][None] / n)
    # 0 ≤ ξ_i α_ik − q_ik ≤ α_ik
    inside = sp.block_array([[sp.diags_array(-x), eye, -eye],
                             [sp.diags_array(x - 1), -eye, eye]])
    # the default tolerance of 1e-7 is a visible radius
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    solution = linprog(-objective, A_ub=sp.vstack([ball, inside]).tocsr(),
                       b_ub=np.r_[epsilon, np.zeros(2 * n * k)],
                       A_eq=one.tocsr(), b_eq=np.ones(n), bounds=(0, None), method="highs",
                       options=tight)
    if solution.status != 0:
        fail(f"the linear program was not solved: {solution.message}")
    alpha, plus, minus = solution.x.reshape(3, n, k)
    used = alpha > 1e-12
    owner, piece = np.nonzero(used)
    shift = (plus - minus)[owner, piece] / alpha[used]
    # a small α enlarges what the constraints are met to
    shift = shift.clip(0, xi[owner])
    price = -float(solution.ineqlin.marginals[0])
    dual = dual_value(xi, maximum_of(slopes, intercepts, xi), intercepts.max(), price, epsilon)
    return WorstCase(owner, alpha[used], shift, -float(solution.fun), dual, price,
                     float((plus + minus).sum() / n))


def average(sizes: list[int], parts: list[WorstCase]) -> WorstCase:
    """The thesis's way to scale: groups of so many pairs in balls of their own, put together in the
    order of the file; values are means over pairs."""
    owners, weights, shifts, *values = zip(*parts)
    starts = np.cumsum(sizes) - sizes
    means = np.array(values) @ sizes / sum(sizes)
    return WorstCase(np.concatenate([owner + start for owner, start in zip(owners, starts)]),
                     np.concatenate(weights), np.concatenate(shifts), *means.tolist())


def gap(lower: float, upper: float) -> float:
    """How far apart two values that should agree are; of a value above 1, as a share of it."""
    return abs(upper - lower) / max(1.0, abs(lower))


def worst_rows(rows: list[dict], xi: np.ndarray, solution: WorstCase, pieces: int) -> list[dict]:
    """The labelled rows with `xi`, `pieces` and `atoms`."""
    atoms = np.stack([solution.weight, solution.shift], 1)
    starts = np.searchsorted(solution.owner, np.arange(len(rows) + 1))
    worst = []
    for i, row in enumerate(rows):
        sides = {side: answer_turn(row[side]) for side in SIDES}
        mine = atoms[starts[i]:starts[i + 1]].tolist()
        worst.append(row | sides | {"xi": float(xi[i]), "pieces": pieces, "atoms": mine})
    return worst


def main(args: argparse.Namespace) -> None:
    rows = read_rows(args.pairs, "labelled")
    check_margins(
        rows, args.pairs, AGAINST_INIT if args.epsilon > 0 else {},
        "--epsilon above 0 moves confidences against π_init: label with judge implicit, reference "
        "init, or take --epsilon 0")
    xi = expit(np.array([row["margin"] for row in rows], np.float64))         # T2-2
    lines = tangents(args.pieces)
    tilde = maximum_of(*lines, xi)                                            # ℓ̃ ≤ ℓ*
    at_zero = lines[1].max()                                                  # ℓ̃(0) = ℓ*(0)

    # the worst case, in one ball or in one a group                             T2-3, T2-4, T2-5
    size = args.group or len(xi)
    groups = [slice(start, start + size) for start in range(0, len(xi), size)]
    if args.solver == "lp":
        parts = [solve_lp(xi[g], *lines, args.epsilon) for g in groups]
    else:
        parts = [solve_exact(xi[g], tilde[g], at_zero, args.epsilon) for g in groups]
    solution = average([len(xi[g]) for g in groups], parts)
    if not gap(solution.value, solution.dual) < 1e-8:
        fail(f"the certificate failed: primal {solution.value!r}, dual {solution.dual!r}")

    moved = len(np.unique(solution.owner[solution.shift != 0]))
    stats = {"n": len(xi), "empirical_loss": float(tilde.mean()),
             "worst_case_loss": solution.value, "dual": solution.dual,
             "gap": solution.dual - solution.value, "lambda": solution.price,
             "transport": solution.transport, "moved": moved}
    worst = worst_rows(rows, xi, solution, args.pieces)
    publish(args, stats, lambda tmp: write_rows(tmp, worst))
    print(f"dro: {moved} of {len(xi)} pairs moved within ε = {args.epsilon}; mean loss "
          f"{stats['empirical_loss']:.4f} → worst case {solution.value:.4f}, "
          f"duality gap {stats['gap']:.1e} → {args.out}")


if __name__ == "__main__":
    run_stage(main, args)

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

Every run certifies itself: primal against dual on all pairs, and closed form against LP on the whole file if it is small,
else on a random thousand. A relative gap over 1e-8 is an error.

Writes each row with `xi` and `atoms` [[weight, shift], …] (T2-5): the adversary puts `weight` of pair i at ξ_i − shift.

    python dro.py --pairs labelled.jsonl --out worst.jsonl --epsilon 0.01 --pieces 6
"""
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linprog
from scipy.special import expit

from data.rows import fail, is_done, natural, parser, publish, ranged, read_rows, run_stage, settings_of, write_rows


class WorstCase(NamedTuple):
    """A solution of T2-3 with its certificate. Atoms (T2-5) in three arrays [M], sorted by owner."""
    owner: np.ndarray   # pair
    weight: np.ndarray  # of the pair's unit mass; the weights of one owner sum to 1
    shift: np.ndarray   # the atom stands at ξ_owner − shift
    value: float        # E_Q[ℓ̃], attained by these atoms (primal)
    dual: float         # upper bound on every Q in the ball
    lam: float          # λ*, what one more unit of ε would add
    transport: float    # (1/N) Σ weight |shift| ≤ ε


def tangents(pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts [K] of the tangents of −log at k/K, k = 1 … K. Their maximum is ℓ̃ ≤ −log."""
    knots = np.arange(1, pieces + 1) / pieces
    return -1 / knots, 1 - np.log(knots)


def surrogate(xi: np.ndarray, slopes: np.ndarray, intercepts: np.ndarray) -> np.ndarray:
    """ℓ̃(ξ) = max_k (s_k ξ + c_k), elementwise."""
    result = np.full(np.shape(xi), -np.inf)
    for s, c in zip(slopes, intercepts):
        np.maximum(result, s * xi + c, out=result)
    return result


def chord_slope(xi: float, slopes: np.ndarray, intercepts: np.ndarray, a: float) -> float:
    """(ℓ̃(a) − ℓ̃(ξ)) / (ξ − a), by the lines k, j that are highest at ξ, a: exact where they are one, however close ξ is to a."""
    k, j = np.argmax(slopes * xi + intercepts), np.argmax(slopes * a + intercepts)
    apart = (intercepts[j] - intercepts[k]) + (slopes[j] - slopes[k]) * a
    return float(-slopes[k] + apart / (xi - a)) if apart else float(-slopes[k])


def dual_value(xi: np.ndarray, loss: np.ndarray, at_a: float, lam: float, epsilon: float, a: float) -> float:
    """The dual objective at λ: an upper bound on T2-3 whatever λ ≥ 0 is."""
    return float(lam * epsilon + np.maximum(loss, at_a - lam * (xi - a)).mean())


def solve_exact(xi: np.ndarray, slopes: np.ndarray, intercepts: np.ndarray, epsilon: float, a: float = 0.0) -> WorstCase:
    """The closed form above, O(N log N). xi [N] ≥ a; the slopes must not be positive. Nothing moves up, so b plays no part."""
    n, loss = len(xi), surrogate(xi, slopes, intercepts)
    at_a = float(surrogate(np.float64(a), slopes, intercepts))
    order = np.argsort(xi, kind="stable")
    distance = (xi - a)[order]
    spent = np.cumsum(distance)
    whole = int(np.searchsorted(spent, n * epsilon, side="right"))  # how many pairs move whole
    moved = np.zeros(n)  # fraction of each pair that goes to a
    moved[order[:whole]] = 1.0
    lam = 0.0
    if whole < n:
        budget = n * epsilon - (spent[whole - 1] if whole else 0.0)
        split = order[whole]
        moved[split] = budget / distance[whole]
        lam = chord_slope(float(xi[split]), slopes, intercepts, a)
    owner = np.concatenate([np.flatnonzero(moved < 1), np.flatnonzero(moved > 0)])
    stay = len(owner) - np.count_nonzero(moved > 0)
    weight, shift = np.concatenate([1 - moved[owner[:stay]], moved[owner[stay:]]]), np.zeros(len(owner))
    shift[stay:] = (xi - a)[owner[stay:]]
    by_owner = np.argsort(owner, kind="stable")
    return WorstCase(owner[by_owner], weight[by_owner], shift[by_owner], float((loss + moved * (at_a - loss)).mean()),
                     dual_value(xi, loss, at_a, lam, epsilon, a), lam, float(moved @ (xi - a)) / n)


def solve_lp(xi: np.ndarray, slopes: np.ndarray, intercepts: np.ndarray, epsilon: float, a: float = 0.0,
             b: float = 1.0) -> WorstCase:
    """The linear program T2-4 by HiGHS. Variables, each N·K long, pair by pair: α, q⁺, q⁻ with q = q⁺ − q⁻."""
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
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}  # the default 1e-7 is a visible radius
    limits = np.concatenate([[epsilon], np.zeros(2 * n * k)])
    solution = linprog(-objective, A_ub=sp.vstack([ball, above, below]).tocsr(), b_ub=limits, A_eq=one.tocsr(), b_eq=np.ones(n),
                       bounds=(0, None), method="highs", options=tight)
    if solution.status != 0:
        fail(f"the linear program was not solved: {solution.message}")
    alpha, plus, minus = solution.x.reshape(3, n, k)
    used = alpha > 1e-12
    owner, piece = np.nonzero(used)
    q = plus - minus
    lam = -float(solution.ineqlin.marginals[0])
    at_a = float(surrogate(np.float64(a), slopes, intercepts))
    return WorstCase(owner, alpha[used], q[owner, piece] / alpha[used], -float(solution.fun),
                     dual_value(xi, surrogate(xi, slopes, intercepts), at_a, lam, epsilon, a), lam, float((plus + minus).sum() / n))


def relative_gap(one: float, other: float) -> float:
    return abs(one - other) / max(1.0, abs(one))


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--pairs", required=True, help="labelled rows (JSONL)")
    cli.add_argument("--out", required=True, help="worst-case rows (JSONL)")
    cli.add_argument("--epsilon", type=ranged(float, 0), default=0.01, help="radius of the ball, in confidence (papers: 0.01; 0 to 0.1)")
    cli.add_argument("--pieces", type=natural, default=6, help="K, tangents of −log ξ (papers: 6; also 5 and 7)")
    cli.add_argument("--solver", choices=["exact", "lp"], default="exact", help="closed form, or HiGHS")
    args = cli.parse_args()
    settings = settings_of(args, "pairs")
    if is_done(args.out, settings):
        return
    rows = read_rows(args.pairs, "labelled")
    xi = expit(np.array([row["margin"] for row in rows], dtype=np.float64))
    curve = tangents(args.pieces)
    solution = (solve_exact if args.solver == "exact" else solve_lp)(xi, *curve, args.epsilon)
    if not relative_gap(solution.dual, solution.value) < 1e-8:
        fail(f"the follower's certificate failed: primal {solution.value!r}, dual {solution.dual!r}")
    some = xi if len(xi) <= 1000 else np.random.default_rng(0).choice(xi, 1000, replace=False)
    exact, lp = solve_exact(some, *curve, args.epsilon), solve_lp(some, *curve, args.epsilon)
    if not relative_gap(lp.value, exact.value) < 1e-8:
        fail(f"closed form and linear program differ on {len(some)} pairs: {exact.value!r} and {lp.value!r}")

    for row, value in zip(rows, xi):
        row["xi"], row["atoms"] = float(value), []
    for i, weight, shift in zip(solution.owner.tolist(), solution.weight.tolist(), solution.shift.tolist()):
        rows[i]["atoms"].append([weight, shift])
    moved = len(np.unique(solution.owner[solution.shift != 0]))
    stats = {"n": len(xi), "epsilon": args.epsilon, "pieces": args.pieces, "solver": args.solver,
             "empirical_loss": float(surrogate(xi, *curve).mean()), "worst_case_loss": solution.value, "dual": solution.dual,
             "gap": solution.dual - solution.value, "lambda": solution.lam, "transport": solution.transport, "moved": moved,
             "lp_checked_on": len(some), "lp_gap": lp.value - exact.value}
    publish(args.out, settings, stats, lambda tmp: write_rows(tmp, rows))
    print(f"dro: {moved} of {len(xi)} pairs moved within ε = {args.epsilon}; mean loss {stats['empirical_loss']:.4f} → worst case "
          f"{solution.value:.4f}, duality gap {stats['gap']:.1e}, LP gap {stats['lp_gap']:.1e} → {args.out}")


if __name__ == "__main__":
    run_stage(main)

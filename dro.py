"""Follower stage: the worst distribution of preference confidences within a Wasserstein ball.

    ξ_i = σ(margin_i)                       confidence of pair i against π_init           T2-2, D1
    sup { E_Q[ℓ] : W₁(Q, P̂) ≤ ε, supp Q ⊆ [a, b] = [0, 1] }                                   T2-3
    ℓ = −log ξ is replaced by the maximum of its tangents at k/K, k = 1 … K:
    ℓ̃(ξ) = max_k (s_k ξ + c_k), s_k = −K/k, c_k = 1 − log(k/K)

`--solver lp` is the linear program T2-4, constraint by constraint. `--solver exact` is its closed
form, by sorting:

    Let ℓ be convex and non-increasing on [a, b], and g_i = (ℓ(a) − ℓ(ξ_i)) / (ξ_i − a) ≥ 0 what a
    unit of transport gains along the chord from ξ_i to a.
    Upper bound.  Moving mass of pair i from ξ_i to ξ' costs |ξ_i − ξ'|. Upwards gains nothing; for
                  a ≤ ξ' ≤ ξ_i convexity puts ℓ(ξ') under the chord: the gain ℓ(ξ') − ℓ(ξ_i) is at
                  most g_i (ξ_i − ξ'), and d units of transport gain at most g_i d.
    Attained.     by moving the fraction f_i = d / (ξ_i − a) of pair i all the way to a.
    What is left  is max Σ g_i d_i subject to Σ d_i ≤ Nε, 0 ≤ d_i ≤ ξ_i − a: a fractional knapsack,
                  solved greedily by falling g_i. Chords that end in one point of a convex function
                  get flatter with distance, so that order is ascending ξ: the least certain pairs
                  go to a whole, one by one, and the last is split.
    Dual.         min_{λ ≥ 0} λε + (1/N) Σ_i max(ℓ(ξ_i), ℓ(a) − λ(ξ_i − a)); λ* is the split
                  pair's g_i.

Every run certifies its worst case of ℓ̃: primal against dual on all pairs, closed form against LP on
at most 1000 of them, drawn at random. A relative gap over 1e-8 is an error. The greedy order is the
same for every such ℓ, so the closed form's atoms are the worst case of the leader's loss ℓ* (D5)
too; its value is reported beside that of ℓ̃.

Writes each row with `xi`, `pieces` (K) and `atoms` [[weight, shift], …] (T2-5): the adversary puts
`weight` of pair i at ξ_i − shift.

    python dro.py --pairs labelled.jsonl --out worst.jsonl --epsilon 0.01 --pieces 6 --plot f.png
"""
import argparse
import json
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from core.stage import (
    exit_if_complete,
    exit_if_looking,
    inputs_of,
    natural,
    parser,
    publish,
    ranged,
    run_stage,
    settings_of,
)


def flags() -> tuple[argparse.Namespace, dict]:
    """The arguments, and what decides the output. Ends the program where that is complete."""
    cli = parser(__doc__)
    cli.add_argument("--pairs", required=True, help="labelled rows (JSONL)")
    cli.add_argument("--out", type=os.path.normpath, required=True, help="worst-case rows (JSONL)")
    cli.add_argument("--epsilon", type=ranged(float, 0, 1), default=0.01,
                     help="radius of the ball (papers: 0.01; also 0 to 0.1)")
    cli.add_argument("--pieces", type=natural, default=6,
                     help="K, tangents of the loss (papers: 6; also 5 and 7)")
    cli.add_argument("--solver", choices=["exact", "lp"], default="exact",
                     help="closed form, or the linear program by HiGHS, for comparison")
    cli.add_argument("--group", type=natural,
                     help="pairs a group (thesis: 100, 200, 300); default: all pairs in one")
    cli.add_argument("--plot", help="picture of the worst case (PNG)")
    args = cli.parse_args()
    settings = settings_of(args, "pairs")
    exit_if_complete(args.out, settings)
    exit_if_looking()
    return args, settings


if __name__ == "__main__":
    args, settings = flags()  # here already: what is imported below takes seconds to load

import numpy as np
import scipy.sparse as sp
from scipy.optimize import linprog
from scipy.special import expit

from core.rows import fail, margin_problem, iterate_rows, opened

LP_PAIRS = 1000  # how many pairs the linear program checks: about a second


class Loss(NamedTuple):
    """A convex, non-increasing loss: its value and its slope (a subgradient), elementwise."""
    value: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]


class WorstCase(NamedTuple):
    """A solution of T2-3 with its certificate. Atoms (T2-5) in three arrays, sorted by
    owner."""
    owner: np.ndarray   # pair, a position in ξ
    weight: np.ndarray  # of the pair's unit mass; the weights of one owner sum to 1
    shift: np.ndarray   # the atom stands at ξ_owner − shift
    value: float        # E_Q[ℓ], attained by these atoms (primal)
    dual: float         # upper bound on E_Q[ℓ] for every Q in the ball
    lam: float          # λ*, what one more unit of ε would add
    transport: float    # (1/N) Σ weight |shift| ≤ ε


def loss_star(pieces: int) -> Loss:
    """−log ξ, continued below 1/K by its tangent there: the loss ℓ* that the leader trains on (D5),
    finite on [0, 1]; train.loss_star in numpy, with its slope."""
    knot = 1 / pieces

    def value(x: np.ndarray) -> np.ndarray:
        tangent = 1 + np.log(pieces) - pieces * x
        return np.where(x < knot, tangent, -np.log(np.maximum(x, knot)))
    return Loss(value, lambda x: -1 / np.maximum(x, knot))


def tangents(loss: Loss, knots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts [K] of the tangents at the knots. Their maximum is ℓ̃ ≤ ℓ."""
    slopes = loss.slope(knots)
    return slopes, loss.value(knots) - slopes * knots


def maximum_of(slopes: np.ndarray, intercepts: np.ndarray) -> Loss:
    """The piecewise-linear loss max_k (s_k ξ + c_k)."""
    def value(x: np.ndarray) -> np.ndarray:
        result = np.full(np.shape(x), -np.inf)
        for s, c in zip(slopes, intercepts):
            np.maximum(result, s * x + c, out=result)
        return result

    def slope(x: np.ndarray) -> np.ndarray:
        return slopes[np.argmax(np.multiply.outer(x, slopes) + intercepts, axis=-1)]
    return Loss(value, slope)


def dual_value(distance: np.ndarray, loss: np.ndarray, at_a: float, lam: float,
               epsilon: float) -> float:
    """The dual objective at λ, an upper bound on T2-3 for every λ ≥ 0; from ξ − a and ℓ(ξ) [N] and
    ℓ(a)."""
    bound = distance * -lam
    bound += at_a
    return float(lam * epsilon + np.maximum(bound, loss, out=bound).mean())


def solve_exact(xi: np.ndarray, loss: Loss, epsilon: float, a: float) -> WorstCase:
    """The closed form above, O(N log N), for any convex non-increasing loss. xi [N] ≥ a; mass never
    moves up, so b has no part."""
    n = len(xi)
    distance = xi - a
    ranked = np.sort(distance)  # the least certain first; several times faster than argsort
    spent = np.cumsum(ranked)
    whole = int(np.searchsorted(spent, n * epsilon, side="right"))  # how many pairs move whole
    rest = n * epsilon - (spent[whole - 1] if whole else 0.0)       # budget for the split pair
    edge = ranked[whole] if whole < n else np.inf                   # the split pair's distance
    # Whole go all pairs below the edge and, of the pairs at the edge itself, as many as are wanting
    # to `whole`, in the order of the file; the next of these is the one that is split.
    at_edge = np.flatnonzero(distance == edge)
    early = whole - int(np.searchsorted(ranked, edge))
    moved = distance < edge
    moved[at_edge[:early]] = True
    del ranked, spent

    losses = loss.value(xi)
    at_a = float(loss.value(np.float64(a)))
    value = losses.sum() + (at_a - losses[moved]).sum()
    transport = distance[moved].sum()
    owner = np.arange(n)
    weight = np.ones(n)
    shift = np.where(moved, distance, 0.0)
    lam = 0.0
    if whole < n:
        split = int(at_edge[early])
        fraction = rest / edge
        value += fraction * (at_a - losses[split])
        transport += rest
        # g of the split pair; a chord's slope lies between those of the loss at its ends, which
        # rounding forgets when they are close
        flattest, steepest = -loss.slope(xi[split]), -loss.slope(np.float64(a))
        lam = float(np.clip((at_a - losses[split]) / edge, flattest, steepest))
        if fraction > 0:
            weight[split] = 1 - fraction
            owner = np.insert(owner, split + 1, split)
            weight = np.insert(weight, split + 1, fraction)
            shift = np.insert(shift, split + 1, edge)
    dual = dual_value(distance, losses, at_a, lam, epsilon)
    return WorstCase(owner, weight, shift, float(value / n), dual, lam, float(transport / n))


def solve_lp(xi: np.ndarray, slopes: np.ndarray, intercepts: np.ndarray, epsilon: float, a: float,
             b: float) -> WorstCase:
    """The linear program T2-4 by HiGHS, for ℓ̃ = max_k (s_k ξ + c_k). Variables, each N·K long,
    pair by pair: α, q⁺, q⁻; q = q⁺ − q⁻."""
    n, k = len(xi), len(slopes)
    x = np.repeat(xi, k)
    s = np.tile(slopes, n)
    c = np.tile(intercepts, n)
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
    # the default tolerance of 1e-7 is a visible radius
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    solution = linprog(-objective, A_ub=sp.vstack([ball, above, below]).tocsr(), b_ub=limits,
                       A_eq=one.tocsr(), b_eq=np.ones(n), bounds=(0, None), method="highs",
                       options=tight)
    if solution.status != 0:
        fail(f"the linear program was not solved: {solution.message}")
    alpha, plus, minus = solution.x.reshape(3, n, k)
    used = alpha > 1e-12
    owner, piece = np.nonzero(used)
    shift = (plus - minus)[owner, piece] / alpha[used]
    loss = maximum_of(slopes, intercepts)
    lam = -float(solution.ineqlin.marginals[0])
    dual = dual_value(xi - a, loss.value(xi), float(loss.value(np.float64(a))), lam, epsilon)
    return WorstCase(owner, alpha[used], shift, -float(solution.fun), dual, lam,
                     float((plus + minus).sum() / n))


def average(parts: list[WorstCase], starts: list[int], n: int) -> WorstCase:
    """The thesis's way to scale: groups in balls of their own, put together; values are means over
    pairs."""
    sizes = np.diff([*starts, n]) / n
    value, dual, lam, transport = sizes @ np.array(
        [(part.value, part.dual, part.lam, part.transport) for part in parts])
    return WorstCase(np.concatenate([part.owner + start for part, start in zip(parts, starts)]),
                     np.concatenate([part.weight for part in parts]),
                     np.concatenate([part.shift for part in parts]),
                     float(value), float(dual), float(lam), float(transport))


def gap(lower: float, upper: float) -> float:
    """How far apart two values that should agree are, relative to their size."""
    return abs(upper - lower) / max(1.0, abs(lower))


def certify(xi: np.ndarray, solution: WorstCase, lines: tuple, epsilon: float, a: float,
            b: float) -> tuple[int, float]:
    """(on how many pairs closed form and linear program were compared, by how much they differ).
    Ends the program where they do, or where primal and dual differ.

    The comparison is in one ball; what `--group` has written, primal and dual alone certify."""
    if not gap(solution.value, solution.dual) < 1e-8:
        fail(f"the certificate failed: primal {solution.value!r}, dual {solution.dual!r}")
    some = xi
    if len(xi) > LP_PAIRS:
        some = np.random.default_rng(0).choice(xi, LP_PAIRS, replace=False)
    program = solve_lp(some, *lines, epsilon, a, b).value
    closed = solve_exact(some, maximum_of(*lines), epsilon, a).value
    if not gap(program, closed) < 1e-8:
        fail(f"closed form {closed!r} and linear program {program!r} differ on {len(some)} pairs")
    return len(some), program - closed


def plot(path: str, xi: np.ndarray, solution: WorstCase, loss: Loss, lines: tuple) -> None:
    """Above: ℓ*, its tangents, and every moved atom's way to 0. Below: confidences before and
    after."""
    import matplotlib  # slow to import, and the plot's alone
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 7), sharex=True, constrained_layout=True)
    x = np.linspace(0, 1, 400)
    top.plot(x, loss.value(x), color="black", lw=2, label="the leader's loss ℓ*")
    for s, c in zip(*lines):
        top.plot(x, s * x + c, color="tab:gray", lw=0.7)
    below = maximum_of(*lines).value(x)
    top.plot(x, below, color="tab:blue", lw=1, ls="--", label="its tangents ℓ̃")
    moved = np.flatnonzero(solution.shift)
    for atom in moved[:200]:
        start = xi[solution.owner[atom]]
        end = start - solution.shift[atom]
        before, after = loss.value(np.array([start, end]))
        arrow = {"arrowstyle": "->", "color": "tab:red", "lw": 0.4 + 1.2 * solution.weight[atom]}
        top.annotate("", (end, after), (start, before), arrowprops=arrow)
    before = maximum_of(*lines).value(xi).mean()
    top.set(ylim=(-0.1, float(loss.value(np.float64(0))) * 1.1), ylabel="loss",
            title=f"{len(np.unique(solution.owner[moved]))} of {len(xi)} pairs moved (red); "
                  f"mean ℓ̃ {before:.4f} → {solution.value:.4f}")
    top.legend()
    bins = np.linspace(0, 1, 61)
    bottom.hist(xi, bins, histtype="step", label="before", color="tab:blue")
    bottom.hist(xi[solution.owner] - solution.shift, bins, weights=solution.weight,
                histtype="stepfilled", alpha=0.4, label="worst case", color="tab:red")
    bottom.set(xlabel="confidence ξ = σ(margin)", ylabel="pairs")
    bottom.legend()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def with_atoms(path: str, xi: np.ndarray, solution: WorstCase, pieces: int) -> Iterator[str]:
    """The lines of the labelled file with `xi`, `pieces` and `atoms` added: one line in memory at a
    time, and not parsed again."""
    starts = np.searchsorted(solution.owner, np.arange(len(xi) + 1))
    with opened(path) as file:
        for i, line in zip(range(len(xi)), file):
            own = slice(starts[i], starts[i + 1])
            atoms = np.stack([solution.weight[own], solution.shift[own]], 1).tolist()
            added = {"xi": float(xi[i]), "pieces": pieces, "atoms": atoms}
            row = line.decode("utf-8-sig").rstrip()[:-1].rstrip()
            # from an earlier run of this stage, perhaps: only then is it worth looking
            if '"atoms"' in row or '"pieces"' in row or '"xi"' in row:
                kept = {key: value for key, value in json.loads(line).items() if key not in added}
                row = json.dumps(kept, ensure_ascii=False)[:-1]
            yield f"{row}, {json.dumps(added)[1:]}\n"


def read_margins(path: str, used: bool) -> tuple[np.ndarray, int]:
    """(margins [N], how many rows do not say what theirs is). Where margins are `used`, others than
    against π_init are refused (D10)."""
    margins = []
    silent = 0
    for row in iterate_rows(path, "labelled"):
        other = margin_problem(row) if used else None
        if other:
            fail(f"{path}: id {row['id']!r}: {other}; --epsilon above 0 moves confidences against "
                 "π_init (D1): label with judge implicit, reference init, or take --epsilon 0")
        silent += "margin_of" not in row
        margins.append(row["margin"])
    return np.array(margins, np.float64), silent


def main(args: argparse.Namespace, settings: dict) -> None:
    margins, silent = read_margins(args.pairs, args.epsilon > 0)
    xi = expit(margins)                                                       # T2-2
    a, b = 0.0, 1.0
    loss = loss_star(args.pieces)                                             # ℓ*, D5
    knots = np.arange(1, args.pieces + 1) / args.pieces
    lines = tangents(loss, knots)
    low = maximum_of(*lines)                                                  # ℓ̃ ≤ ℓ*

    # the worst case, in one ball or in one a group                             T2-3, T2-4, T2-5
    size = args.group or len(xi)
    starts = list(range(0, len(xi), size))
    parts, stars = [], []
    for start in starts:
        own = xi[start:start + size]
        if args.solver == "exact":
            parts.append(solve_exact(own, low, args.epsilon, a))
        else:
            parts.append(solve_lp(own, *lines, args.epsilon, a, b))
        stars.append(solve_exact(own, loss, args.epsilon, a))
    solution = average(parts, starts, len(xi))
    star = average(stars, starts, len(xi)).value
    some, lp_gap = certify(xi, solution, lines, args.epsilon, a, b)

    def write(tmp: str) -> None:
        with open(tmp, "w", encoding="utf-8") as file:
            file.writelines(with_atoms(args.pairs, xi, solution, args.pieces))

    moved = len(np.unique(solution.owner[solution.shift != 0]))
    stats = {"n": len(xi), "epsilon": args.epsilon, "pieces": args.pieces, "solver": args.solver,
             "group": args.group, "empirical_loss": float(low.value(xi).mean()),
             "worst_case_loss": solution.value, "dual": solution.dual,
             "gap": solution.dual - solution.value, "lambda": solution.lam,
             "worst_case_loss_star": star, "transport": solution.transport, "moved": moved,
             "lp_checked_on": some, "lp_gap": lp_gap, "margins_taken_as_against_init": silent}
    if args.plot:
        plot(args.plot, xi, solution, loss, lines)
    publish(args.out, settings, stats, write, inputs_of(args, settings))
    taken = f", {silent} margins taken as against π_init" if silent else ""
    print(f"dro: {moved} of {len(xi)} pairs moved within ε = {args.epsilon}; mean loss "
          f"{stats['empirical_loss']:.4f} → worst case {solution.value:.4f} (of the leader's ℓ*: "
          f"{star:.4f}), duality gap {stats['gap']:.1e}, LP gap {lp_gap:.1e}{taken} "
          f"→ {args.out}")


if __name__ == "__main__":
    run_stage(main, args, settings)

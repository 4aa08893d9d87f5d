"""The follower's speed and its picture: closed form against the linear program, argsort as the
yardstick.

Prints a Markdown table and checks the claims made of it (exit status 1 if one fails); draws
bench/follower.png. Confidences as label.py makes them: σ of exponential margins. About two minutes.
SLSQP, the published choice, is not among the solvers: in a hundred iterations it ended with
constraints violated by 0.06 at N = 40, after 4 s.

    python bench/follower.py
    python bench/follower.py --picture      only draws
"""
import resource
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.special import expit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dro  # noqa: E402
from core.rows import answer_turn, write_rows  # noqa: E402
from core.stage import parser, run_stage  # noqa: E402
from train import loss_star  # noqa: E402

EPSILON, PIECES = 0.01, 6
LINES = dro.tangents(PIECES)


def margins(n: int) -> np.ndarray:
    return np.random.default_rng(n).exponential(1.0, n)


def exact(xi: np.ndarray) -> dro.WorstCase:
    return dro.solve_exact(xi, dro.maximum_of(*LINES, xi), LINES[1].max(), EPSILON)


def best_of(repeats: int, call) -> tuple[float, object]:
    """Shortest time in seconds, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return min(times), result


def print_row(*cells: object) -> None:
    print("|", *(f"{cell} |" for cell in cells), flush=True)


def draw(path: str, xi: np.ndarray, solution: dro.WorstCase) -> None:
    """Above: ℓ*, its tangents, and the way of every moved atom to 0. Below: confidences before and
    after."""
    figure = Figure(figsize=(7, 7), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    slopes, intercepts = LINES
    x = np.linspace(0, 1, 400)
    lines = top.plot(x, np.multiply.outer(x, slopes) + intercepts, color="tab:gray", lw=0.7)
    lines[0].set_label(f"its tangents at k/{PIECES}; their maximum is ℓ̃")
    star = loss_star(torch.from_numpy(x), PIECES)
    top.plot(x, star, color="black", lw=2, label="the leader's loss ℓ*")
    before = xi[solution.owner]
    after = before - solution.shift
    way = np.stack([before, after])[:, solution.shift > 0]
    top.plot(way, loss_star(torch.from_numpy(way), PIECES), color="tab:red", marker=".")
    top.set(ylim=(-0.1, 1.1 * intercepts.max()), ylabel="loss",
            title=f"mean ℓ̃ in the worst case {solution.value:.4f}; moved mass is red")
    bins = np.linspace(0, 1, 61)
    bottom.hist(xi, bins, histtype="step", label="before")
    bottom.hist(after, bins, weights=solution.weight, alpha=0.4, color="tab:red",
                label="worst case")
    bottom.set(xlabel="confidence ξ = σ(margin)", ylabel="pairs")
    top.legend()
    bottom.legend()
    figure.savefig(path, dpi=110, format="png")


def stage_seconds(n: int) -> tuple[float, float, float]:
    """Seconds of the stage on n rows, MiB of the file, and the peak of this process in GiB."""
    rows = ({"id": str(i), "prompt": [{"role": "user", "content": "Write a review."}],
             "chosen": answer_turn("word " * 60), "rejected": answer_turn("word " * 60),
             "margin": margin, "chosen_logp": -100.0, "rejected_logp": -101.0}
            for i, margin in enumerate(margins(n).tolist()))
    with tempfile.TemporaryDirectory() as folder:
        pairs = f"{folder}/labelled.jsonl"
        write_rows(pairs, rows)
        sys.argv = ["dro.py", "--pairs", pairs, "--out", f"{folder}/worst.jsonl"]
        seconds, _ = best_of(1, lambda: run_stage(dro.main, dro.flags()))
        size = Path(pairs).stat().st_size / 2 ** 20
    return seconds, size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--picture", action="store_true", help="only draws bench/follower.png")
    args = cli.parse_args()
    xi = expit(margins(96))
    draw(str(ROOT / "bench/follower.png"), xi, exact(xi))
    if args.picture:
        return

    print_row("solver", "N", "seconds", "times numpy.argsort", "peak memory / input",
              "value − exact", "note")
    print_row(*["---"] * 7)
    seconds, sort, memory = {}, {}, {}
    for n in (100, 1000, 5000, 10_000, 60_000, 10 ** 6, 10 ** 7):
        xi = expit(margins(n))
        repeats = 3 if n >= 10 ** 6 else 20
        sort[n], _ = best_of(repeats, lambda: np.argsort(xi))
        seconds[n], solution = best_of(repeats, lambda: exact(xi))
        tracemalloc.start()
        exact(xi)
        memory[n] = tracemalloc.get_traced_memory()[1] / xi.nbytes
        tracemalloc.stop()
        gap = f"duality gap {dro.gap(solution.value, solution.dual):.0e}"
        print_row("closed form", n, f"{seconds[n]:.2g}", f"{seconds[n] / sort[n]:.1f}",
                  f"{memory[n]:.1f}", "–", gap)
    program, differences = {}, []
    for n in (100, 1000, 5000, 10_000):
        xi = expit(margins(n))
        program[n], solution = best_of(1, lambda: dro.solve_lp(xi, *LINES, EPSILON))
        difference = solution.value - exact(xi).value
        differences.append(abs(difference) / solution.value)
        print_row("HiGHS LP", n, f"{program[n]:.2g}", f"{program[n] / sort[n]:.0f}", "–",
                  f"{difference:.0e}", "")
    stage, size, peak = stage_seconds(10 ** 6)
    print_row(f"the stage, {size:.0f} MiB of JSONL", 10 ** 6, f"{stage:.3g}", "–", "–", "–",
              f"peak of this process {peak:.1f} GiB")

    claims = {
        "N = 60 000 in at most 50 ms": seconds[60_000] <= 0.05,
        "N = 10⁷ in at most 3 s": seconds[10 ** 7] <= 3,
        "within 4 × numpy.argsort at N = 60 000 and 10⁷":
            max(seconds[n] / sort[n] for n in (60_000, 10 ** 7)) <= 4,
        "memory at N = 10⁷ at most 10 × the input": memory[10 ** 7] <= 10,
        "at least 1000 × faster than the LP at N = 5000": program[5000] >= 1000 * seconds[5000],
        "value equal to the LP's to 1e-9 relative": max(differences) <= 1e-9,
        "a file of 10⁶ rows in at most 30 s": stage <= 30,
    }
    print("\nClaims:")
    for text, holds in claims.items():
        print(f"- {'holds' if holds else 'FAILS'}: {text}")
    sys.exit(not all(claims.values()))


if __name__ == "__main__":
    main()

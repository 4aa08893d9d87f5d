"""The follower's speed: closed form against HiGHS LP and SLSQP (the published choice), argsort as
the yardstick.

Prints one Markdown table and checks the claims made of it (exit status 1 if one fails). Confidences
as label.py makes them: σ of exponential margins. A few minutes, most of them SLSQP's.

    python bench/follower.py
"""

import json
import resource
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dro  # noqa: E402
from core.stage import run_stage  # noqa: E402

EPSILON, PIECES = 0.01, 6
LINES = dro.tangents(dro.loss_star(PIECES), np.arange(1, PIECES + 1) / PIECES)
LOSS = dro.maximum_of(*LINES)


def confidences(n: int) -> np.ndarray:
    return expit(np.random.default_rng(n).exponential(1.0, n))


def best_of(repeats: int, call) -> tuple[float, object]:
    """Shortest time in seconds, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return min(times), result


def slsqp(xi: np.ndarray, limit: float = 60.0) -> tuple[float, str, float]:
    """(objective, what SLSQP says, worst constraint violation) of T2-4 in α and q, exact gradients,
    100 iterations or `limit` s."""
    n, k = len(xi), PIECES
    x, s, c = np.repeat(xi, k), np.tile(LINES[0], n), np.tile(LINES[1], n)
    size, eye, end = n * k, np.eye(n * k), time.perf_counter() + limit
    gain = np.concatenate([s * x + c, -s]) / n
    inside = np.vstack(
        [np.hstack([np.diag(x), -eye]), np.hstack([np.diag(1 - x), eye])]
    )  # 0 ≤ ξα − q ≤ α
    one = np.hstack([np.kron(np.eye(n), np.ones((1, k))), np.zeros((n, size))])

    def tired(v: np.ndarray) -> None:
        seen.append(v.copy())
        if time.perf_counter() > end:
            raise TimeoutError

    seen: list[np.ndarray] = []
    start = np.concatenate([np.full(size, 1 / k), np.zeros(size)])
    try:
        found = minimize(
            lambda v: -gain @ v,
            start,
            jac=lambda v: -gain,
            method="SLSQP",
            options={"maxiter": 100},
            callback=tired,
            bounds=[(0, 1)] * size + [(None, None)] * size,
            constraints=[
                {"type": "eq", "fun": lambda v: one @ v - 1, "jac": lambda v: one},
                {"type": "ineq", "fun": lambda v: inside @ v, "jac": lambda v: inside},
                {
                    "type": "ineq",
                    "fun": lambda v: EPSILON - abs(v[size:]).sum() / n,
                    "jac": lambda v: np.concatenate([np.zeros(size), -np.sign(v[size:]) / n]),
                },
            ],
        )
        v, says = (
            found.x,
            f"{'success' if found.success else 'failure'} after {found.nit} iterations",
        )
    except TimeoutError:
        v, says = seen[-1], f"stopped after {limit:.0f} s in iteration {len(seen)}"
    violation = max(
        abs(one @ v - 1).max(), -(inside @ v).min(), abs(v[size:]).sum() / n - EPSILON, 0.0
    )
    return float(gain @ v), says, float(violation)


def main() -> None:
    failed = []

    def claim(text: str, true: bool) -> None:
        print(f"- {'holds' if true else 'FAILS'}: {text}", flush=True)
        failed.extend([] if true else [text])

    print(
        "| solver | N | seconds | times numpy.argsort | peak memory / input | value − exact "
        "| note |\n"
        + "| --- " * 7
        + "|",
        flush=True,
    )
    exact, sort = {}, {}
    for n in (100, 1000, 5000, 10_000, 60_000, 1_000_000, 10_000_000):
        xi = confidences(n)
        repeats = 3 if n >= 10**6 else 20
        sort[n], _ = best_of(repeats, lambda: np.argsort(xi))
        exact[n], solution = best_of(repeats, lambda: dro.solve_exact(xi, LOSS, EPSILON, 0.0))
        tracemalloc.start()
        dro.solve_exact(xi, LOSS, EPSILON, 0.0)
        memory = tracemalloc.get_traced_memory()[1] / xi.nbytes
        tracemalloc.stop()
        print(
            f"| closed form | {n} | {exact[n]:.2g} | {exact[n] / sort[n]:.1f} | {memory:.1f} "
            "| – | duality gap "
            f"{dro.gap(solution.value, solution.dual):.0e} |",
            flush=True,
        )
    lp, agrees = {}, []
    for n in (100, 1000, 5000, 10_000):
        xi = confidences(n)
        lp[n], solution = best_of(1, lambda: dro.solve_lp(xi, *LINES, EPSILON, 0.0, 1.0))
        difference = solution.value - dro.solve_exact(xi, LOSS, EPSILON, 0.0).value
        agrees.append(abs(difference) / solution.value)
        print(
            f"| HiGHS LP | {n} | {lp[n]:.2g} | {lp[n] / sort[n]:.0f} | – | {difference:.0e} | |",
            flush=True,
        )
    for n in (10, 20, 40, 100):
        xi = confidences(n)
        seconds, (value, says, violation) = best_of(1, lambda: slsqp(xi))
        difference = value - dro.solve_exact(xi, LOSS, EPSILON, 0.0).value
        print(
            f"| SLSQP | {n} | {seconds:.2g} | – | – | {difference:+.1e} | {says}; constraints "
            f"violated by {violation:.0e} |",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        pairs, n = Path(folder) / "labelled.jsonl", 1_000_000
        with open(pairs, "w") as file:
            for i, margin in enumerate(np.random.default_rng(0).exponential(1.0, n)):
                file.write(
                    json.dumps(
                        {
                            "id": str(i),
                            "prompt": [{"role": "user", "content": "Write a review."}],
                            "chosen": "word " * 60,
                            "rejected": "word " * 60,
                            "margin": margin,
                            "chosen_logp": -100.0,
                            "rejected_logp": -101.0,
                        }
                    )
                    + "\n"
                )
        sys.argv = ["dro.py", "--pairs", str(pairs), "--out", f"{folder}/worst.jsonl"]
        whole, _ = best_of(1, lambda: run_stage(dro.main, *dro.flags()))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"| the stage, {pairs.stat().st_size / 2**20:.0f} MiB of JSONL | {n} | {whole:.3g} "
            f"| – | – | – | peak of this process {peak:.1f} GiB |"
        )

    print("\nClaims:")
    claim("N = 60 000 in at most 50 ms", exact[60_000] <= 0.05)
    claim("N = 10⁷ in at most 3 s", exact[10**7] <= 3)
    claim(
        "within 4 × numpy.argsort at N = 60 000 and 10⁷",
        all(exact[n] <= 4 * sort[n] for n in (60_000, 10**7)),
    )
    claim("memory at N = 10⁷ at most 10 × the input", memory <= 10)
    claim("at least 1000 × faster than the LP at N = 5000", lp[5000] >= 1000 * exact[5000])
    claim("value equal to the LP's to 1e-9 relative", max(agrees) <= 1e-9)
    claim("a file of 10⁶ rows in at most 30 s", whole <= 30)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

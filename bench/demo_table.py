"""The table of RESULTS.md from the reports that bench/demo.sh left: mean ± standard error over the
seeds, paired differences.

python bench/demo_table.py runs/table
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

METHODS = {
    "worst": "worst case (ε = 0.01)",
    "spa": "SPA (ε = 0)",
    "iterdpo": "iterative DPO on self-labels (ε = 0, α = 0)",
    "flip_worst": "worst case (ε = 0.01), 25 % flipped seed",
    "flip_spa": "SPA (ε = 0), 25 % flipped seed",
}


def summary(values: list[float], sign: str = "") -> str:
    """mean ± standard error over seeds."""
    error = f"{np.std(values, ddof=1) / math.sqrt(len(values)):.3f}" if len(values) > 1 else "?"
    return f"{np.mean(values):{sign}.3f} ± {error}"


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/table")
    runs: dict[str, dict[str, dict]] = {m: {} for m in METHODS}
    for path in sorted(root.glob("*/*/report.md.stats.json")):
        runs[path.parent.name][path.parent.parent.name] = json.loads(path.read_text())
    print(
        "| method | seeds | gold score | win rate against SFT | characters | label accuracy, rounds 1, 2 | "
        "wrong among flagged − among all |"
    )
    print("| --- " * 7 + "|")

    def line(name: str, reports: dict, policy: str) -> None:
        of = [r["policies"][policy] for r in reports.values()]
        cells = [
            summary([p["score"] for p in of]),
            summary([p["win_rate"] for p in of]) if of[0].get("win_rate") is not None else "–",
            f"{np.mean([p['characters'] for p in of]):.0f}",
        ]
        labels = (
            [[r["labels"][t] for r in reports.values()] for t in ("round1", "round2")]
            if policy.startswith("round")
            else []
        )
        cells.append(", ".join(summary([q["accuracy"] for q in own]) for own in labels) or "–")
        gaps = [
            q["wrong_among_flagged"] - q["wrong"]
            for own in labels
            for q in own
            if q["wrong_among_flagged"] is not None
        ]
        cells.append(summary(gaps, "+") if gaps else "–")
        print(f"| {name} | {', '.join(sorted(reports))} | {' | '.join(cells)} |")

    for method, name in METHODS.items():
        if not (reports := runs[method]):
            continue
        if method in ("worst", "flip_worst"):
            if method == "worst":
                line("SFT (π_init)", reports, "init")
            line(
                "DPO on the gold seed (π_0)" + name[len("worst case (ε = 0.01)") :], reports, "seed"
            )
        line(name, reports, "round2")
    print("\nPaired over seeds, gold score:")
    for one, other, what in [
        ("worst", None, "two rounds − seed stage, worst case"),
        ("spa", None, "two rounds − seed stage, SPA"),
        ("worst", "spa", "ε = 0.01 − ε = 0"),
        ("spa", "iterdpo", "SPA − iterative DPO"),
        ("flip_worst", None, "two rounds − seed stage, worst case, flipped"),
        ("flip_worst", "flip_spa", "ε = 0.01 − ε = 0, flipped"),
    ]:
        seeds = sorted(set(runs[one]) & set(runs[other or one]))
        if seeds:
            end = [runs[one][s]["policies"]["round2"]["score"] for s in seeds]
            start = [
                runs[other or one][s]["policies"]["round2" if other else "seed"]["score"]
                for s in seeds
            ]
            gains = [a - b for a, b in zip(end, start)]
            print(
                f"- {what}: {summary(gains, '+')} (seeds {', '.join(seeds)}: {', '.join(f'{g:+.3f}' for g in gains)})"
            )


if __name__ == "__main__":
    main()

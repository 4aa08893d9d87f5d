"""The language-model tables of RESULTS.md from the reports that bench/demo.sh left.

Means over seeds with 95 % t-intervals; differences paired over seeds, with the two-sided p of the
paired t-test and the number of seeds at which a difference of this size would reach p = 0.05.

    python bench/demo_table.py runs/table
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
from scipy import stats

ARMS = {  # folder of an arm → its name, in the order of the tables
    "worst": "worst case, ε = 0.01",
    "spa": "SPA",
    "gold": "DPO on the gold labels of all 232 prompts",
    "flip_worst": "worst case, ε = 0.01; 25 % flipped",
    "flip_spa": "SPA; 25 % flipped",
    "one_spa_0": "one round: SPA",
    "one_init_0_0": "one round: anchor init, ε = 0",
    "one_init_0.01_0": "one round: ε = 0.01",
    "one_init_0.05_0": "one round: ε = 0.05",
    "one_random_0.05_0": "one round: ε = 0.05 on random pairs",
    "one_spa_0.4": "one round: SPA; 40 % flipped",
    "one_init_0_0.4": "one round: anchor init, ε = 0; 40 % flipped",
    "one_init_0.01_0.4": "one round: ε = 0.01; 40 % flipped",
    "one_init_0.05_0.4": "one round: ε = 0.05; 40 % flipped",
    "one_random_0.05_0.4": "one round: ε = 0.05 on random pairs; 40 % flipped",
    "one_iterdpo": "one round: iterative DPO",
    "one_no_dnd": "one round: SPA without DND",
    "one_two": "one round: SPA, two candidates",
    "one_none": "one round: SPA, reward without a reference",
    "one_vader": "one round: labels by the gold judge",
    "one_llm": "one round: labels by an LLM judge tuned on the seed",
    "one_seed10": "one round: SPA, 10 gold pairs",
    "one_seed20": "one round: SPA, 20 gold pairs",
}
PAIRS = [  # what is compared with what
    ("worst", "spa"), ("flip_worst", "flip_spa"), ("spa", "gold"), ("worst", "gold"),
    ("one_init_0_0", "one_spa_0"), ("one_init_0.01_0", "one_init_0_0"),
    ("one_init_0.05_0", "one_init_0_0"), ("one_init_0.05_0", "one_random_0.05_0"),
    ("one_init_0_0.4", "one_spa_0.4"), ("one_init_0.01_0.4", "one_init_0_0.4"),
    ("one_init_0.05_0.4", "one_init_0_0.4"), ("one_init_0.05_0.4", "one_random_0.05_0.4"),
    *((arm, "one_spa_0") for arm in ARMS if arm.startswith("one_") and arm.count("_") == 1),
    ("one_no_dnd", "one_spa_0"),
]


def half_width(values: list[float]) -> float:
    """Half the 95 % t-interval of a mean; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


def summary(values: list[float], sign: str = "") -> str:
    return f"{np.mean(values):{sign}.3f} ± {half_width(values):.3f}"


def seeds_needed(differences: list[float]) -> int | None:
    """The fewest seeds at which this mean and this spread would have p < 0.05."""
    spread = np.std(differences, ddof=1)
    for seeds in range(2, 1001):
        if abs(np.mean(differences)) > stats.t.ppf(0.975, seeds - 1) * spread / math.sqrt(seeds):
            return seeds
    return None


def last(report: dict) -> dict:
    """Measures of the policy that an arm ended with."""
    return list(report["policies"].values())[-1]


def arm_line(name: str, seeds: list[str], policies: list[dict], labels: list[dict]) -> str:
    win_rates = [p["win_rate"] for p in policies if p.get("win_rate") is not None]
    right = [q["accuracy"] for q in labels if q]
    cells = [name, ", ".join(seeds), summary([p["score"] for p in policies]),
             summary(win_rates) if win_rates else "–",
             f"{np.mean([p['characters'] for p in policies]):.0f}",
             summary(right) if right else "–"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/table")
    runs: dict[str, dict[str, dict]] = {arm: {} for arm in ARMS}
    for path in sorted(root.glob("*/*/report.md.stats.json")):
        if path.parent.name in runs:
            runs[path.parent.name][path.parent.parent.name] = json.loads(path.read_text())

    print("| arm | seeds | gold score | win rate against SFT | characters | label accuracy |")
    print("| --- " * 6 + "|")
    for start, name in (("init", "SFT (π_init)"), ("seed", "DPO on the 40 gold pairs (π_0)")):
        reports = runs["worst"]
        if reports:
            own = [report["policies"][start] for report in reports.values()]
            print(arm_line(name, list(reports), own, []))
    for arm, name in ARMS.items():
        reports = runs[arm]
        if reports:
            labels = [quality for report in reports.values()
                      for quality in report["labels"].values()]
            print(arm_line(name, list(reports), [last(r) for r in reports.values()], labels))

    print("\nDifferences in gold score, paired over seeds:\n")
    print("| difference | seeds | mean ± 95 % | p | seeds to decide it | by seed |")
    print("| --- " * 6 + "|")
    for one, other in PAIRS:
        seeds = sorted(runs[one].keys() & runs[other].keys())
        if len(seeds) < 2:
            continue
        gains = [last(runs[one][s])["score"] - last(runs[other][s])["score"] for s in seeds]
        p = float(stats.ttest_1samp(gains, 0).pvalue)
        cells = [f"{ARMS[one]} − {ARMS[other]}", str(len(seeds)), summary(gains, "+"),
                 "< 0.001" if p < 0.001 else f"{p:.3f}", str(seeds_needed(gains) or "> 1000"),
                 ", ".join(f"{gain:+.3f}" for gain in gains)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""The language-model tables of RESULTS.md, from what bench/demo.sh and bench/demo_measures.py left.

    python bench/demo_table.py runs/table

Means over seeds, and differences paired over the seeds that both rows have: ± is half the width of
a 95 % t-interval over seeds, p the paired t-test's.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.stats import by_chance, interval  # noqa: E402
from core.rows import fail  # noqa: E402
from core.stage import parser, run_stage  # noqa: E402
from judges.report import cell, markdown  # noqa: E402

# name → (arm of bench/demo.sh, policy of its report)
CLEAN = {
    "SFT (π_init)": ("spa", "init"),
    "DPO on the gold seed (π_0)": ("spa", "seed"),
    "SPA, round 1": ("spa", "round1"),
    "SPA": ("spa", "round2"),
    "ray at SPA's KL": ("rays", "match"),
    "worst case (ε = 0.01), round 1": ("worst", "round1"),
    "worst case": ("worst", "round2"),
    "gold pairs replayed": ("replay", "round2"),
    "as many self-labelled pairs repeated": ("repeat", "round2"),
    "SPA, labels by the gold judge": ("judge", "round2"),
    "DPO on the gold labels of all 224 prompts": ("every", "seed"),
}
TABLES = {"Clean seed labels": CLEAN,
          "25 % of the seed labels flipped":
              {name: (f"flip_{arm}", policy) for name, (arm, policy) in CLEAN.items()}}
# what a row is compared with; SPA without an entry
BASES = {"DPO on the gold seed (π_0)": ["SFT (π_init)"], "SPA": ["DPO on the gold seed (π_0)"],
         "SPA, round 1": ["DPO on the gold seed (π_0)"],
         "worst case (ε = 0.01), round 1": ["DPO on the gold seed (π_0)", "SPA, round 1"],
         "worst case": ["DPO on the gold seed (π_0)", "SPA"],
         "gold pairs replayed": ["SPA", "ray at SPA's KL"]}
COMPARED = ("score", "second_score", "ended", "openings", "kl")
# measure → its head; of the report, and of demo_measures.py
MEASURES = {"score": "gold score", "second_score": "second lexicon", "ended": "ended",
            "openings": "openings", "characters": "characters",
            "win_rate": "win rate against SFT", "kl": "KL to π_init",
            "fluency": "fluency", "accuracy": "self-labels right"}


def read_runs(root: Path) -> dict[tuple[str, str], dict[str, dict]]:
    """(arm, policy) → seed → its measures."""
    runs = {}
    for path in root.glob("*/*/report.md.stats.json"):
        seed, arm = path.parts[-3:-1]
        report = json.loads(path.read_text(encoding="utf-8"))
        labels = report.get("labels", {})
        further = path.with_name("measures.json")
        more = json.loads(further.read_text()) if further.exists() else {}
        for policy, measures in report["policies"].items():
            # A seed's arms share π_init and π_0.
            start = arm.replace("worst", "spa") if policy in ("init", "seed") else arm
            known = runs.setdefault((start, policy), {}).setdefault(seed, {})
            known.update(measures | labels.get(policy, {}) | more.get(policy, {}))
    return runs


def values(runs: dict, row: tuple[str, str], key: str) -> dict[str, float]:
    """seed → a measure of a row, where it has it."""
    return {seed: m[key] for seed, m in runs.get(row, {}).items() if m.get(key) is not None}


def over_the_ray(runs: dict, row: tuple[str, str]) -> list[float]:
    """Gold score of a row less that of the ray at the row's own KL, of every seed whose rays reach
    it: between two rays the score is taken as straight in √KL."""
    arm = "flip_rays" if row[0].startswith("flip_") else "rays"
    rays = [policies for (other, _), policies in runs.items() if other == arm]
    differences = []
    for seed, mine in runs[row].items():
        points = sorted((policies[seed]["kl"], policies[seed]["score"])
                        for policies in rays if "kl" in policies.get(seed, {}))
        if points and "kl" in mine and points[0][0] <= mine["kl"] <= points[-1][0]:
            kls, scores = np.array(points).T
            ray = np.interp(math.sqrt(mine["kl"]), np.sqrt(kls), scores)
            differences.append(mine["score"] - ray)
    return differences


def print_table(title: str, rows: dict, runs: dict) -> None:
    lines = []
    for name, row in rows.items():
        if row in runs:
            found = [list(values(runs, row, key).values()) for key in MEASURES]
            further = over_the_ray(runs, row)
            lines.append([name, str(len(runs[row])),
                          *(interval(each).text("") if each else "–" for each in found),
                          f"{interval(further).text()} ({len(further)})" if any(further) else "–"])
    print(f"\n**{title}**\n")
    print(markdown(["method", "seeds", *MEASURES.values(), "gold − the ray's at its KL (seeds)"],
                   lines))

    lines, gains = [], []
    compared = [(name, base) for name in list(rows)[1:] for base in BASES.get(name, ["SPA"])]
    for name, base in compared:
        row = rows[name]
        line = [f"{name} − {base}"]
        for key in COMPARED:
            one, other = values(runs, row, key), values(runs, rows[base], key)
            common = [one[seed] - other[seed] for seed in one if seed in other]
            if common:
                gain = interval(common)
                line += [str(len(common)), gain.text(),
                         "< 0.001" if gain.p < 0.001 else cell(gain.p)]
                gains += [gain] * (key == "score")
            else:
                line += ["0", "–", "–"]
        lines.append(line)
    heads = [head for key in COMPARED for head in ("seeds", MEASURES[key], "p")]
    print("\n" + markdown(["difference", *heads], [line for line in lines if line[1] != "0"]))
    print(f"\nGold score: {by_chance(gains)}")


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("root", type=Path, help="the runs of bench/demo.sh: ROOT/SEED/ARM")
    args = cli.parse_args()
    runs = read_runs(args.root)
    if not runs:
        fail(f"{args.root}: no reports of bench/demo.sh")
    for title, rows in TABLES.items():
        if any(row in runs for row in rows.values()):
            print_table(title, rows, runs)


if __name__ == "__main__":
    run_stage(main)

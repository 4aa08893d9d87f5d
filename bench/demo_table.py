"""The language-model tables of RESULTS.md, from the reports that bench/demo.sh left.

    python bench/demo_measures.py runs/table      what lies beside the reports, if it is wanted
    python bench/demo_table.py runs/table

Means over seeds, and paired differences: ± is half the width of a 95 % t-interval over seeds, p the
paired t-test's. Beside them the number of seeds by which a difference of the same mean and spread
would be found at 95 % in four of five attempts. A seed counts in a table as soon as two of its arms
have run. A share of pairs is taken over all rounds and seeds together, a seed with more pairs
counting more.
"""
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from judges.report import markdown, p_value  # noqa: E402

POWER = 0.8
MOST = 10_000  # seeds beyond which nobody counts

# (arm of bench/demo.sh, policy of its report, what it is), in the order of the tables
CENTRAL = [
    ("worst", "init", "SFT (π_init)"),
    ("worst", "seed", "DPO on the gold seed (π_0)"),
    ("gold", "seed", "DPO on the gold labels of all 232 prompts"),
    ("spa", "round2", "SPA (ε = 0)"),
    ("worst", "round2", "worst case (ε = 0.01)"),
]
CENTRAL_PAIRS = [(4, 1), (3, 1), (4, 3), (2, 3)]
FLIPPED = [
    ("flip_worst", "seed", "DPO on the gold seed (π_0)"),
    ("flip_spa", "round2", "SPA (ε = 0)"),
    ("flip_worst", "round2", "worst case (ε = 0.01)"),
]
FLIPPED_PAIRS = [(2, 0), (1, 0), (2, 1)]


def causes(flip: str) -> list[tuple[str, str, str]]:
    return [
        (f"one_spa_{flip}", "seed", "DPO on the gold seed (π_0)"),
        (f"one_spa_{flip}", "round1", "anchor previous, ε = 0 (SPA)"),
        (f"one_init_0_{flip}", "round1", "anchor init, ε = 0"),
        (f"one_init_0.01_{flip}", "round1", "anchor init, ε = 0.01"),
        (f"one_init_0.05_{flip}", "round1", "anchor init, ε = 0.05"),
        (f"one_random_0.05_{flip}", "round1", "ε = 0.05, random pairs"),
    ]


CAUSES_PAIRS = [(2, 0), (1, 0), (1, 2), (3, 2), (4, 2), (5, 2), (4, 5)]
PAPERS = [
    ("one_spa_0", "seed", "DPO on the gold seed (π_0)"),
    ("one_spa_0", "round1", "SPA"),
    ("one_iterdpo", "round1", "iterative DPO: self-labels alone (DE)"),
    ("one_no_dnd", "round1", "refined labels without de-coupled detection (SR)"),
    ("one_two", "round1", "SPA, two candidates a prompt"),
    ("one_none", "round1", "SPA, judged without a reference"),
    ("one_vader", "round1", "labels by the gold judge"),
    ("one_llm", "round1", "labels by an LLM judge tuned on the seed"),
    ("one_seed10", "round1", "SPA, 10 gold pairs"),
    ("one_seed20", "round1", "SPA, 20 gold pairs"),
]
PAPERS_PAIRS = [(1, 0), *((k, 1) for k in range(2, len(PAPERS)))]
# (title, rows, pairs of rows to be compared, the row of SPA)
TABLES = [
    ("Two rounds", CENTRAL, CENTRAL_PAIRS, 3),
    ("Two rounds, 25 % of the seed labels flipped", FLIPPED, FLIPPED_PAIRS, 1),
    ("Causes, one round from shared labels, clean", causes("0"), CAUSES_PAIRS, 1),
    ("Causes, one round from shared labels, 40 % flipped", causes("0.4"), CAUSES_PAIRS, 1),
    ("The papers' rows, one round", PAPERS, PAPERS_PAIRS, 1),
]
# of bench/demo_measures.py, and their heads
GROUPS = {
    "all": "all",
    "flagged": "flagged",
    "moved": "moved",
    "would 0.01": "ε = 0.01 would move",
    "would 0.05": "ε = 0.05 would move",
    "others": "neither flagged nor moved",
}


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % t-interval over seeds; 0 for a single seed."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), 0.0
    half = student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values)), float(half)


def interval(values: list[float], sign: str = "") -> str:
    """mean ± half the width of the 95 % t-interval over seeds."""
    mean, half = mean_and_half(values)
    shown = f"{mean:{sign}.3f}".replace("-", "−")
    return f"{shown} ± {half:.3f}" if len(values) > 1 else f"{shown} ± ?"


def ratio_interval(parts: list[float], wholes: list[float]) -> str:
    """Σ parts / Σ wholes over seeds ± half its 95 % t-interval, a seed being the unit that is drawn
    (the ratio made linear at its value); where all wholes are alike, `interval` of the shares."""
    n = len(parts)
    ratio = np.sum(parts) / np.sum(wholes)
    if n < 2:
        return f"{ratio:.3f} ± ?"
    rest = (np.array(parts) - ratio * np.array(wholes)) / np.mean(wholes)
    half = student.ppf(0.975, n - 1) * np.std(rest, ddof=1) / math.sqrt(n)
    return f"{ratio:.3f} ± {half:.3f}"


def paired_t(gains: list[float]) -> float:
    """Two-sided p-value of the t-test that gains have mean 0; NaN where none can be had."""
    n = len(gains)
    if n < 2 or np.std(gains) == 0:
        return math.nan
    statistic = abs(np.mean(gains)) / (np.std(gains, ddof=1) / math.sqrt(n))
    return float(2 * student.sf(statistic, n - 1))


def seeds_to_decide(gains: list[float]) -> int | None:
    """The least number of seeds at which a gain of this mean and spread would be found at 95 % with
    probability POWER; None if that is not known or beyond MOST."""
    if len(gains) < 2 or np.mean(gains) == 0:
        return None
    effect = abs(np.mean(gains)) / max(np.std(gains, ddof=1), 1e-12)
    n = np.arange(2, MOST + 1)
    enough = (student.ppf(0.975, n - 1) + student.ppf(POWER, n - 1)) / np.sqrt(n) <= effect
    return int(n[enough][0]) if enough.any() else None


def value_line(name: str, policy: str, reports: dict[str, dict]) -> list[str]:
    """A row's cells: gold score, win rate, length, and how its self-labels were."""
    found = [report["policies"][policy] for report in reports.values()]
    wins = [p["win_rate"] for p in found if "win_rate" in p]
    accuracy, gaps = [], []
    if policy.startswith("round"):
        rounds = [f"round{t}" for t in range(1, int(policy[len("round"):]) + 1)]
        for t in rounds:
            labels = [r["labels"][t] for r in reports.values() if r["labels"].get(t)]
            if labels:
                accuracy.append(interval([q["accuracy"] for q in labels]))
            gaps += [q["wrong_among_flagged"] - q["wrong"] for q in labels
                     if q["wrong_among_flagged"] is not None and q["wrong"] is not None]
    return [name, str(len(reports)),
            interval([p["score"] for p in found]),
            interval(wins) if wins else "–",
            f"{np.mean([p['characters'] for p in found]):.0f}",
            ", ".join(accuracy) or "–",
            interval(gaps, "+") if gaps else "–"]


def scores_of(runs: dict[str, dict], arm: str, policy: str) -> dict[str, float]:
    """seed → gold score of an arm's policy."""
    return {seed: report["policies"][policy]["score"] for seed, report in runs.get(arm, {}).items()
            if policy in report["policies"]}


def print_by_chance(p_values: list[float]) -> None:
    """How many differences count as found, and how many would if there were none."""
    tested = [p for p in p_values if not math.isnan(p)]
    if tested:
        print(f"\n{sum(p < 0.05 for p in tested)} of {len(tested)} differ at 95 %; "
              f"{0.05 * len(tested):.1f} would by chance.")


def print_table(title: str, rows: list, pairs: list, runs: dict[str, dict]) -> None:
    lines = []
    for arm, policy, name in rows:
        reports = {seed: report for seed, report in runs.get(arm, {}).items()
                   if policy in report["policies"]}
        if reports:
            lines.append(value_line(name, policy, reports))
    if not lines:
        return
    print(f"\n**{title}**\n")
    print(markdown(["method", "seeds", "gold score", "win rate against SFT", "characters",
                    "label accuracy by round", "wrong among flagged − among those that could be"],
                   lines))
    differences, p_values = [], []
    for one, other in pairs:
        end, start = scores_of(runs, *rows[one][:2]), scores_of(runs, *rows[other][:2])
        seeds = [seed for seed in end if seed in start]
        if not seeds:
            continue
        gains = [end[seed] - start[seed] for seed in seeds]
        p = paired_t(gains)
        needed = seeds_to_decide(gains)
        differences.append([f"{rows[one][2]} − {rows[other][2]}", str(len(seeds)),
                            interval(gains, "+"), p_value(p), str(needed or "–")])
        p_values.append(p)
    if not differences:
        return
    print()
    print(markdown(["difference in gold score", "seeds", "mean", "p", "seeds to decide it"],
                   differences))
    print_by_chance(p_values)


def compared(own: dict[str, float], base: dict[str, float]) -> tuple[list[str], float]:
    """(mean, p and seeds to decide it of the difference of two rows over their common seeds; p)."""
    gains = [own[seed] - base[seed] for seed in own if seed in base]
    if not gains:
        return ["–"] * 3, math.nan
    p = paired_t(gains)
    return [interval(gains, "+"), p_value(p), str(seeds_to_decide(gains) or "–")], p


def print_tenth(title: str, rows: list, base: int, measures: dict[str, dict]) -> None:
    """The worst tenth of the evaluation prompts by gold score."""
    found = []
    for arm, policy, _ in rows:
        found.append({seed: own["tenth"][policy] for seed, own in measures.get(arm, {}).items()
                      if policy in own["tenth"]})
    lines, p_values = [], []
    for k, (own, (_, _, name)) in enumerate(zip(found, rows)):
        if own:
            against, p = compared(own, found[base]) if k != base else (["–"] * 3, math.nan)
            lines.append([name, str(len(own)), interval(list(own.values())), *against])
            p_values.append(p)
    if lines:
        print(f"\n**{title}: the worst tenth of the prompts**\n")
        print(markdown(["method", "seeds", "gold score", "− SPA", "p", "seeds to decide it"],
                       lines))
        print_by_chance(p_values)


def print_heldout(title: str, rows: list, base: int, measures: dict[str, dict]) -> None:
    """Worst-case loss on gold pairs of the evaluation prompts by radius: SPA's, and the others'
    difference to it; and how many of these pairs a policy has right."""
    found = []
    for arm, policy, _ in rows:
        found.append({seed: own["heldout"][policy] for seed, own in measures.get(arm, {}).items()
                      if policy in own["heldout"]})
    radii = next((own["radii"] for seeds in measures.values() for own in seeds.values()), [])
    lines, p_values = [], []
    for k, (own, (_, _, name)) in enumerate(zip(found, rows)):
        common = [seed for seed in own if seed in found[base]]
        if not common:
            continue
        cells = []
        for r in range(len(radii)):
            loss = {seed: own[seed]["loss"][r] for seed in common}
            if k == base:
                cells.append(interval(list(loss.values())))
                continue
            against, p = compared(loss, {seed: found[base][seed]["loss"][r] for seed in common})
            cells.append(against[0])
            p_values.append(p)
        lines.append([name if k == base else f"{name} − SPA", str(len(common)), *cells,
                      interval([own[seed]["right"] for seed in common])])
    if lines:
        print(f"\n**{title}: worst-case loss on held-out gold pairs** (lower is better)\n")
        print(markdown(["method", "seeds", *(f"radius {radius}" for radius in radii),
                        "share with ξ > ½"], lines))
        print_by_chance(p_values)


def print_labels(title: str, rows: list, measures: dict[str, dict]) -> None:
    """Shares of right labels by what was done to the pairs, all rounds of all seeds together."""
    lines = []
    for arm, policy, name in rows:
        seeds = [own for own in measures.get(arm, {}).values() if policy in own["labels"]]
        if not seeds:
            continue
        line = [name, str(len(seeds))]
        for group in GROUPS:
            counts = np.array([np.sum([own.get(group, [0.0, 0.0])
                                       for own in seed["labels"].values()], axis=0)
                               for seed in seeds])
            rounds = sum(len(seed["labels"]) for seed in seeds)
            pairs, right = counts.T
            line.append(f"{ratio_interval(list(right), list(pairs))} "
                        f"({pairs.sum() / rounds:.1f})" if pairs.sum() > 0 else "–")
        lines.append(line)
    if lines:
        print(f"\n**{title}: labels that are right** (pairs a round)\n")
        print(markdown(["method", "seeds", *GROUPS.values()], lines))


def read_runs(root: Path, name: str) -> dict[str, dict[str, dict]]:
    """arm → seed → content of a JSON file of the run, seeds in their order."""
    runs: dict[str, dict[str, dict]] = {}
    found = list(root.glob(f"*/*/{name}"))
    for path in sorted(found, key=lambda path: (len(path.parts[-3]), path.parts[-3])):
        seed, arm = path.parts[-3:-1]
        runs.setdefault(arm, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    return runs


def of_table(rows: list, found: dict[str, dict]) -> dict[str, dict]:
    """What was found of the rows' arms, at the seeds at which two of them or more have run, so that
    an arm that stands in two tables has in each the seeds of that table."""
    arms = {arm: found[arm] for arm, _, _ in rows if arm in found}
    ran = Counter(seed for seeds in arms.values() for seed in seeds)
    return {arm: {seed: own for seed, own in seeds.items() if ran[seed] > 1}
            for arm, seeds in arms.items()}


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/table")
    runs = read_runs(root, "report.md.stats.json")
    if not runs:
        print(f"error: {root}: no reports of bench/demo.sh", file=sys.stderr)
        raise SystemExit(2)
    measures = read_runs(root, "measures.json")
    for title, rows, pairs, base in TABLES:
        measured = of_table(rows, measures)
        print_table(title, rows, pairs, of_table(rows, runs))
        print_tenth(title, rows, base, measured)
        print_heldout(title, rows, base, measured)
        print_labels(title, rows, measured)
    missing = sum(map(len, runs.values())) - sum(map(len, measures.values()))
    if missing:
        print(f"\n{missing} runs are not measured yet: python bench/demo_measures.py {root}")


if __name__ == "__main__":
    main()

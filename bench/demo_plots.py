"""The pictures of RESULTS.md, from what bench/demo.sh left.

    demo_stages.png      gold score by stage for the methods; bars are 95 % t-intervals over seeds.
                         Beside it the difference paired over seeds, in which what seeds have in
                         common cancels
    demo_defences.png    both defences on one axis, for one round of one run: whose labels SPA
                         smooths, which pairs the adversary moves, and by which number each decides

    python bench/demo_plots.py runs/table --out bench --run 1/worst --round 1
"""
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402
from scipy.special import expit  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.demo_measures import WOULD, would_move  # noqa: E402
from bench.demo_table import mean_and_half, read_runs, scores_of  # noqa: E402
from core.rows import atomic_path, fail, read_json_lines, read_rows  # noqa: E402
from core.stage import natural, parser, run_stage  # noqa: E402

# Okabe and Ito's colours, which colour-blind eyes tell apart
BLUE, VERMILION, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#AAAAAA"
STAGES = {"init": "SFT", "seed": "DPO on the\ngold seed", "round1": "round 1", "round2": "round 2"}
# (arm of bench/demo.sh, stages that are shown, name, colour, line, marker)
METHODS = [
    ("gold", ["seed"], "DPO on gold labels of all prompts", GREEN, "none", "D"),
    ("spa", list(STAGES), "SPA", BLUE, "-", "o"),
    ("worst", list(STAGES), "worst case, ε = 0.01", VERMILION, "-", "s"),
    ("flip_spa", list(STAGES)[1:], "SPA, 25 % of the seed flipped", BLUE, ":", "o"),
    ("flip_worst", list(STAGES)[1:], "worst case, 25 % flipped", VERMILION, ":", "s"),
]
DIFFERENCES = [("worst", "spa", "clean seed labels", "o"),
               ("flip_worst", "flip_spa", "25 % flipped", "^")]


def paired(runs: dict, one: str, other: str, stage: str) -> list[float]:
    """Differences of two arms' gold scores over their common seeds."""
    end, start = scores_of(runs, one, stage), scores_of(runs, other, stage)
    return [end[seed] - start[seed] for seed in end if seed in start]


def save(figure, path: Path) -> None:
    with atomic_path(str(path)) as tmp:
        figure.savefig(tmp, dpi=110, format="png")
    plt.close(figure)
    print(path)


def plot_stages(runs: dict, path: Path) -> None:
    shown = [method for method in METHODS if runs.get(method[0])]
    differences = [(d, gains) for d in DIFFERENCES
                   if (gains := [paired(runs, *d[:2], t) for t in ("round1", "round2")])[0]]
    width = 10.5 if differences else 7
    figure, axes = plt.subplots(1, 2 if differences else 1, figsize=(width, 5.2), squeeze=False,
                                width_ratios=[2.2, 1] if differences else None,
                                constrained_layout=True)
    left = axes[0][0]
    for k, (arm, stages, name, color, line, marker) in enumerate(shown):
        found = {t: list(own.values()) for t in stages if (own := scores_of(runs, arm, t))}
        # points of one stage side by side
        x = [list(STAGES).index(t) + 0.07 * (k - (len(shown) - 1) / 2) for t in found]
        mean, half = np.array([mean_and_half(values) for values in found.values()]).T
        seeds = max(map(len, found.values()))
        left.errorbar(x, mean, half, color=color, ls=line, marker=marker, ms=6, lw=1.6, capsize=3,
                      mfc="white" if line == ":" else color, label=f"{name} ({seeds} seeds)")
    left.set_xticks(range(len(STAGES)), STAGES.values())
    left.set(ylabel="gold score (VADER, at most 1)", title="gold score by stage")
    left.grid(axis="y", color="0.9")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, frameon=False)
    if differences:
        right = axes[0][1]
        right.axhline(0, color="black", lw=0.8)
        for k, ((_, _, name, marker), both) in enumerate(differences):
            for t, gains in enumerate(both):
                if not gains:
                    continue
                x = t + 0.3 * (k - (len(differences) - 1) / 2)
                mean, half = mean_and_half(gains)
                right.plot([x - 0.07] * len(gains), gains, marker, color=GREY, ms=4.5)
                right.errorbar(x, mean, half, color=VERMILION, marker=marker, ms=7, lw=1.6,
                               capsize=3, mfc="white" if k else VERMILION,
                               label=f"{name} ({len(gains)} seeds)" if t == 0 else None)
        right.set_xticks([0, 1], ["round 1", "round 2"])
        right.set(xlim=(-0.5, 1.5), title="worst case − SPA, paired",
                  ylabel="difference in gold score (grey: each seed)")
        right.grid(axis="y", color="0.9")
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    save(figure, path)


def defences_of(run: Path, t: int) -> dict:
    """Of a round's pairs: ξ, p̃, which training could flag and which it did, and which the worst
    case at each radius of WOULD moves; and the thresholds τ."""
    rows = read_rows(str(run / f"round{t}/worst.jsonl"), "labelled")
    number = {row["id"]: i for i, row in enumerate(rows)}
    xi = expit(np.array([row["margin"] for row in rows]))
    could, flagged = np.zeros((2, len(rows)), bool)
    tilde = np.full(len(rows), math.nan)
    taus = []
    for _, step in read_json_lines(str(run / f"round{t}/policy/log.jsonl")):
        batch = [number[i] for i in step.get("batch", [])]
        if not batch:
            fail(f"{run}/round{t}/policy/log.jsonl: does not say which pairs a step saw; it was "
                 "written by an older version, train again")
        tilde[batch] = step["p_tilde"]
        flagged[[number[i] for i in step["flagged"]]] = True
        if step["tau"] is not None:
            could[batch] = True
            taus.append(step["tau"])
    moved = [would_move(xi, epsilon) > 0 for epsilon in WOULD]
    return {"xi": xi, "tilde": tilde, "could": could, "flagged": flagged, "moved": moved,
            "taus": taus}


def plot_defences(run: Path, t: int, path: Path) -> None:
    found = defences_of(run, t)
    xi, tilde = found["xi"], found["tilde"]
    could, flagged = found["could"], found["flagged"]
    small, large = found["moved"]
    figure = plt.figure(figsize=(10.5, 5.4), constrained_layout=True)
    grid = figure.add_gridspec(2, 2, height_ratios=[1, 1.7], width_ratios=[1.25, 1])
    bottom = figure.add_subplot(grid[1, 0])
    top = figure.add_subplot(grid[0, 0], sharex=bottom)
    right = figure.add_subplot(grid[:, 1])

    # (name, which pairs, colour, colour of the edge); what is coloured stands on the axis
    more = large & ~small
    kinds = [(f"moved at ε = {WOULD[0]}", small & ~flagged, VERMILION, "white"),
             (f"moved at ε = {WOULD[0]} and flagged", small & flagged, VERMILION, BLUE),
             (f"moved at ε = {WOULD[1]}", more & ~flagged, ORANGE, "white"),
             (f"moved at ε = {WOULD[1]} and flagged", more & flagged, ORANGE, BLUE),
             ("flagged by SPA alone", flagged & ~large, BLUE, "white"),
             ("neither", ~flagged & ~large, GREY, "white")]
    kinds = [kind for kind in kinds if kind[1].any()]
    end = max(xi.max() + 0.01, 0.6)
    counts, *_ = bottom.hist(
        [xi[own] for _, own, _, _ in kinds], np.linspace(0.5, end, 31), stacked=True, lw=0.4,
        color=[color for *_, color, _ in kinds], edgecolor=[edge for *_, edge in kinds],
        hatch=["//////" if edge == BLUE else None for *_, edge in kinds],
        label=[f"{name} ({own.sum()})" for name, own, _, _ in kinds])
    # room for the legend
    bottom.set(xlabel=f"confidence ξ = σ(margin) against π_init, {len(xi)} pairs", ylabel="pairs",
               xlim=(0.5, end), ylim=(0, 1.5 * np.max(counts)))
    bottom.yaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.legend(frameon=False, fontsize=9, ncol=2, loc="upper right")

    x = np.linspace(0.5, end, 200)
    top.plot(x, -np.log(x), color="black", lw=1.4)
    for _, own, color, edge in kinds:
        if color != GREY:
            top.plot(xi[own], -np.log(xi[own]), "o", color=color, ms=6, mec=edge,
                     mew=1.6 if edge == BLUE else 0.4)
    top.set(ylabel="loss −log ξ", title=f"seed {run.parent.name}, round {t}: both defences on ξ")
    top.tick_params(labelbottom=False)

    # the statistic that SPA looks at
    for _, own, color, edge in kinds:
        right.plot(xi[own & could], tilde[own & could], "o", color=color, ms=6, mec=edge,
                   mew=1.6 if edge == BLUE else 0.4)
        right.plot(xi[own & ~could], tilde[own & ~could], "o", color=color, ms=5, mfc="white")
    right.plot([], [], "o", color=GREY, mfc="white", label="seen before SPA flags anything")
    for k, tau in enumerate(found["taus"]):
        right.axhline(tau, color=BLUE, lw=0.7, ls="--",
                      label="SPA's thresholds τ, step by step" if k == 0 else None)
    right.axvspan(0.5, xi[large].max(initial=0.5), color=ORANGE, alpha=0.15, lw=0)
    right.axvspan(0.5, xi[small].max(initial=0.5), color=VERMILION, alpha=0.2, lw=0)
    right.set(xlabel="ξ, by which the adversary sorts (shaded: moved)", xlim=(0.5, end),
              ylim=(tilde.min() - 0.03, tilde.max() + 0.1),
              ylabel="p̃ against π$_{t-1}$, extrapolated, by which SPA sorts",
              title="they look at different numbers")
    right.legend(frameon=False, fontsize=9, loc="upper right")
    save(figure, path)


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("root", type=Path, help="the runs of bench/demo.sh: ROOT/SEED/ARM")
    cli.add_argument("--out", type=Path, default=Path("bench"), help="folder of the pictures")
    cli.add_argument("--run", default="1/worst", help="SEED/ARM of the picture of the defences")
    cli.add_argument("--round", type=natural, default=1, help="its round")
    args = cli.parse_args()
    runs = read_runs(args.root, "report.md.stats.json")
    if not runs:
        fail(f"{args.root}: no reports of bench/demo.sh")
    plot_stages(runs, args.out / "demo_stages.png")
    plot_defences(args.root / args.run, args.round, args.out / "demo_defences.png")


if __name__ == "__main__":
    run_stage(main)

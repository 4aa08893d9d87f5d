"""The pictures of RESULTS.md, from what bench/demo.sh and bench/demo_measures.py left.

    demo_kl.png        gold score, and the second lexicon's, against √KL to π_init, a curve a method
    demo_stages.png    gold score by stage; beside it the differences to SPA, paired over seeds, in
                       which what seeds have in common cancels

Bars are 95 % t-intervals over seeds.

    python bench/demo_plots.py runs/table --out bench
"""
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.demo_table import read_runs, values  # noqa: E402
from bench.stats import draw_curve, interval  # noqa: E402
from core.rows import fail  # noqa: E402
from core.stage import parser, run_stage  # noqa: E402


def by_round(arm: str) -> list[tuple[str, str]]:
    return [("spa", "seed"), (arm, "round1"), (arm, "round2")]


# method → its points (arm of bench/demo.sh, policy), from the nearest to π_init to the furthest
CURVES = {
    "SFT (π_init)": [("spa", "init")],
    "the ray, from c = 1 on":
        [("spa", "seed"), *(("rays", f"ray{c}") for c in ("1.5", "2", "3", "4", "5", "6"))],
    "the seed at 1, 6, 12 epochs": [("spa", "seed"), ("epochs6", "seed"), ("epochs12", "seed")],
    "SPA, 0 to 2 rounds": by_round("spa"),
    "SPA, twice the rate": by_round("fast"),
    "worst case, ε = 0.01": by_round("worst"),
    "worst case, twice the rate": by_round("fast_worst"),
    "gold pairs replayed": by_round("replay"),
    "gold labels in the rounds": by_round("judge"),
    "DPO on all gold labels, its ray":
        [("every", "seed"), *(("every_rays", f"ray{c}") for c in ("1.5", "2", "3"))],
}
STAGES = {"init": "SFT", "seed": "DPO on the\ngold seed", "round1": "round 1", "round2": "round 2"}
# name → arm, colour (Okabe and Ito's, which colour-blind eyes tell apart)
METHODS = {"SPA": ("spa", "#0072B2"), "worst case, ε = 0.01": ("worst", "#D55E00"),
           "gold pairs replayed": ("replay", "#CC79A7"),
           "SPA, a quarter of the seed flipped": ("flip_spa", "#56B4E9"),
           "worst case, a quarter flipped": ("flip_worst", "#E69F00")}


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(path)


def plot_kl(runs: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    titles = {"score": "gold score (VADER)", "second_score": "second lexicon"}
    for axis, (key, title) in zip(axes, titles.items()):
        for method, rows in CURVES.items():
            points = {row: [list(values(runs, row, k).values()) for k in ("kl", key)]
                      for row in rows}
            points = {row: point for row, point in points.items() if all(point)}
            # π_0 alone, where others start, is no curve
            if points.keys() - {("spa", "seed")}:
                draw_curve(axis, method, list(points.values()))
        axis.set(title=title, xlabel="√KL to π_init (√nats an answer)")
        axis.grid(color="0.9")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=3,
                  frameon=False)
    save(figure, path)


def plot_stages(runs: dict, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), width_ratios=[1.8, 1],
                                         layout="constrained")
    for k, (name, (arm, color)) in enumerate(METHODS.items()):
        place = 0.08 * (k - 2)
        known = {x: list(values(runs, (arm, stage), "score").values())
                 for x, stage in enumerate(STAGES)}
        known = {x + place: interval(scores) for x, scores in known.items() if scores}
        if not known:
            continue
        mean, half, _ = zip(*known.values())
        left.errorbar(list(known), mean, half, color=color, marker="o", capsize=3, label=name)
        base = "flip_spa" if arm.startswith("flip") else "spa"
        for x, stage in enumerate(("round1", "round2")):
            one, other = (values(runs, (row, stage), "score") for row in (arm, base))
            gains = [one[seed] - other[seed] for seed in one if seed in other]
            if arm != base and gains:
                right.plot([x + place - 0.03] * len(gains), gains, ".", color="#AAAAAA")
                gain = interval(gains)
                right.errorbar(x + place, gain.mean, gain.half, color=color, marker="o", capsize=3)
    # a stage of its own: it is not DPO on the seed
    every = interval(list(values(runs, ("every", "seed"), "score").values()) or [float("nan")])
    left.errorbar(len(STAGES), every.mean, every.half, color="#009E73", marker="D", capsize=3)
    left.set_xticks(range(len(STAGES) + 1), [*STAGES.values(), "DPO on all\ngold labels"])
    left.set(title="gold score by stage", ylabel="gold score (VADER)")
    right.axhline(0, color="black", lw=0.8)
    right.set_xticks([0, 1], ["round 1", "round 2"])
    right.set(title="difference to SPA, paired (grey: each seed)", xlim=(-0.5, 1.5))
    for axis in (left, right):
        axis.grid(axis="y", color="0.9")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncol=3,
                  frameon=False)
    save(figure, path)


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("root", type=Path, help="the runs of bench/demo.sh: ROOT/SEED/ARM")
    cli.add_argument("--out", type=Path, default=Path("bench"), help="folder of the pictures")
    args = cli.parse_args()
    runs = read_runs(args.root)
    if not runs:
        fail(f"{args.root}: no reports of bench/demo.sh")
    plt.rcParams["font.size"] = 11
    plot_stages(runs, args.out / "demo_stages.png")
    plot_kl(runs, args.out / "demo_kl.png")


if __name__ == "__main__":
    run_stage(main)

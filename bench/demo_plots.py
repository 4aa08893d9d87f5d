"""The picture of RESULTS.md, from what bench/demo.sh and bench/demo_measures.py left: gold score,
and the second lexicon's, against √KL to π_init, a curve a method. Bars are 95 % t-intervals over
seeds.

    python bench/demo_plots.py runs/table --out bench/demo_kl.png
"""
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.demo_table import read_runs, values  # noqa: E402
from bench.stats import draw_curve  # noqa: E402
from core.rows import fail  # noqa: E402
from core.stage import parser, run_stage  # noqa: E402


def by_round(arm: str) -> list[tuple[str, str]]:
    return [("spa", "seed"), (arm, "round1"), (arm, "round2")]


# method → its points (arm of bench/demo.sh, policy), from the nearest to π_init to the furthest
CURVES = {
    "SFT (π_init)": [("spa", "init")],
    "the ray, from c = 1 on":
        [("spa", "seed"), *(("rays", name) for name in ("ray2", "ray4", "ray6"))],
    "SPA, 0 to 2 rounds": by_round("spa"),
    "worst case, ε = 0.01": by_round("worst"),
    "gold pairs replayed": by_round("replay"),
    "gold labels in the rounds": by_round("judge"),
    "DPO on all gold labels": [("every", "seed")],
}


def plot_kl(runs: dict):
    """The figure; methods without a run are left out."""
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
    return figure


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("root", type=Path, help="the runs of bench/demo.sh: ROOT/SEED/ARM")
    cli.add_argument("--out", type=Path, default=Path("bench/demo_kl.png"), help="PNG file")
    args = cli.parse_args()
    runs = read_runs(args.root)
    if not runs:
        fail(f"{args.root}: no reports of bench/demo.sh")
    plt.rcParams["font.size"] = 11
    plot_kl(runs).savefig(args.out, dpi=100)


if __name__ == "__main__":
    run_stage(main)

"""The report of a run: tables, plots and answers side by side, on one page that can be read without
the code."""
import math

import numpy as np

SIDE_BY_SIDE = 3  # prompts shown from the top, and as many of the last policy's worst


def cell(value) -> str:
    """A value in a table; None and NaN are –."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header)]
    lines += [[cell(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def p_value(p: float | None) -> str | None:
    """A p-value with a floor: what a permutation test of 9 999 draws can tell."""
    if p is None:
        return None
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def leaderboard_table(scores: dict[str, dict], difficulty: bool) -> str:
    """AlpacaEval's scores of every model, in percent."""
    rows = []
    for name, s in scores.items():
        counts = [s[key] for key in ("n_wins", "n_wins_base", "n_draws", "n_missing", "avg_length")]
        rows.append([name, f"{s['length_controlled_winrate']:.2f} ± {s['lc_standard_error']:.2f}",
                     f"{s['win_rate']:.2f} ± {s['standard_error']:.2f}", *counts])
    table = markdown(["model", "length-controlled win rate", "win rate", "wins", "losses", "draws",
                      "missing", "characters"], rows)
    if difficulty:
        return table
    return (f"{table}\n\nWithout --instruction-difficulty: that term is left out of the "
            "length-controlled regression, which is symmetric then, and its ± is a bootstrap's.")


def policy_table(policies: dict[str, dict]) -> str:
    """The measures of every policy, a line each."""
    rows = []
    for name, p in policies.items():
        win = p.get("win_rate")
        if win is not None:
            low, high = p["interval"]
            win = f"{win:.3f} [{low:.3f}, {high:.3f}]"
        controlled = p.get("length_controlled_winrate", math.nan)
        if not math.isnan(controlled):
            controlled = f"{controlled / 100:.3f} ± {p['lc_standard_error'] / 100:.3f}"
        score = f"{p['score']:.3f} ± {p['score_error']:.3f}" if "score" in p else None
        rows.append([name, win, p_value(p.get("p")), controlled, p.get("ties"), score,
                     round(p["characters"]), p.get("ended"), p.get("openings")])
    return markdown(["policy", "win rate [95 %]", "p", "length-controlled", "ties", "gold score",
                     "characters", "ended", "openings"], rows)


def label_table(labels: dict[str, dict]) -> str:
    """How right the self-labels of every round are."""
    keys = ("pairs", "accuracy", "flagged", "wrong_among_flagged", "wrong")
    rows = [[name, *(quality.get(key) for key in keys)] for name, quality in labels.items()]
    return markdown(["self-labels of", "pairs", "accuracy", "flagged", "flagged: wrong",
                     "could be flagged: wrong"], rows)


def mt_bench_table(results: dict[str, dict]) -> str:
    """Mean ratings by category, a column a policy."""
    rows = []
    for key in next(iter(results.values())):
        row = [key]
        for means in results.values():
            value = means.get(key)
            shown = isinstance(value, float) and not math.isnan(value)
            row.append(f"{value:.2f}" if shown else value)
        rows.append(row)
    return markdown(["MT-Bench", *results], rows)


# -------------------------------------------------------------------------------------------- plots


def plot(path: str, policies: dict, labels: dict, confidences: dict, logs: dict[str, list[dict]],
         ratings: dict) -> None:
    """Win rates and gold score, lengths, training loss, label quality, confidences before and
    after, MT-Bench: a panel for each that there is something of."""
    import matplotlib  # slow to import, and the report's alone
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    judged = {name: quality for name, quality in labels.items() if quality}
    compared = any("win_rate" in p or "score" in p for p in policies.values())
    count = sum(map(bool, (compared, policies, logs, judged, confidences, ratings)))
    columns = min(3, max(1, count))
    rows = max(1, math.ceil(count / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(4.7 * columns, 3.75 * rows),
                                constrained_layout=True, squeeze=False)
    free = iter(axes.flat)
    if compared:
        plot_wins(next(free), policies)
    if policies:
        plot_lengths(next(free), policies)
    if logs:
        plot_losses(next(free), logs)
    if judged:
        plot_labels(next(free), judged)
    if confidences:
        plot_confidences(next(free), confidences)
    if ratings:
        plot_ratings(next(free), ratings)
    for axis in free:
        axis.remove()
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


def plot_wins(axis, policies: dict) -> None:
    baseline = next(iter(policies))
    kinds = (("win_rate", "win_rate_error", 1, "win rate"),
             ("score", "score_error", 1, "mean gold score"),
             ("length_controlled_winrate", "lc_standard_error", 100, "length-controlled win rate"))
    for key, error, scale, text in kinds:
        names = [name for name in policies if not math.isnan(policies[name].get(key, math.nan))]
        if names:
            axis.errorbar(names, [policies[name][key] / scale for name in names],
                          [policies[name][error] / scale for name in names], marker="o", capsize=3,
                          label=text)
    axis.axhline(0.5, color="gray", lw=0.8, ls=":")
    axis.set(title=f"against {baseline}, held-out prompts (± s.e.)")


def plot_lengths(axis, policies: dict) -> None:
    axis.plot(list(policies), [p["characters"] for p in policies.values()], marker="o")
    axis.set(title="length of the answers", ylabel="characters", ylim=(0, None))


def plot_losses(axis, logs: dict[str, list[dict]]) -> None:
    start = 0
    for name, log in logs.items():
        steps = np.arange(start, start + len(log)) + 1
        axis.plot(steps, [row["loss"] for row in log], marker=".", label=name)
        start += len(log)
    whole_numbers(axis.xaxis)
    axis.set(title="training loss", xlabel="step", ylabel="loss")


def plot_labels(axis, judged: dict) -> None:
    kinds = (("accuracy", "labels right"), ("wrong", "could be flagged: wrong"),
             ("wrong_among_flagged", "flagged: wrong"))
    for k, (key, text) in enumerate(kinds):
        known = [(i, q[key]) for i, q in enumerate(judged.values()) if q[key] is not None]
        if known:
            places = [i + 0.27 * (k - 1) for i, _ in known]
            axis.bar(places, [value for _, value in known], 0.25, label=text)
    axis.axhline(0.5, color="gray", lw=0.8, ls=":")
    axis.set(title="self-labels against the judge", xticks=range(len(judged)),
             xticklabels=list(judged), ylim=(0, 1))


def plot_confidences(axis, confidences: dict) -> None:
    every = [values for pair in confidences.values() for values in pair if values is not None]
    low = 0.5 if min(values.min() for values in every) >= 0.5 else 0.0
    bins = np.linspace(low, 1, 41)
    for k, (name, (before, after)) in enumerate(confidences.items()):
        for values, style, when in ((before, ":", "before"), (after, "-", "after")):
            if values is not None:
                axis.hist(values, bins=bins, histtype="step", ls=style, color=f"C{k}",
                          label=f"{name}, {when}")
    whole_numbers(axis.yaxis)
    axis.set(title="confidence of a round's pairs, before and after it", xlabel="ξ = σ(margin)",
             ylabel="pairs", xlim=(low, 1))


def plot_ratings(axis, ratings: dict) -> None:
    other = ("turn 1", "turn 2", "average", "rated", "unrated")
    for k, (name, means) in enumerate(ratings.items()):
        keys = [key for key in means if key not in other]
        places = np.arange(len(keys)) + 0.8 * k / len(ratings)
        axis.barh(places, [means[key] for key in keys], 0.8 / len(ratings), label=name)
        axis.set(title="MT-Bench", yticks=range(len(keys)), yticklabels=keys, xlim=(0, 10))


def whole_numbers(axis) -> None:
    """Ticks of a count."""
    from matplotlib.ticker import MaxNLocator  # as slow to import as the rest of it
    axis.set_major_locator(MaxNLocator(integer=True))


# ------------------------------------------------------------------------------------------ answers


def openings(texts: list[str]) -> float:
    """Distinct first three words, as a share of the answers: low where a policy has one opening."""
    return len({tuple(text.split()[:3]) for text in texts}) / len(texts)


def side_by_side(answers: dict[str, list[dict]], prompts: list[int]) -> str:
    """Prompts by their numbers, each with the first sample of every policy; ✂ where the length
    limit cut it."""
    parts = []
    some = next(iter(answers.values()))
    for i in prompts:
        lines = [f"**{' '.join(some[i]['prompt'][-1]['content'].split())}**\n"]
        for name, rows in answers.items():
            cut = "" if rows[i].get("ended", [True])[0] else " ✂"
            lines.append(f"- **{name}**: {' '.join(rows[i]['responses'][0].split())}{cut}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)

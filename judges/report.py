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
    """A p-value to three digits."""
    if p is None or math.isnan(p):
        return None
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def rate(value: float | None, error: float, interval: list[float] | None, digits: int = 3,
         scale: float = 1.0) -> str | None:
    """value ± error, or value [interval] where there is one; all divided by `scale`."""
    if value is None or math.isnan(value):
        return None
    text = f"{value / scale:.{digits}f}"
    if interval:
        low, high = interval
        if math.isnan(low):  # of one prompt there is none
            return text
        return f"{text} [{low / scale:.{digits}f}, {high / scale:.{digits}f}]"
    return f"{text} ± {error / scale:.{digits}f}"


def leaderboard_table(scores: dict[str, dict], difficulty: bool) -> str:
    """AlpacaEval's scores of every model, in percent."""
    rows = []
    for name, s in scores.items():
        counts = [s[key] for key in ("n_wins", "n_wins_base", "n_draws", "n_missing", "avg_length")]
        controlled = rate(s["length_controlled_winrate"], s["lc_standard_error"],
                          s.get("lc_interval"), 2)
        win = rate(s["win_rate"], s["standard_error"], s.get("interval"), 2)
        rows.append([name, controlled, win, *counts])
    table = markdown(["model", "length-controlled win rate", "win rate", "wins", "losses", "draws",
                      "missing", "characters"], rows)
    notes = []
    if not difficulty:
        notes.append("Without --instruction-difficulty the length-controlled rate is not the "
                     "published one: its regression knows lengths alone and is symmetric in the "
                     "two models, and its ± is a bootstrap's over prompts.")
    if any("interval" in s or "lc_interval" in s for s in scores.values()):
        notes.append("[low, high]: at 0 and 100 an exact 95 % interval over prompts.")
    return "\n\n".join([table, *notes])


def policy_table(policies: dict[str, dict]) -> str:
    """The measures of every policy, a line each."""
    rows = []
    for name, p in policies.items():
        win = rate(p.get("win_rate"), math.nan, p.get("interval"))
        controlled = rate(p.get("length_controlled_winrate"), p.get("lc_standard_error"),
                          p.get("lc_interval"), scale=100)
        score = rate(p.get("score"), p.get("score_error"), None)
        rows.append([name, win, p_value(p.get("p")), controlled, p.get("ties"), score,
                     round(p["characters"]), p.get("ended"), p.get("openings")])
    return markdown(["policy", "win rate [95 %]", "p", "length-controlled", "ties", "gold score",
                     "characters", "ended", "openings"], rows)


def label_table(labels: dict[str, dict]) -> str:
    """How right the self-labels of every round are."""
    keys = ("pairs", "accuracy", "flagged", "wrong_among_flagged", "could_be_flagged", "wrong")
    rows = [[name, *(quality.get(key) for key in keys)] for name, quality in labels.items()]
    return markdown(["self-labels of", "pairs", "accuracy", "flagged", "flagged: wrong",
                     "could be flagged", "of these wrong"], rows)


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
    figure = plt.figure(figsize=(4.7 * columns, 3.75 * rows), constrained_layout=True)
    grid = figure.add_gridspec(rows, 6)  # a last line that is not full shares its width
    axes = []
    for k in range(count):
        line, place = divmod(k, columns)
        width = 6 // min(columns, count - line * columns)
        axes.append(figure.add_subplot(grid[line, place * width:(place + 1) * width]))
    free = iter(axes)
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
    for axis in axes:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


def bar(p: dict, key: str, error: str, interval: str, scale: float) -> tuple[float, ...]:
    """(value, length of its 95 % bar below, and above)."""
    value = p[key] / scale
    if interval in p:
        low, high = p[interval]
        return value, max(value - low / scale, 0.0), max(high / scale - value, 0.0)
    return value, 1.96 * p[error] / scale, 1.96 * p[error] / scale


def plot_wins(axis, policies: dict) -> None:
    names = list(policies)
    kinds = (("win_rate", "win_rate_error", "interval", 1, "win rate"),
             ("score", "score_error", None, 1, "mean gold score"),
             ("length_controlled_winrate", "lc_standard_error", "lc_interval", 100,
              "length-controlled win rate"))
    for key, error, interval, scale, text in kinds:
        known = [k for k, name in enumerate(names)
                 if not math.isnan(policies[name].get(key, math.nan))]
        if known:
            bars = [bar(policies[names[k]], key, error, interval, scale) for k in known]
            value, below, above = np.array(bars).T
            axis.errorbar(known, value, [below, above], marker="o", capsize=3, label=text)
    if any("win_rate" in p for p in policies.values()):
        axis.axhline(0.5, color="gray", lw=0.8, ls=":", label=f"as good as {names[0]}")
    axis.set(title=f"against {names[0]}, held-out prompts (bars: 95 %)", xticks=range(len(names)),
             xticklabels=names)


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
             xticklabels=list(judged), xlim=(-0.5, len(judged) - 0.5), ylim=(0, 1.05))


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
    room = 0.02 * (1 - low)  # for the lines of the outermost bins
    axis.set(title="confidence of a round's pairs, before and after it", xlabel="ξ = σ(margin)",
             ylabel="pairs", xlim=(low - room, 1 + room))


def plot_ratings(axis, ratings: dict) -> None:
    other = ("turn 1", "turn 2", "average", "rated", "unrated", "prompts cut",
             "answers cut")
    for k, (name, means) in enumerate(ratings.items()):
        keys = [key for key in means if key not in other]
        places = np.arange(len(keys)) + 0.8 * k / len(ratings)
        axis.barh(places, [means[key] for key in keys], 0.8 / len(ratings), label=name)
        axis.set(title="MT-Bench", yticks=range(len(keys)), yticklabels=keys, xlim=(0, 10.2))


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

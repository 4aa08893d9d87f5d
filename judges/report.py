"""The report of a run: tables, six plots and answers side by side, on one page that can be read without the code."""
import math

import numpy as np


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table; None and NaN are –."""
    def cell(value) -> str:
        if value is None or isinstance(value, float) and math.isnan(value):
            return "–"
        return f"{value:.3f}" if isinstance(value, float) else str(value)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *([cell(v) for v in row] for row in rows)))


def leaderboard_table(scores: dict[str, dict], difficulty: bool) -> str:
    """AlpacaEval's scores of every model, in percent."""
    rows = [[name, f"{s['length_controlled_winrate']:.2f} ± {s['lc_standard_error']:.2f}", f"{s['win_rate']:.2f} ± {s['standard_error']:.2f}",
             *(s[key] for key in ("n_wins", "n_wins_base", "n_draws", "n_missing", "avg_length"))] for name, s in scores.items()]
    table = markdown(["model", "length-controlled win rate", "win rate", "wins", "losses", "draws", "missing", "characters"], rows)
    return table if difficulty else (f"{table}\n\nWithout --instruction-difficulty: that term is left out of the length-controlled regression, "
                                     "and its ± is a bootstrap's.")


def policy_table(policies: dict[str, dict]) -> str:
    rows = []
    for name, p in policies.items():
        win, controlled = p.get("win_rate"), p.get("length_controlled_winrate")
        rows.append([name, None if win is None else f"{win:.3f} [{p['interval'][0]:.3f}, {p['interval'][1]:.3f}]", p.get("p"),
                     None if controlled is None or math.isnan(controlled) else f"{controlled / 100:.3f} ± {p['lc_standard_error'] / 100:.3f}",
                     p.get("ties"), f"{p['score']:.3f} ± {p['score_error']:.3f}" if "score" in p else None, round(p["characters"])])
    return markdown(["policy", "win rate [95 %]", "p", "length-controlled", "ties", "gold score", "characters"], rows)


def label_table(labels: dict[str, dict]) -> str:
    return markdown(["self-labels of", "pairs", "accuracy", "flagged", "flagged: wrong", "all: wrong"],
                    [[name, *(q.get(key) for key in ("pairs", "accuracy", "flagged", "wrong_among_flagged", "wrong"))] for name, q in labels.items()])


def mt_bench_table(results: dict[str, dict]) -> str:
    names = list(results)
    return markdown(["MT-Bench", *names], [[key, *(f"{v:.2f}" if isinstance(v := results[n].get(key), float) and not math.isnan(v) else v for n in names)]
                                           for key in results[names[0]]])


def plot(path: str, policies: dict, labels: dict, confidences: dict, logs: dict[str, list[dict]], ratings: dict) -> None:
    """Six panels: win rates and gold score, lengths, training loss, label quality, confidences before and after, MT-Bench."""
    import matplotlib  # slow to import, and the report's alone
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), constrained_layout=True)
    win, length, loss, label, confidence, bench = axes.flat
    names = list(policies)
    for key, error, scale, text in (("win_rate", "win_rate_error", 1, "win rate"), ("score", "score_error", 1, "mean gold score"),
                                    ("length_controlled_winrate", "lc_standard_error", 100, "length-controlled win rate")):
        if names and key in policies[names[-1]]:
            win.errorbar(names, [policies[n].get(key, 0.5 * scale) / scale for n in names],
                         [policies[n].get(error, 0) / scale for n in names], marker="o", capsize=3, label=text)
    win.set(title=f"against {names[0]}, held-out prompts (± s.e.)" if names else "no prompts")
    length.plot(names, [policies[n]["characters"] for n in names], marker="o")
    length.set(title="length of the answers", ylabel="characters", ylim=(0, None))
    start = 0
    for name, log in logs.items():
        loss.plot(np.arange(start, start + len(log)) + 1, [row["loss"] for row in log], marker=".", label=name)
        start += len(log)
    loss.set(title="training loss", xlabel="step", ylabel="loss")
    judged = {name: q for name, q in labels.items() if q}
    for k, (key, text) in enumerate((("accuracy", "labels right"), ("wrong", "labels wrong"), ("wrong_among_flagged", "wrong among flagged"))):
        label.bar(np.arange(len(judged)) + 0.27 * (k - 1), [q[key] or 0 for q in judged.values()], 0.25, label=text)
    label.set(title="self-labels against the judge", xticks=range(len(judged)), xticklabels=list(judged), ylim=(0, 1))
    label.axhline(0.5, color="gray", lw=0.8, ls=":")
    for k, (name, (before, after)) in enumerate(confidences.items()):
        for values, style, when in ((before, ":", "before"), (after, "-", "after")):
            if values is not None:
                confidence.hist(values, bins=np.linspace(0, 1, 41), histtype="step", ls=style, color=f"C{k}", label=f"{name}, {when}")
    confidence.set(title="confidence ξ of a round's pairs, before and after it", xlabel="ξ = σ(margin)", ylabel="pairs")
    for k, (name, means) in enumerate(ratings.items()):
        keys = [key for key in means if key not in ("turn 1", "turn 2", "average", "rated", "unrated")]
        bench.barh(np.arange(len(keys)) + 0.8 * k / len(ratings), [means[key] for key in keys], 0.8 / len(ratings), label=name)
        bench.set(title="MT-Bench", yticks=range(len(keys)), yticklabels=keys, xlim=(0, 10))
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
        axis.set_visible(axis.has_data())
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


def side_by_side(answers: dict[str, list[dict]], count: int = 3) -> str:
    """The first `count` prompts, with the first sample of every policy."""
    parts = []
    for i, row in enumerate(next(iter(answers.values()))[:count]):
        quotes = [f"- **{name}**: {' '.join(rows[i]['responses'][0].split())}" for name, rows in answers.items()]
        parts.append(f"**{' '.join(row['prompt'][-1]['content'].split())}**\n\n" + "\n".join(quotes))
    return "\n\n".join(parts)

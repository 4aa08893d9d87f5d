"""The report of a run: sentences, tables, a picture and answers side by side, on one page that can
be read without the code. Needs no torch."""
import math
import re

import numpy as np

from core.stage import about
from judges.history import command_of, history

SIDE_BY_SIDE = 3  # prompts shown from the top, and as many of the last policy's worst

COLUMNS = """Win rate: how often the judge prefers the policy's answer to the first policy's, \
ties ½, with a 95 % interval over prompts; p: the paired test of that win rate against the line \
above (the first: against ½); at equal length: the win rate by a regression on lengths that is \
symmetric in the two policies; ± one standard error over prompts. \
Second lexicon: mean polarity, from −1 to 1, of the words that TextBlob knows (pip install \
textblob); nothing was trained on it, so that where the gold score rises and it does not, a policy \
pleases the gold judge alone. Ended: share of the answers that ended before the length limit, ✂ \
marks one that did not; openings: distinct first three words, as a share of the answers."""
NOTES = {
    "order_disagreement": "of the comparisons have another winner when the two are exchanged",
    "no_verdict": "answers of the judge held no verdict and count ½",
}

# ------------------------------------------------------------------------------------------ tables


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


def p_value(p: float | None) -> str:
    """A p-value to three digits."""
    return "< 0.001" if p is not None and p < 0.001 else cell(p)


def with_error(p: dict, key: str) -> str | None:
    """value ± standard error."""
    return f"{p[key]:.3f} ± {cell(p[f'{key}_error'])}" if key in p else None


def policy_table(policies: dict[str, dict]) -> str:
    """The measures of every policy, a line each."""
    rows = []
    for name, p in policies.items():
        win = cell(p.get("win_rate"))
        if "win_rate" in p:
            win += " [{:.3f}, {:.3f}]".format(*p["interval"])
        rows.append([name, win, p_value(p.get("p")), with_error(p, "length_controlled"),
                     p.get("ties"), with_error(p, "score"), with_error(p, "second_score"),
                     round(p["characters"]), p.get("ended"), p["openings"]])
    return markdown(["policy", "win rate [95 %]", "p", "at equal length", "ties", "gold score",
                     "second lexicon", "characters", "ended", "openings"], rows)


def label_table(labels: dict[str, dict]) -> str:
    """How right the self-labels of every round are."""
    keys = ("pairs", "accuracy", "flagged", "wrong_among_flagged", "could_be_flagged", "wrong")
    rows = [[name, *(quality[key] for key in keys)] for name, quality in labels.items()]
    return markdown(["self-labels of", "pairs", "the judge agrees", "flagged as noise",
                     "of these wrong", "could be flagged", "of these wrong"], rows)


# --------------------------------------------------------------------------------------- sentences


def spoken(name: str) -> str:
    """A policy in a sentence: "round2" is round 2."""
    return re.sub(r"^round(?=\d+$)", "round ", name)


def opening(policies: dict[str, dict], labels: dict[str, dict],
            trainings: dict[str, tuple]) -> str:
    """The run in sentences: the last policy against the first and the one before it, its scores,
    how right its labels were, and what diverged."""
    names = list(policies)
    first, before, last = names[0], names[-2:][0], names[-1]
    p = policies[last]
    clauses = [f"answers in {p['characters']:.0f} characters"]
    if "win_rate" in p:
        low, high = p["interval"]
        clauses = [f"is preferred to {spoken(first)} on {100 * p['win_rate']:.0f} % of the prompts "
                   f"[{100 * low:.0f}, {100 * high:.0f}]"]
        if before != first:
            equals = "< 0.001" if p["p"] < 0.001 else f"= {p['p']:.2g}"
            clauses.append(f"against {spoken(before)} p {equals}")
    if "ended" in p:
        clauses.append(f"{100 * p['ended']:.0f} % of its answers end")
    sentences = [f"{spoken(last)} {'; '.join(clauses)}"]
    for key, text in (("score", "gold score"), ("second_score", "score by a second lexicon")):
        if key in p and last != first:
            sentences.append(f"its mean {text} is {p[key]:.2f}, that of {spoken(first)} "
                             f"{policies[first][key]:.2f}")
    for name, quality in labels.items():
        sentences.append(f"the judge agrees with {100 * quality['accuracy']:.0f} % of the "
                         f"self-labels of {spoken(name)}")
    for name, (_, record) in trainings.items():
        if record.get("diverged"):
            sentences.append(f"{spoken(name)} {record['diverged'].removeprefix('; ')}")
    return " ".join(f"{text[0].upper()}{text[1:].removesuffix('.')}." for text in sentences)


def notes(policies: dict, labels: dict) -> list[str]:
    """What must be known of single policies and labels: a line for each of NOTES that holds."""
    return [f"`{name}`: {cell(measures[key])} {text}."
            for name, measures in [*policies.items(), *labels.items()]
            for key, text in NOTES.items() if measures.get(key)]


def came_about(stages: list[dict]) -> list[str]:
    """Every stage with its settings and wall time, and its command."""
    rows = []
    for stage in stages:
        made = stage["about"]
        settings = [f"{key} {value}" for key, value in stage["settings"].items()
                    if key not in made["inputs"] and value not in (None, False, "")]
        rows.append([stage["out"], ", ".join(settings), round(made["seconds"]), made["processes"],
                     made["commit"], made["machine"]])
    rows.append(["all", None, sum(row[2] for row in rows), None, None, None])
    commands = "\n".join(command_of(stage["about"]) for stage in stages)
    table = markdown(["wrote", "settings", "seconds", "processes", "commit", "machine"], rows)
    return [table, f"```\n{commands}\n```"]


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


def page(title: str, judge: str, answers: dict[str, list[dict]], policies: dict[str, dict],
         labels: dict[str, dict], trainings: dict[str, tuple], inputs: dict[str, str]) -> str:
    """report.md; `inputs` are the files that it is made of."""
    rows = next(iter(answers.values()))
    last = list(policies)[-1]
    parts = [f"# Run `{title}`", opening(policies, labels, trainings), policy_table(policies),
             *([label_table(labels)] if labels else []),
             "![win rates, scores, lengths, training](report.png)",
             f"{len(rows)} held-out prompts × {len(rows[0]['responses'])} samples, judge: {judge}.",
             COLUMNS, *notes(policies, labels), "## Responses side by side",
             side_by_side(answers, list(range(len(rows)))[:SIDE_BY_SIDE])]
    if worst := policies[last].get("worst"):
        parts += [f"## The prompts where `{last}` does worst by the judge",
                  side_by_side(answers, worst[:SIDE_BY_SIDE])]
    this = {"out": "this report", "settings": {}, "about": about(inputs)}
    stages = [*history(list(inputs.values())), this]
    return "\n\n".join([*parts, "## How it came about", *came_about(stages)]) + "\n"


# ----------------------------------------------------------------------------------------- picture


def plot(path: str, policies: dict[str, dict], labels: dict[str, dict],
         trainings: dict[str, tuple]) -> None:
    """Win rates, scores, lengths, training, labels: a panel for each that there is something of."""
    import matplotlib  # slow to import, and the report's alone
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    first = next(iter(policies))
    panels = {f"preferred to {first}": {"win_rate": "win rate",
                                        "length_controlled": "at equal length"},
              "scores of the answers": {"score": "gold score", "second_score": "second lexicon"},
              "length of the answers": {"characters": "characters"}}
    shown = [title for title, kinds in panels.items()
             if any(key in p for key in kinds for p in policies.values())]
    trained = {name: training for name, training in trainings.items() if training[0]}
    count = len(shown) + bool(trained) + bool(labels)
    figure, axes = plt.subplots(1, count, figsize=(4.5 * count, 3.75), squeeze=False,
                                constrained_layout=True)
    for axis, title in zip(axes[0], shown):
        plot_measures(axis, policies, panels[title])
        axis.set(title=title)
    if trained:
        plot_training(axes[0, len(shown)], trained)
    if labels:
        plot_labels(axes[0, -1], labels)
    for axis in axes[0]:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100, format="png")
    plt.close(figure)


def plot_measures(axis, policies: dict, kinds: dict[str, str]) -> None:
    """Measures of the policies that have them, with 95 % bars where their errors are known."""
    names = list(policies)
    for key, text in kinds.items():
        known = [k for k, name in enumerate(names) if key in policies[name]]
        if known:
            bars = [bar_of(policies[names[k]], key) for k in known]
            value, low, high = np.array(bars).T
            axis.errorbar(known, value, [value - low, high - value], marker="o", capsize=3,
                          clip_on=False, label=text)
    if "win_rate" in kinds:
        axis.axhline(0.5, color="gray", lw=0.8, ls=":", label="as good")
    axis.set(xticks=range(len(names)), xticklabels=names, ylabel="mean, bars: 95 %")
    axis.margins(x=0.1, y=0.1)


def bar_of(p: dict, key: str) -> tuple[float, float, float]:
    """(a measure, the ends of its 95 % interval)."""
    if key == "win_rate":
        return p[key], *p["interval"]
    error = np.nan_to_num(p.get(f"{key}_error", 0.0))
    return p[key], p[key] - 1.96 * error, p[key] + 1.96 * error


def plot_training(axis, trained: dict[str, tuple]) -> None:
    """The loss; where it is anchored at π_init, and so rises by construction, the accuracy."""
    settings = [record.get("settings", {}) for _, record in trained.values()]
    key = "accuracy" if any(s.get("anchor") == "init" for s in settings) else "loss"
    start = 1
    for name, (log, _) in trained.items():
        axis.plot(range(start, start + len(log)), [step[key] for step in log], ".-",
                  clip_on=False, label=name)
        start += len(log)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(title=f"training {key}", xlabel="step")


def plot_labels(axis, labels: dict) -> None:
    """How right a round's labels are, and whether those flagged as noise are the wrong ones."""
    kinds = {"accuracy": "the judge agrees", "wrong": "wrong, of all that could be flagged",
             "wrong_among_flagged": "wrong, of those flagged as noise"}
    for k, (key, text) in enumerate(kinds.items()):
        places = np.arange(len(labels)) + 0.27 * (k - 1)
        axis.bar(places, [quality[key] or 0.0 for quality in labels.values()], 0.25, label=text)
    axis.set(title="a round's self-labels", ylabel="share of the pairs", xticks=range(len(labels)),
             xticklabels=list(labels), ylim=(0, 1.4))

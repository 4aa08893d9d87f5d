"""The report of a run: sentences, tables, a picture and answers side by side, on one page that can
be read without the code. Needs no torch."""
import math
import os
import re

from core.stage import about
from judges.history import command_of, history

SIDE_BY_SIDE = 3  # prompts shown

# The columns of the tables: measure → heading.
OF_POLICIES = {
    "win_rate": "win rate [95 %]", "p": "p", "length_controlled": "at equal length", "ties": "ties",
    "score": "gold score", "second_score": "second lexicon", "characters": "characters",
    "ended": "ended", "openings": "openings",
}
OF_LABELS = {
    "pairs": "pairs", "accuracy": "judge agrees with label", "flagged": "flagged as noise",
    "wrong_among_flagged": "wrong, of these", "could_be_flagged": "could be flagged",
    "wrong": "wrong, of those",
}
# Those of which the picture has a panel.
DRAWN = ("win_rate", "score", "second_score", "characters", "accuracy")
OF_JUDGES = {"order_disagreement": "decided by order", "no_verdict": "without verdict"}
# What a column means.
LEGEND = {
    "win_rate": "Win rate: how often the judge prefers the policy's answer to the first policy's, "
                "ties ½, with a 95 % interval over prompts.",
    "p": "p: the paired test of that win rate against the line above (the first: against ½).",
    "length_controlled": "At equal length: the win rate by a regression on lengths that is "
                         "symmetric in the two policies, ± one standard error over prompts.",
    "score": "Gold score: the judge's mean, ± one standard error over prompts.",
    "second_score": "Second lexicon: mean polarity, from −1 to 1, of the words that TextBlob knows "
                    "(pip install textblob); nothing was trained on it, so that where the gold "
                    "score rises and it does not, a policy pleases the gold judge alone.",
    "ended": "Ended: share of the answers that ended before the length limit; ✂ marks one that did "
             "not.",
    "openings": "Openings: of one answer to every prompt, the share of distinct first three words.",
    "flagged": "Flagged as noise: labels that the extrapolated policy doubted; the first fifth of "
               "the steps flags none. Wrong: shares, by the judge.",
    "order_disagreement": "Decided by order: share of the comparisons that have another winner "
                          "when the two are exchanged.",
    "no_verdict": "Without verdict: the judge's answers that hold none and count ½.",
}

# ------------------------------------------------------------------------------------------ tables


def cell(value) -> str:
    """A value in a table; None and NaN are –."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header)]
    lines += [[cell(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(measures: dict, key: str) -> str:
    """A measure in a table, with its interval or its error where it has one."""
    if key == "p" and measures.get(key, 1) < 0.001:
        return "< 0.001"
    if key == "win_rate" and key in measures:
        return "{:.3f} [{:.3f}, {:.3f}]".format(measures[key], *measures["interval"])
    error = f" ± {cell(measures[f'{key}_error'])}" if f"{key}_error" in measures else ""
    return cell(measures.get(key)) + error


def table(of: str, lines: dict[str, dict], headings: dict[str, str]) -> str:
    """Measures, a line for each name; a column that nobody has is left out."""
    headings = {key: text for key, text in headings.items()
                if any(key in measures for measures in lines.values())}
    rows = [[name, *(measured(measures, key) for key in headings)]
            for name, measures in lines.items()]
    return markdown([of, *headings.values()], rows)


# --------------------------------------------------------------------------------------- sentences


def spoken(name: str) -> str:
    """A policy in a sentence: "round2" is round 2."""
    return re.sub(r"^round(?=\d+$)", "round ", name)


def summary(policies: dict[str, dict], labels: dict[str, dict],
            trainings: dict[str, tuple]) -> str:
    """The run in sentences: the last policy against the first and the one before it, its scores,
    how right its labels were, and what diverged."""
    names = list(policies)
    first, last = names[0], names[-1]
    before = names[-2] if len(names) > 1 else last
    p = policies[last]
    clauses = [f"answers in {p['characters']:.0f} characters"]
    if "win_rate" in p:
        low, high = p["interval"]
        clauses = [f"is preferred to {spoken(first)} in {100 * p['win_rate']:.0f} % of the "
                   f"comparisons [{100 * low:.0f}, {100 * high:.0f}]"]
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


def came_about(stages: list[dict]) -> str:
    """The command of every stage, under what it wrote, its wall time, commit and machine."""
    commands = []
    for stage in stages:
        made = stage["about"]
        commands.append(f"# {stage['out']}: {made['seconds']:.0f} s, commit {made['commit']}, "
                        f"{made['machine']}\n{command_of(made)}")
    return "```bash\n{}\n```".format("\n".join(commands))


def side_by_side(answers: dict[str, list[dict]], most: int) -> str:
    """The first `most` prompts, each with the first sample of every policy; ✂ where the length
    limit cut it."""
    parts = []
    some = next(iter(answers.values()))
    for i, row in enumerate(some[:most]):
        lines = [f"**{' '.join(row['prompt'][-1]['content'].split())}**\n"]
        for name, rows in answers.items():
            cut = "" if rows[i].get("ended", [True])[0] else " ✂"
            lines.append(f"- **{name}**: {' '.join(rows[i]['responses'][0].split())}{cut}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def page(out: str, judge: str, answers: dict[str, list[dict]], policies: dict[str, dict],
         labels: dict[str, dict], trainings: dict[str, tuple], inputs: dict[str, str]) -> str:
    """The report in the folder `out`; `inputs` are the files that it is made of."""
    rows = next(iter(answers.values()))
    known = {key for measures in (*policies.values(), *labels.values()) for key in measures}
    parts = [f"# Run `{os.path.basename(os.path.abspath(out))}`",
             summary(policies, labels, trainings),
             table("policy", policies, OF_POLICIES | OF_JUDGES),
             *([table("self-labels of", labels, OF_LABELS | OF_JUDGES)] if labels else []),
             "![win rates, scores, lengths, labels, training](report.md.png)",
             f"{len(rows)} held-out prompts × {len(rows[0]['responses'])} samples, judge: {judge}.",
             " ".join(text for key, text in LEGEND.items() if key in known),
             "## Responses side by side", side_by_side(answers, SIDE_BY_SIDE),
             "## How it came about",
             came_about([*history(out), {"out": "this report", "about": about(inputs)}])]
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------- picture


def plot(path: str, policies: dict[str, dict], labels: dict[str, dict],
         trainings: dict[str, tuple]) -> None:
    """A panel for each measure of DRAWN that somebody has, with 95 % bars where its error is known;
    and the accuracy in training, step by step: losses against different anchors do not compare."""
    from matplotlib.figure import Figure  # slow to import, and the report's alone
    panels = []
    for key in DRAWN:
        measured = labels if key in OF_LABELS else policies
        having = {name: m for name, m in measured.items() if m.get(key) is not None}
        if having:
            panels.append((key, having))
    logs = {name: log for name, (log, _) in trainings.items() if log}
    count = len(panels) + bool(logs)
    figure = Figure(figsize=(3.6 * count, 3.6), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, (key, having) in zip(axes, panels):
        bars = [1.96 * (m.get(f"{key}_error") or 0.0) for m in having.values()]
        axis.errorbar(list(having), [m[key] for m in having.values()], bars, marker="o", capsize=3)
        axis.set_title((OF_POLICIES | OF_LABELS)[key])
        axis.margins(x=0.1, y=0.3)
    start = 1
    for name, log in logs.items():
        axes[-1].plot(range(start, start + len(log)), [step["accuracy"] for step in log], ".-",
                      label=name)
        start += len(log)
    if logs:
        axes[-1].set(title="accuracy in training", xlabel="update")
        axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=100, format="png")

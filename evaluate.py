"""Evaluate stage: the policies of a run against each other on held-out prompts, and the labels they
learnt from. It reads their answers; who samples them is generate.py.

    win rate of a policy   mean preference of the judge for its samples over those of the first
                           policy named, a tie ½; 95 % interval over prompts; p: paired test
                           against the policy before it
    length-controlled      the same at equal length, by a regression on lengths that is symmetric in
                           the two policies, ± standard error over prompts
    label accuracy         share of a round's self-labels that the judge agrees with, ties ½
    flag precision         share of the labels flagged as noise that were wrong, beside the share
                           among all that could be flagged (base rate)

`--judge vader` scores by a sentiment lexicon (the demo's gold), `reward-model` by a one-logit
classifier; `llm`, `pairrm` and `openai` compare two responses in both orders; `none` reports what
the answers look like. What the numbers mean is in judges/measures.py, who judges in
judges/judge.py, how it looks in judges/report.py.

Answers are rows of generate.py, or outputs in AlpacaEval's format (.json), all of the same prompts
in the same order. Which model gave them, and what was logged when it was trained, is found through
FILE.stats.json. Writes OUT/report.md with its picture, report.md.png; report.md.stats.json has all
of it as numbers, the preferences prompt by prompt too.

    python evaluate.py --answers init=eval/init.jsonl seed=eval/seed.jsonl --judge vader --out run
    python evaluate.py --answers gpt4=gpt4_outputs.json mine=mine.jsonl --out runs/alpaca \\
        --judge openai --judge-model NAME --base-url http://localhost:8000/v1
"""
import argparse
import math
import os
from pathlib import Path

from core.rows import fail, read_json_list, read_rows
from core.stage import exit_if_looking, parser, publish, run_stage
from judges.flags import files_by_name, judge_flags, start_judging


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the report is complete."""
    cli = parser(__doc__, out="folder for report.md and what belongs to it",
                 precision="of a judging model's matrix products")
    cli.add_argument("--answers", nargs="+", required=True, metavar="NAME=FILE",
                     help="what each policy answered; the first is the baseline")
    cli.add_argument("--labels", nargs="*", default=[], metavar="NAME=FILE",
                     help="rows that the policy NAME was trained on")
    judge_flags(cli, "none")
    args = cli.parse_args()
    args.answers = files_by_name(args.answers)
    args.labels = files_by_name(args.labels)
    if unknown := set(args.labels) - set(args.answers):
        fail(f"--labels names {', '.join(sorted(unknown))}, which --answers does not")
    args.out = f"{args.out}/report.md"
    start_judging(args)
    exit_if_looking(args.out, writes=1_000_000)
    return args


if __name__ == "__main__":
    args = flags()  # here already: what is imported below takes seconds to load

import numpy as np

from core.parallel import start_processes
from judges.history import training_of
from judges.judge import SCORERS, compare
from judges.measures import (
    label_quality,
    mean_and_error,
    text_measures,
    win_measures,
    wins,
)
from judges.report import page, plot

# Pairs of a round that are judged again: enough for a standard error of 0.016, and no round's
# whole cost a second time.
LABELS = 1000


def read_answers(args: argparse.Namespace) -> dict[str, list[dict]]:
    """name → rows with `prompt` and `responses`: as many to each, and the same prompts in the same
    order."""
    answers = {}
    for name, path in args.answers.items():
        if path.removesuffix(".gz").endswith(".json"):
            answers[name] = [{"prompt": [{"role": "user", "content": row["instruction"]}],
                              "responses": [row["output"]]}
                             for row in read_json_list(path, "instruction", "output")]
        else:
            answers[name] = read_rows(path, "responses")
    first, *_ = answers.values()
    prompts = [row["prompt"] for row in first]
    samples = len(first[0]["responses"])
    for name, rows in answers.items():
        path = args.answers[name]
        if [row["prompt"] for row in rows] != prompts:
            fail(f"{path}: its {len(rows)} prompts are not the {len(prompts)} of the first file; "
                 "all must answer the same prompts in the same order")
        if {len(row["responses"]) for row in rows} != {samples}:
            fail(f"{path}: must have {samples} samples a prompt, as the first row of "
                 "the first file; sample all with the same -n")
    return answers


def judge_policies(args, answers: dict[str, list[dict]]) -> dict[str, dict]:
    """name → measures of a policy: of its texts, of its scores, and against the first one."""
    policies = {name: text_measures(rows, second_lexicon=args.judge == "vader")
                for name, rows in answers.items()}
    if args.judge == "none":
        return policies
    scores = {}
    if args.judge in SCORERS:
        for name, rows in answers.items():
            scores[name] = np.array(SCORERS[args.judge](args, rows))
            policies[name]["score"], policies[name]["score_error"] = mean_and_error(scores[name])

    first, *others = answers
    baseline = answers[first]
    previous_preference = None
    for name in others:
        rows = answers[name]
        p = policies[name]
        if args.judge in SCORERS:
            preference = wins(scores[name], scores[first])
        else:
            sides = [(row["prompt"], mine, theirs) for row, other in zip(rows, baseline)
                     for mine, theirs in zip(row["responses"], other["responses"])]
            verdicts, behaviour = compare(args, sides)
            preference = verdicts.reshape(len(rows), -1)
            p |= behaviour
        lengths = [np.array([[len(text) for text in row["responses"]] for row in side])
                   for side in (baseline, rows)]
        p |= win_measures(preference, previous_preference, lengths[0] - lengths[1])
        p["preferences"] = np.where(np.isnan(preference), None, preference).tolist()
        previous_preference = preference
    return policies


def self_labels(path: str) -> list[dict]:
    """Up to LABELS rows that a policy labelled itself."""
    rows = [row for row in read_rows(path, "labelled")
            if row.get("margin_of", {}).get("judge") != "gold"]
    if not rows:
        fail(f"{path}: holds gold pairs alone, and no self-labels to judge")
    return rows[::math.ceil(len(rows) / LABELS)]


def judge_labels(args, rows: list[dict], log: list[dict]) -> dict:
    """Quality of a round's self-labels by the judge; `log` is that of the training that read
    them."""
    flagged = {i for step in log for i in step.get("flagged", [])}
    could_be_flagged = {i for step in log if step.get("tau") is not None for i in step["batch"]}
    pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    preference, behaviour = compare(args, pairs)
    among = [np.array([row["id"] in ids for row in rows]) for ids in (flagged, could_be_flagged)]
    return label_quality(preference, *among) | behaviour


def main(args: argparse.Namespace) -> None:
    answers = read_answers(args)
    trainings = {name: training_of(path) for name, path in args.answers.items()}
    labelled = {name: self_labels(path) for name, path in args.labels.items()}
    start_processes()
    policies = judge_policies(args, answers)
    labels = {}
    if args.judge != "none":
        labels = {name: judge_labels(args, rows, trainings[name][0])
                  for name, rows in labelled.items()}

    judge = args.judge_model or args.judge
    text = page(os.path.dirname(args.out), judge, answers, policies, labels, trainings, args.inputs)

    def write(tmp: str) -> None:
        Path(tmp).write_text(text, encoding="utf-8")
        plot(f"{tmp}.png", policies, labels, trainings)

    publish(args, {"policies": policies, "labels": labels}, write)
    counts = [m["no_verdict"] for m in (*policies.values(), *labels.values()) if "no_verdict" in m]
    note = f", {sum(counts)} without verdict" if counts else ""
    summary = text.partition("\n\n![")[0].partition("\n\n")[2]
    print(f"evaluate: {len(policies)} policies, judge {judge}{note} → {args.out}\n\n{summary}")


if __name__ == "__main__":
    run_stage(main, args)

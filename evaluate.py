"""Evaluate stage: the policies of a run against each other on held-out prompts, and the labels they learnt from.

    win rate of a policy     share of evaluation samples that the judge scores above π_init's, ties ½; ± standard error
                             over prompts
    label accuracy           share of a round's self-labels that the judge agrees with, ties ½
    flag precision           share of the labels flagged as noise that were wrong, beside the share among all (base rate)

The first policy named is the one that the others are compared with. `--judge vader` scores by a sentiment lexicon (the
demo's gold standard), `--judge reward-model` by a one-logit classifier, `--judge none` reports lengths alone.

Writes OUT/report.md with OUT/report.png, and OUT/eval/NAME.jsonl: what each policy answered.

    python evaluate.py --models init=models/smollm2 seed=runs/demo/seed round1=runs/demo/round1/policy \\
        --labels round1=runs/demo/round1/worst.jsonl --prompts runs/demo/data/eval.jsonl --out runs/demo --judge vader
"""
import argparse
import math
import os

import numpy as np
import torch.distributed as dist

from data.machine import start_processes
from data.rows import fail, fingerprint, is_done, parser, publish, read_json_lines, read_rows, run_stage
from generate import generate, sampling_flags
from label import reward_model_scores, vader_scores


def wins(scores: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """1 where a score beats the baseline's, ½ where they tie, else 0; elementwise."""
    return (scores > baseline) + 0.5 * (scores == baseline)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of values [prompts, samples] and its standard error over prompts: samples of one prompt are not independent."""
    per_prompt = values.mean(axis=1)
    return float(per_prompt.mean()), float(per_prompt.std(ddof=1) / math.sqrt(len(per_prompt))) if len(per_prompt) > 1 else math.nan


def label_quality(chosen: np.ndarray, rejected: np.ndarray, flagged: np.ndarray) -> dict:
    """How right self-labels are, from gold scores of both sides [N] and which pairs training flagged (bool [N])."""
    wrong = 1 - wins(chosen, rejected)
    return {"pairs": len(wrong), "accuracy": float(1 - wrong.mean()), "flagged": int(flagged.sum()),
            "wrong_among_flagged": float(wrong[flagged].mean()) if flagged.any() else None, "wrong": float(wrong.mean())}


def judge_rows(args: argparse.Namespace, rows: list[dict], rank: int, world: int, device) -> np.ndarray:
    """Gold scores [rows, responses]."""
    if args.judge == "vader":
        return np.array(vader_scores(rows))
    return np.array(reward_model_scores(args.judge_model, rows, args.precision, rank, world, device))


def named(pairs: list[str], flag: str) -> dict[str, str]:
    """{name: path} of NAME=PATH arguments."""
    table = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(table) != len(pairs):
        fail(f"{flag} takes NAME=PATH, each name once; found {' '.join(pairs)}")
    return table


def training_log(policy: str) -> list[dict]:
    """What `policy` logged while it was trained, one row a step; empty for a model that was not trained here."""
    path = os.path.join(policy, "log.jsonl")
    return [step for _, step in read_json_lines(path)] if os.path.isfile(path) else []


def table(policies: dict[str, dict], labels: dict[str, dict]) -> str:
    """The results as a Markdown table, one policy a line."""
    def cell(value: float | None, form: str = ".3f") -> str:
        return "–" if value is None or math.isnan(value) else format(value, form)
    lines = ["| policy | win rate | gold score | characters | label accuracy | flagged: wrong | all: wrong |", "| --- " * 7 + "|"]
    for name, p in policies.items():
        q = labels.get(name, {})
        score, win = ("–" if p.get(k) is None else f"{p[k]:.3f} ± {p[k + '_error']:.3f}" for k in ("score", "win_rate"))
        lines.append(f"| {name} | {win} | {score} | {p['characters']:.0f} | {cell(q.get('accuracy'))} | "
                     f"{cell(q.get('wrong_among_flagged'))} | {cell(q.get('wrong'))} |")
    return "\n".join(lines)


def plot(path: str, policies: dict[str, dict], labels: dict[str, dict], confidences: dict[str, np.ndarray],
         logs: dict[str, list[dict]]) -> None:
    """Gold score and win rate over the policies, the training loss, label quality over the rounds, confidences that the follower saw."""
    import matplotlib  # slow to import, and the report's alone
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, ((left, train), (middle, right)) = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    names = list(policies)
    for key, label in (("win_rate", f"win rate against {names[0]}"), ("score", "mean gold score")):
        if policies[names[-1]].get(key) is not None:
            left.errorbar(names, [policies[n][key] if policies[n][key] is not None else 0.5 for n in names],
                          [policies[n][key + "_error"] or 0 for n in names], marker="o", capsize=3, label=label)
    left.set(title="policies on held-out prompts (± s.e.)")
    if left.has_data():
        left.legend(fontsize=8)
    start = 0
    for name, log in logs.items():
        train.plot(np.arange(start, start + len(log)) + 1, [row["loss"] for row in log], marker=".", label=name)
        start += len(log)
    train.set(title="training loss", xlabel="step", ylabel="loss")
    if start:
        train.legend(fontsize=8)
    if labels:
        rounds, x = list(labels), np.arange(len(labels))
        bars = (("accuracy", "labels right"), ("wrong", "labels wrong"), ("wrong_among_flagged", "wrong among flagged"))
        for k, (key, label) in enumerate(bars):
            middle.bar(x + 0.27 * (k - 1), [labels[r][key] or 0 for r in rounds], 0.25, label=label)
        middle.set(title="self-labels against gold", xticks=x, xticklabels=rounds, ylim=(0, 1))
        middle.axhline(0.5, color="gray", lw=0.8, ls=":")
        middle.legend(fontsize=8)
    for name, xi in confidences.items():
        right.hist(xi, bins=np.linspace(0.5, 1, 26), histtype="step", label=name)
    right.set(title="confidence ξ of the self-labels", xlabel="ξ = σ(margin)", ylabel="pairs")
    if confidences:
        right.legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def side_by_side(answers: dict[str, list[dict]], count: int = 3) -> str:
    """The first `count` prompts, with the first sample of every policy."""
    parts = []
    for i, row in enumerate(next(iter(answers.values()))[:count]):
        quotes = [f"- **{name}**: {' '.join(rows[i]['responses'][0].split())}" for name, rows in answers.items()]
        parts.append(f"**{' '.join(row['prompt'][-1]['content'].split())}**\n\n" + "\n".join(quotes))
    return "\n\n".join(parts)


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH", help="policies; the first is the baseline")
    cli.add_argument("--labels", nargs="*", default=[], metavar="NAME=FILE", help="rows that the policy NAME was trained on")
    cli.add_argument("--prompts", required=True, help="evaluation prompts (JSONL)")
    cli.add_argument("--out", required=True, help="folder for report.md, report.png and eval/")
    cli.add_argument("--judge", choices=["vader", "reward-model", "none"], default="none", help="who scores")
    cli.add_argument("--judge-model", help="the classifier of --judge reward-model")
    sampling_flags(cli, n=1)
    args = cli.parse_args()
    models, labels = named(args.models, "--models"), named(args.labels, "--labels")
    if args.judge == "reward-model" and not args.judge_model:
        fail("--judge reward-model needs --judge-model")
    if unknown := set(labels) - set(models):
        fail(f"--labels names {', '.join(sorted(unknown))}, which --models does not")
    prints = {**{n: fingerprint(p) for n, p in models.items()}, **{f"labels of {n}": fingerprint(p) for n, p in labels.items()}}
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "models", "labels")} | prints
    settings["prompts"] = fingerprint(args.prompts)
    report = f"{args.out}/report.md"
    if is_done(report, settings):
        with open(report, encoding="utf-8") as file:
            print(file.read().split("\n\n")[2])
        return

    rank, world, device = start_processes()
    answers = {}
    for name, path in models.items():
        out = f"{args.out}/eval/{name}.jsonl"
        generate(argparse.Namespace(model=path, prompts=args.prompts, out=out, n=args.n, temperature=args.temperature,
                                    max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, precision=args.precision,
                                    seed=args.seed), rank, world, device)
        if world > 1:
            dist.barrier()
        answers[name] = read_rows(out, "responses")
    policies, quality, confidences, baseline = {}, {}, {}, None
    logs = {name: training_log(path) for name, path in models.items()}
    for name, rows in answers.items():
        lengths = np.array([[len(text) for text in row["responses"]] for row in rows])
        policies[name] = {"characters": float(lengths.mean()), **dict.fromkeys(("score", "score_error", "win_rate", "win_rate_error"))}
        if args.judge != "none":
            scores = judge_rows(args, rows, rank, world, device)
            baseline = scores if baseline is None else baseline
            p = policies[name]
            p["score"], p["score_error"] = mean_and_error(scores)
            if scores is not baseline:
                p["win_rate"], p["win_rate_error"] = mean_and_error(wins(scores, baseline))
    for name, path in labels.items():
        rows = read_rows(path, "labelled")
        confidences[name] = 1 / (1 + np.exp(-np.array([row["margin"] for row in rows])))
        if args.judge != "none":
            pairs = [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]]} for r in rows]
            chosen, rejected = judge_rows(args, pairs, rank, world, device).T
            flags = {i for step in logs[name] for i in step.get("flagged", [])}
            quality[name] = label_quality(chosen, rejected, np.array([r["id"] in flags for r in rows]))
    if rank != 0:
        return

    results = table(policies, quality)
    count = len(next(iter(answers.values())))
    plot(f"{args.out}/report.png", policies, quality, confidences, {name: log for name, log in logs.items() if log})
    text = (f"# Run `{os.path.basename(os.path.normpath(args.out))}`\n\n## Policies\n\n{results}\n\n"
            f"{count} held-out prompts × {args.n} samples at T = {args.temperature}, judge: {args.judge}, ± one standard error over "
            f"prompts. Win rate against `{next(iter(models))}`; ties count ½. Label columns: the self-labels that the policy was "
            "trained on, the share of flagged ones that gold calls wrong, and the share of all.\n\n"
            f"![policies, training loss, labels and confidences](report.png)\n\n## Responses side by side\n\n{side_by_side(answers)}\n")

    def write(tmp: str) -> None:
        with open(tmp, "w", encoding="utf-8") as file:
            file.write(text)

    publish(report, settings, {"policies": policies, "labels": quality}, write)
    print(f"evaluate: {count} prompts × {args.n} samples, judge {args.judge} → {report}\n\n{results}")


if __name__ == "__main__":
    run_stage(main)

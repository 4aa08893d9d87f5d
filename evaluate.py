"""Evaluate stage: the policies of a run against each other on held-out prompts, and the labels they
learnt from.

    win rate of a policy   mean preference of the judge for its samples over those of the first
                           policy named, a tie ½; 95 % bootstrap interval over prompts; p: paired
                           test against the policy before it
    length-controlled      the same at equal length, by a regression like AlpacaEval 2's that is
                           symmetric in the two policies, ± standard error over prompts
    label accuracy         share of a round's self-labels that the judge agrees with, ties ½
    flag precision         share of the labels flagged as noise that were wrong, beside the share
                           among all that could be flagged (base rate)

`--judge vader` scores by a sentiment lexicon (the demo's gold), `reward-model` by a one-logit
classifier; `llm`, `pairrm` and `openai` compare two responses in both orders; `none` reports
lengths alone. What the numbers mean is in judges/measures.py, who judges in judges/judge.py, how it
looks in judges/report.py. Writes OUT/report.md with OUT/report.png; OUT/eval/NAME.jsonl, what each
policy answered; and for AlpacaEval NAME.model_outputs.json and, with a judge,
NAME.annotations.json.

    python evaluate.py --models init=models/smollm2 seed=runs/demo/seed --out runs/demo \\
        --prompts runs/demo/data/eval.jsonl --judge vader
    python evaluate.py --annotations annotations.json     scores of files in AlpacaEval's format
    python evaluate.py --models gpt4=gpt4_outputs.json mine=pi_3 --prompts alpaca_eval.json \\
        --out runs/alpaca --judge openai --judge-model NAME --base-url http://localhost:8000/v1
    python evaluate.py --models mine=pi_3 --mt-bench mt_bench/ --max-new-tokens 1024 \\
        --out runs/mt --judge openai …
"""
import argparse
import json
import math
import os
from pathlib import Path

from core.flags import sampling_flags
from core.rows import fail
from core.stage import (
    about,
    fingerprint,
    exit_if_looking,
    inputs_of,
    is_done,
    parser,
    publish,
    run_stage,
    settings_of,
)
from judges.flags import check_judge, judge_flags


def named(pairs: list[str], flag: str) -> dict[str, str]:
    """{name: path} of NAME=PATH arguments."""
    table = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(table) != len(pairs) or any(not name or "/" in name for name in table):
        fail(f"{flag} takes NAME=PATH, each name once and without '/'; found {' '.join(pairs)}")
    return table


def is_reported(args: argparse.Namespace, settings: dict) -> bool:
    """Whether the report is complete; its tables are shown then."""
    if not is_done(f"{args.out}/report.md", settings):
        return False
    if int(os.environ.get("RANK", 0)) == 0:
        tables = Path(args.out, "report.md").read_text(encoding="utf-8").split("\n\n## ")[0]
        print(tables.split("\n\n", 1)[1])
    return True


def flags() -> tuple[argparse.Namespace, dict]:
    """The arguments, and what decides the report. Ends the program where that is complete."""
    cli = parser(__doc__)
    cli.add_argument("--models", nargs="+", metavar="NAME=PATH",
                     help="policies, or .json files of AlpacaEval outputs; the first: baseline")
    cli.add_argument("--labels", nargs="*", default=[], metavar="NAME=FILE",
                     help="rows that the policy NAME was trained on")
    cli.add_argument("--prompts",
                     help="evaluation prompts: rows (JSONL), or AlpacaEval's instructions (.json)")
    cli.add_argument("--mt-bench", help="folder with MT-Bench's question.jsonl, "
                                        "judge_prompts.jsonl and reference answers of gpt-4")
    cli.add_argument("--annotations", nargs="+", metavar="FILE",
                     help="only print the scores of annotations in AlpacaEval's format")
    cli.add_argument("--instruction-difficulty", metavar="FILE",
                     help="with --annotations: AlpacaEval's df_gamed.csv (exactly as published) or "
                          "instruction_difficulty.csv")
    cli.add_argument("--out", type=os.path.normpath,
                     help="folder for report.md, report.png, eval/ and mt_bench/")
    judge_flags(cli, ["none"], "none")
    sampling_flags(cli, n=1)
    args = cli.parse_args()
    if args.annotations:
        return args, {}
    if not (args.models and args.out and (args.prompts or args.mt_bench)):
        fail("needs --annotations; or --models, --out and --prompts or --mt-bench")
    check_judge(args)
    if args.mt_bench and args.judge not in ("llm", "openai"):
        fail("--mt-bench needs a judge that writes: --judge llm or --judge openai")
    models = named(args.models, "--models")
    labels = named(args.labels, "--labels")
    if unknown := set(labels) - set(models):
        fail(f"--labels names {', '.join(sorted(unknown))}, which --models does not")
    judges = [] if args.judge == "openai" else ["judge_model"]  # a name that the endpoint knows
    settings = settings_of(args, "prompts", "mt_bench", *judges)
    for key in ("models", "labels", "annotations"):
        del settings[key]  # by the content of each, below
    settings |= {name: fingerprint(path) for name, path in models.items()}
    settings |= {f"labels of {name}": fingerprint(path) for name, path in labels.items()}
    if is_reported(args, settings):
        raise SystemExit(0)
    exit_if_looking()
    return args, settings


if __name__ == "__main__":
    args, settings = flags()  # here already: what is imported below takes seconds to load

import numpy as np
import torch.distributed as dist

from core.chat import encode_rows, pair_of
from core.models import load_config, load_tokenizer
from core.parallel import start_processes
from core.policy import ResponseLogps, score
from core.probe import load_scorer
from core.rows import (
    atomic_path,
    margin_problem,
    read_json_lines,
    read_json_list,
    read_rows,
    write_rows,
)
from core.sampling import respond
from judges.history import history, settings_by_name, stage_table
from judges.judge import SCORERS, compare, settled, wins
from judges.measures import (
    bootstrap_interval,
    label_quality,
    leaderboard,
    length_controlled,
    mean_and_error,
    paired_p,
)
from judges.mt_bench import mt_bench
from judges.report import (
    SIDE_BY_SIDE,
    label_table,
    leaderboard_table,
    markdown,
    mt_bench_table,
    openings,
    plot,
    policy_table,
    side_by_side,
)

# pairs of a round that are judged and scored again: enough for ± 0.016, and no round's whole cost a
# second time
LABELS = 1000

# ------------------------------------------------------------------------------------------- inputs


def prompts_file(args: argparse.Namespace, rank: int, world: int) -> str:
    """--prompts as prompt rows; AlpacaEval's list of instructions (.json) is rewritten into
    OUT/eval/prompts.jsonl."""
    if not args.prompts.endswith(".json"):
        return args.prompts
    path = f"{args.out}/eval/prompts.jsonl"
    if rank == 0:
        rows = []
        for i, row in enumerate(read_json_list(args.prompts, "instruction")):
            turn = {"role": "user", "content": row["instruction"]}
            rows.append({**row, "id": str(i), "prompt": [turn]})
        write_rows(path, rows)
    if world > 1:
        dist.barrier()
    return path


def instruction(row: dict) -> str:
    return "\n\n".join(message["content"] for message in row["prompt"])


def outputs_of(path: str, prompts: list[dict], n: int) -> list[dict]:
    """Response rows of a model whose outputs a file in AlpacaEval's format holds, one a prompt in
    the prompts' order."""
    found = read_json_list(path, "instruction", "output")
    if len(found) != len(prompts):
        fail(f"{path}: holds {len(found)} outputs for {len(prompts)} prompts; it needs one for "
             "each, in their order")
    rows = []
    for number, (row, own) in enumerate(zip(prompts, found), 1):
        if own["instruction"] != instruction(row):
            fail(f"{path}: entry {number}: its instruction is not that of prompt {row['id']!r}; "
                 "outputs must stand in the prompts' order")
        rows.append({**row, "responses": [own["output"]] * n})
    return rows


def trained(policy: str) -> tuple[list[dict], dict]:
    """(what `policy` logged while it was trained, a row a step; its settings); both empty if it was
    not trained here."""
    log, stats = os.path.join(policy, "log.jsonl"), f"{policy}.stats.json"
    steps = [step for _, step in read_json_lines(log)] if os.path.isfile(log) else []
    settings = json.loads(Path(stats).read_text())["settings"] if os.path.isfile(stats) else {}
    return steps, settings


# ---------------------------------------------------------------------------------------- measuring


def judge_policies(args, answers: dict[str, list[dict]], rank: int, world: int,
                   device) -> tuple[dict, dict]:
    """(name → measures of a policy, name → annotations of it against the first)."""
    policies, annotations = {}, {}
    baseline = next(iter(answers))
    of_baseline = None  # scores
    before = None       # preferences of the policy before
    for name, rows in answers.items():
        shape = len(rows), len(rows[0]["responses"])
        texts = [text for row in rows for text in row["responses"]]
        p = policies[name] = {"characters": float(np.mean([len(text) for text in texts])),
                              "openings": openings(texts)}
        p["special_inside"] = sum(sum(row.get("special_inside", [])) for row in rows)
        if "ended" in rows[0]:
            p["ended"] = float(np.mean([end for row in rows for end in row["ended"]]))
        scores = None
        if args.judge in SCORERS:
            scores = np.array(SCORERS[args.judge](args, rows, rank, world, device))
            p["score"], p["score_error"] = mean_and_error(scores)
            p["worst"] = np.argsort(scores.mean(1), kind="stable")[:SIDE_BY_SIDE].tolist()
        if name == baseline:
            of_baseline = scores
        if name == baseline or args.judge == "none":
            continue
        if scores is None:
            sides = [(row["prompt"], mine, theirs) for row, other in zip(rows, answers[baseline])
                     for mine, theirs in zip(row["responses"], other["responses"])]
            verdict, behaviour = compare(args, sides, rank, world, device)
            verdict = verdict.reshape(shape)
            p |= behaviour
        else:
            verdict = wins(scores, of_baseline)
        preference = settled(verdict)
        p["win_rate"], p["win_rate_error"] = mean_and_error(preference)
        p["interval"] = bootstrap_interval(preference)
        p["ties"] = float((preference == 0.5).mean())
        p["p"] = paired_p(preference, np.full(shape, 0.5) if before is None else before)
        before = preference
        if scores is None:
            p["worst"] = np.argsort(preference.mean(1), kind="stable")[:SIDE_BY_SIDE].tolist()
        annotations[name] = annotate(args, name, rows, baseline, answers[baseline], verdict)
        p |= length_controlled(annotations[name])
    return policies, annotations


def annotate(args, name: str, rows: list[dict], baseline: str, others: list[dict],
             verdict: np.ndarray) -> list[dict]:
    """Annotations in AlpacaEval's format from preferences [prompts, samples], null for no
    verdict."""
    found = []
    for row, other, own in zip(rows, others, verdict.tolist()):
        for mine, theirs, p in zip(row["responses"], other["responses"], own):
            found.append({"instruction": instruction(row), "output_1": theirs,
                          "generator_1": baseline, "output_2": mine, "generator_2": name,
                          "annotator": args.judge_model or args.judge,
                          "preference": None if math.isnan(p) else 1 + p})
    return found


def judge_labels(args, path: str, policy: str, rank: int, world: int,
                 device) -> tuple[dict, np.ndarray, np.ndarray | None]:
    """(quality of a round's self-labels by the judge, their confidences, and those after
    training), on up to LABELS pairs.

    After training a pair's confidence is σ(margin + β[(log π_t − log π_{t−1})(y_w) − (…)(y_l)]),
    against π_init as before (D6).
    """
    rows = read_rows(path, "labelled")
    rows = rows[::math.ceil(len(rows) / LABELS)]
    margin = np.array([row["margin"] for row in rows])
    after = None
    log, settings = trained(policy)
    if "beta" in settings and not any(margin_problem(row, settings["beta"]) for row in rows):
        tokenizer = load_tokenizer(policy)
        encoded = encode_rows(load_config(policy), tokenizer, rows,
                              [pair_of(row) for row in rows], path)
        model = load_scorer(policy, device, encoded, args.precision, tokenizer)
        logps = np.array(score(ResponseLogps(model), encoded, args.precision, device, rank, world,
                               "confidence"))
        del model  # before a judge is loaded
        change = logps - np.array([[row["chosen_logp"], row["rejected_logp"]] for row in rows])
        margin_after = margin + settings["beta"] * (change[:, 0] - change[:, 1])
        after = 1 / (1 + np.exp(-margin_after))
    quality = {}
    if args.judge != "none":
        flags = {i for step in log for i in step.get("flagged", [])}
        able = {i for step in log if step.get("tau") is not None for i in step["batch"]}
        pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
        preference, behaviour = compare(args, pairs, rank, world, device)
        flagged = np.array([row["id"] in flags for row in rows])
        could = np.array([row["id"] in able for row in rows])
        quality = label_quality(settled(preference), flagged, could) | behaviour
    return quality, 1 / (1 + np.exp(-margin)), after


# ---------------------------------------------------------------------------------------- reporting


def write_alpaca_eval(args, answers: dict, annotations: dict) -> None:
    """Files that AlpacaEval's own command reads, in OUT/eval."""
    for name, rows in answers.items():
        outputs = []
        for row in rows:
            output = {"instruction": instruction(row), "output": row["responses"][0],
                      "generator": name}
            outputs.append(output | ({"dataset": row["dataset"]} if "dataset" in row else {}))
        for kind, content in (("model_outputs", outputs), ("annotations", annotations.get(name))):
            if content:
                path = f"{args.out}/eval/{name}.{kind}.json"
                with atomic_path(path) as tmp:
                    text = json.dumps(content, indent=1, ensure_ascii=False)
                    Path(tmp).write_text(text + "\n", encoding="utf-8")


def explanations(args, policies: dict, quality: dict, ratings: dict, count: int) -> list[str]:
    """Paragraphs that say what the columns mean, for those who have not read the code."""
    notes = []
    if policies:
        notes.append(
            f"{count} held-out prompts × {args.n} samples at T = {args.temperature}, judge: "
            f"{args.judge_model or args.judge}. Win rate against `{next(iter(policies))}`, ties ½, "
            "with a 95 % bootstrap interval over prompts; p: the paired test of the same win rate "
            "as the line above (the first: as ½); length-controlled: the rate at equal length, by "
            "a regression on lengths that is symmetric in the two policies, its ± over prompts; "
            "± one standard error; [low, high] of 0 and 1: exact, 95 %. Ended: share of the "
            "answers that ended before the length limit, ✂ marks one that did not; openings: "
            "distinct first three words, as a share of the answers.")
    for name, p in policies.items():
        if "order_disagreement" in p:
            notes.append(
                f"`{name}`: the judge's two orders named different winners in "
                f"{p['order_disagreement']:.1%} of the comparisons; {p['no_verdict']} of "
                f"{2 * count * args.n} answers had no verdict and count ½.")
        if p["special_inside"]:
            notes.append(f"`{name}`: special tokens stand inside {p['special_inside']} answers; "
                         "what is judged is their text without these.")
    if any(quality.values()):
        notes.append(
            f"Self-labels: on up to {LABELS} of the pairs that the policy was trained on, the "
            "share that the judge agrees with, and the share that it calls wrong among those "
            "flagged as noise and among all that could be flagged.")
    for name, q in quality.items():
        if "no_verdict" in q:
            notes.append(f"Self-labels of `{name}`: {q['no_verdict']} of {2 * q['pairs']} answers "
                         "had no verdict and count ½.")
    if ratings:
        notes.append("MT-Bench: means of the judge's ratings from 1 to 10 by category, by turn and "
                     "of all; unrated: answers of the judge without a rating.")
    return notes


def what_it_is(args, stages: list[dict], models: dict[str, str]) -> dict[str, str]:
    """The run and its evaluation by name."""
    policies = ", ".join(f"{name} = {path}" for name, path in models.items())
    judge = f"{args.judge}{f' ({args.judge_model})' if args.judge_model else ''}"
    return {**settings_by_name(stages), "policies": policies, "judge of this report": judge,
            "prompts of this report": args.prompts or args.mt_bench}


def answer(args, models: dict[str, str], rank: int, world: int, device) -> dict[str, list[dict]]:
    """name → response rows of a policy to --prompts, read where a file holds them."""
    path = prompts_file(args, rank, world)
    answers = {}
    for name, model in models.items():
        if model.endswith(".json"):
            answers[name] = outputs_of(model, read_rows(path, "prompts"), args.n)
        else:
            answers[name] = respond(model, path, f"{args.out}/eval/{name}.jsonl", args, rank,
                                    world, device)
    return answers


def write_report(args, settings: dict, models: dict[str, str], answers: dict, policies: dict,
                 quality: dict, confidences: dict, ratings: dict) -> None:
    """OUT/report.md with OUT/report.png; prints the tables."""
    tables = []
    if policies:
        tables.append(policy_table(policies))
    if any(quality.values()):
        tables.append(label_table(quality))
    if ratings:
        tables.append(mt_bench_table(ratings))
    logs = {name: log for name, path in models.items() if (log := trained(path)[0])}
    with atomic_path(f"{args.out}/report.png") as tmp:
        plot(tmp, policies, quality, confidences, logs, ratings)
    count = len(next(iter(answers.values()), []))
    report = f"{args.out}/report.md"
    labels = {f"labels of {name}": path for name, path in named(args.labels, "--labels").items()}
    inputs = inputs_of(args, settings) | models | labels
    stages = history([*models.values(), *labels.values()])
    this = {"stage": "evaluate", "out": report, "about": about(inputs)}
    run = what_it_is(args, stages, models)
    parts = [f"# Run `{os.path.basename(os.path.normpath(args.out))}`", *tables,
             "## What this run is", markdown(["setting", "value"], list(run.items())),
             "## What the columns mean",
             *explanations(args, policies, quality, ratings, count),
             "![win rates, lengths, training loss, labels, confidences, MT-Bench](report.png)",
             "## How it came about", stage_table([*stages, this])]
    if answers:
        first = list(range(min(SIDE_BY_SIDE, count)))
        parts += ["## Responses side by side", side_by_side(answers, first)]
        worst = list(policies.values())[-1].get("worst", [])
        if worst:
            parts += [f"## The prompts where `{list(policies)[-1]}` does worst by the judge",
                      side_by_side(answers, worst)]
    text = "\n\n".join(parts) + "\n"
    found = {"policies": policies, "labels": quality, "mt_bench": ratings, "run": run}
    publish(report, settings, found,
            lambda tmp: Path(tmp).write_text(text, encoding="utf-8") and None, inputs)
    what = [f"{count} prompts × {args.n} samples"] if policies else []
    what += ["MT-Bench"] if ratings else []
    asked = [found for found in (*policies.values(), *quality.values()) if "no_verdict" in found]
    if asked:
        what.append(f"{sum(found['no_verdict'] for found in asked)} answers without verdict")
    print(f"evaluate: {', '.join(what)}, judge {args.judge} → {report}\n\n" + "\n\n".join(tables))


def main(args: argparse.Namespace, settings: dict) -> None:
    if args.annotations:
        scores = leaderboard(args.annotations, args.instruction_difficulty)
        print(leaderboard_table(scores, bool(args.instruction_difficulty)))
        return
    models = named(args.models, "--models")
    labels = named(args.labels, "--labels")
    used = [model for model in models.values() if not model.endswith(".json")]
    if args.judge in ("reward-model", "llm"):
        used.append(args.judge_model)
    for model in used:
        load_config(model)  # what is missing is found before anything is sampled
    rank, world, device = start_processes()
    os.makedirs(f"{args.out}/eval", exist_ok=True)
    answers, policies, annotations, quality, confidences, ratings = {}, {}, {}, {}, {}, {}
    if args.prompts:
        answers = answer(args, models, rank, world, device)
        policies, annotations = judge_policies(args, answers, rank, world, device)
        for name, rows in labels.items():
            quality[name], *confidences[name] = judge_labels(args, rows, models[name], rank, world,
                                                             device)
    if args.mt_bench:
        asked = {name: model for name, model in models.items() if not model.endswith(".json")}
        ratings = mt_bench(args, asked, rank, world, device)
    if rank == 0:
        write_alpaca_eval(args, answers, annotations)
        write_report(args, settings, models, answers, policies, quality, confidences, ratings)


if __name__ == "__main__":
    run_stage(main, args, settings)

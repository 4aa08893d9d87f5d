"""Evaluate stage: the policies of a run against each other on held-out prompts, and the labels they learnt from.

    win rate of a policy     mean preference of the judge for its samples over those of the first policy named, a tie ½;
                             95 % bootstrap interval over prompts; p: paired test against the policy before it
    length-controlled        the same at equal length, by AlpacaEval 2's regression, ± standard error
    label accuracy           share of a round's self-labels that the judge agrees with, ties ½
    flag precision           share of the labels flagged as noise that were wrong, beside the share among all (base rate)

`--judge vader` scores by a sentiment lexicon (the demo's gold), `reward-model` by a one-logit classifier; `llm`, `pairrm`
and `openai` compare two responses in both orders; `none` reports lengths alone. What the numbers mean is in
judges/measures.py, who judges in judges/judge.py, how it looks in judges/report.py. Writes OUT/report.md with OUT/report.png;
OUT/eval/NAME.jsonl, what each policy answered; and for AlpacaEval NAME.model_outputs.json and, with a judge, NAME.annotations.json.

    python evaluate.py --models init=models/smollm2 seed=runs/demo/seed round1=runs/demo/round1/policy \\
        --labels round1=runs/demo/round1/worst.jsonl --prompts runs/demo/data/eval.jsonl --out runs/demo --judge vader
    python evaluate.py --annotations annotations.json                      scores of files in AlpacaEval's format
    python evaluate.py --models gpt4=gpt4_outputs.json mine=pi_3 --prompts alpaca_eval.json --out runs/alpaca \\
        --judge openai --judge-model NAME --base-url http://localhost:8000/v1
    python evaluate.py --models mine=pi_3 --mt-bench mt_bench/ --max-new-tokens 1024 --out runs/mt --judge openai …
"""
import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch.distributed as dist

from core.chat import encode_rows, pair_of
from core.models import load_config, load_tokenizer
from core.parallel import start_processes
from core.policy import ResponseLogps, score
from core.probe import load_scorer
from core.rows import beside, fail, read_json_lines, read_json_list, read_rows, write_rows
from core.sampling import respond, sampling_flags
from core.stage import MEMORY_ONLY, fingerprint, is_done, parser, publish, run_stage
from judges.judge import SCORERS, check_judge, compare, judge_flags, settled, wins
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
    label_table,
    leaderboard_table,
    mt_bench_table,
    plot,
    policy_table,
    side_by_side,
)

LABELS = 1000  # pairs of a round that are judged and scored again: enough for ± 0.016, and no round's whole cost a second time

# ---------------------------------------------------------------------------------------------------------------- inputs


def named(pairs: list[str], flag: str) -> dict[str, str]:
    """{name: path} of NAME=PATH arguments."""
    table = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(table) != len(pairs) or any(not name or "/" in name for name in table):
        fail(f"{flag} takes NAME=PATH, each name once and without '/'; found {' '.join(pairs)}")
    return table


def prompts_file(args: argparse.Namespace, rank: int, world: int) -> str:
    """--prompts as prompt rows; AlpacaEval's list of instructions (.json) is rewritten into OUT/eval/prompts.jsonl."""
    if not args.prompts.endswith(".json"):
        return args.prompts
    path = f"{args.out}/eval/prompts.jsonl"
    if rank == 0:
        write_rows(path, [{**row, "id": str(i), "prompt": [{"role": "user", "content": row["instruction"]}]}
                          for i, row in enumerate(read_json_list(args.prompts, "instruction"))])
    if world > 1:
        dist.barrier()
    return path


def instruction(row: dict) -> str:
    return "\n\n".join(message["content"] for message in row["prompt"])


def outputs_of(path: str, prompts: list[dict], n: int) -> list[dict]:
    """Response rows of a model whose outputs a file in AlpacaEval's format holds."""
    found = {row["instruction"]: row["output"] for row in read_json_list(path, "instruction", "output")}
    if missing := [row["id"] for row in prompts if instruction(row) not in found]:
        fail(f"{path}: no output for {len(missing)} of {len(prompts)} prompts, the first with id {missing[0]!r}")
    return [{**row, "responses": [found[instruction(row)]] * n} for row in prompts]


def trained(policy: str) -> tuple[list[dict], dict]:
    """(what `policy` logged while it was trained, a row a step; its settings); both empty if it was not trained here."""
    log, stats = os.path.join(policy, "log.jsonl"), f"{policy}.stats.json"
    return ([step for _, step in read_json_lines(log)] if os.path.isfile(log) else [],
            json.loads(Path(stats).read_text())["settings"] if os.path.isfile(stats) else {})


# -------------------------------------------------------------------------------------------------------------- measuring


def judge_policies(args, answers: dict[str, list[dict]], rank: int, world: int, device) -> tuple[dict, dict]:
    """(name → measures of a policy, name → annotations of it against the first)."""
    policies, annotations, before = {}, {}, None
    baseline, *_ = answers
    for name, rows in answers.items():
        shape = len(rows), len(rows[0]["responses"])
        lengths = [len(text) for row in rows for text in row["responses"]]
        p = policies[name] = {"characters": float(np.mean(lengths))}
        p["special_inside"] = sum(sum(row.get("special_inside", [])) for row in rows)
        scores = None
        if args.judge in SCORERS:
            scores = np.array(SCORERS[args.judge](args, rows, rank, world, device))
            p["score"], p["score_error"] = mean_and_error(scores)
            reference = scores if name == baseline else reference
        if name == baseline or args.judge == "none":
            continue
        if scores is None:
            sides = [(row["prompt"], mine, theirs) for row, other in zip(rows, answers[baseline])
                     for mine, theirs in zip(row["responses"], other["responses"])]
            verdict, behaviour = compare(args, sides, rank, world, device)
            verdict = verdict.reshape(shape)
            preference = settled(verdict)
            p |= behaviour
        else:
            preference = verdict = wins(scores, reference)
        p["win_rate"], p["win_rate_error"] = mean_and_error(preference)
        p |= {"interval": bootstrap_interval(preference), "ties": float((preference == 0.5).mean()),
              "p": paired_p(preference, np.full(shape, 0.5) if before is None else before)}
        before = preference
        annotations[name] = [{"instruction": instruction(row), "output_1": theirs, "generator_1": baseline, "output_2": mine, "generator_2": name,
                              "annotator": args.judge_model or args.judge, "preference": None if np.isnan(verdict[i, k]) else 1 + float(verdict[i, k])}
                             for i, (row, other) in enumerate(zip(rows, answers[baseline]))
                             for k, (mine, theirs) in enumerate(zip(row["responses"], other["responses"]))]
        p |= length_controlled(annotations[name])
    return policies, annotations


def judge_labels(args, path: str, policy: str, rank: int, world: int, device) -> tuple[dict, np.ndarray, np.ndarray | None]:
    """(quality of a round's self-labels by the judge, their confidences, and those after training), on up to LABELS pairs.

    After training a pair's confidence is σ(margin + β[(log π_t − log π_{t−1})(y_w) − (…)(y_l)]), against π_init as before (D6).
    """
    rows = read_rows(path, "labelled")
    rows = rows[::math.ceil(len(rows) / LABELS)]
    margin, after = np.array([row["margin"] for row in rows]), None
    log, settings = trained(policy)
    if "beta" in settings:
        tokenizer = load_tokenizer(policy)
        encoded = encode_rows(load_config(policy), tokenizer, rows, path, pair_of)
        model = load_scorer(policy, device, encoded, args.precision, tokenizer)
        logps = np.array(score(ResponseLogps(model), encoded, args.precision, device, rank, world, "confidence"))
        change = logps - np.array([[row["chosen_logp"], row["rejected_logp"]] for row in rows])
        after = 1 / (1 + np.exp(-(margin + settings["beta"] * (change[:, 0] - change[:, 1]))))
    quality = {}
    if args.judge != "none":
        flags = {i for step in log for i in step.get("flagged", [])}
        able = {i for step in log if step.get("tau") is not None for i in step["batch"]}
        preference, _ = compare(args, [(row["prompt"], row["chosen"], row["rejected"]) for row in rows], rank, world, device)
        quality = label_quality(settled(preference), np.array([row["id"] in flags for row in rows]),
                                np.array([row["id"] in able for row in rows]))
    return quality, 1 / (1 + np.exp(-margin)), after


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--models", nargs="+", metavar="NAME=PATH", help="policies, or .json files of AlpacaEval outputs; the first is the baseline")
    cli.add_argument("--labels", nargs="*", default=[], metavar="NAME=FILE", help="rows that the policy NAME was trained on")
    cli.add_argument("--prompts", help="evaluation prompts: rows (JSONL), or AlpacaEval's instructions (.json)")
    cli.add_argument("--mt-bench", help="folder with MT-Bench's question.jsonl, judge_prompts.jsonl and reference answers of gpt-4")
    cli.add_argument("--annotations", nargs="+", metavar="FILE", help="only print the scores of annotations in AlpacaEval's format")
    cli.add_argument("--instruction-difficulty", metavar="FILE", help="with --annotations: AlpacaEval's df_gamed.csv (exactly as published) "
                     "or instruction_difficulty.csv")
    cli.add_argument("--out", type=os.path.normpath, help="folder for report.md, report.png, eval/ and mt_bench/")
    judge_flags(cli, ["none"], "none")
    sampling_flags(cli, n=1)
    args = cli.parse_args()
    if args.annotations:
        print(leaderboard_table(leaderboard(args.annotations, args.instruction_difficulty), bool(args.instruction_difficulty)))
        return
    if not (args.models and args.out and (args.prompts or args.mt_bench)):
        fail("needs --annotations; or --models, --out and --prompts or --mt-bench")
    check_judge(args)
    if args.mt_bench and args.judge not in ("llm", "openai"):
        fail("--mt-bench needs a judge that writes: --judge llm or --judge openai")
    models, labels = named(args.models, "--models"), named(args.labels, "--labels")
    if unknown := set(labels) - set(models):
        fail(f"--labels names {', '.join(sorted(unknown))}, which --models does not")
    prints = {**{n: fingerprint(p) for n, p in models.items()}, **{f"labels of {n}": fingerprint(p) for n, p in labels.items()}}
    settings = {k: v for k, v in vars(args).items() if k not in ("out", *MEMORY_ONLY, "models", "labels", "annotations")} | prints
    settings |= {key: fingerprint(value) for key, value in (("prompts", args.prompts), ("mt_bench", args.mt_bench),
                                                         ("judge_model", args.judge_model)) if value}
    report = f"{args.out}/report.md"
    if is_done(report, settings):
        if int(os.environ.get("RANK", 0)) == 0:
            print(Path(report).read_text(encoding="utf-8").split("\n\n## ")[0].split("\n\n", 1)[1])
        return

    rank, world, device = start_processes()
    os.makedirs(f"{args.out}/eval", exist_ok=True)
    answers, policies, annotations, quality, confidences = {}, {}, {}, {}, {}
    if args.prompts:
        path = prompts_file(args, rank, world)
        for name, model in models.items():
            answers[name] = (outputs_of(model, read_rows(path, "prompts"), args.n) if model.endswith(".json") else
                             respond(model, path, f"{args.out}/eval/{name}.jsonl", args, rank, world, device))
        policies, annotations = judge_policies(args, answers, rank, world, device)
        for name, rows in labels.items():
            quality[name], *confidences[name] = judge_labels(args, rows, models[name], rank, world, device)
    ratings = mt_bench(args, {n: m for n, m in models.items() if not m.endswith(".json")}, rank, world, device) if args.mt_bench else {}
    if rank != 0:
        return

    tables = ([policy_table(policies)] if policies else []) + ([label_table(quality)] if any(quality.values()) else []) + (
        [mt_bench_table(ratings)] if ratings else [])
    logs = {name: trained(path)[0] for name, path in models.items()}
    plot(f"{args.out}/report.png", policies, quality, confidences, {n: log for n, log in logs.items() if log}, ratings)
    for name, rows in answers.items():
        outputs = [{"instruction": instruction(row), "output": row["responses"][0], "generator": name,
                    **({"dataset": row["dataset"]} if "dataset" in row else {})} for row in rows]
        for kind, content in (("model_outputs", outputs), ("annotations", annotations.get(name))):
            if content:
                with beside(f"{args.out}/eval/{name}.{kind}.json") as tmp:
                    Path(tmp).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                    os.replace(tmp, f"{args.out}/eval/{name}.{kind}.json")
    count = len(next(iter(answers.values()), []))
    about = []
    if policies:
        about.append(f"{count} held-out prompts × {args.n} samples at T = {args.temperature}, judge: {args.judge_model or args.judge}. Win rate against "
                     f"`{next(iter(models))}`, ties ½, with a 95 % bootstrap interval over prompts; p: the paired test of the same win rate as the "
                     "line above (the first: as ½); length-controlled: AlpacaEval 2's regression without instruction difficulty; ± one standard error.")
        about += [f"`{name}`: the judge's two orders named different winners in {p['order_disagreement']:.1%} of the comparisons; {p['no_verdict']} "
                  f"of {2 * count * args.n} answers had no verdict and count ½." for name, p in policies.items() if "order_disagreement" in p]
    about += [f"`{name}`: special tokens stand inside {p['special_inside']} answers; "
              "what is judged is their text without these."
              for name, p in policies.items() if p["special_inside"]]
    if any(quality.values()):
        about.append(f"Self-labels: on up to {LABELS} of the pairs that the policy was trained on, the share that the judge agrees with, and the share "
                     "that it calls wrong among those flagged as noise and among all.")
    if ratings:
        about.append("MT-Bench: means of the judge's ratings from 1 to 10 by category, by turn and of all; unrated: answers of the judge without a rating.")
    text = (f"# Run `{os.path.basename(os.path.normpath(args.out))}`\n\n" + "\n\n".join(tables) + "\n\n## What the columns mean\n\n" +
            "\n\n".join(about) + "\n\n![win rates, lengths, training loss, labels, confidences, MT-Bench](report.png)\n" +
            (f"\n## Responses side by side\n\n{side_by_side(answers)}\n" if answers else ""))
    publish(report, settings, {"policies": policies, "labels": quality, "mt_bench": ratings},
            lambda tmp: Path(tmp).write_text(text, encoding="utf-8") and None)
    what = [f"{count} prompts × {args.n} samples"] if policies else []
    print(f"evaluate: {', '.join([*what, *(['MT-Bench'] if ratings else [])])}, judge {args.judge} → {report}\n\n" + "\n\n".join(tables))


if __name__ == "__main__":
    run_stage(main)

"""AlpacaEval's files: its instructions to prompt rows, answers to the outputs that its own command
judges, and win rates from annotations.

    python -m judges.alpaca_eval --instructions alpaca_eval.json --out prompts.jsonl
    python generate.py --model pi_3 --prompts prompts.jsonl --out mine.jsonl -n 1
    python -m judges.alpaca_eval --answers mine=mine.jsonl --out runs/alpaca
    alpaca_eval --model_outputs runs/alpaca/mine.model_outputs.json     # pip install alpaca-eval
    python -m judges.alpaca_eval --annotations annotations.json

The last prints, in percent, the win rate with its standard error over prompts, and a win rate at
equal length that knows lengths alone and is symmetric in the two models. The published
length-controlled rate, which also has each instruction's difficulty, is the official command's.
"""
import argparse
import json
import os
from pathlib import Path

import numpy as np

from core.rows import fail, is_number, read_json_list, read_rows
from core.stage import exit_if_looking, parser, publish, run_stage, start
from judges.flags import files_by_name
from judges.measures import error_over_prompts, length_controlled
from judges.report import markdown


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the output is complete."""
    cli = parser(__doc__)
    source = cli.add_mutually_exclusive_group(required=True)
    source.add_argument("--annotations", nargs="+", metavar="FILE",
                        help="print the scores of annotations (.json, .json.gz)")
    source.add_argument("--instructions", metavar="FILE", help="AlpacaEval's alpaca_eval.json")
    source.add_argument("--answers", metavar="NAME=FILE", help="rows of generate.py")
    cli.add_argument("--out", help="prompt rows (JSONL); with --answers a folder for "
                                   "NAME.model_outputs.json")
    args = cli.parse_args()
    if args.annotations:
        return args
    if not args.out:
        fail("--instructions and --answers need --out")
    args.name = None
    if args.answers:
        [(args.name, args.answers)] = files_by_name([args.answers]).items()
        args.out = f"{args.out}/{args.name}.model_outputs.json"
    args.out = os.path.normpath(args.out)
    start(args, files=["instructions", "answers"])
    exit_if_looking(args.out)
    return args


def prompt_rows(path: str) -> list[dict]:
    """Prompt rows of AlpacaEval's instructions, in their order; other keys stay."""
    rows = []
    for i, row in enumerate(read_json_list(path, "instruction")):
        turn = {"role": "user", "content": row["instruction"]}
        rows.append({**row, "id": str(i), "prompt": [turn]})
    return rows


def outputs(name: str, path: str) -> list[dict]:
    """The first answer to each prompt as AlpacaEval's own command reads it."""
    rows = []
    for row in read_rows(path, "responses"):
        instruction = "\n\n".join(message["content"] for message in row["prompt"])
        rows.append({"dataset": row.get("dataset"), "instruction": instruction,
                     "output": row["responses"][0], "generator": name})
    return rows


def read_annotations(path: str) -> list[dict]:
    """Annotations of one model against one baseline: preference from 1 (output_1, the baseline's,
    is better) to 2 (output_2), 1.5 or 0 for a draw, null or NaN for no verdict."""
    rows = read_json_list(path, "output_1", "output_2", "generator_1", "generator_2")
    for number, row in enumerate(rows, 1):
        value = row.get("preference")
        no_verdict = value is None or value != value
        if not no_verdict and not (is_number(value) and (1 <= value <= 2 or value == 0)):
            fail(f"{path}: entry {number}: 'preference' must be from 1 to 2, 0 for a draw or null, "
                 f"found {value!r:.60}")
    if len({(row["generator_1"], row["generator_2"]) for row in rows}) > 1:
        fail(f"{path}: holds several pairs of generators; one baseline and one model are compared")
    return rows


def scores(annotations: list[dict]) -> dict:
    """What AlpacaEval's leaderboard shows of annotations, rates in percent. Samples of one prompt
    share their instruction."""
    value = np.array([row.get("preference") for row in annotations], dtype=float)
    known = ~np.isnan(value)
    p = (np.where(value == 0, 1.5, value) - 1)[known]
    if not len(p):
        fail("no annotation has a preference")
    texts = [str(row.get("instruction", i)) for i, row in enumerate(annotations)]
    prompts = np.unique(texts, return_inverse=True)[1][known]
    lengths = np.array([[len(row["output_1"]), len(row["output_2"])] for row in annotations])
    delta = (lengths[:, 0] - lengths[:, 1])[known]
    controlled, controlled_error = length_controlled(delta, p, prompts)
    return {"win_rate": 100 * float(p.mean()),
            "standard_error": 100 * error_over_prompts(p, prompts),
            "length_controlled": 100 * controlled,
            "length_controlled_error": 100 * controlled_error,
            "n_wins": int((p > 0.5).sum()),
            "n_wins_base": int((p < 0.5).sum()),
            "n_draws": int((p == 0.5).sum()),
            "n_missing": len(annotations) - len(p),
            "avg_length": int(lengths[:, 1].mean())}


def leaderboard(paths: list[str]) -> str:
    """A table of the scores of every file of annotations."""
    table = {}
    for path in paths:
        annotations = read_annotations(path)
        table[path] = {"model": annotations[0]["generator_2"], **scores(annotations)}
    header = [key.replace("_", " ") for key in next(iter(table.values()))]
    return markdown(header, [list(score.values()) for score in table.values()])


def main(args: argparse.Namespace) -> None:
    if args.annotations:
        print(leaderboard(args.annotations))
        return
    if args.instructions:
        rows = prompt_rows(args.instructions)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        rows = outputs(args.name, args.answers)
        text = json.dumps(rows, indent=1, ensure_ascii=False)
    publish(args, {"rows": len(rows)}, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))
    print(f"alpaca_eval: {len(rows)} rows → {args.out}")


if __name__ == "__main__":
    run_stage(main, flags())

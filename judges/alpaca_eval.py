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

from core.rows import fail, in_one_line, read_json_list, read_rows, write_rows
from core.stage import parser, run_stage
from judges.flags import files_by_name, refuse_existing
from judges.measures import error_over_prompts, length_controlled
from judges.report import markdown


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where something stands at the output."""
    cli = parser(__doc__)
    source = cli.add_mutually_exclusive_group(required=True)
    source.add_argument("--annotations", nargs="+", metavar="FILE",
                        help="print the scores of annotations (.json, .json.gz)")
    source.add_argument("--instructions", metavar="FILE", help="AlpacaEval's alpaca_eval.json")
    source.add_argument("--answers", metavar="NAME=FILE", help="rows of generate.py")
    cli.add_argument("--out", help="prompt rows (JSONL); with --answers a folder for "
                                   "NAME.model_outputs.json")
    args = cli.parse_args()
    if not args.annotations and not args.out:
        fail("--instructions and --answers need --out")
    if args.answers:
        [(args.name, args.answers)] = files_by_name([args.answers]).items()
        args.out = f"{args.out}/{args.name}.model_outputs.json"
    if not args.annotations:
        refuse_existing(args.out)
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


def scores(annotations: list[dict]) -> dict:
    """Win rates in percent from annotations of a model against a baseline: preferences from 1
    (output_1, the baseline's, is better) to 2, 1.5 or 0 for a draw, null or NaN for no verdict.
    Samples of one prompt share their instruction."""
    value = np.array([row.get("preference") for row in annotations], dtype=float)
    known = ~np.isnan(value)
    p = (np.where(value == 0, 1.5, value) - 1)[known]
    if not len(p) or p.min() < 0 or p.max() > 1:
        raise ValueError("no preference, or one that is not from 1 to 2")
    texts = [str(row.get("instruction", i)) for i, row in enumerate(annotations)]
    prompts = np.unique(texts, return_inverse=True)[1][known]
    lengths = np.array([[len(row["output_1"]), len(row["output_2"])] for row in annotations])
    delta = (lengths[:, 0] - lengths[:, 1])[known]
    controlled, controlled_error = length_controlled(delta, p, prompts)
    return {"model": ", ".join(sorted({row["generator_2"] for row in annotations})),
            "win_rate": 100 * float(p.mean()),
            "standard_error": 100 * error_over_prompts(p, prompts),
            "length_controlled": 100 * controlled,
            "length_controlled_error": 100 * controlled_error,
            "no_verdict": len(annotations) - len(p)}


def leaderboard(paths: list[str]) -> str:
    """A table of the scores of every file of annotations."""
    table = []
    for path in paths:
        with in_one_line(f"{path}: not AlpacaEval's annotations"):
            table.append(scores(read_json_list(path, "output_1", "output_2", "generator_2")))
    header = [key.replace("_", " ") for key in table[0]]
    return markdown(header, [list(score.values()) for score in table])


def main(args: argparse.Namespace) -> None:
    if args.annotations:
        print(leaderboard(args.annotations))
        return
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if args.instructions:
        rows = prompt_rows(args.instructions)
        write_rows(args.out, rows)
    else:
        rows = outputs(args.name, args.answers)
        Path(args.out).write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"alpaca_eval: {len(rows)} rows → {args.out}")


if __name__ == "__main__":
    run_stage(main, flags())

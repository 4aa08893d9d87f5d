"""What an LLM judge learns from: gold pairs as questions whose answer is a letter (SPA, B.2).

Each pair is asked in both orders after SPA's Listing 1; `chosen` is the right letter, `rejected`
the other. seed_dpo.py learns such rows like any others:

    python -m judges.comparisons --pairs seed.jsonl --out judge.jsonl
    python seed_dpo.py --objective supervised --model pi_init --pairs judge.jsonl --out judge
"""
import argparse
import os

from core.rows import answer_turn, read_rows, write_rows
from core.stage import exit_if_looking, parser, publish, run_stage, start


def option_prompt(conversation: list[dict], first: str, second: str) -> list[dict]:
    """SPA's Listing 1: which of two responses is better, as a chat whose answer is the letter A or
    B."""
    turns = []
    for message in conversation:
        speaker = "Human" if message["role"] == "user" else message["role"].capitalize()
        turns.append(f"{speaker}: {message['content']}")
    text = "\n\n".join(turns)
    return [{"role": "user", "content": (
        f"Consider the following conversation between a human and an assistant:\n{text}\n"
        "Please choose the response that is the most helpful, honest, and harmless.\n"
        f"Options:\n(A) {first}\n(B) {second}\nThe answer is:")}]


def comparisons(rows: list[dict]) -> list[dict]:
    """Two supervised rows a gold pair. The letter alone is learnt, as it alone is read: no end of
    turn."""
    asked = []
    for row in rows:
        good, bad = row["chosen"], row["rejected"]
        for right, wrong, first, second in (("A", "B", good, bad), ("B", "A", bad, good)):
            asked.append({"id": f"{row['id']} {right}",
                          "prompt": option_prompt(row["prompt"], first, second),
                          "chosen": answer_turn(right), "rejected": answer_turn(wrong),
                          "chosen_ended": False, "rejected_ended": False})
    return asked


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the output is complete."""
    cli = parser(__doc__)
    cli.add_argument("--pairs", required=True, help="gold preference rows (JSONL)")
    cli.add_argument("--out", type=os.path.normpath, required=True, help="supervised rows (JSONL)")
    args = cli.parse_args()
    start(args, files=["pairs"])
    exit_if_looking(args.out)
    return args


def main(args: argparse.Namespace) -> None:
    rows = comparisons(read_rows(args.pairs, "preferences"))
    publish(args, {"comparisons": len(rows)}, lambda tmp: write_rows(tmp, rows))
    print(f"comparisons: {len(rows)} of {len(rows) // 2} pairs → {args.out}")


if __name__ == "__main__":
    run_stage(main, flags())

"""Pairs that join a round's labelled rows: the gold pairs once more, or some of the round's own.

A gold pair keeps its label; its log-probs are those of π_{t−1}, the reference of the round's
training (SPA's anchor). label.py has scored the gold pairs and labelled them as it found them:
where it disagrees, the sides change places here. Their margin is no confidence, and their margin_of
says so (judge gold): it is for --anchor previous alone.

    python label.py --model pi_1 --reference-model pi_init --pairs seed.jsonl --out scored.jsonl
    python bench/replay.py --pairs labelled.jsonl --gold seed.jsonl --scored scored.jsonl --out OUT
    python bench/replay.py --pairs labelled.jsonl --repeat 40 --out OUT
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.rows import SIDES, answer_turn, read_rows, scored_digest, write_rows  # noqa: E402
from core.stage import natural, parser, run_stage  # noqa: E402


def with_label(row: dict, chosen: str) -> dict:
    """A scored pair, turned around where it was labelled against `chosen`, gold's choice."""
    if row["chosen"] != chosen:
        sides = {f"{new}{key[len(old):]}": value for old, new in (SIDES, SIDES[::-1])
                 for key, value in row.items() if key.startswith(old)}
        row = row | sides
    return row | {"margin_of": row["margin_of"] | {"judge": "gold", "scored": scored_digest(row)}}


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--pairs", required=True, help="labelled rows of the round (JSONL)")
    cli.add_argument("--gold", help="gold pairs (JSONL)")
    cli.add_argument("--scored", help="what label.py --pairs made of them, by π_{t−1}")
    cli.add_argument("--repeat", type=natural, help="instead: how many of the round's own pairs")
    cli.add_argument("--out", type=os.path.normpath, required=True, help="both together")
    args = cli.parse_args()
    rows = read_rows(args.pairs, "labelled")
    if args.repeat:
        more = rows[:args.repeat]
    else:
        choices = {row["id"]: row["chosen"] for row in read_rows(args.gold, "preferences")}
        more = [with_label(row, choices[row["id"]]) for row in read_rows(args.scored, "labelled")]
    joined = rows + [row | {"id": f"{row['id']} again"} for row in more]
    write_rows(args.out, (row | {side: answer_turn(row[side]) for side in SIDES}
                          for row in joined))
    print(f"replay: {len(more)} pairs join {len(rows)} → {args.out}")


if __name__ == "__main__":
    run_stage(main)

"""A round's worst case with its moved fractions on random pairs: is it which pairs move, or that
any do?

Each moved pair's fraction goes to a pair drawn at random, which moves by its own ξ, all the way to
0 as the follower moves pairs; the transport, which is larger than ε then, is printed.

    python bench/random_pairs.py --pairs round1/worst.jsonl --out round1/random.jsonl --seed 1
"""
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.rows import read_rows, write_rows  # noqa: E402
from core.stage import parser, run_stage  # noqa: E402


def on_random_pairs(rows: list[dict], seed: int) -> list[dict]:
    """The rows with new atoms: fractions (1 − f, f) as they were, on pairs drawn without
    repetition."""
    fractions = [sum(weight for weight, shift in row["atoms"] if shift) for row in rows]
    moved = [fraction for fraction in fractions if fraction > 0]
    lot = random.Random(seed).sample(range(len(rows)), len(moved))
    atoms = [[[1.0, 0.0]] for _ in rows]
    for i, fraction in zip(lot, moved):
        atoms[i] = [[1 - fraction, 0.0], [fraction, rows[i]["xi"]]]
    return [row | {"atoms": own} for row, own in zip(rows, atoms)]


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--pairs", required=True, help="worst-case rows (JSONL)")
    cli.add_argument("--out", type=os.path.normpath, required=True, help="with other atoms")
    cli.add_argument("--seed", type=int, default=0, help="decides the pairs")
    args = cli.parse_args()
    rows = on_random_pairs(read_rows(args.pairs, "labelled"), args.seed)
    write_rows(args.out, rows)
    transport = sum(weight * shift for row in rows for weight, shift in row["atoms"]) / len(rows)
    print(f"random pairs: transport {transport:.4f} → {args.out}")


if __name__ == "__main__":
    run_stage(main)

"""What encoded rows weigh in a process: as lists of Python's integers, and as core keeps them.

    python bench/memory.py          a minute or two on two cores, 180 MB of a temporary file

60 000 pairs of the lengths that bench/cost.py counts with, a prompt of 200 tokens and responses of
256 on average, are read and encoded by core's own functions, and again with their ids left in
lists. Each kind is held by a process of its own; what a third weighs without ids is taken off.
"""
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.chat import encode_prompt, encode_rows, pair_of, vocabulary  # noqa: E402
from core.rows import iterate_rows, read_rows  # noqa: E402
from data.tiny import make_tokenizer, tiny_config  # noqa: E402

N, PROMPT, RESPONSE, VOCABULARY = 60_000, 200, 256, 32_000


def write_pairs(path: str) -> None:
    """Labelled rows whose ids are random and whose texts are short, but for the prompt's."""
    dice = np.random.default_rng(0)
    tokenizer = make_tokenizer("bytes")
    prompt = [{"role": "user", "content": ""}]
    while len(encode_prompt(tokenizer, prompt)) < PROMPT:
        prompt[0]["content"] += "z"
    row = {"prompt": prompt, "chosen": "a", "rejected": "b", "vocabulary": vocabulary(tokenizer)}
    with open(path, "w", encoding="utf-8") as file:
        for i in range(N):
            row["id"] = str(i)
            for side in ("chosen", "rejected"):
                length = dice.integers(RESPONSE // 2, 3 * RESPONSE // 2, endpoint=True)
                # Smaller integers are objects that Python has anyway.
                row[f"{side}_ids"] = dice.integers(257, VOCABULARY, length).tolist()
            file.write(json.dumps(row) + "\n")


def weigh(kind: str, path: str) -> float:
    """GB of this process that came with the rows, which it holds."""
    tokenizer = make_tokenizer("bytes")
    config = tiny_config("llama", vocab_size=VOCABULARY)
    before = resident()
    if kind == "arrays":
        rows = read_rows(path, "preferences")
        held = [rows, encode_rows(config, tokenizer, rows, [pair_of(row) for row in rows], path)]
    else:
        dice = np.random.default_rng(1)
        held = []
        for row in iterate_rows(path, "preferences"):
            ids = [row.pop("chosen_ids").tolist(), row.pop("rejected_ids").tolist()]
            prompt = dice.integers(257, VOCABULARY, PROMPT).tolist()
            held.append((row, prompt, ids) if kind == "lists" else (row,))
    return resident() - before


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    with (tempfile.TemporaryDirectory() as folder,
          ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool):
        path = f"{folder}/pairs.jsonl"
        write_pairs(path)
        none, lists, arrays = pool.map(weigh, ("none", "lists", "arrays"), [path] * 3)
    lists -= none
    arrays -= none
    print(f"memory: {N} pairs of {PROMPT} + 2 × {RESPONSE} tokens on average: {lists:.2f} GB as "
          f"lists, {arrays:.2f} GB as arrays, {lists / arrays:.1f} times less")


if __name__ == "__main__":
    main()

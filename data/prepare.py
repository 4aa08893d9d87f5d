"""Data: any preference set → a small gold seed, prompts for every round, prompts for evaluation.

Reads a JSONL file, or whatever `datasets` loads (a hub id, a folder, parquet, JSON, CSV). Known schemas, found by looking:

    prompt + chosen + rejected        each a string, or a list of {role, content} that ends with the response
    chosen + rejected                 Anthropic hh-rlhf transcripts ("\\n\\nHuman: … \\n\\nAssistant: …")
    instruction (+ input) + chosen + rejected
    prompt alone                      the seed part becomes seed_prompts.jsonl, for a gold judge to label (see run.sh)

Writes OUT/seed.jsonl (id, prompt, chosen, rejected), OUT/prompts_1.jsonl … and, from the rest, OUT/eval.jsonl. A prompt is
in one part only; prompts that differ in case or white space alone are one prompt. Papers: 2 000 gold pairs of 60 000 (3.3 %).

    python data/prepare.py --data argilla/ultrafeedback-binarized-preferences-cleaned --out data/uf
    python data/prepare.py --data data/prompts.jsonl --out runs/demo/data --seed-size 40 --rounds 96 96
"""
import hashlib
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this script lies below the root that imports start from
from data.rows import fail, is_done, natural, parser, publish, read_json_lines, run_stage, settings_of, share, write_rows, wrong


def load_any(source: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) for every row of a JSONL file or of the training split of whatever `datasets` can load."""
    if source.endswith(".jsonl"):
        for number, row in read_json_lines(source):
            yield f"{source}:{number}", row
        return
    import datasets  # slow to import, and not needed for JSONL
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    kind = {".json": "json", ".parquet": "parquet", ".csv": "csv"}.get(Path(source).suffix)
    try:
        loaded = datasets.load_dataset(kind, data_files=source) if kind else datasets.load_dataset(source)
    except Exception as error:  # `datasets` raises many kinds
        fail(f"{source}: cannot be loaded: {str(error).splitlines()[0]}")
    split = next((s for s in ("train_prefs", "train") if s in loaded), next(iter(loaded)))
    for number, row in enumerate(loaded[split], 1):
        yield f"{source} ({split}), row {number}", row


def transcript(text: str) -> list[dict]:
    """Messages of an hh-rlhf transcript."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    return [{"role": "user" if who == "Human" else "assistant", "content": what.strip()} for who, what in zip(parts[::2], parts[1::2])]


def normalise(row: dict) -> dict | None:
    """{prompt: messages, chosen?, rejected?} of a row in any known schema, or None if it is in none."""
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if prompt is None and isinstance(row.get("instruction"), str):
        prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part and isinstance(part, str))
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str) and chosen.startswith("\n\nHuman:"):
        chosen, rejected = transcript(chosen), transcript(rejected)
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected:
        if prompt is None and chosen[:-1] == rejected[:-1]:
            prompt = chosen[:-1]
        chosen, rejected = (side[-1].get("content") if isinstance(side[-1], dict) else None for side in (chosen, rejected))
    if isinstance(prompt, str) and prompt.strip():
        prompt = [{"role": "user", "content": prompt}]
    result = {"prompt": prompt} | ({"chosen": chosen, "rejected": rejected} if "chosen" in row or "rejected" in row else {})
    return None if any(wrong(key, value) for key, value in result.items()) else result


def collect(source: str) -> tuple[list[dict], int, int]:
    """(rows with distinct prompts in the order of the source, repeated prompts, rows without a preference)."""
    rows, repeated, empty, gold = {}, 0, 0, None
    for where, raw in load_any(source):
        row = normalise(raw)
        if row is None and all(isinstance(raw.get(k), (str, list)) for k in ("chosen", "rejected")):
            empty += 1  # an empty response, or two transcripts that part before the last turn
            continue
        if row is None:
            fail(f"{where}: columns {', '.join(raw)} fit no known schema; needed: prompt, chosen and rejected (see --help)")
        if gold is None:
            gold = "chosen" in row
        if gold != ("chosen" in row):
            fail(f"{where}: some rows have chosen and rejected and some do not; all or none must")
        text = "\n".join(f"{m['role']}: {' '.join(m['content'].lower().split())}" for m in row["prompt"])
        key = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
        if key in rows:
            repeated += 1
        else:
            rows[key] = {"id": key, **row}
    return list(rows.values()), repeated, empty


def split(rows: list[dict], seed_size: int, rounds: list[int], seed: int, flip: float) -> dict[str, list[dict]]:
    """File name → rows: a shuffled partition. `flip` of the gold labels, rounded to whole pairs, have their sides exchanged."""
    dice = random.Random(seed)
    rows = dice.sample(rows, len(rows))
    parts, start = {}, 0
    for name, size in [("seed", seed_size), *((f"prompts_{t}", n) for t, n in enumerate(rounds, 1)), ("eval", len(rows))]:
        parts[name], start = rows[start:start + size], start + size
    if "chosen" not in rows[0]:
        parts = {"seed_prompts": parts.pop("seed"), **parts}
    for row in dice.sample(parts.get("seed", []), round(flip * len(parts.get("seed", [])))):
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    for name in parts:  # a prompt set carries no gold label: nothing downstream can use one by accident
        if name.startswith("prompts"):
            parts[name] = [{"id": r["id"], "prompt": r["prompt"]} for r in parts[name]]
    return {name: part for name, part in parts.items() if part}


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--data", required=True, help="JSONL file, or hub id, folder or file for `datasets`")
    cli.add_argument("--out", required=True, help="folder for seed.jsonl, prompts_t.jsonl, eval.jsonl")
    cli.add_argument("--seed-size", type=natural, default=2000, help="gold-labelled pairs (papers: 2 000; SPA also 500, 1 000, 6 000)")
    cli.add_argument("--rounds", type=natural, nargs="*", default=[8000, 20000, 30000], help="prompts of each round (papers: the default)")
    cli.add_argument("--flip", type=share, default=0.0, help="share of the gold labels to turn wrong on purpose (SSAPO: 0.25)")
    cli.add_argument("--seed", type=int, default=42, help="decides the split")
    args = cli.parse_args()
    settings = settings_of(args, "data")
    if is_done(args.out, settings):
        return
    rows, repeated, empty = collect(args.data)
    needed = args.seed_size + sum(args.rounds)
    if len(rows) < needed:
        fail(f"{args.data}: {len(rows)} distinct prompts; --seed-size and --rounds need {needed}")
    parts = split(rows, args.seed_size, args.rounds, args.seed, args.flip)

    def write(tmp: str) -> None:
        for name, part in parts.items():
            write_rows(f"{tmp}/{name}.jsonl", part)

    sizes = {name: len(part) for name, part in parts.items()}
    publish(args.out, settings, {**sizes, "repeated": repeated, "without_preference": empty}, write)
    print(f"prepare: {', '.join(f'{k} {v}' for k, v in sizes.items())}; {repeated} repeated prompts and {empty} rows without "
          f"a preference left out → {args.out}")


if __name__ == "__main__":
    run_stage(main)

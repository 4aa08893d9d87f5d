"""Data: any preference set → a small gold seed, prompts for every round, prompts for evaluation. And: what a row is.

Reads a JSONL file, or whatever `datasets` loads (a hub id, a folder, parquet, JSON, CSV). Known schemas, found by looking:

    prompt + chosen + rejected        each a string, or a list of {role, content} that ends with the response
    chosen + rejected                 Anthropic hh-rlhf transcripts ("\\n\\nHuman: … \\n\\nAssistant: …")
    instruction (+ input) + chosen + rejected
    prompt alone                      the seed part becomes seed_prompts.jsonl, for a gold judge to label (see run.sh)

Writes OUT/seed.jsonl (id, prompt, chosen, rejected), OUT/prompts_1.jsonl … and, from the rest, OUT/eval.jsonl. A prompt is
in one part only; prompts that differ in case or white space alone are one prompt. Papers: 2 000 gold pairs of 60 000 (3.3 %).

This file owns the rows that pass between stages and how a stage reads, checks, skips and publishes them. It needs no torch.

    python data/prepare.py --data argilla/ultrafeedback-binarized-preferences-cleaned --out data/uf
    python data/prepare.py --data data/prompts.jsonl --out runs/demo/data --seed-size 40 --rounds 96 96
"""
import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

# ---------------------------------------------------------------------------------------------- errors and rows


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


ROWS = {  # what each kind of file must hold, key by key; extra keys pass through every stage unchanged
    "prompts": ["prompt"],
    "preferences": ["prompt", "chosen", "rejected"],
    "responses": ["prompt", "responses"],
    "labelled": ["prompt", "chosen", "rejected", "margin", "chosen_logp", "rejected_logp"],
}


def wrong(key: str, value: object) -> str | None:
    """What `value` should have been under `key`, or None if it is right."""
    if key in ("id", "chosen", "rejected"):
        return None if isinstance(value, str) and value.strip() else "a non-empty string"
    if key == "prompt":
        turns = isinstance(value, list) and value and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
        return None if turns else 'a non-empty list of {"role": …, "content": …}'
    if key == "responses":
        return None if isinstance(value, list) and value and all(isinstance(r, str) for r in value) else "a list of strings"
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if key == "margin":
        return None if number and value >= 0 else "a finite number ≥ 0"
    return None if number else "a finite number"


def read_json_lines(path: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) for every line of a JSONL file."""
    if not os.path.isfile(path):
        fail(f"{path}: no such file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                fail(f"{path}:{number}: not JSON in UTF-8 ({error}); expected one object a line")
            if not isinstance(row, dict):
                fail(f"{path}:{number}: expected an object, found {type(row).__name__}")
            yield number, row


def read_rows(path: str, kind: str) -> list[dict]:
    """Rows of a JSONL file, each checked for its `id` and the keys of `ROWS[kind]`. The first bad line ends the program."""
    rows, seen = [], {}
    for number, row in read_json_lines(path):
        for key in ["id", *ROWS[kind]]:
            if key not in row:
                fail(f"{path}:{number}: key '{key}' is missing; {kind} rows need id, {', '.join(ROWS[kind])}")
            if (expected := wrong(key, row[key])) is not None:
                fail(f"{path}:{number}: '{key}' must be {expected}, found {json.dumps(row[key])[:60]}")
        if row["id"] in seen:
            fail(f"{path}:{number}: id {row['id']!r} stands on line {seen[row['id']]} too; ids must differ")
        seen[row["id"]] = number
        rows.append(row)
    if not rows:
        fail(f"{path}: holds no rows")
    return rows


def write_rows(path: str, rows: Iterable[dict]) -> None:
    """Write JSONL beside `path`, then rename: a file that exists is whole."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(f"{path}.tmp", path)


# ------------------------------------------------------------------------------- a stage: settings, skipping, stats


def fingerprint(path: str) -> str:
    """Digest of a file's content; of the names, sizes and times in a folder (models are large); of the text of a hub id."""
    digest = hashlib.sha256()
    if os.path.isfile(path):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    else:
        files = sorted(f for f in Path(path).rglob("*") if f.is_file())
        digest.update(repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files] or path).encode())
    return digest.hexdigest()[:16]


def settings_of(args: argparse.Namespace, *inputs: str) -> dict:
    """Everything that decides a stage's output: the arguments, with the paths named in `inputs` by their fingerprint."""
    return {key: fingerprint(value) if key in inputs and value else value for key, value in vars(args).items() if key != "out"}


def is_done(out: str, settings: dict) -> bool:
    """True if `out` is complete from these very settings. Settings that changed are named; the stage then runs again."""
    try:
        old = json.loads(Path(f"{out}.stats.json").read_text())["settings"]
    except (OSError, ValueError, KeyError):
        return False
    changed = [f"{k} {old.get(k)!r} → {settings.get(k)!r}" for k in {**old, **settings} if old.get(k) != settings.get(k)]
    if os.path.exists(out) and (changed or int(os.environ.get("RANK", 0)) == 0):
        print(f"{out}: " + (f"changed since it was written: {'; '.join(changed)}. Redoing." if changed else "complete, skipped"))
    return os.path.exists(out) and not changed


def publish(out: str, settings: dict, stats: dict, write: Callable[[str], None]) -> None:
    """`write(tmp)`, rename to `out`, then write `out`.stats.json: at no moment do stats describe another output."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.stats.json").unlink(missing_ok=True)
    tmp = f"{out}.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    write(tmp)
    if os.path.isdir(out):
        shutil.rmtree(out)
    os.replace(tmp, out)
    text = json.dumps({**stats, "settings": settings}, indent=1, ensure_ascii=False)
    Path(f"{tmp}.stats").write_text(text + "\n")
    os.replace(f"{tmp}.stats", f"{out}.stats.json")


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage; a full disk or an unreadable file is one line, like every other error that a user can mend."""
    try:
        main()
    except OSError as error:
        fail(f"{error.filename or ''}: {error.strerror or error}")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def parser(doc: str) -> argparse.ArgumentParser:
    """An argument parser whose --help is the module's docstring, then every flag with its default."""
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass
    return argparse.ArgumentParser(description=doc, formatter_class=Help)


# ------------------------------------------------------------------------------------------------- reading a data set


def load_any(source: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) for every row of a JSONL file or of the training split of whatever `datasets` can load."""
    if source.endswith(".jsonl"):
        for number, row in read_json_lines(source):
            yield f"{source}:{number}", row
        return
    import datasets  # slow to import, and not needed for JSONL
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
        prompt = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str) and chosen.startswith("\n\nHuman:"):
        chosen, rejected = transcript(chosen), transcript(rejected)
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected:
        if prompt is None and chosen[:-1] == rejected[:-1]:
            prompt = chosen[:-1]
        chosen, rejected = chosen[-1]["content"], rejected[-1]["content"]
    if isinstance(prompt, str) and prompt.strip():
        prompt = [{"role": "user", "content": prompt}]
    result = {"prompt": prompt} if chosen is None and rejected is None else {"prompt": prompt, "chosen": chosen, "rejected": rejected}
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
    cli.add_argument("--seed-size", type=int, default=2000, help="gold-labelled pairs (papers: 2 000; SPA also 500, 1 000, 6 000)")
    cli.add_argument("--rounds", type=int, nargs="*", default=[8000, 20000, 30000], help="prompts of each round (papers: the default)")
    cli.add_argument("--flip", type=float, default=0.0, help="share of the gold labels to turn wrong on purpose (SSAPO: 0.25)")
    cli.add_argument("--seed", type=int, default=42, help="decides the split")
    args = cli.parse_args()
    if args.seed_size < 1 or any(n < 1 for n in args.rounds) or not 0 <= args.flip <= 1:
        fail("--seed-size and --rounds must be at least 1, --flip between 0 and 1")
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

"""Data: any preference set → a small gold seed, prompts for every round, prompts for evaluation.

Reads a JSONL file, or whatever `datasets` loads (a hub id, a folder, parquet, JSON, CSV). Known schemas, found by looking:

    prompt + chosen + rejected        each a string, or a list of {role, content} that ends with the response
    chosen + rejected                 Anthropic hh-rlhf transcripts ("\\n\\nHuman: … \\n\\nAssistant: …")
    instruction (+ input) + chosen + rejected
    prompt alone                      the seed part becomes seed_prompts.jsonl, for a gold judge to label (see run.sh)

With `--model`, rows that do not fit its context are left out, and counted. `--select farthest` takes as the seed the prompts that differ most: each next one the farthest, by cosine of the model's last
hidden state at the end of the prompt, from those chosen before (SSAPO's seed selection).

Writes OUT/seed.jsonl (id, prompt, chosen, rejected), OUT/prompts_1.jsonl … and, from the rest, OUT/eval.jsonl. A prompt is
in one part only; prompts that differ in case or white space alone are one prompt. Papers: 2 000 gold pairs of 60 000 (3.3 %).

    python data/prepare.py --data argilla/ultrafeedback-binarized-preferences-cleaned --out data/uf
    python data/prepare.py --data data/prompts.jsonl --out runs/demo/data --seed-size 40 --rounds 96 96
"""
import hashlib
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this script lies below the root that imports start from
from core.rows import fail, read_json_lines, write_rows, wrong
from core.stage import is_done, natural, parser, publish, ranged, run_stage, settings_of, share


def load_any(source: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) for every row of a JSONL file or of the training split of whatever `datasets` can load."""
    if source.endswith(".jsonl"):
        for number, row in read_json_lines(source):
            yield f"{source}:{number}", row
        return
    import datasets  # slow to import, and not needed for JSONL
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    kind = next((kind for kind in ("json", "parquet", "csv") if re.search(rf"\.{kind}l?(\.\w+)?$", source)), None)  # .jsonl.gz, …
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
        if row is None and all(isinstance(raw.get(k), (str, list)) for k in ("chosen", "rejected")) and (
                {"prompt", "instruction"} & raw.keys() or "Human:" in raw["chosen"] or isinstance(raw["chosen"], list)):
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


def fitting(rows: list[dict], path: str, room: int) -> list[dict]:
    """Rows whose prompt leaves room for `room` new tokens, and for both gold responses, in the context of the model at `path`."""
    from core.chat import encode_prompt, encode_response  # torch is slow to import
    from core.models import load_config, load_tokenizer
    limit, tokenizer = getattr(load_config(path), "max_position_embeddings", None), load_tokenizer(path)

    def fits(row: dict) -> bool:
        answers = [row[key] for key in ("chosen", "rejected") if key in row]
        parts = [*(m["content"] for m in row["prompt"]), max(answers, key=lambda text: len(text.encode(errors="replace")), default="")]
        if sum(len(part.encode(errors="replace")) + 64 for part in parts) + room <= limit:
            return True  # no token is shorter than a byte, no turn's frame longer than 64
        prompt = len(encode_prompt(tokenizer, row["prompt"]))
        return prompt + max(room, *(len(encode_response(tokenizer, text)) for text in answers), 0) <= limit
    return [row for row in rows if fits(row)] if limit else rows


def embed(rows: list[dict], path: str, source: str):
    """Unit vectors [N, H] (fp16: 0.5 GB at N = 60 000, H = 4 096) of a model's last hidden states at the end of each prompt."""
    import torch  # slow to import, and needed here alone
    from tqdm import tqdm

    from core.chat import encode_rows
    from core.policy import deal, pack
    from core.models import load
    from core.parallel import autocast, start_processes
    from core.policy import response_hidden
    *_, device = start_processes()
    model, tokenizer = load(path, device)
    vectors = torch.empty(len(rows), model.config.hidden_size, dtype=torch.float16, device=device)
    for start in tqdm(range(0, len(rows), 1024), desc="embed", unit="block"):
        encoded = encode_rows(model.config, tokenizer, rows[start:start + 1024], source, lambda row: [])
        encoded = [(prompt, [[0]]) for prompt, _ in encoded]  # the position that predicts a response of one token
        for batch in deal(encoded, range(len(encoded)), False, 16384 if device.type == "cuda" else 2048, 1)[0]:
            with torch.no_grad(), autocast(device, "auto"):
                hidden = response_hidden(model, pack([encoded[i] for i in batch], False, device))
            vectors[[start + i for i in batch]] = torch.nn.functional.normalize(hidden.float(), dim=-1).half()
    return vectors


def farthest(vectors, k: int) -> list[int]:
    """k row numbers of unit vectors [N, H]: the first row, then always the one with the lowest cosine to its nearest chosen. O(N·k)."""
    import torch
    from tqdm import tqdm
    nearest = torch.full((len(vectors),), -torch.inf, device=vectors.device)
    chosen = [0]
    for _ in tqdm(range(1, k), desc="farthest", unit="prompt"):
        nearest = torch.maximum(nearest, (vectors @ vectors[chosen[-1]]).float())
        nearest[chosen[-1]] = torch.inf
        chosen.append(int(nearest.argmin()))
    return chosen


def split(rows: list[dict], seed_size: int, rounds: list[int], seed: int, flip: float, select: Callable[[list], list] | None = None,
          eval_size: int | None = None) -> dict[str, list[dict]]:
    """File name → rows: a shuffled partition. `flip` of the gold labels, rounded to whole pairs, have their sides exchanged.
    `select` names the rows of the seed, where they are not just the first."""
    dice = random.Random(seed)
    rows = dice.sample(rows, len(rows))
    if select and seed_size:
        first = dict.fromkeys(select(rows))
        rows = [rows[i] for i in first] + [row for i, row in enumerate(rows) if i not in first]
    parts, start = {}, 0
    for name, size in [("seed", seed_size), *((f"prompts_{t}", n) for t, n in enumerate(rounds, 1)), ("eval", eval_size or len(rows))]:
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
    cli.add_argument("--data", required=True, help="JSONL file, or hub id, folder or file (.json, .parquet, .csv, .jsonl.gz) for `datasets`")
    cli.add_argument("--out", type=os.path.normpath, required=True, help="folder for seed.jsonl, prompts_t.jsonl, eval.jsonl")
    size = cli.add_mutually_exclusive_group()
    size.add_argument("--seed-size", type=ranged(int, 0), default=2000, help="gold-labelled pairs (papers: 2 000; 0 for SPA without a seed)")
    size.add_argument("--seed-fraction", type=share, help="gold-labelled share of all prompts instead (SPA, Table 3: 0.008, 0.017, 0.033, 0.1)")
    cli.add_argument("--select", choices=["random", "farthest"], default="random", help="how the seed is chosen")
    cli.add_argument("--model", help="whose context all rows must fit, and whose hidden states --select farthest compares")
    cli.add_argument("--max-new-tokens", type=natural, default=300, help="with --model: what every prompt must leave room for")
    cli.add_argument("--rounds", type=natural, nargs="*", default=[8000, 20000, 30000], help="prompts of each round (papers: the default)")
    cli.add_argument("--eval-size", type=natural, help="at most so many prompts for the evaluation; default: the rest")
    cli.add_argument("--flip", type=share, default=0.0, help="share of the gold labels to turn wrong on purpose (SSAPO: 0.25)")
    cli.add_argument("--seed", type=int, default=42, help="decides the split")
    args = cli.parse_args()
    if args.select == "farthest" and not args.model:
        fail("--select farthest needs --model")
    settings = settings_of(args, "data", "model")
    if is_done(args.out, settings):
        return
    rows, repeated, empty = collect(args.data)
    distinct = len(rows)
    rows = fitting(rows, args.model, args.max_new_tokens) if args.model else rows
    seed_size = args.seed_size if args.seed_fraction is None else round(args.seed_fraction * len(rows))
    needed = seed_size + sum(args.rounds) + (1 if args.rounds or not seed_size else 0)
    if len(rows) < needed:
        fail(f"{args.data}: {len(rows)} distinct prompts"
             f"{f' ({distinct - len(rows)} more are too long for {args.model})' if distinct > len(rows) else ''}; "
             f"the seed, --rounds and one for the evaluation need {needed}")
    parts = split(rows, seed_size, args.rounds, args.seed, args.flip,
                  (lambda rows: farthest(embed(rows, args.model, args.data), seed_size)) if args.select == "farthest" else None, args.eval_size)

    def write(tmp: str) -> None:
        for name, part in parts.items():
            write_rows(f"{tmp}/{name}.jsonl", part)

    sizes = {name: len(part) for name, part in parts.items()}
    publish(args.out, settings, {**sizes, "repeated": repeated, "without_preference": empty, "too_long": distinct - len(rows)}, write)
    print(f"prepare: {', '.join(f'{k} {v}' for k, v in sizes.items())}; {repeated} repeated prompts, {empty} rows without "
          f"a preference and {distinct - len(rows)} too long left out → {args.out}")


if __name__ == "__main__":
    run_stage(main)

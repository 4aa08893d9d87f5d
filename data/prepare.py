"""Data: any preference set → a small gold seed, prompts for every round, prompts for evaluation.

Reads a JSONL, JSON or CSV file, whose texts stay texts (`NA`, `007` and dates too), or whatever
`datasets` loads (a hub id, a folder, parquet). Known schemas, found by looking:

    prompt + chosen + rejected        each a text, or a list of {role, content}
    chosen + rejected                 lists of {role, content}, or Anthropic hh-rlhf transcripts
                                      ("\\n\\nHuman: … \\n\\nAssistant: …")
    instruction (+ input) + chosen + rejected
    prompt alone                      the seed part becomes seed_prompts.jsonl, for a gold judge
                                      to label (see run.sh)

A column `system` is a system turn. A conversation under chosen and rejected ends with the response,
and the turns before it are the prompt; a column `prompt` must be among them, or come before them.
A row that cannot be used is left out and counted under its reason, and columns that are not used
are named; a row that contradicts itself or fits no schema ends the program.

With `--model`, rows that do not fit its context are left out. `--select farthest` takes as the seed
the prompts that differ most: each next one the farthest, by cosine of the model's last hidden state
at the end of the prompt, from those chosen before (SSAPO's seed selection).

Writes OUT/seed.jsonl (id, prompt, chosen, rejected), OUT/prompts_1.jsonl … and, from the rest,
OUT/eval.jsonl; all but the id are messages, so that TRL's DPOTrainer takes the pairs as they are.
Prompts that differ in case or white space alone are one prompt. Prompts with the same opening user
turn are in one part only: those that would fall into a second one are left out. Papers: 2 000 gold
pairs of 60 000 (3.3 %).

    python -m data.prepare --data argilla/ultrafeedback-binarized-preferences-cleaned --out data/uf
    python -m data.prepare --data data/prompts.jsonl --out runs/demo/data --seed-size 40 \\
        --rounds 96 96
"""
import argparse
import csv
import hashlib
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator

from core.rows import (
    BROKEN_GZIP,
    SIDES,
    answer_turn,
    fail,
    opened,
    read_json_lines,
    read_json_list,
    write_rows,
    wrong,
)
from core.stage import (
    hub_trouble,
    exit_if_complete,
    exit_if_looking,
    inputs_of,
    natural,
    parser,
    publish,
    ranged,
    run_stage,
    settings_of,
    share,
)


def flags() -> tuple[argparse.Namespace, dict]:
    """The arguments, and what decides the output. Ends the program where that is complete."""
    cli = parser(__doc__)
    cli.add_argument("--data", required=True, help="JSONL, JSON or CSV file (also .gz), or hub id, "
                     "folder or parquet file for `datasets`")
    cli.add_argument("--out", type=os.path.normpath, required=True,
                     help="folder for seed.jsonl, prompts_t.jsonl, eval.jsonl")
    size = cli.add_mutually_exclusive_group()
    size.add_argument("--seed-size", type=ranged(int, 0), default=2000,
                      help="gold-labelled pairs (papers: 2 000; 0 for SPA without a seed)")
    size.add_argument("--seed-fraction", type=share, help="gold-labelled share of all prompts "
                      "instead (SPA, Table 3: 0.008, 0.017, 0.033, 0.1)")
    cli.add_argument("--select", choices=["random", "farthest"], default="random",
                     help="how the seed is chosen")
    cli.add_argument("--model", help="whose chat template must take every prompt, whose context "
                     "all rows must fit, and whose hidden states --select farthest compares")
    cli.add_argument("--max-new-tokens", type=natural, default=300,
                     help="with --model: what every prompt must leave room for")
    cli.add_argument("--rounds", type=natural, nargs="*", default=[8000, 20000, 30000],
                     help="prompts of each round (papers: the default)")
    cli.add_argument("--eval-size", type=natural,
                     help="at most so many prompts for the evaluation; default: the rest")
    cli.add_argument("--flip", type=share, default=0.0,
                     help="share of the gold labels to turn wrong on purpose (SSAPO: 0.25)")
    cli.add_argument("--seed", type=int, default=42, help="decides the split")
    args = cli.parse_args()
    if args.select == "farthest" and not args.model:
        fail("--select farthest needs --model")
    settings = settings_of(args, "data", "model")
    exit_if_complete(args.out, settings)
    exit_if_looking()
    return args, settings


if __name__ == "__main__":
    args, settings = flags()  # here already: what is imported below takes seconds to load

import torch
from tqdm import tqdm

from core.chat import encode_prompt, encode_response, encode_rows
from core.models import load_config, load_model, load_tokenizer
from core.parallel import autocast, start_processes
from core.policy import deal, pack, response_hidden

# Why a row is left out: its key in the stats, and how the summary says it.
REASONS = {
    "repeated": "repeated prompts",
    "tie": "ties",
    "empty_prompt": "with an empty prompt",
    "empty_response": "with an empty response",
    "parted": "whose sides part before the last turn",
    "not_assistant": "whose last turn is not the assistant's",
    "content_parts": "with content in parts",
    "tool_calls": "with tool calls",
    "null_content": "with null content",
    "too_long": "too long for the model",
    "straddling": "whose opening user turn stands in another part",
    "surplus": "beyond --eval-size",
}
COLUMNS = {"id", "prompt", "chosen", "rejected", "system", "instruction", "input"}
# What the project's own pairs say of a response beside its text; it changes sides with the text.
OF_A_SIDE = ["ended", "ids"]


# ------------------------------------------------------------------------------------------ reading


def load_any(source: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) for every row of a JSONL, JSON or CSV file, or of the training split
    of whatever `datasets` can load."""
    if re.search(r"\.(jsonl?|csv)(\.gz)?$", source) and "://" not in source:
        yield from read_texts(source, source, "csv" if ".csv" in source[-7:] else "json")
        return
    # Slow to import, and not needed for the files above.
    import datasets
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    kinds = ("json", "parquet", "csv")
    kind = next((k for k in kinds if re.search(rf"\.{k}l?(\.\w+)?$", source)), None)
    what = {"path": kind, "data_files": source} if kind else {"path": source}
    trouble = "" if kind or os.path.exists(source) else hub_trouble()
    try:
        builder = datasets.load_dataset_builder(**what)
        files = builder.config.data_files
        split = next((s for s in ("train_prefs", "train") if s in files), next(iter(files)))
        kind = type(builder).__module__.rpartition(".")[2]
        # `datasets` would take NA for a null, and a date for a number.
        if kind in ("json", "csv"):
            local = datasets.DownloadManager().download_and_extract(list(files[split]))
        else:
            rows = datasets.load_dataset(**what, split=split)
    except Exception as error:
        # `datasets` raises many kinds.
        said = (str(error) or repr(error)).splitlines()[0]
        fail(f"{source}: cannot be loaded: {trouble or said}")
    if kind in ("json", "csv"):
        for name, path in zip(files[split], local):
            yield from read_texts(name, path, kind, getattr(builder.config, "sep", ","))
        return
    for number, row in enumerate(rows, 1):
        yield f"{source} ({split}), row {number}", row


def read_texts(name: str, path: str, kind: str, separator: str = ",") -> Iterator[tuple[str, dict]]:
    """(where it stands in the file called `name`, row) of a JSON, JSONL or CSV file at `path`."""
    if not os.path.isfile(path):
        fail(f"{name}: no such file")
    if kind == "csv":
        # A response may be longer than csv's 128 kB.
        csv.field_size_limit(1 << 30)
        try:
            with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter=separator, strict=True)
                for row in reader:
                    if None in row:
                        fail(f"{name}:{reader.line_num}: more cells than the first line names")
                    yield f"{name}:{reader.line_num}", row
        except (ValueError, csv.Error, *BROKEN_GZIP) as error:
            fail(f"{name}: not CSV in UTF-8 ({error})")
        return
    try:
        with opened(path) as file:
            start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    except BROKEN_GZIP as error:
        fail(f"{name}: not JSON in UTF-8 ({error})")
    if start.startswith(b"[") and not re.search(r"\.jsonl(\.gz)?$", name):
        for number, row in enumerate(read_json_list(path), 1):
            yield f"{name}, entry {number}", row
    else:
        for number, row in read_json_lines(path):
            yield f"{name}:{number}", row


# ------------------------------------------------------------------------------ one row, any schema


def words(text: str) -> str:
    """A text for comparison: without regard to case and white space."""
    return " ".join(text.lower().split())


def conversation(value: str | list) -> str | list:
    """Messages of an hh-rlhf transcript; every other text, and messages, as they are."""
    if not isinstance(value, str) or not re.match(r"\s*Human:.*\n\nAssistant:", value, re.DOTALL):
        return value
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + value.lstrip())[1:]
    role = {"Human": "user", "Assistant": "assistant"}
    return [{"role": role[who], "content": text.strip()}
            for who, text in zip(parts[::2], parts[1::2])]


def unreadable(where: str, key: str, value: object) -> str | None:
    """Why `value` cannot be read as a text or as messages that are texts: one of REASONS, or None.
    What is neither ends the program."""
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        fail(f"{where}: '{key}' must be a text or a list of messages, "
             f"found {type(value).__name__} {repr(value)[:60]}")
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            fail(f'{where}: \'{key}\' must be a text or a list of {{"role": …, "content": …}}, '
                 f"found {repr(turn)[:60]} in it")
        content = turn.get("content")
        if turn.get("tool_calls") or turn.get("function_call"):
            return "tool_calls"
        if isinstance(content, list):
            return "content_parts"
        if content is None:
            return "null_content"
        if not isinstance(content, str):
            fail(f"{where}: 'content' in '{key}' must be a text, found {repr(content)[:60]}")
    return None


def clean(turn: dict) -> dict:
    """A message without the empty keys that tables give it."""
    return {key: value for key, value in turn.items() if key in ("role", "content") or value}


def said(turns: list[dict]) -> list[tuple[str, str]]:
    """Who said what, for comparison."""
    return [(turn["role"], " ".join(turn["content"].split())) for turn in turns]


def join(where: str, prompt: str | list | None, before: list[dict]) -> list[dict]:
    """The whole prompt: the column `prompt`, and the turns `before` the response in both sides.

    The conversation in the sides wins where it contains the prompt. Where it goes on from the
    prompt (it opens with another turn than the user's, or the prompt has none of the user's), both
    count, one after the other. All else is a contradiction.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt or not before:
        return prompt or before
    asked = said(prompt)
    told = said(before)
    if any(told[i:i + len(asked)] == asked for i in range(len(told))):
        return before
    if asked[-len(told):] == told:
        return prompt
    if told[0][0] in ("assistant", "tool") or all(role != "user" for role, _ in asked):
        return prompt + before
    fail(f"{where}: 'prompt' is not in the conversation under 'chosen' and 'rejected': "
         f"{repr(asked[-1][1])[:60]} against {repr(told[0][1])[:60]}; remove what is wrong")


def normalise(where: str, row: dict) -> dict | str:
    """{prompt: messages, chosen?, rejected?} of a row in any known schema, or the reason (of
    REASONS) why it is left out. What fits no schema or contradicts itself ends the program."""
    prompt = row.get("prompt")
    if prompt is None and row.get("instruction") is not None:
        for key in ("instruction", "input"):
            if not isinstance(row.get(key, ""), str | None):
                fail(f"{where}: '{key}' must be a text, found {repr(row[key])[:60]}")
        prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    sides = {key: row[key] for key in ("chosen", "rejected") if key in row}
    missing = [key for key in ("chosen", "rejected") if key not in row] if sides else []
    if all(isinstance(conversation(side), list) for side in sides.values()):
        sides = {key: conversation(side) for key, side in sides.items()}
    whole = any(isinstance(side, list) for side in sides.values())
    if missing or prompt is None and not whole and not ({"prompt", "instruction"} & row.keys()):
        fail(f"{where}: columns {', '.join(row)} fit no known schema; "
             "needed: prompt, chosen and rejected (see --help)")
    for key, value in sides.items():
        if value is None:
            fail(f"{where}: '{key}' is null; give it a text, or remove the row "
                 "(or both columns, where there are no preferences)")
    if prompt is None and not whole:
        key = "prompt" if "prompt" in row else "instruction"
        fail(f"{where}: '{key}' is null; give it a text, or remove the row")

    # Every part as messages, where it is a conversation, or as a text.
    parts = {"prompt": conversation(prompt), **sides}
    for key, part in parts.items():
        if part is None:
            continue
        if reason := unreadable(where, key, part):
            return reason
        if isinstance(part, list):
            parts[key] = [clean(turn) for turn in part]
    prompt, *both = parts.values()

    # What comes before the response, and the response.
    before = []
    if whole:
        if not all(isinstance(side, list) for side in both):
            fail(f"{where}: one of 'chosen' and 'rejected' is a conversation, the other a text")
        if not all(both):
            return "empty_response"
        if any(side[-1]["role"] != "assistant" for side in both):
            return "not_assistant"
        before = both[0][:-1]
        if before != both[1][:-1]:
            return "parted"
        both = [side[-1]["content"] for side in both]
    if isinstance(prompt, list) and prompt and prompt[-1] == {"role": "assistant", "content": ""}:
        # "… \n\nAssistant:" asks for the response.
        prompt = prompt[:-1]
    prompt = with_system(where, join(where, prompt, before), row.get("system"))
    if not any(turn["role"] != "system" and turn["content"].strip() for turn in prompt):
        return "empty_prompt"
    if not all(side.strip() for side in both):
        return "empty_response"
    if both and both[0] == both[1]:
        return "tie"
    extra = {}
    for keys in (("chosen_" + what, "rejected_" + what) for what in OF_A_SIDE):
        if sides and all(row.get(key) is not None for key in keys):
            extra |= {key: row[key] for key in keys}
    # The vocabulary says what the ids mean.
    if "chosen_ids" in extra and row.get("vocabulary") is not None:
        extra["vocabulary"] = row["vocabulary"]
    for key, value in extra.items():
        if expected := wrong(key, value):
            fail(f"{where}: '{key}' must be {expected}, found {repr(value)[:60]}")
    return {"prompt": prompt, **dict(zip(sides, both)), **extra}


def with_system(where: str, prompt: list[dict], system: object) -> list[dict]:
    """`prompt` with the column `system` as its first turn, if there is one."""
    if system is None or system == "":
        return prompt
    if not isinstance(system, str):
        fail(f"{where}: 'system' must be a text, found {repr(system)[:60]}")
    turn = {"role": "system", "content": system}
    if prompt and prompt[0]["role"] == "system":
        if said(prompt[:1]) != said([turn]):
            fail(f"{where}: column 'system' contradicts the system turn of the conversation: "
                 f"{repr(system)[:60]} against {repr(prompt[0]['content'])[:60]}")
        return prompt
    return [turn, *prompt]


def collect(source: str) -> tuple[list[dict], Counter, list[str]]:
    """(rows with distinct prompts in the order of the source, how many rows were left out for which
    of REASONS, columns that were not used)."""
    rows = {}
    left = Counter()
    unused = {}
    gold = None
    for where, raw in load_any(source):
        row = normalise(where, raw)
        instead = {"instruction", "input"} if raw.get("prompt") is not None else set()
        used = COLUMNS - instead | row.keys() if isinstance(row, dict) else COLUMNS - instead
        unused |= dict.fromkeys(k for k, v in raw.items() if k not in used and v is not None)
        if isinstance(row, str):
            left[row] += 1
            continue
        if gold is None:
            gold = "chosen" in row
        if gold != ("chosen" in row):
            fail(f"{where}: some rows have chosen and rejected and some do not; all or none must")
        text = "\n".join(f"{turn['role']}: {words(turn['content'])}" for turn in row["prompt"])
        key = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
        if key in rows:
            left["repeated"] += 1
        else:
            rows[key] = {"id": key, **row}
    return list(rows.values()), left, list(unused)


# ------------------------------------------------------------------------ what a model says of rows


def fitting(rows: list[dict], path: str, room: int, source: str) -> list[dict]:
    """Rows whose prompt leaves room for `room` new tokens, and for both gold responses, in the
    context of the model at `path`. A prompt that its chat template refuses ends the program."""
    limit = getattr(load_config(path).get_text_config(), "max_position_embeddings", None)
    tokenizer = load_tokenizer(path)
    kept = []
    for row in rows:
        prompt = row["prompt"]
        try:
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            # Templates raise whatever they like.
            fail(f"{source}: id {row['id']!r} ({repr(prompt[0]['content'])[:40]}): "
                 f"the chat template of {path} refuses this prompt: {error}")
        answers = [row[key] for key in ("chosen", "rejected") if key in row]
        longest = max((len(answer.encode(errors="replace")) for answer in answers), default=0)
        # No token is shorter than a byte; 64 for what is written around the answer.
        if limit is None or len(text.encode(errors="replace")) + longest + 64 + room <= limit:
            kept.append(row)
            continue
        lengths = (len(encode_response(tokenizer, prompt, answer)) for answer in answers)
        after = max(room, *lengths, 0)
        if len(encode_prompt(tokenizer, prompt)) + after <= limit:
            kept.append(row)
    return kept


def embed(rows: list[dict], path: str, source: str) -> torch.Tensor:
    """Unit vectors [N, H] (fp16: 0.5 GB at N = 60 000, H = 4 096) of a model's last hidden states
    at the end of each prompt."""
    *_, device = start_processes()
    model = load_model(path, device)
    tokenizer = load_tokenizer(path)
    budget = 16384 if device.type == "cuda" else 2048
    width = model.config.get_text_config().hidden_size
    vectors = torch.empty(len(rows), width, dtype=torch.float16, device=device)
    for start in tqdm(range(0, len(rows), 1024), desc="embed", unit="block"):
        block = rows[start:start + 1024]
        encoded = encode_rows(model.config, tokenizer, block, [[]] * len(block), source)
        # The position that predicts a response of one token.
        encoded = [(prompt, [[0]]) for prompt, _ in encoded]
        for batch in deal(encoded, range(len(encoded)), False, budget, 1)[0]:
            with torch.no_grad(), autocast(device, "auto"):
                hidden = response_hidden(model, pack([encoded[i] for i in batch], False, device))
            unit = torch.nn.functional.normalize(hidden.float(), dim=-1)
            vectors[[start + i for i in batch]] = unit.half()
    return vectors


def farthest(vectors: torch.Tensor, k: int) -> list[int]:
    """k row numbers of unit vectors [N, H]: the first row, then always the one with the lowest
    cosine to its nearest chosen. O(N·k)."""
    nearest = torch.full((len(vectors),), -torch.inf, device=vectors.device)
    chosen = [0]
    for _ in tqdm(range(1, k), desc="farthest", unit="prompt"):
        nearest = torch.maximum(nearest, (vectors @ vectors[chosen[-1]]).float())
        nearest[chosen[-1]] = torch.inf
        chosen.append(int(nearest.argmin()))
    return chosen


# ---------------------------------------------------------------------------------------- the parts


def opening(row: dict) -> str:
    """The first user turn of a row's prompt, without regard to case and white space."""
    turns = [turn for turn in row["prompt"] if turn["role"] == "user"] or row["prompt"]
    return words(turns[0]["content"])


def grouped(rows: list[dict]) -> list[dict]:
    """Rows in their order, those with the same opening user turn moved up to the first of them, so
    that at most one such group stands astride the border of two parts."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(opening(row), []).append(row)
    return [row for group in groups.values() for row in group]


def split(rows: list[dict], sizes: dict[str, int]) -> tuple[dict[str, list[dict]], Counter]:
    """(part → its rows, how many rows were left out for which of REASONS): the parts filled one
    after the other in the order of `rows`, without those whose opening user turn an earlier part
    has."""
    parts: dict[str, list[dict]] = {name: [] for name in sizes}
    left = Counter()
    owner = {}
    unfilled = list(sizes)
    for row in rows:
        while unfilled and len(parts[unfilled[0]]) == sizes[unfilled[0]]:
            unfilled.pop(0)
        if not unfilled:
            left["surplus"] += 1
        elif owner.setdefault(opening(row), unfilled[0]) == unfilled[0]:
            parts[unfilled[0]].append(row)
        else:
            left["straddling"] += 1
    return parts, left


def flip(row: dict) -> None:
    """Exchange the sides of a pair."""
    for chosen in [key for key in row if key.startswith("chosen")]:
        rejected = chosen.replace("chosen", "rejected")
        row[chosen], row[rejected] = row[rejected], row[chosen]


def summary(left: Counter) -> str:
    """How many rows were left out, and why."""
    return ", ".join(f"{left[key]} {REASONS[key]}" for key in REASONS if left[key]) or "nothing"


def main(args: argparse.Namespace, settings: dict) -> None:

    rows, left, unused = collect(args.data)
    if args.model:
        short = fitting(rows, args.model, args.max_new_tokens, args.data)
        left["too_long"] = len(rows) - len(short)
        rows = short
    seed_size = args.seed_size
    if args.seed_fraction is not None:
        seed_size = round(args.seed_fraction * len(rows))
    needed = seed_size + sum(args.rounds) + (1 if args.rounds or not seed_size else 0)

    def require(count: int) -> None:
        if count < needed:
            fail(f"{args.data}: {count} prompts can be used ({summary(left)} left out); "
                 f"the seed, --rounds and one for the evaluation need {needed}")
    require(len(rows))

    dice = random.Random(args.seed)
    rows = dice.sample(rows, len(rows))
    first: list[int] = []
    if args.select == "farthest" and seed_size:
        first = list(dict.fromkeys(farthest(embed(rows, args.model, args.data), seed_size)))
    rest = sorted(set(range(len(rows))) - set(first))
    rows = [rows[i] for i in first] + grouped([rows[i] for i in rest])
    rounds = {f"prompts_{t}": count for t, count in enumerate(args.rounds, 1)}
    gold = "seed" if "chosen" in rows[0] else "seed_prompts"
    sizes = {gold: seed_size, **rounds, "eval": args.eval_size or len(rows)}
    parts, more = split(rows, sizes)
    left += more
    for name in rounds:
        # A prompt set carries no gold label: nothing downstream can use one by accident.
        parts[name] = [{"id": row["id"], "prompt": row["prompt"]} for row in parts[name]]
    parts = {name: part for name, part in parts.items() if part}
    require(sum(map(len, parts.values())))

    pairs = parts.get("seed", [])
    flipped = dice.sample(pairs, round(args.flip * len(pairs)))
    for row in flipped:
        flip(row)
    for row in (row for part in parts.values() for row in part):
        row |= {side: answer_turn(row[side]) for side in SIDES if side in row}

    def write(tmp: str) -> None:
        for name, part in parts.items():
            write_rows(f"{tmp}/{name}.jsonl", part)

    counts = {name: len(part) for name, part in parts.items()}
    stats = {**counts, "flipped": len(flipped), **{key: left[key] for key in REASONS},
             "unused_columns": unused}
    publish(args.out, settings, stats, write, inputs_of(args, settings))
    line = ", ".join(f"{name} {count}" for name, count in counts.items())
    if flipped:
        line += f" ({len(flipped)} labels of the seed flipped)"
    line += f"; {summary(left)} left out"
    if unused:
        line += f"; columns not used: {', '.join(unused)}"
    print(f"prepare: {line} → {args.out}")


if __name__ == "__main__":
    run_stage(main, args, settings)

"""Data: any preference set → a small gold seed, prompts for every round, prompts for evaluation.

Reads a file (.jsonl, .json, .csv, .tsv, or .txt with a prompt a line; each may be packed as .gz),
whose texts stay texts (`NA`, `007` and dates too), or whatever `datasets` loads (a hub id, a
folder, parquet), which takes `NA` in a table for an empty cell. Layouts, found by the names of the
columns, in any case:

    prompt + chosen + rejected        each a text, or a list of {role, content}, in tables as JSON
    chosen + rejected                 lists of {role, content}, or Anthropic hh-rlhf transcripts
                                      ("\\n\\nHuman: … \\n\\nAssistant:")
    question, or instruction (+ input), in the place of prompt
    a prompt alone                    with --prompts-alone: the seed part is then for a gold judge
                                      to label (see run.sh); other columns are left aside

A column `system` is a system turn. A conversation under chosen and rejected ends with the response,
and the turns before it are the prompt; a column `prompt` must be among them, or come before them.
A row that cannot be used is left out and counted under its reason. A row that contradicts itself
or fits no layout ends the program, and so does one without chosen and rejected, unless
--prompts-alone is given.

With `--model`, rows that do not fit its context or spell one of its control tokens are left out.
`--select farthest` takes as the seed the prompts that differ most: each next one the farthest, by
cosine of the model's last hidden state at the end of the prompt, from those chosen before (SSAPO's
seed selection).

Writes OUT/seed.jsonl (id, prompt, chosen, rejected), OUT/prompts_1.jsonl … and, from the rest,
OUT/eval.jsonl; all but the id are messages, so that TRL's DPOTrainer takes the pairs as they are.
Prompts that differ in case, white space, characters without width or Unicode's ways to write one
character are one prompt. Prompts with the same opening user turn are in one part only: those that
would fall into a second one are left out. Papers: 2 000 gold pairs of 60 000 (3.3 %).

    python -m data.prepare --data argilla/ultrafeedback-binarized-preferences-cleaned --out data/uf
    python -m data.prepare --data data/prompts.jsonl --prompts-alone --out runs/demo/data \\
        --seed-size 96 --rounds 64 64
"""
import argparse
import csv
import hashlib
import itertools
import math
import os
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from core.folder import check_context, hub_trouble, is_looking, is_promised
from core.rows import (
    SIDES,
    answer_turn,
    check_scored,
    fail,
    in_one_line,
    opened,
    read_json_lines,
    read_json_list,
    text_of,
    write_rows,
)
from core.rows import (
    parse as parse_json,
)
from core.stage import exit_if_looking, natural, parser, publish, ranged, run_stage, share, start

# Files that are read here, without `datasets`.
TEXT_FILE = re.compile(r"\.(jsonl|json|csv|tsv|txt)(\.gz)?$")
# What of `datasets` reads another file, by the end of its name.
LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
# The columns that may hold the prompt; the first that does is it.
PROMPTS = ["prompt", "instruction", "question"]
ROLES = ["system", "developer", "user", "assistant", "tool"]
# What the project's own pairs say of their responses beside the texts, all of a line or nothing.
OF_PAIRS = [["chosen_ended", "rejected_ended"], ["chosen_ids", "rejected_ids", "vocabulary"]]
# Characters that nobody sees: soft hyphens, zero-width blanks and joiners, marks of direction.
NO_WIDTH = re.compile("[\u00ad\u034f\u061c\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
                      "\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]")
# A text that is a message or a list of messages, ShareGPT's too, as JSON or as Python prints it.
SPELLED = re.compile(r"\s*\[?\s*\{(?=.*['\"](role['\"]\s*:|from['\"]\s*:\s*['\"](human|gpt)))"
                     r"(?=.*['\"](content|value)['\"]\s*:).*\}\s*\]?\s*", re.DOTALL)
# Why a row is left out: its key in the stats, and how the summary says it.
REASONS = {
    "repeated": "repeated prompts",
    "tie": "ties",
    "empty_prompt": "without a prompt",
    "empty_response": "without one of the responses",
    "parted": "whose sides part before the last turn",
    "not_assistant": "whose last turn is not the assistant's",
    "not_text": "with tool calls, or content that is no text",
    "control_token": "that spell a control token of the model",
    "too_long": "too long for the model",
    "same_opening": "whose opening user turn is another row's",
    "surplus": "beyond --eval-size (EVAL_SIZE)",
}
# Rows that a look reads of what `datasets` loads.
LOOK_ROWS = 1000
# Tokens of the question that an LLM judge is asked, beside the prompt and the answers.
QUESTION = 64
# A seed of less than a batch of the papers' is worth a warning.
FEW_PAIRS = 32


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the output is complete."""
    cli = parser(__doc__, out="folder for seed.jsonl, prompts_t.jsonl, eval.jsonl")
    cli.add_argument("--data", required=True, help="JSONL, JSON, CSV, TSV or text file (also .gz), "
                     "or hub id, folder or parquet file for `datasets`")
    cli.add_argument("--prompts-alone", action="store_true",
                     help="there are no preferences, or none to use: read the prompts alone")
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
    cli.add_argument("--judge-model", help="an LLM judge, whose context must hold every prompt and "
                     "two answers, as --model counts them")
    cli.add_argument("--rounds", type=natural, nargs="*", default=[8000, 20000, 30000],
                     help="prompts of each round (papers: the default)")
    cli.add_argument("--eval-size", type=natural,
                     help="at most so many prompts for the evaluation; default: the rest")
    cli.add_argument("--flip", type=share, default=0.0,
                     help="share of the gold labels to turn wrong on purpose (SSAPO: 0.25)")
    cli.add_argument("--seed", type=int, default=42, help="decides the split")
    args = cli.parse_args()
    if not args.model:
        if args.select == "farthest" or args.judge_model:
            fail("--select farthest and --judge-model need --model")
        args.max_new_tokens = None
    start(args)
    if args.model:
        check_context(args.model, args.max_new_tokens)
    if args.judge_model:
        check_context(args.judge_model, 2 * args.max_new_tokens)
    # What an earlier stage has yet to write cannot be looked at.
    if is_looking() and not is_promised(args.data):
        # Of what `datasets` loads the first rows alone.
        rows, left = collect(load_any(args.data, most=LOOK_ROWS), args.prompts_alone)
        if is_local_text(args.data):
            seed_size_of(args, len(rows), left)
    # A prompt and two responses take about 4 KB.
    exit_if_looking(args.out, writes=4096 * (args.seed_size + sum(args.rounds)))
    return args


# ------------------------------------------------------------------------------------------ reading


def is_local_text(source: str) -> bool:
    """Whether a data set is a file that is read here."""
    return bool(TEXT_FILE.search(source)) and "://" not in source


def load_any(source: str, most: int | None = None) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) for every row of a file, or of the training split of whatever else
    `datasets` loads; of the latter the first `most` alone, where it is given."""
    if is_local_text(source):
        yield from read_texts(source)
        return
    kind = LOADERS.get(os.path.splitext(source.removesuffix(".gz"))[1])
    if os.path.isfile(source) and not kind:
        fail(f"{source}: the name of a file must end in .jsonl, .json, .csv, .tsv or .txt, packed "
             "as .gz or not, or in .parquet")

    # Slow to import, and not needed for text files. Its warnings are of no use here.
    import datasets
    import huggingface_hub
    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    what = {"path": kind, "data_files": source} if kind else {"path": source}
    trouble = "" if kind or os.path.exists(source) else hub_trouble()
    with in_one_line(f"{source}: cannot be loaded{trouble and f' ({trouble})'}"):
        files = datasets.load_dataset_builder(**what).config.data_files
        split = next((name for name in ("train_prefs", "train") if name in files), [*files][0])
        rows = datasets.load_dataset(**what, split=split, streaming=most is not None)
        rows = rows if most is None else list(rows.take(most))
    for number, row in enumerate(rows, 1):
        yield f"{source} ({split}), row {number}", row


def read_texts(path: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) for every row of a file with JSON, a table or text."""
    kind = TEXT_FILE.search(path)[1]
    what = f"{path}: not {kind.upper()} in UTF-8"
    with in_one_line(what), opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        if kind == "json" and file.read(64).lstrip().startswith("["):
            for number, row in enumerate(read_json_list(path), 1):
                yield f"{path}, entry {number}", row
        elif kind in ("json", "jsonl"):
            for number, row in read_json_lines(path):
                yield f"{path}:{number}", row
        elif kind == "txt":
            for number, line in enumerate(file, 1):
                yield f"{path}:{number}", {"prompt": line.strip()}
        else:
            yield from read_table(path, file)


def read_table(path: str, file: Iterator[str]) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) of a table; its first line names the columns, and shows by what they
    are separated."""
    # A response may be longer than csv's 128 kB.
    csv.field_size_limit(1 << 30)
    first = next(file, "")
    separator = max(",;\t", key=first.count)
    table = csv.reader(itertools.chain([first], file), delimiter=separator, strict=True)
    header = column_names(f"{path}:1", next(table, []))
    for cells in filter(None, table):
        where = f"{path}:{table.line_num}"
        if len(cells) != len(header):
            fail(f"{where}: {len(cells)} cells, where the first line names {len(header)} columns")
        yield where, dict(zip(header, cells))


def column_names(where: str, names: Iterable[str]) -> list[str]:
    """Columns' names in small letters, without blanks around them. Two alike end the program."""
    names = [name.strip().lower() for name in names]
    if len(set(names)) < len(names):
        fail(f"{where}: two columns have the same name: {', '.join(sorted(names))}")
    return names


# ------------------------------------------------------------------------------ one row, any layout


class LeftOut(Exception):
    """A row cannot be used; the argument says why, by a key of REASONS."""


def words_of(turns: list[dict]) -> list[str]:
    """Messages for comparison: without regard to case, white space, characters without width, and
    Unicode's several ways to write one character."""
    texts = [NO_WIDTH.sub("", turn["content"]) for turn in turns]
    words = [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts]
    return [f"{turn['role']}: {text}" for turn, text in zip(turns, words)]


def messages_of(where: str, key: str, value: object, role: str) -> list[dict]:
    """The messages that `value` is or spells; any other text is one message of `role`."""
    if isinstance(value, str):
        value = spelled_messages(where, key, value) or [{"role": role, "content": value}]
    turns = value if isinstance(value, list) else [value]
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            fail(f'{where}: \'{key}\' must be a text or a list of {{"role": …, "content": …}} with '
                 f"the roles {', '.join(ROLES)}; found {repr(turn)[:60]}")
        if turn.get("tool_calls") or not isinstance(turn.get("content"), str):
            raise LeftOut("not_text")
    return [{key: turn[key] for key in ("role", "content")} for turn in turns]


def spelled_messages(where: str, key: str, text: str) -> list[dict] | None:
    """The messages that a text spells, as an hh-rlhf transcript or as JSON; None if it does not."""
    if re.match(r"\s*Human:.*\n\nAssistant:", text, re.DOTALL):
        _, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
        return [{"role": "user" if who == "Human" else "assistant", "content": content.strip()}
                for who, content in zip(parts[::2], parts[1::2])]
    if not SPELLED.fullmatch(text):
        return None
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        fail(f"{where}: '{key}' looks like a list of messages and is not JSON ({error}); "
             "json.dumps writes it")


def take_prompt(where: str, row: dict) -> list[dict]:
    """The messages of the column that holds a row's prompt, up to where the response begins."""
    key = next((key for key in PROMPTS if row.get(key) is not None), None)
    if key is None:
        return []
    value = row[key]
    if key == "instruction" and isinstance(value, str) and row.get("input"):
        value = f"{value}\n\n{row['input']}"
    prompt = messages_of(where, key, value, "user")
    # A transcript may end with "… \n\nAssistant:".
    asks = prompt[-1:] == [{"role": "assistant", "content": ""}]
    return prompt[:-1] if asks else prompt


def take_sides(where: str, row: dict) -> tuple[list[dict], list[str]]:
    """(the turns before the response in both sides, the two responses)."""
    values = [row[side] for side in SIDES]
    if None in values or [] in values:
        raise LeftOut("empty_response")
    chosen, rejected = (messages_of(where, *item, "assistant") for item in zip(SIDES, values))
    before = chosen[:-1]
    if {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise LeftOut("not_assistant")
    if before != rejected[:-1]:
        raise LeftOut("parted")
    return before, [chosen[-1]["content"], rejected[-1]["content"]]


def join(where: str, prompt: list[dict], before: list[dict]) -> list[dict]:
    """The whole prompt: the column `prompt`, and the turns `before` the response in both sides.

    The conversation in the sides wins where it contains the prompt. Where it goes on from the
    prompt (it opens with another turn than the user's, or the prompt has none of the user's), both
    count, one after the other. All else is a contradiction.
    """
    asked = words_of(prompt)
    told = words_of(before)
    places = range(len(told) - len(asked) + 1)
    if any(told[k:k + len(asked)] == asked for k in places):
        return before
    if asked[len(asked) - len(told):] == told:
        return prompt
    if before[0]["role"] in ("assistant", "tool") or all(m["role"] != "user" for m in prompt):
        return prompt + before
    fail(f"{where}: 'prompt' is not in the conversation under 'chosen' and 'rejected': "
         f"{asked[-1][-60:]!r} against {told[0][:60]!r}; remove what is wrong")


def normalise(where: str, row: dict, prompts_alone: bool = False) -> dict:
    """{prompt, chosen?, rejected?: messages} of a row in any known layout.

    Raises LeftOut where it cannot be used. What fits no layout ends the program.
    """
    if not prompts_alone and not all(side in row for side in SIDES):
        fail(f"{where}: columns {', '.join(row)}: preferences are read from chosen and rejected "
             "(python -m data.prepare --help); PROMPTS_ALONE=yes (--prompts-alone) reads the "
             "prompts alone, and GOLD labels the seed")
    text_alone = prompts_alone or isinstance(row["chosen"], str)

    before, answers = ([], []) if prompts_alone else take_sides(where, row)
    if text_alone and not before and not any(key in row for key in PROMPTS):
        fail(f"{where}: columns {', '.join(row)}: a prompt is read from {', '.join(PROMPTS)}")
    prompt = join(where, take_prompt(where, row), before)
    # A conversation's own system turn goes before the column.
    if row.get("system") and prompt and prompt[0]["role"] != "system":
        prompt = messages_of(where, "system", row["system"], "system") + prompt
    if not any(turn["role"] != "system" and turn["content"].strip() for turn in prompt):
        raise LeftOut("empty_prompt")
    if not all(answer.strip() for answer in answers):
        raise LeftOut("empty_response")
    if answers and answers[0] == answers[1]:
        raise LeftOut("tie")
    pair = {"prompt": prompt, **dict(zip(SIDES, map(answer_turn, answers)))}
    for keys in OF_PAIRS:
        if answers and all(row.get(key) is not None for key in keys):
            pair |= {key: row[key] for key in keys}
    return pair


def collect(source: Iterable[tuple[str, dict]],
            prompts_alone: bool = False) -> tuple[list[dict], Counter]:
    """(rows in the order of the source, of those with the same opening user turn the first alone;
    how many were left out for which of REASONS)."""
    rows = {}
    left = Counter()
    for where, raw in source:
        raw = dict(zip(column_names(where, raw), raw.values()))
        check_scored(raw, where)
        try:
            row = normalise(where, raw, prompts_alone)
        except LeftOut as reason:
            left[str(reason)] += 1
            continue
        prompt = row["prompt"]
        identity = hashlib.sha256("\n".join(words_of(prompt)).encode()).hexdigest()[:16]
        users = [turn for turn in prompt if turn["role"] == "user"]
        [opening] = words_of((users or prompt)[:1])
        if opening not in rows:
            rows[opening] = {"id": identity, **row}
        else:
            left["repeated" if rows[opening]["id"] == identity else "same_opening"] += 1
    return list(rows.values()), left


def seed_size_of(args: argparse.Namespace, count: int, left: Counter) -> int:
    """Gold prompts to take of a set of `count` prompts. Too few for all parts end the program."""
    size = args.seed_size
    if args.seed_fraction is not None:
        size = round(args.seed_fraction * count)
    # The evaluation gets one, where there is anything to evaluate.
    needed = size + sum(args.rounds) + bool(args.rounds or not size)
    if count < needed:
        fail(f"{args.data}: {count} prompts can be used ({summary(left)} left out), and {needed} "
             f"are needed: {size} for the seed (SEED_SIZE), {sum(args.rounds)} for the rounds "
             "(ROUNDS), one for the evaluation; lower them")
    if args.seed_fraction is not None and not size:
        fail(f"--seed-fraction {args.seed_fraction} (SEED_FRACTION) of {count} prompts is none; "
             "--seed-size 0 where no seed is meant")
    return size


def summary(left: Counter) -> str:
    """How many rows were left out, and why."""
    return ", ".join(f"{left[key]} {REASONS[key]}" for key in REASONS if left[key]) or "nothing"


if __name__ == "__main__":
    args = flags()  # here already: what is imported below takes seconds to load

import torch

from core.chat import encode_prompt, encode_response, spells_control
from core.models import context_of, load_config, load_model, load_tokenizer
from core.parallel import autocast, progress, start_processes

# ------------------------------------------------------------------------ what a model says of rows


def fitting(rows: list[dict], args: argparse.Namespace) -> tuple[list[dict], Counter]:
    """(rows that the model can read, how many are left out for which of REASONS).

    Its context has room for the prompt and an answer: new tokens or either gold response. That of
    an LLM judge has room for two. No text spells one of the model's control tokens. A prompt that
    its chat template refuses ends the program.
    """
    limit = context_of(load_config(args.model))
    judge_limit = context_of(load_config(args.judge_model)) if args.judge_model else math.inf
    tokenizer = load_tokenizer(args.model)
    kept = []
    left = Counter()
    for row in rows:
        prompt = row["prompt"]
        answers = [text_of(row[side]) for side in SIDES if side in row]
        texts = [turn["content"] for turn in prompt] + answers
        with in_one_line(f"{args.data}: id {row['id']!r} ({repr(prompt[0]['content'])[:40]}): the "
                         f"chat template of {args.model} refuses this prompt"):
            spells = any(spells_control(tokenizer, text) for text in texts)
            lengths = [len(encode_response(tokenizer, prompt, answer)) for answer in answers]
            asked = len(encode_prompt(tokenizer, prompt))
        longest = max([args.max_new_tokens, *lengths])
        if spells:
            left["control_token"] += 1
        elif asked + longest > limit or asked + QUESTION + 2 * longest > judge_limit:
            left["too_long"] += 1
        else:
            kept.append(row)
    return kept, left


def embed(rows: list[dict], path: str) -> torch.Tensor:
    """Unit vectors [N, H] (fp16: 0.5 GB at N = 60 000, H = 4 096) of a model's last hidden states
    at the end of each prompt."""
    device = start_processes()
    model = load_model(path, device)
    tokenizer = load_tokenizer(path)
    width = model.config.get_text_config().hidden_size
    vectors = torch.empty(len(rows), width, dtype=torch.float16, device=device)
    for i in progress(range(len(rows)), "embed", "prompt"):
        ids = torch.tensor([encode_prompt(tokenizer, rows[i]["prompt"])], device=device)
        with torch.no_grad(), autocast(device, "auto"):
            hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0, -1]
        vectors[i] = torch.nn.functional.normalize(hidden.float(), dim=-1).half()
    return vectors


def farthest(vectors: torch.Tensor, k: int) -> list[int]:
    """k row numbers of unit vectors [N, H]: the first row, then always the one with the lowest
    cosine to its nearest chosen. O(N·k)."""
    nearest = torch.full((len(vectors),), -torch.inf, device=vectors.device)
    chosen = [0]
    for _ in progress(range(1, k), "farthest", "prompt"):
        nearest = torch.maximum(nearest, (vectors @ vectors[chosen[-1]]).float())
        nearest[chosen[-1]] = torch.inf
        chosen.append(int(nearest.argmin()))
    return chosen


# ---------------------------------------------------------------------------------------- the parts


def flip(row: dict) -> None:
    """Exchange the sides of a pair."""
    for chosen in [key for key in row if key.startswith("chosen")]:
        rejected = chosen.replace("chosen", "rejected")
        row[chosen], row[rejected] = row[rejected], row[chosen]


def main(args: argparse.Namespace) -> None:
    rows, left = collect(load_any(args.data), args.prompts_alone)
    if args.model:
        rows, unfit = fitting(rows, args)
        left += unfit
    seed_size = seed_size_of(args, len(rows), left)

    dice = random.Random(args.seed)
    rows = dice.sample(rows, len(rows))
    if args.select == "farthest" and seed_size:
        first = dict.fromkeys(farthest(embed(rows, args.model), seed_size))
        rows = [rows[i] for i in first] + [row for i, row in enumerate(rows) if i not in first]
    sizes = {"seed": seed_size}
    sizes |= {f"prompts_{t}": count for t, count in enumerate(args.rounds, 1)}
    sizes["eval"] = args.eval_size or len(rows)
    rest = iter(rows)
    parts = {name: list(itertools.islice(rest, size)) for name, size in sizes.items()}
    parts = {name: part for name, part in parts.items() if part}
    left["surplus"] = len(list(rest))
    for name in parts:
        if name.startswith("prompts_"):
            # A prompt set carries no gold label: nothing downstream can use one by accident.
            parts[name] = [{key: row[key] for key in ("id", "prompt")} for row in parts[name]]

    pairs = [] if args.prompts_alone else parts.get("seed", [])
    flipped = dice.sample(pairs, round(args.flip * len(pairs)))
    for row in flipped:
        flip(row)

    def write(tmp: str) -> None:
        for name, part in parts.items():
            write_rows(f"{tmp}/{name}.jsonl", part)

    counts = {name: len(part) for name, part in parts.items()}
    stats = {**counts, "flipped": len(flipped), **{key: left[key] for key in REASONS}}
    publish(args, stats, write)
    line = f"read as {'prompts alone' if args.prompts_alone else 'pairs'}: "
    line += ", ".join(f"{name} {count}" for name, count in counts.items())
    if flipped:
        line += f" ({len(flipped)} labels of the seed flipped)"
    print(f"prepare: {line}; {summary(left)} left out → {args.out}")
    if 0 < len(pairs) < FEW_PAIRS:
        print(f"warning: {len(pairs)} gold pairs are few (papers: 2 000)", file=sys.stderr)


if __name__ == "__main__":
    run_stage(main, args)

"""What passes between the stages: rows, one JSON object a line (UTF-8), read, checked and written.
Needs no torch.

Each kind of file holds the keys of `ROWS`; extra keys pass through every stage unchanged. `chosen`
and `rejected` lie in files as TRL's conversations do, a list of one message of the assistant's, and
may be given as a text; in memory they are the text.
"""
import contextlib
import gzip
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from core import RANK, is_out_of_memory


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 2."""
    print("error:", *message.splitlines(), file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """What other people's code raises inside, which may be anything, ends the program in one line:
    `what` went wrong, and the reason."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        fail(f"{what}: {reason(error)}")


def reason(error: Exception) -> str:
    """What an exception of other people's code says, on one line."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own folder, which is never run"
    text = " ".join(str(error).split())[:300] or "no reason given"
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


def note(text: str) -> None:
    """A line on stderr, once for all processes."""
    if RANK == 0:
        print(f"note: {text}", file=sys.stderr)


# What each kind of file must hold, key by key.
ROWS = {
    "prompts": ["id", "prompt"],
    "preferences": ["id", "prompt", "chosen", "rejected"],
    "responses": ["id", "prompt", "responses"],
    "labelled": ["id", "prompt", "chosen", "rejected", "margin", "chosen_logp", "rejected_logp"],
}

# The responses of a pair.
SIDES = ["chosen", "rejected"]
# These hold a value for each response.
PER_RESPONSE = ["ended", "response_ids"]
# What dro.py adds to a labelled row: all of it or nothing.
WORST_CASE = ["xi", "pieces", "atoms"]
# What a margin against π_init is (D1), in the keys of `margin_of`; at which β, train.py knows.
AGAINST_INIT = {"judge": "implicit", "reference": "init", "length_penalty": 0}
# The remedy that an error names where a file is not one of ours.
PREPARE = "run python -m data.prepare on raw data first"
# Of ξ against σ(margin), and of weights against 1: what other programs' rounding may leave.
TOLERANCE = 1e-6


# --------------------------------------------------------------------------- what a key's value is


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold: neither NaN nor infinite, nor an
    integer of 400 digits."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_ids(value: object) -> bool:
    """Whether a JSON value is a list of token ids, at least one."""
    return (isinstance(value, list) and all(type(one) is int for one in value)
            and value != [] and 0 <= min(value) and max(value) < 2 ** 31)


# What a single value may be, in the words of SHAPES → whether a JSON value is that.
KINDS = {
    "text": lambda value: isinstance(value, str),
    "text, not blank": lambda value: isinstance(value, str) and value.strip() != "",
    "text or one message of the assistant's, not blank":
        lambda value: has_shape(text_of(value), "text, not blank"),
    "number": is_number,
    "number ≥ 0": lambda value: is_number(value) and value >= 0,
    "integer ≥ 1": lambda value: type(value) is int and value >= 1,
    "token ids": is_ids,
    "true or false": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
}
MESSAGE = {"role": "text", "content": "text"}
# key → what its value must be: one of KINDS, a list of at least one such value, or an object that
# has such values.
SHAPES = {
    "id": "text, not blank",
    "prompt": [MESSAGE],
    "chosen": "text or one message of the assistant's, not blank",
    "rejected": "text or one message of the assistant's, not blank",
    "chosen_ended": "true or false",
    "rejected_ended": "true or false",
    "chosen_ids": "token ids",
    "rejected_ids": "token ids",
    "chosen_logp": "number",
    "rejected_logp": "number",
    "responses": ["text"],
    "ended": ["true or false"],
    "response_ids": ["token ids"],
    "vocabulary": "text",
    "temperature": "number ≥ 0",
    "margin": "number ≥ 0",
    "margin_of": "object",
    "xi": "number",
    "pieces": "integer ≥ 1",
    "atoms": [["number ≥ 0"]],
}
# Keys that no kind of file must hold: checked where a row has them.
OPTIONAL = [key for key in SHAPES if all(key not in keys for keys in ROWS.values())]


def has_shape(value: object, shape: object) -> bool:
    """Whether a JSON value is as `shape` says, in the notation of SHAPES."""
    if isinstance(shape, list):
        (part,) = shape
        if not isinstance(value, list) or not value:
            return False
        return all(has_shape(one, part) for one in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            has_shape(value.get(key), part) for key, part in shape.items())
    return KINDS[shape](value)


def answer_turn(text: str) -> list[dict]:
    """A response as a conversation's last turn: how `chosen` and `rejected` lie in files."""
    return [{"role": "assistant", "content": text}]


def text_of(answer: object) -> object:
    """The text of `chosen` or `rejected`: of one message of the assistant's; all else as it is."""
    one = has_shape(answer, [MESSAGE]) and len(answer) == 1
    return answer[0]["content"] if one and answer[0]["role"] == "assistant" else answer


# ----------------------------------------------------------------------------------- reading files


def opened(path: str, mode: str = "rb", **how):
    """A file opened for reading, unpacked where its name ends in .gz; `how` is open's."""
    return (gzip.open if path.endswith(".gz") else open)(path, mode, **how)


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object from its keys and values; ValueError where a key stands twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def parse(text: str) -> object:
    """A JSON value. ValueError where it is none, an object has a key twice, or a text holds half of
    a surrogate pair, which no file or tokenizer takes."""
    value = json.loads(text, object_pairs_hook=unique_keys)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json_lines(path: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) for every line of a JSONL file that is not blank."""
    if not os.path.isfile(path):
        fail(f"{path}: no such file")
    with in_one_line(f"{path}: cannot be read"), opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            with in_one_line(f"{path}:{number}: not JSON in UTF-8, one object a line"):
                row = parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            if not isinstance(row, dict):
                fail(f"{path}:{number}: expected an object, found {type(row).__name__}")
            yield number, row


def read_appended(path: str) -> Iterator[dict]:
    """The objects of a JSONL file, if there is one, that a program adds to until it is killed: a
    line that a kill has cut is skipped."""
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            yield row


def read_json_list(path: str, *keys: str) -> list[dict]:
    """A JSON file (.json or .json.gz) that is a list of objects which hold text under `keys`."""
    with in_one_line(f"{path}: not JSON in UTF-8"):
        with opened(path, "rt", encoding="utf-8-sig") as file:
            rows = parse(file.read())
    for number, row in enumerate(rows if isinstance(rows, list) and rows else [None], 1):
        if not has_shape(row, dict.fromkeys(keys, "text")):
            fail(f"{path}: entry {number}: expected a list of objects with text under "
                 f"{', '.join(keys)}")
    return rows


def read_rows(path: str, kind: str) -> list[dict]:
    """Rows of a JSONL file, checked: keys, values, ids, worst case, digest. `chosen` and `rejected`
    become texts, token ids int32 arrays. The first bad line ends the program."""
    rows = []
    line_of_id = {}
    keys = [*ROWS[kind], *OPTIONAL]
    # Raw data are prompts or preferences.
    hint = f"; {PREPARE}" if kind in ("prompts", "preferences") else ""
    for number, row in read_json_lines(path):
        for key in ROWS[kind]:
            if key not in row:
                fail(f"{path}:{number}: key '{key}' is missing; {kind} rows need "
                     f"{', '.join(ROWS[kind])}{hint}")
        for key in keys:
            if key in row and not has_shape(row[key], SHAPES[key]):
                shape = json.dumps(SHAPES[key], ensure_ascii=False)
                fail(f"{path}:{number}: '{key}' must be {shape}, "
                     f"found {json.dumps(row[key])[:60]}{hint}")
        where = f"{path}:{number}: id {row['id']!r}"
        for key in PER_RESPONSE:
            if key in row and "responses" in row and len(row[key]) != len(row["responses"]):
                fail(f"{where}: '{key}' must hold a value for each of its "
                     f"{len(row['responses'])} responses, found {len(row[key])}")
        if row["id"] in line_of_id:
            fail(f"{where} stands on line {line_of_id[row['id']]} too; ids must differ")
        line_of_id[row["id"]] = number
        if kind == "labelled" and any(key in row for key in WORST_CASE) and not is_worst_case(row):
            fail(f"{where}: xi, pieces and atoms must be the worst case of its margin: all three, "
                 "xi = σ(margin), no shift above xi; take them out and run dro.py again")
        check_scored(row, where)
        for side in SIDES:
            if side in ROWS[kind]:
                row[side] = text_of(row[side])
        # A list takes 36 bytes a token, an array 4.
        for key in ("chosen_ids", "rejected_ids"):
            if key in row:
                row[key] = np.array(row[key], np.int32)
        if "response_ids" in row:
            row["response_ids"] = [np.array(ids, np.int32) for ids in row["response_ids"]]
        rows.append(row)
    if not rows:
        fail(f"{path}: holds no rows")
    return rows


# --------------------------------------------------------------------- whether rows may be used


def is_worst_case(row: dict) -> bool:
    """Whether a labelled row's `xi`, `pieces` and `atoms` stand together and are a worst case of
    its margin (T2-2, T2-5): ξ = σ(margin), weights that sum to 1, no shift above ξ."""
    if not all(key in row for key in WORST_CASE) or any(len(atom) != 2 for atom in row["atoms"]):
        return False
    xi = 1 / (1 + math.exp(-row["margin"]))
    weights, shifts = zip(*row["atoms"])
    return (abs(row["xi"] - xi) <= TOLERANCE and abs(sum(weights) - 1) <= TOLERANCE
            and max(shifts) <= xi + TOLERANCE)


def scored_digest(row: dict) -> str:
    """Digest of what a pair's log-probs are of: its prompt, both texts and their token ids."""
    keys = ["prompt", *SIDES, "chosen_ids", "rejected_ids"]
    scored = json.dumps([text_of(row.get(key)) for key in keys], default=np.ndarray.tolist)
    return hashlib.sha256(scored.encode()).hexdigest()[:16]


def check_scored(row: dict, where: str) -> None:
    """Ends the program at a row that does not hold any more what label.py scored. Other programs'
    rows say nothing of that."""
    margin_of = row.get("margin_of")
    if not isinstance(margin_of, dict):
        return
    if margin_of.get("scored") not in (None, scored_digest(row)):
        fail(f"{where}: its prompt, its texts or their token ids were changed after they were "
             "scored; take margin_of and the token ids out, and label it again")


def check_margins(rows: list[dict], path: str, needed: dict, remedy: str) -> None:
    """Ends the program at the first row whose `margin_of` has another value for a key of `needed`
    (D10). Rows that say nothing are taken as right; how many of them have their margins used is
    said."""
    for row in rows:
        margin_of = row.get("margin_of", {})
        for key, value in needed.items():
            labelled = margin_of.get(key)
            if labelled not in (None, value):
                fail(f"{path}: id {row['id']!r}: its margin_of has {key} {labelled!r:.60}, where "
                     f"{value!r} is needed; {remedy}")
    unstated = sum("margin_of" not in row for row in rows)
    if unstated and "reference" in needed:
        print(f"{path}: {unstated} margins taken as against π_init")


# ------------------------------------------------------------------------------------ writing files


def remove(path: str) -> None:
    """Remove a file or a folder, if there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def write_rows(path: str, rows: Iterable[dict]) -> None:
    """Write JSONL. Token ids may be arrays."""
    encoder = json.JSONEncoder(ensure_ascii=False, default=np.ndarray.tolist)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(encoder.encode(row) + "\n")

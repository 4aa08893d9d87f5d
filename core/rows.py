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
import zlib
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
PER_RESPONSE = ["ended", "response_ids", "special_inside"]
# What dro.py adds to a labelled row: all of it or nothing.
WORST_CASE = ["xi", "pieces", "atoms"]
# The remedy that an error names where a file is not one of ours.
PREPARE = "run python -m data.prepare on raw data first"
# Of ξ against σ(margin), and of weights against 1: what other programs' rounding may leave.
TOLERANCE = 1e-6


# --------------------------------------------------------------------------- what a key's value is


def is_text(value: object) -> bool:
    """Whether a JSON value is a text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold: neither NaN nor infinite, nor an
    integer of 400 digits."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_from_zero(value: object) -> bool:
    """Whether a JSON value is a number ≥ 0."""
    return is_number(value) and value >= 0


def is_list_of(kind: type, value: object) -> bool:
    """Whether a JSON value is a list of values of one kind."""
    return isinstance(value, list) and all(type(element) is kind for element in value)


def is_ids(value: object) -> bool:
    """Whether a JSON value is a list of token ids, at least one."""
    return is_list_of(int, value) and bool(value) and 0 <= min(value) and max(value) < 2 ** 31


def is_atoms(value: object) -> bool:
    """Whether a JSON value is [[weight, shift], …]: weights ≥ 0 that sum to 1, shifts ≥ 0."""
    if not is_list_of(list, value):
        return False
    sound = all(len(atom) == 2 and all(map(is_from_zero, atom)) for atom in value)
    return sound and abs(sum(weight for weight, _ in value) - 1) <= TOLERANCE


def is_message(value: object) -> bool:
    """Whether a JSON value is {"role": …, "content": …}, both texts."""
    return (isinstance(value, dict) and isinstance(value.get("role"), str)
            and isinstance(value.get("content"), str))


def answer_turn(text: str) -> list[dict]:
    """A response as a conversation's last turn: how `chosen` and `rejected` lie in files."""
    return [{"role": "assistant", "content": text}]


def text_of(answer: object) -> object:
    """The text of `chosen` or `rejected`: of one message of the assistant's; all else as it is."""
    one = isinstance(answer, list) and len(answer) == 1 and is_message(answer[0])
    return answer[0]["content"] if one and answer[0]["role"] == "assistant" else answer


TEXT = (is_text, "a non-empty string")
ANSWER = (lambda value: is_text(text_of(value)),
          "a non-empty text or one message of the assistant's")
FLAG = (lambda value: type(value) is bool, "true or false")
FLAGS = (lambda value: is_list_of(bool, value), "a list of true and false")
IDS = (is_ids, "a list of token ids (integers ≥ 0), not empty")
NUMBER = (is_number, "a finite number")
FROM_ZERO = (is_from_zero, "a finite number ≥ 0")

# key → (whether a value is right, what it must be)
CHECKS = {
    "id": TEXT,
    "prompt": (lambda value: is_list_of(dict, value) and value and all(map(is_message, value)),
               'a non-empty list of {"role": …, "content": …}'),
    "chosen": ANSWER,
    "rejected": ANSWER,
    "chosen_ended": FLAG,
    "rejected_ended": FLAG,
    "chosen_ids": IDS,
    "rejected_ids": IDS,
    "chosen_logp": NUMBER,
    "rejected_logp": NUMBER,
    "responses": (lambda value: is_list_of(str, value) and value, "a list of strings"),
    "ended": FLAGS,
    "special_inside": FLAGS,
    "response_ids": (lambda value: is_list_of(list, value) and all(map(is_ids, value)),
                     "a list of lists of token ids (integers ≥ 0), none of them empty"),
    "vocabulary": (lambda value: isinstance(value, str), "a string"),
    "temperature": FROM_ZERO,
    "margin": FROM_ZERO,
    "margin_of": (lambda value: isinstance(value, dict), "an object"),
    "xi": NUMBER,
    "pieces": (lambda value: type(value) is int and value >= 1, "an integer ≥ 1"),
    "atoms": (is_atoms, "[[weight, shift], …], weights ≥ 0 that sum to 1, shifts ≥ 0"),
}
# Keys that no kind of file must hold: checked where a row has them.
OPTIONAL = [key for key in CHECKS if all(key not in keys for keys in ROWS.values())]


# ----------------------------------------------------------------------------------- reading files


# What a packed file that is cut short raises.
BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


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
    number = 0
    try:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    fail(f"{path}:{number}: expected an object, found {type(row).__name__}")
                yield number, row
    except BROKEN_GZIP as error:
        fail(f"{path}: the gzip file is cut short or broken ({error})")
    except (ValueError, RecursionError) as error:
        fail(f"{path}:{number}: not JSON in UTF-8 ({error}); expected one object a line")


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
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            rows = parse(file.read())
    except (ValueError, RecursionError, *BROKEN_GZIP) as error:
        fail(f"{path}: not JSON in UTF-8 ({error})")
    for number, row in enumerate(rows if isinstance(rows, list) and rows else [None], 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            fail(f"{path}: entry {number}: expected a list of objects with text under "
                 f"{', '.join(keys)}")
    return rows


def iterate_rows(path: str, kind: str) -> Iterator[dict]:
    """Rows of a JSONL file, each checked for the keys of `ROWS[kind]`. The first bad line ends the
    program."""
    line_of_id = {}
    keys = [*ROWS[kind], *OPTIONAL]
    # Raw data are prompts or preferences.
    hint = f"; {PREPARE}" if kind in ("prompts", "preferences") else ""
    for number, row in read_json_lines(path):
        for key in ROWS[kind]:
            if key not in row:
                fail(f"{path}:{number}: key '{key}' is missing; {kind} rows need "
                     f"{', '.join(ROWS[kind])}{hint}")
        for key in filter(row.__contains__, keys):
            is_right, expected = CHECKS[key]
            if not is_right(row[key]):
                fail(f"{path}:{number}: '{key}' must be {expected}, "
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
        for side in SIDES:
            if side in ROWS[kind]:
                row[side] = text_of(row[side])
        # A list takes 36 bytes a token, an array 4.
        for key in ("chosen_ids", "rejected_ids"):
            if key in row:
                row[key] = np.array(row[key], np.int32)
        if "response_ids" in row:
            row["response_ids"] = [np.array(ids, np.int32) for ids in row["response_ids"]]
        yield row
    if not line_of_id:
        fail(f"{path}: holds no rows")


def read_rows(path: str, kind: str) -> list[dict]:
    """All rows of a file, checked."""
    return list(iterate_rows(path, kind))


# --------------------------------------------------------------------- whether rows may be used


def is_worst_case(row: dict) -> bool:
    """Whether a labelled row's `xi`, `pieces` and `atoms` stand together and fit its margin (T2-2,
    T2-5): ξ = σ(margin), no atom further from it than 0."""
    xi = 1 / (1 + math.exp(-row["margin"]))
    return (all(key in row for key in WORST_CASE) and abs(row["xi"] - xi) <= TOLERANCE
            and all(shift <= xi + TOLERANCE for _, shift in row["atoms"]))


def scored_digest(row: dict) -> str:
    """Digest of what a pair's log-probs are of: its prompt, both texts and their token ids."""
    keys = ["prompt", *SIDES, "chosen_ids", "rejected_ids"]
    scored = json.dumps([text_of(row.get(key)) for key in keys], default=np.ndarray.tolist)
    return hashlib.sha256(scored.encode()).hexdigest()[:16]


def margin_problem(row: dict, beta: float | None = None, policy: str | None = None,
                   precision: str | None = None) -> str | None:
    """Why a row's stored log-probs or its margin cannot be used, or None (D10).

    With `beta` the margin must be the implicit reward's against π_init at this β; with `policy`, a
    fingerprint, the log-probs must be that model's; with `precision`, bf16 or fp32, computed so.
    What was scored must always be what the row holds. What a row does not say, another program's
    perhaps, is taken as right.
    """
    margin_of = row.get("margin_of", {})
    needed = {"policy": policy, "precision": precision}
    if beta is not None:
        needed |= {"judge": "implicit", "reference": "init", "length_penalty": 0, "beta": beta}
    for key, value in needed.items():
        labelled = margin_of.get(key)
        if None not in (labelled, value) and labelled != value:
            return f"its margin_of has {key} {labelled!r:.60}, where {value!r} is needed"
    if "scored" in margin_of and margin_of["scored"] != scored_digest(row):
        return "its prompt, its texts or their token ids were changed after they were scored"
    return None


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

"""What passes between the stages: rows, one JSON object a line (UTF-8), read, checked and written.
Needs no torch.

Each kind of file holds an `id` and the keys of `ROWS`; extra keys pass through every stage
unchanged. `chosen` and `rejected` lie in files as TRL's conversations do, a list of one message of
the assistant's, and may be given as a text; in memory they are the text. Files are written beside
their place and renamed, so a file that exists is whole.
"""
import contextlib
import gzip
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 2."""
    print("error:", *message.splitlines(), file=sys.stderr, flush=True)
    raise SystemExit(2)


# What each kind of file must hold, key by key; extra keys pass through every stage unchanged.
ROWS = {
    "prompts": ["prompt"],
    "preferences": ["prompt", "chosen", "rejected"],
    "responses": ["prompt", "responses"],
    "labelled": ["prompt", "chosen", "rejected", "margin", "chosen_logp", "rejected_logp"],
}

# The responses of a pair.
SIDES = ["chosen", "rejected"]
# Checked where a row has them.
OPTIONAL = [
    "temperature", "ended", "response_ids", "special_inside", "vocabulary", "chosen_ended",
    "rejected_ended", "chosen_ids", "rejected_ids", "pieces", "margin_of",
]
# The remedy that an error names where a file is not one of ours.
PREPARE = "run python -m data.prepare on raw data first"
# These hold a value for each response.
A_RESPONSE = ["ended", "response_ids", "special_inside"]
# What a row's margin is (D10); `policy`: the fingerprint of the model whose log-probs the row has.
MARGIN_OF = ["judge", "reference", "beta", "length_penalty", "policy"]


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold: neither NaN nor infinite, nor an
    integer of 400 digits."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def are_ids(value: object) -> bool:
    """Whether a JSON value is a list of token ids, at least one."""
    return isinstance(value, list) and bool(value) and all(
        type(i) is int and 0 <= i < 2 ** 31 for i in value)


def is_message(value: object) -> bool:
    """Whether a JSON value is {"role": …, "content": …}, both texts."""
    return (isinstance(value, dict) and isinstance(value.get("role"), str)
            and isinstance(value.get("content"), str))


def answer_turn(text: str) -> list[dict]:
    """A response as a conversation's last turn: how `chosen` and `rejected` lie in files."""
    return [{"role": "assistant", "content": text}]


def text_of(answer: object) -> object:
    """The text of `chosen` or `rejected`: of one message of the assistant's; all else as it is."""
    if isinstance(answer, list) and len(answer) == 1 and is_message(answer[0]):
        if answer[0]["role"] == "assistant":
            return answer[0]["content"]
    return answer


def wrong(key: str, value: object) -> str | None:
    """What `value` should have been under `key`, or None if it is right."""
    if key == "id":
        return None if isinstance(value, str) and value.strip() else "a non-empty string"
    if key in SIDES:
        text = text_of(value)
        sound = isinstance(text, str) and text.strip()
        return None if sound else "a non-empty text or one message of the assistant's"
    if key == "prompt":
        turns = isinstance(value, list) and value and all(map(is_message, value))
        return None if turns else 'a non-empty list of {"role": …, "content": …}'
    if key == "responses":
        texts = isinstance(value, list) and value and all(isinstance(r, str) for r in value)
        return None if texts else "a list of strings"
    if key in ("ended", "special_inside"):
        flags = isinstance(value, list) and all(isinstance(e, bool) for e in value)
        return None if flags else "a list of true and false"
    if key == "response_ids":
        sound = isinstance(value, list) and all(map(are_ids, value))
        return None if sound else "a list of lists of token ids (integers ≥ 0), none of them empty"
    if key in ("chosen_ids", "rejected_ids"):
        return None if are_ids(value) else "a list of token ids (integers ≥ 0), not empty"
    if key == "vocabulary":
        return None if isinstance(value, str) else "a string"
    if key in ("chosen_ended", "rejected_ended"):
        return None if isinstance(value, bool) else "true or false"
    if key == "pieces":
        return None if isinstance(value, int) and value >= 1 else "an integer ≥ 1"
    if key == "margin_of":
        known = isinstance(value, dict) and all(name in value for name in MARGIN_OF)
        return None if known else f"an object with {', '.join(MARGIN_OF)}"
    if key in ("margin", "temperature"):
        return None if is_number(value) and value >= 0 else "a finite number ≥ 0"
    return None if is_number(value) else "a finite number"


# What a packed file that is not whole raises.
BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)


def opened(path: str, mode: str = "rb", **how):
    """A file opened for reading, unpacked where its name ends in .gz; `how` is open's."""
    if path.endswith(".gz"):
        return gzip.open(path, mode, **how)
    return open(path, mode, **how)


def lines_of(path: str, file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a file. Blank lines at its end are no rows, one before a row fails."""
    blank = 0
    try:
        for number, line in enumerate(file, 1):
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                fail(f"{path}:{blank}: a blank line between rows; expected one JSON object a line")
            yield number, line
    except BROKEN_GZIP as error:
        fail(f"{path}: not a whole gzip file ({error})")


def read_json_lines(path: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) for every line of a JSONL file."""
    if not os.path.isfile(path):
        fail(f"{path}: no such file")
    with opened(path) as file:
        for number, line in lines_of(path, file):
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                # Half of a surrogate pair is no text: no file or tokenizer takes it.
                if b"\\ud" in line or b"\\uD" in line:
                    json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                fail(f"{path}:{number}: not JSON in UTF-8 ({error}); expected one object a line")
            if not isinstance(row, dict):
                fail(f"{path}:{number}: expected an object, found {type(row).__name__}")
            yield number, row


def read_json_list(path: str, *keys: str) -> list[dict]:
    """A JSON file (.json or .json.gz) that is a list of objects which hold text under `keys`."""
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            rows = json.load(file)
        # Half of a surrogate pair is no text.
        json.dumps(rows, ensure_ascii=False).encode()
    except (ValueError, RecursionError, *BROKEN_GZIP) as error:
        fail(f"{path}: not JSON in UTF-8 ({error})")
    for number, row in enumerate(rows if isinstance(rows, list) and rows else [None], 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            fail(f"{path}: entry {number}: expected a list of objects with text under "
                 f"{', '.join(keys)}")
    return rows


def iterate_rows(path: str, kind: str) -> Iterator[dict]:
    """Rows of a JSONL file, each checked for its `id` and the keys of `ROWS[kind]`. The first bad
    line ends the program."""
    seen = {}
    for number, row in read_json_lines(path):
        for key in ["id", *ROWS[kind]]:
            if key not in row:
                raw = f"; {PREPARE}" if key in ("id", "prompt") else ""
                fail(f"{path}:{number}: key '{key}' is missing; {kind} rows need id, "
                     f"{', '.join(ROWS[kind])}{raw}")
        for key in ["id", *ROWS[kind], *OPTIONAL]:
            if key in row and (expected := wrong(key, row[key])) is not None:
                raw = f"; {PREPARE}" if key in ("prompt", *SIDES) else ""
                fail(f"{path}:{number}: '{key}' must be {expected}, "
                     f"found {json.dumps(row[key])[:60]}{raw}")
        for key in A_RESPONSE:
            if key in row and "responses" in row and len(row[key]) != len(row["responses"]):
                fail(f"{path}:{number}: id {row['id']!r}: '{key}' must hold a value for each of "
                     f"its {len(row['responses'])} responses, found {len(row[key])}")
        if row["id"] in seen:
            fail(f"{path}:{number}: id {row['id']!r} stands on line {seen[row['id']]} too; "
                 "ids must differ")
        seen[row["id"]] = number
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
    if not seen:
        fail(f"{path}: holds no rows")


def margin_problem(row: dict, beta: float | None = None, policy: str | None = None,
                   precision: str | None = None) -> str | None:
    """Why a row's log-probs or margin cannot be used, or None (D10). A row that does not say what
    its margin is, another program's perhaps, is taken as it is.

    `beta`: the margin must be a log-ratio against π_init at this β. `policy` and `precision`: the
    log-probs must be of the model with this fingerprint, at this precision.
    """
    of = row.get("margin_of")
    if of is None:
        return None
    wanted = {}
    if beta is not None or policy is None:
        wanted = {"judge": "implicit", "reference": "init", "length_penalty": 0}
    if beta is not None:
        wanted["beta"] = beta
    if policy is not None and of.get("policy") is not None:
        wanted["policy"] = policy
    if precision is not None and "precision" in of:
        wanted["precision"] = precision
    for key, value in wanted.items():
        if of.get(key) != value:
            return f"its margin_of has {key} {of.get(key)!r}, where {value!r} is needed"
    return None


def read_rows(path: str, kind: str) -> list[dict]:
    """All rows of a file, checked."""
    return list(iterate_rows(path, kind))


@contextlib.contextmanager
def beside(path: str) -> Iterator[str]:
    """A path to write to, beside `path`; what was written there is removed if anything fails."""
    tmp = f"{path}.tmp"
    Path(tmp).parent.mkdir(parents=True, exist_ok=True)
    remove(tmp)
    try:
        yield tmp
    except BaseException:
        remove(tmp)
        raise


def remove(path: str) -> None:
    """Remove a file or a folder, if there is one."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def write_rows(path: str, rows: Iterable[dict]) -> None:
    """Write JSONL beside `path`, then rename: a file that exists is whole."""
    with beside(path) as tmp:
        with open(tmp, "w", encoding="utf-8") as file:
            for row in rows:  # token ids may be arrays
                text = json.dumps(row, ensure_ascii=False, default=np.ndarray.tolist)
                file.write(text + "\n")
        os.replace(tmp, path)

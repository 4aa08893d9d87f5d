"""Rows: what is refused when they are read, and when what was scored may be used."""
import json
import math

import pytest
from conftest import dump, refused

from core.rows import check_margins, check_scored, read_json_list, read_rows, scored_digest
from data.prepare import collect, load_any

ROW = {"id": "a", "prompt": [{"role": "user", "content": "x"}], "chosen": "yes", "rejected": "no",
       "margin": 0.4, "chosen_logp": -1.0, "rejected_logp": -2.0, "chosen_ids": [5, 6],
       "rejected_ids": [7]}
XI = 1 / (1 + math.exp(-0.4))
WORST = ROW | {"xi": XI, "pieces": 6, "atoms": [[0.25, 0.0], [0.75, XI]]}


@pytest.mark.parametrize("change", [
    {"xi": None}, {"pieces": None}, {"atoms": None}, {"margin": 0.5}, {"xi": XI + 1e-5},
    {"pieces": 0}, {"atoms": [[1, -5]]}, {"atoms": [[1, 0.7]]}, {"atoms": [[0.5, 0.0]]},
    {"atoms": [[1.5, 0], [-0.5, 0]]}, {"atoms": [[1.0, math.inf]]}, {"atoms": "x"}])
def test_a_worst_case_is_one(tmp_path, capsys, change):
    """xi, pieces and atoms: all or none, ξ = σ(margin), weights ≥ 0 that sum to 1, 0 ≤ shift ≤ ξ;
    one line with the file and the row."""
    path = tmp_path / "rows.jsonl"
    assert len(read_rows(dump(path, [WORST, ROW | {"id": "b"}]), "labelled")) == 2
    row = {key: value for key, value in (WORST | change).items() if value is not None}
    said = refused(capsys, read_rows, dump(path, [ROW | {"id": "b"}, row]), "labelled")
    assert f"{path}:2: " in said
    assert any(f"'{key}' must be" in said for key in change) or "id 'a': xi, pieces and" in said


def test_a_key_stands_once(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW).replace('"content"', '"content": "y", "content"') + "\n")
    assert "twice" in refused(capsys, read_rows, str(path), "labelled")
    path.write_text('[{"output": "a", "output": "b"}]')
    assert "twice" in refused(capsys, read_json_list, str(path), "output")


GOOD = json.dumps(ROW)
ASK = {"id": "b", "prompt": ROW["prompt"]}
ANSWERED = ASK | {"responses": ["a", "b"]}
MESSAGES = [*ROW["prompt"], {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize("kind, line, message", [
    ("preferences", '{"id": "a", ', "not JSON"),
    ("preferences", b'{"id": "\xff"}', "not JSON in UTF-8"),
    ("preferences", GOOD.replace("yes", "\\ud800"), "surrogates not allowed"),
    ("preferences", "[1]", "expected an object"),
    ("preferences", ROW | {"prompt": "x"}, "'prompt' must be"),
    ("preferences", GOOD.replace('"id"', '"name"'), "run python -m data.prepare"),
    ("preferences", ROW | {"chosen": ""}, "'chosen' must be \"text or one message of"),
    ("preferences", ROW | {"chosen": MESSAGES}, "run python -m data.prepare on raw data first"),
    ("preferences", ROW | {"chosen": ROW["prompt"]}, "one message of the assistant's"),
    ("preferences", GOOD, "stands on line 1 too"),
    ("responses", ANSWERED | {"response_ids": [[1], []]}, "'response_ids' must be"),
    ("responses", ANSWERED | {"ended": [True]}, "'ended' must hold a value for each of its 2")])
def test_bad_rows_are_named(kind, line, message, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    line = json.dumps(line) if isinstance(line, dict) else line
    line = line if isinstance(line, bytes) else line.encode()
    first = json.dumps(ROW | ANSWERED | {"id": "a"})
    path.write_bytes(first.encode() + b"\n" + line + b"\n")
    said = refused(capsys, read_rows, str(path), kind)
    assert f"{path}:2:" in said and message in said


def labelled(**margin_of) -> dict:
    stated = {"judge": "implicit", "reference": "init", "beta": 0.1, "length_penalty": 0.0,
              "policy": "p", "precision": "fp32", "scored": scored_digest(ROW)}
    return ROW | {"margin_of": stated | margin_of}


@pytest.mark.parametrize("key, value, needed", [
    ("judge", "vader", "implicit"), ("reference", "none", "init"), ("length_penalty", 0.1, 0),
    ("beta", 0.2, 0.1), ("policy", "q", "p"), ("precision", "bf16", "fp32")])
def test_a_margin_is_used_for_what_it_is(capsys, key, value, needed):
    other, unstated = labelled(**{key: value}), labelled()
    del unstated["margin_of"][key]
    # What is not needed is not asked; what a row of another program does not say is right.
    check_margins([other], "file", {}, "")
    check_margins([labelled(), unstated, ROW], "file", {key: needed}, "")
    line = refused(capsys, check_margins, [ROW, other], "file", {key: needed}, "the remedy")
    assert line == (f"error: file: id 'a': its margin_of has {key} {value!r}, where {needed!r} is "
                    "needed; the remedy")


@pytest.mark.parametrize("edit", [
    {"chosen": "no"}, {"rejected": "yes"}, {"prompt": [{"role": "user", "content": "y"}]},
    {"chosen_ids": [5]}, {"rejected_ids": None}, {"chosen_ids": [5, 6, 7], "rejected_ids": []}])
def test_a_row_that_was_edited_is_refused(tmp_path, capsys, edit):
    """Whoever reads it, label.py and data.prepare too; its texts may be turns."""
    turns = {side: [{"role": "assistant", "content": ROW[side]}] for side in ("chosen", "rejected")}
    (row,) = read_rows(dump(tmp_path / "rows.jsonl", [labelled() | turns]), "labelled")
    check_scored(row, "here")
    assert "here: its prompt, its texts" in refused(capsys, check_scored, row | edit, "here")
    pairs = dump(tmp_path / "edited.jsonl", [labelled() | {"margin": 0.5, "chosen": "no"}])
    for kind in ("labelled", "preferences"):
        assert "id 'a': its prompt, its texts" in refused(capsys, read_rows, pairs, kind)
    assert "1: its prompt, its texts" in refused(capsys, collect, load_any(pairs))

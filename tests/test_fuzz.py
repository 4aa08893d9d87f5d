"""Broken input of every kind to every stage: done or one clear line, never a traceback, never part
of an output."""
import json
import random

import pytest
from conftest import CORPUS, dump, gold_rows, jsonl, ok, run

ODD = [None, True, -1, 3.5, 1e300, 10 ** 400, float("nan"), float("inf"), "", " ", "\u0000",
       "\ud83d", "x" * 100_000, "<|im_end|>", "\ufeff", "🙂\r\n\u2028", [], {}, [[]], [None], [""],
       [1, 2], {"role": "user"}, [{"role": "user", "content": ""}],
       [{"role": "", "content": "\ud800"}], [{"content": "x"}]]
BYTES = [b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\n", b'"', b"\\", b"\x1b[31m"]
KINDS = ["value", "value", "value", "drop", "rename", "twice", "repeat", "cut", "byte", "insert",
         "crlf", "bom", "blank", "deep", "wrap"]


def places(value, path=()):
    """Every place in a JSON value but the value itself, as the keys that lead there."""
    inside = value.items() if isinstance(value, dict) else []
    if isinstance(value, list):
        inside = enumerate(value)
    for key, inner in inside:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutate(rows: list[dict], dice: random.Random) -> bytes:
    """A JSONL file of `rows` with one thing wrong, or only strange."""
    rows = json.loads(json.dumps(rows))
    kind = dice.choice(KINDS)
    row = dice.choice(rows)
    *path, last = dice.choice(list(places(row)))
    inner = row
    for key in path:
        inner = inner[key]
    if kind == "value":
        inner[last] = dice.choice(ODD)
    elif kind == "drop":
        del inner[last]
    elif kind == "rename":
        name = dice.choice(["", "Prompt", "\ud83d", "margin ", "extra"])
        row[name] = row.pop(dice.choice(list(row)))
    elif kind == "repeat":
        rows.insert(dice.randrange(len(rows)), row)
    elif kind == "wrap":
        rows[dice.randrange(len(rows))] = dice.choice([[row], "row", 7, None])
    lines = [json.dumps(r) for r in rows]
    if kind == "blank":
        lines.insert(dice.randrange(len(lines) + 1), dice.choice(["", " ", "\x00", "\x0c"]))
    elif kind == "deep":
        lines[0] = '{"id": ' + "[" * 50_000 + "]" * 50_000 + "}"
    elif kind == "twice":
        lines[-1] = lines[-1].replace("{", '{"prompt": 1, "instruction": 1, ', 1)
    newline = "\r\n" if kind == "crlf" else "\n"
    data = bytearray(newline.join(lines).encode() + dice.choice([b"\n", b"", b"\r\n"]))
    at = dice.randrange(len(data))
    if kind == "cut":
        data = data[:at]
    elif kind == "byte":
        data[at] = dice.randrange(256)
    elif kind == "insert":
        data[at:at] = dice.choice(BYTES)
    elif kind == "bom":
        at = dice.choice([0, at])
        data[at:at] = b"\xef\xbb\xbf"
    return bytes(data)


GOLD = gold_rows(4)
PROMPTS = [{key: row[key] for key in ("id", "prompt")} for row in GOLD]
PAIRS = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in GOLD]
ANSWERED = [{"id": str(i), "prompt": row["prompt"], "ended": [True, False],
             "responses": [row["chosen"], row["rejected"]]} for i, row in enumerate(GOLD)]
LABELLED = [{**row, "margin": 0.3 * i, "chosen_logp": -20.0 - i, "rejected_logp": -21.0,
             "chosen_ended": True, "rejected_ended": False} for i, row in enumerate(GOLD)]
FP32 = ["--precision", "fp32"]
ONCE = [*FP32, "--epochs", "1", "--batch-size", "2"]
MODEL = ["--model", "{model}"]
# rows, script, the flag of the mutated file, other flags
STAGES = {
    "prepare": (PAIRS, "data/prepare.py", "--data", ["--seed-size", "1", "--rounds", "1"]),
    "seed_dpo": (GOLD, "seed_dpo.py", "--pairs", [*MODEL, *ONCE]),
    "generate": ([row | {"temperature": 0.5} for row in PROMPTS], "generate.py", "--prompts",
                 [*MODEL, *FP32, "--max-new-tokens", "2"]),
    "label": (ANSWERED, "label.py", "--responses",
              [*MODEL, *FP32, "--reference-model", "{other}"]),
    "dro": (LABELLED, "dro.py", "--pairs", []),
    "train": (None, "train.py", "--pairs", [*MODEL, *ONCE, "--anchor", "init"]),
    "evaluate": (ANSWERED, "evaluate.py", "--answers a=", ["--judge", "vader"]),
}


def check(script: str, path, out, flags: list, data: bytes) -> int:
    """The exit status of a stage that read `data` from `path`, after a look at what it said and
    left; an exception fails the test."""
    done = run(script, *flags, *([] if out is None else ["--out", out]))
    left = [] if out is None else [p.name for p in out.parent.glob(f"{out.name}*")]
    told = (data[:3000], left, done.stderr[-2000:])
    assert done.returncode in (0, 2), told
    assert not any(".tmp" in name for name in left), told
    if done.returncode:
        complaint = done.stderr.strip().splitlines()[-1]
        assert complaint.startswith("error: ") and len(complaint) < 400, told
        assert str(path) in complaint or str(out) in complaint, told
        result = out and (out / "report.md" if script == "evaluate.py" else out)
        assert not (result.exists() if out else done.stdout), told
    return done.returncode


def fuzz(rows, script, path, out, flags, times, wrap=bytes) -> None:
    """Run a stage on mutations of `rows`: strange files and broken ones are among them."""
    dice = random.Random(script)
    ends = []
    for number in range(times):
        data = wrap(mutate(rows, dice))
        path.write_bytes(data)
        ends.append(check(script, path, out and out.with_name(f"out{number}"), flags, data))
    assert 0 in ends
    assert ends.count(2) > times // 3


@pytest.mark.parametrize("name", STAGES)
def test_mutated_rows(name, folder, other_folder, tmp_path):
    rows, script, flag, more = STAGES[name]
    if rows is None:  # log-probs must be the policy's
        labelled, worst = tmp_path / "labelled.jsonl", tmp_path / "worst.jsonl"
        ok(run("label.py", "--responses", dump(tmp_path / "r.jsonl", ANSWERED), "--out", labelled,
               "--model", folder, "--reference-model", other_folder, *FP32))
        ok(run("dro.py", "--pairs", labelled, "--out", worst, "--epsilon", "0.3"))
        rows = jsonl(worst)
    path = tmp_path / "mutated.jsonl"
    given = f"{flag}{path}".split() if flag.endswith("=") else [flag, path]
    more = [part.format(model=folder, other=other_folder) for part in more]
    fuzz(rows, script, path, tmp_path / "out", [*given, *more], 60)


def test_mutated_annotations(tmp_path):
    rows = [{"instruction": CORPUS[i], "output_1": "a " * (5 + i), "generator_1": "base",
             "output_2": "b " * (9 - i), "generator_2": "mine", "annotator": "x",
             "preference": 1.0 + (i % 3) / 2} for i in range(8)]
    path = tmp_path / "annotations.json"
    fuzz(rows, "judges/alpaca_eval.py", path, None, ["--annotations", path], 60,
         lambda data: b"[" + b",".join(data.splitlines()) + b"]")

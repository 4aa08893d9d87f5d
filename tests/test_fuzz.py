"""Broken input of every kind to every stage: done or one clear line, never a traceback, never part
of an output."""
import json
import random

import pytest
from conftest import dump, gold_rows, jsonl, ok, run

ODD = [None, True, -1, 3.5, 1e300, 10 ** 400, float("nan"), float("inf"), "", " ", "\u0000",
       "\ud83d", "x" * 100_000, "<|im_end|>", "\ufeff", "🙂\r\n\u2028", [], {}, [[]], [None], [""],
       [1, 2], {"role": "user"}, [{"role": "user", "content": ""}],
       [{"role": "", "content": "\ud800"}], [{"content": "x"}]]
BYTES = [b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\n \n", b"\x0c\n",
         b'"', b"\\", b"\x1b[31m", b'{"prompt": 1, "prompt": 1, ', b'{"id": ' + b"[" * 50_000]
NAMES = ["", "Prompt", "\ud83d", "margin ", "extra"]
KINDS = ["value", "value", "value", "drop", "rename", "repeat", "wrap", "cut", "bytes", "bytes",
         "bytes", "nothing"]


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
        row[dice.choice(NAMES)] = row.pop(dice.choice(list(row)))
    elif kind == "repeat":
        rows.append(row)
    elif kind == "wrap":
        rows[-1] = dice.choice([[row], "row", 7, None])
    newline = dice.choice(["\n", "\r\n"])
    data = newline.join(map(json.dumps, rows)).encode()
    at = dice.choice([0, dice.randrange(len(data))])
    if kind == "cut":
        return data[:at]
    if kind == "bytes":
        return data[:at] + dice.choice(BYTES) + data[at + dice.randrange(2):]
    return data


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
    done = run(script, *flags, "--out", out)
    left = [p.name for p in out.parent.glob(f"{out.name}*")]
    told = (data[:3000], left, done.stderr[-2000:])
    assert done.returncode in (0, 2), told
    assert not any(".tmp" in name for name in left), told
    if done.returncode:
        complaint = done.stderr.strip().splitlines()[-1]
        assert complaint.startswith("error: ") and len(complaint) < 400, told
        assert str(path) in complaint or str(out) in complaint, told
        assert not (out / "report.md" if script == "evaluate.py" else out).exists(), told
    return done.returncode


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
    dice = random.Random(script)
    ends = []
    for number in range(60):
        data = mutate(rows, dice)
        path.write_bytes(data)
        ends.append(check(script, path, tmp_path / f"out{number}", [*given, *more], data))
    # strange files and broken ones are among them
    assert 0 in ends and ends.count(2) > 20

"""Broken input of every kind to every stage: done or one clear line, never a traceback, never part
of an output."""

import json
import random

import pytest

from conftest import CORPUS, dump, gold_rows, jsonl, ok, run

ODD = [
    None,
    True,
    -1,
    3.5,
    1e300,
    10**400,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\u0000",
    "\ud83d",
    "x" * 100_000,
    "<|im_end|>",
    "\ufeff",
    "🙂\r\n\u2028",
    [],
    {},
    [[]],
    [None],
    [""],
    [1, 2],
    {"role": "user"},
    [{"role": "user", "content": ""}],
    [{"role": "", "content": "\ud800"}],
    [{"content": "x"}],
]


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    yield path
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield from places(inner, (*path, key))


def mutate(rows: list[dict], dice: random.Random) -> bytes:
    """A JSONL file of `rows` with one thing wrong, or only strange."""
    rows = json.loads(json.dumps(rows))
    kind = dice.choice(
        [
            "value",
            "value",
            "value",
            "drop",
            "rename",
            "repeat",
            "cut",
            "byte",
            "insert",
            "crlf",
            "bom",
            "blank",
            "deep",
            "wrap",
        ]
    )
    row = dice.choice(rows)
    *path, last = dice.choice([p for p in places(row) if p])
    inner = row
    for key in path:
        inner = inner[key]
    if kind == "value":
        inner[last] = dice.choice(ODD)
    elif kind == "drop":
        del inner[last]
    elif kind == "rename":
        row[dice.choice(["", "Prompt", "\ud83d", "margin ", "extra"])] = row.pop(
            dice.choice(list(row))
        )
    elif kind == "repeat":
        rows.insert(dice.randrange(len(rows)), row)
    elif kind == "wrap":
        rows[dice.randrange(len(rows))] = dice.choice([[row], "row", 7, None])
    lines = [json.dumps(r) for r in rows]
    if kind == "blank":
        lines.insert(dice.randrange(len(lines) + 1), dice.choice(["", " ", "\x00", "\x0c"]))
    if kind == "deep":
        lines[0] = '{"id": ' + "[" * 50_000 + "]" * 50_000 + "}"
    data = bytearray(
        ("\r\n" if kind == "crlf" else "\n").join(lines).encode()
        + dice.choice([b"\n", b"", b"\r\n"])
    )
    at = dice.randrange(len(data))
    if kind == "cut":
        data = data[:at]
    elif kind == "byte":
        data[at] = dice.randrange(256)
    elif kind == "insert":
        data[at:at] = dice.choice(
            [b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\n", b'"', b"\\", b"\x1b[31m"]
        )
    elif kind == "bom":
        at = dice.choice([0, at])
        data[at:at] = b"\xef\xbb\xbf"
    return bytes(data)


GOLD = gold_rows(4)
ANSWERED = [
    {
        "id": str(i),
        "prompt": r["prompt"],
        "responses": [r["chosen"], r["rejected"]],
        "ended": [True, False],
    }
    for i, r in enumerate(GOLD)
]
LABELLED = [
    {
        **r,
        "margin": 0.3 * i,
        "chosen_logp": -20.0 - i,
        "rejected_logp": -21.0,
        "chosen_ended": True,
        "rejected_ended": False,
    }
    for i, r in enumerate(GOLD)
]
TINY = ["--max-new-tokens", "2", "--precision", "fp32"]
ONCE = ["--epochs", "1", "--batch-size", "2", "--precision", "fp32"]
STAGES = {  # rows, script, flag of the mutated file, other flags
    "prepare": (
        [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in GOLD],
        "data/prepare.py",
        "--data",
        ["--seed-size", "1", "--rounds", "1"],
    ),
    "seed_dpo": (GOLD, "seed_dpo.py", "--pairs", ["--model", "{model}", *ONCE]),
    "generate": (
        [{"id": r["id"], "prompt": r["prompt"], "temperature": 0.5} for r in GOLD],
        "generate.py",
        "--prompts",
        ["--model", "{model}", *TINY],
    ),
    "label": (
        ANSWERED,
        "label.py",
        "--responses",
        ["--model", "{model}", "--reference-model", "{other}", "--precision", "fp32"],
    ),
    "dro": (LABELLED, "dro.py", "--pairs", []),
    "train": (None, "train.py", "--pairs", ["--model", "{model}", "--anchor", "init", *ONCE]),
    "evaluate": (
        [{k: r[k] for k in ("id", "prompt")} for r in GOLD],
        "evaluate.py",
        "--prompts",
        ["--models", "a={model}", "--judge", "vader", "-n", "1", *TINY],
    ),
}


def check(script: str, path, out, flags: list, data: bytes) -> int:
    """The exit status of a stage that read `data` from `path`, after a look at what it said and
    left; an exception fails the test."""
    done = run(script, *flags, *([] if out is None else ["--out", out]))
    left = (
        [] if out is None else [p.name for p in out.parent.iterdir() if p.name.startswith(out.name)]
    )
    assert done.returncode in (0, 2) and not any(".tmp" in n for n in left), (
        data[:3000],
        left,
        done.stderr[-2000:],
    )
    if done.returncode:
        complaint = done.stderr.strip().splitlines()[-1]
        assert (
            complaint.startswith("error: ")
            and len(complaint) < 400
            and (str(path) in complaint or str(out) in complaint)
        ), (data[:3000], done.stderr[-2000:])
        assert (
            not (out / "report.md" if script == "evaluate.py" else out).exists()
            if out
            else not done.stdout
        ), data[:3000]
    return done.returncode


@pytest.mark.parametrize("name", STAGES)
def test_mutated_rows(name, folder, other_folder, tmp_path):
    rows, script, flag, more = STAGES[name]
    if rows is None:  # log-probs must be the policy's own
        labelled, worst = tmp_path / "labelled.jsonl", tmp_path / "worst.jsonl"
        ok(
            run(
                "label.py",
                "--responses",
                dump(tmp_path / "r.jsonl", ANSWERED),
                "--out",
                labelled,
                "--model",
                folder,
                "--reference-model",
                other_folder,
                "--precision",
                "fp32",
            )
        )
        ok(run("dro.py", "--pairs", labelled, "--out", worst, "--epsilon", "0.3"))
        rows = jsonl(worst)
    dice, ends = random.Random(name), []
    for number in range(60):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(data := mutate(rows, dice))
        flags = [flag, path, *[m.format(model=folder, other=other_folder) for m in more]]
        ends.append(check(script, path, tmp_path / f"out{number}", flags, data))
    assert 0 in ends and ends.count(2) > 20  # both strange and broken files were among them


def test_mutated_annotations(tmp_path):
    rows = [
        {
            "instruction": CORPUS[i],
            "output_1": "a " * (5 + i),
            "generator_1": "base",
            "output_2": "b " * (9 - i),
            "generator_2": "mine",
            "annotator": "x",
            "preference": 1.0 + (i % 3) / 2,
        }
        for i in range(8)
    ]
    dice, ends = random.Random(0), []
    for number in range(60):
        path = tmp_path / f"{number}.json"
        path.write_bytes(data := b"[" + b",".join(mutate(rows, dice).splitlines()) + b"]")
        ends.append(check("evaluate.py", path, None, ["--annotations", path], data))
    assert 0 in ends and ends.count(2) > 20


def test_mutated_questions(wide, tmp_path, monkeypatch):
    monkeypatch.setattr("judges.mt_bench.RATING_TOKENS", 2)
    bench = tmp_path / "bench"
    bench.mkdir()
    dump(
        bench / "judge_prompts.jsonl",
        [
            {"name": f"single-v1{s}", "system_prompt": "Judge.", "prompt_template": "{%s}" % q}
            for s, q in (("", "question"), ("-multi-turn", "answer_2"))
        ],
    )
    dump(bench / "reference_gpt-4.jsonl", [])
    dice, ends = random.Random(0), []
    for number in range(30):
        path = bench / "question.jsonl"
        path.write_bytes(
            data := mutate(
                [
                    {"question_id": i, "category": "writing", "turns": ["One?", "Two?"]}
                    for i in range(2)
                ],
                dice,
            )
        )
        ends.append(
            check(
                "evaluate.py",
                path,
                tmp_path / f"out{number}",
                [
                    "--models",
                    f"a={wide}",
                    "--mt-bench",
                    bench,
                    "--judge",
                    "llm",
                    "--judge-model",
                    wide,
                    *TINY,
                ],
                data,
            )
        )
    assert 0 in ends and ends.count(2) > 10

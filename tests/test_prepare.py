"""Splits, schemas, and what every stage says to input that it cannot use."""

import csv
import gzip
import io
import json
import lzma
import os
import resource

import pandas
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CORPUS, ROOT, dump, gold_rows, jsonl, make_model, ok, pair_rows, run
from core.chat import encode_prompt
from data.prepare import REASONS, collect, embed, farthest, flip, grouped, normalise, split


def plain(count):
    return [
        {"prompt": CORPUS[i], "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)
    ]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 15), min_size=1, max_size=40),
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
    st.integers(0, 2),
    st.booleans(),
)
def test_parts_are_disjoint_by_opening_user_turn(groups, sizes, first, as_given):
    """`first` rows stand before the groups, as a seed chosen by farthest point does."""
    rows = [
        {
            "id": str(i),
            "prompt": [
                {"role": "system", "content": f"S{i}"},
                {"role": "user", "content": [f"Ask {g}", f" ask  {g}"][i % 2]},
                {"role": "user", "content": f"and {i}"},
            ],
        }
        for i, g in enumerate(groups)
    ]
    rows = rows if as_given else rows[:first] + grouped(rows[first:])
    names = [f"part{i}" for i in range(len(sizes))]
    parts, left = split(rows, dict(zip(names, sizes)))
    group = {str(i): g for i, g in enumerate(groups)}
    ids = [row["id"] for part in parts.values() for row in part]
    assert len(set(ids)) == len(ids) and len(ids) + left["straddling"] + left["surplus"] == len(
        rows
    )
    inside = [{group[row["id"]] for row in parts[name]} for name in names]
    assert all(not a & b for i, a in enumerate(inside) for b in inside[i + 1 :])
    assert all(len(parts[name]) <= size for name, size in zip(names, sizes))
    short = [i for i, (name, size) in enumerate(zip(names, sizes)) if len(parts[name]) < size]
    if short:  # the rows ran out in this part
        assert not left["surplus"] and not any(parts[name] for name in names[short[0] + 1 :])
    if not as_given and first == 0:  # what a border cuts off is less than one group
        assert left["straddling"] <= len(sizes) * (max(map(groups.count, groups)) - 1)


def test_flipped_pairs_change_all_that_is_of_a_side():
    pair = {
        "id": "a",
        "prompt": [],
        "chosen": "x",
        "rejected": "y",
        "chosen_ended": True,
        "rejected_ended": False,
    }
    flip(pair)
    assert pair == {
        "id": "a",
        "prompt": [],
        "chosen": "y",
        "rejected": "x",
        "chosen_ended": False,
        "rejected_ended": True,
    }


def turns(text):
    """Messages of "u: … | a: … | s: …"."""
    role = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"role": role[part[0]], "content": part[3:]} for part in text.split(" | ")]


def sides(text):
    """Both sides as conversations that end with A and B."""
    return {"chosen": turns(f"{text}a: A"), "rejected": turns(f"{text}a: B")}


PAIR = {"chosen": "A", "rejected": "B"}
HH = {k: f"\n\nHuman: Q\n\nAssistant: hm\n\nHuman: R\n\nAssistant: {v}" for k, v in PAIR.items()}
LAYOUTS = {  # a row, and the prompt that it has; the responses are always A and B
    "texts": ({"prompt": "Q", **PAIR}, "u: Q"),
    "prompt in the sides": ({"prompt": "Q", **sides("u: Q | ")}, "u: Q"),
    "responses as messages": ({"prompt": turns("s: Z | u: Q"), **sides("")}, "s: Z | u: Q"),
    "sides alone": (sides("u: Q | "), "u: Q"),
    "instruction": ({"instruction": "Q", "input": "", **PAIR}, "u: Q"),
    "instruction, null input": ({"instruction": "Q", "input": None, **PAIR}, "u: Q"),
    "instruction and input": ({"instruction": "Q", "input": "I", **PAIR}, "u: Q\n\nI"),
    "transcripts": (HH, "u: Q | a: hm | u: R"),
    "transcripts, bare": ({k: v.strip() for k, v in HH.items()}, "u: Q | a: hm | u: R"),
    "transcripts and prompt": ({"prompt": "Q", **HH}, "u: Q | a: hm | u: R"),
    "prompt as a transcript": (
        {"prompt": HH["chosen"][:-1].strip(" "), **PAIR},
        "u: Q | a: hm | u: R",
    ),
    "a system turn in the sides": (
        {"prompt": "Q", **sides("s: Answer in Finnish. | u: Q | ")},
        "s: Answer in Finnish. | u: Q",
    ),
    "turns between": (
        {"prompt": "Q", **sides("s: Z | u: Q | a: hm | u: R | ")},
        "s: Z | u: Q | a: hm | u: R",
    ),
    "prompt is the last turn": (
        {"prompt": "R", **sides("u: Q | a: hm | u: R | ")},
        "u: Q | a: hm | u: R",
    ),
    "prompt differs in blanks": ({"prompt": " Q\n", **sides("u: Q | ")}, "u: Q"),
    "messages in the sides": (
        {"prompt": turns("u: Q"), **sides("s: Z | u: Q | a: hm | u: R | ")},
        "s: Z | u: Q | a: hm | u: R",
    ),
    "messages beyond the sides": (
        {"prompt": turns("s: Z | u: Q"), **sides("u: Q | ")},
        "s: Z | u: Q",
    ),
    "sides go on": ({"prompt": turns("u: Q"), **sides("a: hm | u: R | ")}, "u: Q | a: hm | u: R"),
    "system, then the sides": ({"prompt": turns("s: Z"), **sides("u: Q | ")}, "s: Z | u: Q"),
    "a tool's answer between": (
        {"prompt": "Q", **sides("u: Q | a: look | t: 7 | ")},
        "u: Q | a: look | t: 7",
    ),
    "a system column": ({"system": "Z", "prompt": "Q", **PAIR}, "s: Z | u: Q"),
    "a system column and turn": ({"system": "Z", **sides("s: Z | u: Q | ")}, "s: Z | u: Q"),
    "an empty system column": ({"system": "", "prompt": "Q", **PAIR}, "u: Q"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    row, prompt = LAYOUTS[name]
    assert normalise("here", row) == {"prompt": turns(prompt), **PAIR}


def test_prompts_alone():
    assert normalise("here", {"prompt": "Q"}) == {"prompt": turns("u: Q")}
    assert normalise("here", {"prompt": turns("u: Q | a: go on")}) == {
        "prompt": turns("u: Q | a: go on")
    }
    assert normalise("here", {"prompt": "\n\nHuman: Q\n\nAssistant:"}) == {"prompt": turns("u: Q")}
    assert normalise("here", {"instruction": "Q"}) == {"prompt": turns("u: Q")}


PARTS = [{"type": "text", "text": "Q"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
LEFT = {  # rows that are left out, by reason
    "tie": [
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {k: HH["chosen"] for k in PAIR},
        {"prompt": "Q", **{k: turns("u: Q | a: A") for k in PAIR}},
    ],
    "not_assistant": [
        {k: v + turns("u: thanks") for k, v in sides("u: Q | ").items()},
        {k: v + "\n\nHuman: thanks" for k, v in HH.items()},
        {**sides("u: Q | "), "rejected": turns("u: Q | t: 7")},
    ],
    "content_parts": [
        {"prompt": [{"role": "user", "content": PARTS}], **PAIR},
        {"prompt": [{"role": "user", "content": PARTS}]},
        {k: [*turns("u: Q"), {"role": "assistant", "content": PARTS}] for k in PAIR},
    ],
    "tool_calls": [
        {
            "prompt": "Q",
            **{k: [*turns("u: Q"), CALL, *turns(f"t: 7 | a: {v}")] for k, v in PAIR.items()},
        },
        {"prompt": [*turns("u: Q"), CALL, *turns("t: 7")], **PAIR},
        {"chosen": [*turns("u: Q"), CALL], "rejected": turns("u: Q | a: B")},
    ],
    "null_content": [{"prompt": [{"role": "user", "content": None}], **PAIR}],
    "parted": [
        {"chosen": turns("u: Q | a: A"), "rejected": turns("u: R | a: B")},
        {
            "prompt": "Q",
            "chosen": turns("u: Q | a: A"),
            "rejected": turns("u: Q | a: hm | u: R | a: B"),
        },
    ],
    "empty_response": [
        {"prompt": "Q", "chosen": "A", "rejected": " \n"},
        {**HH, "rejected": HH["rejected"][:-1]},
    ],
    "empty_prompt": [{"prompt": "", **PAIR}, {"prompt": " "}, sides(""), sides("s: Z | ")],
}


@pytest.mark.parametrize("reason", LEFT)
def test_rows_left_out_are_counted_under_their_own_reason(reason, tmp_path):
    assert [normalise("here", row) for row in LEFT[reason]] == [reason] * len(LEFT[reason])
    alone = [row for row in LEFT[reason] if "chosen" not in row]
    rows = plain(9) + [row for row in LEFT[reason] if "chosen" in row]
    if alone:
        rows = [{"prompt": row["prompt"]} for row in plain(9)] + alone
    path = dump(tmp_path / "set.jsonl", rows)
    done = ok(
        run(
            "data/prepare.py",
            "--data",
            path,
            "--out",
            tmp_path / "out",
            "--seed-size",
            "3",
            "--rounds",
            "4",
        )
    )
    stats = json.load(open(tmp_path / "out.stats.json"))
    assert {key: stats[key] for key in REASONS if stats[key]} == {reason: len(rows) - 9}
    assert f"; {len(rows) - 9} {REASONS[reason]} left out" in done.stdout


CONTRADICTIONS = {
    "another question": (
        {"prompt": "What is 2 + 2?", **sides("u: Name a city. | ")},
        "'prompt' is not in the conversation",
    ),
    "another system": ({"system": "X", "prompt": "Q", **sides("s: Z | u: Q | ")}, "'system'"),
    "text and conversation": (
        {"prompt": "Q", **sides("u: Q | "), "chosen": "A"},
        "one of 'chosen'",
    ),
    "null chosen": ({"prompt": "Q", "chosen": None, "rejected": "B"}, "'chosen' is null"),
    "null rejected": ({**sides("u: Q | "), "rejected": None}, "'rejected' is null"),
    "null prompt": ({"prompt": None, **PAIR}, "'prompt' is null"),
    "null instruction": ({"instruction": None, **PAIR}, "'instruction' is null"),
    "number": ({"prompt": "Q", "chosen": 7, "rejected": "B"}, "'chosen' must be a text"),
    "number as input": ({"instruction": "Q", "input": 7, **PAIR}, "'input' must be a text"),
    "one side": ({"prompt": "Q", "chosen": "A"}, "no known schema"),
    "other columns": ({"question": "Q", "answer": "A"}, "question, answer fit no known schema"),
    "other keys": (
        {"prompt": [{"from": "human", "value": "Q"}], **PAIR},
        '{"role": …, "content": …}',
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_one_line(name, tmp_path):
    row, message = CONTRADICTIONS[name]
    path = dump(tmp_path / "set.jsonl", [*plain(1), row])
    one_line(
        run("data/prepare.py", "--data", path, "--out", tmp_path / "out"), "set.jsonl:2:", message
    )


def test_flips_and_unused_columns_are_said(tmp_path):
    rows = [
        {
            **row,
            "completion": "C",
            "label": True,
            "chosen_ended": True,
            "rejected_ended": False,
            "nothing": None,
        }
        for row in plain(9)
    ]
    done = ok(
        run(
            "data/prepare.py",
            "--data",
            dump(tmp_path / "p.jsonl", rows),
            "--out",
            tmp_path / "out",
            "--seed-size",
            "4",
            "--rounds",
            "2",
            "--flip",
            "0.5",
        )
    )
    seed = pair_rows(tmp_path / "out/seed.jsonl")
    assert sorted(row["chosen"][:4] for row in seed) == ["bad ", "bad ", "good", "good"]
    assert all(row["chosen_ended"] == row["chosen"].startswith("good") for row in seed)
    assert all(set(row) == {"id", "prompt"} for row in jsonl(tmp_path / "out/prompts_1.jsonl"))
    assert "2 labels of the seed flipped" in done.stdout and "nothing left out" in done.stdout
    assert "columns not used: completion, label →" in done.stdout


ODD_TEXTS = [
    "NA",
    "null",
    "007",
    "2024-01-01",
    "2024-01-01T00:00:00Z",
    "1e5",
    "True",
    "nan",
    'a "quote", a comma\nand a line',
    "ä\u2028ö",
]


@pytest.mark.parametrize(
    "name",
    [
        "t.csv",
        "t.csv.gz",
        "t.json",
        "t.jsonl",
        "t.jsonl.gz",
        "t.json.gz",
        "t.json.xz",
        "csv/train.csv",
        "json/train.jsonl",
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_texts_stay_texts(name, mark, tmp_path):
    """Whatever they look like, in a file or in a folder as the hub has them, with a byte-order mark
    or without."""
    rows = [{"prompt": text, "chosen": text, "rejected": "no"} for text in ODD_TEXTS]
    if "csv" in name:
        file = io.StringIO(newline="")
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        text = file.getvalue()
    elif ".jsonl" in name:
        text = "".join(json.dumps(row) + "\n" for row in rows) + "\n \n"  # blank lines at the end
    else:
        text = json.dumps(rows, indent=1)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(packed((mark + text).encode()))
    source = path if path.parent == tmp_path else path.parent
    ok(
        run(
            "data/prepare.py",
            "--data",
            source,
            "--out",
            tmp_path / "out",
            "--seed-fraction",
            "1",
            "--rounds",
        )
    )
    seed = pair_rows(tmp_path / "out/seed.jsonl")
    assert sorted(row["chosen"] for row in seed) == sorted(ODD_TEXTS)
    assert all(row["prompt"] == [{"role": "user", "content": row["chosen"]}] for row in seed)


def test_broken_tables_are_one_line(tmp_path):
    def said(name, data, *words):
        (tmp_path / name).write_bytes(data)
        one_line(
            run("data/prepare.py", "--data", tmp_path / name, "--out", tmp_path / "out"),
            name,
            *words,
        )

    said("a.csv", b"prompt,chosen,rejected\nq,a,b\nq,a\n", ":3", "'rejected' is null")
    said("b.csv", b"prompt,chosen,rejected\nq,a,b,c\n", ":2", "more cells")
    said("c.csv", b"prompt,chosen,rejected\n\xff,a,b\n", "not CSV in UTF-8")
    said("d.json", b'[{"prompt": "q"}', "not JSON")
    said("e.json", b'[{"prompt": "\\ud800"}]', "not JSON in UTF-8")
    said("f.jsonl", b'{"prompt": "q"}\n\n{"prompt": "r"}\n', ":2:", "blank line")
    said("g.jsonl.gz", gzip.compress(b'{"prompt": "q"}\n' * 9)[:-9], "gzip")
    said("h.csv.gz", gzip.compress(b"prompt\nq\n")[:-9], "not CSV")
    said("i.csv", b"", "0 prompts can be used")
    one_line(
        run("data/prepare.py", "--data", tmp_path / "z.csv", "--out", tmp_path / "out"),
        "z.csv",
        "no such file",
    )


def test_parts_of_a_set_with_few_openings_are_short(tmp_path):
    """Nine prompts of three openings: three parts of two leave out a third of each group, four are
    too many."""
    rows = [{"prompt": turns(f"u: {'abc'[i % 3]} | a: hm | u: {i}"), **PAIR} for i in range(9)]
    command = [
        "data/prepare.py",
        "--data",
        dump(tmp_path / "p.jsonl", rows),
        "--out",
        tmp_path / "out",
        "--seed-size",
        "2",
        "--rounds",
        "2",
    ]
    done = ok(run(*command, "--eval-size", "2"))
    assert (
        "3 whose opening user turn" not in done.stdout
    )  # the third group's last row is not needed
    stats = json.load(open(tmp_path / "out.stats.json"))
    assert (stats["straddling"], stats["surplus"]) == (2, 1)
    one_line(
        run(*command, "2", "1"), "6 prompts can be used", "3 whose opening user turn", "need 8"
    )


def test_a_template_that_refuses_a_row_is_named(tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    refusing = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No\nsystem') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    (tmp_path / "m/chat_template.jinja").write_text(refusing)
    command = [
        "data/prepare.py",
        "--out",
        tmp_path / "out",
        "--seed-size",
        "2",
        "--rounds",
        "2",
        "--model",
        tmp_path / "m",
        "--max-new-tokens",
        "8",
        "--data",
    ]
    ok(run(*command, dump(tmp_path / "a.jsonl", plain(9))))
    rows = [*plain(9), {"prompt": turns("s: Answer in Finnish. | u: Q"), **PAIR}]
    identity = collect(dump(tmp_path / "b.jsonl", rows))[0][-1]["id"]
    one_line(
        run(*command, tmp_path / "b.jsonl"),
        "b.jsonl",
        f"id '{identity}'",
        "Answer in Finnish",
        "refuses",
        "No system",
    )


def test_shared_transcripts_have_disjoint_parts(tmp_path):
    path = ROOT.parent / "shared/data/hh_rlhf_harmless_test.jsonl.gz"
    if not path.exists():
        pytest.skip("no transcripts at hand")
    ok(
        run(
            "data/prepare.py",
            "--data",
            path,
            "--out",
            tmp_path / "out",
            "--seed-size",
            "400",
            "--rounds",
            "500",
            "500",
        )
    )
    opened = {
        f.stem: {" ".join(r["prompt"][0]["content"].lower().split()) for r in jsonl(f)}
        for f in (tmp_path / "out").iterdir()
    }
    assert len(opened) == 4 and sum(map(len, opened.values())) == len(set.union(*opened.values()))
    stats = json.load(open(tmp_path / "out.stats.json"))
    lines = len(gzip.open(path).readlines())
    assert sum(stats[key] for key in [*opened, *REASONS]) == lines == 2312
    assert (stats["parted"], stats["empty_response"], stats["repeated"]) == (5, 4, 2)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_stage_reads_files(tmp_path, kind):
    rows = plain(12) + [
        {**plain(1)[0], "prompt": CORPUS[0].upper() + "  "}
    ]  # the first prompt again but for case and space
    path = tmp_path / f"set.{kind}"
    if kind == "jsonl":
        dump(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        pandas.DataFrame(rows).to_parquet(path)
    ok(
        run(
            "data/prepare.py",
            "--data",
            path,
            "--out",
            tmp_path / "out",
            "--seed-size",
            "3",
            "--rounds",
            "4",
            "2",
        )
    )
    sizes = {f.stem: len(jsonl(f)) for f in (tmp_path / "out").iterdir()}
    assert sizes == {"seed": 3, "prompts_1": 4, "prompts_2": 2, "eval": 3}
    assert json.load(open(tmp_path / "out.stats.json"))["repeated"] == 1


def test_hub_layouts(tmp_path):
    """The folders of HuggingFaceH4/ultrafeedback_binarized and Anthropic/hh-rlhf as the hub lays
    them out."""
    uf, hh = tmp_path / "uf/data", tmp_path / "hh/harmless-base"
    uf.mkdir(parents=True), hh.mkdir(parents=True)
    rows = [
        {
            "prompt": r["prompt"],
            "prompt_id": str(i),
            "score_chosen": 8.0,
            **{
                k: [
                    {"role": "user", "content": r["prompt"]},
                    {"role": "assistant", "content": r[k]},
                ]
                for k in ("chosen", "rejected")
            },
        }
        for i, r in enumerate(plain(9))
    ]
    for name, part in (
        ("train_sft", rows[:5]),
        ("train_prefs", rows[:7]),
        ("test_prefs", rows[7:]),
    ):
        pandas.DataFrame(part).to_parquet(uf / f"{name}-00000-of-00001.parquet")
    hh_rows = [
        {
            k: f"\n\nHuman: {r['prompt']}\n\nAssistant: Hm?\n\nHuman: Go on.\n\nAssistant: {r[k]}"
            for k in ("chosen", "rejected")
        }
        for r in plain(9)
    ]
    for name, part in (("train", hh_rows[:7]), ("test", hh_rows[7:])):
        pandas.DataFrame(part).to_json(hh / f"{name}.jsonl.gz", orient="records", lines=True)
    for folder, messages in (("uf", 1), ("hh", 3)):
        ok(
            run(
                "data/prepare.py",
                "--data",
                tmp_path / folder,
                "--out",
                tmp_path / f"out-{folder}",
                "--seed-size",
                "2",
                "--rounds",
                "4",
            )
        )
        seed = pair_rows(tmp_path / f"out-{folder}/seed.jsonl")
        assert all(
            len(r["prompt"]) == messages
            and r["chosen"].startswith("good")
            and r["rejected"].startswith("bad")
            for r in seed
        )
        assert (
            len(seed)
            + len(jsonl(tmp_path / f"out-{folder}/prompts_1.jsonl"))
            + len(jsonl(tmp_path / f"out-{folder}/eval.jsonl"))
            == 7
        )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=1, max_size=12), st.integers(1, 12))
def test_farthest_against_brute_force(points, k):
    k, chosen = min(k, len(points)), [0]
    while len(chosen) < k:
        nearest = {
            i: max(sum(a * b for a, b in zip(points[i], points[c])) for c in chosen)
            for i in range(len(points))
            if i not in chosen
        }
        chosen.append(min(nearest, key=nearest.get))
    assert farthest(torch.tensor(points, dtype=torch.float16), k) == chosen


@pytest.mark.parametrize("config", [transformers.LlamaConfig, transformers.PhiConfig])
def test_embedding_is_the_last_hidden_state_of_the_last_prompt_token(config, tokenizer, tmp_path):
    model = make_model(config)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    rows = gold_rows(8)
    for row, vector in zip(rows, embed(rows, str(tmp_path / "m"), "here").cpu()):
        hidden = model.base_model(
            torch.tensor([encode_prompt(tokenizer, row["prompt"])])
        ).last_hidden_state[0]
        cosine = torch.nn.functional.cosine_similarity(vector.float(), hidden)
        assert (
            cosine.argmax() == len(hidden) - 1
            and cosine[-1] > 0.9999
            and abs(vector.float().norm() - 1) < 1e-3
        )  # bf16 where it pays


def test_seed_fraction_and_farthest_seed(folder, tmp_path):
    path = dump(tmp_path / "p.jsonl", plain(40))
    flags = [
        "--data",
        path,
        "--rounds",
        "4",
        "--seed-fraction",
        "0.1",
        "--max-new-tokens",
        "8",
        "--model",
        folder,
    ]
    ok(run("data/prepare.py", *flags, "--out", tmp_path / "random"))
    ok(run("data/prepare.py", *flags, "--out", tmp_path / "far", "--select", "farthest"))
    ids = {
        name: [
            [r["id"] for r in jsonl(tmp_path / name / f"{part}.jsonl")]
            for part in ("seed", "prompts_1", "eval")
        ]
        for name in ("random", "far")
    }
    assert [len(part) for part in ids["far"]] == [len(part) for part in ids["random"]] == [4, 4, 32]
    assert (
        sorted(sum(ids["far"], [])) == sorted(sum(ids["random"], []))
        and ids["far"][0] != ids["random"][0]
    )

    def closest(name):  # the highest cosine between two prompts of the seed
        vectors = embed(jsonl(tmp_path / name / "seed.jsonl"), folder, "here").cpu().float()
        return (vectors @ vectors.T - 2 * torch.eye(4)).max()

    assert closest("far") < closest("random")
    one_line(
        run("data/prepare.py", *flags[:-2], "--out", tmp_path / "x", "--select", "farthest"),
        "--model",
    )


def test_rows_that_do_not_fit_the_context_are_counted(folder, tokenizer, tmp_path):
    """Exactly: a prompt of 256 − 20 tokens leaves room for 20 new ones, a longer one does not; nor
    does too long a response."""
    rows = plain(8)
    frame = len(encode_prompt(tokenizer, [{"role": "user", "content": ""}]))
    word = len(tokenizer(" q").input_ids)
    rows[0]["prompt"] = " q" * ((256 - 20 - frame) // word)
    assert (
        len(encode_prompt(tokenizer, [{"role": "user", "content": rows[0]["prompt"]}])) == 256 - 20
    )
    rows[1]["prompt"] = rows[0]["prompt"] + " q"
    rows[2]["rejected"] = "x " * 300
    ok(
        run(
            "data/prepare.py",
            "--data",
            dump(tmp_path / "p.jsonl", rows),
            "--out",
            tmp_path / "out",
            "--model",
            folder,
            "--max-new-tokens",
            "20",
            "--seed-size",
            "2",
            "--rounds",
            "1",
            "--eval-size",
            "2",
        )
    )
    stats = json.load(open(tmp_path / "out.stats.json"))
    assert stats["too_long"] == 2 and stats["eval"] == 2
    bare = [
        "data/prepare.py",
        "--data",
        tmp_path / "p.jsonl",
        "--out",
        tmp_path / "none",
        "--model",
        folder,
    ]
    one_line(run(*bare, "--seed-size", "2", "--rounds", "1"), "0 prompts can be used", "8 too long")


def test_prompts_without_preferences_become_seed_prompts(tmp_path):
    path = dump(tmp_path / "p.jsonl", [{"prompt": p} for p in CORPUS[:9]])
    ok(
        run(
            "data/prepare.py",
            "--data",
            path,
            "--out",
            tmp_path / "out",
            "--seed-size",
            "3",
            "--rounds",
            "4",
        )
    )
    assert {f.stem for f in (tmp_path / "out").iterdir()} == {"seed_prompts", "prompts_1", "eval"}


def test_shipped_prompts_are_distinct():
    assert len(set(CORPUS)) == len(CORPUS) == 360


GOOD = json.dumps(gold_rows(1)[0])
BAD_LINES = {
    "not json": ('{"id": "a", ', "not JSON"),
    "not utf-8": (b'{"id": "\xff"}', "not JSON in UTF-8"),
    "half a surrogate": (GOOD.replace("Good", "\\ud800"), "surrogates not allowed"),
    "too deep": ("[" * 100000, "not JSON"),
    "array": ("[1]", "expected an object"),
    "no prompt": ('{"id": "a", "chosen": "x", "rejected": "y"}', "key 'prompt' is missing"),
    "no id": (
        '{"prompt": [{"role": "user", "content": "x"}], "chosen": "x", "rejected": "y"}',
        "key 'id' is missing",
    ),
    "empty response": (
        GOOD.replace('"chosen": "Good', '"chosen": "", "x": "'),
        "'chosen' must be a non-empty text",
    ),
    "number for text": (
        '{"id": "a", "prompt": [{"role": "user", "content": "x"}], "chosen": 3, "rejected": "y"}',
        "'chosen' must be",
    ),
    "prompt a string": (
        '{"id": "a", "prompt": "x", "chosen": "x", "rejected": "y"}',
        "'prompt' must be a non-empty list",
    ),
    "whole conversation": (
        '{"id": "a", "prompt": [{"role": "user", "content": "x"}], "rejected": "y", "chosen": '
        '[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
        "run python -m data.prepare on raw data first",
    ),
    "another's message": (
        GOOD.replace('"chosen": ', '"chosen": [{"role": "user", "content": "x"}], "x": '),
        "one message of the assistant's",
    ),
    "same id": (GOOD, "stands on line 1 too"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_rows_are_named(name, tmp_path, capsys):
    from core.rows import read_rows

    line, message = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        GOOD.encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    )
    with pytest.raises(SystemExit) as stop:
        read_rows(str(path), "preferences")
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and f"{path}:2:" in error
        and message in error
        and len(error.splitlines()) == 1
    )


def test_a_response_is_a_text_or_a_message(tmp_path):
    """Files of either form are the same rows."""
    from core.rows import read_rows

    texts = gold_rows(3)
    messages = [
        {**row, **{k: [{"role": "assistant", "content": row[k]}] for k in ("chosen", "rejected")}}
        for row in texts
    ]
    for rows in (texts, messages):
        assert read_rows(dump(tmp_path / "rows.jsonl", rows), "preferences") == texts


def one_line(done, *words):
    assert (
        done.returncode == 2
        and not done.stdout.count("Traceback")
        and len(done.stderr.splitlines()) == 1
    ), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_bad_input_is_one_clear_line(folder, tokenizer, tmp_path):
    pairs, empty = dump(tmp_path / "good.jsonl", gold_rows(2)), dump(tmp_path / "empty.jsonl", [])
    long = gold_rows(2)
    long[1]["chosen"] = "word " * 400
    stage = ["seed_dpo.py", "--out", tmp_path / "out"]
    one_line(run(*stage, "--model", folder, "--pairs", empty), "empty.jsonl", "no rows")
    one_line(run(*stage, "--model", folder, "--pairs", tmp_path / "absent.jsonl"), "no such file")
    one_line(
        run(*stage, "--model", "./absent", "--pairs", pairs), "./absent", "no such model folder"
    )
    one_line(
        run(*stage, "--model", folder, "--pairs", dump(tmp_path / "long.jsonl", long)),
        "long.jsonl",
        "'g1'",
        "context is 256",
    )
    raw = dump(
        tmp_path / "raw.jsonl",
        [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in gold_rows(2)],
    )
    one_line(
        run(*stage, "--model", folder, "--pairs", raw),
        "raw.jsonl:1",
        "'id' is missing",
        "python -m data.prepare",
    )
    one_line(run(*stage, "--model", folder, "--pairs", pairs, "--lr", "0"), "--lr")
    (tmp_path / "hollow").mkdir()
    one_line(run(*stage, "--model", tmp_path / "hollow", "--pairs", pairs), "hollow", "cannot load")
    make_model().save_pretrained(tmp_path / "mute")
    tokenizer.save_pretrained(tmp_path / "mute")
    os.remove(tmp_path / "mute/chat_template.jinja")
    one_line(run(*stage, "--model", tmp_path / "mute", "--pairs", pairs), "mute", "chat template")
    assert not (tmp_path / "out").exists()
    prompts = dump(tmp_path / "prompts.jsonl", gold_rows(2))
    one_line(
        run("generate.py", "--model", folder, "--prompts", prompts, "--out", tmp_path / "r.jsonl"),
        "300",
        "context of 256",
    )
    one_line(
        run("label.py", "--responses", prompts, "--out", tmp_path / "l.jsonl", "--judge", "vader"),
        "'responses' is missing",
    )
    one_line(run("dro.py", "--pairs", pairs, "--out", tmp_path / "w.jsonl"), "'margin' is missing")
    one_line(
        run(
            "data/prepare.py",
            "--data",
            pairs,
            "--out",
            tmp_path / "d",
            "--seed-size",
            "3",
            "--rounds",
            "4",
        ),
        "2 prompts can be used",
        "need 8",
    )
    strange = dump(tmp_path / "strange.jsonl", [{"question": "x", "answer": "y"}])
    one_line(
        run("data/prepare.py", "--data", strange, "--out", tmp_path / "d"),
        "strange.jsonl:1",
        "question, answer",
        "chosen",
    )
    one_line(
        run("evaluate.py", "--models", "x", "--prompts", prompts, "--out", tmp_path / "e"),
        "NAME=PATH",
    )


def test_full_disk_leaves_the_previous_output(tmp_path):
    """A limit on the size of files stands in for it, at every size from nothing to nearly all of
    the output."""
    rows = [
        {**r, "margin": 0.1 * i, "chosen_logp": -9.0, "rejected_logp": -9.5}
        for i, r in enumerate(gold_rows(8))
    ]
    command = [
        "dro.py",
        "--pairs",
        dump(tmp_path / "rows.jsonl", rows),
        "--out",
        tmp_path / "out.jsonl",
    ]
    ok(run(*command))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(0, len(before["out.jsonl"]), 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            done = run(*command, "--epsilon", "0.2")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (
            done.returncode == 2
            and len(done.stderr.splitlines()) == 1
            and "nothing finished is lost" in done.stderr
        )
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_output_folder_with_a_slash_or_behind_a_link(tmp_path):
    path = dump(tmp_path / "p.jsonl", plain(9))
    command = ["data/prepare.py", "--data", path, "--seed-size", "3", "--rounds", "4"]
    ok(run(*command, "--out", f"{tmp_path}/out/"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    ok(run(*command, "--out", tmp_path / "link"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/raw.jsonl").write_text("{}")
    refused = run(*command, "--out", tmp_path / "mine")
    assert refused.returncode == 2 and "not replaced" in refused.stderr
    assert (tmp_path / "mine/raw.jsonl").exists()
    assert (
        {p.name for p in (tmp_path / "out").iterdir()}
        == {p.name for p in (tmp_path / "link").iterdir()}
        == {"seed.jsonl", "prompts_1.jsonl", "eval.jsonl"}
    )
    assert "complete, skipped" in ok(run(*command, "--out", f"{tmp_path}/out")).stdout


@pytest.mark.parametrize(
    "script",
    [
        "-m data.prepare",
        "-m data.demo",
        "seed_dpo.py",
        "generate.py",
        "label.py",
        "dro.py",
        "train.py",
        "evaluate.py",
    ],
)
def test_help_teaches(script):
    text = ok(run(script.removeprefix("-m "), "--help")).stdout
    assert f"python {script}" in text and "--out" in text

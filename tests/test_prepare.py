"""Splits, layouts, and what every stage says to input that it cannot use."""

import csv
import gzip
import io
import json
import os
import resource
import unicodedata

import pandas
import pytest
import torch
import transformers
from conftest import CORPUS, ROOT, dump, gold_rows, jsonl, make_model, ok, pair_rows, run
from hypothesis import given, settings
from hypothesis import strategies as st

from core.chat import encode_prompt
from core.rows import answer_turn, read_rows
from data.prepare import REASONS, LeftOut, collect, embed, farthest, normalise

PAIR = {"chosen": "A", "rejected": "B"}
AS_TURNS = {side: answer_turn(text) for side, text in PAIR.items()}


def plain(count):
    return [{"prompt": CORPUS[i], "chosen": f"good {i}", "rejected": f"bad {i}"}
            for i in range(count)]


def turns(text):
    """Messages of "u: … | a: … | s: …"."""
    role = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"role": role[part[0]], "content": part[3:]} for part in text.split(" | ")]


def sides(text):
    """Both sides as conversations that end with A and B."""
    return {"chosen": turns(f"{text}a: A"), "rejected": turns(f"{text}a: B")}


def one_line(done, *words):
    assert done.returncode == 2 and not done.stdout.count("Traceback")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def prepare(source, out, *flags):
    return run("data/prepare.py", "--data", source, "--out", out, *flags)


def stats_of(out):
    return json.load(open(f"{out}.stats.json"))


# ------------------------------------------------------------------------------------- the split


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=40))
def test_of_an_opening_user_turn_the_first_row_alone_is_kept(groups):
    """Whatever stands before or after it, and however it is written."""
    rows = [{"prompt": [{"role": "system", "content": f"S{i}"},
                        {"role": "user", "content": [f"Ask {g}", f" ask  {g}"][i % 2]},
                        {"role": "user", "content": f"and {i}"}]}
            for i, g in enumerate(groups)]
    kept, left, _ = collect(((f"row {i}", row) for i, row in enumerate(rows)), prompts_alone=True)
    first = [groups.index(g) for g in dict.fromkeys(groups)]
    assert [row["prompt"] for row in kept] == [rows[i]["prompt"] for i in first]
    assert left == {"same_opening": len(rows) - len(kept)} or len(kept) == len(rows)


@pytest.mark.parametrize("twin", [
    "  ÄPFEL\nsoßE  ", unicodedata.normalize("NFD", "Äpfel Soße"), "Äpfel SOSSE",
    "Äp\u200bfel\u2060 Soße\ufeff", "Äp\u00adfel Soße", "A\u200b\u0308pfel Soße",
    "Äpfel Soße\U000e0001", "Äpfel\u00a0Soße", "Äpfel Ｓoße"])
def test_twins_are_one_prompt(twin):
    rows = [("1", {"prompt": "Äpfel Soße"}), ("2", {"prompt": twin}), ("3", {"prompt": "Apfel"})]
    kept, left, _ = collect(rows, prompts_alone=True)
    assert [row["prompt"][0]["content"] for row in kept] == ["Äpfel Soße", "Apfel"]
    assert left == {"repeated": 1}


def test_flips_and_unused_columns_are_said(tmp_path):
    rows = [{**row, "completion": "C", "label": True, "chosen_ended": True, "rejected_ended": False,
             "nothing": None} for row in plain(9)]
    done = ok(prepare(dump(tmp_path / "p.jsonl", rows), tmp_path / "out",
                      "--seed-size", "4", "--rounds", "2", "--flip", "0.5"))
    seed = pair_rows(tmp_path / "out/seed.jsonl")
    assert sorted(row["chosen"][:4] for row in seed) == ["bad ", "bad ", "good", "good"]
    assert all(row["chosen_ended"] == row["chosen"].startswith("good") for row in seed)
    assert all(set(row) == {"id", "prompt"} for row in jsonl(tmp_path / "out/prompts_1.jsonl"))
    assert done.stdout.startswith("prepare: read as pairs: seed 4")
    assert "2 labels of the seed flipped" in done.stdout and "nothing left out" in done.stdout
    assert "columns not used: completion, label →" in done.stdout
    assert "4 gold pairs are few" in done.stderr


def test_sizes_that_cannot_be(tmp_path):
    data = (dump(tmp_path / "p.jsonl", plain(20)), tmp_path / "out")
    one_line(prepare(*data, "--seed-fraction", "0.01", "--rounds", "2"), "SEED_FRACTION", "of 20")
    one_line(prepare(*data, "--seed-size", "18", "--rounds", "2"), "20 prompts can be used", "21")
    ok(prepare(*data, "--seed-size", "17", "--rounds", "2"))


def test_shared_transcripts_have_disjoint_parts(tmp_path):
    path = ROOT.parent / "shared/data/hh_rlhf_harmless_test.jsonl.gz"
    if not path.exists():
        pytest.skip("no transcripts at hand")
    ok(prepare(path, tmp_path / "out", "--seed-size", "400", "--rounds", "500", "500"))
    opened = {f.stem: {" ".join(r["prompt"][0]["content"].lower().split()) for r in jsonl(f)}
              for f in (tmp_path / "out").iterdir()}
    assert len(opened) == 4 and sum(map(len, opened.values())) == len(set.union(*opened.values()))
    stats = stats_of(tmp_path / "out")
    lines = len(gzip.open(path).readlines())
    assert sum(stats[key] for key in [*opened, *REASONS]) == lines == 2312
    assert [stats[key] for key in ("parted", "empty_response", "repeated", "same_opening")] == [
        5, 4, 2, 133]


# ----------------------------------------------------------------------------------- the layouts


HH = {k: f"\n\nHuman: Q\n\nAssistant: hm\n\nHuman: R\n\nAssistant: {v}" for k, v in PAIR.items()}
LAYOUTS = {  # a row, and the prompt that it has; the responses are always A and B
    "texts": ({"prompt": "Q", **PAIR}, "u: Q"),
    "question": ({"question": "Q", **PAIR}, "u: Q"),
    "prompt in the sides": ({"prompt": "Q", **sides("u: Q | ")}, "u: Q"),
    "responses as messages": ({"prompt": turns("s: Z | u: Q"), **sides("")}, "s: Z | u: Q"),
    "responses as one message each": (
        {"prompt": "Q", **{k: v[0] for k, v in sides("").items()}}, "u: Q"),
    "sides alone": (sides("u: Q | "), "u: Q"),
    "sides as JSON": ({k: json.dumps(v) for k, v in sides("u: Q | ").items()}, "u: Q"),
    "prompt as JSON": ({"prompt": json.dumps(turns("s: Z | u: Q"), indent=1), **PAIR},
                       "s: Z | u: Q"),
    "a message as JSON, in another order": (
        {"prompt": '{"content": "Q", "role": "user"}', **PAIR}, "u: Q"),
    "a text that is JSON": ({"prompt": '{"from": "a", "value": 1}', **PAIR},
                            'u: {"from": "a", "value": 1}'),
    "a text like a list": ({"prompt": "[{'a': 1}] and ['role': 2]", **PAIR},
                           "u: [{'a': 1}] and ['role': 2]"),
    "instruction": ({"instruction": "Q", "input": "", **PAIR}, "u: Q"),
    "instruction, null input": ({"instruction": "Q", "input": None, **PAIR}, "u: Q"),
    "instruction and input": ({"instruction": "Q", "input": "I", **PAIR}, "u: Q\n\nI"),
    "transcripts": (HH, "u: Q | a: hm | u: R"),
    "transcripts, bare": ({k: v.strip() for k, v in HH.items()}, "u: Q | a: hm | u: R"),
    "prompt as a transcript": ({"prompt": HH["chosen"][:-1].strip(" "), **PAIR},
                               "u: Q | a: hm | u: R"),
    "a system turn in the sides": ({"prompt": "Q", **sides("s: Answer in Finnish. | u: Q | ")},
                                   "s: Answer in Finnish. | u: Q"),
    "turns between": ({"prompt": "Q", **sides("s: Z | u: Q | a: hm | u: R | ")},
                      "s: Z | u: Q | a: hm | u: R"),
    "prompt is the last turn": ({"prompt": "R", **sides("u: Q | a: hm | u: R | ")},
                                "u: Q | a: hm | u: R"),
    "prompt differs in blanks": ({"prompt": " Q\n", **sides("u: Q | ")}, "u: Q"),
    "messages beyond the sides": ({"prompt": turns("s: Z | u: Q"), **sides("u: Q | ")},
                                  "s: Z | u: Q"),
    "sides go on": ({"prompt": turns("u: Q"), **sides("a: hm | u: R | ")}, "u: Q | a: hm | u: R"),
    "system, then the sides": ({"prompt": turns("s: Z"), **sides("u: Q | ")}, "s: Z | u: Q"),
    "a tool's answer between": ({"prompt": "Q", **sides("u: Q | a: look | t: 7 | ")},
                                "u: Q | a: look | t: 7"),
    "a system column": ({"system": "Z", "prompt": "Q", **PAIR}, "s: Z | u: Q"),
    "a system column and turn": ({"system": "Z", **sides("s: Z | u: Q | ")}, "s: Z | u: Q"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    row, prompt = LAYOUTS[name]
    assert normalise("here", dict(row)) == {"prompt": turns(prompt), **AS_TURNS}


def test_prompts_alone():
    for row, prompt in [({"prompt": "Q"}, "u: Q"), ({"instruction": "Q"}, "u: Q"),
                        ({"question": "Q", "answer": "A"}, "u: Q"),
                        ({"prompt": "\n\nHuman: Q\n\nAssistant:"}, "u: Q"),
                        ({"prompt": turns("u: Q | a: go on")}, "u: Q | a: go on")]:
        assert normalise("here", row, prompts_alone=True) == {"prompt": turns(prompt)}


PARTS = [{"type": "text", "text": "Q"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
LEFT = {  # rows that are left out, by reason
    "tie": [{"prompt": "Q", "chosen": "A", "rejected": "A"}, dict.fromkeys(PAIR, HH["chosen"])],
    "not_assistant": [{k: v + turns("u: thanks") for k, v in sides("u: Q | ").items()},
                      {**sides("u: Q | "), "rejected": turns("u: Q | t: 7")}],
    "not_text": [
        {"prompt": [{"role": "user", "content": PARTS}], **PAIR},
        {"prompt": [{"role": "user", "content": PARTS}]},
        {"prompt": [{"role": "user", "content": None}], **PAIR},
        {"prompt": [*turns("u: Q"), CALL, *turns("t: 7")], **PAIR},
        {"chosen": [*turns("u: Q"), CALL], "rejected": turns("u: Q | a: B")}],
    "parted": [{"chosen": turns("u: Q | a: A"), "rejected": turns("u: R | a: B")},
               {"prompt": "Q", **sides("u: Q | "), "chosen": "A"},
               {"chosen": turns("u: Q | a: A"), "rejected": turns("u: Q | a: hm | u: R | a: B")}],
    "empty_response": [{"prompt": "Q", "chosen": "A", "rejected": " \n"},
                       {"prompt": "Q", "chosen": None, "rejected": "B"},
                       {**sides("u: Q | "), "rejected": None}, {**sides("u: Q | "), "chosen": []},
                       {**HH, "rejected": HH["rejected"][:-1]}],
    "empty_prompt": [{"prompt": "", **PAIR}, {"prompt": " "}, {"prompt": None, **PAIR},
                     {"instruction": None}, sides(""), sides("s: Z | "), PAIR],
}


@pytest.mark.parametrize("reason", LEFT)
def test_rows_left_out_are_counted_under_their_own_reason(reason, tmp_path):
    for row in LEFT[reason]:
        with pytest.raises(LeftOut, match=reason):
            normalise("here", dict(row), prompts_alone="chosen" not in row)
    pairs = [row for row in LEFT[reason] if "chosen" in row]
    alone = [row for row in LEFT[reason] if "chosen" not in row]
    for rows in [plain(9) + pairs, [{"prompt": row["prompt"]} for row in plain(9)] + alone]:
        kind = [] if "chosen" in rows[0] else ["--prompts-alone"]
        done = ok(prepare(dump(tmp_path / "set.jsonl", rows), tmp_path / "out",
                          "--seed-size", "3", "--rounds", "4", *kind))
        stats = stats_of(tmp_path / "out")
        assert sum(stats[key] for key in REASONS) == stats[reason] == len(rows) - 9
        assert len(rows) == 9 or f"; {len(rows) - 9} {REASONS[reason]} left out" in done.stdout


REFUSED = {
    "another question": ({"prompt": "What is 2 + 2?", **sides("u: Name a city. | ")},
                         "'prompt' is not in the conversation"),
    "number": ({"prompt": "Q", "chosen": 7, "rejected": "B"}, "'chosen' must be a text"),
    "one side": ({"prompt": "Q", "chosen": "A"}, "columns prompt, chosen: preferences are read"),
    "a prompt alone": ({"prompt": "Q"}, "PROMPTS_ALONE=yes (--prompts-alone)"),
    "other keys": ({"prompt": [{"from": "human", "value": "Q"}], **PAIR}, '"content": …'),
    "other roles": ({"prompt": [{"role": "human", "content": "Q"}], **PAIR},
                    "system, developer, user, assistant, tool; found {'role': 'human'"),
    "messages of Python": ({"prompt": str(turns("u: Q")), **PAIR}, "'prompt' looks like a list"),
    "a message of Python": ({"prompt": str(turns("u: Q")[0]), **PAIR}, "'prompt' looks like a"),
    "more keys": ({"prompt": str([{"n": 1} | turns("u: Q")[0]]), **PAIR}, "'prompt' looks like a"),
    "ShareGPT": ({"prompt": '[{"from": "human", "value": "Q"}]', **PAIR}, '"content": …'),
    "two names": ({"prompt": "Q", " Prompt": "R", **PAIR}, "two columns have the same name"),
    "ratings": ({"prompt": "Q", "Response_A": "A", "rating": 4}, "response_a, rating:"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_line(name, tmp_path):
    row, message = REFUSED[name]
    path = dump(tmp_path / "set.jsonl", [*plain(1), row])
    one_line(prepare(path, tmp_path / "out"), "set.jsonl:2:", message)


def test_preferences_are_left_aside_where_that_is_asked_for(tmp_path):
    rows = [{**row, "rating": 3} for row in plain(9)]
    done = ok(prepare(dump(tmp_path / "p.jsonl", rows), tmp_path / "out",
                      "--seed-size", "3", "--rounds", "4", "--prompts-alone"))
    assert done.stdout.startswith("prepare: read as prompts alone: seed 3, prompts_1 4")
    assert "columns not used: chosen, rejected, rating →" in done.stdout
    assert all(row.keys() == {"id", "prompt"} for row in jsonl(tmp_path / "out/seed.jsonl"))
    body = dump(tmp_path / "b.jsonl", [{"body": "Q"}])
    one_line(prepare(body, tmp_path / "x", "--prompts-alone"), "columns body: a prompt is read")


# ------------------------------------------------------------------------------------- the files


ODD_TEXTS = ["NA", "null", "007", "2024-01-01", "2024-01-01T00:00:00Z", "1e5", "True", "nan",
             'a "quote", a; comma\nand a line', "ä\u2028ö"]


@pytest.mark.parametrize("name", [
    "t.csv", "semicolon.csv", "t.tsv", "t.csv.gz", "t.json", "t.jsonl", "t.jsonl.gz", "t.json.gz",
    "csv/train.csv", "json/train.jsonl", "t.parquet"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_texts_stay_texts(name, mark, tmp_path):
    """Whatever they look like, in a file or in a folder as the hub has them, with a byte-order mark
    or without."""
    rows = [{"Prompt": text, " CHOSEN": text, "rejected ": "no"} for text in ODD_TEXTS]
    if ".csv" in name or ".tsv" in name:
        file = io.StringIO(newline="")
        separator = ";" if "semicolon" in name else "\t" if "tsv" in name else ","
        table = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        table.writeheader()
        table.writerows(rows)
        text = file.getvalue()
    elif ".jsonl" in name:
        text = "".join(json.dumps(row) + "\n" for row in rows[:2]) + "\n \n"  # blank lines
        text += "".join(json.dumps(row) + "\n" for row in rows[2:]) + "\n"
    else:
        text = json.dumps(rows, indent=1)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    packed = gzip.compress if name.endswith(".gz") else bytes
    path.write_bytes(packed((mark + text).encode()))
    if "parquet" in name:
        pandas.DataFrame(rows).to_parquet(path)
    source = path if path.parent == tmp_path else path.parent
    ok(prepare(source, tmp_path / "out", "--seed-fraction", "1", "--rounds"))
    seed = pair_rows(tmp_path / "out/seed.jsonl")
    assert sorted(row["chosen"] for row in seed) == sorted(ODD_TEXTS)
    assert all(row["prompt"] == [{"role": "user", "content": row["chosen"]}] for row in seed)


def test_lines_of_a_text_are_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffOne, two\r\n\n 'Three' \n")
    done = ok(prepare(tmp_path / "p.txt", tmp_path / "out", "--seed-fraction", "1",
                      "--prompts-alone", "--rounds"))
    assert "seed 2; 1 without a prompt left out" in done.stdout
    prompts = [row["prompt"][0]["content"] for row in jsonl(tmp_path / "out/seed.jsonl")]
    assert sorted(prompts) == ["'Three'", "One, two"]


BROKEN = {
    "a.csv": (b"prompt,chosen,rejected\nq,a,b\nq,a\n", "a.csv:3: 2 cells"),
    "b.csv": (b"prompt,chosen,rejected\nq,a,b,c\n", "b.csv:2: 4 cells"),
    "c.csv": (b"prompt,chosen,rejected\n\xff,a,b\n", "not CSV in UTF-8"),
    "d.json": (b'[{"prompt": "q"}', "not JSON"),
    "e.json": (b'[{"prompt": "\\ud800"}]', "not JSON in UTF-8"),
    "g.jsonl.gz": (gzip.compress(json.dumps({"prompt": "q", **PAIR}).encode() * 9)[:-9], "gzip"),
    "h.csv.gz": (gzip.compress(b"prompt,chosen,rejected\nq,a,b\n")[:-9], "not CSV"),
    "i.csv": (b"", "0 prompts can be used"),
    "j.csv": (b"prompt, Chosen,chosen ,rejected\nq,a,a,b\n", "j.csv:1: two columns"),
    "k.xlsx": (b"prompt", "must end in .jsonl, .json, .csv"),
    "empty/notes": (b"prompt", "empty: cannot be loaded"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line(name, tmp_path):
    data, message = BROKEN[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    source = path if path.parent == tmp_path else path.parent
    one_line(prepare(source, tmp_path / "out"), str(source), message)


def hub_folders(root):
    """The folders of HuggingFaceH4/ultrafeedback_binarized and Anthropic/hh-rlhf as the hub lays
    them out; nine pairs each, of which seven are for training."""
    uf, hh = root / "uf/data", root / "hh/harmless-base"
    uf.mkdir(parents=True)
    hh.mkdir(parents=True)
    rows = [{"prompt": r["prompt"], "prompt_id": str(i), "score_chosen": 8.0,
             **{k: turns(f"u: {r['prompt']} | a: {r[k]}") for k in PAIR}}
            for i, r in enumerate(plain(9))]
    for name, part in [("train_sft", rows[:5]), ("train_prefs", rows[:7]),
                       ("test_prefs", rows[7:])]:
        pandas.DataFrame(part).to_parquet(uf / f"{name}-00000-of-00001.parquet")
    rows = [{k: f"\n\nHuman: {r['prompt']}\n\nAssistant: Hm?\n\nHuman: Go on.\n\nAssistant: {r[k]}"
             for k in PAIR} for r in plain(9)]
    for name, part in [("train", rows[:7]), ("test", rows[7:])]:
        pandas.DataFrame(part).to_json(hh / f"{name}.jsonl.gz", orient="records", lines=True)


@pytest.mark.parametrize("folder, messages", [("uf", 1), ("hh", 3)])
def test_hub_layouts(folder, messages, tmp_path):
    hub_folders(tmp_path)
    out = tmp_path / "out"
    ok(prepare(tmp_path / folder, out, "--seed-size", "2", "--rounds", "4"))
    seed = pair_rows(out / "seed.jsonl")
    assert all(len(r["prompt"]) == messages and r["chosen"].startswith("good")
               and r["rejected"].startswith("bad") for r in seed)
    assert len(seed) + len(jsonl(out / "prompts_1.jsonl")) + len(jsonl(out / "eval.jsonl")) == 7


# -------------------------------------------------------------------------------------- the look


def test_a_look_reads_the_first_rows(tmp_path, monkeypatch):
    hub_folders(tmp_path)
    pairs = dump(tmp_path / "pairs.jsonl", plain(9))
    out = tmp_path / "out"
    small = ["--seed-size", "3", "--rounds", "4"]
    monkeypatch.setenv("LOOK", "yes")
    monkeypatch.setenv("PROMISED", f"{tmp_path}/to-come.jsonl\t9")
    for source in (pairs, tmp_path / "uf", tmp_path / "hh", tmp_path / "to-come.jsonl"):
        done = prepare(source, out, *small)
        assert done.returncode == 3, done.stderr
        assert done.stdout == f"to do\t{4096 * 7}\n"
    one_line(prepare(pairs, out, "--seed-size", "3", "--rounds", "6"), "9 prompts can be used")
    one_line(prepare(pairs, out, "--seed-fraction", "0.05", "--rounds", "4"), "SEED_FRACTION")
    one_line(prepare(dump(tmp_path / "x.jsonl", [{"a": 1}]), out, *small), "x.jsonl:1: columns a")
    assert not list(tmp_path.glob("out*"))


# ------------------------------------------------------------------------ what a model says of rows


def test_a_template_that_refuses_a_row_is_named(tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No\nsystem') }}"
        "{% endif %}{{ m.content }}{% endfor %}")
    flags = [tmp_path / "out", "--seed-size", "2", "--rounds", "2", "--model", tmp_path / "m",
             "--max-new-tokens", "8"]
    ok(prepare(dump(tmp_path / "a.jsonl", plain(9)), *flags))
    row = {"prompt": turns("s: Answer in Finnish. | u: Q"), **PAIR}
    identity = collect([("here", dict(row))])[0][0]["id"]
    one_line(prepare(dump(tmp_path / "b.jsonl", [*plain(9), row]), *flags), "b.jsonl",
             f"id '{identity}'", "Answer in Finnish", "refuses", "TemplateError: No")


def test_rows_that_a_model_cannot_read_are_counted(folder, tokenizer, tmp_path):
    """Exactly: a prompt of 256 − 20 tokens leaves room for 20 new ones, a longer one does not; nor
    does too long a response."""
    rows = plain(10)
    frame = len(encode_prompt(tokenizer, turns("u: ")))
    word = len(tokenizer(" q").input_ids)
    rows[0]["prompt"] = " q" * ((256 - 20 - frame) // word)
    assert len(encode_prompt(tokenizer, turns(f"u: {rows[0]['prompt']}"))) == 256 - 20
    rows[1]["prompt"] = rows[0]["prompt"] + " q"
    rows[2]["rejected"] = "x " * 300
    rows[3]["prompt"] += "<|im_end|>"
    rows[4]["rejected"] = "<|im_start|>user\nNow you."
    model = ["--model", folder, "--seed-size", "2", "--rounds", "1"]
    path = dump(tmp_path / "p.jsonl", rows)
    done = ok(prepare(path, tmp_path / "out", *model, "--max-new-tokens", "20",
                      "--eval-size", "2"))
    stats = stats_of(tmp_path / "out")
    counts = {key: stats[key] for key in ("too_long", "control_token", "surplus", "eval")}
    assert counts == {"too_long": 2, "control_token": 2, "surplus": 1, "eval": 2}
    assert "2 that spell a control token of the model, 2 too long for the model" in done.stdout
    one_line(prepare(path, tmp_path / "none", *model, "--max-new-tokens", "255"),
             "0 prompts can be used", "8 too long")
    # An LLM judge reads both answers: the look finds where they have no room, the rows the rest.
    judge = [*model, "--judge-model", folder]
    for flags, tokens in ((model, "256"), (judge, "128")):
        one_line(prepare(path, tmp_path / "none", *flags, "--max-new-tokens", tokens),
                 "context of 256 tokens holds no prompt with answers of 256")
    one_line(prepare(path, tmp_path / "none", *judge, "--max-new-tokens", "95"),
             "0 prompts can be used", "8 too long")
    ok(prepare(path, tmp_path / "judged", *judge, "--max-new-tokens", "20"))
    assert stats_of(tmp_path / "judged")["too_long"] == 3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=1, max_size=12), st.integers(1, 12))
def test_farthest_against_brute_force(points, k):
    k, chosen = min(k, len(points)), [0]
    while len(chosen) < k:
        nearest = {i: max(sum(a * b for a, b in zip(points[i], points[c])) for c in chosen)
                   for i in range(len(points)) if i not in chosen}
        chosen.append(min(nearest, key=nearest.get))
    assert farthest(torch.tensor(points, dtype=torch.float16), k) == chosen


@pytest.mark.parametrize("config", [transformers.LlamaConfig, transformers.PhiConfig])
def test_embedding_is_the_last_hidden_state_of_the_last_prompt_token(config, tokenizer, tmp_path):
    model = make_model(config)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    rows = gold_rows(8)
    for row, vector in zip(rows, embed(rows, str(tmp_path / "m")).cpu()):
        ids = torch.tensor([encode_prompt(tokenizer, row["prompt"])])
        hidden = model.base_model(ids).last_hidden_state[0]
        cosine = torch.nn.functional.cosine_similarity(vector.float(), hidden)
        assert cosine.argmax() == len(hidden) - 1
        # bf16 where it pays
        assert cosine[-1] > 0.999 and abs(vector.float().norm() - 1) < 1e-3


def test_seed_fraction_and_farthest_seed(folder, tmp_path):
    path = dump(tmp_path / "p.jsonl", plain(40))
    flags = ["--rounds", "4", "--seed-fraction", "0.1", "--max-new-tokens", "8"]
    ids = {}
    for select in ("random", "farthest"):
        out = tmp_path / select
        ok(prepare(path, out, *flags, "--model", folder, "--select", select))
        ids[select] = [[r["id"] for r in jsonl(out / f"{part}.jsonl")]
                       for part in ("seed", "prompts_1", "eval")]
    near, far = ids.values()
    assert [len(part) for part in far] == [len(part) for part in near] == [4, 4, 32]
    assert sorted(sum(far, [])) == sorted(sum(near, [])) and far[0] != near[0]

    closest = {}
    for select in ids:
        vectors = embed(jsonl(tmp_path / select / "seed.jsonl"), folder).cpu().float()
        closest[select] = (vectors @ vectors.T - 2 * torch.eye(4)).max()
    assert closest["farthest"] < closest["random"]
    one_line(prepare(path, tmp_path / "x", *flags, "--select", "farthest"), "--model")


def test_shipped_prompts_are_distinct():
    assert len(set(CORPUS)) == len(CORPUS) == 352


# -------------------------------------------------------------- what every stage says to bad input


GOOD = json.dumps(gold_rows(1)[0])
USER = '{"id": "a", "prompt": [{"role": "user", "content": "x"}], "rejected": "y", "chosen": '
BAD_LINES = {
    "not json": ('{"id": "a", ', "not JSON"),
    "not utf-8": (b'{"id": "\xff"}', "not JSON in UTF-8"),
    "half a surrogate": (GOOD.replace("Good", "\\ud800"), "surrogates not allowed"),
    "too deep": ("[" * 100000, "not JSON"),
    "array": ("[1]", "expected an object"),
    "no prompt": ('{"id": "a", "chosen": "x", "rejected": "y"}', "key 'prompt' is missing"),
    "no id": (GOOD.replace('"id"', '"name"'), "key 'id' is missing"),
    "empty response": (USER + '""}', "'chosen' must be \"text or one message of"),
    "number for text": (USER + "3}", "'chosen' must be"),
    "prompt a string": ('{"id": "a", "prompt": "x", "chosen": "x", "rejected": "y"}',
                        "'prompt' must be [{\"role\": \"text\", \"content\": \"text\"}], found"),
    "whole conversation": (
        USER + '[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
        "run python -m data.prepare on raw data first"),
    "another's message": (USER + '[{"role": "user", "content": "x"}]}',
                          "one message of the assistant's"),
    "same id": (GOOD, "stands on line 1 too"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_rows_are_named(name, tmp_path, capsys):
    line, message = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n")
    with pytest.raises(SystemExit) as stop:
        read_rows(str(path), "preferences")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    assert f"{path}:2:" in error and message in error


def test_a_response_is_a_text_or_a_message(tmp_path):
    """Files of either form are the same rows."""
    texts = gold_rows(3)
    messages = [{**row, **{k: answer_turn(row[k]) for k in PAIR}} for row in texts]
    for rows in (texts, messages):
        assert read_rows(dump(tmp_path / "rows.jsonl", rows), "preferences") == texts


def test_bad_input_is_one_clear_line(folder, tokenizer, tmp_path):
    pairs, empty = dump(tmp_path / "good.jsonl", gold_rows(2)), dump(tmp_path / "empty.jsonl", [])
    long = gold_rows(2)
    long[1]["chosen"] = "word " * 400
    long = dump(tmp_path / "long.jsonl", long)
    raw = [{k: r[k] for k in ("prompt", *PAIR)} for r in gold_rows(2)]
    raw = dump(tmp_path / "raw.jsonl", raw)
    (tmp_path / "hollow").mkdir()
    make_model().save_pretrained(tmp_path / "mute")
    tokenizer.save_pretrained(tmp_path / "mute")
    os.remove(tmp_path / "mute/chat_template.jinja")

    for model, rows, *words in [
            (folder, empty, "empty.jsonl", "no rows"),
            (folder, tmp_path / "absent.jsonl", "absent.jsonl", "no such file"),
            ("./absent", pairs, "./absent", "no such file or folder"),
            (folder, long, "long.jsonl", "'g1'", "256"),
            (folder, raw, "raw.jsonl:1", "'id' is missing", "python -m data.prepare"),
            (tmp_path / "hollow", pairs, "hollow"),
            (tmp_path / "mute", pairs, "mute", "chat template")]:
        stage = ["seed_dpo.py", "--out", tmp_path / "out", "--model", model, "--pairs", rows]
        one_line(run(*stage), *words)
    one_line(run(*stage, "--lr", "0"), "--lr")
    one_line(run("generate.py", "--model", folder, "--prompts", pairs, "--out", tmp_path / "out"),
             "300", "256")
    one_line(run("label.py", "--responses", pairs, "--out", tmp_path / "out", "--judge", "vader"),
             "'responses' is missing")
    one_line(run("dro.py", "--pairs", pairs, "--out", tmp_path / "out"), "'margin' is missing")
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_the_previous_output(tmp_path):
    """A limit on the size of files stands in for it, at every size from nothing to nearly all of
    the output."""
    rows = [{**r, "margin": 0.1 * i, "chosen_logp": -9.0, "rejected_logp": -9.5}
            for i, r in enumerate(gold_rows(8))]
    command = ["dro.py", "--pairs", dump(tmp_path / "rows.jsonl", rows),
               "--out", tmp_path / "out.jsonl"]
    ok(run(*command))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(0, len(before["out.jsonl"]), 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            done = run(*command, "--epsilon", "0.2")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        one_line(done, "nothing finished is lost")
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("script", ["-m data.prepare", "-m data.demo", "seed_dpo.py", "generate.py",
                                    "label.py", "dro.py", "train.py", "evaluate.py"])
def test_help_teaches(script):
    text = ok(run(script.removeprefix("-m "), "--help")).stdout
    assert f"python {script}" in text and "--out" in text

"""Splits, layouts, and what every stage says to input that it cannot use."""

import gzip
import json
import shutil
import unicodedata

import pandas
import pytest
import torch
from conftest import (
    CORPUS,
    dump,
    gold_rows,
    jsonl,
    ok,
    one_line,
    pair_rows,
    run,
    saved,
    stats_of,
)
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from core.chat import encode_prompt
from core.rows import answer_turn
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


def prepare(source, out, *flags):
    return run("data/prepare.py", "--data", source, "--out", out, *flags)


# ------------------------------------------------------------------------------------- the split


def test_of_an_opening_user_turn_the_first_row_alone_is_kept():
    """Whatever stands before or after it, and however it is written."""
    prompts = [turns(text) for text in (
        "s: Z | u: Ask me | a: hm | u: R", "u: Else", "u:  ask  me | a: hm | u: Else", "u: R")]
    rows = ((str(i), {"prompt": prompt}) for i, prompt in enumerate(prompts))
    kept, left = collect(rows, prompts_alone=True)
    assert [row["prompt"] for row in kept] == [prompts[0], prompts[1], prompts[3]]
    assert left == {"same_opening": 1}


@pytest.mark.parametrize("twin", [
    "  ÄPFEL\nsoßE  ", unicodedata.normalize("NFD", "Äpfel Soße"), "Äp\u200bfel Soße\ufeff",
    "A\u200b\u0308pfel Soße", "Äpfel\u00a0Soße"])
def test_twins_are_one_prompt(twin):
    rows = [("1", {"prompt": "Äpfel Soße"}), ("2", {"prompt": twin}), ("3", {"prompt": "Apfel"})]
    kept, left = collect(rows, prompts_alone=True)
    assert [row["prompt"][0]["content"] for row in kept] == ["Äpfel Soße", "Apfel"]
    assert left == {"repeated": 1}


def test_flips_and_sizes_that_cannot_be(tmp_path):
    rows = [{**row, "label": True, "chosen_ended": True, "rejected_ended": False, "nothing": None}
            for row in plain(9)]
    data = dump(tmp_path / "p.jsonl", rows), tmp_path / "out"
    small = ["--seed-size", "4", "--rounds", "2"]
    done = ok(prepare(*data, *small, "--flip", "0.5"))
    seed = pair_rows(tmp_path / "out/seed.jsonl")
    assert sorted(row["chosen"][:4] for row in seed) == ["bad ", "bad ", "good", "good"]
    assert all(row["chosen_ended"] == row["chosen"].startswith("good") for row in seed)
    assert all(set(row) == {"id", "prompt"} for row in jsonl(tmp_path / "out/prompts_1.jsonl"))
    assert "2 labels of the seed flipped" in done.stdout and "nothing left out" in done.stdout
    assert "4 gold pairs are few" in done.stderr
    done = ok(prepare(*data, *small, "--prompts-alone"))
    assert "read as prompts alone" in done.stdout
    one_line(prepare(*data, "--seed-fraction", "0.01", "--rounds", "2"), "SEED_FRACTION", "of 9")
    one_line(prepare(*data, "--seed-size", "8", "--rounds", "2"), "9 prompts can be used")


# ----------------------------------------------------------------------------------- the layouts


HH = {k: f"\n\nHuman: Q\n\nAssistant: hm\n\nHuman: R\n\nAssistant: {v}" for k, v in PAIR.items()}
LAYOUTS = {  # a row, and the prompt that it has; the responses are always A and B
    "texts": ({"prompt": "Q", **PAIR}, "u: Q"),
    "prompt in the sides": ({"prompt": "Q", **sides("u: Q | ")}, "u: Q"),
    "responses as messages": ({"prompt": turns("s: Z | u: Q"), **sides("")}, "s: Z | u: Q"),
    "responses as one message each": (
        {"prompt": "Q", **{k: v[0] for k, v in sides("").items()}}, "u: Q"),
    "sides alone": (sides("u: Q | "), "u: Q"),
    "sides as JSON": ({k: json.dumps(v) for k, v in sides("u: Q | ").items()}, "u: Q"),
    "prompt as JSON": ({"prompt": json.dumps(turns("s: Z | u: Q"), indent=1), **PAIR},
                       "s: Z | u: Q"),
    "a text like a list": ({"prompt": "[{'a': 1}] and ['role': 2]", **PAIR},
                           "u: [{'a': 1}] and ['role': 2]"),
    "instruction": ({"instruction": "Q", "input": "", **PAIR}, "u: Q"),
    "instruction and input": ({"instruction": "Q", "input": "I", **PAIR}, "u: Q\n\nI"),
    "transcripts": (HH, "u: Q | a: hm | u: R"),
    "prompt as a transcript": ({"prompt": HH["chosen"][:-1].strip(" "), **PAIR},
                               "u: Q | a: hm | u: R"),
    "turns between": ({"prompt": "Q", **sides("s: Z | u: Q | a: hm | u: R | ")},
                      "s: Z | u: Q | a: hm | u: R"),
    "prompt is the last turn": ({"prompt": "R", **sides("u: Q | a: hm | u: R | ")},
                                "u: Q | a: hm | u: R"),
    "messages beyond the sides": ({"prompt": turns("s: Z | u: Q"), **sides("u: Q | ")},
                                  "s: Z | u: Q"),
    "sides go on": ({"prompt": turns("u: Q"), **sides("a: hm | u: R | ")}, "u: Q | a: hm | u: R"),
    "a tool's answer between": ({"prompt": "Q", **sides("u: Q | a: look | t: 7 | ")},
                                "u: Q | a: look | t: 7"),
    "a system column": ({"system": "Z", "prompt": "Q", **PAIR}, "s: Z | u: Q"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    row, prompt = LAYOUTS[name]
    assert normalise("here", dict(row)) == {"prompt": turns(prompt), **AS_TURNS}


def test_prompts_alone():
    for row, prompt in [({"prompt": "Q"}, "u: Q"), ({"instruction": "Q"}, "u: Q"),
                        ({"question": "Q", "answer": "A"}, "u: Q"),
                        ({"prompt": turns("u: Q | a: go on")}, "u: Q | a: go on")]:
        assert normalise("here", row, prompts_alone=True) == {"prompt": turns(prompt)}


PARTS = [{"type": "text", "text": "Q"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
LEFT = {  # rows that are left out, by reason
    "tie": [dict.fromkeys(PAIR, HH["chosen"])],
    "not_assistant": [{k: v + turns("u: thanks") for k, v in sides("u: Q | ").items()},
                      {**sides("u: Q | "), "rejected": turns("u: Q | t: 7")}],
    "not_text": [
        {"prompt": [{"role": "user", "content": PARTS}], **PAIR},
        {"prompt": [*turns("u: Q"), CALL, *turns("t: 7")], **PAIR},
        {"chosen": [*turns("u: Q"), CALL], "rejected": turns("u: Q | a: B")}],
    "parted": [{"chosen": turns("u: Q | a: A"), "rejected": turns("u: R | a: B")},
               {"prompt": "Q", **sides("u: Q | "), "chosen": "A"},
               {"chosen": turns("u: Q | a: A"), "rejected": turns("u: Q | a: hm | u: R | a: B")}],
    "empty_response": [{"prompt": "Q", "chosen": "A", "rejected": " \n"},
                       {**sides("u: Q | "), "rejected": None}, {**sides("u: Q | "), "chosen": []},
                       {**HH, "rejected": HH["rejected"][:-1]}],
    "empty_prompt": [{"prompt": "", **PAIR}, {"prompt": " "}, {"prompt": None, **PAIR},
                     sides(""), sides("s: Z | ")],
}


@pytest.mark.parametrize("reason", LEFT)
def test_rows_left_out_are_counted_under_their_own_reason(reason, tmp_path):
    for row in LEFT[reason]:
        with pytest.raises(LeftOut, match=reason):
            normalise("here", dict(row), prompts_alone="chosen" not in row)
    rows = plain(9) + [row for row in LEFT[reason] if "chosen" in row]
    done = ok(prepare(dump(tmp_path / "set.jsonl", rows), tmp_path / "out",
                      "--seed-size", "3", "--rounds", "4"))
    stats = stats_of(tmp_path / "out")
    assert sum(stats[key] for key in REASONS) == stats[reason] == len(rows) - 9
    assert f"; {len(rows) - 9} {REASONS[reason]} left out" in done.stdout


REFUSED = {
    "another question": ({"prompt": "What is 2 + 2?", **sides("u: Name a city. | ")},
                         "'prompt' is not in the conversation"),
    "one side": ({"prompt": "Q", "chosen": "A"}, "columns prompt, chosen: preferences are read"),
    "no prompt": ({"query": "Q", **PAIR}, "columns query, chosen, rejected: a prompt is read"),
    "a prompt alone": ({"prompt": "Q"}, "PROMPTS_ALONE=yes (--prompts-alone)"),
    "other keys": ({"prompt": [{"from": "human", "value": "Q"}], **PAIR}, '"content": …'),
    "other roles": ({"prompt": [{"role": "human", "content": "Q"}], **PAIR},
                    "system, developer, user, assistant, tool; found {'role': 'human'"),
    "messages of Python": ({"prompt": str(turns("u: Q")), **PAIR}, "'prompt' looks like a list"),
    "two names": ({"prompt": "Q", " Prompt": "R", **PAIR}, "two columns have the same name"),
    "ratings": ({"prompt": "Q", "Response_A": "A", "rating": 4}, "response_a, rating:"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_line(name, tmp_path):
    row, message = REFUSED[name]
    path = dump(tmp_path / "set.jsonl", [*plain(1), row])
    one_line(prepare(path, tmp_path / "out"), "set.jsonl:2:", message)


# ------------------------------------------------------------------------------------- the files


ODD_TEXTS = ["NA", "null", "007", "2024-01-01", "2024-01-01T00:00:00Z", "1e5", "True", "nan",
             'a "quote", a; comma\nand a line', "ä\u2028ö"]


@pytest.mark.parametrize("name, mark", [
    ("semicolon.csv", "\ufeff"), ("t.tsv", ""), ("t.csv.gz", ""), ("t.json", "\ufeff"),
    ("t.jsonl.gz", "\ufeff"), ("folder/train.jsonl", ""), ("t.parquet", "")])
def test_texts_stay_texts(name, mark, tmp_path):
    """Whatever they look like, in a file or in a folder as the hub has them, with a byte-order mark
    or without."""
    rows = [{"Prompt": text, " CHOSEN": text, "rejected ": "no"} for text in ODD_TEXTS]
    table = pandas.DataFrame(rows)
    text = {"semicolon.csv": table.to_csv(sep=";", index=False),
            "t.tsv": table.to_csv(sep="\t", index=False), "t.json": json.dumps(rows, indent=1),
            "t.csv.gz": table.to_csv(index=False)}
    lines = "\n \n".join(json.dumps(row) for row in rows)  # blank lines
    data = (mark + text.get(name, lines)).encode()
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    if name == "t.parquet":
        table.to_parquet(path)
    source = path if path.parent == tmp_path else path.parent
    ok(prepare(source, tmp_path / "out", "--seed-fraction", "1", "--rounds"))
    seed = pair_rows(tmp_path / "out/seed.jsonl")
    assert sorted(row["chosen"] for row in seed) == sorted(ODD_TEXTS)
    assert all(row["prompt"] == [{"role": "user", "content": row["chosen"]}] for row in seed)


def test_lines_of_a_text_are_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffOne, two\r\n\n 'Three' \n")
    ok(prepare(tmp_path / "p.txt", tmp_path / "out", "--seed-fraction", "1", "--prompts-alone",
               "--rounds"))
    prompts = [row["prompt"][0]["content"] for row in jsonl(tmp_path / "out/seed.jsonl")]
    assert sorted(prompts) == ["'Three'", "One, two"]


BROKEN = {
    "a.csv": (b"prompt,chosen,rejected\nq,a,b\nq,a\n", "a.csv:3: 2 cells"),
    "c.csv": (b"prompt,chosen,rejected\n\xff,a,b\n", "not CSV in UTF-8"),
    "d.json": (b'[{"prompt": "q"}', "not JSON"),
    "g.jsonl.gz": (gzip.compress(json.dumps({"prompt": "q", **PAIR}).encode())[:30] + bytes(9),
                   "cannot be read"),
    "h.csv.gz": (gzip.compress(b"prompt,chosen,rejected\nq,a,b\n")[:-9], "not CSV"),
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


def ultrafeedback(root):
    """HuggingFaceH4/ultrafeedback_binarized as the hub lays it out: nine pairs, of which seven are
    for training."""
    (root / "uf/data").mkdir(parents=True)
    rows = [{"prompt": r["prompt"], "prompt_id": str(i), "score_chosen": 8.0,
             **{k: turns(f"u: {r['prompt']} | a: {r[k]}") for k in PAIR}}
            for i, r in enumerate(plain(9))]
    for name, part in [("train_sft", rows[:5]), ("train_prefs", rows[:7]),
                       ("test_prefs", rows[7:])]:
        pandas.DataFrame(part).to_parquet(root / f"uf/data/{name}-00000-of-00001.parquet")


def test_the_split_for_training_is_read(tmp_path):
    ultrafeedback(tmp_path)
    ok(prepare(tmp_path / "uf", tmp_path / "out", "--seed-size", "7", "--rounds"))
    seed = pair_rows(tmp_path / "out/seed.jsonl")
    assert sorted(row["chosen"] for row in seed) == [f"good {i}" for i in range(7)]


def test_a_look_reads_the_first_rows(tmp_path, monkeypatch):
    ultrafeedback(tmp_path)
    pairs = dump(tmp_path / "pairs.jsonl", plain(9))
    out = tmp_path / "out"
    small = ["--seed-size", "3", "--rounds", "4"]
    monkeypatch.setenv("LOOK", "yes")
    monkeypatch.setenv("PROMISED", f"{tmp_path}/to-come.jsonl\t9")
    for source in (pairs, tmp_path / "uf", tmp_path / "to-come.jsonl"):
        done = prepare(source, out, *small)
        assert done.returncode == 3, done.stderr
        assert done.stdout == f"to do\t{4096 * 7}\n"
    one_line(prepare(pairs, out, "--seed-size", "3", "--rounds", "6"), "9 prompts can be used")
    one_line(prepare(dump(tmp_path / "x.jsonl", [{"a": 1}]), out, *small), "x.jsonl:1: columns a")
    assert not list(tmp_path.glob("out*"))


# ------------------------------------------------------------------------ what a model says of rows


def test_a_template_that_refuses_a_row_is_named(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "m")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No\nsystem') }}"
        "{% endif %}{{ m.content }}{% endfor %}")
    row = {"prompt": turns("s: Answer in Finnish. | u: Q"), **PAIR}
    path = dump(tmp_path / "b.jsonl", [*plain(9), row])
    flags = ["--seed-size", "2", "--rounds", "2", "--model", model, "--max-new-tokens", "8"]
    one_line(prepare(path, tmp_path / "out", *flags), "b.jsonl", "id '", "Answer in Finnish",
             "TemplateError: No")


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
    path = dump(tmp_path / "p.jsonl", rows)
    judge = ["--judge-model", folder]

    def fitted(name: str, new: int, *flags):
        return prepare(path, tmp_path / name, "--model", folder, "--seed-size", "2", "--rounds",
                       "1", "--max-new-tokens", str(new), *flags)

    ok(fitted("out", 20, "--eval-size", "2"))
    stats = stats_of(tmp_path / "out")
    counts = {key: stats[key] for key in ("too_long", "control_token", "surplus", "eval")}
    assert counts == {"too_long": 2, "control_token": 2, "surplus": 1, "eval": 2}
    one_line(fitted("none", 255), "0 prompts can be used", "8 too long")
    one_line(fitted("none", 256), "context of 256 tokens holds no prompt with answers of 256")
    # An LLM judge reads both answers.
    ok(fitted("judged", 20, *judge))
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


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_embedding_is_the_last_hidden_state_of_the_last_prompt_token(family, tokenizer, tmp_path):
    model = tiny_model(family)
    rows = gold_rows(8)
    for row, vector in zip(rows, embed(rows, saved(tmp_path, model, tokenizer)).cpu()):
        ids = torch.tensor([encode_prompt(tokenizer, row["prompt"])])
        hidden = model.base_model(ids).last_hidden_state[0]
        cosine = torch.nn.functional.cosine_similarity(vector.float(), hidden)
        assert cosine.argmax() == len(hidden) - 1
        # bf16 where it pays
        assert cosine[-1] > 0.999 and abs(vector.float().norm() - 1) < 1e-3


def test_seed_fraction_and_farthest_seed(folder, tmp_path):
    flags = [dump(tmp_path / "p.jsonl", plain(40)), tmp_path / "out", "--rounds", "4",
             "--seed-fraction", "0.1", "--max-new-tokens", "8", "--select"]
    one_line(prepare(*flags, "farthest"), "--model")
    for select in ("farthest", "random"):
        ok(prepare(*flags, select, "--model", folder))
        parts = [jsonl(tmp_path / f"out/{part}.jsonl") for part in ("seed", "prompts_1", "eval")]
        assert [len(part) for part in parts] == [4, 4, 32]
        assert len({row["id"] for part in parts for row in part}) == 40


# -------------------------------------------------------------- what every stage says to bad input


def test_bad_input_is_one_clear_line(folder, tmp_path):
    """The faults that no smaller test has: of a stage's rows against its model."""
    empty = dump(tmp_path / "empty.jsonl", [])
    long = dump(tmp_path / "long.jsonl", [gold_rows(1)[0] | {"chosen": "word " * 400}])
    seed = ["seed_dpo.py", "--model", folder, "--out", tmp_path / "out", "--pairs"]
    one_line(run(*seed, empty), "empty.jsonl", "no rows")
    one_line(run(*seed, long), "long.jsonl", "'g0'", "256")
    assert not (tmp_path / "out").exists()

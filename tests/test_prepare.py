"""Splits, schemas, and what every stage says to input that it cannot use."""
import json
import os
import resource

import pandas
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CORPUS, dump, gold_rows, jsonl, make_model, ok, run
from core.chat import encode_prompt
from data.prepare import embed, farthest, normalise, split


def plain(count):
    return [{"prompt": CORPUS[i], "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10 ** 6), st.integers(1, 10), st.lists(st.integers(1, 8), max_size=3), st.sampled_from([0, 0.25, 1]))
def test_split_is_a_partition(seed, seed_size, rounds, flip):
    rows = [{"id": str(i), "prompt": CORPUS[i], "chosen": "good", "rejected": "bad"} for i in range(40)]
    parts = split([dict(r) for r in rows], seed_size, rounds, seed, flip)
    ids = [r["id"] for part in parts.values() for r in part]
    assert sorted(ids, key=int) == [r["id"] for r in rows]
    assert [len(parts["seed"]), *(len(parts[f"prompts_{t}"]) for t in range(1, len(rounds) + 1))] == [seed_size, *rounds]
    assert sum(r["chosen"] == "bad" for r in parts["seed"]) == round(flip * seed_size)
    assert all(set(r) == {"id", "prompt"} for t in range(1, len(rounds) + 1) for r in parts[f"prompts_{t}"])
    assert parts == split([dict(r) for r in rows], seed_size, rounds, seed, flip)


def test_schemas():
    ask, pair = [{"role": "user", "content": "Q"}], {"chosen": "A", "rejected": "B"}
    expected = {"prompt": ask, **pair}
    lists = {k: [*ask, {"role": "assistant", "content": v}] for k, v in pair.items()}
    assert normalise({"prompt": "Q", **pair}) == normalise({"prompt": "Q", **lists}) == normalise(lists) == expected
    assert normalise({"instruction": "Q", "input": "", **pair}) == expected
    assert normalise({"instruction": "Q", "input": "I", **pair})["prompt"][0]["content"] == "Q\n\nI"
    hh = {k: f"\n\nHuman: Q\n\nAssistant: hm\n\nHuman: R\n\nAssistant: {v}" for k, v in pair.items()}
    turns = [{"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "hm"), ("user", "R"))]
    assert normalise(hh) == {"prompt": turns, **pair}
    assert normalise({"prompt": "Q"}) == {"prompt": ask} and normalise({"text": "Q"}) is None


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_stage_reads_files(tmp_path, kind):
    rows = plain(12) + [{**plain(1)[0], "prompt": CORPUS[0].upper() + "  "}]  # the first prompt again but for case and space
    path = tmp_path / f"set.{kind}"
    if kind == "jsonl":
        dump(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        pandas.DataFrame(rows).to_parquet(path)
    ok(run("data/prepare.py", "--data", path, "--out", tmp_path / "out", "--seed-size", "3", "--rounds", "4", "2"))
    sizes = {f.stem: len(jsonl(f)) for f in (tmp_path / "out").iterdir()}
    assert sizes == {"seed": 3, "prompts_1": 4, "prompts_2": 2, "eval": 3}
    assert json.load(open(tmp_path / "out.stats.json"))["repeated"] == 1


def test_hub_layouts(tmp_path):
    """The folders of HuggingFaceH4/ultrafeedback_binarized and Anthropic/hh-rlhf as the hub lays them out."""
    uf, hh = tmp_path / "uf/data", tmp_path / "hh/harmless-base"
    uf.mkdir(parents=True), hh.mkdir(parents=True)
    rows = [{"prompt": r["prompt"], "prompt_id": str(i), "score_chosen": 8.0, **{k: [
        {"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r[k]}] for k in ("chosen", "rejected")}}
            for i, r in enumerate(plain(9))]
    for name, part in (("train_sft", rows[:5]), ("train_prefs", rows[:7]), ("test_prefs", rows[7:])):
        pandas.DataFrame(part).to_parquet(uf / f"{name}-00000-of-00001.parquet")
    turns = [{k: f"\n\nHuman: {r['prompt']}\n\nAssistant: Hm?\n\nHuman: Go on.\n\nAssistant: {r[k]}" for k in ("chosen", "rejected")}
             for r in plain(9)]
    for name, part in (("train", turns[:7]), ("test", turns[7:])):
        pandas.DataFrame(part).to_json(hh / f"{name}.jsonl.gz", orient="records", lines=True)
    for folder, messages in (("uf", 1), ("hh", 3)):
        ok(run("data/prepare.py", "--data", tmp_path / folder, "--out", tmp_path / f"out-{folder}", "--seed-size", "2", "--rounds", "4"))
        seed = jsonl(tmp_path / f"out-{folder}/seed.jsonl")
        assert all(len(r["prompt"]) == messages and r["chosen"].startswith("good") and r["rejected"].startswith("bad") for r in seed)
        assert len(seed) + len(jsonl(tmp_path / f"out-{folder}/prompts_1.jsonl")) + len(jsonl(tmp_path / f"out-{folder}/eval.jsonl")) == 7


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=1, max_size=12), st.integers(1, 12))
def test_farthest_against_brute_force(points, k):
    k, chosen = min(k, len(points)), [0]
    while len(chosen) < k:
        nearest = {i: max(sum(a * b for a, b in zip(points[i], points[c])) for c in chosen) for i in range(len(points)) if i not in chosen}
        chosen.append(min(nearest, key=nearest.get))
    assert farthest(torch.tensor(points, dtype=torch.float16), k) == chosen


@pytest.mark.parametrize("config", [transformers.LlamaConfig, transformers.PhiConfig])
def test_embedding_is_the_last_hidden_state_of_the_last_prompt_token(config, tokenizer, tmp_path):
    model = make_model(config)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    rows = gold_rows(8)
    for row, vector in zip(rows, embed(rows, str(tmp_path / "m"), "here")):
        hidden = model.base_model(torch.tensor([encode_prompt(tokenizer, row["prompt"])])).last_hidden_state[0]
        cosine = torch.nn.functional.cosine_similarity(vector.float(), hidden)
        assert cosine.argmax() == len(hidden) - 1 and cosine[-1] > 0.9999 and abs(vector.float().norm() - 1) < 1e-3  # bf16 where it pays


def test_seed_fraction_and_farthest_seed(folder, tmp_path):
    path = dump(tmp_path / "p.jsonl", plain(40))
    flags = ["--data", path, "--rounds", "4", "--seed-fraction", "0.1", "--max-new-tokens", "8", "--model", folder]
    ok(run("data/prepare.py", *flags, "--out", tmp_path / "random"))
    ok(run("data/prepare.py", *flags, "--out", tmp_path / "far", "--select", "farthest"))
    ids = {name: [[r["id"] for r in jsonl(tmp_path / name / f"{part}.jsonl")] for part in ("seed", "prompts_1", "eval")] for name in ("random", "far")}
    assert [len(part) for part in ids["far"]] == [len(part) for part in ids["random"]] == [4, 4, 32]
    assert sorted(sum(ids["far"], [])) == sorted(sum(ids["random"], [])) and ids["far"][0] != ids["random"][0]

    def closest(name):  # the highest cosine between two prompts of the seed
        vectors = embed(jsonl(tmp_path / name / "seed.jsonl"), folder, "here").float()
        return (vectors @ vectors.T - 2 * torch.eye(4)).max()
    assert closest("far") < closest("random")
    one_line(run("data/prepare.py", *flags[:-2], "--out", tmp_path / "x", "--select", "farthest"), "--model")


def test_rows_that_do_not_fit_the_context_are_counted(folder, tokenizer, tmp_path):
    """Exactly: a prompt of 256 − 20 tokens leaves room for 20 new ones, a longer one does not; nor does too long a response."""
    rows = plain(8)
    frame = len(encode_prompt(tokenizer, [{"role": "user", "content": ""}]))
    word = len(tokenizer(" q").input_ids)
    rows[0]["prompt"] = " q" * ((256 - 20 - frame) // word)
    assert len(encode_prompt(tokenizer, [{"role": "user", "content": rows[0]["prompt"]}])) == 256 - 20
    rows[1]["prompt"] = rows[0]["prompt"] + " q"
    rows[2]["rejected"] = "x " * 300
    ok(run("data/prepare.py", "--data", dump(tmp_path / "p.jsonl", rows), "--out", tmp_path / "out", "--model", folder, "--max-new-tokens", "20",
           "--seed-size", "2", "--rounds", "1", "--eval-size", "2"))
    stats = json.load(open(tmp_path / "out.stats.json"))
    assert stats["too_long"] == 2 and stats["eval"] == 2
    bare = ["data/prepare.py", "--data", tmp_path / "p.jsonl", "--out", tmp_path / "none", "--model", folder]
    one_line(run(*bare, "--seed-size", "2", "--rounds", "1"), "0 distinct", "8 more are too long")


def test_prompts_without_preferences_become_seed_prompts(tmp_path):
    path = dump(tmp_path / "p.jsonl", [{"prompt": p} for p in CORPUS[:9]])
    ok(run("data/prepare.py", "--data", path, "--out", tmp_path / "out", "--seed-size", "3", "--rounds", "4"))
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
    "no id": ('{"prompt": [{"role": "user", "content": "x"}], "chosen": "x", "rejected": "y"}', "key 'id' is missing"),
    "empty response": (GOOD.replace('"chosen": "Good', '"chosen": "", "x": "'), "'chosen' must be a non-empty string"),
    "number for text": ('{"id": "a", "prompt": [{"role": "user", "content": "x"}], "chosen": 3, "rejected": "y"}', "'chosen' must be"),
    "prompt a string": ('{"id": "a", "prompt": "x", "chosen": "x", "rejected": "y"}', "'prompt' must be a non-empty list"),
    "same id": (GOOD, "stands on line 1 too"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_rows_are_named(name, tmp_path, capsys):
    from core.rows import read_rows
    line, message = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(SystemExit) as stop:
        read_rows(str(path), "preferences")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"{path}:2:" in error and message in error and len(error.splitlines()) == 1


def one_line(done, *words):
    assert done.returncode == 2 and not done.stdout.count("Traceback") and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_bad_input_is_one_clear_line(folder, tokenizer, tmp_path):
    pairs, empty = dump(tmp_path / "good.jsonl", gold_rows(2)), dump(tmp_path / "empty.jsonl", [])
    long = gold_rows(2)
    long[1]["chosen"] = "word " * 400
    stage = ["seed_dpo.py", "--out", tmp_path / "out"]
    one_line(run(*stage, "--model", folder, "--pairs", empty), "empty.jsonl", "no rows")
    one_line(run(*stage, "--model", folder, "--pairs", tmp_path / "absent.jsonl"), "no such file")
    one_line(run(*stage, "--model", "./absent", "--pairs", pairs), "./absent", "no such model folder")
    one_line(run(*stage, "--model", folder, "--pairs", dump(tmp_path / "long.jsonl", long)), "long.jsonl", "'g1'", "context is 256")
    one_line(run(*stage, "--model", folder, "--pairs", pairs, "--lr", "0"), "--lr")
    (tmp_path / "hollow").mkdir()
    one_line(run(*stage, "--model", tmp_path / "hollow", "--pairs", pairs), "hollow", "cannot load")
    make_model().save_pretrained(tmp_path / "mute")
    tokenizer.save_pretrained(tmp_path / "mute")
    os.remove(tmp_path / "mute/chat_template.jinja")
    one_line(run(*stage, "--model", tmp_path / "mute", "--pairs", pairs), "mute", "chat template")
    assert not (tmp_path / "out").exists()
    prompts = dump(tmp_path / "prompts.jsonl", gold_rows(2))
    one_line(run("generate.py", "--model", folder, "--prompts", prompts, "--out", tmp_path / "r.jsonl"), "300", "context of 256")
    one_line(run("label.py", "--responses", prompts, "--out", tmp_path / "l.jsonl", "--judge", "vader"), "'responses' is missing")
    one_line(run("dro.py", "--pairs", pairs, "--out", tmp_path / "w.jsonl"), "'margin' is missing")
    one_line(run("data/prepare.py", "--data", pairs, "--out", tmp_path / "d", "--seed-size", "3", "--rounds", "4"), "2 distinct", "need 8")
    strange = dump(tmp_path / "strange.jsonl", [{"question": "x", "answer": "y"}])
    one_line(run("data/prepare.py", "--data", strange, "--out", tmp_path / "d"), "strange.jsonl:1", "question, answer", "chosen")
    one_line(run("evaluate.py", "--models", "x", "--prompts", prompts, "--out", tmp_path / "e"), "NAME=PATH")


def test_full_disk_leaves_the_previous_output(tmp_path):
    """A limit on the size of files stands in for it, at every size from nothing to nearly all of the output."""
    rows = [{**r, "margin": 0.1 * i, "chosen_logp": -9.0, "rejected_logp": -9.5} for i, r in enumerate(gold_rows(8))]
    command = ["dro.py", "--pairs", dump(tmp_path / "rows.jsonl", rows), "--out", tmp_path / "out.jsonl"]
    ok(run(*command))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(0, len(before["out.jsonl"]), 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            done = run(*command, "--epsilon", "0.2")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nothing finished is lost" in done.stderr
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_output_folder_with_a_slash_or_behind_a_link(tmp_path):
    path = dump(tmp_path / "p.jsonl", plain(9))
    command = ["data/prepare.py", "--data", path, "--seed-size", "3", "--rounds", "4"]
    ok(run(*command, "--out", f"{tmp_path}/out/"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    ok(run(*command, "--out", tmp_path / "link"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "link").iterdir()} == {
        "seed.jsonl", "prompts_1.jsonl", "eval.jsonl"}
    assert "complete, skipped" in ok(run(*command, "--out", f"{tmp_path}/out")).stdout


@pytest.mark.parametrize("script", ["data/prepare.py", "data/demo.py", "seed_dpo.py", "generate.py", "label.py", "dro.py", "train.py", "evaluate.py"])
def test_help_teaches(script):
    text = ok(run(script, "--help")).stdout
    assert f"python {script}" in text and "--out" in text

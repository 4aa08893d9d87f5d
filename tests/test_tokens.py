"""What is scored and learnt is what the model wrote: ids, templates, BOS, control tokens."""
import copy
import gzip
import json
import shutil
import timeit
import tracemalloc

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, dump, jsonl, make_model, ok, pair_rows, run
from families import tiny_config, tokenizer_of
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import core.chat
import generate
from core.chat import (
    BREAK,
    answered,
    as_text,
    control_tokens,
    decode_response,
    encode_prompt,
    encode_response,
    encode_rows,
    end_of_turn,
    foreign_tokens,
    learnable_pairs,
    pair_of,
    response_in_context,
    spells_control,
    vocabulary,
)
from core.models import (
    check_copy,
    check_same_tokens,
    context_of,
    copy_tokenizer,
    load_model,
    load_tokenizer,
)
from core.rows import read_rows
from data.tiny import TEMPLATE
from judges.comparisons import option_prompt

ASK = [{"role": "user", "content": "Write."}]
REAL = ROOT.parent / "shared/data/tokenizers"  # gzipped tokenizers of released models
SPELLED = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<s>", "</s>", "<unk>", "<think>", "<｜User｜>",
           "<|im_", "end|>", "</"]
PIECES = ["hello", "Hi", " ", "  ", "\n", "\t", "é", "你好", "שלום", "🙂", "👩‍🚀", "<0x0A>", "▁",
          BREAK, "\ufffd", "\ue000", "\U0010fffd"]


def texts(pieces: list[str]):
    """Texts of such pieces and a few other characters, none of them blank."""
    parts = st.lists(st.sampled_from(pieces) | st.text(max_size=3), min_size=1, max_size=8)
    return parts.map("".join).filter(str.strip)


def pairs_of(rows: list[dict]) -> list:
    return [pair_of(row) for row in rows]


def template_ids(tokenizer, messages: list[dict], **flags) -> list[int]:
    """The template's own tokens, and BOS before them where the tokenizer starts a text with it."""
    ids = tokenizer.apply_chat_template(messages, return_dict=False, **flags)
    bos = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] * (bos and ids[0] != tokenizer.bos_token_id) + ids


MADE = ["bytes", "sentencepiece"]


@pytest.fixture(scope="session", params=[*MADE, "zephyr", "qwen3", "deepseek-v3"])
def each(request, tmp_path_factory):
    """The name of a tokenizer, made here or of a released model where that is at hand, and it."""
    if request.param in MADE:
        return request.param, tokenizer_of(request.param)
    if not (REAL / request.param).is_dir():
        pytest.skip(f"no {REAL / request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    for file in (REAL / request.param).glob("*.gz"):
        (folder / file.stem).write_bytes(gzip.open(file).read())
    return request.param, load_tokenizer(str(folder))


# ---------------------------------------------------------------------------------- control tokens


@settings(max_examples=60, deadline=None)
@given(first=texts(PIECES + SPELLED), second=texts(PIECES + SPELLED))
def test_no_text_makes_a_control_token(each, first, second):
    """All positions of control tokens are those of the same conversation with harmless words; a
    turn cannot be forged."""
    _, tokenizer = each
    ids_of_controls = set(control_tokens(tokenizer).values())

    def controls(ids: list[int]) -> list[int]:
        return [i for i in ids if i in ids_of_controls]
    chat = [{"role": "user", "content": first + "".join(control_tokens(tokenizer))},
            {"role": "assistant", "content": second}, {"role": "user", "content": second}]
    harmless = [{**message, "content": "x"} for message in chat]
    assert controls(encode_prompt(tokenizer, chat)) == controls(encode_prompt(tokenizer, harmless))
    for ended in (True, False):
        ids = encode_response(tokenizer, ASK, first, ended)
        assert controls(ids) == controls(encode_response(tokenizer, ASK, "x", ended))


@example(words=["<<"], text="<<<")
@given(words=st.lists(st.text("ab<|", min_size=1, max_size=5), min_size=1),
       text=st.text("ab<|", max_size=12))
def test_one_character_breaks_what_spells_a_control_token(words, text):
    """Whatever the tokens: one in another, one that begins in another, one of one character."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.chat, "control_tokens", lambda tokenizer: dict.fromkeys(words, 0))
        broken = as_text.__wrapped__(None, text)
    assert not any(word in broken for word in words)
    assert broken == text or any(word in text for word in words)
    if all(len(word) > 1 for word in words):
        assert broken.replace(BREAK, "") == text


@settings(max_examples=60, deadline=None)
@given(text=texts(PIECES + SPELLED))
def test_the_prompt_is_the_templates_rendering_of_the_broken_text(tokenizer, text):
    ask = [{"role": "user", "content": as_text(tokenizer, text)}]
    rendered = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    ids = encode_prompt(tokenizer, [{"role": "user", "content": text}])
    assert tokenizer.decode(ids) == rendered


def test_tokens_that_are_not_special_cannot_be_forged(tokenizer):
    """What the template writes is a control token whatever its flag; what it cannot write is text
    and stays a token of its own."""
    loose = copy.deepcopy(tokenizer)
    loose.add_tokens([transformers.AddedToken(t, special=False) for t in ("<U>", "<A>", "<tag>")])
    loose.chat_template = (
        "{% for m in messages %}{{ '<U>' if m.role == 'user' else '<A>' }}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}")
    user, assistant, tag = (loose.convert_tokens_to_ids(t) for t in ("<U>", "<A>", "<tag>"))
    ids = encode_prompt(loose, [{"role": "user", "content": "a<A>b<U><tag>"}])
    assert [i for i in ids if i >= user] == [user, tag, assistant]
    assert "<tag>" not in control_tokens(loose)
    assert spells_control(loose, "a<A>b") and not spells_control(loose, "<tag> <U")


@pytest.mark.parametrize("shape", ["<|reserved_{}|>", "{}>"])
def test_thousands_of_added_tokens_cost_nothing(any_tokenizer, shape):
    """In the best of twenty prompts, the first time that each is seen."""
    many = copy.deepcopy(any_tokenizer)
    many.add_tokens([transformers.AddedToken(shape.format(i), special=True) for i in range(6000)])
    ask = [{"role": "user", "content": "Write 12 <b>long</b> letters of 300 words.\n" * 8}]

    def encode() -> None:
        as_text.cache_clear()
        encode_prompt(many, ask)
    assert min(timeit.repeat(encode, number=1, repeat=20)) < 0.01


# --------------------------------------------------------------------------- prompts and responses


@settings(max_examples=60, deadline=None)
@given(question=texts(PIECES), text=texts(PIECES))
def test_gold_ids_are_the_templates(each, question, text):
    """Prompt, then response, are the tokens of the conversation as the template writes it."""
    _, tokenizer = each
    assume(not any(control in question + text for control in control_tokens(tokenizer)))
    ask = [{"role": "user", "content": question}]
    prompt = encode_prompt(tokenizer, ask)
    assert prompt == template_ids(tokenizer, ask, add_generation_prompt=True)
    response = response_in_context(tokenizer, ask, text, True)
    assume(response is not None)
    conversation = template_ids(tokenizer, answered(ask, text))
    assert prompt + response == conversation[:len(prompt + response)]
    assert response[-1] == end_of_turn(tokenizer)
    assert end_of_turn(tokenizer) not in conversation[len(prompt + response):]


def test_released_models_by_hand(each):
    """Zephyr writes Hello, not ▁Hello, after <s>; Qwen3 an empty think block before it; DeepSeek's
    turn tokens are no special tokens."""
    name, tokenizer = each
    if name in MADE:
        return
    response, start, control = {
        "zephyr": (["Hello", "</s>"], ["<s>", "▁<"], "</s>"),
        "qwen3": (["<think>", "ĊĊ", "</think>", "ĊĊ", "Hello", "<|im_end|>"],
                  ["<|im_start|>", "user"], "<think>"),
        "deepseek-v3": (["Hello", "<｜end▁of▁sentence｜>"],
                        ["<｜begin▁of▁sentence｜>", "<｜User｜>"], "<｜User｜>"),
    }[name]
    tokens = tokenizer.convert_ids_to_tokens
    assert tokens(encode_response(tokenizer, ASK, "Hello")) == response
    assert tokens(encode_prompt(tokenizer, ASK)[:2]) == start
    controls = control_tokens(tokenizer)
    assert control in controls and "<|fim_prefix|>" not in controls  # no template can write it
    assert spells_control(tokenizer, f"Hi {response[-1]}")
    assert spells_control(tokenizer, control) == (name != "qwen3")  # its answers have that block
    assert controls.get("<think>") not in foreign_tokens(tokenizer)
    if name == "zephyr":  # the newline that ends the prompt and one that starts the text are apart
        newline = encode_response(tokenizer, ASK, "\nHello")
        assert tokens(newline) == ["<0x0A>", "Hello", "</s>"]


def test_bos_stands_once(any_tokenizer):
    """Before a prompt if the tokenizer starts a text with it, also where the template writes it."""
    bos, begins = any_tokenizer.bos_token_id, any_tokenizer("x").input_ids[0]
    writes = copy.deepcopy(any_tokenizer)
    writes.chat_template = "{{ bos_token }}" + any_tokenizer.chat_template
    if begins == bos:
        assert encode_prompt(any_tokenizer, ASK)[0] == bos
        assert encode_prompt(writes, ASK) == encode_prompt(any_tokenizer, ASK)
        assert encode_prompt(writes, ASK).count(bos) == 1
    else:
        assert encode_prompt(any_tokenizer, ASK) == any_tokenizer.apply_chat_template(
            ASK, add_generation_prompt=True, return_dict=False)


def test_a_prompt_that_ends_in_an_assistants_turn_is_continued(any_tokenizer):
    chat = [*ASK, {"role": "assistant", "content": "Sure: one,"}]
    prompt = encode_prompt(any_tokenizer, chat)
    assert prompt == template_ids(any_tokenizer, chat, continue_final_message=True)
    assert end_of_turn(any_tokenizer) not in prompt[-3:]
    conversation = template_ids(any_tokenizer, answered(chat, " two"))
    response = encode_response(any_tokenizer, chat, " two")
    assert prompt + response == conversation[:len(prompt + response)]
    assert response[-1] == end_of_turn(any_tokenizer)


def test_the_date_is_one_and_the_same(tokenizer):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = ("{% if true %}{{ strftime_now('%d %b %Y') }}{% endif %}"
                           + tokenizer.chat_template)
    text = dated.decode(encode_prompt(dated, ASK))
    assert text.startswith("26 Jul 2024<|im_start|>user")


def test_a_tokenizers_own_truncation_is_off(any_folder, any_tokenizer, tmp_path):
    shutil.copytree(any_folder, tmp_path / "model")
    file = tmp_path / "model/tokenizer.json"
    state = json.loads(file.read_text())
    state["truncation"] = {"direction": "Right", "max_length": 5, "stride": 0,
                           "strategy": "LongestFirst"}
    file.write_text(json.dumps(state))
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert encode_prompt(tokenizer, ASK) == encode_prompt(any_tokenizer, ASK)


def test_a_leading_newline_that_merges_is_tokenised_alone(tokenizer):
    """Where prompt ids are no prefix of the conversation's."""
    merging = copy.deepcopy(tokenizer)
    merging.add_tokens([transformers.AddedToken("\n\n", special=False, normalized=False)])
    rows = [{"id": "x", "prompt": ASK, "chosen": "\nHello", "rejected": "Hello"}]
    ((prompt, (alone, within)),) = encode_rows(
        make_model().config, merging, rows, pairs_of(rows), "file")
    assert alone.tolist() == merging("\nHello").input_ids + [2] and prompt[-1] == alone[0]
    assert within.tolist() == merging("Hello").input_ids + [2]


def test_a_character_cut_in_half_does_not_enter_the_text(any_tokenizer):
    """Also after one in full that is bytes too; one that the model wrote to its end stays."""

    def ids_of(text: str) -> list[int]:
        return encode_response(any_tokenizer, ASK, text, ended=False)
    ids, full = ids_of("Hi 🙂🙂"), len(ids_of("Hi 🙂"))
    assert len(ids) == full + 4  # four bytes
    for n in range(full, len(ids)):
        assert decode_response(any_tokenizer, ids[:n], False) == "Hi 🙂"
    assert decode_response(any_tokenizer, ids, False) == "Hi 🙂🙂"
    assert decode_response(any_tokenizer, [*ids_of("Hi"), end_of_turn(any_tokenizer)], True) == "Hi"
    # A model may end its answers at a full stop: that is text.
    assert decode_response(any_tokenizer, ids_of("Hi."), True) == "Hi."


def test_letters_are_read_in_context(any_tokenizer):
    """A, not ▁A: the token that a judge would write."""
    question = option_prompt(ASK, "one", "two")
    prompt = encode_prompt(any_tokenizer, question)
    for letter in "AB":
        ids = encode_response(any_tokenizer, question, letter, ended=False)
        assert any_tokenizer.convert_ids_to_tokens(ids) == [letter]
        conversation = template_ids(any_tokenizer, answered(question, letter))
        assert conversation[:len(prompt) + 1] == prompt + ids


# ------------------------------------------------------------------- what a template does not write


def writing(tokenizer, content: str):
    """The tokenizer with a template that writes this in the place of a message's content."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("m['content']", content)
    assert other.chat_template != tokenizer.chat_template
    return other


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("content, cut", [
    ("m['content'].split('</think>')[-1]", "Let me see.</think>Yes"),
    ("m['content'][:5]", "Surely"), ("m['content'] | lower", "Yes")])
def test_a_response_that_the_template_does_not_write_in_full(
        any_tokenizer, capsys, content, cut, ended):
    """Its row is left out, unless it has the ids that were sampled."""
    tokenizer = writing(any_tokenizer, content)
    row = {"id": "x", "prompt": ASK, "chosen": cut, "rejected": "yes", "chosen_ended": ended}
    sampled = {"vocabulary": vocabulary(tokenizer), "chosen_ids": [70], "rejected_ids": [72]}
    rows = [row, {**row, "chosen": "no"}, {**row, **sampled}]
    encoded = encode_rows(make_model().config, tokenizer, rows, pairs_of(rows), "file")
    assert encoded[0] is None
    assert encoded[1][1][0].tolist() == encode_response(tokenizer, ASK, "no", ended)
    assert encoded[2][1] == [[70], [72]]
    learnt, tokens = learnable_pairs(rows, encoded, "file")
    assert learnt == rows[1:] and tokens[0] is encoded[1] and tokens[1] is encoded[2]
    assert "file: 1 of 3 pairs are left out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        learnable_pairs(rows[:1], encoded[:1], "file")


def test_a_prompt_that_does_not_begin_its_conversation(any_tokenizer):
    """A gold text after it would be another conversation than the template's; what was sampled
    after it is what it is."""
    thinks = copy.deepcopy(any_tokenizer)
    thinks.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    row = {"id": "x", "prompt": ASK, "chosen": "yes", "rejected": "no"}
    sampled = {"vocabulary": vocabulary(thinks), "chosen_ids": [70], "rejected_ids": [72]}
    rows = [row, row | sampled]
    text, ids = encode_rows(make_model().config, thinks, rows, pairs_of(rows), "file")
    assert text is None and ids[1] == [[70], [72]]


def test_blanks_at_the_ends_may_be_trimmed_but_sides_must_differ(tokenizer, capsys):
    """Many templates trim a message: what is left is the response. Two that differ in blanks alone
    are one."""
    trims = writing(tokenizer, "m['content'] | trim")
    rows = [{"id": "x", "prompt": ASK, "chosen": chosen, "rejected": rejected}
            for chosen, rejected in ((" yes \n", "no"), ("yes ", "yes"), ("same", "same"))]
    encoded = encode_rows(make_model().config, trims, rows, pairs_of(rows), "file")
    assert encoded[0][1][0].tolist() == encode_response(tokenizer, ASK, "yes")
    learnt, _ = learnable_pairs(rows, encoded, "file")
    assert learnt == rows[:1]
    assert "file: 2 of 3 pairs are left out" in capsys.readouterr().err


@pytest.mark.parametrize("script, flags", [("seed_dpo.py", []),
                                           ("label.py", ["--reference", "none"])])
def test_a_stage_learns_from_what_the_template_writes(folder, tokenizer, tmp_path, script, flags):
    shutil.copytree(folder, tmp_path / "model")
    writing(tokenizer, "m['content'][:20]").save_pretrained(tmp_path / "model")
    short = {"prompt": ASK, "chosen": "Yes.", "rejected": "No."}
    long = {"prompt": ASK, "chosen": "a" * 20 + "b", "rejected": "a" * 20 + "c"}

    def stage(*rows: dict):
        pairs = dump(tmp_path / "p.jsonl", [{"id": str(i), **row} for i, row in enumerate(rows)])
        return run(script, "--model", tmp_path / "model", *flags, "--pairs", pairs,
                   "--out", tmp_path / "out")
    some, none = ok(stage(short, long, short)), stage(long, long)
    assert ": 2 " in some.stdout and "1 " in some.stdout + some.stderr
    assert none.returncode == 2 and none.stderr.count("\n") == 1 and "template" in none.stderr


# ------------------------------------------------------------------------ what a sampler has drawn


def sampled(monkeypatch, answers: list[list[int]]) -> None:
    """Let the sampler write these answers, over and over."""
    monkeypatch.setattr(
        generate, "sample",
        lambda model, prompts, u, *rest: [answers[k % len(answers)] for k in range(len(u))])


def generated(tmp_path, model, prompts: int, n: int, length: int) -> tuple[list[dict], str]:
    """Rows of generate.py, which lie in r.jsonl, and its summary line."""
    rows = [{"id": str(k), "prompt": [{"role": "user", "content": f"Say {k}."}]}
            for k in range(prompts)]
    done = run("generate.py", "--model", model, "--prompts", dump(tmp_path / "p.jsonl", rows),
               "-n", n, "--out", tmp_path / "r.jsonl", "--precision", "fp32",
               "--max-new-tokens", length)
    return jsonl(tmp_path / "r.jsonl"), ok(done).stdout


def test_sampled_ids_survive_to_training(any_folder, other_folder, tmp_path, monkeypatch):
    """generate → label → dro → train, with tokens that their text does not come back as. The scores
    are those of the very ids under a plain forward pass."""
    model, tokenizer = load_model(any_folder, torch.device("cpu")), load_tokenizer(any_folder)
    shutil.copytree(other_folder, tmp_path / "reference")  # of whatever tokenizer
    (tmp_path / "reference/tokenizer.json").unlink()
    dice = np.random.default_rng(0)
    answers = [dice.integers(3, 384, size).tolist() + [2] * ended
               for size, ended in ((7, 1), (5, 0), (9, 1), (6, 1), (8, 0), (4, 1))]
    sampled(monkeypatch, answers)
    rows, _ = generated(tmp_path, any_folder, 3, 2, 9)
    assert sorted(ids for row in rows for ids in row["response_ids"]) == sorted(answers)
    assert not all(encode_response(tokenizer, row["prompt"], text, ended) in answers
                   for row in rows for text, ended in zip(row["responses"], row["ended"]))
    label = ["label.py", "--model", any_folder, "--precision", "fp32"]
    done = ok(run(*label, "--reference-model", tmp_path / "reference",
                  "--responses", tmp_path / "r.jsonl", "--out", tmp_path / "l.jsonl"))
    assert "another vocabulary" not in done.stderr
    labelled = pair_rows(tmp_path / "l.jsonl")
    by_id = {row["id"]: row for row in rows}
    for row in labelled:
        prompt = encode_prompt(tokenizer, row["prompt"])
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            k = by_id[row["id"]]["response_ids"].index(ids)
            assert row[side] == by_id[row["id"]]["responses"][k]
            logps = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            right = sum(logps[len(prompt) + j - 1, t].item() for j, t in enumerate(ids))
            assert row[f"{side}_logp"] == pytest.approx(right, abs=1e-3)
    encoded = encode_rows(model.config, tokenizer, labelled, pairs_of(labelled), "l")
    assert [[y.tolist() for y in ys] for _, ys in encoded] == [
        [r["chosen_ids"], r["rejected_ids"]] for r in labelled]
    ok(run("dro.py", "--pairs", tmp_path / "l.jsonl", "--out", tmp_path / "w.jsonl"))
    done = ok(run("train.py", "--model", any_folder, "--anchor", "init", "--precision", "fp32",
                  "--pairs", tmp_path / "w.jsonl", "--out", tmp_path / "policy"))
    assert "3 pairs" in done.stdout and "another vocabulary" not in done.stderr

    # ids of another vocabulary mean something else: the text is read, and that is said
    others = [{**row, "vocabulary": "another"} for row in labelled]
    done = ok(run(*label, "--reference", "none", "--out", tmp_path / "again.jsonl",
                  "--pairs", dump(tmp_path / "v.jsonl", others)))
    assert "the ids of 6 responses are of another vocabulary" in done.stderr
    for row in pair_rows(tmp_path / "again.jsonl"):
        text = encode_response(tokenizer, row["prompt"], row["chosen"], row["chosen_ended"])
        assert row["chosen_ids"] == text and row["vocabulary"] == vocabulary(tokenizer)


def test_special_tokens_inside_an_answer_are_spelled_out(folder, tokenizer, tmp_path, monkeypatch):
    """Judges read all that was sampled; what is learnt are its ids."""
    answers = [[50, 0, 51, 2], [52, 53, 2]]
    sampled(monkeypatch, answers)
    (row,) = generated(tmp_path, folder, 1, 2, 4)[0]
    assert row["responses"] == [tokenizer.decode([50]) + "<|pad|>" + tokenizer.decode([51]),
                                tokenizer.decode([52, 53])]
    ok(run("label.py", "--model", folder, "--reference", "none", "--responses",
           tmp_path / "r.jsonl", "--out", tmp_path / "l.jsonl"))
    (labelled,) = pair_rows(tmp_path / "l.jsonl")
    assert sorted([labelled["chosen_ids"], labelled["rejected_ids"]]) == answers


def test_a_response_keeps_its_stop_token_of_several(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "model")
    transformers.GenerationConfig(eos_token_id=[2, 7]).save_pretrained(tmp_path / "model")
    answers = [[50, 51, 7], [52, 2], [53, 7]]
    sampled(monkeypatch, answers)
    rows, _ = generated(tmp_path, tmp_path / "model", 3, 1, 4)
    assert all(row["ended"] == [True] for row in rows)
    assert sorted(row["response_ids"][0] for row in rows) == answers


CHANNELS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|pad|>user{{ m.content }}<|im_end|>"
    "{% else %}<|pad|>assistant<c>final<m>{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|pad|>assistant{% endif %}")


def test_channels(tokenizer):
    """A template that writes a channel's name into an answer: gold answers have it."""
    multi = copy.deepcopy(tokenizer)
    multi.add_tokens([transformers.AddedToken(t, special=True) for t in ("<c>", "<m>")])
    multi.chat_template = CHANNELS
    ids = encode_response(multi, ASK, "Hi <m>")
    assert multi.decode(ids) == f"<c>final<m>Hi <{BREAK}m><|im_end|>"


@pytest.mark.parametrize("change, message", [
    ({"response_ids": [[1], [-1]]}, "'response_ids' must be [\"token ids\"]"),
    ({"response_ids": [[1], [True]]}, "'response_ids' must be [\"token ids\"]"),
    ({"response_ids": [[1], []]}, "'response_ids' must be [\"token ids\"]"),
    ({"response_ids": [[1]]}, "'response_ids' must hold a value for each of its 2 responses"),
    ({"ended": [True]}, "'ended' must hold a value for each of its 2 responses"),
    ({"vocabulary": 7}, "'vocabulary' must be \"text\"")])
def test_wrong_ids_are_one_line(tmp_path, capsys, change, message):
    row = {"id": "x", "prompt": ASK, "responses": ["a", "b"], **change}
    with pytest.raises(SystemExit):
        read_rows(dump(tmp_path / "r.jsonl", [row]), "responses")
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_ids_take_four_bytes_and_are_kept_once(tokenizer, tmp_path):
    """As lists they take 36 bytes a token."""
    ids = [300 + i % 80 for i in range(2000)]
    row = {"prompt": ASK, "chosen": "a", "rejected": "b", "vocabulary": vocabulary(tokenizer),
           "chosen_ids": ids, "rejected_ids": ids}
    path = dump(tmp_path / "pairs.jsonl", [{"id": str(i), **row} for i in range(50)])
    config = make_model(max_position_embeddings=4096).config
    for _ in range(2):  # what is found of a tokenizer once is not counted
        tracemalloc.start()
        rows = read_rows(str(path), "preferences")
        encoded = encode_rows(config, tokenizer, rows, pairs_of(rows), "file")
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert held < 6 * 50 * 2 * 2000
    for row, (_, ys) in zip(rows, encoded):
        assert ys[0] is row["chosen_ids"] and ys[1] is row["rejected_ids"] and ys[0].tolist() == ids


# ------------------------------------------------------------------------------- folders of a model


def test_a_policys_tokenizer_is_its_parents_files(tmp_path, capsys, monkeypatch):
    """Saved by transformers, a LlamaTokenizer with `legacy` reads a prompt as other tokens."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    tokenizer_of("sentencepiece").save_pretrained(parent)
    for path in (parent, child):
        tiny_config("llama").save_pretrained(path)
    config = json.loads((parent / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    (parent / "tokenizer_config.json").write_text(json.dumps(config))
    (parent / "additional_chat_templates").mkdir()
    (parent / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    check_copy(str(parent))
    copy_tokenizer(str(parent), str(child))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "additional_chat_templates/rag.jinja"):
        assert (child / file).read_bytes() == (parent / file).read_bytes()
    chat = [*ASK, {"role": "assistant", "content": " Sure.\n Now"}, *ASK]
    ours, theirs = (encode_prompt(load_tokenizer(str(path)), chat) for path in (parent, child))
    assert ours == theirs

    def other(source, target) -> None:
        target.write_text(source.read_text().replace("|>", "|]"))
    monkeypatch.setattr(shutil, "copyfile", other)
    with pytest.raises(SystemExit):
        check_copy(str(parent))
    assert "a copy of its tokenizer reads a conversation as other tokens" in capsys.readouterr().err


@pytest.mark.parametrize("named", [False, True])
def test_an_empty_system_turn_is_the_models_own(any_folder, any_tokenizer, tmp_path, named):
    """As if the conversation had one; of several templates the default one has it. A policy that is
    trained from the model inherits it."""
    model, turn, policy = (tmp_path / name for name in ("model", "turn", "policy"))
    shutil.copytree(any_folder, model)
    if named:
        several = copy.deepcopy(any_tokenizer)
        several.chat_template = {"default": any_tokenizer.chat_template, "rag": "{{ messages }}"}
        several.save_pretrained(model)
    ok(run("data/system_turn.py", "--model", model, "--out", turn))
    make_model().config.save_pretrained(policy)
    copy_tokenizer(str(turn), str(policy))
    empty, short = {"role": "system", "content": ""}, {"role": "system", "content": "Be short."}
    for tokenizer in (load_tokenizer(str(turn)), load_tokenizer(str(policy))):
        for chat in (ASK, [*ASK, {"role": "assistant", "content": "No."}, *ASK]):
            assert encode_prompt(tokenizer, chat) == encode_prompt(any_tokenizer, [empty, *chat])
        chat = [short, *ASK]
        assert encode_prompt(tokenizer, chat) == encode_prompt(any_tokenizer, chat)
        response = encode_response(any_tokenizer, [empty, *ASK], "Hello")
        assert encode_response(tokenizer, ASK, "Hello") == response
        assert vocabulary(tokenizer) == vocabulary(any_tokenizer)


def test_without_a_default_template_is_one_line(folder, tokenizer, tmp_path):
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"tool_use": TEMPLATE, "rag": "{{ messages }}"}
    several.save_pretrained(tmp_path)
    done = run("data/system_turn.py", "--model", tmp_path, "--out", tmp_path / "no")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "default" in done.stderr


def test_a_reference_reads_the_same_tokens(folder, other_folder, tokenizer, tmp_path, capsys):
    """Its vocabulary may lack some that were added later, or be unknown; where an id of the rows
    means another token, nothing is scored."""
    added, exchanged = copy.deepcopy(tokenizer), tmp_path / "exchanged"
    added.add_tokens(["another"])
    encoded = [(np.array([60, 61]), [np.array([70, 384]), np.array([71])])]
    check_same_tokens(added, folder, encoded)
    make_model().config.save_pretrained(tmp_path / "none")
    check_same_tokens(added, str(tmp_path / "none"), encoded)
    assert "is not known" in capsys.readouterr().err
    file = shutil.copytree(other_folder, exchanged) / "tokenizer.json"
    state = json.loads(file.read_text())
    first, second = tokenizer.convert_ids_to_tokens([70, 100])
    state["model"]["vocab"] |= {first: 100, second: 70}
    file.write_text(json.dumps(state))
    row = {"id": "x", "prompt": ASK, "responses": ["a", "b"], "response_ids": [[70], [71]],
           "vocabulary": vocabulary(tokenizer)}
    done = run("label.py", "--model", folder, "--reference-model", exchanged, "--out",
               tmp_path / "o", "--responses", dump(tmp_path / "r.jsonl", [row]))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"token 70 is {second!r} there, and {first!r} to the policy" in done.stderr
    # in the files of GPT-2's tokenizer alone
    (exchanged / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    (exchanged / "merges.txt").write_text("")
    (exchanged / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    file.unlink()
    with pytest.raises(SystemExit):
        check_same_tokens(tokenizer, str(exchanged), encoded)
    assert f"token 70 is {second!r} there" in capsys.readouterr().err


def test_one_limit_a_model():
    """The context, or the length at which the rotation of all positions changes."""
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
                "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    layers = {"full_attention": longrope, "sliding_attention": {"rope_type": "default"}}
    limits = [context_of(tiny_config(family, **changes)) for family, changes in (
        ("phi3", {"rope_parameters": longrope, "original_max_position_embeddings": 16}),
        ("gemma3_text", {"rope_parameters": layers}), ("llama", {"rope_parameters": dynamic}),
        ("gemma3", {}), ("mamba", {}))]
    assert limits == [16, 16, 4096, 4096, float("inf")]

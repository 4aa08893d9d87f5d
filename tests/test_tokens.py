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
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import core.chat
import core.sampling
from conftest import ROOT, dump, jsonl, make_model, ok, pair_rows, run
from core.chat import (
    BREAK,
    answered,
    as_text,
    control_tokens,
    decode_response,
    encode_prompt,
    encode_response,
    encode_rows,
    encode_text,
    end_of_turn,
    foreign_tokens,
    is_foreign,
    pair_of,
    response_in_context,
    spells_control,
    usable,
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
from core.probe import check_template
from core.rows import read_rows
from data import prepare
from data.tiny import BYTES_TEMPLATE, make_tokenizer, tiny_config
from judges.comparisons import option_prompt

ASK = [{"role": "user", "content": "Write."}]
REAL = ROOT.parent / "shared/data/tokenizers"  # gzipped tokenizers of released models
SPELLED = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<s>", "</s>", "<unk>", "<|im_", "end|>", "</"]
PIECES = ["hello", "Hi", " ", "  ", "\n", "\t", "é", "你好", "שלום", "🙂", "👩‍🚀", "<0x0A>", "▁", BREAK,
          "\ufffd", "\ue000", "\U0010fffd"]


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


@pytest.fixture(scope="session", params=["zephyr", "qwen3", "deepseek-v3"])
def real(request, tmp_path_factory):
    """Tokenizers of released models, where they are at hand."""
    if not (REAL / request.param).is_dir():
        pytest.skip(f"no {REAL / request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    for file in (REAL / request.param).glob("*.gz"):
        (folder / file.stem).write_bytes(gzip.open(file).read())
    return request.param, load_tokenizer(str(folder))


# ---------------------------------------------------------------------------------- control tokens


def check_no_text_makes_a_control_token(tokenizer, first: str, second: str) -> None:
    """All positions of control tokens are those of the same conversation with harmless words."""
    ids_of_controls = set(control_tokens(tokenizer).values())

    def controls(ids: list[int]) -> list[int]:
        return [i for i in ids if i in ids_of_controls]
    chat = [{"role": "user", "content": first}, {"role": "assistant", "content": second},
            {"role": "user", "content": second}]
    harmless = [{**message, "content": "x"} for message in chat]
    assert controls(encode_prompt(tokenizer, chat)) == controls(encode_prompt(tokenizer, harmless))
    for ended in (True, False):
        ids = encode_response(tokenizer, ASK, first, ended)
        assert controls(ids) == controls(encode_response(tokenizer, ASK, "x", ended))
    assert controls(encode_text(tokenizer, first)) == []


@settings(max_examples=60, deadline=None)
@given(first=texts(PIECES + SPELLED), second=texts(PIECES + SPELLED))
def test_no_text_makes_a_control_token(any_tokenizer, first, second):
    check_no_text_makes_a_control_token(any_tokenizer, first, second)


def test_no_text_makes_a_control_token_of_released_models(real):
    """All that they have at once, and each alone; a turn cannot be forged."""
    _, tokenizer = real
    controls = list(control_tokens(tokenizer))
    for text in ("".join(controls), *controls[:3], *controls[-12:]):
        check_no_text_makes_a_control_token(tokenizer, text, f"a{text} b")


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
    """In the best of twenty prompts; ten times the template's own time would be 2 ms."""
    many = copy.deepcopy(any_tokenizer)
    many.add_tokens([transformers.AddedToken(shape.format(i), special=True) for i in range(6000)])
    ask = [{"role": "user", "content": "Write 12 <b>long</b> letters of 300 words.\n" * 8}]

    def encode() -> None:
        as_text.cache_clear()
        encode_prompt(many, ask)

    def fastest(call) -> float:
        return min(timeit.repeat(call, number=1, repeat=20))
    plain = fastest(lambda: many.apply_chat_template(ask, return_dict=False))
    assert fastest(encode) < 10 * plain


# --------------------------------------------------------------------------- prompts and responses


def check_gold_ids(tokenizer, question: str, text: str) -> None:
    """Prompt, then response, are the tokens of the conversation as the template writes it."""
    ask = [{"role": "user", "content": question}]
    prompt = encode_prompt(tokenizer, ask)
    assert prompt == template_ids(tokenizer, ask, add_generation_prompt=True)
    response = response_in_context(tokenizer, ask, text, True)
    assume(response is not None)
    conversation = template_ids(tokenizer, answered(ask, text))
    assert prompt + response == conversation[:len(prompt + response)]
    assert response[-1] == end_of_turn(tokenizer)
    assert end_of_turn(tokenizer) not in conversation[len(prompt + response):]


@settings(max_examples=60, deadline=None)
@given(question=texts(PIECES), text=texts(PIECES))
def test_gold_ids_are_the_templates(any_tokenizer, question, text):
    check_gold_ids(any_tokenizer, question, text)


@settings(max_examples=30, deadline=None)
@given(question=texts(PIECES), text=texts(PIECES))
def test_gold_ids_are_the_templates_of_released_models(real, question, text):
    _, tokenizer = real
    assume(not any(control in question + text for control in control_tokens(tokenizer)))
    check_gold_ids(tokenizer, question, text)


def test_released_templates_pass_the_probe(real):
    check_template(*real)


def test_released_models_by_hand(real, tmp_path):
    """Zephyr writes Hello, not ▁Hello, after <s>; Qwen3 an empty think block before it; DeepSeek's
    turn tokens are no special tokens. Saving a tokenizer does not change its vocabulary."""
    name, tokenizer = real
    response, start, control = {
        "zephyr": (["Hello", "</s>"], ["<s>", "▁<"], "</s>"),
        "qwen3": (["<think>", "ĊĊ", "</think>", "ĊĊ", "Hello", "<|im_end|>"],
                  ["<|im_start|>", "user"], "<think>"),
        "deepseek-v3": (["Hello", "<｜end▁of▁sentence｜>"],
                        ["<｜begin▁of▁sentence｜>", "<｜User｜>"], "<｜User｜>"),
    }[name]

    def tokens(ids: list[int]) -> list[str]:
        return tokenizer.convert_ids_to_tokens(ids)
    assert tokens(encode_response(tokenizer, ASK, "Hello")) == response
    assert tokens(encode_prompt(tokenizer, ASK)[:2]) == start
    controls = control_tokens(tokenizer)
    assert control in controls
    assert "<|fim_prefix|>" not in controls  # Qwen3's template cannot write it
    assert spells_control(tokenizer, f"Hi {response[-1]}")
    assert spells_control(tokenizer, control) == (name != "qwen3")  # its answers have that block
    assert controls.get("<think>") not in foreign_tokens(tokenizer)
    if name == "zephyr":  # the newline that ends the prompt and one that starts the text are apart
        newline = encode_response(tokenizer, ASK, "\nHello")
        assert tokens(newline) == ["<0x0A>", "Hello", "</s>"]
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert vocabulary(again) == vocabulary(tokenizer)
    again.add_tokens(["another"])
    assert vocabulary(transformers.AutoTokenizer.from_pretrained(tmp_path)) == vocabulary(tokenizer)


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
    dated.chat_template = ("{% if true %}{{ strftime_now('%d %B %Y, %Y-%m-%d') }}{% endif %}"
                           + tokenizer.chat_template)
    text = dated.decode(encode_prompt(dated, ASK))
    assert text.startswith("26 July 2024, 2024-07-26<|im_start|>user")


def test_a_tokenizers_own_truncation_is_off(any_folder, any_tokenizer, tmp_path):
    shutil.copytree(any_folder, tmp_path / "model")
    file = tmp_path / "model/tokenizer.json"
    state = json.loads(file.read_text())
    state["truncation"] = {"direction": "Right", "max_length": 5, "stride": 0,
                           "strategy": "LongestFirst"}
    file.write_text(json.dumps(state))
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert encode_prompt(tokenizer, ASK) == encode_prompt(any_tokenizer, ASK)


def test_a_leading_newline_that_merges_is_tokenised_alone(tokenizer, capsys):
    """Where prompt ids are no prefix of the conversation's."""
    merging = copy.deepcopy(tokenizer)
    merging.add_tokens([transformers.AddedToken("\n\n", special=False, normalized=False)])
    rows = [{"id": "a", "prompt": ASK, "chosen": "\nHello", "rejected": "Hello"}]
    ((prompt, (alone, within)),) = encode_rows(
        make_model().config, merging, rows, pairs_of(rows), "file")
    assert alone.tolist() == merging("\nHello").input_ids + [2] and prompt[-1] == alone[0]
    assert within.tolist() == merging("Hello").input_ids + [2]
    assert "file: 1 responses are tokenised alone" in capsys.readouterr().err


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


def test_letters_are_read_in_context(any_tokenizer):
    """A, not ▁A: the token that a judge would write."""
    rows = [{"id": "0", "prompt": option_prompt(ASK, "one", "two")}]
    config = make_model(max_position_embeddings=4096).config
    letters = [[("A", False, None), ("B", False, None)]]
    ((prompt, answers),) = encode_rows(config, any_tokenizer, rows, letters, "")
    assert any_tokenizer.convert_ids_to_tokens([i for ids in answers for i in ids]) == ["A", "B"]
    conversation = template_ids(any_tokenizer, answered(rows[0]["prompt"], "A"))
    assert conversation[:len(prompt) + 1] == [*prompt, *answers[0]]


# ------------------------------------------------------------------- what a template does not write


def writing(tokenizer, content: str):
    """The tokenizer with a template that writes this in the place of a message's content."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("m['content']", content)
    assert other.chat_template != tokenizer.chat_template
    return other


@pytest.mark.parametrize("content, cut, kept", [
    ("m['content'].split('</think>')[-1]", "Let me see.</think>Yes", "Yes"),
    ("m['content'][:5]", "Surely", "Sure"),
    ("m['content'] | lower", "Yes", "yes"),
])
@pytest.mark.parametrize("ended", [True, False])
def test_a_response_that_the_template_does_not_write_in_full(
        any_tokenizer, capsys, content, cut, kept, ended):
    """Its row is left out, unless it has the ids that were sampled."""
    tokenizer = writing(any_tokenizer, content)
    row = {"prompt": ASK, "chosen": cut, "rejected": kept, "chosen_ended": ended}
    known = {"vocabulary": vocabulary(tokenizer), "chosen_ids": [70, 71], "rejected_ids": [72]}
    rows = [{"id": "cut", **row}, {"id": "kept", **row, "chosen": "no"},
            {"id": "sampled", **row, **known}]
    encoded = encode_rows(make_model().config, tokenizer, rows, pairs_of(rows), "file")
    assert [pair is None for pair in encoded] == [True, False, False]
    assert encoded[1][1][0].tolist() == encode_response(tokenizer, ASK, "no", ended)
    assert encoded[2][1][0].tolist() == [70, 71]
    learnt, tokens = usable(rows, encoded, "file")
    assert learnt == rows[1:] and all(map(lambda a, b: a is b, tokens, encoded[1:]))
    assert "file: 1 of 3 pairs are left out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        usable(rows[:1], encoded[:1], "file")
    assert "1 of 1 pairs are left out" in capsys.readouterr().err


def test_blanks_at_the_ends_may_be_trimmed_but_sides_must_differ(tokenizer, capsys):
    """Many templates trim a message: what is left is the response. Two that differ in blanks alone
    are one."""
    trims = writing(tokenizer, "m['content'] | trim")
    texts_of = [(" yes \n", "no"), ("yes ", "yes"), ("same", "same")]
    rows = [{"id": chosen, "prompt": ASK, "chosen": chosen, "rejected": rejected}
            for chosen, rejected in texts_of]
    encoded = encode_rows(make_model().config, trims, rows, pairs_of(rows), "file")
    assert encoded[0][1][0].tolist() == encode_response(tokenizer, ASK, "yes")
    learnt, _ = usable(rows, encoded, "file")
    assert learnt == rows[:1]
    assert "file: 2 of 3 pairs are left out" in capsys.readouterr().err


def test_a_stage_learns_from_what_the_template_writes(folder, tokenizer, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    writing(tokenizer, "m['content'][:20]").save_pretrained(tmp_path / "model")
    short = {"prompt": ASK, "chosen": "Yes.", "rejected": "No."}
    long = {"prompt": ASK, "chosen": "a" * 20 + "b", "rejected": "a" * 20 + "c"}

    def stage(rows: list[dict], out: str, script: str, *flags):
        rows = [{"id": str(i), **row} for i, row in enumerate(rows)]
        pairs = dump(tmp_path / f"{out}.jsonl", rows)
        return run(script, "--model", tmp_path / "model", *flags, "--pairs", pairs,
                   "--out", tmp_path / out)
    for script, *flags in (["seed_dpo.py"], ["label.py", "--reference", "none"]):
        some = ok(stage([short, long, short], f"some-{script}", script, *flags))
        assert "2 " in some.stdout and "1" in some.stderr + some.stdout
        none = stage([long, long], f"none-{script}", script, *flags)
        assert none.returncode == 2 and none.stderr.count("\n") == 1
        assert "template" in none.stderr


# -------------------------------------------------------------------------- what a sampler has drawn


def sampled(monkeypatch, answers: list[list[int]]) -> None:
    """Let the sampler write these answers, over and over."""
    monkeypatch.setattr(
        core.sampling, "sample",
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
    read_again = [encode_response(tokenizer, row["prompt"], text, ended)
                  for row in rows for text, ended in zip(row["responses"], row["ended"])]
    assert not all(ids in answers for ids in read_again)
    label = ["label.py", "--model", any_folder, "--precision", "fp32"]
    done = ok(run(*label, "--reference-model", tmp_path / "reference",
                  "--responses", tmp_path / "r.jsonl", "--out", tmp_path / "l.jsonl"))
    assert "all read as sampled" in done.stdout
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
    ok(run("dro.py", "--pairs", tmp_path / "l.jsonl", "--out", tmp_path / "w.jsonl"))
    worst = pair_rows(tmp_path / "w.jsonl")
    encoded = encode_rows(model.config, tokenizer, worst, pairs_of(worst), "w")
    assert [[y.tolist() for y in ys] for _, ys in encoded] == [
        [r["chosen_ids"], r["rejected_ids"]] for r in labelled]
    train = ["train.py", "--model", any_folder, "--anchor", "init", "--precision", "fp32"]
    done = ok(run(*train, "--pairs", tmp_path / "w.jsonl", "--out", tmp_path / "policy"))
    assert "3 pairs, all read as sampled" in done.stdout and "not those of" not in done.stderr

    # ids of another vocabulary mean something else: the text is read, and that is said
    others = [{**row, "vocabulary": "another"} for row in worst]
    done = ok(run(*label, "--reference", "none", "--out", tmp_path / "again.jsonl",
                  "--pairs", dump(tmp_path / "v.jsonl", others)))
    assert "3 read from text" in done.stdout
    for row in pair_rows(tmp_path / "again.jsonl"):
        text = encode_response(tokenizer, row["prompt"], row["chosen"], row["chosen_ended"])
        assert row["chosen_ids"] == text and row["vocabulary"] == vocabulary(tokenizer)


def test_answers_with_special_tokens_inside_are_not_learnt(
        folder, tokenizer, tmp_path, monkeypatch):
    """Left out of labels and counted, with a model and without; their text is kept."""
    answers = [[50, 0, 51, 2], [52, 53, 2], [54, 55, 56], [57, 2]]
    assert [is_foreign(tokenizer, ids, ids[-1] == 2) for ids in answers] == [True] + [False] * 3
    assert is_foreign(tokenizer, [50, 384], False) and not is_foreign(tokenizer, [2], True)
    sampled(monkeypatch, answers)
    (row,), summary = generated(tmp_path, folder, 1, 4, 4)
    assert "1 with special tokens inside" in summary
    assert row["responses"][0] == tokenizer.decode([50, 51])
    for name, flags in (("model", ["--model", folder, "--reference", "none"]),
                        ("vader", ["--judge", "vader"])):
        # vader's best is the first
        row["responses"] = ["Wonderful!", "Good.", "Well.", "Terrible!"]
        responses = dump(tmp_path / "changed.jsonl", [row])
        done = ok(run("label.py", *flags, "--responses", responses, "--out", tmp_path / name))
        assert "1 responses with special tokens inside left out" in done.stdout
        (labelled,) = pair_rows(tmp_path / name)
        assert {labelled["chosen"], labelled["rejected"]} <= {"Good.", "Well.", "Terrible!"}
        for side in ("chosen", "rejected"):
            assert labelled[f"{side}_ids"] == answers[row["responses"].index(labelled[side])]


def test_a_response_keeps_its_stop_token_of_several(folder, tokenizer, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "model")
    transformers.GenerationConfig(eos_token_id=[2, 7]).save_pretrained(tmp_path / "model")
    answers = [[50, 51, 7], [52, 2], [53, 7]]
    sampled(monkeypatch, answers)
    rows, _ = generated(tmp_path, tmp_path / "model", 3, 1, 4)
    assert all(row["ended"] == [True] for row in rows)
    by_text = {row["responses"][0]: row["response_ids"][0] for row in rows}
    assert by_text == {tokenizer.decode(ids[:-1]): ids for ids in answers}


CHANNELS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|pad|>user{{ m.content }}<|im_end|>"
    "{% else %}<|pad|>assistant<c>final<m>{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|pad|>assistant{% endif %}")


def test_channels(tokenizer):
    """A template that writes a channel's name into an answer: gold answers have it, and what was
    sampled with it is no text alone."""
    multi = copy.deepcopy(tokenizer)
    multi.add_tokens([transformers.AddedToken(t, special=True) for t in ("<c>", "<m>")])
    multi.chat_template = CHANNELS
    ids = encode_response(multi, ASK, "Hi <m>")
    assert multi.decode(ids) == f"<c>final<m>Hi <{BREAK}m><|im_end|>"
    assert is_foreign(multi, ids, True)
    assert not is_foreign(multi, encode_text(multi, "Hi <m>"), False)


@pytest.mark.parametrize("change, message", [
    ({"response_ids": [[1], [-1]]}, "'response_ids' must be a list of lists of token ids"),
    ({"response_ids": [[1], [True]]}, "'response_ids' must be a list of lists of token ids"),
    ({"response_ids": [[1], []]}, "'response_ids' must be a list of lists of token ids"),
    ({"response_ids": [[1]]}, "'response_ids' must hold a value for each of its 2 responses"),
    ({"ended": [True]}, "'ended' must hold a value for each of its 2 responses"),
    ({"vocabulary": 7}, "'vocabulary' must be a string"),
    ({"response_ids": [[50, 384], [51]]}, "token 384 ('another') has no embedding"),
])
def test_wrong_ids_are_one_line(folder, tokenizer, tmp_path, change, message):
    row = {"id": "x", "prompt": ASK, "responses": ["a", "b"], "response_ids": [[70], [71]],
           "vocabulary": vocabulary(tokenizer), **change}
    if "384" in message:  # a token of the vocabulary without a row in the model
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(["another"])
        folder = shutil.copytree(folder, tmp_path / "model")
        tokenizer.save_pretrained(folder)
        row["vocabulary"] = vocabulary(tokenizer)
    done = run("label.py", "--model", folder, "--reference", "none", "--out", tmp_path / "o",
               "--responses", dump(tmp_path / "r.jsonl", [row]))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_prepare_keeps_what_was_sampled_and_flips_it_whole(tmp_path):
    row = {"prompt": "Write.", "chosen": "yes", "rejected": "no", "chosen_ids": [5, 2],
           "rejected_ids": [6, 7], "chosen_ended": True, "rejected_ended": False,
           "vocabulary": "v"}
    (kept,), *_ = prepare.collect(dump(tmp_path / "d.jsonl", [row]))
    assert {**kept, "prompt": "Write."}.items() >= row.items()
    flipped = copy.deepcopy(kept)
    prepare.flip(flipped)
    for key in ("", "_ids", "_ended"):
        assert flipped[f"chosen{key}"] == row[f"rejected{key}"]
        assert flipped[f"rejected{key}"] == row[f"chosen{key}"]
    assert flipped["vocabulary"] == "v"


def test_ids_take_four_bytes_and_are_kept_once(tokenizer, tmp_path):
    """As lists they take 36 bytes a token."""
    ids = [300 + i % 80 for i in range(2000)]
    row = {"prompt": ASK, "chosen": "a", "rejected": "b", "vocabulary": vocabulary(tokenizer),
           "chosen_ids": ids, "rejected_ids": ids}
    path = dump(tmp_path / "pairs.jsonl", [{"id": str(i), **row} for i in range(50)])
    config = make_model(max_position_embeddings=4096).config

    def read() -> tuple[list[dict], list]:
        rows = read_rows(str(path), "preferences")
        return rows, encode_rows(config, tokenizer, rows, pairs_of(rows), "file")
    read()  # what is found of a tokenizer once is not counted
    tracemalloc.start()
    rows, encoded = read()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 6 * 50 * 2 * 2000
    for row, (_, ys) in zip(rows, encoded):
        assert ys[0] is row["chosen_ids"] and ys[1] is row["rejected_ids"] and ys[0].tolist() == ids


# ------------------------------------------------------------------------------- folders of a model


def test_a_policys_tokenizer_is_its_parents_files(tmp_path, capsys, monkeypatch):
    """Saved by transformers, a LlamaTokenizer with `legacy` reads a prompt as other tokens."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    tokenizer = make_tokenizer("sentencepiece")
    for path in (parent, child):
        tiny_config("llama").save_pretrained(path)
    tokenizer.save_pretrained(parent)
    file = parent / "tokenizer_config.json"
    legacy = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), **legacy}))
    (parent / "additional_chat_templates").mkdir()
    (parent / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    (parent / "model.safetensors").write_text("not copied")
    check_copy(str(parent))
    copy_tokenizer(str(parent), str(child))
    for path in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "additional_chat_templates/rag.jinja"):
        assert (child / path).read_bytes() == (parent / path).read_bytes()
    assert not (child / "model.safetensors").exists()
    ours, theirs = load_tokenizer(str(parent)), load_tokenizer(str(child))
    chat = [*ASK, {"role": "assistant", "content": " Sure.\n Now"}, *ASK]
    assert encode_prompt(ours, chat) == encode_prompt(theirs, chat)
    # the check sees a copy that reads otherwise
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: target.write_bytes(
        source.read_bytes().replace(b"\"<|\" ", b"\"<!\" ").replace(b"<|", b"[|")))
    with pytest.raises(SystemExit):
        check_copy(str(parent))
    assert "a copy of its tokenizer reads a conversation as other tokens" in capsys.readouterr().err


def test_of_several_templates_the_default_one(folder, tokenizer, tmp_path):
    for name, templates in (("named", {"default": BYTES_TEMPLATE, "rag": "{{ messages }}"}),
                            ("none", {"tool_use": BYTES_TEMPLATE, "rag": "{{ messages }}"})):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").unlink()
        several = copy.deepcopy(tokenizer)
        several.chat_template = templates
        several.save_pretrained(tmp_path / name)
    named = load_tokenizer(str(tmp_path / "named"))
    assert encode_prompt(named, ASK) == encode_prompt(tokenizer, ASK)
    ok(run("data/system_turn.py", "--model", tmp_path / "named", "--out", tmp_path / "turn"))
    empty = {"role": "system", "content": ""}
    turn = load_tokenizer(str(tmp_path / "turn"))
    assert encode_prompt(turn, ASK) == encode_prompt(tokenizer, [empty, *ASK])
    done = run("data/system_turn.py", "--model", tmp_path / "none", "--out", tmp_path / "no")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "default" in done.stderr


def test_an_empty_system_turn_is_the_models_own(any_folder, any_tokenizer, tmp_path):
    """As if the conversation had one; a policy that is trained from the model inherits it."""
    ok(run("data/system_turn.py", "--model", any_folder, "--out", tmp_path / "model"))
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    empty, short = {"role": "system", "content": ""}, {"role": "system", "content": "Be short."}
    for chat in (ASK, [*ASK, {"role": "assistant", "content": "No."}, *ASK]):
        assert encode_prompt(tokenizer, chat) == encode_prompt(any_tokenizer, [empty, *chat])
    assert encode_prompt(tokenizer, [short, *ASK]) == encode_prompt(any_tokenizer, [short, *ASK])
    response = encode_response(any_tokenizer, [empty, *ASK], "Hello")
    assert encode_response(tokenizer, ASK, "Hello") == response
    assert vocabulary(tokenizer) == vocabulary(any_tokenizer)
    make_model().config.save_pretrained(tmp_path / "policy")
    copy_tokenizer(str(tmp_path / "model"), str(tmp_path / "policy"))
    policy = load_tokenizer(str(tmp_path / "policy"))
    assert encode_prompt(policy, ASK) == encode_prompt(any_tokenizer, [empty, *ASK])


def test_a_reference_reads_the_same_tokens(folder, other_folder, tokenizer, tmp_path):
    """Its vocabulary may lack some that the rows do not hold or that were added later; where an id
    means another token, nothing is scored."""
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["another"])
    encoded = [(np.array([60, 61]), [np.array([70, 384]), np.array([71])])]
    check_same_tokens(added, folder, encoded)
    none = tmp_path / "none"
    shutil.copytree(other_folder, none)
    (none / "tokenizer.json").unlink()
    check_same_tokens(added, str(none), encoded)
    exchanged = json.loads(open(f"{folder}/tokenizer.json").read())
    vocab = exchanged["model"]["vocab"]
    first, second = tokenizer.convert_ids_to_tokens([70, 100])
    vocab[first], vocab[second] = vocab[second], vocab[first]
    other = shutil.copytree(other_folder, tmp_path / "exchanged")
    (other / "tokenizer.json").write_text(json.dumps(exchanged))
    check_same_tokens(tokenizer, str(other), [(np.array([60]), [np.array([71])])])
    row = {"id": "x", "prompt": ASK, "responses": ["a", "b"], "response_ids": [[70], [71]],
           "vocabulary": vocabulary(tokenizer)}
    done = run("label.py", "--model", folder, "--reference-model", other, "--out", tmp_path / "o",
               "--responses", dump(tmp_path / "r.jsonl", [row]))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"token 70 is {second!r} there, and {first!r} to the policy" in done.stderr


def test_one_limit_a_model():
    """The context, or the length at which the rotation of all positions changes."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
            "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 16}
    phi3 = tiny_config("phi3", max_position_embeddings=64, rope_parameters=rope,
                       original_max_position_embeddings=16)
    assert context_of(phi3) == 16
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    assert context_of(tiny_config("llama", rope_parameters=dynamic)) == 4096
    layers = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    assert context_of(transformers.Gemma3TextConfig(rope_parameters=layers)) == 16
    assert context_of(tiny_config("gemma3")) == 4096
    assert context_of(tiny_config("mamba")) == float("inf")

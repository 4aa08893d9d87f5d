"""What is scored and learnt is what the model wrote: ids, templates, BOS, control tokens."""

import copy
import gzip
import re
import timeit
import tracemalloc

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import core.sampling
from conftest import ROOT, dump, jsonl, make_model, ok, pair_rows, run
from core.chat import (
    answered,
    control_tokens,
    decode_response,
    encode_prompt,
    encode_response,
    encode_rows,
    encode_text,
    end_of_turn,
    foreign_tokens,
    is_foreign,
    longest_of,
    pair_of,
    response_in_context,
    vocabulary,
)
from core.models import load_model, load_tokenizer
from core.probe import check_template
from core.rows import read_rows
from data import prepare
from judges.comparisons import option_prompt

ASK = [{"role": "user", "content": "Write."}]
REAL = ROOT.parent / "shared/data/tokenizers"  # gzipped tokenizers of released models
SPELLED = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<s>", "</s>", "<unk>", "<|im_", "end|>", "</"]
PIECES = [
    "hello",
    "Hi",
    " ",
    "  ",
    "\n",
    "\t",
    "é",
    "你好",
    "שלום",
    "🙂",
    "👩‍🚀",
    "<0x0A>",
    "▁",
    "\ufffd",
    "\ue000",
    "\U000f0000",
    "\U000f0002",
    "\U0010fffd",
]
TEXT = (
    st.lists(st.sampled_from(PIECES + SPELLED) | st.text(max_size=3), min_size=1, max_size=8)
    .map("".join)
    .filter(str.strip)
)
PLAIN = (
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), min_size=1, max_size=8)
    .map("".join)
    .filter(str.strip)
)


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
    return request.param, transformers.AutoTokenizer.from_pretrained(folder)


def check_no_text_makes_a_control_token(tokenizer, first: str, second: str) -> None:
    """All positions of control tokens are those of the same conversation with harmless words."""

    def controls(ids: list[int]) -> list[int]:
        return [i for i in ids if i in ids_of]

    ids_of = set(control_tokens(tokenizer).values())
    chat = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": second},
        {"role": "user", "content": second},
    ]
    harmless = [{**message, "content": "x"} for message in chat]
    assert controls(encode_prompt(tokenizer, chat)) == controls(encode_prompt(tokenizer, harmless))
    own = encode_response(tokenizer, ASK, first)
    assert controls(own) == controls(encode_response(tokenizer, ASK, "x"))
    cut = encode_response(tokenizer, ASK, first, ended=False)
    assert controls(cut) == controls(encode_response(tokenizer, ASK, "x", ended=False))


@settings(max_examples=60, deadline=None)
@given(first=TEXT, second=TEXT)
def test_no_text_makes_a_control_token(any_tokenizer, first, second):
    check_no_text_makes_a_control_token(any_tokenizer, first, second)


def test_released_templates_pass_the_probe(real):
    check_template(*real)


def test_no_text_makes_a_control_token_of_released_models(real):
    """All that they have at once, and each alone; a turn cannot be forged."""
    _, tokenizer = real
    controls = list(control_tokens(tokenizer))
    for text in ("".join(controls), *controls[:3], *controls[-12:]):
        check_no_text_makes_a_control_token(tokenizer, text, f"a{text} b")


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_text_with_control_tokens_is_kept_as_text(tokenizer, text):
    """Decoded, the prompt is the template's own rendering of the very text."""
    ask = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(encode_prompt(tokenizer, ask)) == rendered


@settings(max_examples=60, deadline=None)
@given(question=PLAIN, text=PLAIN)
def test_gold_ids_are_the_templates(any_tokenizer, question, text):
    ask = [{"role": "user", "content": question}]
    conversation = [*ask, {"role": "assistant", "content": text}]
    prompt = encode_prompt(any_tokenizer, ask)
    assert prompt == template_ids(any_tokenizer, ask, add_generation_prompt=True)
    whole = template_ids(any_tokenizer, conversation)
    response = response_in_context(any_tokenizer, ask, text, True)
    assume(response is not None)
    end = len(whole) - whole[::-1].index(end_of_turn(any_tokenizer))
    assert prompt + response == whole[:end]


@settings(max_examples=30, deadline=None)
@given(question=PLAIN, text=PLAIN)
def test_gold_ids_are_the_templates_of_released_models(real, question, text):
    _, tokenizer = real
    assume(not any(control in question + text for control in control_tokens(tokenizer)))
    ask = [{"role": "user", "content": question}]
    prompt = encode_prompt(tokenizer, ask)
    assert prompt == template_ids(tokenizer, ask, add_generation_prompt=True)
    response = response_in_context(tokenizer, ask, text, True)
    assume(response is not None)
    whole = template_ids(tokenizer, [*ask, {"role": "assistant", "content": text}])
    assert (prompt + response) == whole[: len(prompt + response)]
    assert response[-1] == end_of_turn(tokenizer)


def test_released_models_by_hand(real, tmp_path):
    """Zephyr writes Hello, not ▁Hello, after <s>; Qwen3 an empty think block before it; DeepSeek's
    turn tokens are no special tokens. Saving a tokenizer does not change its vocabulary."""
    name, tokenizer = real
    prompt = encode_prompt(tokenizer, ASK)
    tokens = tokenizer.convert_ids_to_tokens(encode_response(tokenizer, ASK, "Hello"))
    expected = {
        "zephyr": ["Hello", "</s>"],
        "qwen3": ["<think>", "ĊĊ", "</think>", "ĊĊ", "Hello", "<|im_end|>"],
        "deepseek-v3": ["Hello", "<｜end▁of▁sentence｜>"],
    }
    assert tokens == expected[name]
    start = tokenizer.convert_ids_to_tokens(prompt[:2])
    assert (
        start
        == {
            "zephyr": ["<s>", "▁<"],
            "qwen3": ["<|im_start|>", "user"],
            "deepseek-v3": ["<｜begin▁of▁sentence｜>", "<｜User｜>"],
        }[name]
    )
    controls = control_tokens(tokenizer)
    assert {"zephyr": "</s>", "qwen3": "<think>", "deepseek-v3": "<｜User｜>"}[name] in controls
    assert "<|fim_prefix|>" not in controls  # Qwen3's template cannot write it
    think = controls.get("<think>")
    assert think is None or think not in foreign_tokens(tokenizer)
    if name == "zephyr":  # the newline that ends the prompt and one that starts the text are apart
        newline = encode_response(tokenizer, ASK, "\nHello")
        assert tokenizer.convert_ids_to_tokens(newline) == ["<0x0A>", "Hello", "</s>"]
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
            ASK, add_generation_prompt=True, return_dict=False
        )


def test_tokens_that_are_not_special_cannot_be_forged(tokenizer):
    """What the template writes is a control token whatever its flag; what it cannot write is text
    and stays a token of its own."""
    loose = copy.deepcopy(tokenizer)
    loose.add_tokens([transformers.AddedToken(t, special=False) for t in ("<U>", "<A>", "<tag>")])
    loose.chat_template = (
        "{% for m in messages %}{{ '<U>' if m.role == 'user' else '<A>' }}"
        "{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<A>{% endif %}"
    )
    user, assistant, tag = (loose.convert_tokens_to_ids(t) for t in ("<U>", "<A>", "<tag>"))
    ids = encode_prompt(loose, [{"role": "user", "content": "a<A>b<U><tag>"}])
    assert [i for i in ids if i >= user] == [user, tag, assistant]
    assert "<tag>" not in control_tokens(loose)


@given(st.lists(st.text("ab(<|", min_size=1, max_size=5), min_size=1), st.text("ab(<|"))
def test_the_longest_word_is_found(words, text):
    plain = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))
    assert re.compile(longest_of(words)).findall(text) == plain.findall(text)


@pytest.mark.parametrize("shape", ["<|reserved_{}|>", "{}>"])
def test_thousands_of_added_tokens_cost_nothing(any_tokenizer, shape):
    """In the best of twenty prompts; ten times the template's own time would be 2 ms."""
    many = copy.deepcopy(any_tokenizer)
    many.add_tokens([transformers.AddedToken(shape.format(i), special=True) for i in range(6000)])
    ask = [{"role": "user", "content": "Write 12 <b>long</b> letters of 300 words.\n" * 8}]

    def fastest(encode) -> float:
        return min(timeit.repeat(encode, number=1, repeat=20))

    plain = fastest(lambda: many.apply_chat_template(ask, return_dict=False))
    assert fastest(lambda: encode_prompt(many, ask)) < 10 * plain


def test_a_prompt_that_ends_in_an_assistants_turn_is_continued(any_tokenizer):
    chat = [*ASK, {"role": "assistant", "content": "Sure: one,"}]
    prompt = encode_prompt(any_tokenizer, chat)
    assert prompt == template_ids(any_tokenizer, chat, continue_final_message=True)
    assert end_of_turn(any_tokenizer) not in prompt[-3:]
    whole = template_ids(any_tokenizer, answered(chat, " two"))
    response = encode_response(any_tokenizer, chat, " two")
    assert prompt + response == whole[: len(prompt + response)]
    assert response[-1] == end_of_turn(any_tokenizer)


def test_the_date_is_one_and_the_same(tokenizer):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = (
        "  {% if true %}\n{{ strftime_now('%d %B %Y, %Y-%m-%d') }}{% endif %}"
        + tokenizer.chat_template
    )
    text = dated.decode(encode_prompt(dated, ASK))
    assert text.startswith("26 July 2024, 2024-07-26<|im_start|>user")


def test_a_leading_newline_that_merges_is_tokenised_alone(tokenizer, capsys):
    """Where prompt ids are no prefix of the conversation's."""
    merging = copy.deepcopy(tokenizer)
    merging.add_tokens([transformers.AddedToken("\n\n", special=False, normalized=False)])
    rows = [{"id": "a", "prompt": ASK, "chosen": "\nHello", "rejected": "Hello"}]
    config = make_model().config
    config.vocab_size = len(merging)
    ((prompt, (alone, within)),) = encode_rows(config, merging, rows, "file", pair_of)
    assert alone.tolist() == merging("\nHello").input_ids + [2] and prompt[-1] == alone[0]
    assert within.tolist() == merging("Hello").input_ids + [2]
    assert "file: 1 responses are tokenised alone" in capsys.readouterr().err


def test_a_character_cut_in_half_does_not_enter_the_text(any_tokenizer):
    """Also after a whole one that is bytes too; one that the model wrote to its end stays."""

    def ids_of(text: str) -> list[int]:
        return encode_response(any_tokenizer, ASK, text, ended=False)

    ids, whole = ids_of("Hi 🙂🙂"), len(ids_of("Hi 🙂"))
    assert len(ids) == whole + 4  # four bytes
    for n in range(whole, len(ids)):
        assert decode_response(any_tokenizer, ids[:n], False) == "Hi 🙂"
    assert decode_response(any_tokenizer, ids, False) == "Hi 🙂🙂"
    assert decode_response(any_tokenizer, [*ids_of("Hi"), end_of_turn(any_tokenizer)], True) == "Hi"


def sampled(monkeypatch, answers: list[list[int]]) -> None:
    """Let the sampler write these answers, over and over."""
    monkeypatch.setattr(
        core.sampling,
        "sample",
        lambda model, prompts, u, *rest: [answers[k % len(answers)] for k in range(len(u))],
    )


def test_sampled_ids_survive_to_training(any_folder, other_folder, tmp_path, monkeypatch):
    """generate → label → dro → train, with tokens that their text does not come back as. The scores
    are those of the very ids under a plain forward pass."""
    model, tokenizer = load_model(any_folder, torch.device("cpu")), load_tokenizer(any_folder)
    dice = np.random.default_rng(0)
    answers = [
        dice.integers(3, 384, size).tolist() + [2] * ended
        for size, ended in ((7, 1), (5, 0), (9, 1), (6, 1), (8, 0), (4, 1))
    ]
    prompts = dump(
        tmp_path / "p.jsonl",
        [{"id": str(k), "prompt": [{"role": "user", "content": f"Say {k}."}]} for k in range(3)],
    )
    sampled(monkeypatch, answers)
    ok(
        run(
            "generate.py",
            "--model",
            any_folder,
            "--prompts",
            prompts,
            "-n",
            "2",
            "--out",
            tmp_path / "r.jsonl",
            "--precision",
            "fp32",
            "--max-new-tokens",
            "9",
        )
    )
    rows = jsonl(tmp_path / "r.jsonl")
    assert sorted(ids for row in rows for ids in row["response_ids"]) == sorted(answers)
    texts = [
        encode_response(tokenizer, row["prompt"], text, ended)
        for row in rows
        for text, ended in zip(row["responses"], row["ended"])
    ]
    assert not all(ids in answers for ids in texts)
    said = ok(
        run(
            "label.py",
            "--model",
            any_folder,
            "--reference-model",
            other_folder,
            "--responses",
            tmp_path / "r.jsonl",
            "--out",
            tmp_path / "l.jsonl",
            "--precision",
            "fp32",
        )
    ).stdout
    assert "all read as sampled" in said
    labelled = pair_rows(tmp_path / "l.jsonl")
    by_id = {row["id"]: row for row in rows}
    for row in labelled:
        prompt = encode_prompt(tokenizer, row["prompt"])
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            k = by_id[row["id"]]["response_ids"].index(ids)
            assert row[side] == by_id[row["id"]]["responses"][k]
            logps = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            own = sum(logps[len(prompt) + j - 1, t].item() for j, t in enumerate(ids))
            assert row[f"{side}_logp"] == pytest.approx(own, abs=1e-3)
    ok(run("dro.py", "--pairs", tmp_path / "l.jsonl", "--out", tmp_path / "w.jsonl"))
    worst = pair_rows(tmp_path / "w.jsonl")
    encoded = encode_rows(model.config, tokenizer, worst, "w", pair_of)
    assert [[y.tolist() for y in ys] for _, ys in encoded] == [
        [r["chosen_ids"], r["rejected_ids"]] for r in labelled
    ]
    train = ["train.py", "--model", any_folder, "--anchor", "init", "--precision", "fp32"]
    done = ok(run(*train, "--pairs", tmp_path / "w.jsonl", "--out", tmp_path / "policy"))
    assert "3 pairs, all read as sampled" in done.stdout and "not those of" not in done.stderr

    # ids of another vocabulary mean something else: the text is read, and that is said
    for row in worst:
        row["vocabulary"] = "another"
    done = run(*train, "--pairs", dump(tmp_path / "v.jsonl", worst), "--out", tmp_path / "other")
    assert "3 read from text" in ok(done).stdout
    again = ok(
        run(
            "label.py",
            "--model",
            any_folder,
            "--reference",
            "none",
            "--precision",
            "fp32",
            "--pairs",
            tmp_path / "v.jsonl",
            "--out",
            tmp_path / "again.jsonl",
        )
    ).stdout
    assert "3 read from text" in again
    for row in pair_rows(tmp_path / "again.jsonl"):
        text = encode_response(tokenizer, row["prompt"], row["chosen"], row["chosen_ended"])
        assert row["chosen_ids"] == text and row["vocabulary"] == vocabulary(tokenizer)


def test_answers_with_special_tokens_inside_are_not_learnt(
    folder, tokenizer, tmp_path, monkeypatch
):
    """Left out of labels and counted, with a model and without; their text is kept."""
    answers = [[50, 0, 51, 2], [52, 53, 2], [54, 55, 56], [57, 2]]
    assert [is_foreign(tokenizer, ids, ids[-1] == 2) for ids in answers] == [True] + [False] * 3
    assert is_foreign(tokenizer, [50, 384], False) and not is_foreign(tokenizer, [2], True)
    sampled(monkeypatch, answers)
    prompts = dump(tmp_path / "p.jsonl", [{"id": "x", "prompt": ASK}])
    said = ok(
        run(
            "generate.py",
            "--model",
            folder,
            "--prompts",
            prompts,
            "-n",
            "4",
            "--out",
            tmp_path / "r.jsonl",
            "--max-new-tokens",
            "4",
        )
    ).stdout
    (row,) = jsonl(tmp_path / "r.jsonl")
    assert "1 with special tokens inside" in said
    assert row["responses"][0] == tokenizer.decode([50, 51])
    for name, flags in (
        ("model", ["--model", folder, "--reference", "none"]),
        ("vader", ["--judge", "vader"]),
    ):
        # vader's best is the first
        row["responses"] = ["Wonderful!", "Good.", "Well.", "Terrible!"]
        responses = dump(tmp_path / "changed.jsonl", [row])
        done = ok(run("label.py", *flags, "--responses", responses, "--out", tmp_path / name))
        assert "1 responses with special tokens inside left out" in done.stdout
        (labelled,) = pair_rows(tmp_path / name)
        assert {labelled["chosen"], labelled["rejected"]} <= {"Good.", "Well.", "Terrible!"}
        for side in ("chosen", "rejected"):
            assert labelled[f"{side}_ids"] == answers[row["responses"].index(labelled[side])]


def test_an_evaluation_keeps_and_counts_what_holds_special_tokens(
    folder, tokenizer, tmp_path, monkeypatch
):
    """And a response keeps the stop token that the model took, of several that it may take."""
    model = tmp_path / "model"
    make_model().save_pretrained(model)
    tokenizer.save_pretrained(model)
    transformers.GenerationConfig(eos_token_id=[2, 7]).save_pretrained(model)
    sampled(monkeypatch, [[50, 1, 51, 7], [52, 2], [53, 7]])
    prompts = dump(tmp_path / "p.jsonl", [{"id": str(k), "prompt": ASK} for k in range(3)])
    ok(
        run(
            "evaluate.py",
            "--models",
            f"a={model}",
            "--prompts",
            prompts,
            "--judge",
            "vader",
            "--max-new-tokens",
            "4",
            "--out",
            tmp_path / "out",
        )
    )
    assert "`a`: special tokens stand inside 1 answers" in (tmp_path / "out/report.md").read_text()
    rows = jsonl(tmp_path / "out/eval/a.jsonl")
    assert all(row["ended"] == [True] for row in rows)
    by_text = {row["responses"][0]: row["response_ids"][0] for row in rows}
    assert by_text == {
        tokenizer.decode(ids[:-1], skip_special_tokens=True): ids
        for ids in ([50, 1, 51, 7], [52, 2], [53, 7])
    }


CHANNELS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|pad|>user{{ m.content }}<|im_end|>"
    "{% else %}<|pad|>assistant<c>final<m>{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|pad|>assistant{% endif %}"
)


def test_channels(tokenizer):
    """A template that writes a channel's name into an answer: gold answers have it, and what was
    sampled with it is no text alone."""
    multi = copy.deepcopy(tokenizer)
    multi.add_tokens([transformers.AddedToken(t, special=True) for t in ("<c>", "<m>")])
    multi.chat_template = CHANNELS
    ids = encode_response(multi, ASK, "Hi <m>")
    tokens = multi.convert_ids_to_tokens(ids)
    assert multi.decode(ids) == "<c>final<m>Hi <m><|im_end|>" and tokens.count("<m>") == 1
    assert is_foreign(multi, ids, True)
    assert not is_foreign(multi, encode_text(multi, "Hi <m>"), False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"response_ids": [[1], [-1]]}, "'response_ids' must be a list of lists of token ids"),
        ({"response_ids": [[1], [True]]}, "'response_ids' must be a list of lists of token ids"),
        ({"response_ids": [[1], []]}, "'response_ids' must be a list of lists of token ids"),
        ({"response_ids": [[1]]}, "'response_ids' must hold a value for each of its 2 responses"),
        ({"ended": [True]}, "'ended' must hold a value for each of its 2 responses"),
        ({"vocabulary": 7}, "'vocabulary' must be a string"),
        ({"response_ids": [[50, 384], [51]]}, "has the token 384; the model knows 384"),
    ],
)
def test_wrong_ids_are_one_line(folder, tokenizer, tmp_path, change, message):
    row = {
        "id": "x",
        "prompt": ASK,
        "responses": ["a", "b"],
        "response_ids": [[70], [71]],
        "vocabulary": vocabulary(tokenizer),
        **change,
    }
    if "384" in message:  # a token of the vocabulary without a row in the model
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(["another"])
        model = tmp_path / "model"
        make_model().save_pretrained(model)
        tokenizer.save_pretrained(model)
        folder, row["vocabulary"] = model, vocabulary(tokenizer)
    done = run(
        "label.py",
        "--model",
        folder,
        "--reference",
        "none",
        "--out",
        tmp_path / "o",
        "--responses",
        dump(tmp_path / "r.jsonl", [row]),
    )
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_letters_are_read_in_context(any_tokenizer):
    """A, not ▁A: the token that a judge would write."""
    rows = [{"id": "0", "prompt": option_prompt(ASK, "one", "two")}]
    config = make_model(max_position_embeddings=4096).config
    letters = [("A", False, None), ("B", False, None)]
    ((prompt, answers),) = encode_rows(config, any_tokenizer, rows, "", lambda row: letters)
    assert any_tokenizer.convert_ids_to_tokens([i for ids in answers for i in ids]) == ["A", "B"]
    whole = template_ids(any_tokenizer, answered(rows[0]["prompt"], "A"))
    assert whole[: len(prompt) + 1] == [*prompt, *answers[0]]


def test_prepare_keeps_what_was_sampled_and_flips_it_whole(tmp_path):
    row = {
        "prompt": "Write.",
        "chosen": "yes",
        "rejected": "no",
        "chosen_ids": [5, 2],
        "rejected_ids": [6, 7],
        "chosen_ended": True,
        "rejected_ended": False,
        "vocabulary": "v",
    }
    (kept,), *_ = prepare.collect(dump(tmp_path / "d.jsonl", [row]))
    assert {key: kept[key] for key in row if key != "prompt"} == {
        key: row[key] for key in row if key != "prompt"
    }
    flipped = copy.deepcopy(kept)
    prepare.flip(flipped)
    for key in ("", "_ids", "_ended"):
        assert flipped[f"chosen{key}"] == row[f"rejected{key}"]
        assert flipped[f"rejected{key}"] == row[f"chosen{key}"]
    assert flipped["vocabulary"] == "v"


def test_an_empty_system_turn_is_the_models_own(any_folder, any_tokenizer, tmp_path):
    """As if the conversation had one; a policy that is trained from the model inherits it."""
    ok(run("data/system_turn.py", "--model", any_folder, "--out", tmp_path / "model"))
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    empty, own = {"role": "system", "content": ""}, {"role": "system", "content": "Be short."}
    for chat in (ASK, [*ASK, {"role": "assistant", "content": "No."}, *ASK]):
        assert encode_prompt(tokenizer, chat) == encode_prompt(any_tokenizer, [empty, *chat])
    assert encode_prompt(tokenizer, [own, *ASK]) == encode_prompt(any_tokenizer, [own, *ASK])
    response = encode_response(any_tokenizer, [empty, *ASK], "Hello")
    assert encode_response(tokenizer, ASK, "Hello") == response
    assert vocabulary(tokenizer) == vocabulary(any_tokenizer)
    tokenizer.save_pretrained(tmp_path / "policy")
    policy = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert encode_prompt(policy, ASK) == encode_prompt(any_tokenizer, [empty, *ASK])


def test_ids_take_four_bytes_and_are_kept_once(tokenizer, tmp_path):
    """As lists they take 36 bytes a token."""
    ids = [300 + i % 80 for i in range(2000)]
    row = {"prompt": ASK, "chosen": "a", "rejected": "b", "vocabulary": vocabulary(tokenizer)}
    row |= {"chosen_ids": ids, "rejected_ids": ids}
    path = dump(tmp_path / "pairs.jsonl", [{"id": str(i), **row} for i in range(50)])
    config = make_model(max_position_embeddings=4096).config
    encode_rows(config, tokenizer, read_rows(str(path), "preferences"), "file", pair_of)
    tracemalloc.start()  # what is found of a tokenizer once is not counted
    rows = read_rows(str(path), "preferences")
    encoded = encode_rows(config, tokenizer, rows, "file", pair_of)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 6 * 50 * 2 * 2000
    for own, (_, ys) in zip(rows, encoded):
        assert ys[0] is own["chosen_ids"] and ys[1] is own["rejected_ids"] and ys[0].tolist() == ids

"""What is scored and learnt is what the model wrote: ids, templates, BOS, control tokens."""
import copy
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, dump, jsonl, ok, pair_rows, plain_logp, refused, run, saved
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
    check_same_tokens,
    context_of,
    copy_tokenizer,
    load_model,
    load_tokenizer,
)

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


def encoded_of(tokenizer, rows: list[dict]) -> list:
    pairs = [pair_of(row) for row in rows]
    return encode_rows(tiny_config("llama"), tokenizer, rows, pairs, "file")


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


@settings(max_examples=30, deadline=None)
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
    ((prompt, (alone, within)),) = encoded_of(merging, rows)
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
    # Judges read all that was sampled: special tokens inside an answer are spelled out.
    inside = [*ids_of("Hi"), any_tokenizer.bos_token_id, *ids_of("Hi")]
    assert decode_response(any_tokenizer, inside, False).count(any_tokenizer.bos_token) == 1
    # A model may end its answers at a full stop: that is text.
    assert decode_response(any_tokenizer, ids_of("Hi."), True) == "Hi."


# ------------------------------------------------------------------- what a template does not write


def writing(tokenizer, content: str):
    """The tokenizer with a template that writes this in the place of a message's content."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("m['content']", content)
    assert other.chat_template != tokenizer.chat_template
    return other


@pytest.mark.parametrize("content, cut", [
    ("m['content'].split('</think>')[-1]", "Let me see.</think>Yes"),
    ("m['content'][:5]", "Surely"), ("m['content'] | lower", "Yes"), (None, "Yes")])
def test_a_response_that_the_template_does_not_write_in_full(any_tokenizer, capsys, content, cut):
    """Or that does not follow the prompt there: its row is left out, unless it has the ids that
    were sampled."""
    tokenizer = copy.deepcopy(any_tokenizer)
    if content is None:
        tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    else:
        tokenizer = writing(any_tokenizer, content)
    row = {"id": "x", "prompt": ASK, "chosen": cut, "rejected": "yes"}
    ids = {"vocabulary": vocabulary(tokenizer), "chosen_ids": [70], "rejected_ids": [72]}
    rows = [row, row | ids]
    encoded = encoded_of(tokenizer, rows)
    assert encoded[0] is None and encoded[1][1] == [[70], [72]]
    learnt, tokens = learnable_pairs(rows, encoded, "file")
    assert learnt == rows[1:] and tokens == encoded[1:]
    assert "file: 1 of 2 pairs are left out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        learnable_pairs(rows[:1], encoded[:1], "file")


def test_blanks_at_the_ends_may_be_trimmed_but_sides_must_differ(tokenizer, capsys):
    """Many templates trim a message: what is left is the response. Two that differ in blanks alone
    are one."""
    trims = writing(tokenizer, "m['content'] | trim")
    rows = [{"id": "x", "prompt": ASK, "chosen": chosen, "rejected": rejected}
            for chosen, rejected in ((" yes \n", "no"), ("yes ", "yes"), ("same", "same"))]
    encoded = encoded_of(trims, rows)
    assert encoded[0][1][0].tolist() == encode_response(tokenizer, ASK, "yes")
    learnt, _ = learnable_pairs(rows, encoded, "file")
    assert learnt == rows[:1]
    assert "file: 2 of 3 pairs are left out" in capsys.readouterr().err


# ------------------------------------------------------------------------ what a sampler has drawn


def test_sampled_ids_survive_to_training(any_folder, other_folder, tmp_path, monkeypatch):
    """generate → label → train, with tokens that their text does not come back as. The scores are
    those of the very ids under a plain forward pass."""
    model, tokenizer = load_model(any_folder, torch.device("cpu")), load_tokenizer(any_folder)
    shutil.copytree(other_folder, tmp_path / "reference")  # of whatever tokenizer
    (tmp_path / "reference/tokenizer.json").unlink()
    dice = np.random.default_rng(0)
    answers = [dice.integers(3, 384, size).tolist() + [2] * ended
               for size, ended in ((7, 1), (5, 0), (9, 1), (6, 1), (8, 0), (4, 1))]
    monkeypatch.setattr(generate, "sample", lambda model, prompts, u, *rest: answers)
    prompts = [{"id": str(k), "prompt": [{"role": "user", "content": f"{k}."}]} for k in range(3)]
    here = ["--model", any_folder, "--precision", "fp32"]
    drawn, labelled = tmp_path / "r.jsonl", tmp_path / "l.jsonl"
    ok(run("generate.py", *here, "--prompts", dump(tmp_path / "p.jsonl", prompts), "-n", 2,
           "--max-new-tokens", 9, "--out", drawn))
    by_id = {row["id"]: row for row in jsonl(drawn)}
    done = ok(run("label.py", *here, "--reference-model", tmp_path / "reference",
                  "--responses", drawn, "--out", labelled))
    assert "another vocabulary" not in done.stderr
    for row in pair_rows(labelled):
        prompt = encode_prompt(tokenizer, row["prompt"])
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            k = by_id[row["id"]]["response_ids"].index(ids)
            assert ids in answers and row[side] == by_id[row["id"]]["responses"][k]
            right = plain_logp(model, prompt, ids).item()
            assert row[f"{side}_logp"] == pytest.approx(right, abs=1e-3)
    done = ok(run("train.py", *here, "--pairs", labelled, "--out", tmp_path / "policy"))
    assert "3 pairs" in done.stdout and "another vocabulary" not in done.stderr


def test_ids_of_another_vocabulary_mean_something_else(tokenizer, capsys):
    """The text is read, and that is said."""
    row = {"id": "x", "prompt": ASK, "chosen": "a", "rejected": "b", "vocabulary": "another",
           "chosen_ids": [70], "rejected_ids": [72]}
    ((_, (chosen, _)),) = encoded_of(tokenizer, [row])
    assert chosen.tolist() == encode_response(tokenizer, ASK, "a")
    assert "the ids of 2 responses are of another vocabulary" in capsys.readouterr().err


# ------------------------------------------------------------------------------- folders of a model


def test_a_policys_tokenizer_is_its_parents_files(tmp_path):
    """Saved by transformers, a LlamaTokenizer with `legacy` reads a prompt as other tokens."""
    parent = Path(saved(tmp_path / "parent", tokenizer_of("sentencepiece"), tiny_config("llama")))
    child = Path(saved(tmp_path / "child", tiny_config("llama")))
    config = json.loads((parent / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    (parent / "tokenizer_config.json").write_text(json.dumps(config))
    copy_tokenizer(str(parent), str(child))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (child / file).read_bytes() == (parent / file).read_bytes()
    chat = answered(ASK, "Gladly.")
    ours, theirs = (load_tokenizer(str(path)).apply_chat_template(chat, return_dict=False)
                    for path in (parent, child))
    assert ours == theirs


@pytest.mark.parametrize("named", [False, True])
def test_an_empty_system_turn_is_the_models_own(any_folder, any_tokenizer, tmp_path, named):
    """As if the conversation had one; of several templates the default one has it."""
    model = shutil.copytree(any_folder, tmp_path / "model")
    if named:
        several = copy.deepcopy(any_tokenizer)
        several.chat_template = {"default": any_tokenizer.chat_template, "rag": "{{ messages }}"}
        several.save_pretrained(model)
    ok(run("data/system_turn.py", "--model", model, "--out", tmp_path / "turn"))
    tokenizer = load_tokenizer(str(tmp_path / "turn"))
    empty, short = {"role": "system", "content": ""}, {"role": "system", "content": "Be short."}
    for chat in (ASK, [*answered(ASK, "No."), *ASK]):
        assert encode_prompt(tokenizer, chat) == encode_prompt(any_tokenizer, [empty, *chat])
    chat = [short, *ASK]
    assert encode_prompt(tokenizer, chat) == encode_prompt(any_tokenizer, chat)
    response = encode_response(any_tokenizer, [empty, *ASK], "Hello")
    assert encode_response(tokenizer, ASK, "Hello") == response
    assert vocabulary(tokenizer) == vocabulary(any_tokenizer)


def test_a_reference_reads_the_same_tokens(folder, tokenizer, tmp_path, capsys):
    """Its vocabulary may lack some that were added later, or be unknown; where an id of the rows
    means another token, nothing is scored."""
    added, exchanged = copy.deepcopy(tokenizer), tmp_path / "exchanged"
    added.add_tokens(["another"])
    encoded = [(np.array([60, 61]), [np.array([70, 384]), np.array([71])])]
    check_same_tokens(added, folder, encoded)
    tiny_config("llama").save_pretrained(tmp_path / "none")
    check_same_tokens(added, str(tmp_path / "none"), encoded)
    assert "is not known" in capsys.readouterr().err
    file = shutil.copytree(folder, exchanged) / "tokenizer.json"
    state = json.loads(file.read_text())
    first, second = tokenizer.convert_ids_to_tokens([70, 100])
    state["model"]["vocab"] |= {first: 100, second: 70}
    file.write_text(json.dumps(state))
    said = refused(capsys, check_same_tokens, tokenizer, str(exchanged), encoded)
    assert f"token 70 is {second!r} there, and {first!r} to the policy" in said


def test_one_limit_a_model():
    """The context, or the length at which the rotation of all positions changes, whether all layers
    rotate alike or not."""
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
                "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    layers = {"full_attention": longrope, "sliding_attention": {"rope_type": "default"}}
    limits = [context_of(tiny_config(family, **changes)) for family, changes in (
        ("gemma3_text", {"rope_parameters": layers}), ("gemma3", {}), ("mamba", {}))]
    assert limits == [16, 4096, float("inf")]

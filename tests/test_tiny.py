"""The tiny models that launches are tried with, and their two kinds of tokenizer."""

import pytest
import torch
from conftest import ok, run
from families import tokenizer_of
from hypothesis import example, given, settings, strategies
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tiny import FAMILIES, SIZES, tiny_model

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TEXTS = [
    "Hello",
    " Hello",
    "a  b\n\n c\t",
    "\n",
    " ",
    "🙂 👩‍👩‍👧",
    "été, 日本語, עברית, हिन्दी",
    "<|user|>\nHi</s>\n<|im_start|>assistant\n<unk>",
]


def kind_of(tokenizer) -> str:
    return {"<|im_start|>": "bytes", "<s>": "sentencepiece"}[tokenizer.bos_token]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_any_text_comes_back_from_its_tokens_and_none_makes_a_control_token(kind):
    tokenizer = tokenizer_of(kind)

    @settings(deadline=None)
    # U+2581 is how SentencePiece writes a blank: as text it comes back as one.
    @given(
        strategies.text(
            strategies.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
        )
    )
    @example(TEXTS[0])
    @example(TEXTS[5])
    @example(TEXTS[7])
    def comes_back(text):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.added_tokens_decoder)

    comes_back()


def test_any_sampled_tokens_can_be_decoded(any_tokenizer):
    """A random model samples halves of characters and control tokens."""
    draw = torch.Generator().manual_seed(0)
    for ids in torch.randint(len(any_tokenizer), (200, 8), generator=draw).tolist():
        any_tokenizer.decode(ids).encode()
        any_tokenizer.decode(ids, skip_special_tokens=True).encode()


def test_a_text_alone_is_other_tokens_than_in_a_conversation(any_tokenizer):
    """The sentencepiece kind prefixes a blank to what is encoded, so an answer must not be."""
    alone = any_tokenizer("Hello", add_special_tokens=False).input_ids
    prompt = any_tokenizer.apply_chat_template(HELLO[:1], add_generation_prompt=True).input_ids
    whole = any_tokenizer.apply_chat_template(HELLO).input_ids
    assert whole[: len(prompt)] == prompt
    answer = any_tokenizer.convert_ids_to_tokens(whole[len(prompt) :])
    alone = any_tokenizer.convert_ids_to_tokens(alone)
    if kind_of(any_tokenizer) == "bytes":
        assert alone == ["H", "ell", "o"]
        assert answer == ["H", "ell", "o", "<|im_end|>", "Ċ"]
    else:
        assert alone == ["▁", "H", "ell", "o"]
        assert answer == ["H", "ell", "o", "</s>", "▁", "<0x0A>"]


def test_templates(any_tokenizer):
    text = any_tokenizer.apply_chat_template(HELLO, tokenize=False)
    opened = any_tokenizer.apply_chat_template(
        HELLO[:1], tokenize=False, add_generation_prompt=True
    )
    if kind_of(any_tokenizer) == "bytes":
        assert text == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n")
        assert opened == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    else:  # what zephyr-7b's own template renders
        assert text == "<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
        assert opened == "<|user|>\nHi</s>\n<|assistant|>\n"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_saved_and_loaded_it_is_the_same_tokenizer(any_tokenizer, architecture, tmp_path):
    """Loading looks at config.json too, and has its own idea of some families' tokenizers."""
    any_tokenizer.save_pretrained(tmp_path / "once")
    tiny_model(architecture, 0).config.save_pretrained(tmp_path / "once")
    once = AutoTokenizer.from_pretrained(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    twice = AutoTokenizer.from_pretrained(tmp_path / "twice")
    bos = [1] if kind_of(any_tokenizer) == "sentencepiece" else []
    for loaded in (once, twice):
        assert loaded.get_vocab() == any_tokenizer.get_vocab()
        assert loaded.chat_template == any_tokenizer.chat_template
        assert loaded.special_tokens_map == any_tokenizer.special_tokens_map
        for text in TEXTS:
            plain = any_tokenizer(text, add_special_tokens=False).input_ids
            assert loaded(text, add_special_tokens=False).input_ids == plain
            assert loaded(text).input_ids == any_tokenizer(text).input_ids == bos + plain
            assert loaded.decode(plain) == any_tokenizer.decode(plain)
        prompt = loaded.apply_chat_template(HELLO).input_ids
        assert prompt == any_tokenizer.apply_chat_template(HELLO).input_ids
        assert prompt.count(loaded.bos_token_id) == (0 if bos else 2)  # ChatML's opens each turn


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_command_makes_a_policy_and_a_base_model(architecture, tmp_path):
    ok(run("data/tiny.py", "--architecture", architecture, "--out", tmp_path / "tiny"))
    tokenizer, base = (AutoTokenizer.from_pretrained(tmp_path / "tiny" / name)
                       for name in ("model", "base"))
    assert kind_of(tokenizer) == "bytes" and tokenizer.chat_template
    assert base.get_vocab() == tokenizer.get_vocab() and base.chat_template is None
    model, other = (AutoModelForCausalLM.from_pretrained(tmp_path / "tiny" / name)
                    for name in ("model", "base"))
    assert model.config.model_type == other.config.model_type == architecture
    assert model.config.vocab_size == SIZES["vocab_size"] == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.num_parameters() < 100_000
    weights = model.get_input_embeddings().weight
    assert not torch.equal(weights, other.get_input_embeddings().weight)
    assert torch.equal(weights, tiny_model(architecture, 0).get_input_embeddings().weight)


def test_other_families_are_refused(tmp_path):
    done = run("data/tiny.py", "--architecture", "gemma2", "--out", tmp_path / "tiny")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "gemma2" in done.stderr and "phi3" in done.stderr

"""The tiny models that launches are tried with."""

import pytest
import torch
from conftest import ok, one_line, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tiny import FAMILIES, SIZES, tiny_model


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_command_makes_a_policy_and_a_base_model(architecture, tmp_path):
    ok(run("data/tiny.py", "--architecture", architecture, "--out", tmp_path / "tiny"))
    tokenizer, base = (AutoTokenizer.from_pretrained(tmp_path / "tiny" / name)
                       for name in ("model", "base"))
    assert tokenizer.chat_template
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
    one_line(done, "gemma2", "phi3")

"""The tiny models that launches are tried with."""

from conftest import ok, one_line, run
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_the_command_makes_a_policy_and_a_base_model(tmp_path):
    ok(run("data/tiny.py", "--architecture", "phi3", "--out", tmp_path / "tiny"))
    tokenizer, base = (AutoTokenizer.from_pretrained(tmp_path / "tiny" / name)
                       for name in ("model", "base"))
    assert tokenizer.chat_template
    assert base.get_vocab() == tokenizer.get_vocab() and base.chat_template is None
    model, other = (AutoModelForCausalLM.from_pretrained(tmp_path / "tiny" / name)
                    for name in ("model", "base"))
    assert model.config.model_type == other.config.model_type == "phi3"
    assert model.get_input_embeddings().weight[9, 9] != other.get_input_embeddings().weight[9, 9]


def test_other_families_are_refused(tmp_path):
    done = run("data/tiny.py", "--architecture", "gemma2", "--out", tmp_path / "tiny")
    one_line(done, "gemma2", "phi3")

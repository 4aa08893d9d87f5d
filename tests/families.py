"""A tiny random model of any family of decoders that transformers knows, and the two kinds of
tokenizer that released models have, to try what the project says of families."""

import dataclasses
import json
import string

import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from data.tiny import PROMPTS, make_tokenizer

# What is small, by the names that families have for it; a family takes the names that it knows.
SIZES = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 8,
    "max_position_embeddings": 4096, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    # attention through a latent vector
    "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    # linear attention and state spaces
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_d_ssm": 64,
}
# Hybrids of recurrence and attention get a layer of each; some sizes must fit one another.
LATENT = {"num_key_value_heads": 4}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v3": LATENT,
    "gemma3": {"vision_config": {"hidden_size": 32, "intermediate_size": 64,
                                 "num_hidden_layers": 1, "num_attention_heads": 4}},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "minicpm3": LATENT,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3},
}


def tiny_config(architecture: str, **changes) -> transformers.PreTrainedConfig:
    """The configuration of a tiny model; `changes` go before what this file knows of a family."""
    kind = CONFIG_MAPPING[architecture]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    parts = {
        name: tiny_config(part.model_type)
        for name, part in kind.sub_configs.items()
        if getattr(part, "model_type", "") in CONFIG_MAPPING
    }
    sizes = {name: size for name, size in SIZES.items() if name in known}
    return kind(**{**sizes, **parts, **FAMILIES.get(architecture, {}), **changes})


def tiny_model(architecture: str, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A random model of a family, float32, for evaluation; `architecture` is a model_type of
    transformers, `changes` are settings of its configuration."""
    config = tiny_config(architecture, **changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # A size that SIZES does not name is the real model's.
    assert model.num_parameters() < 10e6, architecture
    return model


def tokenizer_of(kind: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 384 tokens: bytes (byte-level BPE, as GPT-2's and Llama-3's) or sentencepiece
    (as Llama-2's and Mistral's)."""
    return make_tokenizer() if kind == "bytes" else sentencepiece_like()


# Like Zephyr's: its marks are plain text but for </s>, and it does not write <s>.
SENTENCEPIECE_TEMPLATE = (
    "{% for m in messages %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def sentencepiece_like() -> transformers.PreTrainedTokenizerFast:
    """A blank is put before a text (and after a control token), <s> before all; decoding takes one
    blank away. Characters outside the vocabulary, newlines too, are their UTF-8 bytes."""
    controls = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]

    # SentencePiece learns pieces of words, each with the blank before it.
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.train_from_iterator(PROMPTS, trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"] - len(controls + byte_tokens),
        initial_alphabet=list(string.ascii_letters), show_progress=False))
    bpe = json.loads(learnt.to_str())["model"]
    pieces = sorted(bpe["vocab"], key=bpe["vocab"].get)

    raw = Tokenizer(models.BPE(
        vocab={token: i for i, token in enumerate(controls + byte_tokens + pieces)},
        merges=[tuple(merge) for merge in bpe["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in controls])
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    raw.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template=SENTENCEPIECE_TEMPLATE,
        bos_token="<s>", eos_token="</s>", unk_token="<unk>")

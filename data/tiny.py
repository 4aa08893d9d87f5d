"""A model that a launch can be checked with: the architecture of the real one, tiny and random, and
a few made-up pairs.

    bash run.sh configs/mistral-7b.env --tiny       every stage of a config in a minute on two cores
    python -m data.tiny --architecture mistral --out tiny

OUT/model, OUT/base (other weights, no chat template) and OUT/pairs.jsonl are written.
"""
import argparse
import dataclasses
import json
import os
import string
from pathlib import Path

from core.stage import exit_if_complete, exit_if_looking, parser, publish, run_stage, settings_of

# Families whose released models have a tokenizer like sentencepiece's; the others get bytes.
SENTENCEPIECE = ("mistral", "phi3")


def flags() -> tuple[argparse.Namespace, dict]:
    """The arguments, and what decides the output. Ends the program where that is complete."""
    cli = parser(__doc__)
    cli.add_argument("--architecture", required=True,
                     help="model_type of transformers: mistral, llama, phi, phi3, gemma2, …")
    cli.add_argument("--tokenizer", choices=["bytes", "sentencepiece"],
                     help="byte-level BPE, or one that prefixes a blank and adds BOS; not given: "
                          f"sentencepiece for {' and '.join(SENTENCEPIECE)}, else bytes")
    cli.add_argument("--out", type=os.path.normpath, required=True,
                     help="folder for model/, base/ and pairs.jsonl")
    args = cli.parse_args()
    if args.tokenizer is None:
        args.tokenizer = "sentencepiece" if args.architecture in SENTENCEPIECE else "bytes"
    settings = settings_of(args)
    exit_if_complete(args.out, settings)
    exit_if_looking(args.out)
    return args, settings


if __name__ == "__main__":
    args, settings = flags()  # here already: what is imported below takes seconds to load

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import core.models  # noqa: F401  keeps transformers quiet
from core.rows import fail, write_rows

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [
    json.loads(line)["prompt"]
    for line in open(ROOT / "data/prompts.jsonl", encoding="utf-8")
]

# Like ChatML: its marks are control tokens.
BYTES_TEMPLATE = (
    "{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Zephyr's: its marks are plain text but for </s>, and it does not write <s>.
SENTENCEPIECE_TEMPLATE = (
    "{% for m in messages %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# What is small in a tiny model, by the names that families have for it; a family takes the names
# that it knows.
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
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"n_shared_experts": 1},
    "gemma3": {"vision_config": {"hidden_size": 32, "intermediate_size": 64,
                                 "num_hidden_layers": 1, "num_attention_heads": 4}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 384,
                     "hidden_size_per_layer_input": 8, "laurel_rank": 8,
                     "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 384,
                    "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "glm4_moe_lite": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "minicpm3": LATENT,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "youtu": LATENT,
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}


def make_tokenizer(kind: str = "bytes") -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 384 tokens with a chat template, learnt from the demo's prompts.

    `kind` is bytes (byte-level BPE, as GPT-2's and Llama-3's) or sentencepiece (as Llama-2's and
    Mistral's). Both have the ids of `SIZES` for padding or <unk>, start and end.
    """
    return {"bytes": byte_level, "sentencepiece": sentencepiece_like}[kind]()


def byte_level() -> transformers.PreTrainedTokenizerFast:
    """Text is the same tokens wherever it stands; nothing is put before it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(PROMPTS, trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"], special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template=BYTES_TEMPLATE,
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>")


def sentencepiece_like() -> transformers.PreTrainedTokenizerFast:
    """A blank is put before a text (and after a control token), <s> before all; decoding takes one
    blank away. Characters outside the vocabulary, newlines too, are their UTF-8 bytes."""
    controls = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]

    # SentencePiece learns pieces of words, each with the blank before it.
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    lines = [line for prompt in PROMPTS for line in prompt.splitlines()]
    learnt.train_from_iterator(lines, trainers.BpeTrainer(
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
    """A random model of a family of decoders, float32, for evaluation.

    `architecture` is a model_type of transformers; `changes` are settings of its configuration.
    One that there is not, or that this file cannot make small, ends the program with one line.
    """
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        fail(f"--architecture {architecture}: transformers {transformers.__version__} knows no "
             "causal language model of this model_type")
    auto = transformers.AutoModelForCausalLM
    try:
        config = tiny_config(architecture, **changes)
        # Without memory first: a size that SIZES does not name is the real one's.
        with torch.device("meta"):
            size = auto.from_config(config).num_parameters()
        if size > 10e6:
            fail(f"--architecture {architecture}: cannot be made tiny: it would have {size:.0e} "
                 "parameters, by sizes that data/tiny.py does not name")
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            model(torch.arange(3, 9)[None])
    except Exception as error:
        # Configurations and models raise whatever they like.
        fail(f"--architecture {architecture}: cannot be made tiny: {error}")
    return model


def main(args: argparse.Namespace, settings: dict) -> None:
    models_by_name = {"model": tiny_model(args.architecture, seed=0),
                      "base": tiny_model(args.architecture, seed=1)}
    tokenizer = make_tokenizer(args.tokenizer)
    pairs = [
        {"prompt": prompt, "chosen": f"Gladly: {prompt[::-1]}", "rejected": f"No. {prompt[3:20]}"}
        for prompt in PROMPTS[:36]
    ]

    def write(tmp: str) -> None:
        for name, model in models_by_name.items():
            model.save_pretrained(f"{tmp}/{name}")
            tokenizer.save_pretrained(f"{tmp}/{name}")
            tokenizer.chat_template = None
        write_rows(f"{tmp}/pairs.jsonl", pairs)

    publish(args.out, settings, {"pairs": len(pairs)}, write)
    print(f"tiny: a random {args.architecture} model, {args.tokenizer} tokens, "
          f"{len(pairs)} pairs → {args.out}")


if __name__ == "__main__":
    run_stage(main, args, settings)

"""What a launch can be tried with: a tiny random model of the kind that a config names, and a few
made-up pairs.

    bash run.sh configs/mistral-7b.env --tiny       every stage of a config in a minute on two cores
    python -m data.tiny --architecture mistral --out tiny

OUT/model, OUT/base (other weights, no chat template) and OUT/pairs.jsonl are written.
"""
import argparse
import json
from pathlib import Path

from core.stage import exit_if_looking, parser, publish, run_stage, start

# The families that configs name.
FAMILIES = ("llama", "mistral", "phi", "phi3")


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the output is complete."""
    cli = parser(__doc__, out="folder for model/, base/ and pairs.jsonl")
    cli.add_argument("--architecture", choices=FAMILIES, required=True,
                     help="model_type of transformers")
    args = cli.parse_args()
    start(args)
    exit_if_looking(args.out, writes=1 << 20)
    return args


if __name__ == "__main__":
    args = flags()  # here already: what is imported below takes seconds to load

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import core.models  # noqa: F401  keeps transformers quiet
from core.rows import write_rows

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [
    json.loads(line)["prompt"]
    for line in open(ROOT / "data/prompts.jsonl", encoding="utf-8")
]

# Like ChatML: its marks are control tokens.
TEMPLATE = (
    "{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    # Large enough that a random model's tokens depend on those before them.
    "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens with a chat template, learnt from the demo's prompts. Text is
    the same tokens wherever it stands; it has the ids of `SIZES` for padding, start and end."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(PROMPTS, trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"], special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template=TEMPLATE,
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>")


def tiny_model(architecture: str, seed: int) -> transformers.PreTrainedModel:
    """A random model of one of `FAMILIES`, float32."""
    config = transformers.AutoConfig.for_model(architecture, **SIZES)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def main(args: argparse.Namespace) -> None:
    tokenizer = make_tokenizer()
    pairs = [
        {"prompt": prompt, "chosen": f"Gladly: {prompt[::-1]}", "rejected": f"No. {prompt[3:20]}"}
        for prompt in PROMPTS[:36]
    ]

    def write(tmp: str) -> None:
        for seed, name in enumerate(["model", "base"]):
            tiny_model(args.architecture, seed).save_pretrained(f"{tmp}/{name}")
            tokenizer.save_pretrained(f"{tmp}/{name}")
            # A base model has none.
            tokenizer.chat_template = None
        write_rows(f"{tmp}/pairs.jsonl", pairs)

    publish(args, {"pairs": len(pairs)}, write)
    print(f"tiny: a random {args.architecture} model and {len(pairs)} pairs → {args.out}")


if __name__ == "__main__":
    run_stage(main, args)

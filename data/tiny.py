"""A model that a launch can be checked with: the architecture of the real one, tiny and random, and a few made-up pairs.

    bash run.sh configs/mistral-7b.env --tiny                  every stage of a config in a minute on two cores
    python data/tiny.py --architecture mistral --out tiny      OUT/model, OUT/base (other weights, no chat template), OUT/pairs.jsonl
"""
import os
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this script lies below the root that imports start from
from core.rows import fail, write_rows
from core.stage import is_done, parser, publish, run_stage, settings_of

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PROMPTS = [json.loads(line)["prompt"] for line in open(ROOT / "data/prompts.jsonl", encoding="utf-8")]


def make_tokenizer():
    """A byte-level BPE tokenizer of 384 tokens, learnt from the demo's prompts, with a chat template."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(PROMPTS, trainers.BpeTrainer(vocab_size=384, special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
                                                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                                     pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--architecture", required=True, help="model_type of transformers: mistral, llama, phi, phi3, …")
    cli.add_argument("--out", type=os.path.normpath, required=True, help="folder for model/, base/ and pairs.jsonl")
    args = cli.parse_args()
    settings = settings_of(args)
    if is_done(args.out, settings):
        return
    import torch
    import transformers
    if args.architecture not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        fail(f"--architecture {args.architecture}: transformers {transformers.__version__} knows no such model_type")
    config = transformers.AutoConfig.for_model(args.architecture, vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                               num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1,
                                               eos_token_id=2, pad_token_id=0, initializer_range=0.2)

    def write(tmp: str) -> None:
        tokenizer = make_tokenizer()
        for seed, name in enumerate(("model", "base")):
            torch.manual_seed(seed)
            transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(f"{tmp}/{name}")
            tokenizer.save_pretrained(f"{tmp}/{name}")
            tokenizer.chat_template = None
        write_rows(f"{tmp}/pairs.jsonl", [{"prompt": prompt, "chosen": f"Gladly: {prompt[::-1]}", "rejected": f"No. {prompt[3:20]}"}
                                          for prompt in PROMPTS[:36]])
    publish(args.out, settings, {"pairs": 36}, write)
    print(f"tiny: a random {args.architecture} model and 36 pairs → {args.out}")


if __name__ == "__main__":
    run_stage(main)

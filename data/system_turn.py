"""A model whose prompts begin with an empty system turn where a conversation has none.

Some models were tuned that way: alignment-handbook's SFT puts one before every conversation without
a system turn (src/alignment/data.py, maybe_insert_system_message). That is a property of the model,
so it belongs into its chat template: every stage, judge and benchmark that encodes a prompt reads
it there, and the policies that are trained from the model inherit it.

OUT is the model's folder, by links, with such a template.

    python -m data.system_turn --model alignment-handbook/zephyr-7b-sft-full --out models/zephyr
"""
import argparse
import os
from pathlib import Path

from core.folder import policy_bytes
from core.stage import exit_if_looking, parser, publish, run_stage, start


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the output is complete."""
    cli = parser(__doc__, out="folder of the model")
    cli.add_argument("--model", required=True, help="a Hugging Face folder or hub id")
    args = cli.parse_args()
    start(args)
    exit_if_looking(args.out, writes=policy_bytes(args.model))
    return args


if __name__ == "__main__":
    args = flags()  # here already: what is imported below takes seconds to load

import huggingface_hub

from core.models import load_tokenizer

EMPTY_TURN = ("{%- if messages[0]['role'] != 'system' %}"
              "{%- set messages = [{'role': 'system', 'content': ''}] + messages %}"
              "{%- endif %}\n")
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# It goes before all other templates of a folder.
TEMPLATE = "chat_template.jinja"


def main(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.model)
    source = Path(args.model)
    if not source.is_dir():
        source = Path(huggingface_hub.snapshot_download(args.model, allow_patterns=FILES))

    def write(tmp: str) -> None:
        os.mkdir(tmp)
        for file in source.iterdir():
            if file.is_file() and file.name != TEMPLATE:
                os.symlink(file.resolve(), f"{tmp}/{file.name}")
        Path(tmp, TEMPLATE).write_text(EMPTY_TURN + tokenizer.chat_template, encoding="utf-8")
    publish(args, {}, write)
    print(f"system_turn: {args.model} with an empty system turn → {args.out}")


if __name__ == "__main__":
    run_stage(main, args)

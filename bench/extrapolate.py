"""A policy further along its way: π_init + c (π − π_init), weight by weight, without training, as
in ExPO (arXiv 2404.16792). Writes a Hugging Face folder in fp32 with the policy's tokenizer.

    python bench/extrapolate.py --model runs/demo/seed --reference-model models/smollm2 --scale 3 \\
        --out ray3
"""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core import stage  # noqa: E402
from core.models import copy_tokenizer, load_model  # noqa: E402


def main() -> None:
    cli = stage.parser(__doc__)
    cli.add_argument("--reference-model", required=True, help="π_init: folder or hub id")
    cli.add_argument("--model", required=True, help="π, trained from it")
    cli.add_argument("--scale", type=stage.positive, required=True, help="c; 1 is π itself")
    cli.add_argument("--out", type=os.path.normpath, required=True, help="folder of the new policy")
    args = cli.parse_args()
    stage.start(args)
    init, policy = (load_model(path, torch.device("cpu"))
                    for path in (args.reference_model, args.model))
    for start, weight in zip(init.parameters(), policy.parameters(), strict=True):
        weight.copy_(start + args.scale * (weight - start))

    def write(tmp: str) -> None:
        policy.save_pretrained(tmp, max_shard_size="1TB")
        copy_tokenizer(args.model, tmp)
    stage.publish(args, {}, write)
    print(f"extrapolate: {args.model} at c = {args.scale} → {args.out}")


if __name__ == "__main__":
    stage.run_stage(main)

"""What the papers' settings need, computed from the models' shapes before anything is launched: memory a GPU, FLOPs and hours.

    python bench/cost.py                                # 8 × A100/A800 80 GB
    python bench/cost.py --gpus 16 --tflops 989         # 16 × H100

Computed, not measured, from: a prompt of 200 tokens and responses of 256; `--mfu`, the share of a matrix product's speed that
bench/train.py measured on two CPU cores in bf16 with gradient checkpointing, for want of a GPU, taken here of the data sheet's
peak; and nothing for sampling, loading, saving and waiting.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch  # noqa: E402
import transformers  # noqa: E402

from core.policy import SHARES_PROMPT  # noqa: E402
from core.stage import natural  # noqa: E402
from core.training import training_flops  # noqa: E402

PROMPT, RESPONSE, TOKENS = 200, 256, 2048  # tokens a pass: run.sh's MICRO_TOKENS
SHAPES = {  # as in the published config.json: layers, hidden, intermediate, heads, key-value heads, vocabulary
    "mistral-7b": (32, 4096, 14336, 32, 8, 32000), "llama3-8b": (32, 4096, 14336, 32, 8, 128256), "phi-2": (32, 2560, 10240, 32, 32, 51200),
    "phi-3-14b": (40, 5120, 17920, 40, 10, 32064), "mistral-instruct-noseed": (32, 4096, 14336, 32, 8, 32000),
    "demo": (30, 576, 1536, 9, 3, 49152)}


def settings(config: str) -> tuple[str, list[int], int]:
    """(architecture, prompts of each round, steps' worth of pairs in the seed stage, its reference pass included) of a config."""
    script = (f"source configs/{config}.env; echo ${{ARCHITECTURE:-llama}}; echo ${{ROUNDS:-8000 20000 30000}}; "
              "echo $((${SEED_SIZE:-2000} * (3 * ${SEED_EPOCHS:-3} + 1) / 3)); echo ${SEED_POLICY-}")
    architecture, rounds, seed, policy = subprocess.run(["bash", "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return architecture, [int(n) for n in rounds.split()], 0 if policy else int(seed)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--gpus", type=natural, default=8)
    cli.add_argument("--tflops", type=float, default=312, help="dense bf16 peak of one GPU in the data sheet (A100, A800: 312; H100, H200: 989)")
    cli.add_argument("--mfu", type=float, default=0.27)
    args = cli.parse_args()
    rate = args.gpus * args.tflops * 1e12 * args.mfu
    print(f"| config | parameters | GB a GPU: one copy (DDP) | sharded over {args.gpus} | activations | train, label 10 K pairs: PFLOP | "
          f"hours | the whole run but sampling: hours |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, (layers, hidden, inner, heads, kv, vocabulary) in SHAPES.items():
        architecture, rounds, seed = settings(name)
        config = transformers.AutoConfig.for_model(architecture, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
                                                   num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=name == "demo", pad_token_id=0)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        count = sum(p.numel() for p in model.parameters())
        # weights, gradients and two Adam moments in fp32, the reference in fp32 on the rounds, weights in bf16 while a pass runs
        whole = 22 * count / 1e9
        # sharded, a whole layer (fp32, bf16, gradient) while it runs, and always the whole embedding and head: policy's, reference's, gradient
        ends = (1 if config.tie_word_embeddings else 2) * vocabulary * hidden
        sharded = (20 * count / args.gpus + 10 * (count - ends) / layers + 12 * ends) / 1e9
        # what gradient checkpointing keeps of every layer, one layer at work, and some six copies of the logits of 1 024 tokens
        activations = TOKENS * (4 * hidden * layers + 4 * (8 * hidden + 3 * inner)) / 1e9 + 6 * 1024 * vocabulary * 4 / 1e9
        pair = training_flops(model, [([0] * PROMPT, [[0] * RESPONSE] * 2)], architecture in SHARES_PROMPT)
        train, label = (1 + 0.8 / 3) * pair * 1e4, 2 / 3 * pair * 1e4  # the reference runs in the last 80 % of the steps; labelling is two forward passes
        total = (sum(rounds) / 1e4 * (train + label) + seed * pair) / rate / 3600
        print(f"| {name} | {count / 1e9:.2f} B | {whole:.1f} | {sharded:.1f} | {activations:.1f} | {train / 1e15:.0f}, {label / 1e15:.0f} | "
              f"{train / rate / 3600:.2f}, {label / rate / 3600:.2f} | {total:.1f} |")
    print(f"\nComputed at {args.mfu:.0%} of {args.tflops:.0f} TFLOP/s on {args.gpus} GPUs.")


if __name__ == "__main__":
    main()

"""What the papers' settings need, computed from the models' shapes before anything is launched.

    python bench/cost.py                                # 8 × A100/A800 80 GB
    python bench/cost.py --gpus 16 --tflops 989         # 16 × H100
    python bench/cost.py --gpus 32 --link 25            # four machines with 200 Gbit/s a GPU

Computed, not measured, from: a prompt of 200 tokens and responses of 256; `--mfu`, the share of a
matrix product's speed that bench/train.py measured on two CPU cores in bf16 with gradient
checkpointing, for want of a GPU, taken here of the data sheet's peak; and nothing for the time of
sampling, loading and waiting. GB are 10⁹ bytes.
"""
import argparse
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch  # noqa: E402
import transformers  # noqa: E402

from bench.flops import training_flops  # noqa: E402
from core.policy import SHARES_PROMPT, tokens_of  # noqa: E402
from core.sampling import PREFILL  # noqa: E402
from core.stage import natural, positive  # noqa: E402

PROMPT, RESPONSE = 200, 256
SCORED = 16384  # tokens a pass of labelling and judging, core/policy.py
CHUNK = 1024    # tokens whose logits exist at a time, core/policy.py
ROOM = 0.95     # share of a card that may be filled


class Shape(NamedTuple):
    """As in the published config.json."""
    layers: int
    hidden: int
    inner: int
    heads: int
    kv: int
    vocabulary: int
    context: int


SHAPES = {
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, 32000, 32768),
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128256, 8192),
    "phi-2": Shape(32, 2560, 10240, 32, 32, 51200, 2048),
    "phi-3-14b": Shape(40, 5120, 17920, 40, 10, 32064, 4096),
    "mistral-instruct-noseed": Shape(32, 4096, 14336, 32, 8, 32000, 32768),
    "demo": Shape(30, 576, 1536, 9, 3, 49152, 8192),
}


def settings(config: str) -> dict[str, str]:
    """What a config sets, and run.sh's defaults."""
    defaults = {
        "ARCHITECTURE": "llama", "ROUNDS": "8000 20000 30000", "SEED_SIZE": "2000",
        "SEED_EPOCHS": "3", "SEED_POLICY": "", "BATCH_SIZE": "32", "MICRO_TOKENS": "2048",
        "SAMPLE_TOKENS": "131072", "MAX_NEW_TOKENS": "300", "N": "2", "SHARD": "no",
    }
    script = f"source configs/{config}.env\n"
    script += "\n".join(f'echo "${{{name}-{value}}}"' for name, value in defaults.items())
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, check=True, capture_output=True,
                          text=True, env={"PATH": os.environ["PATH"]})
    return dict(zip(defaults, done.stdout.split("\n")))


def model_of(shape: Shape, architecture: str, tied: bool):
    """The model without its weights."""
    config = transformers.AutoConfig.for_model(
        architecture, num_hidden_layers=shape.layers, hidden_size=shape.hidden,
        intermediate_size=shape.inner, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv, vocab_size=shape.vocabulary, tie_word_embeddings=tied,
        pad_token_id=0)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


# ----------------------------------------------------------------------------------------- training


def whole_gb(count: int) -> float:
    """A GPU's share with a copy on each: weights, gradients and two Adam moments in fp32, the
    reference in fp32 on the rounds, weights in bf16 while a pass runs."""
    return 22 * count / 1e9


def sharded_gb(shape: Shape, count: int, gpus: int, tied: bool) -> float:
    """The same in shards; a whole layer (fp32, bf16, gradient) while it runs, and always the whole
    embedding and head: policy's, reference's, gradient."""
    ends = (1 if tied else 2) * shape.vocabulary * shape.hidden
    return (20 * count / gpus + 10 * (count - ends) / shape.layers + 12 * ends) / 1e9


def activations_gb(shape: Shape, tokens: int) -> float:
    """What gradient checkpointing keeps of every layer, one layer at work, and some six copies of
    the logits of CHUNK tokens."""
    kept = tokens * 4 * shape.hidden * shape.layers
    layer = tokens * 4 * (8 * shape.hidden + 3 * shape.inner)
    return (kept + layer + 6 * CHUNK * shape.vocabulary * 4) / 1e9


def passes(pairs: int, pair_tokens: int, budget: int) -> int:
    """Forward and backward passes in which a process works through its pairs of a step."""
    return math.ceil(pairs / max(1, budget // pair_tokens))


def gathered_gb(count: int, gpus: int) -> float:
    """What a GPU receives in a pass with sharded weights, in fp32: the policy's weights forward and
    again backward, its gradients once, the reference's weights."""
    return 4 * 4 * count * (gpus - 1) / gpus / 1e9


def checkpoint_gb(count: int) -> float:
    """Weights and two Adam moments in fp32. With sharded weights each process writes its own."""
    return 12 * count / 1e9


def host_gb(count: int, sharded: bool) -> float:
    """Main memory of the first machine: with shards one process reads the model in fp32 and hands
    out its layers; without, weights go straight to the GPUs, and one process gathers a checkpoint.
    """
    return 4 * count / 1e9 if sharded else checkpoint_gb(count)


# ------------------------------------------------------------------------------ sampling, labelling


def kv_bytes(shape: Shape) -> int:
    """Keys and values of one token in bf16."""
    return 2 * 2 * shape.layers * shape.kv * shape.hidden // shape.heads


def sampling_gb(shape: Shape, count: int, rows: int, prompt: int, new: int) -> float:
    """Weights in bf16; keys and values of `rows` responses, those of a layer twice while a token is
    added, and once for every query head; a piece of the prefill with its mask; the numbers that a
    token is drawn from."""
    tokens = rows * (prompt + new)
    layer = kv_bytes(shape) / shape.layers
    cache = tokens * (kv_bytes(shape) + layer + layer * shape.heads / shape.kv)
    piece = 2 * PREFILL * (8 * shape.hidden + 3 * shape.inner)
    mask = 3 * PREFILL * prompt
    drawn = rows * shape.vocabulary * (2 + 4 + 4 + 8)
    return (2 * count + cache + piece + mask + drawn) / 1e9


def largest_prompt(shape: Shape, count: int, n: int, new: int, memory: float) -> int:
    """Tokens of the longest prompt whose n responses fit a card, at most what the context takes."""
    at_none = sampling_gb(shape, count, n, 0, new)
    a_token = sampling_gb(shape, count, n, 1, new) - at_none
    return max(0, min(shape.context - new, int((ROOM * memory - at_none) / a_token)))


def scoring_gb(shape: Shape, count: int, predicted: int) -> float:
    """Labelling or judging: weights in fp32, the largest one in bf16 too, a layer at work, and the
    logits of `predicted` tokens, in bf16, fp32 and normalised."""
    largest = max(shape.vocabulary, shape.inner) * shape.hidden
    layer = SCORED * (8 * shape.hidden + 2 * (8 * shape.hidden + 3 * shape.inner))
    logits = predicted * shape.vocabulary * 10
    return (4 * count + 2 * largest + layer + logits) / 1e9


# -------------------------------------------------------------------------------------------- table


def row(cells: list) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(head: list[str], lines: list[list]) -> None:
    print("\n".join([row(head), row(["---"] * len(head)), *map(row, lines)]), end="\n\n")


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--gpus", type=natural, default=8)
    cli.add_argument("--memory", type=positive, default=80.0, help="GB of one GPU")
    cli.add_argument("--tflops", type=positive, default=312.0,
                     help="dense bf16 peak of one GPU in the data sheet (A100, A800: 312; H100, "
                     "H200: 989)")
    cli.add_argument("--link", type=positive, default=200.0,
                     help="GB/s at which a GPU gathers: some 200 over NVLink, 25 to 50 between "
                     "machines")
    cli.add_argument("--write", type=positive, default=2.75,
                     help="GB/s at which a machine writes a checkpoint (torch.save without "
                     "checksums into memory on one core; a shared disk may be slower)")
    cli.add_argument("--mfu", type=positive, default=0.27)
    args = cli.parse_args()
    speed = args.tflops * 1e12 * args.mfu
    training, others, hours = [], [], []
    for name, shape in SHAPES.items():
        chosen = settings(name)
        shared = chosen["ARCHITECTURE"] in SHARES_PROMPT
        sharded = chosen["SHARD"] == "yes"
        writers = math.ceil(args.gpus / 8) if sharded else 1  # machines that write a checkpoint
        tied = name == "demo"
        model = model_of(shape, chosen["ARCHITECTURE"], tied)
        count = sum(p.numel() for p in model.parameters())
        n, new, micro = (int(chosen[key]) for key in ("N", "MAX_NEW_TOKENS", "MICRO_TOKENS"))
        pair = ([0] * PROMPT, [[0] * RESPONSE] * 2)
        flops = training_flops(model, [pair], shared)
        # the reference runs in the last 80 % of the steps; labelling is two forward passes
        train, label = (1 + 0.8 / 3) * flops, 2 / 3 * flops

        pairs = math.ceil(int(chosen["BATCH_SIZE"]) / args.gpus)
        gathers = [passes(pairs, tokens_of(pair, shared), tokens) *
                   gathered_gb(count, args.gpus) / args.link for tokens in (2048, micro)]
        training.append([
            name, f"{count / 1e9:.2f} B", f"{whole_gb(count):.1f}",
            f"{sharded_gb(shape, count, args.gpus, tied):.1f}",
            f"{micro}: {activations_gb(shape, micro):.1f}",
            f"{gathers[0]:.1f} → {gathers[1]:.1f}", f"{pairs * train / speed:.1f}",
            f"{checkpoint_gb(count):.0f}, {checkpoint_gb(count) / writers / args.write:.0f}",
            f"{host_gb(count, sharded):.0f}"])

        longest = largest_prompt(shape, count, n, new, args.memory)
        rows = min(128, int(chosen["SAMPLE_TOKENS"]) // (PROMPT + new))
        full = int(chosen["SAMPLE_TOKENS"]) // rows - new  # prompts that fill the budget
        others.append([
            name, f"{kv_bytes(shape) / 1e6:.2f}",
            f"{sampling_gb(shape, count, rows, full, new):.1f}",
            f"{longest} of {shape.context - new}",
            f"{scoring_gb(shape, count, CHUNK):.1f}",
            f"{scoring_gb(shape, count, 2 * SCORED // tokens_of(pair, True)):.1f}"])

        prompts = sum(map(int, chosen["ROUNDS"].split()))
        seed = 0
        if not chosen["SEED_POLICY"]:  # one more pass of a third for the seed's log-probs
            seed = int(chosen["SEED_SIZE"]) * (int(chosen["SEED_EPOCHS"]) + 1 / 3)
        rate = args.gpus * speed
        hours.append([
            name, f"{train * 1e4 / 1e15:.0f}, {label * 1e4 / 1e15:.0f}",
            f"{train * 1e4 / rate / 3600:.2f}, {label * 1e4 / rate / 3600:.2f}",
            f"{(prompts * (train + label) + seed * flops) / rate / 3600:.1f}"])

    print(f"Training on {args.gpus} GPUs: GB a GPU of weights and moments, and of activations at a "
          "config's MICRO_TOKENS; seconds a step of gathers (at 2048 tokens a pass → at "
          "MICRO_TOKENS), which run beside the products; checkpoints; main memory.\n")
    table(["config", "parameters", "one copy (DDP)", "sharded", "activations",
           "gathers, s a step", "products, s a step", "checkpoint: GB, s", "host GB a machine"],
          training)
    print(f"The other stages on a GPU of {args.memory:.0f} GB: sampling with the fullest batch "
          "that SAMPLE_TOKENS allows; the longest prompt, in tokens, whose N responses fit, of "
          "those that the model's context takes; labelling; judging by an LLM of the same size.\n")
    table(["config", "MB a sampled token", "sampling: GB", "longest prompt", "labelling: GB",
           "judging: GB"], others)
    print(f"Computed at {args.mfu:.0%} of {args.tflops:.0f} TFLOP/s on {args.gpus} GPUs:\n")
    table(["config", "train, label 10 K pairs: PFLOP", "hours",
           "the whole run but sampling: hours"], hours)


if __name__ == "__main__":
    main()

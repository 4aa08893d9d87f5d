"""What the papers' settings need, computed from the models' shapes before anything is launched.

    python bench/cost.py                                # 8 × A100/A800 80 GB
    python bench/cost.py --gpus 16 --tflops 989         # 16 × H100

Computed, not measured, from: a prompt of 200 tokens and responses of 256; `--mfu`, the share of a
matrix product's speed that bench/train.py measured on two CPU cores in bf16 with gradient
checkpointing, for want of a GPU, taken here of the data sheet's peak; and nothing for the time of
sampling, loading and waiting. Columns: GB (10⁹ bytes) a GPU of weights and moments, copied or in
shards, and of activations at a config's MICRO_TOKENS; a checkpoint, which one process gathers in
main memory and writes, in GB and seconds; GB a GPU of sampling and of labelling; hours of the whole
run without sampling.
"""
import os
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch  # noqa: E402
import transformers  # noqa: E402

from bench.flops import training_flops  # noqa: E402
from core.policy import SHARES_PROMPT  # noqa: E402
from core.sampling import PREFILL  # noqa: E402
from core.stage import natural, parser, positive  # noqa: E402
from judges.report import markdown  # noqa: E402

PROMPT, RESPONSE = 200, 256
SCORED = 16384  # tokens a pass of labelling and judging, core/policy.py
CHUNK = 1024    # tokens whose logits exist at a time, core/policy.py


class Shape(NamedTuple):
    """As in the published config.json."""
    layers: int
    hidden: int
    inner: int
    heads: int
    kv: int
    vocabulary: int
    tied: bool = False


SHAPES = {
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, 32000),
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "phi-2": Shape(32, 2560, 10240, 32, 32, 51200),
    "phi-3-14b": Shape(40, 5120, 17920, 40, 10, 32064),
    "mistral-instruct-noseed": Shape(32, 4096, 14336, 32, 8, 32000),
    "demo": Shape(30, 576, 1536, 9, 3, 49152, tied=True),
}


def settings(config: str) -> dict[str, str]:
    """The settings of a config: lines NAME=value, over the defaults."""
    values = {}
    for name in ("defaults", config):
        lines = (ROOT / f"configs/{name}.env").read_text(encoding="utf-8").splitlines()
        values |= dict(line.split("=", 1) for line in lines if line[:1].isalpha())
    return values


def model_of(shape: Shape, architecture: str):
    """The model without its weights."""
    config = transformers.AutoConfig.for_model(
        architecture, num_hidden_layers=shape.layers, hidden_size=shape.hidden,
        intermediate_size=shape.inner, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv, vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied,
        pad_token_id=0)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def count_of(model) -> int:
    """Parameters."""
    return sum(weight.numel() for weight in model.parameters())


# ----------------------------------------------------------------------------------------- training


def whole_gb(count: int) -> float:
    """A GPU's share with a copy on each: weights, gradients and two Adam moments in fp32, the
    reference in fp32 on the rounds, weights in bf16 while a pass runs."""
    return 22 * count / 1e9


def sharded_gb(shape: Shape, count: int, gpus: int) -> float:
    """The same in shards; a whole layer (fp32, bf16, gradient) while it runs, and always the whole
    embedding and head: policy's, reference's, gradient."""
    ends = (1 if shape.tied else 2) * shape.vocabulary * shape.hidden
    return (20 * count / gpus + 10 * (count - ends) / shape.layers + 12 * ends) / 1e9


def activations_gb(shape: Shape, tokens: int) -> float:
    """What gradient checkpointing keeps of every layer, one layer at work, and some six copies of
    the logits of CHUNK tokens."""
    kept = tokens * 4 * shape.hidden * shape.layers
    layer = tokens * 4 * (8 * shape.hidden + 3 * shape.inner)
    return (kept + layer + 6 * CHUNK * shape.vocabulary * 4) / 1e9


def checkpoint_gb(count: int) -> float:
    """Weights and two Adam moments in fp32: what process 0 gathers in main memory and writes. A
    model that is to be sharded is a third of it there before, read to be handed out."""
    return 12 * count / 1e9


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


def scoring_gb(shape: Shape, count: int) -> float:
    """Labelling: weights in fp32, the largest one in bf16 too, a layer at work, and the logits of
    CHUNK tokens, in bf16, fp32 and normalised."""
    largest = max(shape.vocabulary, shape.inner) * shape.hidden
    layer = SCORED * (8 * shape.hidden + 2 * (8 * shape.hidden + 3 * shape.inner))
    logits = CHUNK * shape.vocabulary * 10
    return (4 * count + 2 * largest + layer + logits) / 1e9


# -------------------------------------------------------------------------------------------- table


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--gpus", type=natural, default=8)
    cli.add_argument("--tflops", type=positive, default=312.0,
                     help="dense bf16 peak of one GPU in the data sheet (A100, A800: 312; H100, "
                     "H200: 989)")
    cli.add_argument("--write", type=positive, default=2.75,
                     help="GB/s at which one process writes a checkpoint (torch.save without "
                     "checksums into memory on one core; a shared disk may be slower)")
    cli.add_argument("--mfu", type=positive, default=0.27, help="share of that peak")
    args = cli.parse_args()
    speed = args.gpus * args.tflops * 1e12 * args.mfu
    lines = []
    for name, shape in SHAPES.items():
        chosen = settings(name)
        model = model_of(shape, chosen["ARCHITECTURE"])
        count = count_of(model)
        checkpoint = checkpoint_gb(count)
        micro, new, budget = (int(chosen[key])
                              for key in ("MICRO_TOKENS", "MAX_NEW_TOKENS", "SAMPLE_TOKENS"))
        # the fullest batch that SAMPLE_TOKENS allows
        rows = min(128, budget // (PROMPT + new))
        sampling = sampling_gb(shape, count, rows, budget // rows - new, new)

        pair = ([0] * PROMPT, [[0] * RESPONSE] * 2)
        flops = training_flops(model, [pair], chosen["ARCHITECTURE"] in SHARES_PROMPT)
        # the reference runs in the last 80 % of the steps; labelling is two forward passes
        a_pair = (1 + 0.8 / 3 + 2 / 3) * flops
        seed = 0
        if not chosen["SEED_POLICY"]:  # one more pass of a third for the seed's log-probs
            seed = int(chosen["SEED_SIZE"]) * (int(chosen["SEED_EPOCHS"]) + 1 / 3)
        work = sum(map(int, chosen["ROUNDS"].split())) * a_pair + seed * flops
        lines.append([
            name, f"{count / 1e9:.2f} B", f"{whole_gb(count):.1f}",
            f"{sharded_gb(shape, count, args.gpus):.1f}", f"{activations_gb(shape, micro):.1f}",
            f"{checkpoint:.0f}, {checkpoint / args.write:.0f}", f"{sampling:.1f}",
            f"{scoring_gb(shape, count):.1f}", f"{work / speed / 3600:.1f}"])
    print(markdown(["config", "parameters", "copied", "sharded", "activations", "checkpoint",
                    "sampling", "labelling", "hours"], lines))


if __name__ == "__main__":
    main()

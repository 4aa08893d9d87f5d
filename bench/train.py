"""The leader's speed and memory against TRL's DPOTrainer, side by side on the same pairs.

Prints a line of JSON for each trainer in `LINES`, measured in a process of its own, so that its
peak memory is its own: SmolLM2-135M (`python -m data.demo --out models/smollm2` first), prompt ≈
response ≈ 256 tokens, 4 pairs a step, the median of five steps after one that warms up. Tokens are
counted alike for both: a pair's prompt once, and its two responses. MFU counts what each trainer's
own layout needs. TRL serves the benchmark alone. About half an hour on two cores. Exit status 1
where TRL's loss curve in fp32 is not ours. On a machine with several GPUs one is used: TRL would
split its batch over all of them. Of TRL's savings, Liger kernels need a GPU with Triton and
activation offloading a GPU; neither is measured.

    pip install trl==1.16.0
    python bench/train.py
    python bench/train.py --pairs pairs.jsonl                 # only makes such pairs
    python bench/train.py --pairs pairs.jsonl --line ours     # one line, in this process
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import seed_dpo  # noqa: E402
import train  # noqa: E402
from bench.flops import matmul_flops, memory_gb, training_flops  # noqa: E402
from core.chat import encode_prompt, encode_rows, pair_of  # noqa: E402
from core.models import load_config, load_model, load_outline, load_tokenizer  # noqa: E402
from core.parallel import keep_freed_memory  # noqa: E402
from core.policy import ResponseLogps, score  # noqa: E402
from core.rows import read_rows, write_rows  # noqa: E402
from core.stage import natural, parser, run_stage  # noqa: E402
from data.tiny import make_tokenizer  # noqa: E402

STEPS = 6  # the first one warms up
PASS = 4   # pairs that TRL has in a pass
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LR = 1e-5

OURS, THEIRS = "ours", "TRL without gradient checkpointing"
LINES = {
    OURS: ("--alpha", "0"),
    "ours, noise detection": ("--alpha", "0.1", "--lam", "0.5"),
    "ours, gradient checkpointing": ("--alpha", "0", "--gradient-checkpointing"),
    "TRL as shipped (gradient checkpointing)": ("recompute",),
    THEIRS: (),
    "TRL, reference precomputed, allocator tuned": ("precomputed", "tuned"),
    "TRL as shipped, reference precomputed": ("precomputed", "recompute"),
}


def make_model(folder: str, layers: int = 16, width: int = 2048,
               vocabulary: int = 49152) -> None:
    """A random Llama, of 1 B parameters by default; its tokenizer writes 384 of its tokens. Prints
    what it is measured on."""
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    rate = matmul_flops(DEVICE, "bf16") / 1e12
    print(json.dumps({"name": "device", "device": card, "torch": torch.__version__,
                      "transformers": transformers.__version__, "matmul_tflops": round(rate, 3)}))
    tokenizer, heads = make_tokenizer(), width // 64
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 4,
        max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    with DEVICE:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def encoded_pairs(path: str, rows: list[dict]) -> list:
    pairs = [pair_of(row) for row in rows]
    return encode_rows(load_config(path), load_tokenizer(path), rows, pairs, "bench")


def make_pairs(args: argparse.Namespace) -> dict:
    """--steps × --batch-size pairs with parts of --length tokens, give or take an eighth, and
    reference log-probs. Returns how fast these were scored, as label.py does."""
    tokenizer = load_tokenizer(args.model)
    words = " ".join(json.loads(line)["prompt"] for line in open(ROOT / "data/prompts.jsonl"))
    ids, dice = tokenizer(words).input_ids, np.random.default_rng(0)

    def text() -> str:
        length = args.length + int(dice.integers(-args.length // 8, args.length // 8 + 1))
        start = int(dice.integers(len(ids) - length))
        return tokenizer.decode(ids[start:start + length]).strip()

    rows = [{"id": str(i), "prompt": [{"role": "user", "content": text()}], "chosen": text(),
             "rejected": text(), "margin": 0.0} for i in range(args.steps * args.batch_size)]
    encoded = encoded_pairs(args.model, rows)
    net = ResponseLogps(load_model(args.model, DEVICE))
    score(net, encoded[:PASS], args.precision)  # warms up
    started = stamp()
    logps = score(net, encoded, args.precision)
    seconds = stamp() - started
    write_rows(args.pairs, [{**row, "chosen_logp": chosen, "rejected_logp": rejected}
                            for row, (chosen, rejected) in zip(rows, logps)])
    # A forward pass is a third of training's operations.
    return speed(args, "scoring", encoded, True, seconds, 1 / 3)


def speed(args: argparse.Namespace, name: str, encoded: list, shared: bool, seconds: float,
          share: float = 1.0) -> dict:
    """A line of the table: what `seconds` for `encoded` pairs, and a share of training's
    operations, mean."""
    flops = share * training_flops(load_outline(args.model), encoded, shared)
    tokens = sum(len(prompt) + sum(map(len, ys)) for prompt, ys in encoded)
    return {"name": name, "precision": args.precision, "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens / seconds),
            "mfu": round(flops / seconds / matmul_flops(DEVICE, args.precision), 3),
            "memory_gb": round(memory_gb(DEVICE), 2)}


def measured(args: argparse.Namespace) -> dict:
    """The line --line: its speed, with the losses of its steps."""
    shared = args.line.startswith("ours")
    trainer = ours if shared else theirs
    with tempfile.TemporaryDirectory() as out:
        losses, seconds, memory = trainer(args, out, *LINES[args.line])
    encoded = encoded_pairs(args.model, read_rows(args.pairs, "preferences"))
    median = statistics.median(seconds[1:])
    line = speed(args, args.line, encoded, shared, median * len(seconds))
    return line | {"seconds": round(median, 3), "memory_gb": round(memory, 2), "losses": losses}


def ours(args: argparse.Namespace, out: str, *flags: str) -> tuple[list, list, float]:
    """Losses and seconds of the steps of train.py as `flags` say, and its peak memory. Its log
    waits for the device before it takes a step's time."""
    sys.argv = ["train.py", "--model", args.model, "--pairs", args.pairs, "--out", f"{out}/policy",
                "--precision", args.precision, "--batch-size", str(args.batch_size),
                "--micro-tokens", str(args.micro_tokens), "--save-every", "0", "--lr", str(LR),
                *flags]
    train.main(train.flags())
    log = [json.loads(line) for line in open(f"{out}/policy/log.jsonl")]
    losses, seconds = ([row[key] for row in log] for key in ("loss", "seconds"))
    return losses, seconds, memory_gb(DEVICE)


def theirs(args: argparse.Namespace, out: str, *flags: str) -> tuple[list, list, float]:
    """The same of DPOTrainer, on the same tokens in the same order, with our learning rates."""
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer
    if "tuned" in flags:
        keep_freed_memory()  # as our stages do
    model, tokenizer = load_model(args.model, DEVICE), load_tokenizer(args.model)
    model.requires_grad_(True)
    rows = read_rows(args.pairs, "preferences")
    rows = [rows[i] for i in np.random.default_rng([42, 0]).permutation(len(rows))]
    texts = [{"prompt": tokenizer.decode(encode_prompt(tokenizer, row["prompt"])),
              "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
    total = len(rows) // args.batch_size
    seconds = []

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = stamp()

        def on_step_end(self, *_, **__):
            seconds.append(stamp() - self.start)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    schedule = LambdaLR(optimizer, lambda step: seed_dpo.lr_at(step, total, 1.0))
    config = DPOConfig(
        output_dir=out, per_device_train_batch_size=PASS,
        gradient_accumulation_steps=args.batch_size // PASS, num_train_epochs=1, learning_rate=LR,
        beta=0.1, max_length=None, bf16=args.precision == "bf16", use_cpu=DEVICE.type == "cpu",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        gradient_checkpointing="recompute" in flags,
        precompute_ref_log_probs="precomputed" in flags, max_grad_norm=1.0)
    trainer = InOrder(model=model, processing_class=tokenizer, callbacks=[Clock()], args=config,
                      train_dataset=Dataset.from_list(texts), optimizers=(optimizer, schedule))
    encoded = encoded_pairs(args.model, rows)
    for row, (prompt, (chosen, rejected)) in zip(trainer.train_dataset, encoded):
        right = prompt.tolist(), chosen.tolist(), rejected.tolist()
        read = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        assert read == right, "not the same tokens"
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, seconds, memory_gb(DEVICE)


def stamp() -> float:
    """Seconds, once the device has done all that it was asked to."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)
    return time.perf_counter()


def one_card() -> dict[str, str]:
    """The environment of a measurement: the first of the GPUs that are visible, if there is any."""
    if not torch.cuda.is_available():
        return {}
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def child(*flags: str) -> dict:
    """What this program prints with these flags, in a process of its own; printed here too."""
    done = subprocess.run([sys.executable, __file__, *flags], check=True, stdout=subprocess.PIPE,
                          text=True, env={**os.environ, **one_card()})
    line = done.stdout.splitlines()[-1]
    print(line, flush=True)
    return json.loads(line)


def compare(model: str, folder: str) -> None:
    """All lines in both precisions; ends with exit status 1 where the loss curves differ."""
    for precision in ("bf16", "fp32"):
        flags = "--model", model, "--pairs", f"{folder}/{precision}", "--precision", precision
        child(*flags)
        for name, options in LINES.items():
            if precision == "bf16" or not {"recompute", "--gradient-checkpointing"} & set(options):
                child(*flags, "--line", name)  # bf16 shows what recomputation saves
    flags = "--model", model, "--pairs", f"{folder}/short", "--precision", "fp32"
    child(*flags, "--steps", "20", "--length", "24")
    ours, trl = (child(*flags, "--line", name)["losses"] for name in (OURS, THEIRS))
    apart = max(abs(a - b) for a, b in zip(ours, trl, strict=True))
    print(f"Loss curves over {len(ours)} steps in fp32 are apart by at most {apart:.1e}.")
    sys.exit(apart > 1e-4)


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--model", default="models/smollm2", help="a folder")
    cli.add_argument("--pairs", help="one measurement, on these (JSONL); without --line they are "
                     "made, and scored")
    cli.add_argument("--line", choices=list(LINES), help="the trainer")
    cli.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    cli.add_argument("--steps", type=natural, default=STEPS, help="of pairs that are made")
    cli.add_argument("--length", type=natural, default=256, help="tokens of a part of a pair")
    cli.add_argument("--batch-size", type=natural, default=PASS, help=f"pairs a step, of which TRL "
                     f"has {PASS} in a pass")
    cli.add_argument("--micro-tokens", type=natural, default=2048, help="in a pass of ours")
    args = cli.parse_args()
    if args.pairs:
        print(json.dumps(measured(args) if args.line else make_pairs(args)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args.model, folder)


if __name__ == "__main__":
    run_stage(main)

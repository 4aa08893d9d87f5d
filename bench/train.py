"""The leader's speed and memory against TRL's DPOTrainer, side by side on the same pairs.

Each line of the table is a process of its own, so that its peak memory is its own: SmolLM2-135M
(`python -m data.demo --out models/smollm2` first), prompt ≈ response ≈ 256 tokens, 4 pairs a step,
the median of five steps after one that warms up. Tokens are counted alike for both: a pair's prompt
once, and its two responses. MFU counts what each trainer's own layout needs. TRL serves the
benchmark alone. About half an hour on two cores. Exit status 1 where TRL's loss curve in fp32 is
not ours. On a machine with several GPUs one is used: TRL would split its batch over all of them.
Of TRL's savings, Liger kernels need a GPU with Triton and activation offloading a GPU; neither is
measured.

    pip install trl==1.16.0
    python bench/train.py
    python bench/train.py --model random-1b     # a random Llama of 1 B parameters, for a large GPU
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
from core.models import load_model, load_tokenizer  # noqa: E402
from core.policy import ResponseLogps, score  # noqa: E402
from core.rows import read_rows, write_rows  # noqa: E402
from core.stage import run_stage  # noqa: E402

STEPS, BATCH = 6, 4  # the first step warms up
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LR = 1e-5

FASTEST = "– and reference precomputed, allocator tuned"
LINES = {
    "ours": ("ours", "--alpha", "0"),
    "ours, noise detection": ("ours", "--alpha", "0.1", "--lam", "0.5"),
    "ours, gradient checkpointing": ("ours", "--alpha", "0", "--gradient-checkpointing"),
    "TRL as shipped (gradient checkpointing)": ("trl", "recompute"),
    "TRL without gradient checkpointing": ("trl",),
    FASTEST: ("trl", "precomputed"),
    "TRL as shipped, reference precomputed": ("trl", "precomputed", "recompute"),
}


def make_model(folder: str) -> None:
    """A random Llama of about 1 B parameters with the demo's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "models/smollm2")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def encoded_pairs(model, tokenizer, rows: list[dict]) -> list:
    return encode_rows(model.config, tokenizer, rows, [pair_of(row) for row in rows], "bench")


def make_pairs(model_path: str, folder: str) -> None:
    """long (256 tokens a part, give or take an eighth) and short (20 steps of the loss curve), with
    reference log-probs."""
    model, tokenizer = load_model(model_path, DEVICE), load_tokenizer(model_path)
    words = " ".join(json.loads(line)["prompt"] for line in open(ROOT / "data/prompts.jsonl"))
    ids, dice = tokenizer(words).input_ids, np.random.default_rng(0)

    def text(length: int) -> str:
        length += int(dice.integers(-length // 8, length // 8 + 1))
        start = int(dice.integers(len(ids) - length))
        return tokenizer.decode(ids[start:start + length]).strip()

    for name, count, length in (("long", STEPS * BATCH, 256), ("short", 20 * BATCH, 24)):
        rows = [{"id": str(i), "prompt": [{"role": "user", "content": text(length)}],
                 "chosen": text(length), "rejected": text(length)} for i in range(count)]
        for precision in ("fp32", "bf16"):
            logps = score(ResponseLogps(model), encoded_pairs(model, tokenizer, rows), precision)
            write_rows(f"{folder}/{name}_{precision}.jsonl", [
                {**row, "margin": 0.0, "chosen_logp": chosen, "rejected_logp": rejected}
                for row, (chosen, rejected) in zip(rows, logps)])


def measured(model, encoded: list, shared: bool, precision: str, losses: list[float],
             seconds: list[float]) -> dict:
    """One line of the table, from the seconds of every step."""
    median = statistics.median(seconds[1:])
    steps = len(seconds)
    flops = training_flops(model, encoded, shared) / steps
    return {"losses": losses, "seconds": median,
            "mfu": flops / median / matmul_flops(DEVICE, precision),
            "tokens": sum(len(p) + sum(map(len, ys)) for p, ys in encoded) / steps,
            "memory": memory_gb(DEVICE)}


def ours(model_path: str, pairs: str, precision: str, out: str, *flags: str) -> dict:
    """train.py as plain DPO, or as `flags` say. Its log waits for the device before it takes a
    step's time."""
    sys.argv = ["train.py", "--model", model_path, "--pairs", pairs, "--out", f"{out}/policy",
                "--precision", precision, "--batch-size", str(BATCH), "--save-every", "0",
                "--lr", str(LR), *flags]
    train.main(train.flags())
    log = [json.loads(line) for line in open(f"{out}/policy/log.jsonl")]
    peak = memory_gb(DEVICE)
    model, tokenizer = load_model(model_path, DEVICE), load_tokenizer(model_path)
    encoded = encoded_pairs(model, tokenizer, read_rows(pairs, "preferences"))
    return measured(model, encoded, True, precision, [row["loss"] for row in log],
                    [row["seconds"] for row in log]) | {"memory": peak}


def theirs(model_path: str, pairs: str, precision: str, out: str, *flags: str) -> dict:
    """The same of DPOTrainer, on the same tokens in the same order, with our learning rates."""
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer
    model, tokenizer = load_model(model_path, DEVICE), load_tokenizer(model_path)
    model.requires_grad_(True)
    rows = read_rows(pairs, "preferences")
    rows = [rows[i] for i in np.random.default_rng([42, 0]).permutation(len(rows))]
    texts = [{"prompt": tokenizer.decode(encode_prompt(tokenizer, row["prompt"])),
              "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
    encoded = encoded_pairs(model, tokenizer, rows)
    total = len(rows) // BATCH
    seconds = []

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = stamp(DEVICE)

        def on_step_end(self, *_, **__):
            seconds.append(stamp(DEVICE) - self.start)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    schedule = LambdaLR(optimizer, lambda step: seed_dpo.lr_at(step, total, 1.0))
    config = DPOConfig(
        output_dir=out, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=LR,
        beta=0.1, max_length=None, bf16=precision == "bf16", use_cpu=DEVICE.type == "cpu",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        gradient_checkpointing="recompute" in flags,
        precompute_ref_log_probs="precomputed" in flags, max_grad_norm=1.0)
    trainer = InOrder(model=model, processing_class=tokenizer, callbacks=[Clock()], args=config,
                      train_dataset=Dataset.from_list(texts), optimizers=(optimizer, schedule))
    for row, (prompt, (chosen, rejected)) in zip(trainer.train_dataset, encoded):
        right = prompt.tolist(), chosen.tolist(), rejected.tolist()
        read = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        assert read == right, "not the same tokens"
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return measured(model, encoded, False, precision, losses, seconds)


def stamp(device: torch.device) -> float:
    """Seconds, once the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def one_card() -> dict[str, str]:
    """The environment of a measurement: the first of the GPUs that are visible, if there is any."""
    if not torch.cuda.is_available():
        return {}
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def child(*arguments: str, tuned: bool = False) -> dict:
    """One measurement in a process of its own; `tuned` gives TRL the allocator that we set
    ourselves."""
    env = {**os.environ, **one_card()}
    if tuned:
        env |= dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), "1000000000")
    done = subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True,
                          text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n"
                         f"{done.stderr[-4000:]}")
    lines = reversed(done.stdout.splitlines())
    return json.loads(next(line for line in lines if line.startswith("{")))


def compare(model: str, folder: str) -> None:
    """The table; ends with exit status 1 where the loss curves differ."""
    where = f"{torch.get_num_threads()} CPU threads"
    if DEVICE.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}\n")
    make_pairs(model, folder)
    head = ["trainer", "precision", "s a step", "pairs/s", "tokens/s", "MFU", "peak GB",
            "ours: pairs/s ×", "ours: memory ×"]
    print(f"| {' | '.join(head)} |\n" + "| --- " * len(head) + "|", flush=True)

    for precision in ("bf16", "fp32"):
        first = None
        for name, (what, *flags) in LINES.items():
            if precision == "fp32" and {"recompute", "--gradient-checkpointing"} & set(flags):
                continue  # bf16 shows what it saves
            line = child(what, model, f"{folder}/long_{precision}.jsonl", precision, *flags,
                         tuned=name == FASTEST)
            first = first or line
            seconds = line["seconds"]
            print(f"| {name} | {precision} | {seconds:.2f} | {BATCH / seconds:.3f} | "
                  f"{line['tokens'] / seconds:.0f} | {line['mfu']:.0%} | {line['memory']:.1f} | "
                  f"{seconds / first['seconds']:.2f} | {first['memory'] / line['memory']:.2f} |",
                  flush=True)
    short = model, f"{folder}/short_fp32.jsonl", "fp32"
    ours, trl = child("ours", *short, "--alpha", "0")["losses"], child("trl", *short)["losses"]
    apart = max(abs(a - b) for a, b in zip(ours, trl, strict=True))
    print(f"\nLoss curves over {len(ours)} steps in fp32 are apart by at most {apart:.1e}.")
    sys.exit(apart > 1e-4)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", default="models/smollm2")
    cli.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = cli.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.child:
            what, model, pairs, precision, *flags = args.child
            trainer = ours if what == "ours" else theirs
            print(json.dumps(trainer(model, pairs, precision, folder, *flags)), flush=True)
            return
        model = args.model
        if model == "random-1b":
            make_model(model := f"{folder}/model")
        compare(model, folder)


if __name__ == "__main__":
    run_stage(main)

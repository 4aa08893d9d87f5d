"""The leader's speed and memory against TRL's DPOTrainer, side by side on the same pairs.

Each line of the table is a process of its own, so that its peak memory is its own: SmolLM2-135M
(`python -m data.demo --out models/smollm2` first), prompt ≈ response ≈ 256 tokens, 4 pairs a step.
TRL serves the benchmark alone. About twenty minutes on two cores. The claims made of both are
checked; one that fails gives exit status 1. On a machine with several GPUs one is used: TRL would
split its batch over all of them. Of TRL's savings, Liger kernels need a GPU with Triton and
activation offloading a GPU; neither is measured.

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
from core.models import load_model, load_tokenizer  # noqa: E402
from core.policy import ResponseLogps, score  # noqa: E402
from core.chat import encode_prompt, encode_rows, pair_of  # noqa: E402
from core.rows import read_rows, write_rows  # noqa: E402
from core.stage import run_stage  # noqa: E402
from core.training import matmul_flops, memory_gb, training_flops  # noqa: E402

STEPS, BATCH = 3, 4  # the first step warms up
WIDE = 12  # pairs a step where processes are compared: what they exchange does not grow with it


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


def make_pairs(model_path: str, folder: Path, device: torch.device) -> None:
    """long and wide (256 tokens a part, give or take an eighth) and short (20 steps of the loss
    curve), with reference log-probs."""
    model, tokenizer = load_model(model_path, device), load_tokenizer(model_path)
    words = " ".join(json.loads(line)["prompt"] for line in open(ROOT / "data/prompts.jsonl"))
    ids, dice = tokenizer(words).input_ids, np.random.default_rng(0)

    def text(length: int) -> str:
        length += int(dice.integers(-length // 8, length // 8 + 1))
        start = int(dice.integers(len(ids) - length))
        return tokenizer.decode(ids[start:start + length]).strip()

    sizes = ("long", STEPS * BATCH, 256), ("short", 20 * BATCH, 24), ("wide", 2 * WIDE, 256)
    for name, count, length in sizes:
        rows = [{"id": str(i), "prompt": [{"role": "user", "content": text(length)}],
                 "chosen": text(length), "rejected": text(length)} for i in range(count)]
        encoded = encode_rows(model.config, tokenizer, rows, [pair_of(row) for row in rows], name)
        for precision in ("fp32", "bf16"):
            logps = score(ResponseLogps(model), encoded, precision, device)
            write_rows(str(folder / f"{name}_{precision}.jsonl"), [
                {**row, "margin": 0.0, "chosen_logp": w, "rejected_logp": l}
                for row, (w, l) in zip(rows, logps)])


def ours(model: str, pairs: str, precision: str, out: str, *flags: str) -> dict:
    """Losses, seconds a step and memory of train.py as plain DPO, or as `flags` say; rank 0's. Its
    log waits for the device before it takes a step's time."""
    import train
    sys.argv = ["train.py", "--model", model, "--pairs", pairs, "--out", out,
                "--precision", precision, "--batch-size", str(BATCH), "--save-every", "0",
                "--lr", "1e-5", *(flags or ("--alpha", "0"))]
    train.main(*train.flags())
    if int(os.environ.get("RANK", 0)):
        raise SystemExit
    log = list(map(json.loads, open(f"{out}/log.jsonl")))
    warm = log[1:]
    return {"losses": [r["loss"] for r in log],
            "seconds": statistics.median(r["seconds"] for r in warm),
            "mfu": statistics.median(r["mfu"] or 1.0 for r in warm),
            "tokens": statistics.mean(r["tokens_per_s"] * r["seconds"] for r in warm),
            "memory": log[-1]["memory_gb"],
            "steps": sum(1 for _ in open(pairs)) // BATCH}


def stamp(device: torch.device) -> float:
    """Seconds, once the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def theirs(model_path: str, pairs: str, precision: str, out: str, precomputed: bool,
           recompute: bool) -> dict:
    """The same of DPOTrainer, on the same tokens in the same order, with our learning rates."""
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(model_path, device).requires_grad_(True)
    tokenizer = load_tokenizer(model_path)
    rows = read_rows(pairs, "preferences")
    rows = [rows[i] for i in np.random.default_rng([42, 0]).permutation(len(rows))]
    plain = [{"prompt": tokenizer.decode(encode_prompt(tokenizer, r["prompt"])),
              "chosen": r["chosen"], "rejected": r["rejected"]} for r in rows]
    encoded = encode_rows(model.config, tokenizer, rows, [pair_of(row) for row in rows], pairs)
    total = len(rows) // BATCH

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        ticks: list[float] = []

        def on_step_begin(self, *_, **__):
            self.start = stamp(device)

        def on_step_end(self, *_, **__):
            self.ticks.append(stamp(device) - self.start)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    schedule = LambdaLR(optimizer, lambda step: seed_dpo.lr_at(step, total, 1.0))
    config = DPOConfig(
        output_dir=out, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=1e-5,
        beta=0.1, max_length=None, bf16=precision == "bf16", use_cpu=device.type == "cpu",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        gradient_checkpointing=recompute, precompute_ref_log_probs=precomputed, max_grad_norm=1.0)
    trainer = InOrder(model=model, processing_class=tokenizer, callbacks=[Clock()], args=config,
                      train_dataset=Dataset.from_list(plain), optimizers=(optimizer, schedule))
    for row, (prompt, answers) in zip(trainer.train_dataset, encoded):
        found = row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]
        right = prompt.tolist(), [ids.tolist() for ids in answers]
        assert found == right, "not the same tokens"
    trainer.train()
    seconds, yardstick = statistics.median(Clock.ticks[1:]), matmul_flops(device, precision)
    return {"losses": [r["loss"] for r in trainer.state.log_history if "loss" in r],
            "seconds": seconds,
            "mfu": training_flops(model, encoded, False) / total / seconds / yardstick,
            "tokens": sum(len(p) * len(ys) + sum(map(len, ys)) for p, ys in encoded) / total,
            "memory": memory_gb(device),
            "steps": total}


def margin_noise(model_path: str, pairs: str) -> dict:
    """D8: by how much bf16 moves a margin, and the change of a margin by an update of 5e-7;
    standard deviations over pairs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(model_path, device), load_tokenizer(model_path)
    rows = read_rows(pairs, "preferences")
    encoded = encode_rows(model.config, tokenizer, rows, [pair_of(row) for row in rows], pairs)
    net, values = ResponseLogps(model), {}
    for moment in ("before", "after"):
        for precision in ("fp32", "bf16"):
            logps = 0.1 * np.array(score(net, encoded, precision, device))
            values[moment, precision] = logps[:, 0] - logps[:, 1]
        if moment == "before":  # what Adam's first step does to every weight
            torch.manual_seed(0)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(5e-7 * torch.randn_like(p).sign())
    moved = {p: values["after", p] - values["before", p] for p in ("fp32", "bf16")}
    return {"pairs": len(encoded),
            "static": (values["before", "bf16"] - values["before", "fp32"]).std(),
            "change": moved["fp32"].std(), "noise": (moved["bf16"] - moved["fp32"]).std()}


def one_card() -> dict[str, str]:
    """The environment of a measurement: the first of the GPUs that are visible, if there is any."""
    if not torch.cuda.is_available():
        return {}
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def child(*arguments: str, processes: int = 1, threads: int | None = None,
          tuned: bool = False) -> dict:
    """One measurement in a process of its own, or in several under torchrun; `tuned` gives TRL the
    allocator that we set ourselves."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, **one_card()}
    if tuned:
        env |= dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), "1000000000")
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run([sys.executable, *launcher, __file__, "--child", *arguments],
                          capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n"
                         f"{done.stderr[-4000:]}")
    lines = reversed(done.stdout.splitlines())
    return json.loads(next(line for line in lines if line.startswith("{")))


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", default="models/smollm2")
    cli.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = cli.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.child:
        what, *rest = args.child
        with tempfile.TemporaryDirectory() as out:
            if what == "pairs":
                result = make_pairs(rest[0], Path(rest[1]), device) or {}
            elif what == "noise":
                result = margin_noise(*rest)
            else:
                model, pairs, precision, *flags = rest
                if what == "ours":
                    result = ours(model, pairs, precision, f"{out}/policy", *flags)
                else:
                    result = theirs(model, pairs, precision, out, "precomputed" in flags,
                                    "recompute" in flags)
        print(json.dumps(result), flush=True)
        return

    failed = []

    def claim(text: str, true: bool) -> None:
        print(f"- {'holds' if true else 'FAILS'}: {text}", flush=True)
        failed.extend([] if true else [text])

    with tempfile.TemporaryDirectory() as folder:
        where = f"{torch.get_num_threads()} CPU threads"
        if device.type == "cuda":
            where = torch.cuda.get_device_name()
        print(f"{where}, torch {torch.__version__}\n")
        model = args.model
        if model == "random-1b":
            make_model(model := f"{folder}/model")
        child("pairs", model, folder)
        curves = [child(what, model, f"{folder}/short_fp32.jsonl", "fp32")["losses"]
                  for what in ("ours", "trl")]
        apart = max(abs(a - b) for a, b in zip(*curves, strict=True))
        print("| trainer | precision | s a step | pairs/s | tokens/s | MFU | peak GB |")
        print("| --- " * 7 + "|", flush=True)

        def show(name: str, precision: str, pairs: int, r: dict) -> None:
            print(f"| {name} | {precision} | {r['seconds']:.2f} | {pairs / r['seconds']:.3f} | "
                  f"{r['tokens'] / r['seconds']:.0f} | {r['mfu']:.0%} | {r['memory']:.1f} |",
                  flush=True)

        found = {}
        shipped = "TRL as shipped (gradient checkpointing)"
        plain = "TRL without gradient checkpointing"
        fastest = "– and reference precomputed, allocator tuned"
        leanest = "TRL as shipped, reference precomputed"
        lines = {
            "ours": ("ours", "--alpha", "0"),
            "ours, noise detection": ("ours", "--alpha", "0.1", "--lam", "0.5"),
            "ours, gradient checkpointing": ("ours", "--alpha", "0", "--gradient-checkpointing"),
            shipped: ("trl", "recompute"),
            plain: ("trl",),
            fastest: ("trl", "precomputed"),
            leanest: ("trl", "precomputed", "recompute"),
        }
        for precision in ("bf16", "fp32"):
            for name, (what, *flags) in lines.items():
                if precision == "fp32" and {"recompute", "--gradient-checkpointing"} & set(flags):
                    continue  # bf16 shows what it saves
                pairs = f"{folder}/long_{precision}.jsonl"
                r = child(what, model, pairs, precision, *flags, tuned=name == fastest)
                found[name, precision] = r
                show(name, precision, BATCH, r)
        if device.type == "cpu":
            wide = ("ours", model, f"{folder}/wide_fp32.jsonl", "fp32", "--alpha", "0",
                    "--batch-size", str(WIDE))
            one = child(*wide)
            two = child(*wide, processes=2, threads=1)
            show(f"ours, {WIDE} pairs a step", "fp32", WIDE, one)
            show(f"ours, two processes of one thread, {WIDE} pairs a step", "fp32", WIDE, two)
        noise = child("noise", model, f"{folder}/long_fp32.jsonl")
        print(f"\nMargins of {noise['pairs']} pairs, standard deviations: bf16 is off fp32 by "
              f"{noise['static']:.3f}; an update of 5e-7 changes a margin by "
              f"{noise['change']:.3f}, to which "
              f"bf16 adds noise of {noise['noise']:.3f} (β = 0.1).\n\nClaims:")

        def ratio(name: str, precision: str, key: str) -> float:
            return found[name, precision][key] / found["ours", precision][key]

        claim(f"the loss curve is TRL's to 1e-4 over {len(curves[0])} steps in fp32 "
              f"(apart by at most {apart:.1e})", apart <= 1e-4)
        for precision, least in (("bf16", 4), ("fp32", 2)):
            for other in (shipped, plain) if precision == "bf16" else (plain,):
                speed = ratio(other, precision, "seconds")
                memory = 1 / ratio(other, precision, "memory")
                claim(f"{precision}: at least {least} × the pairs/s of {other} ({speed:.2f} ×)",
                      speed >= least)
                claim(f"{precision}: at most half the memory of {other} ({memory:.2f})",
                      memory <= 0.5)
            speed = ratio(fastest, precision, "seconds")
            claim(f"{precision}: faster than TRL at its fastest ({speed:.2f} ×)", speed > 1)
        memory = 1 / ratio(leanest, "bf16", "memory")
        claim(f"bf16: leaner than TRL at its leanest ({memory:.2f})", memory < 1)
        if device.type == "cpu":
            share = one["seconds"] / two["seconds"]
            claim(f"two processes at least 0.9 of one with two threads ({share:.2f})", share >= 0.9)
        costs = [ratio("ours, noise detection", precision, "seconds")
                 for precision in ("bf16", "fp32")]
        print(f"- noise detection costs {costs[0]:.2f} × in bf16, {costs[1]:.2f} × in fp32, on the "
              "steps where it is active")
    sys.exit(bool(failed))


if __name__ == "__main__":
    run_stage(main)

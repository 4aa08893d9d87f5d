"""The sampler's throughput against transformers' own, on the same prompts, in one process each.

SmolLM2-135M (`python -m data.demo --out models/smollm2` first); prompts of log-normal length,
median 100 tokens, as in UltraFeedback; n = 2 responses of at most 128 tokens at temperature 0.7; 64
responses a batch. `plain` is model.generate in the order of the input, `continuous` transformers'
continuous batching, which makes its own batches. The limit is arithmetic: tokens/s if all were done
at the speed that a large matrix product has in the same process, each prompt computed once. A
quarter of an hour on two cores. The claim made of it is checked; if it fails, the exit status is 1.

    python bench/generate.py
    python bench/generate.py --prompts 512 --batch-size 256     # for a GPU
"""
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import core.sampling as generate  # noqa: E402
from core.chat import encode_prompt  # noqa: E402
from core.models import load_model, load_tokenizer  # noqa: E402
from core.parallel import bf16_pays, start_processes  # noqa: E402
from core.stage import natural, parser, run_stage  # noqa: E402
from bench.flops import matmul_flops, training_flops  # noqa: E402
from core.training import memory_gb  # noqa: E402

N, LENGTH, TEMPERATURE, CLAIM = 2, 128, 0.7, 1.5


def make_prompts(tokenizer, count: int) -> list[list[int]]:
    words = " ".join(json.loads(line)["prompt"] for line in open(ROOT / "data/prompts.jsonl"))
    ids, dice = tokenizer(words).input_ids, np.random.default_rng(0)
    prompts = []
    for length in np.exp(dice.normal(np.log(100), 0.9, count)).clip(8, 1024).astype(int):
        start = dice.integers(len(ids) - length)
        text = tokenizer.decode(ids[start:start + length])
        prompts.append(encode_prompt(tokenizer, [{"role": "user", "content": text}]))
    return prompts


def ours(model, tokenizer, prompts, args) -> list[int]:
    size = args.batch_size // N
    lengths = [0] * (N * len(prompts))
    stop = torch.tensor([tokenizer.eos_token_id], device=model.device)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), size):
        batch = order[start:start + size]
        u = np.concatenate([generate.uniforms(0, str(i), N, LENGTH) for i in batch])
        u = torch.tensor(u, device=model.device)
        heat = torch.full((len(u),), TEMPERATURE, device=model.device)
        responses = generate.sample(model, [prompts[i] for i in batch], u, heat, stop)
        for row, response in enumerate(responses):
            lengths[N * batch[row // N] + row % N] = len(response)
    return lengths


def settings(tokenizer, **more) -> transformers.GenerationConfig:
    return transformers.GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=LENGTH,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **more)


def plain(model, tokenizer, prompts, args) -> list[int]:
    size, lengths = args.batch_size // N, []
    for start in range(0, len(prompts), size):
        batch = tokenizer.pad({"input_ids": prompts[start:start + size]}, padding_side="left",
                              return_tensors="pt").to(model.device)
        config = settings(tokenizer, num_return_sequences=N)
        out = model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1]:]
        ended = (out == tokenizer.eos_token_id).int()
        lengths += torch.where(ended.any(1), ended.argmax(1) + 1, out.shape[1]).tolist()
    return lengths


def continuous(model, tokenizer, prompts, args) -> list[int]:
    out = model.generate_batch(inputs=[p for p in prompts for _ in range(N)],
                               generation_config=settings(tokenizer), progress_bar=False)
    return [len(request.generated_tokens) for request in out.values()]


def limit(model, prompts: list, lengths: list[int], peak: float) -> float:
    """Tokens/s at `peak` FLOP/s: a forward pass is a third of training's operations."""
    rows = [(prompt, [range(length) for length in lengths[N * i:N * (i + 1)]])
            for i, prompt in enumerate(prompts)]
    return sum(lengths) * peak / (training_flops(model, rows, True) / 3)


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--prompts", type=natural, default=64)
    cli.add_argument("--batch-size", type=natural, default=64, help="responses")
    cli.add_argument("--only", choices=["ours", "plain", "continuous"],
                     help="one line of the table, in this process")
    args = cli.parse_args()
    if args.only:
        *_, device = start_processes()
        dtype = torch.bfloat16 if bf16_pays(device) else torch.float32
        folder = str(ROOT / "models/smollm2")
        model, tokenizer = load_model(folder, device, dtype), load_tokenizer(folder)
        prompts = make_prompts(tokenizer, args.prompts)
        run = globals()[args.only]
        run(model, tokenizer, prompts[:2], args)  # warm up
        torch.manual_seed(0)
        started = time.perf_counter()
        lengths = run(model, tokenizer, prompts, args)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": sum(lengths), "responses": len(lengths),
                          "limit": limit(model, prompts, lengths, matmul_flops(device, "auto")),
                          "memory": memory_gb(device)}))
        return
    table = {}
    print("| sampler | s | responses/s | tokens/s | limit, tokens/s | share of it | peak GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in ("ours", "plain", "continuous"):
        command = [sys.executable, __file__, "--only", name, "--prompts", str(args.prompts),
                   "--batch-size", str(args.batch_size)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | {done.stderr.strip().splitlines()[-1][:120]} |")
            continue
        table[name] = row = json.loads(done.stdout.splitlines()[-1])
        rate = row["responses"] / row["seconds"]
        tokens = row["tokens"] / row["seconds"]
        print(f"| {name} | {row['seconds']:.1f} | {rate:.2f} | {tokens:.0f} | {row['limit']:.0f} | "
              f"{tokens / row['limit']:.0%} | {row['memory']:.1f} |", flush=True)
    ours, plain = table["ours"], table["plain"]
    ratio = (ours["responses"] / ours["seconds"]) / (plain["responses"] / plain["seconds"])
    print(f"ours / plain: {ratio:.2f} (claimed: {CLAIM})")
    sys.exit(ratio < CLAIM)


if __name__ == "__main__":
    run_stage(main)

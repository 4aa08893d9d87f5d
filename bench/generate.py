"""The sampler's throughput against model.generate of transformers, on the same prompts, in one
process each.

SmolLM2-135M (`python -m data.demo --out models/smollm2` first); prompts of log-normal length,
median 100 tokens, as in UltraFeedback; n = 2 responses of at most 128 tokens at temperature 0.7; 64
responses a batch. `plain` is model.generate in the order of the input. The limit is arithmetic:
tokens/s if all were done at the speed that a large matrix product has in the same process, each
prompt computed once. Ten minutes on two cores. The claim made of it is checked; if it fails, the
exit status is 1.

    python bench/generate.py
    python bench/generate.py --prompts 512 --batch-size 256     # for a GPU
"""
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.flops import matmul_flops, memory_gb, training_flops  # noqa: E402
from core.chat import encode_prompt  # noqa: E402
from core.models import load_model, load_tokenizer  # noqa: E402
from core.parallel import bf16_pays, start_processes  # noqa: E402
from core.sampling import batches_of, sample, uniforms  # noqa: E402
from core.stage import natural, parser, run_stage  # noqa: E402

N, LENGTH, TEMPERATURE, CLAIM = 2, 128, 0.7, 1.5


def make_prompts(tokenizer, count: int) -> list[list[int]]:
    words = " ".join(json.loads(line)["prompt"] for line in open(ROOT / "data/prompts.jsonl"))
    ids = tokenizer(words).input_ids
    dice = np.random.default_rng(0)
    prompts = []
    for length in np.exp(dice.normal(np.log(100), 0.9, count)).clip(8, 1024).astype(int):
        start = dice.integers(len(ids) - length)
        text = tokenizer.decode(ids[start:start + length])
        prompts.append(encode_prompt(tokenizer, [{"role": "user", "content": text}]))
    return prompts


def ours(model, tokenizer, prompts: list, batch_size: int) -> list[list[int]]:
    """Lengths of the N responses to each prompt."""
    lengths: list = [None] * len(prompts)
    stop = torch.tensor([tokenizer.eos_token_id], device=model.device)
    allowed = [LENGTH] * len(prompts)
    for batch in batches_of(list(map(len, prompts)), allowed, N, batch_size, math.inf):
        u = np.concatenate([uniforms(0, str(i), N, LENGTH) for i in batch])
        heat = torch.full((len(u),), TEMPERATURE, device=model.device)
        u = torch.tensor(u, device=model.device)
        responses = sample(model, [prompts[i] for i in batch], u, heat, stop)
        for k, i in enumerate(batch):
            lengths[i] = list(map(len, responses[k * N:(k + 1) * N]))
    return lengths


def plain(model, tokenizer, prompts: list, batch_size: int) -> list[list[int]]:
    """As `ours`."""
    lengths = []
    size = batch_size // N
    end = tokenizer.eos_token_id
    config = transformers.GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=LENGTH,
        num_return_sequences=N, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    for start in range(0, len(prompts), size):
        batch = tokenizer.pad({"input_ids": prompts[start:start + size]}, padding_side="left",
                              return_tensors="pt").to(model.device)
        out = model.generate(**batch, generation_config=config)
        for answer in out[:, batch["input_ids"].shape[1]:].tolist():
            lengths.append(answer.index(end) + 1 if end in answer else LENGTH)
    return np.reshape(lengths, (-1, N)).tolist()


def measure(name: str, count: int, batch_size: int) -> dict:
    """A line of the table, in this process."""
    device = start_processes()
    folder = str(ROOT / "models/smollm2")
    model = load_model(folder, device, torch.bfloat16 if bf16_pays(device) else torch.float32)
    tokenizer = load_tokenizer(folder)
    prompts = make_prompts(tokenizer, count)
    sampler = ours if name == "ours" else plain
    sampler(model, tokenizer, prompts[:2], batch_size)  # warm up
    torch.manual_seed(0)
    started = time.perf_counter()
    lengths = sampler(model, tokenizer, prompts, batch_size)
    seconds = time.perf_counter() - started
    tokens = sum(map(sum, lengths))
    # A forward pass is a third of training's operations.
    rows = [(prompt, list(map(range, ends))) for prompt, ends in zip(prompts, lengths)]
    flops = training_flops(model, rows, True) / 3
    return {"seconds": seconds, "tokens": tokens, "memory": memory_gb(device),
            "limit": tokens * matmul_flops(device, "auto") / flops}


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--prompts", type=natural, default=64)
    cli.add_argument("--batch-size", type=natural, default=64, help="responses")
    cli.add_argument("--only", choices=["ours", "plain"], help="one line, as JSON")
    args = cli.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.prompts, args.batch_size)))
        return
    seconds = {}
    print("| sampler | s | responses/s | tokens/s | limit, tokens/s | share of it | peak GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in ("ours", "plain"):
        command = [sys.executable, __file__, "--only", name, "--prompts", str(args.prompts),
                   "--batch-size", str(args.batch_size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        seconds[name] = row["seconds"]
        rate = row["tokens"] / row["seconds"]
        print(f"| {name} | {row['seconds']:.1f} | {N * args.prompts / row['seconds']:.2f} | "
              f"{rate:.0f} | {row['limit']:.0f} | {rate / row['limit']:.0%} | "
              f"{row['memory']:.1f} |", flush=True)
    ratio = seconds["plain"] / seconds["ours"]
    print(f"ours / plain: {ratio:.2f} (claimed: {CLAIM})")
    sys.exit(ratio < CLAIM)


if __name__ == "__main__":
    run_stage(main)

"""The sampler's throughput against model.generate of transformers, on the same prompts, in one
process each: a line of JSON for each.

SmolLM2-135M (`python -m data.demo --out models/smollm2` first); prompts of log-normal length,
median 100 tokens, as in UltraFeedback; n = 2 responses of at most 128 tokens at temperature 0.7.
`plain` is model.generate in the order of the input, --batch-size responses at a time. The limit is
arithmetic: tokens/s if all were done at the speed that a large matrix product has in the same
process, each prompt computed once. Ten minutes on two cores. Exit status 1 where ours is not CLAIM
times as fast.

    python bench/generate.py
    python bench/generate.py --only ours
"""
import argparse
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
from bench.flops import matmul_flops, memory_gb, training_flops  # noqa: E402
from core.chat import encode_prompt  # noqa: E402
from core.models import load_model, load_tokenizer  # noqa: E402
from core.parallel import bf16_pays, start_processes  # noqa: E402
from core.sampling import batches_of, sample, uniforms  # noqa: E402
from core.stage import natural, parser, run_stage  # noqa: E402

N, TEMPERATURE, CLAIM = 2, 0.7, 1.5


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


def ours(model, tokenizer, prompts: list, room: int, sample_tokens: int) -> list[list[int]]:
    """Lengths of the N responses to each prompt, of at most `room` tokens."""
    lengths: list = [None] * len(prompts)
    stop = torch.tensor([tokenizer.eos_token_id], device=model.device)
    rooms = [room] * len(prompts)
    for batch in batches_of(list(map(len, prompts)), rooms, N, sample_tokens):
        u = np.concatenate([uniforms(0, str(i), N, room) for i in batch])
        heat = torch.full((len(u),), TEMPERATURE, device=model.device)
        u = torch.tensor(u, device=model.device)
        responses = sample(model, [prompts[i] for i in batch], u, heat, stop)
        for k, i in enumerate(batch):
            lengths[i] = list(map(len, responses[k * N:(k + 1) * N]))
    return lengths


def plain(model, tokenizer, prompts: list, room: int, batch_size: int) -> list[list[int]]:
    """As `ours`."""
    lengths = []
    size = batch_size // N
    end = tokenizer.eos_token_id
    config = transformers.GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=room,
        num_return_sequences=N, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    for start in range(0, len(prompts), size):
        batch = tokenizer.pad({"input_ids": prompts[start:start + size]}, padding_side="left",
                              return_tensors="pt").to(model.device)
        out = model.generate(**batch, generation_config=config)
        for answer in out[:, batch["input_ids"].shape[1]:].tolist():
            lengths.append(answer.index(end) + 1 if end in answer else room)
    return np.reshape(lengths, (-1, N)).tolist()


def measure(args: argparse.Namespace) -> dict:
    """The line --only, in this process."""
    device = start_processes()
    dtype = torch.bfloat16 if bf16_pays(device) else torch.float32
    model, tokenizer = load_model(args.model, device, dtype), load_tokenizer(args.model)
    prompts = make_prompts(tokenizer, args.prompts)
    sampler, size = (ours, args.sample_tokens) if args.only == "ours" else (plain, args.batch_size)
    sampler(model, tokenizer, prompts[:2], args.length, size)  # warm up
    torch.manual_seed(0)
    started = time.perf_counter()
    lengths = sampler(model, tokenizer, prompts, args.length, size)
    seconds = time.perf_counter() - started
    tokens = sum(map(sum, lengths))
    # A forward pass is a third of training's operations.
    rows = [(prompt, list(map(range, ends))) for prompt, ends in zip(prompts, lengths)]
    limit = tokens * matmul_flops(device, "auto") / (training_flops(model, rows, True) / 3)
    rate = tokens / seconds
    return {"name": f"sampling, {args.only}", "seconds": round(seconds, 2),
            "tokens_per_s": round(rate), "limit_tokens_per_s": round(limit),
            "share_of_limit": round(rate / limit, 3), "memory_gb": round(memory_gb(device), 2)}


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--model", default="models/smollm2", help="a folder")
    cli.add_argument("--prompts", type=natural, default=64)
    cli.add_argument("--length", type=natural, default=128, help="limit of a response in tokens")
    cli.add_argument("--batch-size", type=natural, default=64, help="responses, of plain")
    cli.add_argument("--sample-tokens", type=natural, default=131072, help="tokens, of ours")
    cli.add_argument("--only", choices=["ours", "plain"], help="one line, in this process")
    args = cli.parse_args()
    if args.only:
        print(json.dumps(measure(args)), flush=True)
        return
    rates = []
    for name in ("ours", "plain"):
        command = [sys.executable, *sys.argv, "--only", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout.splitlines()[-1], flush=True)
        rates.append(json.loads(done.stdout.splitlines()[-1])["tokens_per_s"])
    ratio = rates[0] / rates[1]
    print(f"ours / plain: {ratio:.2f} (claimed: {CLAIM})")
    sys.exit(ratio < CLAIM)


if __name__ == "__main__":
    run_stage(main)

"""Generate stage: n sampled responses from the policy to every prompt of a round.

    y_1 … y_n ~ π_{t−1}(· | x) at temperature 0.7, top_p 1, at most 300 new tokens
                                                                                    SPA §5.1, B.4

A token is drawn by inverting the cumulative distribution at a uniform number that depends on (seed,
prompt id, sample, position) alone, and batches are the same for any number of processes. So the
text is the same on one process or eight, and after a kill: finished batches lie in OUT.unfinished,
and the same command goes on from there; those of other settings are kept, unused. Another
--sample-tokens changes the text by rounding at most. How a batch is drawn is in core/sampling.py.

Writes the prompt rows with
    responses       n texts: what judges read
    response_ids    the tokens that were sampled, a sampled stop token included: what is learnt (D9)
    vocabulary      a digest of what the ids mean
    ended           False where the length limit cut a response off
    prompt_cut, answer_cut    what --fit took from a prompt, and whether the context cut the answers

    python generate.py --model pi_0 --prompts prompts_1.jsonl --out responses.jsonl -n 4
    torchrun --nproc_per_node=8 generate.py --model pi_0 --prompts prompts_1.jsonl \\
        --out responses.jsonl
"""
import argparse
import importlib.util
import os

from core import RANK, WORLD
from core.rows import fail
from core.stage import (
    exit_if_looking,
    natural,
    parser,
    publish,
    ranged,
    run_stage,
    start,
    work_folder,
)

# It needs the torch of requirements.txt; 0.33 would replace it.
VLLM = "vllm>=0.30,<0.33"
# Tokens that vLLM is given at once; it makes batches of its own.
VLLM_TOKENS = 2 ** 22


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the output is complete."""
    cli = parser(__doc__, out="response rows (JSONL)", precision="of the weights while sampling")
    cli.add_argument("--model", required=True, help="the policy: a Hugging Face folder or hub id")
    cli.add_argument("--prompts", required=True, help="prompt rows (JSONL)")
    cli.add_argument("--fit", action="store_true",
                     help="a prompt too long for its answer loses its first tokens, and the answer "
                     "gets what the context leaves (MT-Bench's second turns, as in FastChat)")
    cli.add_argument("-n", type=natural, default=2, help="responses a prompt (papers: 2)")
    cli.add_argument("--temperature", type=ranged(float, 0), default=0.7,
                     help="sampling temperature (papers: 0.7; 0: greedy), unless a prompt row has "
                     "a `temperature` of its own")
    cli.add_argument("--max-new-tokens", type=natural, default=300,
                     help="length limit of a response in tokens (papers: 300)")
    cli.add_argument("--sample-tokens", type=natural, default=131072,
                     help="tokens sampled together, prompts and --max-new-tokens counted: memory "
                     "(0.13 MB a token for a 7 B Mistral, 0.33 MB for Phi-2), and at most rounding "
                     "in the text; a run may go on with another")
    cli.add_argument("--backend", choices=["transformers", "vllm"], default="transformers",
                     help="vllm: if installed; all GPUs of one machine, no torchrun")
    cli.add_argument("--seed", type=ranged(int, 0), default=42,
                     help="decides the text, together with the prompt's id")
    args = cli.parse_args()
    if args.n > 1 and args.temperature == 0:
        fail(f"--temperature 0 would draw the same answer {args.n} times (-n {args.n}): give a "
             "temperature above 0 (TEMPERATURE), or -n 1")
    start(args)
    if args.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        fail("--backend vllm needs the vllm package, of a version made for this torch: "
             f"pip install '{VLLM}'")
    if args.backend == "vllm" and WORLD > 1:
        fail("--backend vllm spreads over this machine's GPUs by itself: start it without torchrun")
    exit_if_looking(args.out)
    return args


if __name__ == "__main__":
    args = flags()  # here already: what is imported below takes seconds to load

import glob
import json
import math
import time

import numpy as np
import torch
import torch.distributed as dist

from core.chat import decode_response, encode_rows, vocabulary
from core.models import context_of, load_config, load_model, load_tokenizer
from core.parallel import in_bf16, progress, start_processes
from core.probe import check_samples, check_tokens
from core.rows import read_appended, read_rows, write_rows
from core.sampling import batches_of, sample, stop_tokens, uniforms


def encode_prompts(args: argparse.Namespace, config, tokenizer,
                   rows: list[dict]) -> tuple[list[list[int]], list[int]]:
    """Token ids of every prompt, and how many new tokens its answers may have."""
    limit = context_of(config)
    most = None
    if args.fit and limit < math.inf:
        # This leaves an answer all its tokens, or half the context.
        most = limit - min(args.max_new_tokens, limit // 2)
    encoded = encode_rows(config, tokenizer, rows, [[]] * len(rows), args.prompts, most)
    prompts = [prompt.tolist() for prompt, _ in encoded]
    longest = max(prompts, key=len)
    if not args.fit and len(longest) + args.max_new_tokens > limit:
        i = prompts.index(longest)
        fail(f"{args.prompts}: id {rows[i]['id']!r} has {len(longest)} tokens, with "
             f"--max-new-tokens {args.max_new_tokens} more to come; the model's context is {limit}."
             " Lower it, or leave out long prompts (data.prepare --model does)")
    return prompts, [min(args.max_new_tokens, limit - len(prompt)) for prompt in prompts]


def finished_rows(work: str) -> dict[str, dict]:
    """id → row of every row that is finished."""
    parts = glob.glob(f"{glob.escape(work)}/part*")
    return {row["id"]: row for part in parts for row in read_appended(part)}


def answered_row(row: dict, answers: list[list[int]], stop: torch.Tensor, tokenizer) -> dict:
    """A prompt's row with its sampled answers."""
    ended = [bool(ids) and ids[-1] in stop for ids in answers]
    texts = [decode_response(tokenizer, *pair) for pair in zip(answers, ended)]
    return {**row, "responses": texts, "response_ids": answers, "ended": ended,
            "vocabulary": vocabulary(tokenizer)}


def start_vllm(path: str, bf16: bool):
    """A vllm.LLM over all GPUs of this machine."""
    import vllm  # heavy, and needed for --backend vllm alone
    return vllm.LLM(path, dtype="bfloat16" if bf16 else "float32",
                    tensor_parallel_size=max(1, torch.cuda.device_count()))


def sample_vllm(engine, prompts: list[list[int]], u: torch.Tensor, temperature: torch.Tensor,
                stop: torch.Tensor) -> list[list[int]]:
    """As `sample`, by a vllm.LLM; the first uniform number of a response seeds its request."""
    import vllm
    n = len(u) // len(prompts)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(n)]
    settings = [
        vllm.SamplingParams(temperature=heat, max_tokens=u.shape[1], seed=int(first * 2 ** 31),
                            stop_token_ids=stop.tolist(), detokenize=False)
        for heat, first in zip(temperature.tolist(), u[:, 0].tolist())
    ]
    done = engine.generate(asked, settings, use_tqdm=False)
    return [list(request.outputs[0].token_ids) for request in done]


def sample_batch(args: argparse.Namespace, model, rows: list[dict], prompts: list[list[int]],
                 new_tokens: int, stop: torch.Tensor) -> list[list[int]]:
    """The answers to some rows' prompts, n to each in turn."""
    u = np.concatenate([uniforms(args.seed, row["id"], args.n, new_tokens) for row in rows])
    u = torch.tensor(u, device=stop.device)
    heats = [row.get("temperature", args.temperature) for row in rows for _ in range(args.n)]
    heats = torch.tensor(heats, device=stop.device)
    by = sample_vllm if args.backend == "vllm" else sample
    try:
        return by(model, prompts, u, heats, stop)
    except FloatingPointError as error:
        fail(f"{args.model}: {error} while it answers {args.prompts}, id {rows[0]['id']!r} or one "
             "sampled with it; are its weights sound? --precision fp32 has more range")


def publish_rows(args: argparse.Namespace, rows: list[dict], tokens_per_s: float) -> None:
    """Put the answered rows at OUT, and sum them up."""
    answers = [text for row in rows for text in row["responses"]]
    stats = {"prompts": len(rows), "n": args.n,
             "mean_characters": sum(map(len, answers)) / len(answers),
             "ended": sum(sum(row["ended"]) for row in rows) / len(answers),
             "tokens_per_s": tokens_per_s}
    publish(args, stats, lambda tmp: write_rows(tmp, rows))
    print(f"generate: {len(rows)} prompts × {args.n} responses, "
          f"{stats['mean_characters']:.0f} characters on average, "
          f"{stats['ended']:.0%} ended by themselves, {tokens_per_s:.0f} tokens/s → {args.out}")


def main(args: argparse.Namespace) -> None:
    device = start_processes()
    rows = read_rows(args.prompts, "prompts")
    config = load_config(args.model)
    tokenizer = load_tokenizer(args.model)
    prompts, allowed = encode_prompts(args, config, tokenizer, rows)
    lengths = [len(prompt) for prompt in prompts]
    stop = torch.tensor(stop_tokens(args.model, config, tokenizer), device=device)
    bf16 = in_bf16(device, args.precision)
    if args.backend == "vllm":
        model = start_vllm(args.model, bf16)
        batches = batches_of(lengths, allowed, args.n, VLLM_TOKENS)
    else:
        model = load_model(args.model, device, torch.bfloat16 if bf16 else torch.float32)
        if RANK == 0:
            check_tokens(args.model, model, [(prompt, []) for prompt in prompts])
            check_samples(args.model, model, prompts, max(map(sum, zip(lengths, allowed))))
        batches = batches_of(lengths, allowed, args.n, args.sample_tokens)

    # Each process adds its rows to a part of its own, and all go on from all parts.
    work = work_folder(args)
    before = finished_rows(work)
    todo = [batch for batch in batches if any(rows[i]["id"] not in before for i in batch)]
    if before:
        print(f"generate: {len(before)} of {len(rows)} prompts were done before; going on")
    # Nobody writes until everybody has read.
    if WORLD > 1:
        dist.barrier()
    os.makedirs(work, exist_ok=True)
    started = time.perf_counter()
    with open(f"{work}/part{RANK}", "a", encoding="utf-8") as part:
        # A kill may have cut the last line.
        part.write("\n")
        for batch in progress(todo[RANK::WORLD], "generate", "batch"):
            new_tokens = allowed[batch[0]]
            drawn = sample_batch(args, model, [rows[i] for i in batch],
                                 [prompts[i] for i in batch], new_tokens, stop)
            for k, i in enumerate(batch):
                answers = drawn[k * args.n:(k + 1) * args.n]
                row = answered_row(rows[i], answers, stop, tokenizer)
                if new_tokens < args.max_new_tokens:
                    row["answer_cut"] = True
                part.write(json.dumps(row, ensure_ascii=False, default=np.ndarray.tolist) + "\n")
            part.flush()
    if WORLD > 1:
        dist.barrier()
    seconds = time.perf_counter() - started

    if RANK == 0:
        done = finished_rows(work)
        # Of this start of the program, over all processes.
        tokens = sum(len(ids) for row in done.values() if row["id"] not in before
                     for ids in row["response_ids"])
        publish_rows(args, [done[row["id"]] for row in rows], tokens / seconds)


if __name__ == "__main__":
    run_stage(main, args)

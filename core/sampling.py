"""Sampling: y ~ π(·|x), the same on one process or eight, and after a kill.

A token is drawn by inverting the cumulative distribution at a uniform number that depends on (seed,
prompt id, sample, position) alone, and batches are the same for any number of processes. Finished
batches lie in OUT.part*, and the same command goes on from there.
"""
import argparse
import glob
import hashlib
import inspect
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from core.chat import decode_response, encode_rows, end_of_turn, is_foreign, vocabulary
from core.models import load_config, load_model, load_tokenizer, reason
from core.parallel import in_bf16
from core.policy import forget_length, logits_of, rope_switch
from core.probe import (
    TOLERANCE,
    check_template,
    check_tokens,
    cut,
    nan_first,
    plain_logits,
    reached,
)
from core.rows import fail, read_rows, write_rows
from core.stage import inputs_of, is_done, publish, settings_of

# It needs the torch of requirements.txt; 0.33 would replace it.
VLLM = "vllm>=0.30,<0.33"
# Prompt tokens a forward pass: a few gigabytes of activations at 14 B.
PREFILL = 8192
# Rounding of log-probs with and without the cache, in nats, the mean over the vocabulary. Here the
# weights are bf16 too: up to 0.15 was seen at 135 M. What is read wrongly (padding that is seen, a
# position that is off, a token lost, a cap left out) was off by 0.37 to 4.5 in some probe.
ROUNDING = TOLERANCE | {torch.bfloat16: 0.35}


def uniforms(seed: int, prompt_id: str, n: int, length: int) -> np.ndarray:
    """The uniform numbers [n, length] that decide the n responses to one prompt."""
    digest = hashlib.sha256(prompt_id.encode(errors="surrogatepass")).digest()
    key = int.from_bytes(digest[:8], "big")
    return np.stack(
        [np.random.default_rng([seed, key, sample]).random(length) for sample in range(n)])


def draw(logits: torch.Tensor, u: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Tokens [B] from logits [B, V] at temperature [B]: the smallest token whose cumulative
    probability exceeds u [B] in [0, 1); at temperature 0 the likeliest token.

    NaN logits raise FloatingPointError. Summed in float64: in float32 the sum over 128 K tokens is
    off by more than most of their probabilities, and differently on every device.
    """
    probability = (logits.float() / temperature.clamp(min=1e-6)[:, None]).softmax(-1)
    cumulative = probability.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if not total.isfinite().all():
        raise FloatingPointError("its logits are not numbers (NaN)")
    # u·total may round up.
    below = total.nextafter(torch.zeros_like(total))
    point = torch.minimum(u.double()[:, None] * total, below)
    drawn = torch.searchsorted(cumulative, point, right=True)[:, 0]
    greedy = temperature <= 0
    # It takes twice the time of all else here.
    if greedy.any():
        drawn[greedy] = logits[greedy].argmax(-1)
    return drawn


@torch.inference_mode()
def sample(model, prompts: list[list[int]], u: torch.Tensor, temperature: torch.Tensor,
           stop: torch.Tensor) -> list[list[int]]:
    """Token lists of the responses, row by row of u [R = len(prompts) · n, max_new_tokens] and
    temperature [R]; a stop token ends one and stays on it.

    Each prompt is computed once and its keys and values shared out to its n samples; finished rows
    leave the batch. A prompt that may pass the length that changes the rotation of a whole pass is
    sampled from alone.
    """
    return sample_groups(model, prompts, u, temperature, stop, None)


def sample_groups(model, prompts: list[list[int]], u: torch.Tensor, temperature: torch.Tensor,
                  stop: torch.Tensor, seen: list | None) -> list[list[int]]:
    """As `sample`; `seen` gets (rows [r], logits [r, V]) of every step, if it is a list."""
    n = len(u) // len(prompts)
    limit, _ = rope_switch(model.config)
    alone = [i for i, prompt in enumerate(prompts) if len(prompt) + u.shape[1] > limit]
    groups = [[i for i in range(len(prompts)) if i not in alone], *([i] for i in alone)]
    tokens: list[list[int]] = [[] for _ in range(len(u))]
    for group in groups:
        if group:
            rows = torch.tensor([i * n + k for i in group for k in range(n)], device=u.device)
            together = [prompts[i] for i in group]
            sample_together(model, together, rows, u, temperature, stop, tokens, seen)
    return tokens


def sample_together(model, prompts: list[list[int]], rows: torch.Tensor, u: torch.Tensor,
                    temperature: torch.Tensor, stop: torch.Tensor, tokens: list[list[int]],
                    seen: list | None) -> None:
    """Write the responses to `prompts`, the `rows` [r] of u and temperature, into `tokens`."""
    device = model.device
    n = len(rows) // len(prompts)
    width = max(map(len, prompts))
    # Left padding: all rows end together.
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    known = inspect.signature(model.get_decoder().forward).parameters
    # Renamed in transformers 5.24.
    slot = "cache" if "cache" in known else "past_key_values"
    limit, dynamic = rope_switch(model.config)
    cache = transformers.DynamicCache(config=model.config)

    def last_logits(ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if dynamic:
            forget_length(model)
        place = {"position_ids": positions} if "position_ids" in known else {}
        out = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=True, **place,
                                  **{slot: cache})
        return logits_of(model, out.last_hidden_state[:, -1])

    # A long prefill in pieces, so that activations do not grow with the prompts: a query sees the
    # same keys in either way, unless its end changes the rotation of all.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    step = max(1, PREFILL // len(prompts)) if width <= limit else width
    for start in range(0, width, step):
        end = min(start + step, width)
        logits = last_logits(ids[:, start:end], positions[:, start:end], mask[:, :end])
    logits = logits.repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    mask = mask.repeat_interleave(n, 0)
    alive = rows
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for t in range(u.shape[1]):
        if seen is not None:
            seen.append((alive, logits))
        token = draw(logits, u[alive, t], temperature[alive])
        for row, value, over in zip(alive.tolist(), token.tolist(), done.tolist()):
            if not over:
                tokens[row].append(value)
        done |= torch.isin(token, stop)
        if t + 1 == u.shape[1] or done.all():
            break
        # Each compaction copies the cache, so wait until an eighth is worth it.
        if done.sum() * 8 >= len(done):
            keep = (~done).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            token = token[keep]
            mask = mask[keep]
            alive = alive[keep]
            done = done[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        length = width + t + 1
        if length == limit + 1 or dynamic and length > limit:
            # The cached keys are rotated otherwise. A finished row that is still in the batch goes
            # on with any token: nobody reads what follows.
            cache = transformers.DynamicCache(config=model.config)
            whole = [prompts[0] + tokens[row] + [0] * (t + 1 - len(tokens[row]))
                     for row in alive.tolist()]
            logits = last_logits(torch.tensor(whole, device=device), mask.cumsum(-1) - 1, mask)
        else:
            logits = last_logits(token[:, None], mask.sum(-1, keepdim=True) - 1, mask)


@torch.inference_mode()
def check_samples(path: str, model, prompts: list[list[int]], length: int) -> None:
    """End the program unless a few tokens through the cache, with padding and rows that finish
    early, have the log-probs that they have without it; `length`: tokens that the stage samples."""
    pool = [token for prompt in prompts[:8] for token in prompt]
    longest = max(map(len, prompts))
    beyond = reached(model.config, longest + length)
    probe = [cut(pool, 0, 6), cut(pool, 6, 3)]
    if beyond:
        probe.append(cut(pool, 9, beyond - 1))
    if beyond and longest > beyond:
        probe.append(cut(pool, 9, beyond + 3))
    # The first row draws token 0, which ends it; the others take the likeliest.
    u = torch.zeros(2 * len(probe), 3, device=model.device)
    heat = torch.tensor([1.0] + [0.0] * (len(u) - 1), device=model.device)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    name = f"{path}: {model.config.model_type} cannot be sampled from"
    try:
        tokens = sample_groups(model, probe, u, heat, torch.tensor([0], device=model.device), seen)
        worst = 0.0
        for i, prompt in enumerate(probe):
            y = tokens[2 * i + 1]
            if rope_switch(model.config)[0] < math.inf:
                # A longer pass is rotated otherwise.
                plain = [plain_logits(model, prompt + y[:t])[-1] for t in range(len(y))]
            else:
                plain = plain_logits(model, prompt + y[:-1])[-len(y):]
            for row in (2 * i, 2 * i + 1):
                cached = [logits[rows == row] for rows, logits in seen if row in rows]
                for t, (own, expected) in enumerate(zip(cached, plain)):
                    # Siblings of one prompt may part at a tie.
                    if tokens[row][:t] == y[:t]:
                        # In bf16 all logits may move together, by 0.4, which no draw sees.
                        own, expected = own[0].float().log_softmax(-1), expected.log_softmax(-1)
                        off = (own - expected).abs().mean().item()
                        worst = max(worst, off, key=nan_first)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        fail(f"{name}: {reason(error)}")
    if not worst <= ROUNDING[model.dtype]:
        fail(f"{name}: through the cache its log-probs are {worst:.2g} nats off those without, "
             "on average")


def batches_of(lengths: list[int], n: int, new: int, most: int, budget: float) -> list[list[int]]:
    """Prompts that are sampled together, longest first: at most `most` responses, whose prompts and
    `new` tokens, padded, are at most `budget` tokens.

    Keys and values grow with tokens, not with responses. The responses to one prompt stay together,
    so a prompt beyond a limit is a batch of its own. The text depends on the prompts' ids alone.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            rows = (len(batches[-1]) + 1) * n
            longest = lengths[batches[-1][0]]
            if rows <= most and rows * (longest + new) <= budget:
                batches[-1].append(i)
                continue
        batches.append([i])
    return batches


def stop_tokens(path: str, config, tokenizer) -> list[int]:
    """What ends a response: the end of a turn or of the sequence, and what the model's
    generation_config.json or config.json names."""
    try:
        more = transformers.GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        more = config.eos_token_id
    if more is None:
        more = []
    elif not isinstance(more, list):
        more = [more]
    return sorted({end_of_turn(tokenizer), tokenizer.eos_token_id, *more})


def finished(out: str, header: str) -> dict[str, dict]:
    """id → row of every row that earlier runs with the same settings left in `out`.part*; a line
    cut by a kill is skipped."""
    rows = {}
    for path in glob.glob(f"{glob.escape(out)}.part*"):
        # A kill may cut a character too.
        with open(path, encoding="utf-8", errors="replace") as file:
            if file.readline().rstrip("\n") != header:
                continue
            for line in file:
                try:
                    row = json.loads(line)
                    rows[row["id"]] = row
                except (ValueError, KeyError):
                    pass
    return rows


def is_fresh(part: str, header: str) -> bool:
    """Whether there is no file `part` of the settings in `header` to go on with."""
    if not os.path.exists(part):
        return True
    return open(part, encoding="utf-8", errors="replace").readline().rstrip("\n") != header


def generate(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> dict | None:
    """Write args.out from args.prompts with args.model; returns the stats, or None where the output
    was complete already."""
    settings = settings_of(args, "model", "prompts")
    if is_done(args.out, settings):
        return None
    rows = read_rows(args.prompts, "prompts")
    bf16 = in_bf16(device, args.precision)
    config = load_config(args.model)
    tokenizer = load_tokenizer(args.model)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    # What --fit keeps of a prompt leaves an answer all its tokens, or half the context.
    most = limit - min(args.max_new_tokens, limit // 2) if args.fit and limit < math.inf else None
    pairs = encode_rows(config, tokenizer, rows, [[]] * len(rows), args.prompts, most)
    encoded = [prompt.tolist() for prompt, _ in pairs]
    longest = max(map(len, encoded))
    if longest + args.max_new_tokens > limit and not args.fit:
        fail(f"{args.prompts}: the longest prompt ({longest} tokens) and --max-new-tokens "
             f"{args.max_new_tokens} exceed the model's context of {limit}")
    rooms = [min(args.max_new_tokens, limit - len(prompt)) for prompt in encoded]
    stop = torch.tensor(stop_tokens(args.model, config, tokenizer), device=device)
    if rank == 0:
        check_template(args.model, tokenizer)
    if args.backend == "vllm":
        # It makes its own batches.
        draw_responses = sample_vllm
        together = 4096
        budget = math.inf
        model = start_vllm(args.model, config, bf16, world)
    else:
        draw_responses = sample
        together = args.batch_size
        budget = args.sample_tokens
        model = load_model(args.model, device, torch.bfloat16 if bf16 else torch.float32)
        if rank == 0:
            check_tokens(args.model, model, [(prompt, []) for prompt in encoded], tokenizer)
            check_samples(args.model, model, encoded, args.max_new_tokens)

    batches = []
    for room in sorted(set(rooms), reverse=True):  # a batch's answers have one length limit
        own = [i for i in range(len(rows)) if rooms[i] == room]
        for batch in batches_of([len(encoded[i]) for i in own], args.n, room, together, budget):
            batches.append([own[k] for k in batch])
    header = json.dumps(settings)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    done = finished(args.out, header)
    todo = [batch for batch in batches if any(rows[i]["id"] not in done for i in batch)]
    if done and rank == 0:
        print(f"generate: {len(done)} of {len(rows)} prompts were done before; going on")
    # Nobody writes until everybody has read.
    if world > 1:
        dist.barrier()
    part = f"{args.out}.part{rank}"
    fresh = is_fresh(part, header)
    started = time.perf_counter()
    with open(part, "w" if fresh else "a", encoding="utf-8") as file:
        file.write(header + "\n" if fresh else "\n")
        quiet = None if rank == 0 else True
        for batch in tqdm(todo[rank::world], desc="generate", unit="batch", disable=quiet):
            u = np.concatenate([
                uniforms(args.seed, rows[i]["id"], args.n, rooms[i]) for i in batch])
            heats = [rows[i].get("temperature", args.temperature)
                     for i in batch for _ in range(args.n)]
            try:
                tokens = iter(draw_responses(
                    model, [encoded[i] for i in batch], torch.tensor(u, device=device),
                    torch.tensor(heats, device=device), stop))
            except FloatingPointError as error:
                fail(f"{args.model}: {error} while it answers {args.prompts}, id "
                     f"{rows[batch[0]]['id']!r} or one sampled with it; are its weights sound? "
                     "--precision fp32 has more range")
            for i in batch:
                mine = [next(tokens) for _ in range(args.n)]
                ended = [bool(y) and y[-1] in stop for y in mine]
                answers = list(zip(mine, ended))
                row = {**rows[i],
                       "responses": [decode_response(tokenizer, *own) for own in answers],
                       "response_ids": mine, "ended": ended,
                       "special_inside": [is_foreign(tokenizer, *own) for own in answers],
                       "vocabulary": vocabulary(tokenizer)}
                if rooms[i] < args.max_new_tokens:
                    row["answer_cut"] = True  # the context left less than --max-new-tokens
                text = json.dumps(row, ensure_ascii=False, default=np.ndarray.tolist)
                file.write(text + "\n")
            file.flush()
    if world > 1:
        dist.barrier()
    seconds = time.perf_counter() - started
    stats = {"prompts": len(rows), "n": args.n}
    if rank == 0:
        before = set(done)
        done = finished(args.out, header)
        lengths = [len(text) for row in done.values() for text in row["responses"]]
        # Of this start of the program, over all processes.
        drawn = sum(len(ids) for row in done.values() if row["id"] not in before
                    for ids in row["response_ids"])
        stats |= {"mean_characters": sum(lengths) / len(lengths),
                  "ended": sum(sum(row["ended"]) for row in done.values()) / len(lengths),
                  "special_inside": sum(sum(row["special_inside"]) for row in done.values()),
                  "tokens_per_s": drawn / seconds}
        publish(args.out, settings, stats,
                lambda tmp: write_rows(tmp, (done[row["id"]] for row in rows)),
                inputs_of(args, settings))
        for path in glob.glob(f"{glob.escape(args.out)}.part*"):
            os.remove(path)
        print(f"generate: {len(rows)} prompts × {args.n} responses, "
              f"{stats['mean_characters']:.0f} characters on average, "
              f"{stats['ended']:.0%} ended by themselves, {stats['special_inside']} with special "
              f"tokens inside, {stats['tokens_per_s']:.0f} tokens/s → {args.out}")
    return stats


def respond(model: str, prompts: str, out: str, args: argparse.Namespace, rank: int, world: int,
            device: torch.device, **changes) -> list[dict]:
    """The rows of `out`, generated with the sampling flags in `args` but for `changes`; for other
    stages.

    vLLM's engine gives a card back only when its process ends, so with it every policy is sampled
    by a process of its own, generate.py, for which this one frees what it keeps.
    """
    known = ("n", "temperature", "max_new_tokens", "batch_size", "sample_tokens", "precision",
             "backend", "seed")
    flags = {"fit": False, **{key: getattr(args, key) for key in known}, **changes}
    if args.backend == "vllm":
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        command = [sys.executable, str(Path(__file__).parent.parent / "generate.py")]
        command += ["--fit"] if flags.pop("fit") else []
        for key, value in {"model": model, "prompts": prompts, "out": out, **flags}.items():
            command += ["-n" if key == "n" else f"--{key.replace('_', '-')}", str(value)]
        status = subprocess.run(command).returncode
        # generate.py has said why.
        if status:
            raise SystemExit(status)
    else:
        whole = argparse.Namespace(model=model, prompts=prompts, out=out, **flags)
        generate(whole, rank, world, device)
    if world > 1:
        dist.barrier()
    return read_rows(out, "responses")


def sample_vllm(engine, prompts: list[list[int]], u: torch.Tensor, temperature: torch.Tensor,
                stop: torch.Tensor) -> list[list[int]]:
    """As `sample`, by a vllm.LLM; the first uniform number of a response seeds its request."""
    from vllm import SamplingParams
    n = len(u) // len(prompts)
    settings = [
        SamplingParams(temperature=t, max_tokens=u.shape[1], seed=int(first * 2 ** 31),
                       stop_token_ids=stop.tolist(), detokenize=False)
        for t, first in zip(temperature.tolist(), u[:, 0].tolist())
    ]
    asked = [{"prompt_token_ids": p} for p in prompts for _ in range(n)]
    done = engine.generate(asked, settings, use_tqdm=False)
    return [list(request.outputs[0].token_ids) for request in done]


def start_vllm(path: str, config, bf16: bool, world: int):
    """A vllm.LLM over GPUs of this machine."""
    try:
        # Never needed but for --backend vllm.
        import vllm
    except ImportError:
        fail("--backend vllm needs the vllm package, of a version made for this torch: "
             f"pip install '{VLLM}'")
    if world > 1:
        fail("--backend vllm spreads over this machine's GPUs by itself: start it without torchrun")
    gpus = tensor_parallel(config.get_text_config(), torch.cuda.device_count())
    return vllm.LLM(path, dtype="bfloat16" if bf16 else "float32", tensor_parallel_size=gpus)


def tensor_parallel(config, gpus: int) -> int:
    """How many of `gpus` GPUs vLLM can split a model over: the largest power of two that divides
    query heads, key-value heads and the vocabulary, which it pads to a multiple of 64."""
    heads = config.num_attention_heads
    vocabulary = math.ceil(config.vocab_size / 64) * 64
    parts = math.gcd(heads, getattr(config, "num_key_value_heads", None) or heads, vocabulary)
    size = 1
    while 2 * size <= gpus and parts % (2 * size) == 0:
        size *= 2
    return size

"""Sampling: y ~ π(·|x), the same text on one process or eight, and after a kill.

    y_t = min {k : Σ_{j ≤ k} π(j | x, y_<t) > u_t}       u_t from (seed, prompt id, sample, t) alone

What is sampled together changes a text by rounding at most. generate.py is the stage.
"""
import hashlib
import inspect

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers.cache_utils import DynamicLayer

from core.chat import end_of_turn
from core.parallel import progress
from core.policy import logits_of

# Prompt tokens a forward pass: a few gigabytes of activations at 14 B.
PREFILL = 8192
# Tokens whose probabilities are summed in float32, and twice what such sums are off by at most.
BLOCK = 128
MARGIN = 2e-6
# Tokens that a cache can grow by before it is copied.
GROW_BY = 64


def uniforms(seed: int, prompt_id: str, n: int, length: int) -> np.ndarray:
    """The uniform numbers [n, length] that decide the n responses to one prompt."""
    digest = hashlib.sha256(prompt_id.encode(errors="surrogatepass")).digest()
    key = int.from_bytes(digest[:8], "big")
    return np.stack(
        [np.random.default_rng([seed, key, sample]).random(length) for sample in range(n)])


def draw(logits: torch.Tensor, u: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Tokens [B] from logits [B, V] at temperature [B]: the smallest token whose cumulative
    probability exceeds u [B] in [0, 1); at temperature 0 the likeliest token. NaN logits raise
    FloatingPointError.

    The block of tokens that u points into is found from float32 sums, the token from its block
    alone. Where a border between two tokens is so near that these sums could be wrong about it, all
    is summed again in float64.
    """
    u = u.double()
    probability = (logits.float() / temperature.clamp(min=1e-6)[:, None]).softmax(-1)
    if missing := -probability.shape[1] % BLOCK:
        probability = F.pad(probability, (0, missing))
    blocks = probability.unflatten(-1, (-1, BLOCK))
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    point = u[:, None] * ends[:, -1:]
    if not point.isfinite().all():
        raise FloatingPointError("its logits are not numbers (NaN)")

    block = torch.searchsorted(ends, point, right=True).clamp(max=ends.shape[1] - 1)
    inside = blocks[torch.arange(len(u), device=u.device), block[:, 0]]
    # Where the block begins, and where each of its tokens ends.
    borders = F.pad(inside, (1, 0)).cumsum(-1, dtype=torch.float64)
    borders += ends.gather(1, block) - borders[:, -1:]
    drawn = (block * BLOCK + torch.searchsorted(borders, point, right=True) - 1)[:, 0]
    near = (borders - point).abs().amin(-1) < MARGIN
    if near.any():
        drawn[near] = invert(probability[near], u[near])
    greedy = temperature <= 0
    if greedy.any():
        drawn[greedy] = logits[greedy].argmax(-1)
    return drawn


def invert(probability: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The smallest tokens [B] whose cumulative probability [B, V] exceeds u [B], in float64: in
    float32 the sum over 128 K tokens is off by more than most of their probabilities, and
    differently on every device."""
    cumulative = probability.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # u·total may round up.
    below = total.nextafter(torch.zeros_like(total))
    point = torch.minimum(u[:, None] * total, below)
    return torch.searchsorted(cumulative, point, right=True)[:, 0]


class GrowingLayer(DynamicLayer):
    """A layer's keys and values [B, heads, T, D] with memory for GROW_BY more tokens behind them,
    so that they are copied once in GROW_BY tokens and not at each."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *rest, **known) -> tuple:
        if not self.is_initialized:
            return super().update(keys, values, *rest, **known)
        start = self.keys.shape[2]
        end = start + keys.shape[2]
        # Whatever chooses or repeats rows puts tensors of its own in the place of these views.
        inside = self.keys is getattr(self, "view", None) and end <= self.memory[0].shape[2]
        if not inside:
            self.memory = [F.pad(old, (0, 0, 0, end + GROW_BY - start))
                           for old in (self.keys, self.values)]
        for memory, new in zip(self.memory, (keys, values)):
            memory[:, :, start:end] = new
        self.keys, self.values = (memory[:, :, :end] for memory in self.memory)
        self.view = self.keys
        return self.keys, self.values


@torch.inference_mode()
def sample(model, prompts: list[list[int]], u: torch.Tensor, temperature: torch.Tensor,
           stop: torch.Tensor, trace: list | None = None) -> list[list[int]]:
    """Token lists of the responses, row by row of u [R = len(prompts) · n, max_new_tokens] and
    temperature [R]; a stop token ends one and stays on it.

    Each prompt is computed once and its keys and values shared out to its n samples; finished rows
    leave the batch. `trace`, if given, gets (rows [r], logits [r, V]) of every step.
    """
    device = model.device
    decoder = model.get_decoder()
    accepted = inspect.signature(decoder.forward).parameters
    # Renamed in transformers 5.24.
    slot = "cache" if "cache" in accepted else "past_key_values"
    cache = transformers.DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer
                    for layer in cache.layers]

    def last_logits(ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        layout = {"position_ids": positions} if "position_ids" in accepted else {}
        out = decoder(input_ids=ids, attention_mask=mask, use_cache=True, **layout, **{slot: cache})
        return logits_of(model, out.last_hidden_state[:, -1])

    # Left padding: all prompts end together.
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    # Many tokens go in pieces, so that activations do not grow with the prompts: a query sees the
    # same keys in either way.
    piece = max(1, PREFILL // len(prompts))
    for start in range(0, width, piece):
        end = start + piece
        logits = last_logits(ids[:, start:end], positions[:, start:end], mask[:, :end])

    n = len(u) // len(prompts)
    cache.batch_repeat_interleave(n)
    logits = logits.repeat_interleave(n, 0)
    mask = mask.repeat_interleave(n, 0)
    rows = torch.arange(len(u), device=device)
    done = torch.zeros(len(u), dtype=torch.bool, device=device)
    responses: list[list[int]] = [[] for _ in u]
    for t in progress(range(u.shape[1]), "tokens", "token", leave=False):
        if trace is not None:
            trace.append((rows, logits))
        token = draw(logits, u[rows, t], temperature[rows])
        for row, value, over in zip(rows.tolist(), token.tolist(), done.tolist()):
            if not over:
                responses[row].append(value)
        done |= torch.isin(token, stop)
        if t + 1 == u.shape[1] or done.all():
            break
        # Each compaction copies the cache, so wait until an eighth is worth it.
        if done.sum() * 8 >= len(done):
            left = (~done).nonzero()[:, 0]
            cache.batch_select_indices(left)
            token = token[left]
            mask = mask[left]
            rows = rows[left]
            done = done[left]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = last_logits(token[:, None], mask.sum(-1, keepdim=True) - 1, mask)
    return responses


def batches_of(lengths: list[int], allowed: list[int], n: int, budget: float) -> list[list[int]]:
    """Prompts that are sampled together, longest first: at most `budget` tokens, of prompts and new
    ones, padded, and none padded to more than twice its own. `allowed`: the new tokens that each
    prompt's responses may have; in a batch they are the same.

    Keys and values grow with tokens, not with responses. The responses to one prompt stay together,
    so a prompt beyond the limit is a batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-allowed[i], -lengths[i])):
        if batches:
            first = batches[-1][0]
            width = lengths[first] + allowed[first]
            fits = (len(batches[-1]) + 1) * n * width <= budget
            if fits and width <= 2 * (lengths[i] + allowed[i]) and allowed[i] == allowed[first]:
                batches[-1].append(i)
                continue
        batches.append([i])
    return batches


def stop_tokens(path: str, config, tokenizer) -> list[int]:
    """What ends a response: the end of a turn or of the sequence, and what generation_config.json
    names, or the config of the text model where there is none."""
    try:
        named = transformers.GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        named = getattr(config.get_text_config(), "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({end_of_turn(tokenizer), tokenizer.eos_token_id, *named} - {None})

"""A model is asked once, before any work, whether it is read rightly.

A few short sequences, and one beyond the attention window that the stage's own rows pass, go
through the very functions that the stage uses and through a plain `model(ids).logits`. What differs
by more than rounding, and whatever raises, is one line.
"""
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from core import RANK
from core.models import load_model
from core.parallel import autocast, in_bf16
from core.policy import ResponseLogps, score_part
from core.rows import fail, in_one_line
from core.sampling import sample

# Rounding, in nats a token. fp32: sums in another order were seen to differ by up to 1e-5 a token.
# bf16 has 8 bits: a logit of 30 is known to ± 0.06, and a mixture of experts may choose others.
# What is read wrongly is off by more: by 0.3 to 8 where a cap is left out or a sibling is seen.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.2}

# The same of log-probs with and without the cache, the mean over the vocabulary. Here the weights
# are bf16 too: up to 0.15 was seen at 135 M. What is read wrongly (padding that is seen, a position
# that is off, a token lost, a cap left out) was off by 0.37 to 4.5 in some probe.
TOLERANCE_SAMPLED = TOLERANCE | {torch.bfloat16: 0.35}

# What configs call a length from which on attention is computed otherwise.
WINDOWS = {
    "sliding_window", "attention_window_size", "window_size", "attention_chunk_size", "chunk_size",
    "mamba_chunk_size",
}


def load_scorer(path: str, device: torch.device, encoded: list, precision: str):
    """A frozen causal LM that was found to score short rows of the tokens of `encoded` as its plain
    logits do. One process checks for all: the others wait for it where they next meet."""
    model = load_model(path, device)
    if RANK == 0:
        check_tokens(path, model, encoded)
        check_scores(path, model, encoded, precision)
    return model


def check_tokens(path: str, model, encoded: list) -> None:
    """Every token has an embedding, and every response follows at least one token."""
    size = model.get_input_embeddings().num_embeddings
    for prompt, ys in encoded:
        if len(prompt) == 0:
            fail(f"{path}: a prompt without any token; the chat template must write something")
        largest = int(max(np.max(part, initial=0) for part in (prompt, *ys)))
        if largest >= size:
            fail(f"{path}: token {largest} has no embedding; the model has {size}. Model and "
                 "tokenizer must share their vocabulary")


def check_scores(path: str, model, encoded: list, precision: str) -> None:
    """`score`, in the layout that `encoded` rows will have, equals the model's own logits."""
    rows = probe_rows(model.config, encoded)
    device = next(model.parameters()).device
    name = f"{path}: {model.config.model_type} cannot be scored or trained"
    differences = []
    with in_one_line(name):
        # By this process alone.
        ours = score_part(ResponseLogps(model), rows, precision, 0, 1)
        for i, (prompt, ys) in enumerate(rows):
            for y, logp in zip(ys, ours[i]):
                with autocast(device, precision):
                    plain = plain_logits(model, prompt + y[:-1])[-len(y):].log_softmax(-1)
                plain_logp = sum(row[token].item() for row, token in zip(plain, y))
                differences.append(abs(logp - plain_logp) / len(y))
    dtype = torch.bfloat16 if in_bf16(device, precision) else model.dtype
    # NaN where one of them is.
    worst = np.max(differences)
    if not worst <= TOLERANCE[dtype]:
        fail(f"{name}: its log-probs are {worst:.2g} nats a token off its own logits")


@torch.inference_mode()
def check_samples(path: str, model, prompts: list[list[int]], longest: int) -> None:
    """A few tokens through the cache, with padding and rows that finish early, have the log-probs
    that they have without it; `longest`: tokens of the longest prompt with its answer."""
    pool = itertools.cycle(token for prompt in prompts[:8] for token in prompt)
    probe = [take(pool, 6), take(pool, 3)]
    if window := largest_window_passed(model.config, longest):
        # It is passed while sampling, and by the prompt where the stage's prompts pass it.
        probe.append(take(pool, window - 1))
        probe.append(take(pool, min(window + 3, max(map(len, prompts)))))
    # The first row draws token 0, which ends it; the others take the likeliest.
    u = torch.zeros(2 * len(probe), 3, device=model.device)
    heat = torch.tensor([1.0] + [0.0] * (len(u) - 1), device=model.device)
    stop = torch.tensor([0], device=model.device)
    trace: list[tuple[torch.Tensor, torch.Tensor]] = []
    name = f"{path}: {model.config.model_type} cannot be sampled from"
    differences = []
    with in_one_line(name):
        for row, y in enumerate(sample(model, probe, u, heat, stop, trace)):
            plain = plain_logits(model, probe[row // 2] + y[:-1])[-len(y):]
            cached = [logits[rows == row][0] for rows, logits in trace if row in rows]
            for with_cache, without in zip(cached, plain):
                # In bf16 all logits may move together, by 0.4, which no draw sees.
                difference = with_cache.float().log_softmax(-1) - without.log_softmax(-1)
                differences.append(difference.abs().mean().item())
    worst = np.max(differences)
    if not worst <= TOLERANCE_SAMPLED[model.dtype]:
        fail(f"{name}: through the cache its log-probs are {worst:.2g} nats off those without, "
             "on average")


@torch.no_grad()
def plain_logits(model, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of one sequence, float32, as the model itself computes them."""
    out = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return out.logits[0].float()


def probe_rows(config, encoded: list) -> list:
    """Rows of different short lengths, of the stage's own tokens; and one that passes the largest
    attention window that `encoded` rows pass, so that it passes the smaller ones too."""
    pool = itertools.cycle(
        int(token) for prompt, ys in encoded[:8] for part in (prompt, *ys) for token in part)
    rows = [(take(pool, 7), [take(pool, 5), take(pool, 3)]), (take(pool, 3), [take(pool, 6)])]
    longest = max(len(prompt) + max(map(len, ys), default=0) for prompt, ys in encoded)
    if window := largest_window_passed(config, longest):
        length = min(window + 8, longest)
        n = max(1, length - 12)
        rows.append((take(pool, n), [take(pool, length - n), take(pool, 5)]))
    return rows


def take(pool: Iterator[int], count: int) -> list[int]:
    """The next tokens of a pool."""
    return list(itertools.islice(pool, count))


def largest_window_passed(config, longest: int) -> int | None:
    """The largest attention window in a config that rows of `longest` tokens pass; None: none."""
    values = config.get_text_config().to_dict()
    windows = [values.get(name) for name in WINDOWS]
    return max((size for size in windows if isinstance(size, int) and 0 < size < longest),
               default=None)

"""π(y|x): the log-probs of responses, and of the extrapolated policy.

    logp(y|x) = Σ_t log π(y_t | x, y_<t)        response tokens only, end-of-turn token included
    h̃ = (1 + λ) h_θ − λ h_ref                   logits of π̃ at a token, for softmax           S12

The mathematics stands first, down to `score`. Then how a model is read; last, layout: which rows
share a pass, and its tensors.

Shapes: M response tokens of R responses, in B sequences of T tokens; H hidden units, V tokens in
the vocabulary.
"""
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from core import RANK, WORLD
from core.parallel import autocast, merge, model_of, progress

# ---------------------------------------------------------------------------------------- log-probs


class Reference(NamedTuple):
    """What another policy's forward pass needs to extrapolate from this one."""
    head: Callable           # last hidden states [m, H] → logits [m, V]
    hidden: torch.Tensor     # last hidden states [M, H] of the response tokens


def token_logps(head: Callable, hidden: torch.Tensor, target: torch.Tensor,
                reference: Reference | None = None, lam: float = 0.0,
                chunk: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(target) and log π̃(target) [M], fp32 at least, from last hidden states [M, H]; the
    latter without gradient.

    Without a `reference`, or with λ = 0, π̃ is π (S9). A [B, T, V] tensor of logits is the memory
    peak of naive code: here [chunk, V] is the largest that exists, and is recomputed in backward.
    """
    def of_chunk(part: slice, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        label = target[part, None]
        logits = head(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logp = logits.log_softmax(-1).gather(-1, label)[:, 0]
        if reference is None:
            return logp, logp.detach()
        # Below logp on purpose: in backward, checkpoint stops computing again once it has what the
        # gradient of logp needs, so this part is not run twice.
        with torch.no_grad():
            logits_ref = reference.head(reference.hidden[part]).to(logits.dtype)
            # h̃ = (1 + λ) h_θ − λ h_ref, renormalised                                          S12
            mixed = (1 + lam) * logits - lam * logits_ref
            logp_tilde = mixed.log_softmax(-1).gather(-1, label)[:, 0]
        return logp, logp_tilde
    chunks = []
    for start in range(0, len(target), chunk):
        part = slice(start, start + chunk)
        if torch.is_grad_enabled():
            chunks.append(checkpoint(of_chunk, part, hidden[part], use_reentrant=False))
        else:
            chunks.append(of_chunk(part, hidden[part]))
    logp, logp_tilde = zip(*chunks)
    return torch.cat(logp), torch.cat(logp_tilde)


def sum_by_response(values: torch.Tensor, tokens: dict) -> torch.Tensor:
    """Sums [R] of per-token values [M] over each response."""
    return torch.stack([part.sum() for part in values.split(tokens["lengths"])])


class ResponseLogps(torch.nn.Module):
    """The model as the function that is trained: tokens of a pass → log π [R] and log π̃ [R] of its
    responses.

    DDP and FSDP must wrap exactly the forward pass that is used, or their hooks never fire.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def as_reference(self, tokens: dict) -> Reference:
        """What another policy's forward pass needs to extrapolate from this one."""
        head = functools.partial(logits_of, self.model)
        return Reference(head, response_hidden(self.model, tokens))

    def forward(self, tokens: dict, reference: Reference | None = None,
                lam: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = response_hidden(self.model, tokens)
        head = functools.partial(logits_of, self.model)
        logp, logp_tilde = token_logps(head, hidden, tokens["target"], reference, lam)
        return sum_by_response(logp, tokens), sum_by_response(logp_tilde, tokens)


def score(net: torch.nn.Module, encoded: list, precision: str) -> list[list[float]]:
    """log-probs of every response of every row, on all processes; the rows are dealt out to
    them."""
    logps = merge(score_part(net, encoded, precision, RANK, WORLD))
    return [logps[i] for i in range(len(encoded))]


@torch.no_grad()
def score_part(net: torch.nn.Module, encoded: list, precision: str, rank: int,
               world: int) -> dict[int, list[float]]:
    """Row → log-probs of its responses, for the rows that are dealt to one of `world` processes.

    A layer is used once a pass, so its weights' bf16 copy is not kept: of 14 B weights it is 28 GB.
    """
    shared = shares_prompt(model_of(net), encoded)
    device = next(net.parameters()).device
    # Tokens that keep the device busy.
    budget = 16384 if device.type == "cuda" else 2048
    passes = deal(encoded, range(len(encoded)), shared, budget, world)[rank]
    mine = {}
    for indices in progress(passes, "score", "batch"):
        with autocast(device, precision, cache=False):
            # Row 0 where a pass is empty: with sharded weights all processes take part in each.
            logp, _ = net(pack([encoded[i] for i in indices or [0]], shared, device))
        values = iter(logp.tolist())
        mine.update({i: [next(values) for _ in encoded[i][1]] for i in indices})
    if hasattr(net, "reshard"):
        # In shards: what the last forward pass gathered.
        net.reshard()
    return mine


# ---------------------------------------------------------------------------------- reading a model


def response_hidden(model, tokens: dict) -> torch.Tensor:
    """Last hidden states [M, H] at the positions that predict response tokens. Prompt tokens never
    count."""
    # Without siblings each sequence is read as by anyone: from position 0, causally.
    layout = {}
    if tokens["attention_mask"] is not None:
        layout = {key: tokens[key] for key in ("position_ids", "attention_mask")}
    out = model.get_decoder()(input_ids=tokens["input_ids"], use_cache=False, **layout)
    return out.last_hidden_state.flatten(0, 1)[tokens["where"]]


def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] from last hidden states [..., H]: the head, then the factor or the soft cap
    that the family applies. The probe compares them with the model's own."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    # Cohere.
    if factor := getattr(config, "logit_scale", None):
        logits = logits * factor
    # Falcon-H1.
    if factor := getattr(config, "lm_head_multiplier", None):
        logits = logits * factor
    # Granite.
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    # Gemma 2.
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


# ----------------------------------------------------------------------------- the layout of a pass


def pack(encoded: list, shared: bool, device: torch.device) -> dict:
    """The tokens of `encoded` rows: B sequences `prompt y_1 y_2 …` if `shared`, else one sequence
    a response.

    Siblings are hidden from one another by the mask and each starts at the position after the
    prompt, so every response sees what it would see alone (Wang & Hegde 2024), and the prompt is
    computed once. A response's last token is predicted, never read, so it is left out.

    Returns input_ids, position_ids [B, T], 0 where padding stands; attention_mask bool
    [B, 1, T, T], None where the causal mask is right already (padding stands on the right); and for
    the M response tokens of the R responses: where [M] (flat index of the position that predicts
    the token), target [M], and lengths (R integers that sum to M).
    """
    rows = encoded if shared else [(prompt, [y]) for prompt, ys in encoded for y in ys]
    width = max(len(p) + sum(len(y) - 1 for y in ys) for p, ys in rows)
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    # 0 the prompt, 1, 2, … its responses, −1 padding.
    part = torch.full((len(rows), width), -1)
    where, target, lengths = [], [], []
    for b, (prompt, ys) in enumerate(rows):
        n = end = len(prompt)
        ids[b, :n] = torch.as_tensor(prompt)
        part[b, :n] = 0
        positions[b, :n] = torch.arange(n)
        for j, y in enumerate(ys, 1):
            start = end
            end = start + len(y) - 1
            ids[b, start:end] = torch.as_tensor(y[:-1], dtype=torch.long)
            part[b, start:end] = j
            positions[b, start:end] = torch.arange(n, n + len(y) - 1)
            where += [b * width + n - 1, *range(b * width + start, b * width + end)]
            target.append(torch.as_tensor(y))
            lengths.append(len(y))
    mask = None
    if shared and any(len(ys) > 1 for _, ys in rows):
        # T numbers a sequence travel, and not T² of the mask.
        part = part.to(device)
        query = part[:, :, None]
        key = part[:, None, :]
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        mask = (((key == 0) | (key == query)) & causal)[:, None]
    return {"input_ids": ids.to(device), "position_ids": positions.to(device),
            "attention_mask": mask, "lengths": lengths,
            "where": torch.tensor(where, device=device),
            "target": torch.cat(target).long().to(device)}


def tokens_of(row: tuple, shared: bool) -> int:
    """Tokens that `pack` lays out for an encoded row; a response's last token is predicted, never
    read."""
    prompt, ys = row
    if shared:
        return len(prompt) + sum(len(y) - 1 for y in ys)
    return len(ys) * (len(prompt) + max(map(len, ys), default=1) - 1)


def deal(encoded: list, indices: list[int], shared: bool, budget: int,
         world: int) -> list[list[list[int]]]:
    """The forward passes of each process for the rows `indices`: dealt out by length, cut where
    padded tokens would exceed `budget`.

    Similar lengths share a pass, so little is padding. A row longer than the budget has a pass of
    its own. Every process gets as many passes as the others, the last ones empty: with sharded
    weights a pass is a collective.
    """
    order = sorted(indices, key=lambda i: (-tokens_of(encoded[i], shared), i))
    passes: list[list[list[int]]] = [[] for _ in range(world)]
    for rank, mine in enumerate(passes):
        for i in order[rank::world]:
            # The first row of a pass is its longest.
            if mine and (len(mine[-1]) + 1) * tokens_of(encoded[mine[-1][0]], shared) <= budget:
                mine[-1].append(i)
            else:
                mine.append([i])
    most = max(map(len, passes))
    return [mine + [[]] * (most - len(mine)) for mine in passes]


# Families whose attention follows a given mask and given positions and nothing else: one sequence
# may hold all responses to a prompt. The probe verifies it for every model that is loaded.
SHARES_PROMPT = {
    "cohere", "gemma", "gemma3_text", "glm4", "granite", "granitemoe", "llama", "mistral",
    "mixtral", "nemotron", "olmo", "olmo2", "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "smollm3", "stablelm", "starcoder2",
}


def shares_prompt(model, encoded: list) -> bool:
    """Whether the responses of a row may share their prompt's forward pass: in a plain-attention
    family, where no row passes a sliding window. Where not, every response is a sequence of its
    own. Eager attention would *add* the boolean mask, so that every token saw its siblings."""
    config = model.config.get_text_config()
    longest = max((len(prompt) + max(map(len, ys), default=0) for prompt, ys in encoded), default=0)
    plain = config.model_type in SHARES_PROMPT and config._attn_implementation == "sdpa"
    return plain and longest <= (getattr(config, "sliding_window", None) or math.inf)

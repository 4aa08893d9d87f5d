"""From rows to batches: a conversation's tokens, which rows share a forward pass, and the tensors of one.

An encoded row is (prompt ids, [response ids, …]). Only the chat template writes control tokens; what is spelled out in a
message or a response is text.
"""
import functools
import math
import os
import re
import sys
from collections.abc import Callable

import torch

from data.rows import fail


def encode_prompt(tokenizer, messages: list[dict], generation: bool = True) -> list[int]:
    """Token ids of a conversation in the model's chat template, up to where the response begins if `generation`.

    Only the template writes control tokens. One that is spelled out in a message is swapped for a private-use character
    while the template renders, and put back as ordinary text.
    """
    controls = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    spelled = [c for c in controls if any(c in m["content"] for m in messages)]
    stand_in = {chr(0xF0000 + i): c for i, c in enumerate(spelled)}
    hidden = messages
    for char, control in stand_in.items():
        hidden = [{**m, "content": m["content"].replace(control, char)} for m in hidden]
    text = tokenizer.apply_chat_template(hidden, tokenize=False, add_generation_prompt=generation)
    pieces = re.split(f"([{''.join(stand_in)}])", text) if stand_in else [text]
    return [i for piece in pieces if piece for i in tokenizer(
        stand_in.get(piece, piece), add_special_tokens=False, split_special_tokens=piece in stand_in).input_ids]


@functools.cache
def end_of_turn(tokenizer) -> int:
    """The token that the chat template writes after an assistant's turn, e.g. Phi-3's <|end|>; if none, the end-of-sequence token."""
    mark = "\uf8ff"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}], tokenize=False)
    ids = tokenizer(text.rpartition(mark)[2].lstrip(), add_special_tokens=False).input_ids
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else tokenizer.eos_token_id


def encode_response(tokenizer, text: str, ended: bool = True) -> list[int]:
    """Token ids of a response as plain text, then the end-of-turn token, unless the response was cut at a length limit."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids + [end_of_turn(tokenizer)] if ended else ids


def encode_rows(config, tokenizer, rows: list[dict], path: str, responses: Callable[[dict], list[tuple[str, bool]]]) -> list:
    """[(prompt ids, [response ids, …]), …] of rows whose `responses(row)` are (text, ended) pairs; too long a row fails."""
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    encoded = []
    for row in rows:
        try:
            prompt = encode_prompt(tokenizer, row["prompt"])
        except Exception as error:  # templates raise whatever they like, e.g. for a system turn that they do not know
            fail(f"{path}: id {row['id']!r}: the chat template refuses this prompt: {error}")
        answers = [encode_response(tokenizer, text, ended) for text, ended in responses(row)]
        longest = len(prompt) + max(map(len, answers), default=0)
        if longest > limit:
            fail(f"{path}: id {row['id']!r} has {longest} tokens; the model's context is {limit}. Shorten or remove it")
        encoded.append((prompt, answers))
    return encoded


def pair_of(row: dict) -> list[tuple[str, bool]]:
    """(text, ended) of the chosen, then of the rejected response. Gold rows do not say: theirs ended."""
    return [(row["chosen"], row.get("chosen_ended", True)), (row["rejected"], row.get("rejected_ended", True))]


# One sequence for all responses to a prompt needs attention that follows a given mask and given positions and nothing else.
SHARES_PROMPT = {"llama", "mistral", "phi3", "qwen2"}


def shares_prompt(model, encoded: list) -> bool:
    """Whether the responses of a row may share their prompt's forward pass: in a plain-attention family, and with no sliding
    window shorter than the rows. Else every response is a sequence of its own, which is said once."""
    window = getattr(model.config, "sliding_window", None) or math.inf
    longest = max((len(prompt) + max(map(len, ys), default=0) for prompt, ys in encoded), default=0)
    shared = model.config.model_type in SHARES_PROMPT and longest <= window
    if not shared:
        say_apart(model.config.model_type, window)
    return shared


@functools.cache
def say_apart(family: str, window: float) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {family}, attention window {window}: one sequence a response, prompts are not shared", file=sys.stderr)


def tokens_of(row: tuple, shared: bool) -> int:
    """Tokens that `pack` lays out for an encoded row; a response's last token is predicted, never read."""
    prompt, ys = row
    return sum(len(y) - 1 for y in ys) + len(prompt) if shared else len(ys) * (len(prompt) + max(map(len, ys), default=1) - 1)


def deal(encoded: list, rows: list[int], shared: bool, budget: int, world: int) -> list[list[list[int]]]:
    """The forward passes of each process for `rows`: dealt out by length, cut where padded tokens would exceed `budget`.

    Similar lengths share a pass, so little is padding. A row longer than the budget has a pass of its own. Every process
    gets as many passes as the others, the last ones empty: with sharded weights a pass is a collective.
    """
    order = sorted(rows, key=lambda i: (-tokens_of(encoded[i], shared), i))
    passes: list[list[list[int]]] = [[] for _ in range(world)]
    for rank, own in enumerate(passes):
        for i in order[rank::world]:  # the first row of a pass is its longest
            if own and (len(own[-1]) + 1) * tokens_of(encoded[own[-1][0]], shared) <= budget:
                own[-1].append(i)
            else:
                own.append([i])
    most = max(map(len, passes))
    return [own + [[]] * (most - len(own)) for own in passes]


def pack(encoded: list, shared: bool, device: torch.device) -> dict:
    """A batch of `encoded` rows: B sequences `prompt y_1 y_2 …` if `shared`, else one sequence per response.

    Siblings are hidden from one another by the mask and each starts at the position after the prompt, so every response
    sees what it would see alone (Wang & Hegde 2024), and the prompt is computed once. A response's last token is
    predicted, never read, so it is left out.

    Returns input_ids, position_ids [B, T]; attention_mask bool [B, 1, T, T], None where the causal mask is right already
    (padding stands on the right); and for the M response tokens of the R responses: where [M] (flat index of the position
    that predicts the token), target [M], and lengths (R integers that sum to M).
    """
    rows = encoded if shared else [(prompt, [y]) for prompt, ys in encoded for y in ys]
    width = max(len(p) + sum(len(y) - 1 for y in ys) for p, ys in rows)
    ids, positions = torch.zeros(len(rows), width, dtype=torch.long), torch.arange(width).repeat(len(rows), 1)
    part = torch.full((len(rows), width), -1)  # 0 the prompt, 1, 2, … its responses, −1 padding
    where, target, lengths = [], [], []
    for b, (prompt, ys) in enumerate(rows):
        n = end = len(prompt)
        ids[b, :n], part[b, :n] = torch.tensor(prompt), 0
        for j, y in enumerate(ys, 1):
            start, end = end, end + len(y) - 1
            ids[b, start:end], part[b, start:end] = torch.tensor(y[:-1], dtype=torch.long), j
            positions[b, start:end] = torch.arange(n, n + len(y) - 1)
            where += [b * width + n - 1, *range(b * width + start, b * width + end)]
            target, lengths = target + y, lengths + [len(y)]
    mask = None
    if shared and any(len(ys) > 1 for _, ys in rows):
        query, key = part[:, :, None], part[:, None, :]
        mask = ((key == 0) | (key == query)) & torch.ones(width, width, dtype=torch.bool).tril()
        mask = mask[:, None].to(device)
    return {"input_ids": ids.to(device), "position_ids": positions.to(device), "attention_mask": mask, "lengths": lengths,
            "where": torch.tensor(where, device=device), "target": torch.tensor(target, device=device)}

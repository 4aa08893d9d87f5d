"""From conversations to tokens: prompts in the model's chat template, and the responses that follow them.

An encoded row is (prompt ids, [response ids, …]). Only the chat template writes control tokens; what is spelled out in a
message or a response is text.
"""
import functools
import math
import re
from collections.abc import Callable

from core.rows import fail


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

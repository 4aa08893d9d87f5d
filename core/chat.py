"""From conversations to tokens: prompts in the model's chat template, the responses after them.

What a model sampled is kept as ids, int32 arrays, and these are what is scored and learnt; only
text that came from elsewhere is tokenised (D9). Only the chat template writes control tokens: one
that is spelled out in a message or a response is broken by a visible character.
"""
import functools
import hashlib
import json
import re
from typing import NamedTuple

import numpy as np

from core.models import context_of
from core.rows import SIDES, fail, in_one_line, note


class Answer(NamedTuple):
    """A response as it is known."""
    text: str
    ended: bool               # False where the length limit cut it
    ids: np.ndarray | None    # its tokens, where they are known


# An encoded row: prompt ids, [response ids, …].
Encoded = tuple[np.ndarray, list[np.ndarray]]

# What breaks a control token that a text spells: <|im_end|> becomes <·|im_end|>.
BREAK = "·"

# Templates that write today's date get this one, as LLaMA-3's own where they know no other: a text
# does not depend on the day.
DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro %}\n"


# ----------------------------------------------------------------- facts of a tokenizer, found once


def apply_template(tokenizer, messages: list[dict], closed: bool) -> str:
    """The conversation as the template writes it: with its end, or else up to where the model goes
    on, which is in the middle of the last turn if that is an assistant's."""
    goes_on = messages[-1]["role"] == "assistant"
    template = tokenizer.chat_template
    if "strftime_now" in template:
        template = DATE + template
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False,
        add_generation_prompt=not closed and not goes_on,
        continue_final_message=not closed and goes_on)


@functools.cache
def control_tokens(tokenizer) -> dict[str, int]:
    """Text → id of the added tokens that are special or that stand in the template or in what it
    writes.

    Others are part of the text: runs of blanks, say, or tags of HTML.
    """
    written = [tokenizer.chat_template]
    turns = [{"role": role, "content": "?"} for role in ("system", "user", "assistant")]
    # Tokens that the template puts together from roles.
    for messages in (turns, turns[1:]):
        try:
            written.append(apply_template(tokenizer, messages, closed=True))
        except Exception:
            # Templates raise whatever they like, here for a system turn.
            pass
    written = "\0".join(written)
    tokens = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()
              if token.special or token.content.strip() and token.content in written}
    # A text holds the empty one everywhere.
    tokens.pop("", None)
    return tokens


def spelled(tokenizer, text: str) -> list[str]:
    """The control tokens that stand in a text."""
    return [token for token in control_tokens(tokenizer) if token in text]


@functools.cache
def starts_with_bos(tokenizer) -> bool:
    """Whether the model's own tokenizer starts a text with the beginning-of-sequence token."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


@functools.cache
def closing(tokenizer) -> str:
    """What the chat template writes after an assistant's turn that is the last."""
    # A character that Unicode assigns to nobody.
    mark = "\U0010fffd"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    with in_one_line(f"{tokenizer.name_or_path}: the chat template refuses an assistant's turn"):
        return apply_template(tokenizer, turns, closed=True).rpartition(mark)[2]


@functools.cache
def end_of_turn(tokenizer) -> int:
    """The first control token that the chat template writes after an assistant's turn, e.g. Phi-3's
    <|end|>; if it writes none, the end-of-sequence token."""
    text = closing(tokenizer)
    # Of several that begin at one place the longest.
    first = min(spelled(tokenizer, text), key=lambda token: (text.find(token), -len(token)),
                default="")
    return control_tokens(tokenizer).get(first, tokenizer.eos_token_id)


@functools.cache
def foreign_tokens(tokenizer) -> frozenset[int]:
    """Control tokens that no answer may hold: all but those, not special, that the template itself
    writes into an answer, as Qwen3's think block."""
    answer = encode_response(tokenizer, [{"role": "user", "content": "?"}], "?")
    added = tokenizer.added_tokens_decoder
    return frozenset(i for i in control_tokens(tokenizer).values()
                     if added[i].special or i not in answer)


@functools.cache
def vocabulary(tokenizer) -> str:
    """A digest of what every token id means. Of the tokens, not of files, which saving rewrites."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------- text to ids and back


@functools.lru_cache
def as_text(tokenizer, text: str) -> str:
    """The text with BREAK in every control token that it spells, so that it is read as text:
    <|im_end|> becomes <·|im_end|>, and a token of one character becomes BREAK."""
    for token in spelled(tokenizer, text):
        broken = token[0] + BREAK if len(token) > 1 else BREAK
        # Its first character alone is matched, so that << in <<< is broken twice: <·<·<.
        begins = f"{re.escape(token[0])}(?={re.escape(token[1:])})"
        text = re.sub(begins, lambda _, broken=broken: broken, text)
    return text


def spells_control(tokenizer, text: str) -> bool:
    """Whether a text spells a control token, other than those that the template itself writes into
    answers."""
    ids = control_tokens(tokenizer)
    return any(ids[token] in foreign_tokens(tokenizer) for token in spelled(tokenizer, text))


def render(tokenizer, messages: list[dict], closed: bool) -> str:
    """As `apply_template`, of messages that spell no control token any more."""
    messages = [{**turn, "content": as_text(tokenizer, turn["content"])} for turn in messages]
    return apply_template(tokenizer, messages, closed)


def encode_rendered(tokenizer, text: str) -> list[int]:
    """Token ids of what the template wrote, BOS first where the model knows it."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    return ids if ids[:1] == bos else bos + ids


def encode_prompt(tokenizer, messages: list[dict], generation: bool = True) -> list[int]:
    """Token ids of a conversation in the model's chat template: with `generation` up to where the
    response begins, and an assistant's last turn is continued; else all of it, closed."""
    return encode_rendered(tokenizer, render(tokenizer, messages, closed=not generation))


def answered(messages: list[dict], text: str) -> list[dict]:
    """The conversation with a response: a turn of its own, or the rest of an assistant's turn."""
    if messages[-1]["role"] != "assistant":
        return [*messages, {"role": "assistant", "content": text}]
    return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + text}]


def is_written(tokenizer, messages: list[dict], text: str) -> bool:
    """Whether the chat template writes the prompt and then the response as it is, but for blanks at
    its ends. Some leave out what stands before </think>, write <think> into prompts alone, or cut
    an answer."""
    prompt = render(tokenizer, messages, closed=False)
    conversation = render(tokenizer, answered(messages, text), closed=True)
    begins = conversation.startswith(prompt)
    return begins and as_text(tokenizer, text).strip() in conversation[len(prompt):]


def response_in_context(tokenizer, messages: list[dict], text: str,
                        ended: bool) -> list[int] | None:
    """Token ids of a response as the tail of the conversation after the prompt's own ids, up to and
    with the end-of-turn token if it `ended`; None where the prompt's do not begin the
    conversation's."""
    prompt = encode_prompt(tokenizer, messages)
    stop = end_of_turn(tokenizer)
    conversation = render(tokenizer, answered(messages, text), closed=True)
    unclosed = conversation.removesuffix(closing(tokenizer))
    ids = encode_rendered(tokenizer, conversation if ended else unclosed)
    # Some templates mark no end.
    if ended and stop not in ids[len(prompt):]:
        ids = [*encode_rendered(tokenizer, unclosed), stop]
    tail = ids[len(prompt):]
    if ids[:len(prompt)] != prompt or not tail:
        return None
    return tail[:tail.index(stop) + 1] if ended else tail


def encode_response(tokenizer, messages: list[dict], text: str, ended: bool = True) -> list[int]:
    """Token ids of a text as the response to a prompt: in its conversation; or alone, where the
    tokenizer would merge its first characters with the prompt's last."""
    ids = response_in_context(tokenizer, messages, text, ended)
    if ids is not None:
        return ids
    ids = tokenizer(as_text(tokenizer, text), add_special_tokens=False).input_ids
    return ids + [end_of_turn(tokenizer)] if ended else ids


def decode_response(tokenizer, ids: list[int], ended: bool) -> str:
    """The text of sampled ids, special tokens inside spelled out; without the stop token, unless
    that is text itself: a model may end its answers at a full stop. A character that the length
    limit cut in half is no part of it."""
    def text_of(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if ended and ids[-1] in (tokenizer.eos_token_id, *control_tokens(tokenizer).values()):
        return text_of(ids[:-1])
    text = text_of(ids)
    while text.endswith("\ufffd"):
        # Token by token: some decoders give up characters before it that are bytes too.
        ids = ids[:-1]
        text = text_of(ids)
    return text


# ------------------------------------------------------------------------------------- rows to ids


def encode_rows(config, tokenizer, rows: list[dict], answers: list[list[Answer]], path: str,
                prompt_limit: int | None = None) -> list[Encoded | None]:
    """[(prompt ids, [response ids, …]), …] of rows and the `answers` to each; None where the chat
    template does not write a response in full (`is_written`). A row that the model cannot read
    fails.

    A response's ids are those in the row if they are of this vocabulary, else its text's. A prompt
    of more than `prompt_limit` tokens loses its first ones after BOS; its row's `prompt_cut` counts
    them.
    """
    limit = context_of(config)
    encoded = []
    others = 0
    for row, row_answers in zip(rows, answers, strict=True):
        if "prompt_cut" in row:  # scored after all of it, its answer would be another (D9)
            fail(f"{path}: id {row['id']!r} was answered after a prompt cut to the context "
                 "(generate.py --fit), which is for MT-Bench alone")
        # It may refuse a system turn, say.
        with in_one_line(f"{path}: id {row['id']!r}: the chat template refuses this prompt"):
            prompt = encode_prompt(tokenizer, row["prompt"])
            responses = []
            for text, ended, ids in row_answers:
                if ids is None or row.get("vocabulary") != vocabulary(tokenizer):
                    others += ids is not None
                    if not is_written(tokenizer, row["prompt"], text):
                        break
                    ids = encode_response(tokenizer, row["prompt"], text, ended)
                responses.append(np.asarray(ids, np.int32))
        if len(responses) < len(row_answers):  # one is not written in full
            encoded.append(None)
            continue
        if prompt_limit is not None and len(prompt) > prompt_limit:
            row["prompt_cut"] = len(prompt) - prompt_limit
            bos = prompt[:starts_with_bos(tokenizer)]
            prompt = bos + prompt[row["prompt_cut"] + len(bos):]
        longest = len(prompt) + max(map(len, responses), default=0)
        if longest > limit:
            fail(f"{path}: id {row['id']!r} has {longest} tokens; the model's context is {limit}. "
                 "Shorten or remove it")
        encoded.append((np.array(prompt, np.int32), responses))
    if others:
        note(f"{path}: the ids of {others} responses are of another vocabulary: their text is read")
    return encoded


def learnable_pairs(rows: list[dict], encoded: list, path: str) -> tuple[list[dict], list]:
    """The pairs that something can be learnt from, and their tokens: both sides are written in full
    and are not the same tokens. Others are counted on stderr; if all are, the program ends."""
    kept = [k for k, pair in enumerate(encoded)
            if pair is not None and not np.array_equal(*pair[1])]
    left_out = (f"{path}: {len(rows) - len(kept)} of {len(rows)} pairs are left out: the chat "
                "template does not write both sides in full, or writes them alike")
    if not kept:
        fail(f"{left_out}. Nothing is left to learn from")
    if len(kept) < len(rows):
        note(left_out)
    return [rows[k] for k in kept], [encoded[k] for k in kept]


def pair_of(row: dict) -> list[Answer]:
    """The chosen, then the rejected response. Gold rows say no more than a text: theirs ended."""
    return [Answer(row[side], row.get(f"{side}_ended", True), row.get(f"{side}_ids"))
            for side in SIDES]

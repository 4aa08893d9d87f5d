"""From conversations to tokens: prompts in the model's chat template, the responses after them.

An encoded row is (prompt ids, [response ids, …]), each an int32 array. What a model sampled is kept
as ids, and these are what is scored and learnt; only text that came from elsewhere is tokenised
(D9). Only the chat template writes control tokens; what is spelled out in a message or a response
is text.
"""
import datetime
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable

import jinja2
import numpy as np
from tokenizers import Tokenizer

from core.rows import fail

# A response as it is known: its text, whether it ended by itself, and its token ids or None.
Answer = tuple[str, bool, list[int] | np.ndarray | None]

# Two planes of characters that Unicode assigns to nobody.
PRIVATE = range(0xF0000, 0x10FFFE)

# Templates that write today's date get this one, so that a text does not depend on the day.
TODAY = datetime.date(2024, 7, 26)
DATE = "".join(
    f" | replace('%{code}', '{TODAY.strftime('%' + code)}')"
    for code in ("-d", "-m", "a", "A", "b", "B", "d", "e", "m", "y", "Y", "H", "I", "M", "S"))
DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{DATE} }}}}{{%- endmacro %}}\n"


# ----------------------------------------------------------------- facts of a tokenizer, found once


@functools.cache
def template_of(tokenizer) -> str:
    """The chat template, for which it is always the same day."""
    template = tokenizer.get_chat_template()
    return DATE + template if "strftime_now" in template else template


def render(tokenizer, messages: list[dict], closed: bool) -> str:
    """The conversation as the template writes it: with its end, or else up to where the model goes
    on, which is in the middle of the last turn if that is an assistant's."""
    goes_on = messages[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        messages, chat_template=template_of(tokenizer), tokenize=False,
        add_generation_prompt=not closed and not goes_on,
        continue_final_message=not closed and goes_on)


@functools.cache
def control_tokens(tokenizer) -> dict[str, int]:
    """Text → id of the added tokens that are special or that the template can write.

    Others are part of the text: runs of blanks, say, or tags of HTML.
    """
    template = template_of(tokenizer)
    written = [part for _, kind, part in jinja2.Environment().lex(template)
               if kind in ("data", "string")]
    turns = [{"role": role, "content": "?"} for role in ("system", "user", "assistant")]
    # Tokens that the template puts together from roles.
    for messages in (turns[:2], turns[1:], turns):
        try:
            written.append(render(tokenizer, messages, closed=True))
        except Exception:
            # Templates raise whatever they like, here for a system turn.
            pass
    written = "\0".join(written)

    def is_control(token) -> bool:
        return token.special or bool(token.content.strip()) and token.content in written
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items()
            if token.content and is_control(token)}


@functools.cache
def reader(tokenizer, first: int) -> tuple[Tokenizer, dict[str, str], re.Pattern]:
    """The tokenizer with its control tokens renamed to the characters from `first` on, the table of
    names (both ways), and the pattern that finds either.

    It reads a text exactly as the tokenizer does, but no text spells a control token.
    """
    if not tokenizer.is_fast:
        fail(f"{tokenizer.name_or_path}: the tokenizer needs a tokenizer.json")
    controls = control_tokens(tokenizer)
    names = {text: chr(first + k) for k, text in enumerate(controls)}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None, "post_processor": None}
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        # A unigram model's: pieces and their scores.
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    # A merge that makes a control token makes it from text.
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [(a, b) for a, b in pairs
                           if a + b not in names and a not in names and b not in names]
    swap = names | {name: text for text, name in names.items()}
    pattern = f"[{chr(first)}-{chr(first + len(names))}]|{longest_of(list(names))}"
    return Tokenizer.from_str(json.dumps(state)), swap, re.compile(pattern)


def longest_of(words: list[str]) -> str:
    """A pattern for the longest of the words that stands at a place. It branches by character, so
    that the number of the words hardly counts."""
    tails: dict[str, list[str]] = {}
    for word in filter(None, words):
        tails.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(head) + longest_of(rest) for head, rest in tails.items()]
    pattern = "|".join(branches)
    if "" in words:
        return f"(?:{pattern})?" if branches else ""
    return pattern if len(branches) == 1 else f"(?:{pattern})"


@functools.cache
def starts_with_bos(tokenizer) -> bool:
    """Whether the model's own tokenizer starts a text with the beginning-of-sequence token."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


@functools.cache
def end_of_turn(tokenizer) -> int:
    """The first control token that the chat template writes after an assistant's turn, e.g. Phi-3's
    <|end|>; if it writes none, the end-of-sequence token."""
    mark = chr(PRIVATE[-1])
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    try:
        closing = render(tokenizer, turns, closed=True).rpartition(mark)[2]
    except Exception as error:
        # Templates raise whatever they like.
        fail(f"{tokenizer.name_or_path}: the chat template refuses an assistant's turn: {error}")
    _, _, pattern = reader(tokenizer, PRIVATE[0])
    found = pattern.search(closing)
    return control_tokens(tokenizer)[found[0]] if found else tokenizer.eos_token_id


@functools.cache
def foreign_tokens(tokenizer) -> frozenset[int]:
    """Control tokens that make an answer something else than a text. Those that are not special and
    that the template itself writes into an answer, as Qwen3's think block, do not."""
    ask = [{"role": "user", "content": "?"}]
    own = encode_response(tokenizer, ask, "?")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(i for i in control_tokens(tokenizer).values() if i in special or i not in own)


def spells_control(tokenizer, text: str) -> bool:
    """Whether a text spells a control token that the template does not write into answers."""
    foreign = foreign_tokens(tokenizer)
    return any(i in foreign and token in text for token, i in control_tokens(tokenizer).items())


@functools.cache
def vocabulary(tokenizer) -> str:
    """A digest of what every token id means. Of the tokens, not of files, which saving rewrites."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------- text to ids and back


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of a text that stands alone."""
    backend, _, _ = reader(tokenizer, free_block(tokenizer, [text]))
    return backend.encode(text, add_special_tokens=False).ids


def free_block(tokenizer, texts: list[str]) -> int:
    """The first of as many private characters as there are control tokens, none of which stands in
    the texts."""
    taken = {ord(char) for text in texts for char in re.findall("[\U000f0000-\U0010fffd]", text)}
    size = len(control_tokens(tokenizer)) + 1
    for first in range(PRIVATE.start, PRIVATE.stop - size, size):
        if not any(first <= char < first + size for char in taken):
            return first
    raise ValueError("the text holds too many private characters")


def encode_prompt(tokenizer, messages: list[dict], generation: bool = True) -> list[int]:
    """Token ids of a conversation in the model's chat template, BOS first where the model knows it.

    With `generation` up to where the response begins, and an assistant's last turn is continued;
    else the whole, closed. Control tokens that a message spells change places with private
    characters while the template renders. Then those that the template wrote do, and the reader
    knows them by these names alone.
    """
    backend, swap, pattern = reader(
        tokenizer, free_block(tokenizer, [message["content"] for message in messages]))

    def exchange(text: str) -> str:
        return pattern.sub(lambda found: swap.get(found[0], found[0]), text)
    hidden = [{**message, "content": exchange(message["content"])} for message in messages]
    text = exchange(render(tokenizer, hidden, closed=not generation))
    ids = backend.encode(text, add_special_tokens=False).ids
    bos = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    return ids if ids[:1] == bos else bos + ids


def answered(messages: list[dict], text: str) -> list[dict]:
    """The conversation with a response: a turn of its own, or the rest of an assistant's turn."""
    if messages[-1]["role"] != "assistant":
        return [*messages, {"role": "assistant", "content": text}]
    return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + text}]


def response_in_context(tokenizer, messages: list[dict], text: str,
                        ended: bool) -> list[int] | None:
    """Token ids of a response as the tail of the whole conversation after the prompt's own ids, up
    to and with the end-of-turn token if it `ended`; None where those are no prefix of the whole."""
    prompt = encode_prompt(tokenizer, messages)
    stop = end_of_turn(tokenizer)
    conversation = answered(messages, text)
    whole = encode_prompt(tokenizer, conversation, generation=not ended)
    # Some templates mark no end.
    if ended and stop not in whole[len(prompt):]:
        whole = [*encode_prompt(tokenizer, conversation), stop]
    if whole[:len(prompt)] != prompt or len(whole) == len(prompt):
        return None
    tail = whole[len(prompt):]
    return tail[:tail.index(stop) + 1] if ended else tail


def response_alone(tokenizer, text: str, ended: bool) -> list[int]:
    """Token ids of a response that is tokenised without its conversation."""
    ids = encode_text(tokenizer, text)
    return ids + [end_of_turn(tokenizer)] if ended else ids


def encode_response(tokenizer, messages: list[dict], text: str, ended: bool = True) -> list[int]:
    """Token ids of a text as the response to a prompt: in its conversation, or else alone."""
    ids = response_in_context(tokenizer, messages, text, ended)
    return response_alone(tokenizer, text, ended) if ids is None else ids


def decode_response(tokenizer, ids: list[int], ended: bool) -> str:
    """The text of sampled ids. A character that the length limit cut in half is no part of it."""
    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if ended:
        return text(ids[:-1])
    # A character has four bytes at most, a token one at least.
    for cut in range(min(4, len(ids))):
        if not (whole := text(ids[:len(ids) - cut])).endswith("\ufffd"):
            return whole
    # Other bytes are no text.
    return text(ids).rstrip("\ufffd")


def is_foreign(tokenizer, ids: list[int], ended: bool) -> bool:
    """Whether a sampled answer holds, before its stop token, what is no text: a special token, as
    those of channels, or an id that no token has."""
    inside = ids[:-1] if ended else ids
    foreign = foreign_tokens(tokenizer)
    size = len(tokenizer)
    return any(i in foreign or i >= size for i in inside)


# ------------------------------------------------------------------------------------- rows to ids


def own_ids(tokenizer, row: dict) -> bool:
    """Whether the ids in a row are of this tokenizer's vocabulary."""
    return row.get("vocabulary") == vocabulary(tokenizer)


def check_range(config, ids: np.ndarray, path: str, row: dict) -> None:
    """A row's ids are tokens that the model has, or the program ends."""
    size = config.get_text_config().vocab_size
    if np.max(ids) >= size:
        fail(f"{path}: id {row['id']!r} has the token {np.max(ids)}; the model knows {size}. "
             "Another model wrote it, or the row was changed")


def encode_rows(config, tokenizer, rows: list[dict], path: str,
                answers_of: Callable[[dict], list[Answer]], most: int | None = None) -> list:
    """[(prompt ids, [response ids, …]), …] of rows; one that the model cannot read fails.

    A response's ids are those in the row if they are of this vocabulary, else its text's. A prompt
    of more than `most` tokens loses its first ones after BOS; its row's `prompt_cut` counts them.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    encoded = []
    alone = 0
    for row in rows:
        own = own_ids(tokenizer, row)
        if "prompt_cut" in row:  # scored after the whole, its answer would be another (D9)
            fail(f"{path}: id {row['id']!r} was answered after a prompt cut to the context "
                 "(generate.py --fit), which is for MT-Bench alone")
        try:
            prompt = encode_prompt(tokenizer, row["prompt"])
            answers = []
            for text, ended, ids in answers_of(row):
                if own and ids is not None:
                    check_range(config, ids, path, row)
                else:
                    ids = response_in_context(tokenizer, row["prompt"], text, ended)
                if ids is None:
                    ids = response_alone(tokenizer, text, ended)
                    alone += 1
                answers.append(np.asarray(ids, np.int32))
        except Exception as error:
            # Templates raise whatever they like, e.g. for a system turn.
            fail(f"{path}: id {row['id']!r}: the chat template refuses this prompt: {error}")
        if most is not None and len(prompt) > most:
            row["prompt_cut"] = len(prompt) - most
            bos = prompt[:starts_with_bos(tokenizer)]
            prompt = bos + prompt[row["prompt_cut"] + len(bos):]
        longest = len(prompt) + max(map(len, answers), default=0)
        if limit and longest > limit:
            fail(f"{path}: id {row['id']!r} has {longest} tokens; the model's context is {limit}. "
                 "Shorten or remove it")
        encoded.append((np.array(prompt, np.int32), answers))
    if alone and os.environ.get("RANK", "0") == "0":
        print(f"note: {path}: {alone} responses are tokenised alone: in the conversation, their "
              "first characters are one token with the prompt's last", file=sys.stderr)
    return encoded


def pair_of(row: dict) -> list[Answer]:
    """The chosen, then the rejected response. Gold rows say no more than a text: theirs ended."""
    return [(row[side], row.get(f"{side}_ended", True), row.get(f"{side}_ids"))
            for side in ("chosen", "rejected")]


def from_text(tokenizer, rows: list[dict], answers_of: Callable[[dict], list[Answer]]) -> str:
    """For the summary line: how many rows are read from their text, for want of ids of this
    vocabulary."""
    count = sum(not own_ids(tokenizer, row) or any(ids is None for *_, ids in answers_of(row))
                for row in rows)
    return f"{count} read from text" if count else "all read as sampled"

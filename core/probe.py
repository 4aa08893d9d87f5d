"""A model is asked once, before any work, whether it is read rightly.

A few short sequences, and one beyond the window or context that the stage's own rows reach, go
through the very functions that the stage uses and through a plain `model(ids).logits`. What differs
by more than rounding, and whatever raises, is one line. Sampling's part is in core/sampling.py.
"""
import os

import numpy as np
import torch

from core.chat import encode_prompt, encode_response
from core.models import load_model, reason
from core.parallel import autocast, in_bf16
from core.policy import ResponseLogps, can_share, score
from core.rows import fail

# Rounding, in nats a token. fp32: sums in another order were seen to differ by up to 1e-5 a token.
# bf16 has 8 bits: a logit of 30 is known to ± 0.06, and a mixture of experts may choose others.
# What is read wrongly is off by more: by 0.3 to 8 where a cap is left out or a sibling is seen.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.2}

# What configs call a length from which on attention or positions are computed otherwise.
LENGTHS = {
    "sliding_window", "attention_window_size", "window_size", "attention_chunk_size", "chunk_size",
    "mamba_chunk_size", "original_max_position_embeddings",
}


def load_scorer(path: str, device: torch.device, encoded: list, precision: str, tokenizer=None):
    """A frozen causal LM that was found to give `encoded` rows the log-probs that they have; with
    the tokenizer that encoded them, its template is checked too.

    One process checks for all: the others wait for it where they next meet.
    """
    model = load_model(path, device)
    if int(os.environ.get("RANK", 0)) == 0:
        check_tokens(path, model, encoded, tokenizer)
        if tokenizer is not None:
            check_template(path, tokenizer)
        check_scores(path, model, encoded, precision)
    return model


def check_tokens(path: str, model, encoded: list, tokenizer=None) -> None:
    """Every token has an embedding, and every response follows at least one token."""
    size = model.get_input_embeddings().num_embeddings
    for prompt, ys in encoded:
        if len(prompt) == 0:
            fail(f"{path}: a prompt without any token; the chat template must write something")
        largest = int(max(np.max(part, initial=0) for part in (prompt, *ys)))
        if largest >= size:
            name = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
            fail(f"{path}: token {largest}{name} has no embedding; the model has {size}. Model and "
                 "tokenizer must share their vocabulary")


def check_template(path: str, tokenizer) -> None:
    """A prompt up to where the response begins, then the response, is the conversation as the
    template writes it: as text, and as tokens where the text's own do not run across the border."""
    user = {"role": "user", "content": "Hello"}
    assistant = {"role": "assistant", "content": "Gladly, at once"}
    try:
        prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([user, assistant], tokenize=False)
        head = encode_prompt(tokenizer, [user])
        own = head + encode_response(tokenizer, [user], assistant["content"])
    except Exception as error:
        # Templates raise whatever they like.
        fail(f"{path}: the chat template refuses a user's and an assistant's turn: {reason(error)}")
    if not whole.startswith(prompt) or assistant["content"] not in whole[len(prompt):]:
        fail(f"{path}: the chat template's prompt {prompt!r:.120} does not begin its conversation "
             f"{whole!r:.160}; what is learnt would not be what it writes")
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    # The start token stands there once, whoever writes it.
    if own[:1] == [tokenizer.bos_token_id] != ids[:1]:
        ids = own[:1] + ids
    # Otherwise it ends by text, which may share a token with the answer.
    ends = own[-1] in ids[len(head):]
    if ends and ids[:len(head)] == head and ids[:len(own)] != own:
        fail(f"{path}: a prompt and its response are the tokens "
             f"{tokenizer.convert_ids_to_tokens(own)}, its conversation by the chat template "
             f"{tokenizer.convert_ids_to_tokens(ids)}")


def check_scores(path: str, model, encoded: list, precision: str) -> None:
    """`score`, in the layout that `encoded` rows will have, equals the model's own logits."""
    rows = probe_rows(model.config, encoded)
    device = next(model.parameters()).device
    name = f"{path}: {model.config.model_type} cannot be scored or trained"
    worst = 0.0
    shared = can_share(model, rows)
    try:
        ours = score(ResponseLogps(model), rows, precision, device, title="probe", shared=shared)
        for (prompt, ys), own in zip(rows, ours):
            for y, logp in zip(ys, own):
                with autocast(device, precision):
                    logps = plain_logits(model, prompt + y[:-1])[-len(y):].log_softmax(-1)
                plain = logps.gather(-1, torch.tensor(y, device=device)[:, None]).sum().item()
                worst = max(worst, abs(logp - plain) / len(y), key=nan_first)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # A model's code raises whatever it likes.
        fail(f"{name}: {reason(error)}")
    dtype = torch.bfloat16 if in_bf16(device, precision) else model.dtype
    if not worst <= TOLERANCE[dtype]:
        layout = "responses share their prompt" if shared else "one sequence a response"
        fail(f"{name}: its log-probs are {worst:.2g} nats a token off its own logits ({layout})")


@torch.no_grad()
def plain_logits(model, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of one sequence, float32, as the model itself computes them."""
    out = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return out.logits[0].float()


def probe_rows(config, encoded: list) -> list:
    """Rows of different short lengths, of the stage's own tokens; and one that passes the largest
    window or context that `encoded` rows pass, so that it passes the smaller ones too."""
    pool = [int(token) for prompt, ys in encoded[:8] for part in (prompt, *ys) for token in part]
    rows = [(cut(pool, 0, 7), [cut(pool, 7, 5), cut(pool, 12, 3)]),
            (cut(pool, 15, 3), [cut(pool, 18, 6)])]
    longest = max(len(prompt) + max(map(len, ys), default=0) for prompt, ys in encoded)
    if beyond := reached(config, longest):
        length = min(beyond + 8, longest)
        n = max(1, length - 12)
        rows.append((cut(pool, 26, n), [cut(pool, 26 + n, length - n), cut(pool, 27 + n, 5)]))
    return rows


def cut(pool: list[int], start: int, length: int) -> list[int]:
    """`length` tokens of the pool from `start` on, around its end."""
    return [pool[i % len(pool)] for i in range(start, start + length)]


def reached(config, longest: int) -> int | None:
    """The largest length in a config that rows of `longest` tokens pass; None: none."""
    values = config.get_text_config().to_dict()
    lengths = set()
    for part in [values, *(v for v in values.values() if isinstance(v, dict))]:
        for name in LENGTHS & part.keys():
            if isinstance(part[name], int) and 0 < part[name] < longest:
                lengths.add(part[name])
    return max(lengths, default=None)


def nan_first(value: float) -> float:
    """For the worst of several: what is not a number is worse than any."""
    return value if value == value else float("inf")

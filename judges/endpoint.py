"""A judge that writes: asking an OpenAI-compatible endpoint, and reading what it says.

Any server of that kind will do (`vllm serve`, `transformers serve`, a hosted one). The client tries
again with growing pauses when the endpoint is busy, fails or is silent. Every answer is kept in
OUT.judge_cache.jsonl, and no question in it is asked, or paid, again.
"""
import json
import math
import re
import string
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from core import RANK
from core.parallel import merge, progress
from core.rows import fail, read_appended
from judges.flags import key_of_endpoint

# Seconds a request, tries beyond the first, requests at once.
TIMEOUT = 600.0
RETRIES = 8
PARALLEL = 8
# May stand around a lone letter.
MARKS = string.whitespace + "[](){}*_`\"'“”‘’."
# What an endpoint says, with status 400, 413 or 422, of a question that it will never answer: its
# filter minds the text, or the text is too long for the model.
UNANSWERABLE = re.compile(
    r"content.?(filter|management|policy|exists)|responsible.?ai|safety|inappropriate|prohibited"
    r"|flagged|context|length|(prompt|input|text|request|string)\b.{0,40} too (long|large)"
    r"|(maximum|inputs).{0,20} tokens|too many (input )?tokens", re.IGNORECASE)


# ---------------------------------------------------------------------------------------- verdicts


def conclusion(text: str) -> str:
    """What a judge says after it has reasoned: nothing while it still does."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def parse_choice(text: str) -> float:
    """1 for A, 0 for B: the last [[A]] or [[B]] of the conclusion, or else a conclusion that is a
    lone letter, whatever its case and whatever marks stand around it. All else is no verdict, NaN:
    in "(A) is better, since (B) rambles" no rule knows which letter is meant."""
    last_words = conclusion(text)
    letters = re.findall(r"\[\[([AB])\]\]", last_words)
    lone = last_words.strip(MARKS).upper()
    return {"A": 1.0, "B": 0.0}.get(letters[-1] if letters else lone, math.nan)


def parse_rating(text: str) -> float:
    """The first rating in the conclusion, "[[7]]" or else "[7]", as FastChat takes it, so that
    "[[7]]/[[10]]" is 7. Other than there an index, "arr[1]" or "df[[1]]", is none, nor is what lies
    outside 1 to 10. NaN where there is no rating."""
    last_words = conclusion(text)
    rating = re.search(r"(?<![\w\])])\[\[(\d+\.?\d*)\]\]", last_words)
    rating = rating or re.search(r"(?<![\w\])\[])\[(\d+\.?\d*)\]", last_words)
    return float(rating[1]) if rating and 1 <= float(rating[1]) <= 10 else math.nan


# ------------------------------------------------------------------------------------------ asking


def chat(args, chats: list[list[dict]]) -> list[str]:
    """The answer of --judge-model to every chat, at temperature 0; process 0 asks for all. An empty
    one stands for what the endpoint will never answer."""
    return merge({0: ask_endpoint(args, chats)} if RANK == 0 else {})[0]


def hidden(text: str, key: str) -> str:
    """The text without the key. One of fewer than eight characters is no secret ("none", for a
    server that asks for none), and may be part of ordinary words."""
    return text.replace(key, "…") if len(key) >= 8 else text


def answer_of(client, request: str, refused: set[str]) -> str:
    """One request's answer; "" where the endpoint will never give one. `refused` gathers which of
    `max_tokens` and temperature 0 it does not take, as those of reasoning models do not: that is
    learnt once for all requests."""
    from openai import APIStatusError
    while True:
        body = json.loads(request)
        if "max_tokens" in refused:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if "temperature" in refused:
            del body["temperature"]
        try:
            completion = client.chat.completions.create(**body)
            return str(completion.choices[0].message.content or "")
        except APIStatusError as error:
            if error.status_code not in (400, 413, 422):
                raise
            # What follows may be the question itself, which some servers repeat.
            if UNANSWERABLE.search(str(error)[:400]):
                return ""
            unwanted = [name for name in ("max_tokens", "temperature")
                        if name in body and name in str(error)]
            if not unwanted:
                raise
            refused.add(unwanted[0])


def ask_endpoint(args, chats: list[list[dict]]) -> list[str]:
    """The endpoint's answers, those in the cache first. What fails in spite of all tries ends the
    program, after the answers under way are kept."""
    from openai import OpenAI, OpenAIError
    key = key_of_endpoint()
    client = OpenAI(base_url=args.base_url, api_key=key, timeout=TIMEOUT, max_retries=RETRIES)
    requests = [json.dumps({"model": args.judge_model, "messages": messages, "temperature": 0,
                            "max_tokens": args.judge_tokens}) for messages in chats]
    cache = Path(f"{args.out}.judge_cache.jsonl")
    cache.parent.mkdir(parents=True, exist_ok=True)
    answers = {row["request"]: row["answer"] for row in read_appended(cache)}
    errors = []
    refused: set[str] = set()
    lock = threading.Lock()

    def ask(request: str) -> None:
        if errors:
            return  # nothing more is asked for; what is under way comes to its end
        try:
            answer = answer_of(client, request, refused)
        except (OpenAIError, ValueError, IndexError, TypeError, AttributeError) as error:
            # All but the first: what came is no answer.
            errors.append(error)
            return
        with lock:
            answers[request] = answer
            row = {"request": request, "answer": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()

    with open(cache, "a", encoding="utf-8") as file, ThreadPoolExecutor(PARALLEL) as pool:
        file.write("\n" if cache.stat().st_size else "")  # the last line may have been cut
        todo = [request for request in dict.fromkeys(requests) if request not in answers]
        for _ in progress(pool.map(ask, todo), "judge", "request", total=len(todo)):
            pass
    if errors:
        reason = hidden(" ".join(f"{type(errors[0]).__name__}: {errors[0]}".split()), key)[:300]
        fail(f"{client.base_url}: {reason}. {len(answers)} answers are kept in {cache}; run the "
             "same command to go on")
    return [answers[request] for request in requests]

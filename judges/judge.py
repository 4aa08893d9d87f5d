"""Judges: who says which of two responses to a prompt is better.

A *ranker* is a function (args, comparisons, rank, world, device) → P(first response is better), one
number in [0, 1] for every comparison (conversation, first, second), NaN where it gives no verdict.
`compare` asks it in both orders and averages, because a judge's taste for the first option is often
stronger than its taste. A *scorer* gives each response a number of its own, and is asked once.

    vader           scorer: sentiment by a lexicon rated by people, the gold standard of the demo
    reward-model    scorer: the logit of any one-logit sequence classifier with a chat template
    pairrm          ranker: PairRM or any other ranker that the package llm-blender loads
    llm             ranker: a causal LM's probability of A against B after SPA's Listing 1
    openai          ranker: what an OpenAI-compatible endpoint answers to the same prompt
"""
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from core.chat import answered, encode_prompt, encode_rows
from core.models import load_config, load_tokenizer, load_weights, reason
from core.parallel import autocast, merge
from core.policy import ResponseLogps, score
from core.probe import load_scorer
from core.rows import fail, write_rows
from core.sampling import respond
from judges.comparisons import option_prompt

Comparison = tuple[list[dict], str, str]
# of an endpoint: seconds a request, tries beyond the first with growing pauses, requests at once
TIMEOUT = 600.0
RETRIES = 8
PARALLEL = 8


# ------------------------------------------------------------------------------------------ scorers


def vader(args, rows: list[dict], rank: int, world: int,
          device: torch.device) -> list[list[float]]:
    """Sentiment in [−1, 1] of every response by VADER, a lexicon rated by people (Hutto & Gilbert
    2014)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # the demo's alone
    judge = SentimentIntensityAnalyzer()
    return [[judge.polarity_scores(text)["compound"] for text in row["responses"]] for row in rows]


@torch.no_grad()
def reward_model(args, rows: list[dict], rank: int, world: int,
                 device: torch.device) -> list[list[float]]:
    """Logit of every response by a one-logit sequence classifier with a chat template; rows split
    over ranks."""
    path = args.judge_model
    tokenizer = load_tokenizer(path)
    kind = transformers.AutoModelForSequenceClassification
    model = load_weights(kind, path, device, torch.float32)
    if model.config.num_labels != 1:
        fail(f"{path}: a reward model needs one logit; found {model.config.num_labels}")
    mine = {}
    mine_rows = range(rank, len(rows), world)
    quiet = None if rank == 0 else True
    for i in tqdm(mine_rows, desc="reward model", unit="prompt", disable=quiet):
        mine[i] = []
        for text in rows[i]["responses"]:
            try:
                ids = encode_prompt(tokenizer, answered(rows[i]["prompt"], text), False)
            except Exception as error:  # templates raise whatever they like
                fail(f"{path}: the chat template refuses the conversation of prompt {i + 1}: "
                     f"{reason(error)}")
            with autocast(device, args.precision):
                mine[i].append(model(torch.tensor([ids], device=device)).logits.float().item())
    merged = merge(mine, world)
    if not all(math.isfinite(logit) for own in merged.values() for logit in own):
        fail(f"{path}: a reward is not finite; are its weights sound?")
    return [merged[i] for i in range(len(rows))]


# ------------------------------------------------------------------------------------------ rankers


def llm(args, comparisons: list[Comparison], rank: int, world: int,
        device: torch.device) -> list[float]:
    """π(A) / (π(A) + π(B)) after Listing 1, from the log-probs of the two option tokens (SPA,
    B.2)."""
    tokenizer = load_tokenizer(args.judge_model)
    rows = [{"id": str(i), "prompt": option_prompt(*c)} for i, c in enumerate(comparisons)]
    letters = [("A", False, None), ("B", False, None)]
    encoded = encode_rows(load_config(args.judge_model), tokenizer, rows, [letters] * len(rows),
                          "comparisons")
    # the template may write something before a letter, Qwen3's a think block; it is the same for
    # both
    for pair in encoded:
        a, b = pair[1] if pair else (np.zeros(0), np.zeros(0))
        if pair and len(a) == len(b) and (a[:-1] == b[:-1]).all() and a[-1] != b[-1]:
            continue
        fail(f"{args.judge_model}: its tokenizer does not write A and B as one token each")
    model = load_scorer(args.judge_model, device, encoded, args.precision, tokenizer)
    logps = score(ResponseLogps(model), encoded, args.precision, device, rank, world, "judge")
    return [1 / (1 + math.exp(min(b - a, 700.0))) for a, b in logps]


def pairrm(args, comparisons: list[Comparison], rank: int, world: int,
           device: torch.device) -> list[float]:
    """σ of the logit by which a pairwise ranker (PairRM, Jiang et al. 2023) prefers the first; from
    the package llm-blender."""
    try:
        import llm_blender
    except ImportError as error:
        fail("--judge pairrm needs the package llm-blender, importable beside transformers "
             f"{transformers.__version__}: {error}")

    def ask() -> list[float]:
        blender = llm_blender.Blender()
        blender.loadranker(args.judge_model, device=str(device))
        conversations = []
        for turns, _, _ in comparisons:
            said = "\n".join(f"{turn['role'].upper()}: {turn['content']}" for turn in turns)
            conversations.append(turns[0]["content"] if len(turns) == 1 else said)
        logits = blender.compare(conversations, [first for _, first, _ in comparisons],
                                 [second for _, _, second in comparisons],
                                 return_logits=True, mode="[A,B]")
        return [1 / (1 + math.exp(-max(float(x), -700.0))) for x in logits]
    return merge({0: ask()} if rank == 0 else {}, world)[0]


def openai(args, comparisons: list[Comparison], rank: int, world: int,
           device: torch.device) -> list[float]:
    """1 or 0 by the letter that an OpenAI-compatible endpoint answers to Listing 1."""
    order = "You compare responses. Answer with one letter, A or B, and nothing else."
    system = {"role": "system", "content": order}
    chats = [[system, *option_prompt(*c)] for c in comparisons]
    texts = chat(args, chats, args.judge_tokens, rank, world, device)
    return [parse_choice(text) for text in texts]


def conclusion(text: str) -> str:
    """What a judge says after it has reasoned: nothing while it still does."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


# Two letters named together are no verdict, and one that the other is compared with is none either.
COMPARED = re.compile(r"""
    [(\[{*"']* \b [AB] \b [)\]}*"',]*
        (?: \s+ (?i:and|or|nor|versus|vs\.?) \s+ | \s* [/&] \s* )
        (?i: (?:response|option|answer) \s+ )? [(\[{*"']* [AB] \b [)\]}*"']*
    | (?i: \b (?:than|over|not|to) \s+ (?: (?:response|option|answer) \s+ )? )
        [(\[{*"']* [AB] \b [)\]}*"']*
    """, re.VERBOSE)
# A letter is a verdict where it is marked: in brackets, after one of three words in the same
# sentence, alone on its line. After a word it ends its clause or a reason follows: "the better
# choice. B rambles" names the other one, and in "Answer: A clear winner" the A is an article.
MARKED = re.compile(r"""
    [(\[{] \s* ([AB]) \s* [)\]}]
    | (?i: \b (?:answer|choice|better) \b (?: \s+ (?:response|option|one|answer|choice) \b )?
           (?: [^\w.,;!?\n]+ is \b )? (?: [^\w.,;!?\n]+ (?:response|option) \b )? )
      [^\w.,;!?\n]+ ([AB])
      (?= [^\w\s'’] | \s*$ | \s+ (?:and|because|since|as|for) \b )
    | ^ \W* ([AB]) \W* $
    """, re.MULTILINE | re.VERBOSE)


def parse_choice(text: str) -> float:
    """1 for A, 0 for B, NaN for no verdict: the last marked letter of the conclusion. Letters in
    running text are none: "A and B are alike", "A clear winner is hard to name"."""
    said = COMPARED.sub(" … ", conclusion(text))
    letters = ["".join(filter(None, found)) for found in MARKED.findall(said)]
    return {"A": 1.0, "B": 0.0}[letters[-1]] if letters else math.nan


def parse_rating(text: str) -> float:
    """The last rating from 1 to 10 in the conclusion, "[[7]]" or else "[7]", as FastChat reads it;
    NaN where there is none. The index in "arr[1]" or "df[[1]]" is none."""
    said = conclusion(text)
    found = re.findall(r"(?<![\w\])])\[\[(\d+\.?\d*)\]\]", said)
    found = found or re.findall(r"(?<![\w\])\[])\[(\d+\.?\d*)\]", said)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else math.nan


# ------------------------------------------------------------------------------ asking a chat model


def chat(args, chats: list[list[dict]], max_tokens: int, rank: int, world: int,
         device: torch.device) -> list[str]:
    """The judging model's answer to every chat, at temperature 0: an endpoint's with --judge
    openai, else a local model's."""
    if args.judge == "openai":
        return merge({0: ask_endpoint(args, chats, max_tokens)} if rank == 0 else {}, world)[0]
    rows = [{"id": str(i), "prompt": messages} for i, messages in enumerate(chats)]
    digest = hashlib.sha256(repr(chats).encode(errors="surrogatepass")).hexdigest()[:16]
    path = f"{args.out}/judge/{digest}"
    if rank == 0:
        write_rows(f"{path}.prompts.jsonl", rows)
    if world > 1:
        dist.barrier()
    answers = respond(args.judge_model, f"{path}.prompts.jsonl", f"{path}.jsonl", args, rank, world,
                      device, n=1, temperature=0.0, max_new_tokens=max_tokens)
    return [row["responses"][0] for row in answers]


def as_wanted(request: str, refused: set[str]) -> dict:
    """The body of a request as an endpoint wants it that has refused `max_tokens` or temperature 0,
    as those of reasoning models do."""
    body = json.loads(request)
    del body["url"]
    if "max_tokens" in refused:
        body["max_completion_tokens"] = body.pop("max_tokens")
    if "temperature" in refused:
        del body["temperature"]
    return body


def refusal(body: dict, error) -> str:
    """The setting in a request that an endpoint refuses; any other refusal is raised again."""
    for name in ("max_tokens", "temperature"):
        if name in body and name in str(error) and error.status_code in (400, 422):
            return name
    raise error


def hidden(text: str, key: str) -> str:
    """The text without the key. One of fewer than eight characters may be part of ordinary words,
    and is hidden where it stands by itself."""
    if len(key) >= 8:
        return text.replace(key, "…")
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(key)}(?![A-Za-z0-9])", "…", text)


def ask_endpoint(args, chats: list[list[dict]], max_tokens: int) -> list[str]:
    """An OpenAI-compatible endpoint's answers. Those that the cache in or beside OUT holds are not
    asked, and so not paid, again.

    The client tries again with growing pauses when the endpoint is busy, fails, or is silent for
    TIMEOUT seconds. What still fails ends the program, after the answers under way are stored.
    """
    try:
        from openai import APIStatusError, OpenAI, OpenAIError
    except ImportError:
        fail("--judge openai needs the package openai (pip install openai)")
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        fail("--judge openai reads its key from the environment variable OPENAI_API_KEY (any word "
             "for a server that asks for none)")
    client = OpenAI(base_url=args.base_url, api_key=key, timeout=TIMEOUT, max_retries=RETRIES)
    requests = []
    for messages in chats:
        requests.append(json.dumps({"url": str(client.base_url), "model": args.judge_model,
                                    "messages": messages, "temperature": 0,
                                    "max_tokens": max_tokens}))
    cache = Path(f"{args.out}{'/' if os.path.isdir(args.out) else '.'}judge_cache.jsonl")
    known = {}
    errors = []
    refused: set[str] = set()  # what the endpoint does not take, learnt once for all requests
    lock = threading.Lock()
    cache.parent.mkdir(parents=True, exist_ok=True)
    for line in cache.read_bytes().split(b"\n") if cache.exists() else []:
        try:
            row = json.loads(line)
            known[row["request"]] = row["answer"]
        except (ValueError, KeyError, TypeError):
            pass  # a line cut by a kill

    def ask(request: str) -> None:
        if errors:
            return  # nothing more is asked for; what is under way comes to its end
        given = None
        try:
            while given is None:  # an endpoint may refuse both, one after the other
                body = as_wanted(request, refused)
                try:
                    given = client.chat.completions.create(**body)
                except APIStatusError as error:
                    refused.add(refusal(body, error))
            answer = str(given.choices[0].message.content or "")
        except (OpenAIError, ValueError, IndexError, TypeError, AttributeError) as error:
            # all but the first: what came is no answer
            errors.append(error)
            return
        with lock:
            known[request] = answer
            row = {"request": request, "answer": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    with open(cache, "a", encoding="utf-8") as file, ThreadPoolExecutor(PARALLEL) as pool:
        file.write("\n" if cache.stat().st_size else "")  # the last line may have been cut
        todo = [request for request in dict.fromkeys(requests) if request not in known]
        answers = pool.map(ask, todo)
        for _ in tqdm(answers, desc="judge", total=len(todo), unit="request", disable=None):
            pass
    if errors:
        said = hidden(" ".join(f"{type(errors[0]).__name__}: {errors[0]}".split()), key)[:300]
        fail(f"{client.base_url}: {said}. {len(known)} answers are kept in {cache}; run the same "
             "command to go on")
    return [known[request] for request in requests]


# -------------------------------------------------------------------------- one way to use them all

SCORERS: dict[str, Callable] = {"vader": vader, "reward-model": reward_model}
RANKERS: dict[str, Callable] = {"pairrm": pairrm, "llm": llm, "openai": openai}


def wins(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 where the first score is higher, ½ where they tie, else 0; elementwise."""
    return (first > second) + 0.5 * (first == second)


def both_orders(first: np.ndarray, exchanged: np.ndarray) -> tuple[np.ndarray, dict]:
    """P(first is better) [N] from a ranker's answers in both orders [N], and how the judge behaved.

    A judge that always prefers the first option comes out at exactly ½. `order_disagreement` is the
    share of comparisons where the two orders name different winners. An answer without a verdict
    counts ½ and is counted; where neither order has one, the result is NaN.
    """
    answers = np.array([first, 1 - np.asarray(exchanged)])
    silent = np.isnan(answers)
    answers[silent] = 0.5
    disagree = (answers[0] - 0.5) * (answers[1] - 0.5) < 0
    result = np.where(silent.all(0), np.nan, answers.mean(0))
    return result, {"order_disagreement": float(disagree.mean()), "no_verdict": int(silent.sum())}


def compare(args, comparisons: list[Comparison], rank: int, world: int,
            device: torch.device) -> tuple[np.ndarray, dict]:
    """P(first is better) [N] of every comparison by the judge of `args`, whatever its kind, NaN
    where it gave no verdict, and how it behaved."""
    if args.judge in SCORERS:
        rows = [{"prompt": c, "responses": [a, b]} for c, a, b in comparisons]
        first, second = np.array(SCORERS[args.judge](args, rows, rank, world, device)).T
        return wins(first, second), {}
    count = len(comparisons)
    exchanged = [(conversation, b, a) for conversation, a, b in comparisons]
    answers = RANKERS[args.judge](args, [*comparisons, *exchanged], rank, world, device)
    found, behaviour = both_orders(np.array(answers[:count]), np.array(answers[count:]))
    if behaviour["no_verdict"] == 2 * count:
        fail(f"{args.judge_model}: none of its {2 * count} answers held a verdict; a judge that "
             "reasons first needs more --judge-tokens")
    return found, behaviour


def settled(preference: np.ndarray) -> np.ndarray:
    """Preferences with ½ where there is no verdict."""
    return np.where(np.isnan(preference), 0.5, preference)


def rewards(args, rows: list[dict], rank: int, world: int,
            device: torch.device) -> tuple[list[list[float]], dict]:
    """A reward for every response of every row, and how the judge behaved.

    A ranker's is the mean log-odds against the siblings (0 against itself): the least-squares fit
    of Bradley–Terry rewards to the comparisons, whose difference for two responses is
    log p/(1 − p). Certainty counts as p = 1 − 10⁻⁶.
    """
    if args.judge in SCORERS:
        return SCORERS[args.judge](args, rows, rank, world, device), {}
    result = [[0.0] * len(row["responses"]) for row in rows]
    where = [(i, j, k) for i, own in enumerate(result) for k in range(len(own)) for j in range(k)]
    if not where:
        return result, {}
    comparisons = []
    for i, j, k in where:
        texts = rows[i]["responses"]
        comparisons.append((rows[i]["prompt"], texts[j], texts[k]))
    found, behaviour = compare(args, comparisons, rank, world, device)
    p = settled(found).clip(1e-6, 1 - 1e-6)
    odds = np.log(p) - np.log1p(-p)
    for (i, j, k), d in zip(where, odds.tolist()):
        result[i][j] += d / len(result[i])
        result[i][k] -= d / len(result[i])
    return result, behaviour

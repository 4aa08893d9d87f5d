"""Judges: who says which of two responses to a prompt is better.

A *ranker* is a function (args, comparisons) → P(first response is better), one number in
[0, 1] for every comparison (conversation, first, second), NaN where it gives no verdict. `compare`
asks it in both orders and averages, because a judge's taste for the first option is often stronger
than its taste. A *scorer* gives each response a number of its own, and is asked once.

    vader           scorer: sentiment by a lexicon rated by people, the gold standard of the demo
    reward-model    scorer: the logit of any one-logit sequence classifier with a chat template
    pairrm          ranker: PairRM (judges/pairrm.py)
    llm             ranker: a causal LM's probability of A against B after SPA's Listing 1
    openai          ranker: what an OpenAI-compatible endpoint answers (judges/endpoint.py)
"""
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
import transformers

from core import RANK, WORLD
from core.chat import answered, encode_prompt, encode_rows
from core.models import context_of, load_config, load_tokenizer, load_weights
from core.parallel import autocast, merge, progress, this_device
from core.policy import ResponseLogps, score
from core.probe import load_scorer
from core.rows import fail, in_one_line, note
from judges.comparisons import option_prompt
from judges.endpoint import chat, parse_choice
from judges.flags import check_model_of
from judges.measures import settled, wins

Comparison = tuple[list[dict], str, str]


def logits_of(args, model, encoded: list[list[int]]) -> list[float]:
    """The one logit of a judging model for each list of token ids. It reads them one by one, so
    that nothing is padded; ranks share them."""
    device = this_device()
    mine = {}
    for i in progress(range(RANK, len(encoded), WORLD), args.judge, "answer"):
        with torch.no_grad(), autocast(device, args.precision):
            logits = model(torch.tensor([encoded[i]], device=device)).logits
        mine[i] = logits.float().item()
    logits = merge(mine)
    if not all(map(math.isfinite, logits.values())):
        fail(f"{args.judge_model}: a reward is not finite; are its weights sound?")
    return [logits[i] for i in range(len(encoded))]


# ------------------------------------------------------------------------------------------ scorers


def vader(args, rows: list[dict]) -> list[list[float]]:
    """Sentiment in [−1, 1] of every response by VADER, a lexicon rated by people (Hutto & Gilbert
    2014): the share of it that is pleasant less the share that is unpleasant, because the
    lexicon's own sum grows with an answer's length."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # the demo's alone
    judge = SentimentIntensityAnalyzer()
    shares = [[judge.polarity_scores(text) for text in row["responses"]] for row in rows]
    return [[share["pos"] - share["neg"] for share in row] for row in shares]


def reward_model(args, rows: list[dict]) -> list[list[float]]:
    """Logit of every response by a one-logit sequence classifier with a chat template."""
    path = args.judge_model
    tokenizer = load_tokenizer(path)
    limit = context_of(load_config(path))
    encoded = []
    for row in rows:
        where = f"{path}: the prompt {row['prompt'][-1]['content']!r:.80}"
        for text in row["responses"]:
            with in_one_line(f"{where}: the judge's chat template refuses it"):
                ids = encode_prompt(tokenizer, answered(row["prompt"], text), generation=False)
            # Beyond it some models fail late, and others go on as if nothing were.
            if len(ids) > limit:
                fail(f"{where} and its answer have {len(ids)} tokens; the judge's context is "
                     f"{limit}. Take a judge with a longer one, or remove the row")
            encoded.append(ids)
    kind = transformers.AutoModelForSequenceClassification
    model = load_weights(kind, path, this_device(), torch.float32)
    check_model_of(args.judge, path)  # one of the hub is on this machine now
    logits = iter(logits_of(args, model, encoded))
    return [[next(logits) for _ in row["responses"]] for row in rows]


# ------------------------------------------------------------------------------------------ rankers


def llm(args, comparisons: list[Comparison]) -> list[float]:
    """π(A) / (π(A) + π(B)) after Listing 1, from the log-probs of the two option tokens (SPA,
    B.2)."""
    path = args.judge_model
    tokenizer = load_tokenizer(path)
    # Named by what a reader knows of them, for the line of one that does not fit.
    rows = [{"id": f"{comparison[0][-1]['content']:.80}", "prompt": option_prompt(*comparison)}
            for comparison in comparisons]
    letters = [("A", False, None), ("B", False, None)]
    encoded = encode_rows(load_config(path), tokenizer, rows, [letters] * len(rows), path)
    # The template may write something before a letter, Qwen3's a think block; it is the same for
    # both.
    for pair in encoded:
        a, b = pair[1] if pair else ([], [])
        if len(a) != len(b) or (a[:-1] != b[:-1]).any() or a[-1] == b[-1]:
            fail(f"{path}: its tokenizer does not write A and B as one token each")
    model = load_scorer(path, this_device(), encoded, args.precision)
    logps = score(ResponseLogps(model), encoded, args.precision)
    return [1 / (1 + math.exp(min(b - a, 700.0))) for a, b in logps]


def pairrm(args, comparisons: list[Comparison]) -> list[float]:
    """P(first is better) by PairRM; it reads the beginning of what is too long for it."""
    from judges.pairrm import LENGTH, encode_comparison, load_pairrm  # seconds to load
    model, tokenizer = load_pairrm(args.judge_model, this_device())
    encoded = [encode_comparison(model.config, tokenizer, *comparison)
               for comparison in comparisons]
    shortened = sum(is_cut for _, is_cut in encoded)
    if shortened:
        note(f"{args.judge_model} reads {LENGTH} tokens; {shortened} of {len(encoded)} comparisons "
             "are longer and lose the ends of their parts")
    logits = logits_of(args, model, [ids for ids, _ in encoded])
    return torch.tensor(logits).double().sigmoid().tolist()


def openai(args, comparisons: list[Comparison]) -> list[float]:
    """1 or 0 by the letter that an OpenAI-compatible endpoint answers to Listing 1."""
    order = ("You compare two responses. Answer with [[A]] or [[B]], whichever is better, and "
             "nothing else.")
    system = {"role": "system", "content": order}
    chats = [[system, *option_prompt(*comparison)] for comparison in comparisons]
    return [parse_choice(text) for text in chat(args, chats)]


# -------------------------------------------------------------------------- one way to use them all

SCORERS: dict[str, Callable] = {"vader": vader, "reward-model": reward_model}
RANKERS: dict[str, Callable] = {"pairrm": pairrm, "llm": llm, "openai": openai}


def both_orders(first: np.ndarray, exchanged: np.ndarray) -> tuple[np.ndarray, dict]:
    """P(first is better) [N] from a ranker's answers in both orders [N], and how the judge behaved.

    A judge that always prefers the first option comes out at exactly ½. `order_disagreement` is the
    share of comparisons where the two orders name different winners. An answer without a verdict
    counts ½ and is counted; where neither order has one, the result is NaN.
    """
    answers = np.array([first, 1 - np.asarray(exchanged)])
    without = np.isnan(answers)
    answers[without] = 0.5
    disagree = (answers[0] - 0.5) * (answers[1] - 0.5) < 0
    preference = np.where(without.all(0), np.nan, answers.mean(0))
    return preference, {"order_disagreement": float(disagree.mean()),
                        "no_verdict": int(without.sum())}


def compare(args, comparisons: list[Comparison]) -> tuple[np.ndarray, dict]:
    """P(first is better) [N] of every comparison by the judge of `args`, whatever its kind, NaN
    where it gave no verdict, and how it behaved."""
    if args.judge in SCORERS:
        rows = [{"prompt": prompt, "responses": sides} for prompt, *sides in comparisons]
        first, second = np.array(SCORERS[args.judge](args, rows)).T
        return wins(first, second), {}
    count = len(comparisons)
    exchanged = [(conversation, second, first) for conversation, first, second in comparisons]
    answers = RANKERS[args.judge](args, [*comparisons, *exchanged])
    preference, behaviour = both_orders(np.array(answers[:count]), np.array(answers[count:]))
    if behaviour["no_verdict"] == 2 * count:
        fail(f"{args.judge_model}: none of its {2 * count} answers held a verdict; a judge that "
             "reasons first needs more --judge-tokens")
    return preference, behaviour


def rewards(args, rows: list[dict]) -> tuple[list[list[float]], dict]:
    """A reward for every response of every row, and how the judge behaved.

    A ranker's is the mean preference for it over the siblings.
    """
    if args.judge in SCORERS:
        return SCORERS[args.judge](args, rows), {}
    result = [[0.0] * len(row["responses"]) for row in rows]
    where, comparisons = [], []
    for i, row in enumerate(rows):
        for (j, first), (k, second) in itertools.combinations(enumerate(row["responses"]), 2):
            where.append((i, j, k))
            comparisons.append((row["prompt"], first, second))
    if not comparisons:
        return result, {}
    preference, behaviour = compare(args, comparisons)
    for (i, j, k), p in zip(where, settled(preference).tolist()):
        siblings = len(result[i]) - 1
        result[i][j] += p / siblings
        result[i][k] += (1 - p) / siblings
    return result, behaviour

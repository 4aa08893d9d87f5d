"""Measures: pure functions from judgements to the scores that papers report.

    win rate            mean preference, a draw ½; its error over prompts
    length-controlled   σ(c) of the fit P(win) = σ(a·tanh(Δlength / its s.d.) + c)
    label quality       shares of self-labels that the judge calls right or wrong

Preferences are in [0, 1], 1 where the policy's answer is better than the baseline's, NaN where the
judge gave no verdict.
"""
import importlib.util
import math

import numpy as np

# Of the length's coefficient: keeps it finite where length alone tells wins from losses, and is
# nothing beside the evidence of a few dozen prompts.
RIDGE = 0.1

# ------------------------------------------------------------------------- means and their errors


def wins(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 where the first score is higher, ½ where they tie, else 0; elementwise."""
    return (first > second) + 0.5 * (first == second)


def settled(preference: np.ndarray) -> np.ndarray:
    """Preferences with ½ where there is no verdict."""
    return np.where(np.isnan(preference), 0.5, preference)


def error_over_prompts(values: np.ndarray, prompts: np.ndarray) -> float:
    """Standard error of the mean of values [N] of the prompts numbered in `prompts` [N]: samples of
    one prompt are not independent. NaN for a single prompt."""
    sums = np.bincount(prompts, values - values.mean())
    count = len(np.unique(prompts))
    if count < 2:
        return math.nan
    return float(math.sqrt(count / (count - 1) * (sums ** 2).sum()) / len(values))


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of values [prompts, samples] and its standard error over prompts."""
    prompts = np.repeat(np.arange(values.shape[0]), values.shape[1])
    return float(values.mean()), error_over_prompts(values.ravel(), prompts)


def interval(values: np.ndarray) -> list[float]:
    """95 % interval of a rate, the mean of values in [0, 1] [prompts, samples]: normal, from the
    spread over the prompts and four more, two at 0 and two at 1 (Agresti & Coull 1998), so that few
    prompts, and rates of 0 and 1, which have no spread, claim no more than they tell."""
    per_prompt = np.concatenate([values.mean(1), [0, 0, 1, 1]])
    middle = per_prompt.mean()
    half = 1.96 * per_prompt.std() / math.sqrt(len(per_prompt))
    return [float(max(middle - half, 0)), float(min(middle + half, 1))]


def paired_p(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p-value of "the same mean" for two policies on the same prompts [prompts, samples]:
    signs of the prompts' differences flipped at random, 9 999 times, or in every way where there
    are no more than that. NaN for a single prompt."""
    from scipy.stats import permutation_test
    difference = first.mean(axis=1) - second.mean(axis=1)
    if len(difference) < 2:
        return math.nan
    test = permutation_test((difference,), np.mean, permutation_type="samples", batch=500,
                            rng=np.random.default_rng(0))
    return float(test.pvalue)


# ----------------------------------------------------------------------- a policy and its labels


def text_measures(rows: list[dict], second_lexicon: bool) -> dict:
    """What the answers of a policy look like, from its rows of responses. `openings`: of one answer
    to every prompt, the share of distinct first three words, low where a policy has one opening;
    the mean over the samples.

    `second_score`: mean polarity in [−1, 1] of the words that TextBlob's lexicon knows, where that
    is installed. Nothing is trained on it, and as a mean over words it does not rise with length.
    """
    texts = [text for row in rows for text in row["responses"]]
    distinct = [len({tuple(text.split()[:3]) for text in sample})
                for sample in zip(*(row["responses"] for row in rows))]
    measures = {"characters": float(np.mean([len(text) for text in texts])),
                "openings": float(np.mean(distinct)) / len(rows)}
    if all("ended" in row for row in rows):
        measures["ended"] = float(np.mean([end for row in rows for end in row["ended"]]))
    if second_lexicon and importlib.util.find_spec("textblob"):
        from textblob import TextBlob  # slow to import, and the demo's alone
        polarity = np.array([TextBlob(text).sentiment.polarity for text in texts])
        score, error = mean_and_error(polarity.reshape(len(rows), -1))
        measures |= {"second_score": score, "second_score_error": error}
    return measures


def win_measures(preference: np.ndarray, before: np.ndarray | None, delta: np.ndarray) -> dict:
    """A policy against the first one, from preferences and Δ = characters of the first one's answer
    − its own [prompts, samples]; `p` of the paired test against the preferences of the policy
    before it, or against ½."""
    preference = settled(preference)
    before = np.full(preference.shape, 0.5) if before is None else settled(before)
    prompts = np.arange(preference.size) // preference.shape[1]
    controlled, error = length_controlled(delta.ravel(), preference.ravel(), prompts)
    rate, rate_error = mean_and_error(preference)
    return {"win_rate": rate,
            "win_rate_error": rate_error,
            "interval": interval(preference),
            "ties": float((preference == 0.5).mean()),
            "p": paired_p(preference, before),
            "length_controlled": controlled,
            "length_controlled_error": error}


def label_quality(preference: np.ndarray, flagged: np.ndarray, could: np.ndarray) -> dict:
    """How right self-labels are, from the judge's preferences for `chosen` [N], which pairs
    training flagged and which it could have flagged (bool [N]).

    All are shares of pairs: a preference above ½ agrees, ½ is half an agreement.
    """
    preference = settled(preference)
    wrong = np.where(preference == 0.5, 0.5, preference < 0.5)

    def share(among: np.ndarray) -> float | None:
        return float(wrong[among].mean()) if among.any() else None

    return {"pairs": len(wrong),
            "accuracy": float(1 - wrong.mean()),
            "could_be_flagged": int(could.sum()),
            "flagged": int(flagged.sum()),
            "wrong_among_flagged": share(flagged),
            "wrong": share(could)}


# ---------------------------------------------------------------------------------- equal lengths


def length_controlled(delta: np.ndarray, p: np.ndarray,
                      prompts: np.ndarray) -> tuple[float, float]:
    """(win rate at equal length, its standard error) from Δ = characters of the baseline's answer −
    the policy's [N], preferences p [N] and the numbers of their prompts [N].

    It knows lengths alone and is symmetric in the two policies: who is called which changes only
    the signs of Δ and c, and the loss, log loss + RIDGE·a²/2, not at all. The error is the
    sandwich's (Liang & Zeger 1986): to first order a prompt moves (a, c) by H⁻¹ times the gradient
    of its own loss. NaN where every p is 0 or every p is 1, which tells nothing of it.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, logit
    if (p == p[0]).all() and p[0] in (0, 1):
        return float(p[0]), math.nan
    count = len(np.unique(prompts))
    if count < 2:
        return math.nan, math.nan
    x = np.column_stack([np.tanh(delta / (delta.std(ddof=1) or 1.0)), np.ones(len(p))])
    ridge = np.array([RIDGE, 0.0])

    def loss(w: np.ndarray) -> float:
        z = x @ w
        return (np.logaddexp(0, z) - p * z).sum() + (ridge * w ** 2).sum() / 2

    def gradient(w: np.ndarray) -> np.ndarray:
        return x.T @ (expit(x @ w) - p) + ridge * w

    def hessian(w: np.ndarray) -> np.ndarray:
        q = expit(x @ w)
        return (x.T * (q * (1 - q))) @ x + np.diag(ridge)

    w = minimize(loss, [0.0, logit(p.mean())], jac=gradient, hess=hessian, method="trust-exact",
                 options={"gtol": 1e-9}).x
    by_sample = x * (expit(x @ w) - p)[:, None]
    by_prompt = [np.bincount(prompts, column) for column in by_sample.T]
    moves = np.linalg.solve(hessian(w), by_prompt)[1]
    rate = expit(w[1])
    error = rate * (1 - rate) * math.sqrt(count / (count - 1) * (moves ** 2).sum())
    return float(rate), float(error)

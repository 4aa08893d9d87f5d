"""Measures: pure functions from judgements to the scores that papers report.

A judgement is one annotation in AlpacaEval's format: instruction, output_1 of generator_1 (the
baseline), output_2 of generator_2 (the model), preference from 1 (baseline better) to 2 (model
better), 1.5 or 0 for a draw, null for none.
"""
import csv
import math
from collections import defaultdict

import numpy as np

from core.rows import fail, is_number, read_json_list

# Of the length's coefficient: keeps it finite where length alone tells wins from losses, and is
# nothing beside the evidence of a few dozen prompts.
RIDGE = 0.1
REPLICATES = 1000  # of the length-controlled rate's bootstrap

# ------------------------------------------------------------------------- means and their errors


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of values [prompts, samples] and its standard error over prompts: samples of one prompt
    are not independent."""
    per_prompt = values.mean(axis=1)
    if len(per_prompt) < 2:
        return float(per_prompt.mean()), math.nan
    return float(per_prompt.mean()), float(per_prompt.std(ddof=1) / math.sqrt(len(per_prompt)))


def exact_interval(rate: float, prompts: int) -> list[float]:
    """95 % interval of a rate that came out as 0 or 1 on every prompt (Clopper & Pearson 1934):
    what differs nowhere has no spread to take an error from."""
    bound = 0.025 ** (1 / prompts)
    return [0.0, 1 - bound] if rate == 0 else [bound, 1.0]


def bootstrap_interval(values: np.ndarray) -> list[float]:
    """95 % interval of a rate, the mean of values [prompts, samples]: percentiles of the mean with
    prompts drawn anew 9 999 times; exact where the rate is 0 or 1."""
    from scipy.stats import bootstrap
    per_prompt = values.mean(axis=1)
    if (per_prompt == 0).all() or (per_prompt == 1).all():
        return exact_interval(per_prompt[0], len(per_prompt))
    if len(per_prompt) < 2:
        return [math.nan, math.nan]
    found = bootstrap((per_prompt,), np.mean, method="percentile", batch=500,
                      rng=np.random.default_rng(0)).confidence_interval
    return [float(found.low), float(found.high)]


def paired_p(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p-value of "the same mean" for two policies on the same prompts [prompts, samples]:
    signs of the prompts' differences flipped at random, 9 999 times, or in every way where there
    are no more than that. NaN for a single prompt."""
    from scipy.stats import permutation_test
    difference = first.mean(axis=1) - second.mean(axis=1)
    if len(difference) < 2:
        return math.nan
    found = permutation_test((difference,), np.mean, permutation_type="samples", batch=500,
                             rng=np.random.default_rng(0))
    return float(found.pvalue)


def label_quality(preference: np.ndarray, flagged: np.ndarray, could: np.ndarray) -> dict:
    """How right self-labels are, from the judge's preferences for `chosen` [N], which pairs
    training flagged and which it could have flagged (bool [N]).

    All are shares of pairs: a preference above ½ agrees, ½ is half an agreement.
    """
    wrong = np.where(preference == 0.5, 0.5, preference < 0.5)

    def share(among: np.ndarray) -> float | None:
        return float(wrong[among].mean()) if among.any() else None

    return {"pairs": len(wrong),
            "accuracy": float(1 - wrong.mean()),
            "could_be_flagged": int(could.sum()),
            "flagged": int(flagged.sum()),
            "wrong_among_flagged": share(flagged),
            "wrong": share(could)}


# ------------------------------------------------------------------------------------- AlpacaEval


def read_annotations(path: str) -> list[dict]:
    """A file of annotations (.json or .json.gz), checked."""
    rows = read_json_list(path, "output_1", "output_2", "generator_1", "generator_2")
    for number, row in enumerate(rows, 1):
        value = row.get("preference")
        if value is None or value != value:  # null or NaN: no verdict
            continue
        if not is_number(value) or not (1 <= value <= 2 or value == 0):
            fail(f"{path}: entry {number}: 'preference' must be from 1 to 2, 0 for a draw or null, "
                 f"found {value!r:.60}")
    if len({(row["generator_1"], row["generator_2"]) for row in rows}) > 1:
        fail(f"{path}: holds several pairs of generators; one baseline and one model are compared")
    return rows


def preferences_of(annotations: list[dict]) -> np.ndarray:
    """Preferences for output_2 in [0, 1], NaN where there is none."""
    values = np.array([row.get("preference") for row in annotations], dtype=float)
    return np.where(values == 0, 1.5, values) - 1


def win_rate(annotations: list[dict]) -> dict:
    """AlpacaEval's win rate in percent with its standard error, and what the leaderboard shows
    beside it; at 0 and 100 % an exact interval, in percent too."""
    all_of = preferences_of(annotations)
    p = all_of[~np.isnan(all_of)]
    if not len(p):
        fail("no annotation has a preference")
    error = 100 * float(p.std(ddof=1)) / math.sqrt(len(p)) if len(p) > 1 else math.nan
    score = {"win_rate": 100 * float(p.mean()),
             "standard_error": error,
             "n_wins": int((p > 0.5).sum()),
             "n_wins_base": int((p < 0.5).sum()),
             "n_draws": int((p == 0.5).sum()),
             "n_total": len(p),
             "n_missing": len(all_of) - len(p),
             "discrete_win_rate": 100 * float(((p > 0.5) + 0.5 * (p == 0.5)).mean()),
             "avg_length": int(np.mean([len(row["output_2"]) for row in annotations]))}
    if score["win_rate"] in (0, 100):
        prompts = prompt_of(annotations)[~np.isnan(all_of)]
        found = exact_interval(score["win_rate"], len(np.unique(prompts)))
        score["interval"] = [100 * bound for bound in found]
    return score


def read_difficulty(path: str) -> tuple[np.ndarray, list[dict]]:
    """(difficulty of AlpacaEval's instructions in their order, rows of gamed baselines) of
    instruction_difficulty.csv, which has none of the latter, or of df_gamed.csv."""
    difficulty = {}
    gamed = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                index = int(row["index"] if "index" in row else row[""])
                difficulty.setdefault(index, float(row["instruction_difficulty"]))
                if row.get("preference"):
                    gamed.append({key: float(row[key]) for key in (
                        "instruction_difficulty", "std_delta_len", "preference")})
        return np.array([difficulty[i] for i in range(len(difficulty))]), gamed
    except (KeyError, ValueError) as error:
        fail(f"{path}: needs the columns index and instruction_difficulty, index from 0 "
             f"({error!r})")


def prompt_of(annotations: list[dict]) -> np.ndarray:
    """The number of each annotation's prompt [N]: samples of one prompt share their instruction."""
    texts = [str(row.get("instruction", i)) for i, row in enumerate(annotations)]
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return np.array([number[text] for text in texts])


def length_of(annotations: list[dict]) -> np.ndarray:
    """tanh(Δ / s.d. of Δ) [N] of Δ = characters of the baseline's output − the model's."""
    delta = np.array([len(row["output_1"]) - len(row["output_2"]) for row in annotations], float)
    return np.tanh(delta / (delta.std(ddof=1) or 1.0)) if len(delta) > 1 else np.zeros(len(delta))


def length_controlled(annotations: list[dict],
                      difficulty: tuple[np.ndarray, list[dict]] | None = None) -> dict:
    """The length-controlled win rate in percent and its standard error (Dubois et al. 2024): the
    preference predicted at equal length by

        P(model better) = σ(a·tanh(Δlength / its s.d.) + b·difficulty + c)

    With AlpacaEval's difficulties it is fitted as published. Without them the middle term is left
    out and the fit is symmetric: the rates of a model against another and of that against this
    sum to 100. At 0 and 100 an exact interval, in percent too, takes the error's place.
    """
    if annotations[0]["generator_1"] == annotations[0]["generator_2"]:
        return {"length_controlled_winrate": 50.0, "lc_standard_error": 0.0}
    p = preferences_of(annotations)
    known = ~np.isnan(p)
    prompts = prompt_of(annotations)[known]
    count = len(np.unique(prompts))
    gamed = difficulty is not None and len(difficulty[1]) > 0
    if known.any() and not gamed and ((p[known] == 0).all() or (p[known] == 1).all()):
        rate = float(p[known][0])
        return {"length_controlled_winrate": 100 * rate,
                "lc_standard_error": math.nan,
                "lc_interval": [100 * bound for bound in exact_interval(rate, count)]}
    if difficulty is not None:
        rate, error = published_rate(length_of(annotations), p, *difficulty)
    elif count < 2:
        rate, error = math.nan, math.nan
    else:
        rate, error = symmetric_rate(length_of(annotations)[known], p[known], prompts)
    return {"length_controlled_winrate": 100 * rate, "lc_standard_error": 100 * error}


def rate_at_equal_length(length: np.ndarray, p: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """σ(c) [R] of the fits of P(win) = σ(a·length + c) to preferences p [N], one for each row of
    weights [R, N]; exactly 0 or 1 where every preference of weight is. The loss is log loss +
    RIDGE·a²/2.

    Who is called the model changes only the signs of length and c, and the loss not at all. Damped
    Newton steps: for log loss with |x| ≤ √2, a step d cut by ln(1 + √2|d|) / √2|d| always descends
    (Sun & Tran-Dinh 2019).
    """
    from scipy.special import expit, logit
    total = weight.sum(1)
    won = weight @ p
    lost = weight @ (1 - p)
    rate = (won > 0).astype(float)
    mixed = (won > 0) & (lost > 0)
    w = weight[mixed]
    a = np.zeros(len(w))
    c = logit(won[mixed] / total[mixed])
    for _ in range(200):
        q = expit(a[:, None] * length + c[:, None])
        slope = w * (q - p)
        bend = w * q * (1 - q)
        # gradient and Hessian in (a, c), and the Newton step
        g_a = slope @ length + RIDGE * a
        g_c = slope.sum(1)
        h_aa = bend @ length ** 2 + RIDGE
        h_ac = bend @ length
        h_cc = bend.sum(1)
        det = h_aa * h_cc - h_ac ** 2
        d_a = (h_ac * g_c - h_cc * g_a) / det
        d_c = (h_ac * g_a - h_aa * g_c) / det
        size = math.sqrt(2) * np.hypot(d_a, d_c)
        if not (size > 1e-10).any():
            break
        cut = np.log1p(size) / np.maximum(size, 1e-300)
        a += cut * d_a
        c += cut * d_c
    rate[mixed] = expit(c)
    return rate


def symmetric_rate(length: np.ndarray, p: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """(rate at equal length of preferences p [N] of the prompts named in `prompts` [N]; its
    standard error: prompts are drawn anew with all their samples)."""
    count = prompts.max() + 1
    dice = np.random.default_rng(0)
    names = np.unique(prompts)
    rates = []
    block = max(1, 2_000_000 // len(p))  # replicates at once: 16 MB an array
    for first in range(0, REPLICATES, block):
        drawn = dice.multinomial(len(names), np.full(len(names), 1 / len(names)),
                                 size=min(block, REPLICATES - first))
        times = np.zeros((len(drawn), count))
        times[:, names] = drawn
        rates.append(rate_at_equal_length(length, p, times[:, prompts]))
    rate, = rate_at_equal_length(length, p, np.ones((1, len(p))))
    return float(rate), float(np.concatenate(rates).std(ddof=1))


def published_rate(length: np.ndarray, p: np.ndarray, difficulty: np.ndarray,
                   gamed: list[dict]) -> tuple[float, float]:
    """AlpacaEval 2's rate and standard error, to the digit: L1 logistic regression, its strength
    chosen by 5-fold cross-validation, the prediction averaged over the instructions; the error is
    the predictions' over instructions. Gamed baselines pull c to 0, at the published weight of 0.2.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import, and needed here alone
    from sklearn.model_selection import GroupKFold
    if len(difficulty) != len(length):
        fail(f"{len(length)} annotations, but the difficulty of {len(difficulty)} instructions, "
             "which must be theirs in their order")
    x = np.column_stack([length, difficulty, np.ones(len(length))])
    at_equal_length = x * [0, 1, 1]
    weight = np.ones(len(x))
    if gamed:
        x = np.vstack([[[math.tanh(row["std_delta_len"]), row["instruction_difficulty"], 0.0]
                        for row in gamed], x])
        p = np.concatenate([[row["preference"] for row in gamed], p])
        weight = np.concatenate([np.full(len(gamed), 0.2 / 2), weight])  # there are two of them
    known = ~np.isnan(p)
    x, p, weight = x[known], p[known], weight[known]
    if len(p) < 5:
        return math.nan, math.nan

    def fit(rows: np.ndarray, strength: float) -> np.ndarray:
        """Coefficients [3]; a preference p is a win of weight p and a loss of weight 1 − p. Parts
        without weight are left out: liblinear does not converge with them."""
        won = np.repeat([1, 0], len(rows))
        share = np.concatenate([p[rows], 1 - p[rows]]) * np.tile(weight[rows], 2)
        some = share > 0
        if len(set(won[some])) == 1:  # a fold without a win: it tells no strength from another
            return np.zeros(3)
        model = LogisticRegression(l1_ratio=1.0, solver="liblinear", C=strength,
                                   fit_intercept=False, random_state=123)
        both = np.vstack([x[rows], x[rows]])
        return model.fit(both[some], won[some], sample_weight=share[some]).coef_[0]

    def log_loss(rows: np.ndarray, coefficients: np.ndarray) -> float:
        z = x[rows] @ coefficients
        return float((weight[rows] * (np.logaddexp(0, z) - p[rows] * z)).mean())

    strengths = np.logspace(-4, 4, 10)
    folds = list(GroupKFold(5).split(x, groups=np.arange(len(x))))
    losses = [np.mean([log_loss(test, fit(train, c)) for train, test in folds]) for c in strengths]
    best = strengths[int(np.argmin(losses))]
    predicted = 1 / (1 + np.exp(-at_equal_length @ fit(np.arange(len(x)), best)))
    return float(predicted.mean()), float(predicted.std(ddof=1) / math.sqrt(len(predicted)))


def leaderboard(paths: list[str], difficulty_path: str | None) -> dict[str, dict]:
    """AlpacaEval's scores of every file of annotations, by the model's name."""
    difficulty = read_difficulty(difficulty_path) if difficulty_path else None
    scores = {}
    for path in paths:
        rows = read_annotations(path)
        name = rows[0]["generator_2"]
        score = {**win_rate(rows), **length_controlled(rows, difficulty)}
        scores[path if name in scores else name] = score
    return scores


# --------------------------------------------------------------------------------------- MT-Bench


def mt_bench_scores(ratings: list[dict]) -> dict:
    """Means of ratings {category, turn, score}: by category, by turn and of all; what the judge
    left unrated is counted."""
    groups = defaultdict(list)
    for row in ratings:
        groups[row["category"]].append(row["score"])
    for row in ratings:
        groups[f"turn {row['turn']}"].append(row["score"])
    groups["average"] = [row["score"] for row in ratings]
    means = {key: float(np.nanmean(v)) if not np.isnan(v).all() else math.nan
             for key, v in groups.items()}
    unrated = sum(math.isnan(row["score"]) for row in ratings)
    return {**means, "rated": len(ratings) - unrated, "unrated": unrated}

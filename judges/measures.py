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

# --------------------------------------------------------------------------- means and their errors


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of values [prompts, samples] and its standard error over prompts: samples of one prompt
    are not independent."""
    per_prompt = values.mean(axis=1)
    if len(per_prompt) < 2:
        return float(per_prompt.mean()), math.nan
    return float(per_prompt.mean()), float(per_prompt.std(ddof=1) / math.sqrt(len(per_prompt)))


def bootstrap_interval(values: np.ndarray) -> list[float]:
    """95 % percentile interval of the mean of values [prompts, samples], prompts drawn anew 9 999
    times."""
    from scipy.stats import bootstrap
    per_prompt = values.mean(axis=1)
    if len(per_prompt) < 2:
        return [math.nan, math.nan]
    found = bootstrap((per_prompt,), np.mean, method="percentile", batch=500,
                      rng=np.random.default_rng(0)).confidence_interval
    return [float(found.low), float(found.high)]


def paired_p(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p-value of "the same mean" for two policies on the same prompts [prompts, samples]:
    signs of the prompts' differences flipped at random, 9 999 times, or in every way where there
    are no more than that."""
    from scipy.stats import permutation_test
    difference = first.mean(axis=1) - second.mean(axis=1)
    found = permutation_test((difference,), np.mean, permutation_type="samples", batch=500,
                             rng=np.random.default_rng(0))
    return float(found.pvalue)


def label_quality(preference: np.ndarray, flagged: np.ndarray, open_: np.ndarray) -> dict:
    """How right self-labels are, from the judge's preferences for `chosen` [N], which pairs
    training flagged, and which it could have flagged (bool [N]).

    A label is right or wrong, ½ where the judge has no preference: a probability of 0.55 agrees.
    """
    wrong = 1 - (preference > 0.5) - 0.5 * (preference == 0.5)
    return {"pairs": len(wrong), "accuracy": float(1 - wrong.mean()), "flagged": int(flagged.sum()),
            "wrong_among_flagged": float(wrong[flagged].mean()) if flagged.any() else None,
            "wrong": float(wrong[open_].mean()) if open_.any() else None}


# --------------------------------------------------------------------------------------- AlpacaEval


def read_annotations(path: str) -> list[dict]:
    """A file of annotations (.json or .json.gz), checked."""
    rows = read_json_list(path, "output_1", "output_2", "generator_1", "generator_2")
    for number, row in enumerate(rows, 1):
        value = row.get("preference")
        if value is None or value != value:  # null or NaN: no verdict
            continue
        if not (is_number(value) and (1 <= value <= 2 or value == 0)):
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
    beside it."""
    all_of = preferences_of(annotations)
    p = all_of[~np.isnan(all_of)]
    if not len(p):
        fail("no annotation has a preference")
    error = float(p.std(ddof=1)) / math.sqrt(len(p)) if len(p) > 1 else math.nan
    decided = (p > 0.5) + 0.5 * (p == 0.5)
    return {"win_rate": 100 * float(p.mean()), "standard_error": 100 * error,
            "n_wins": int((p > 0.5).sum()), "n_wins_base": int((p < 0.5).sum()),
            "n_draws": int((p == 0.5).sum()), "n_total": len(p), "n_missing": len(all_of) - len(p),
            "discrete_win_rate": 100 * float(decided.mean()),
            "avg_length": int(np.mean([len(row["output_2"]) for row in annotations]))}


def read_difficulty(path: str) -> tuple[np.ndarray, list[dict]]:
    """(difficulty of AlpacaEval's instructions in their order, rows of gamed baselines) of
    instruction_difficulty.csv, which has none of the latter, or of df_gamed.csv."""
    difficulty = {}
    gamed = []
    needed = ("instruction_difficulty", "std_delta_len", "preference")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                index = int(row["index"] if "index" in row else row[""])
                difficulty.setdefault(index, float(row["instruction_difficulty"]))
                if row.get("preference"):
                    gamed.append({key: float(row[key]) for key in needed})
        return np.array([difficulty[i] for i in range(len(difficulty))]), gamed
    except (KeyError, ValueError) as error:
        fail(f"{path}: needs the columns index and instruction_difficulty, index from 0 "
             f"({error!r})")


def length_controlled(annotations: list[dict],
                      difficulty: tuple[np.ndarray, list[dict]] | None = None) -> dict:
    """AlpacaEval 2's length-controlled win rate in percent (Dubois et al. 2024): the preference
    predicted at equal length by

        P(model better) = σ(a·tanh(Δlength / its s.d.) + b·difficulty + c)
        Δlength = characters of baseline − model

    With `difficulty` it is the published fit. Without, the middle term is left out and the fit is
    symmetric: exchanging the two models turns p into 100 − p.
    """
    if annotations[0]["generator_1"] == annotations[0]["generator_2"]:
        return {"length_controlled_winrate": 50.0, "lc_standard_error": 0.0}
    p = preferences_of(annotations)
    known = ~np.isnan(p)
    if known.sum() < 5:
        return {"length_controlled_winrate": math.nan, "lc_standard_error": math.nan}
    delta = [len(row["output_1"]) - len(row["output_2"]) for row in annotations]
    delta = np.array(delta, dtype=float)
    length = np.tanh(delta / (delta.std(ddof=1) or 1.0))
    if difficulty is not None:
        rate, error = published_fit(length, p, known, difficulty)
    else:
        prompts = [str(row.get("instruction", k)) for k, row in enumerate(annotations)]
        _, prompt = np.unique(prompts, return_inverse=True)
        rate, error = symmetric_fit(length[known], p[known], prompt[known])
    return {"length_controlled_winrate": 100 * rate, "lc_standard_error": 100 * error}


def symmetric_fit(length: np.ndarray, p: np.ndarray, prompt: np.ndarray) -> tuple[float, float]:
    """(P at equal length, its standard error) from lengths' terms, preferences and the prompts'
    numbers [N]. The error is a bootstrap's over prompts, whose samples are not independent; where
    every preference is 0, or 1, it is how far an exact binomial bound of one standard error (level
    0.159) lies away."""
    prompts = len(np.unique(prompt))
    if p.min() == p.max() and p[0] in (0, 1):
        return float(p[0]), 1 - 0.1587 ** (1 / prompts)
    dice = np.random.default_rng(0)
    drawn = dice.multinomial(prompts, np.full(prompts, 1 / prompts), size=1000)
    _, number = np.unique(prompt, return_inverse=True)
    weight = np.vstack([np.ones((1, len(p))), drawn[:, number]])
    rates = at_equal_length(length, p, weight)
    return float(rates[0]), float(rates[1:].std(ddof=1))


def at_equal_length(length: np.ndarray, p: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """σ(c) [R] of σ(a·length + c) fitted to preferences p [N], for every row of weights [R, N].

    Newton's method on the mean log loss with a penalty of 10⁻⁶ (a² + c²), which is symmetric in the
    two models and vanishes but where they are separable; only preferences or 0 or 1 give exactly
    that.
    """
    x = np.stack([length, np.ones_like(length)])                                   # [2, N]
    total = weight.sum(1)
    coefficients = np.zeros((len(weight), 2))                                      # a, c
    for _ in range(60):
        fitted = 1 / (1 + np.exp(-(coefficients @ x)))                             # [R, N]
        slope = (weight * (fitted - p)) @ x.T / total[:, None] + 2e-6 * coefficients
        curve = weight * fitted * (1 - fitted) / total[:, None]
        curvature = np.einsum("rn,in,jn->rij", curve, x, x) + 2e-6 * np.eye(2)
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        step *= np.minimum(1, 2 / np.maximum(np.abs(step).max(1), 1e-300))[:, None]
        coefficients -= step
        if np.abs(step).max() < 1e-10:
            break
    mean = (weight * p).sum(1) / total
    rate = 1 / (1 + np.exp(-coefficients[:, 1]))
    return np.where((mean == 0) | (mean == 1), mean, rate)


def published_fit(length: np.ndarray, p: np.ndarray, known: np.ndarray,
                  difficulty: tuple[np.ndarray, list[dict]]) -> tuple[float, float]:
    """(P at equal length, its standard error) as AlpacaEval has them: L1 logistic regression, its
    strength chosen by 5-fold cross-validation, gamed baselines that pull c to 0 at a weight of 0.2,
    and the standard error of the predictions over instructions."""
    from sklearn.linear_model import LogisticRegression  # slow to import, and needed here alone
    from sklearn.model_selection import GroupKFold
    of_instruction, gamed = difficulty
    if len(of_instruction) != len(length):
        fail(f"{len(length)} annotations, but the difficulty of {len(of_instruction)} "
             "instructions, which must be theirs in their order")
    rows = [[math.tanh(row["std_delta_len"]), row["instruction_difficulty"], 0.0] for row in gamed]
    own = np.column_stack([length, of_instruction, np.ones(len(length))])
    neutral = own * [0, 1, 1]
    x = np.vstack([*([rows] if rows else []), own[known]])
    p = np.concatenate([[row["preference"] for row in gamed], p[known]])
    weight = np.ones(len(x))
    weight[:len(gamed)] = 0.2 / 2  # there are two gamed baselines

    def fit(part: np.ndarray, strength: float) -> np.ndarray:
        """Coefficients; a preference p is a win of weight p and a loss of weight 1 − p."""
        model = LogisticRegression(l1_ratio=1.0, solver="liblinear", C=strength,
                                   fit_intercept=False, random_state=123)
        sides = np.concatenate([p[part], 1 - p[part]]) * np.tile(weight[part], 2)
        model.fit(np.vstack([x[part], x[part]]), np.repeat([1, 0], len(part)), sample_weight=sides)
        return model.coef_[0]

    def log_loss(part: np.ndarray, coefficients: np.ndarray) -> float:
        z = x[part] @ coefficients
        return float((weight[part] * (np.logaddexp(0, z) - p[part] * z)).mean())
    strengths = np.logspace(-4, 4, 10)
    folds = list(GroupKFold(5).split(x, groups=np.arange(len(x))))
    losses = []
    for strength in strengths:
        losses.append(np.mean([log_loss(test, fit(train, strength)) for train, test in folds]))
    best = strengths[int(np.argmin(losses))]
    predicted = 1 / (1 + np.exp(-neutral @ fit(np.arange(len(x)), best)))
    return float(predicted.mean()), float(predicted.std(ddof=1) / math.sqrt(len(predicted)))


def leaderboard(paths: list[str], difficulty_path: str | None) -> dict[str, dict]:
    """AlpacaEval's scores of every file of annotations, by the model's name."""
    difficulty = read_difficulty(difficulty_path) if difficulty_path else None
    scores = {}
    for path in paths:
        annotations = read_annotations(path)
        name = annotations[0]["generator_2"]
        controlled = length_controlled(annotations, difficulty)
        scores[path if name in scores else name] = {**win_rate(annotations), **controlled}
    return scores


# ----------------------------------------------------------------------------------------- MT-Bench


def mt_bench_scores(ratings: list[dict]) -> dict:
    """Means of ratings {category, turn, score}: by category, by turn and of all; what the judge
    left unrated is counted."""
    groups = defaultdict(list)
    for row in ratings:
        groups[row["category"]].append(row["score"])
    for row in ratings:
        groups[f"turn {row['turn']}"].append(row["score"])
    for row in ratings:
        groups["average"].append(row["score"])
    means = {}
    for key, scores in groups.items():
        means[key] = math.nan if np.isnan(scores).all() else float(np.nanmean(scores))
    unrated = sum(math.isnan(row["score"]) for row in ratings)
    return {**means, "rated": len(ratings) - unrated, "unrated": unrated}

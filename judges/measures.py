"""Measures: pure functions from judgements to the scores that papers report.

A judgement is one annotation in AlpacaEval's format: instruction, output_1 of generator_1 (the baseline), output_2 of
generator_2 (the model), preference from 1 (baseline better) to 2 (model better), 1.5 or 0 for a draw, null for none.
"""
import csv
import math
from collections import defaultdict

import numpy as np

from core.rows import fail, is_number, read_json_list

# ---------------------------------------------------------------------------------------------------- means and their errors


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of values [prompts, samples] and its standard error over prompts: samples of one prompt are not independent."""
    per_prompt = values.mean(axis=1)
    return float(per_prompt.mean()), float(per_prompt.std(ddof=1) / math.sqrt(len(per_prompt))) if len(per_prompt) > 1 else math.nan


def bootstrap_interval(values: np.ndarray) -> list[float]:
    """95 % percentile interval of the mean of values [prompts, samples], prompts drawn anew 9 999 times."""
    from scipy.stats import bootstrap
    per_prompt = values.mean(axis=1)
    if len(per_prompt) < 2:
        return [math.nan, math.nan]
    found = bootstrap((per_prompt,), np.mean, method="percentile", batch=500, rng=np.random.default_rng(0)).confidence_interval
    return [float(found.low), float(found.high)]


def paired_p(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p-value of "the same mean" for two policies on the same prompts [prompts, samples]: signs of the prompts'
    differences flipped at random, 9 999 times, or in every way where there are no more than that."""
    from scipy.stats import permutation_test
    difference = first.mean(axis=1) - second.mean(axis=1)
    return float(permutation_test((difference,), np.mean, permutation_type="samples", batch=500, rng=np.random.default_rng(0)).pvalue)


def label_quality(preference: np.ndarray, flagged: np.ndarray) -> dict:
    """How right self-labels are, from gold's preferences for `chosen` [N] and which pairs training flagged (bool [N])."""
    wrong = 1 - preference
    return {"pairs": len(wrong), "accuracy": float(1 - wrong.mean()), "flagged": int(flagged.sum()),
            "wrong_among_flagged": float(wrong[flagged].mean()) if flagged.any() else None, "wrong": float(wrong.mean())}


# -------------------------------------------------------------------------------------------------------------- AlpacaEval


def read_annotations(path: str) -> list[dict]:
    """A file of annotations (.json or .json.gz), checked."""
    rows = read_json_list(path, "output_1", "output_2", "generator_1", "generator_2")
    for number, row in enumerate(rows, 1):
        value = row.get("preference")
        if value is not None and value == value and not (is_number(value) and (1 <= value <= 2 or value == 0)):  # NaN: no verdict
            fail(f"{path}: entry {number}: 'preference' must be from 1 to 2, 0 for a draw or null, found {value!r:.60}")
    if len({(row["generator_1"], row["generator_2"]) for row in rows}) > 1:
        fail(f"{path}: holds several pairs of generators; one baseline and one model are compared")
    return rows


def preferences_of(annotations: list[dict]) -> np.ndarray:
    """Preferences for output_2 in [0, 1], NaN where there is none."""
    values = np.array([row.get("preference") for row in annotations], dtype=float)
    return np.where(values == 0, 1.5, values) - 1


def win_rate(annotations: list[dict]) -> dict:
    """AlpacaEval's win rate in percent with its standard error, and what the leaderboard shows beside it."""
    all_of = preferences_of(annotations)
    p = all_of[~np.isnan(all_of)]
    if not len(p):
        fail("no annotation has a preference")
    return {"win_rate": 100 * float(p.mean()), "standard_error": 100 * float(p.std(ddof=1)) / math.sqrt(len(p)) if len(p) > 1 else math.nan,
            "n_wins": int((p > 0.5).sum()), "n_wins_base": int((p < 0.5).sum()), "n_draws": int((p == 0.5).sum()), "n_total": len(p),
            "n_missing": len(all_of) - len(p), "discrete_win_rate": 100 * float(((p > 0.5) + 0.5 * (p == 0.5)).mean()),
            "avg_length": int(np.mean([len(row["output_2"]) for row in annotations]))}


def read_difficulty(path: str) -> tuple[np.ndarray, list[dict]]:
    """(difficulty of AlpacaEval's instructions in their order, rows of gamed baselines) of instruction_difficulty.csv, which
    has none of the latter, or of df_gamed.csv."""
    difficulty, gamed = {}, []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                index = int(row["index"] if "index" in row else row[""])
                difficulty.setdefault(index, float(row["instruction_difficulty"]))
                if row.get("preference"):
                    gamed.append({key: float(row[key]) for key in ("instruction_difficulty", "std_delta_len", "preference")})
        return np.array([difficulty[i] for i in range(len(difficulty))]), gamed
    except (KeyError, ValueError) as error:
        fail(f"{path}: needs the columns index and instruction_difficulty, index from 0 ({error!r})")


def length_controlled(annotations: list[dict], difficulty: tuple[np.ndarray, list[dict]] | None = None) -> dict:
    """AlpacaEval 2's length-controlled win rate in percent (Dubois et al. 2024): the preference predicted at equal length by

        P(model better) = σ(a·tanh(Δlength / its s.d.) + b·difficulty + c),   Δlength = characters of baseline − model

    fitted to the preferences by L1 logistic regression, its strength chosen by 5-fold cross-validation. Without
    `difficulty` the middle term is left out. Gamed baselines in it pull c to 0, at the published weight of 0.2.
    The published standard error is that of the predictions over instructions; where these do not differ, for want of
    difficulties, it is the bootstrap's instead.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import, and needed here alone
    from sklearn.model_selection import GroupKFold
    if annotations[0]["generator_1"] == annotations[0]["generator_2"]:
        return {"length_controlled_winrate": 50.0, "lc_standard_error": 0.0}
    delta = np.array([len(row["output_1"]) - len(row["output_2"]) for row in annotations], dtype=float)
    own = [np.tanh(delta / (delta.std(ddof=1) or 1.0)), np.ones(len(delta))]
    p, gamed = preferences_of(annotations), []
    if difficulty is not None:
        if len(difficulty[0]) != len(own[0]):
            fail(f"{len(own[0])} annotations, but the difficulty of {len(difficulty[0])} instructions, which must be theirs in their order")
        own.insert(1, difficulty[0])
        gamed = [[math.tanh(row["std_delta_len"]), row["instruction_difficulty"], 0.0] for row in difficulty[1]]
    at_equal_length = np.column_stack([np.zeros(len(delta)), *own[1:]])
    x = np.vstack([*([gamed] if gamed else []), np.column_stack(own)])
    p = np.concatenate([[row["preference"] for row in difficulty[1]] if gamed else [], p])
    weight = np.concatenate([np.full(len(gamed), 0.2 / 2), np.ones(len(delta))])  # there are two gamed baselines
    known = ~np.isnan(p)
    x, p, weight = x[known], p[known], weight[known]
    if len(p) < 5:
        return {"length_controlled_winrate": math.nan, "lc_standard_error": math.nan}

    def fit(rows: np.ndarray, strength: float) -> np.ndarray:
        """Coefficients; a preference p is a win of weight p and a loss of weight 1 − p."""
        model = LogisticRegression(l1_ratio=1.0, solver="liblinear", C=strength, fit_intercept=False, random_state=123)
        return model.fit(np.vstack([x[rows], x[rows]]), np.repeat([1, 0], len(rows)),
                         sample_weight=np.concatenate([p[rows], 1 - p[rows]]) * np.tile(weight[rows], 2)).coef_[0]

    def log_loss(rows: np.ndarray, coefficients: np.ndarray) -> float:
        z = x[rows] @ coefficients
        return float((weight[rows] * (np.logaddexp(0, z) - p[rows] * z)).mean())
    strengths = np.logspace(-4, 4, 10)
    folds = list(GroupKFold(5).split(x, groups=np.arange(len(x))))
    losses = [np.mean([log_loss(test, fit(train, c)) for train, test in folds]) for c in strengths]
    best = strengths[int(np.argmin(losses))]

    def predict(rows: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-at_equal_length @ fit(rows, best)))
    everyone = np.arange(len(x))
    predicted = predict(everyone)
    error = predicted.std(ddof=1) / math.sqrt(len(predicted))
    if difficulty is None:
        dice = np.random.default_rng(0)
        error = np.std([predict(dice.choice(everyone, len(x))).mean() for _ in range(200)], ddof=1)
    return {"length_controlled_winrate": 100 * float(predicted.mean()), "lc_standard_error": 100 * float(error)}


def leaderboard(paths: list[str], difficulty_path: str | None) -> dict[str, dict]:
    """AlpacaEval's scores of every file of annotations, by the model's name."""
    difficulty = read_difficulty(difficulty_path) if difficulty_path else None
    scores = {}
    for path in paths:
        annotations = read_annotations(path)
        name = annotations[0]["generator_2"]
        scores[path if name in scores else name] = {**win_rate(annotations), **length_controlled(annotations, difficulty)}
    return scores


# ---------------------------------------------------------------------------------------------------------------- MT-Bench


def mt_bench_scores(ratings: list[dict]) -> dict:
    """Means of ratings {category, turn, score}: by category, by turn and of all; what the judge left unrated is counted."""
    groups = defaultdict(list)
    for key in (lambda r: r["category"], lambda r: f"turn {r['turn']}", lambda r: "average"):
        for row in ratings:
            groups[key(row)].append(row["score"])
    means = {key: float(np.nanmean(v)) if not np.isnan(v).all() else math.nan for key, v in groups.items()}
    return {**means, "rated": sum(not math.isnan(r["score"]) for r in ratings), "unrated": sum(math.isnan(r["score"]) for r in ratings)}

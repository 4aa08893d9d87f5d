"""Means and paired differences over seeds, for the tables and pictures of bench/.

    mean ± t · s / √n        n seeds, t the 97.5 % point of Student's distribution of n − 1
    p                        two-sided, of the t-test that the mean is 0
"""
import math
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student


class Interval(NamedTuple):
    """A mean over seeds, half the width of its 95 % t-interval, and p; the last two are NaN where
    one seed or no spread leaves them unknown."""
    mean: float
    half: float
    p: float

    def __str__(self) -> str:
        return self.text("")

    def text(self, sign: str = "+") -> str:
        """mean ± half; with `sign` a mean above 0 is marked as such. Where nothing differs, –."""
        if self.mean == 0 and math.isnan(self.half):
            return "–"
        half = "?" if math.isnan(self.half) else f"{self.half:.3f}"
        return f"{self.mean:{sign}.3f} ± {half}".replace("-", "−")


def interval(values) -> Interval:
    """Of values [n], one a seed."""
    values = np.asarray(values, float)
    n = len(values)
    error = values.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0
    # no spread but rounding's
    if error < 1e-12:
        return Interval(float(values.mean()), math.nan, math.nan)
    half = student.ppf(0.975, n - 1) * error
    p = 2 * student.sf(abs(values.mean()) / error, n - 1)
    return Interval(float(values.mean()), float(half), float(p))


def is_ahead(difference: Interval) -> bool:
    """Whether its interval lies above 0."""
    return difference.p < 0.05 and difference.mean > 0


def is_behind(difference: Interval) -> bool:
    """Whether its interval lies below 0."""
    return difference.p < 0.05 and difference.mean < 0


def by_chance(differences: list[Interval]) -> str:
    """How many intervals leave 0 out, and how many would without any effect."""
    tested = [d for d in differences if not math.isnan(d.p)]
    found = sum(d.p < 0.05 for d in tested)
    return f"{found} of {len(tested)} differ at 95 %; {0.05 * len(tested):.1f} would by chance."


def draw_curve(axis, label: str, points: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """A method on a matplotlib axis: the mean score of each of its points, with its interval,
    against the root of the mean KL; points: KL and score [n], one a seed."""
    x = [math.sqrt(np.mean(kl)) for kl, _ in points]
    mean, half, _ = zip(*(interval(scores) for _, scores in points))
    marker = "os^Dv<>Xp"[len(axis.containers) % 9]
    axis.errorbar(x, mean, half, label=label, marker=marker, ms=6, lw=1.6, capsize=2)

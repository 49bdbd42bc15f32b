"""How far two judges, or a judge and people, agree; and what a judge's scores are off by."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from srt_cli.stats.rates import Estimate

BOOTSTRAP_DRAWS: Final = 2000

Values = npt.NDArray[np.float64]


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float | None:
    """Cohen's κ = (P_o - P_e)/(1 - P_e), with P_e from each rater's own shares.

    Null without items, and where both always say the same one thing (P_e = 1).
    """
    if len(a) != len(b):
        raise ValueError(f"two raters of the same items are needed: {len(a)} and {len(b)}")
    if not a:
        return None
    categories = {value: place for place, value in enumerate(dict.fromkeys([*a, *b]))}
    table = np.zeros((len(categories), len(categories)))
    for left, right in zip(a, b, strict=True):
        table[categories[left], categories[right]] += 1
    table /= len(a)
    observed = float(np.trace(table))
    expected = float(table.sum(axis=0) @ table.sum(axis=1))
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(ratings: Sequence[Sequence[Hashable | None]]) -> float | None:
    """Krippendorff's α for nominal data: 1 - D_o/D_e from the coincidence matrix.

    `ratings` holds one sequence a rater, None where an item was not rated; items with fewer than
    two ratings fall out. Null when nothing varies or nothing can be paired.
    """
    categories = {
        value: place
        for place, value in enumerate(dict.fromkeys(v for r in ratings for v in r if v is not None))
    }
    coincidences = np.zeros((len(categories), len(categories)))
    for item in zip(*ratings, strict=True):
        given = [categories[value] for value in item if value is not None]
        if len(given) < 2:
            continue
        counts = np.bincount(given, minlength=len(categories)).astype(np.float64)
        pairs = np.outer(counts, counts) - np.diag(counts)
        coincidences += pairs / (len(given) - 1)
    totals = coincidences.sum(axis=0)  # (categories,)
    n = float(totals.sum())
    expected = float(n**2 - (totals**2).sum())
    if n < 2 or expected == 0:
        return None
    observed = n - float(np.trace(coincidences))
    return 1 - (n - 1) * observed / expected


@dataclass(frozen=True)
class Agreement:
    """How often a judge says what the labels say."""

    accuracy: Estimate
    """Over all items; a tie agrees only with a tie."""
    without_ties: Estimate | None
    """Over the items where both sides prefer something."""
    kappa: float | None
    kappa_interval: tuple[float, float] | None
    alpha: float | None
    """Krippendorff's, nominal over win, tie and loss."""
    n: int


def agreement(judge: Sequence[float], labels: Sequence[float], seed: int = 0) -> Agreement | None:
    """Compare preferences (above, at, below 1/2) with labels of the same items.

    Intervals are percentiles of 2,000 bootstrap draws over items; null without items.
    """
    if not judge:
        return None
    said: Values = np.sign(np.asarray(judge, dtype=np.float64) - 0.5)  # (n,)
    truth: Values = np.sign(np.asarray(labels, dtype=np.float64) - 0.5)  # (n,)
    decided = (said != 0) & (truth != 0)
    same = (said == truth).astype(np.float64)
    without = bootstrap_mean(same[decided], seed) if decided.any() else None
    kappa = cohen_kappa(said.tolist(), truth.tolist())
    interval = None
    if kappa is not None:
        codes = (3 * (said + 1) + truth + 1).astype(np.int64)  # (n,)
        interval = bootstrap_interval(len(codes), lambda draw: _kappa_of(codes[draw]), seed)
    alpha = krippendorff_alpha([said.tolist(), truth.tolist()])
    return Agreement(bootstrap_mean(same, seed), without, kappa, interval, alpha, len(said))


def _kappa_of(codes: npt.NDArray[np.int64]) -> float:
    """Cohen's κ of pairs of three categories, coded 3·a + b; 1 where a draw holds one category."""
    table = np.bincount(codes, minlength=9).reshape(3, 3) / len(codes)
    expected = float(table.sum(axis=0) @ table.sum(axis=1))
    return 1.0 if expected == 1 else (float(np.trace(table)) - expected) / (1 - expected)


def bootstrap_mean(items: npt.ArrayLike, seed: int = 0) -> Estimate:
    """A mean with the 2.5 % and 97.5 % percentiles of 2,000 seeded draws over its items (n,)."""
    values: Values = np.asarray(items, dtype=np.float64)
    low, high = bootstrap_interval(len(values), lambda draw: float(values[draw].mean()), seed)
    return Estimate(float(values.mean()), low, high, len(values))


def bootstrap_interval(
    n: int, statistic: Callable[[npt.NDArray[np.int64]], float], seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a statistic of item numbers, drawn with replacement, all rows together."""
    random = np.random.default_rng(seed)
    draws = [statistic(random.integers(0, n, n)) for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def distance_skewness(errors: Sequence[float]) -> float:
    """How one-sided errors are: 0 symmetric around 0, 1 all of one sign and size.

    dskew = 1 - Σ_ij |e_i - e_j| / Σ_ij |e_i + e_j|, 0 where the denominator is 0 (arXiv 2402.11436).
    """
    e: Values = np.asarray(errors, dtype=np.float64)  # (n,)
    apart = float(np.abs(e[:, None] - e[None, :]).sum())
    summed = float(np.abs(e[:, None] + e[None, :]).sum())
    return 1 - apart / summed if summed else 0.0

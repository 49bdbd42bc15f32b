"""Rates and their uncertainty: pass rates, win rates, paired differences. All intervals are 95 %."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE: Final = 0.95
DETECTABLE: Final = 2.8
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval and the number of items it rests on."""

    value: float
    low: float
    high: float
    n: int
    standard_error: float | None = None


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over the same items, its t interval, and the exact McNemar p of the discordant."""

    difference: Estimate
    only_a: int
    only_b: int
    p_value: float
    smallest_detectable: float
    """The difference that this many items would show in 80 % of cases: 2.8 sd(d)/√n."""


def pass_rate(passed: Sequence[bool]) -> Estimate | None:
    """Share passed with Wilson's score interval, which holds near 0 and 1; null without items.

    scipy.stats.binomtest(...).proportion_ci(method="wilson").
    """
    n = len(passed)
    if not n:
        return None
    hits = sum(passed)
    interval = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(hits / n, float(interval.low), float(interval.high), n)


def mean_with_error(values: Sequence[float]) -> Estimate | None:
    """Mean, standard error sd / sqrt(n) with n - 1 in the variance, and the t interval.

    Null without items; with a single one the interval is unknown and spans the possible 0 to 1.
    """
    array: Values = np.asarray(values, dtype=np.float64)  # (n,)
    n = len(array)
    if not n:
        return None
    mean = float(array.mean())
    if n == 1:
        return Estimate(mean, 0.0, 1.0, 1)
    error = float(array.std(ddof=1) / np.sqrt(n))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return Estimate(mean, mean - reach, mean + reach, n, error)


def bounded(value: float, error: float, n: int) -> Estimate:
    """A share with a standard error of its own: value ± 1.96 SE, within 0 and 1."""
    reach = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * error
    return Estimate(value, max(0.0, value - reach), min(1.0, value + reach), n, error)


def clustered_error(values: Sequence[float], clusters: Sequence[str]) -> float | None:
    """Standard error of a mean whose items come in clusters (several samples of one prompt).

    SE = (1/N)·√(C/(C-1)·Σ_c (Σ_{i in c} (y_i - mean))²) over C clusters of N items; null for one
    cluster. With one item a cluster it is sd/√N.
    """
    array: Values = np.asarray(values, dtype=np.float64)  # (N,)
    _, membership = np.unique(np.asarray(clusters), return_inverse=True)  # (N,)
    count = int(membership.max()) + 1
    if count < 2:
        return None
    sums = np.bincount(membership, weights=array - array.mean())  # (C,)
    return float(np.sqrt(count / (count - 1) * (sums**2).sum()) / len(array))


def win_rate(preferences: Sequence[float]) -> Estimate | None:
    """Mean preference for the model over items, each item the mean of its orders (0 to 1)."""
    estimate = mean_with_error(preferences)
    if estimate is None:
        return None
    low, high = max(0.0, estimate.low), min(1.0, estimate.high)
    return Estimate(estimate.value, low, high, estimate.n, estimate.standard_error)


def discrete_win_rate(preferences: Sequence[float]) -> Estimate | None:
    """Wins count 1, exact ties 1/2: mean of [y > 1/2] + [y = 1/2] / 2, with Wilson's interval.

    Null without items. A tie enters the interval as half a success.
    """
    if not preferences:
        return None
    return _wilson(sum((y > 0.5) + 0.5 * (y == 0.5) for y in preferences), len(preferences))


def strict_win_rate(first: Sequence[float], second: Sequence[float]) -> Estimate | None:
    """MT-Bench's rule: a win only when both orders say so, a loss likewise, all else a tie (1/2)."""
    if not len(first):
        return None
    pairs = list(zip(first, second, strict=True))
    wins = sum(a > 0.5 and b > 0.5 for a, b in pairs)
    losses = sum(a < 0.5 and b < 0.5 for a, b in pairs)
    return _wilson(wins + (len(pairs) - wins - losses) / 2, len(pairs))


def _wilson(hits: float, n: int) -> Estimate:
    """Wilson's score interval, for half successes too (Wilson 1927)."""
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    share = hits / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Estimate(share, max(0.0, middle - reach), min(1.0, middle + reach), n)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference | None:
    """Difference a - b over the same items.

    mean(d) ± t * sd(d) / sqrt(n); McNemar's exact test is the binomial test of the items where one
    side is above 1/2 and the other is not (scipy.stats.binomtest). Null with fewer than two items.
    """
    if len(a) != len(b):
        raise ValueError(f"paired figures need the same items: {len(a)} and {len(b)}")
    if len(a) < 2:
        return None
    differences = [x - y for x, y in zip(a, b, strict=True)]
    estimate = mean_with_error(differences)
    assert estimate is not None
    only_a = sum(x > 0.5 >= y for x, y in zip(a, b, strict=True))
    only_b = sum(y > 0.5 >= x for x, y in zip(a, b, strict=True))
    discordant = only_a + only_b
    p_value = float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0
    smallest = DETECTABLE * (estimate.standard_error or 0.0)
    return PairedDifference(estimate, only_a, only_b, p_value, smallest)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several comparisons: p values adjusted, in their order.

    Sorted ascending, p_(k) becomes the running maximum of (m - k)·p_(k), k from 0, at most 1.
    """
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for k, place in enumerate(np.argsort(np.asarray(p_values), kind="stable")):
        running = max(running, (len(p_values) - k) * p_values[place])
        adjusted[place] = min(1.0, running)
    return adjusted


@dataclass(frozen=True)
class Position:
    """How far a judge follows the order in which answers are shown."""

    consistency: float
    """Share of items with the same verdict in both orders."""
    first_slot_rate: float
    """Share of calls that the answer shown first wins; ties count 1/2. 0.5 is unbiased."""
    shown_first: Estimate | None
    """Win rate of the model when its answer was shown first."""
    shown_second: Estimate | None
    gap: Estimate | None
    """Mean of p(shown second) - p(shown first), paired; above 0 the second slot is favoured."""
    n: int


def position_bias(shown_first: Sequence[float], shown_second: Sequence[float]) -> Position | None:
    """Compare preferences for one model (0 to 1, un-swapped) when it was shown first and second.

    consistency = mean[sign(p1 - 1/2) = sign(p2 - 1/2)]; first slot = mean of p1 and 1 - p2, discrete.
    """
    first: Values = np.asarray(shown_first, dtype=np.float64)  # (n,)
    second: Values = np.asarray(shown_second, dtype=np.float64)  # (n,)
    if not len(first):
        return None
    signs = np.sign(first - 0.5), np.sign(second - 0.5)
    wins = np.concatenate([(signs[0] + 1) / 2, (1 - signs[1]) / 2])  # (2n,)
    return Position(
        consistency=float((signs[0] == signs[1]).mean()),
        first_slot_rate=float(wins.mean()),
        shown_first=win_rate(first.tolist()),
        shown_second=win_rate(second.tolist()),
        gap=mean_with_error((second - first).tolist()) if len(first) > 1 else None,
        n=len(first),
    )

"""Rates and their uncertainty: pass rates, win rates, paired differences. All intervals are 95 %.

Bootstraps draw the items again: 2,000 seeded draws with replacement, and their percentiles.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, ndtri, stdtrit

from srt_cli.stats.counting import wilson

CONFIDENCE: Final = 0.95
DETECTABLE: Final = 2.8
DRAWS: Final = 2000
PERCENTILES: Final = (2.5, 97.5)
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
class Doubt:
    """Why a figure should be read with care; figures with the same topic are doubted alike."""

    topic: str
    text: str


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
    """Share passed with Wilson's score interval, which holds near 0 and 1; None without items."""
    return _wilson(sum(passed), len(passed)) if passed else None


def mean_with_error(
    values: Sequence[float], possible: tuple[float, float] = (0.0, 1.0)
) -> Estimate | None:
    """Mean, standard error sd / sqrt(n) with n - 1 in the variance, and the t interval.

    None without items; with a single one nothing is known, and the interval is all that is possible.
    """
    array: Values = np.asarray(values, dtype=np.float64)  # (n,)
    n = len(array)
    if not n:
        return None
    mean = float(array.mean())
    if n == 1:
        return Estimate(mean, *possible, 1)
    error = float(array.std(ddof=1) / np.sqrt(n))
    reach = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    return Estimate(mean, mean - reach, mean + reach, n, error)


def rate_of(values: Sequence[float]) -> Estimate | None:
    """Mean of passes: Wilson's interval where each is 0 or 1, else the t interval within 0 and 1."""
    if all(value in (0, 1) for value in values):
        return pass_rate([value == 1 for value in values])
    found = mean_with_error(values)
    return None if found is None else within(found)


def bootstrapped(values: Values, statistic: Callable[[Values], float], seed: int = 0) -> Estimate:
    """A statistic of values (n,) with its percentile interval and the spread of its draws."""
    random = np.random.default_rng(seed)
    n = len(values)
    draws = np.array([statistic(values[random.integers(0, n, n)]) for _ in range(DRAWS)])
    low, high = np.percentile(draws, PERCENTILES)
    return Estimate(statistic(values), float(low), float(high), n, float(draws.std(ddof=1)))


def bootstrap_mean(items: npt.ArrayLike, seed: int = 0) -> Estimate:
    """A mean with its percentile interval over its items (n,)."""
    return bootstrapped(
        np.asarray(items, dtype=np.float64), lambda drawn: float(drawn.mean()), seed
    )


def jackknife(value: float, left_out: Sequence[float]) -> Estimate:
    """A figure of n items with the error of its n values that leave one item out each.

    SE = √((n-1)/n·Σ(θ_(i) - mean θ)²), interval value ± 1.96 SE. For figures that repeated items
    would change by themselves, such as counts of different words, which a bootstrap gets wrong.
    """
    without: Values = np.asarray(left_out, dtype=np.float64)  # (n,)
    n = len(without)
    error = float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))
    return Estimate(value, value - 1.96 * error, value + 1.96 * error, n, error)


def ratio_of_means(a: Sequence[float], b: Sequence[float]) -> Estimate | None:
    """Mean of a over mean of b, of the same items, with the error of the delta method.

    r = Σa/Σb, SE = sd(a - r·b)/(√n·mean b), interval r ± 1.96 SE; None where b is 0.
    """
    above: Values = np.asarray(a, dtype=np.float64)  # (n,)
    below: Values = np.asarray(b, dtype=np.float64)  # (n,)
    n = len(above)
    if not n or below.sum() == 0:
        return None
    ratio = float(above.sum() / below.sum())
    if n == 1:
        return Estimate(ratio, ratio, ratio, 1)
    error = float((above - ratio * below).std(ddof=1) / (math.sqrt(n) * below.mean()))
    return Estimate(ratio, ratio - 1.96 * error, ratio + 1.96 * error, n, error)


def bounded(value: float, error: float, n: int) -> Estimate:
    """A share with a standard error of its own: value ± 1.96 SE, within 0 and 1."""
    reach = float(ndtri((1 + CONFIDENCE) / 2)) * error
    return Estimate(value, max(0.0, value - reach), min(1.0, value + reach), n, error)


def within(estimate: Estimate, low: float = 0.0, high: float = 1.0) -> Estimate:
    """The same figure with its interval cut to what is possible."""
    return replace(estimate, low=max(low, estimate.low), high=min(high, estimate.high))


def clustered_error(values: Sequence[float], clusters: Sequence[str]) -> float | None:
    """Standard error of a mean whose items come in clusters (several samples of one prompt).

    SE = (1/N)·√(C/(C-1)·Σ_c (Σ_{i in c} (y_i - mean))²) over C clusters of N items; None for one
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
    """Mean preference for the model over items, each item the mean of its orders (0 to 1).

    The t interval, or Wilson's where every item is won or every item lost.
    """
    estimate = mean_with_error(preferences)
    if estimate is None:
        return None
    if estimate.standard_error == 0 and estimate.value in (0.0, 1.0):
        # No spread, yet not certain: what Wilson's interval leaves possible.
        sure = _wilson(estimate.value * estimate.n, estimate.n)
        return replace(estimate, low=sure.low, high=sure.high)
    return within(estimate)


def discrete_win_rate(preferences: Sequence[float]) -> Estimate | None:
    """Wins count 1, exact ties 1/2: mean of [y > 1/2] + [y = 1/2] / 2, with Wilson's interval.

    None without items. A tie enters the interval as half a success.
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
    return Estimate(hits / n, *wilson(hits, n), n)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference | None:
    """Difference a - b over the same items.

    mean(d) ± t * sd(d) / sqrt(n); McNemar's exact test is the binomial test of the items where one
    side is above 1/2 and the other is not (with none, 1). None with fewer than two items.
    """
    if len(a) != len(b):
        raise ValueError(f"paired figures need the same items: {len(a)} and {len(b)}")
    if len(a) < 2:
        return None
    differences = [x - y for x, y in zip(a, b, strict=True)]
    estimate = mean_with_error(differences, (-1.0, 1.0))
    assert estimate is not None
    only_a = sum(x > 0.5 >= y for x, y in zip(a, b, strict=True))
    only_b = sum(y > 0.5 >= x for x, y in zip(a, b, strict=True))
    discordant = only_a + only_b
    # Two-sided at one half: the distribution is symmetric, so both tails are alike.
    p_value = min(1.0, 2 * float(bdtr(min(only_a, only_b), discordant, 0.5)))
    smallest = DETECTABLE * (estimate.standard_error or 0.0)
    return PairedDifference(estimate, only_a, only_b, p_value, smallest)


def difference_to_half(values: Sequence[float]) -> PairedDifference | None:
    """A contestant's preferences against the reference's own 1/2: the reference ties with itself.

    Mean of y - 1/2 with its t interval; the exact sign test of wins against losses, which is McNemar's
    of y and 1 - y. None with fewer than two items.
    """
    mirrored = paired_difference(values, [1 - value for value in values])
    if mirrored is None:
        return None
    found = mirrored.difference
    error = None if found.standard_error is None else found.standard_error / 2
    half = Estimate(found.value / 2, found.low / 2, found.high / 2, found.n, error)
    return replace(mirrored, difference=half, smallest_detectable=mirrored.smallest_detectable / 2)


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

    consistency: Estimate | None
    """Share of items with the same verdict in both orders; None where each was judged in one."""
    first_slot_rate: Estimate
    """Share of calls that the answer shown first wins; ties count 1/2. 0.5 is unbiased."""
    shown_first: Estimate | None
    """Win rate of the model when its answer was shown first."""
    shown_second: Estimate | None
    gap: Estimate | None
    """p(shown second) - p(shown first): of the same items, or, where each was judged in one order, of
    different ones. Above 0 the second slot is favoured."""
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
    consistency = pass_rate((signs[0] == signs[1]).tolist())
    # Both calls of an item are one draw: they are not independent of each other.
    first_slot = win_rate(((signs[0] + 1) / 4 + (1 - signs[1]) / 4).tolist())
    assert consistency is not None
    assert first_slot is not None
    return Position(
        consistency=consistency,
        first_slot_rate=first_slot,
        shown_first=win_rate(first.tolist()),
        shown_second=win_rate(second.tolist()),
        gap=mean_with_error((second - first).tolist(), (-1.0, 1.0)) if len(first) > 1 else None,
        n=len(first),
    )


def position_bias_apart(
    shown_first: Sequence[float], shown_second: Sequence[float]
) -> Position | None:
    """The same where each item was judged in one order only: two groups of different items.

    Gap = difference of the means, SE = √(s1²/n1 + s2²/n2) (Welch). None where a group has fewer than
    two items.
    """
    first, second = win_rate(shown_first), win_rate(shown_second)
    if first is None or second is None or min(first.n, second.n) < 2:
        return None
    error = math.hypot(first.standard_error or 0.0, second.standard_error or 0.0)
    gap = second.value - first.value
    slot = [(np.sign(p - 0.5) + 1) / 2 for p in shown_first]
    slot += [(1 - np.sign(p - 0.5)) / 2 for p in shown_second]
    rate = win_rate(slot)
    assert rate is not None
    return Position(
        consistency=None,
        first_slot_rate=rate,
        shown_first=first,
        shown_second=second,
        gap=Estimate(gap, gap - 1.96 * error, gap + 1.96 * error, first.n + second.n, error),
        n=first.n + second.n,
    )

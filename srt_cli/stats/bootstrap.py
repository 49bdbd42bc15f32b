"""Intervals by drawing the items again: 2,000 seeded draws with replacement, percentiles of 95 %."""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from srt_cli.stats.rates import Estimate

DRAWS: Final = 2000
PERCENTILES: Final = (2.5, 97.5)

Values = npt.NDArray[np.float64]


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

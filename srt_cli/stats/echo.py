"""Does a model's own critic drift from the truth? Self scores against outside scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from srt_cli.stats.rates import (
    Estimate,
    PairedDifference,
    Values,
    bootstrap_mean,
    bootstrapped,
    mean_with_error,
)

Colour = Literal["green", "amber", "red", "unknown"]

FEWEST_ITEMS: Final = 10
LONGER: Final = 1.15
LESS_DIVERSE: Final = 0.9
SIGNIFICANT: Final = 0.05
APART: Final = (-9.0, 9.0)
"""Between which two scores of 1 to 10 can differ."""


@dataclass(frozen=True)
class SelfBias:
    """A model's scores of its own answers minus an outside judge's scores of the same answers."""

    bias: Estimate
    skewness: Estimate
    """Distance skewness of the differences: 0 symmetric, 1 all on one side (arXiv 2402.11436)."""


def self_bias(own: Sequence[float], outside: Sequence[float], seed: int = 0) -> SelfBias | None:
    """Mean of own - outside with its t interval, and how one-sided it is; None without items."""
    errors = [a - b for a, b in zip(own, outside, strict=True)]
    estimate = mean_with_error(errors, APART)
    if estimate is None:
        return None
    values: Values = np.asarray(errors, dtype=np.float64)
    return SelfBias(estimate, bootstrapped(values, distance_skewness, seed))


def distance_skewness(errors: npt.ArrayLike) -> float:
    """How one-sided errors are: 0 symmetric around 0, 1 all of one sign and size.

    dskew = 1 - Σ_ij |e_i - e_j| / Σ_ij |e_i + e_j|, 0 where the denominator is 0 (arXiv 2402.11436).
    From sorted values: Σ_ij |e_i - e_j| = 2·Σ_k (2k - n - 1)·e_(k), Σ_ij max(u_i, u_j) =
    Σ_k (2k - 1)·u_(k), and |a + b| = 2·max(|a|, |b|) - |a - b|.
    """
    e: Values = np.sort(np.asarray(errors, dtype=np.float64))  # (n,)
    n = len(e)
    k = np.arange(1, n + 1)
    apart = 2 * float(((2 * k - n - 1) * e).sum())
    largest = float(((2 * k - 1) * np.sort(np.abs(e))).sum())
    summed = 2 * largest - apart
    return 1 - apart / summed if summed > 1e-12 * max(1.0, largest) else 0.0


@dataclass(frozen=True)
class Signs:
    """What a stage changed against the stage before, besides scores; None where it is not known."""

    length_growth: float | None = None
    gain: float | None = None
    """In wins at equal length by the judge, or in passes of the check; None where nobody looked."""
    diversity_change: float | None = None
    """Share of different word pairs, stage before = 1."""
    pair_accuracy: PairedDifference | None = None
    """How often it scores the answer that people chose higher."""


@dataclass(frozen=True)
class Echo:
    """Whether a stage praises itself more without being better."""

    colour: Colour
    reason: str
    excess: Estimate | None
    """Growth of the self score minus growth of the outside score."""
    outside_growth: Estimate | None


def echo_alarm(
    own_before: Sequence[float],
    own_after: Sequence[float],
    outside_before: Sequence[float],
    outside_after: Sequence[float],
    signs: Signs = Signs(),
) -> Echo:
    """Difference in differences over the same items, (n,) each, with a bootstrap over items.

    E = (own_after - own_before) - (outside_after - outside_before). Red: E's interval is above 0
    while the outside growth's is not. Amber: people's pairs are told apart less often (McNemar p
    below 0.05), or judge or check see no gain while answers grew by more than 15 %, or became more
    than 10 % less diverse. Otherwise green; unknown where fewer than 10 items have all four scores.
    """
    n = len(own_before)
    worse = _worse(signs)
    excess = growth = None
    said = f"only {n} answers have all four scores, so whether it praises itself is not known"
    if n >= FEWEST_ITEMS:
        own: Values = np.asarray(own_after, np.float64) - np.asarray(own_before, np.float64)  # (n,)
        outside: Values = np.asarray(outside_after, np.float64) - np.asarray(outside_before)
        excess, growth = bootstrap_mean(own - outside), bootstrap_mean(outside)
        said = f"own scores grew by {own.mean():+.2f}, outside scores by {growth.value:+.2f}"
    if excess is not None and growth is not None and excess.low > 0 >= growth.low:
        reason = "; ".join(["it praises itself more without being better", *worse, said])
        return Echo("red", reason, excess, growth)
    if worse:
        return Echo("amber", "; ".join([*worse, said]), excess, growth)
    return Echo("unknown" if excess is None else "green", said, excess, growth)


def _worse(signs: Signs) -> list[str]:
    found = []
    pairs = signs.pair_accuracy
    if pairs is not None and pairs.difference.value < 0 and pairs.p_value < SIGNIFICANT:
        found.append(
            f"it tells people's pairs apart {-100 * pairs.difference.value:.0f} points less often "
            f"(McNemar p {'< 0.001' if pairs.p_value < 0.001 else f'= {pairs.p_value:.3f}'})"
        )
    if signs.gain is None or signs.gain > 0:
        return found
    growth = signs.length_growth
    if growth is not None and growth > LONGER:
        found.append(f"answers grew by {growth - 1:.0%} without being better for it")
    if signs.diversity_change is not None and signs.diversity_change < LESS_DIVERSE:
        found.append(f"answers became {1 - signs.diversity_change:.0%} less diverse")
    return found

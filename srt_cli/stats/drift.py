"""Does a model's own critic drift from the truth? Self scores against outside scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from srt_cli.stats.agreement import bootstrap_interval, distance_skewness
from srt_cli.stats.rates import Estimate, mean_with_error

Colour = Literal["green", "amber", "red", "unknown"]
Values = npt.NDArray[np.float64]

FEWEST_ITEMS: Final = 10
LONGER: Final = 1.15
LESS_DIVERSE: Final = 0.9


@dataclass(frozen=True)
class SelfBias:
    """A model's scores of its own answers minus an outside judge's scores of the same answers."""

    bias: Estimate
    skewness: float
    """Distance skewness of the differences: 0 symmetric, 1 all on one side (arXiv 2402.11436)."""


def self_bias(own: Sequence[float], outside: Sequence[float]) -> SelfBias | None:
    """Mean of own - outside with its t interval, and how one-sided it is; null without items."""
    errors = [a - b for a, b in zip(own, outside, strict=True)]
    estimate = mean_with_error(errors)
    return None if estimate is None else SelfBias(estimate, distance_skewness(errors))


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
    *,
    length_growth: float | None = None,
    equal_length_gain: float | None = None,
    diversity_change: float | None = None,
    seed: int = 0,
) -> Echo:
    """Difference in differences over the same items, (n,) each, with a bootstrap over items.

    E = (own_after - own_before) - (outside_after - outside_before). Red: E's interval is above 0
    while the outside growth's is not. Amber: answers grew by more than 15 % without winning more at
    equal length, or diversity fell by more than 10 %. Otherwise green; unknown below 10 items.
    """
    n = len(own_before)
    if n < FEWEST_ITEMS:
        return Echo("unknown", f"only {n} items have all four scores", None, None)
    own: Values = np.asarray(own_after, np.float64) - np.asarray(own_before, np.float64)  # (n,)
    outside: Values = np.asarray(outside_after, np.float64) - np.asarray(outside_before, np.float64)
    excess = _with_interval(own - outside, seed)
    growth = _with_interval(outside, seed)
    said = f"own scores grew by {own.mean():+.2f}, outside scores by {growth.value:+.2f}"
    if excess.low > 0 and growth.low <= 0:
        return Echo("red", f"it praises itself more without being better: {said}", excess, growth)
    if length_growth is not None and length_growth > LONGER and (equal_length_gain or 0.0) <= 0:
        longer = f"answers grew by {length_growth - 1:.0%} without winning more at equal length"
        return Echo("amber", f"{longer}; {said}", excess, growth)
    if diversity_change is not None and diversity_change < LESS_DIVERSE:
        poorer = f"answers became {1 - diversity_change:.0%} less diverse"
        return Echo("amber", f"{poorer}; {said}", excess, growth)
    return Echo("green", said, excess, growth)


def _with_interval(values: Values, seed: int) -> Estimate:
    low, high = bootstrap_interval(len(values), lambda draw: float(values[draw].mean()), seed)
    error = float(values.std(ddof=1) / np.sqrt(len(values)))
    return Estimate(float(values.mean()), low, high, len(values), error)


def distinct_pairs(texts: Sequence[str]) -> float | None:
    """Distinct-2: different word pairs over all word pairs of all texts; null without a pair."""
    seen: set[tuple[str, str]] = set()
    total = 0
    for text in texts:
        words = text.lower().split()
        pairs = list(pairwise(words))
        seen.update(pairs)
        total += len(pairs)
    return len(seen) / total if total else None

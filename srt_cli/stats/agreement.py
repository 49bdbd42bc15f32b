"""How far two raters agree: verdicts of judges and people, and scores, with bootstrap intervals.

Every statistic here is counted from cells: the different pairs of ratings and how often each was
given. The bootstrap draws those counts again, so that 2,000 draws cost a few matrix products.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from srt_cli.stats.rates import (
    DRAWS,
    PERCENTILES,
    Estimate,
    Values,
    bootstrap_mean,
    mean_with_error,
)

MOST_RANKED: Final = 1500


@dataclass(frozen=True)
class Agreement:
    """How often a judge says what the labels say."""

    accuracy: Estimate
    """Over all items; a tie agrees only with a tie."""
    without_ties: Estimate | None
    """Over the items where both sides prefer something."""
    kappa: Estimate | None
    """Cohen's, over win, tie and loss."""
    weighted_kappa: Estimate | None
    """Cohen's with quadratic weights: a tie is half way between win and loss."""
    alpha: Estimate | None
    """Krippendorff's, nominal over win, tie and loss."""
    kendall: Estimate | None
    """Kendall's τ_b between the preferences themselves (0 to 1) and the labels."""
    n: int


def agreement(judge: Sequence[float], labels: Sequence[float], seed: int = 0) -> Agreement | None:
    """Compare preferences (above, at, below 1/2) with labels of the same items; None without items."""
    if not judge:
        return None
    said: Values = np.sign(np.asarray(judge, dtype=np.float64) - 0.5)  # (n,)
    truth: Values = np.sign(np.asarray(labels, dtype=np.float64) - 0.5)  # (n,)
    decided = (said != 0) & (truth != 0)
    same = (said == truth).astype(np.float64)
    cells = _count(said, truth, seed)
    return Agreement(
        accuracy=bootstrap_mean(same, seed),
        without_ties=bootstrap_mean(same[decided], seed) if decided.any() else None,
        kappa=_estimate(cells, _kappa),
        weighted_kappa=_estimate(cells, _quadratic_kappa),
        alpha=_estimate(cells, _nominal_alpha),
        kendall=_estimate(_count(judge, labels, seed), _kendall),
        n=len(said),
    )


@dataclass(frozen=True)
class ScoreAgreement:
    """How two sets of scores of the same items go together."""

    spearman: Estimate | None
    kendall: Estimate | None
    """τ_b, which allows for ties."""
    weighted_kappa: Estimate | None
    """Cohen's κ with quadratic weights: chance-corrected, and a bias counts against it."""
    alpha_ordinal: Estimate | None
    alpha_interval: Estimate | None
    mean_distance: Estimate | None
    """Mean of |a - b|."""
    n: int


def score_agreement(a: Sequence[float], b: Sequence[float], seed: int = 0) -> ScoreAgreement | None:
    """Compare two scores of each item; ranks over at most 1,500 items, drawn with a seed.

    A figure is None where one side never varies, all of it is None with fewer than two items.
    """
    if len(a) < 2:
        return None
    left: Values = np.asarray(a, dtype=np.float64)
    right: Values = np.asarray(b, dtype=np.float64)
    distance = mean_with_error(np.abs(left - right).tolist())
    if len(left) > MOST_RANKED:
        chosen = np.random.default_rng(seed).choice(len(left), MOST_RANKED, replace=False)
        left, right = left[chosen], right[chosen]
    cells = _count(left, right, seed)
    return ScoreAgreement(
        spearman=_estimate(cells, _spearman),
        kendall=_estimate(cells, _kendall),
        weighted_kappa=_estimate(cells, _quadratic_kappa),
        alpha_ordinal=_estimate(cells, _ordinal_alpha),
        alpha_interval=_estimate(cells, _interval_alpha),
        mean_distance=distance,
        n=len(a),
    )


@dataclass(frozen=True)
class _Cells:
    """The different pairs of ratings (a, b), (K,) each, and how often each was given.

    `counts` is (1 + draws, K): the data first, then what the bootstrap drew.
    """

    a: Values
    b: Values
    counts: Values

    @property
    def n(self) -> int:
        return int(self.counts[0].sum())


def _count(a: npt.ArrayLike, b: npt.ArrayLike, seed: int = 0, draws: int = DRAWS) -> _Cells:
    pairs = np.column_stack([np.asarray(a, np.float64), np.asarray(b, np.float64)])
    cells, counts = np.unique(pairs, axis=0, return_counts=True)
    n = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=draws)
    return _Cells(cells[:, 0], cells[:, 1], np.vstack([counts, drawn]).astype(np.float64))


def _estimate(cells: _Cells, statistic: Callable[[_Cells], Values]) -> Estimate | None:
    """A statistic of the data with its percentile interval; draws without one are left out."""
    values = statistic(cells)  # (1 + draws,), NaN where it is not defined
    if np.isnan(values[0]):
        return None
    drawn = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(drawn, PERCENTILES) if len(drawn) else (values[0], values[0])
    error = float(drawn.std(ddof=1)) if len(drawn) > 1 else None
    return Estimate(float(values[0]), float(low), float(high), cells.n, error)


def _ratio(above: Values, below: Values) -> Values:
    """Element by element, NaN where the denominator is 0."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 1e-12)


def _shares(cells: _Cells) -> tuple[Values, Values, Values]:
    """(draws, categories) of each rater's ratings, and (draws,) of the pairs that are the same."""
    categories = np.unique(np.concatenate([cells.a, cells.b]))
    weights = cells.counts / cells.n
    mine = weights @ (cells.a[:, None] == categories).astype(np.float64)
    theirs = weights @ (cells.b[:, None] == categories).astype(np.float64)
    return mine, theirs, weights @ (cells.a == cells.b).astype(np.float64)


def _kappa(cells: _Cells) -> Values:
    mine, theirs, same = _shares(cells)
    expected = (mine * theirs).sum(axis=1)
    return _ratio(same - expected, 1 - expected)


def _nominal_alpha(cells: _Cells) -> Values:
    """α = 1 - (n-1)·disagreeing words / (n² - Σ n_c²) over the n = 2N words of two raters."""
    mine, theirs, same = _shares(cells)
    n = 2 * cells.n
    pooled = (mine + theirs) / 2
    return 1 - (n - 1) / n * _ratio(1 - same, 1 - (pooled**2).sum(axis=1))


def _quadratic_kappa(cells: _Cells) -> Values:
    """κ_w = 1 - Σ w·o / Σ w·e with w = (a - b)².

    Which is 1 - mean (a - b)² / (var a + var b + (mean a - mean b)²).
    """
    weights = cells.counts / cells.n
    means = weights @ cells.a, weights @ cells.b
    variances = weights @ cells.a**2 - means[0] ** 2, weights @ cells.b**2 - means[1] ** 2
    observed = weights @ (cells.a - cells.b) ** 2
    return 1 - _ratio(observed, variances[0] + variances[1] + (means[0] - means[1]) ** 2)


def _interval_alpha(cells: _Cells) -> Values:
    draws = len(cells.counts)
    return _squared_alpha(cells, np.tile(cells.a, (draws, 1)), np.tile(cells.b, (draws, 1)))


def _ordinal_alpha(cells: _Cells) -> Values:
    """The interval α of mid-ranks among all ratings, which every draw has its own of."""
    values, codes = np.unique(np.concatenate([cells.a, cells.b]), return_inverse=True)
    mine, theirs = codes[: len(cells.a)], codes[len(cells.a) :]
    member = np.eye(len(values))
    given = cells.counts @ (member[mine] + member[theirs])  # (draws, values)
    ranks = given.cumsum(axis=1) - (given - 1) / 2
    return _squared_alpha(cells, ranks[:, mine], ranks[:, theirs])


def _squared_alpha(cells: _Cells, a: Values, b: Values) -> Values:
    """α with squared distances: 1 - (n-1)/n·Σ(a-b)² / Σ(x - mean)² over the n = 2N ratings x."""
    n = 2 * cells.n
    mean = (cells.counts * (a + b)).sum(axis=1, keepdims=True) / n
    spread = (cells.counts * ((a - mean) ** 2 + (b - mean) ** 2)).sum(axis=1)
    return 1 - (n - 1) / n * _ratio((cells.counts * (a - b) ** 2).sum(axis=1), spread)


def _spearman(cells: _Cells) -> Values:
    """Pearson's correlation of mid-ranks, ranked again in each draw."""
    ranks = []
    for values in (cells.a, cells.b):
        below = (values[:, None] < values).astype(np.float64) + 0.5 * (values[:, None] == values)
        ranks.append(cells.counts @ below - cells.n / 2)  # (draws, K), centred
    x, y = ranks
    product = (cells.counts * x * y).sum(axis=1)
    sizes = (cells.counts * x**2).sum(axis=1) * (cells.counts * y**2).sum(axis=1)
    return _ratio(product, np.sqrt(sizes))


def _kendall(cells: _Cells) -> Values:
    """τ_b = Σ sign(a_i - a_j)·sign(b_i - b_j) / √(pairs untied in a · pairs untied in b)."""
    a = np.sign(cells.a[:, None] - cells.a)  # (K, K)
    b = np.sign(cells.b[:, None] - cells.b)
    counted = [((cells.counts @ each) * cells.counts).sum(axis=1) for each in (a * b, a**2, b**2)]
    return _ratio(counted[0], np.sqrt(counted[1] * counted[2]))

"""Statistics counted row by row, without numpy: a correlation, and a two-by-two table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

Z: Final = 1.959964
"""The normal quantile of two-sided 95 %."""


@dataclass(slots=True)
class Moments:
    """Running sums for the correlation of two figures, in constant memory."""

    n: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """One more pair (Welford's update)."""
        n = self.n = self.n + 1
        dx, dy = x - self.mean_x, y - self.mean_y
        self.mean_x += dx / n
        self.mean_y += dy / n
        above = y - self.mean_y
        self.xx += dx * (x - self.mean_x)
        self.yy += dy * above
        self.xy += dx * above

    def merge(self, other: "Moments") -> None:
        """Add the pairs of another (Chan, Golub and LeVeque's update)."""
        n = self.n + other.n
        if not other.n:
            return
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.n * other.n / n
        self.xx += other.xx + dx * dx * weight
        self.yy += other.yy + dy * dy * weight
        self.xy += other.xy + dx * dy * weight
        self.mean_x += dx * other.n / n
        self.mean_y += dy * other.n / n
        self.n = n

    @property
    def correlation(self) -> float | None:
        """Pearson's r; None where one figure never varies."""
        # Rounding leaves a trace of spread where there is none.
        for squares, mean in ((self.xx, self.mean_x), (self.yy, self.mean_y)):
            if squares <= 1e-9 * (squares + self.n * mean**2):
                return None
        return self.xy / math.sqrt(self.xx * self.yy)


@dataclass
class Copied:
    """Refinements that repeat their draft, of all and of drafts that fail a check."""

    refined: int = 0
    copies: int = 0
    failing: int = 0
    failing_copies: int = 0
    checked: bool = False

    def add(self, copies: bool, draft_passes: float | None) -> None:
        """One refinement; `draft_passes` is None where no check was asked."""
        self.refined += 1
        self.copies += copies
        self.checked |= draft_passes is not None
        if draft_passes is not None and draft_passes < 1:
            self.failing += 1
            self.failing_copies += copies

    def merge(self, other: "Copied") -> None:
        """Add what was counted elsewhere."""
        self.refined += other.refined
        self.copies += other.copies
        self.failing += other.failing
        self.failing_copies += other.failing_copies
        self.checked |= other.checked

    @property
    def counts(self) -> tuple[int, int, bool]:
        """Refinements, copies, and whether only drafts that fail count: a good one may stay as it is."""
        if self.checked:
            return self.failing, self.failing_copies, True
        return self.refined, self.copies, False


@dataclass(frozen=True)
class Confusion:
    """A two-by-two table: the critic says good or bad, and the answer is good or bad."""

    good_called_good: int
    bad_called_good: int
    good_called_bad: int
    bad_called_bad: int

    @property
    def n(self) -> int:
        """How many verdicts were compared."""
        return (
            self.good_called_good
            + self.bad_called_good
            + self.good_called_bad
            + self.bad_called_bad
        )

    @property
    def accuracy(self) -> float | None:
        """Share of right verdicts; None without any."""
        return (self.good_called_good + self.bad_called_bad) / self.n if self.n else None

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean of the two classes' accuracies, 0.5 for a constant critic; None if a class is empty."""
        good = self.good_called_good + self.good_called_bad
        bad = self.bad_called_good + self.bad_called_bad
        if not good or not bad:
            return None
        return (self.good_called_good / good + self.bad_called_bad / bad) / 2

    @property
    def smaller_class(self) -> int:
        """How many answers are good, or how many bad, whichever are fewer."""
        good = self.good_called_good + self.good_called_bad
        return min(good, self.n - good)

    @property
    def balanced_interval(self) -> tuple[float, float] | None:
        """95 % of the balanced accuracy; None if a class is empty.

        Two independent shares, each with Wilson's interval, put together by Newcombe's square-and-add
        (1998, method 10).
        """
        middle = self.balanced_accuracy
        if middle is None:
            return None
        good = self.good_called_good + self.good_called_bad
        bad = self.bad_called_good + self.bad_called_bad
        below = above = 0.0
        for hits, n in ((self.good_called_good, good), (self.bad_called_bad, bad)):
            low, high = wilson(hits, n)
            below += (hits / n - low) ** 2
            above += (high - hits / n) ** 2
        return max(0.0, middle - math.sqrt(below) / 2), min(1.0, middle + math.sqrt(above) / 2)

    @property
    def constant(self) -> bool:
        """Whether the critic said the same of every answer, which tells nothing."""
        called_good = self.good_called_good + self.bad_called_good
        return self.n > 1 and called_good in (0, self.n)


def confusion(says: Sequence[bool], is_: Sequence[bool]) -> Confusion:
    """Count verdicts (`says` good) against the truth (`is_` good), item by item."""
    pairs = list(zip(says, is_, strict=True))
    return Confusion(
        good_called_good=pairs.count((True, True)),
        bad_called_good=pairs.count((True, False)),
        good_called_bad=pairs.count((False, True)),
        bad_called_bad=pairs.count((False, False)),
    )


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, half hits allowed (Wilson 1927)."""
    share = hits / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    reach = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # At the edges the bound is exact, which rounding would miss.
    return (middle - reach if hits else 0.0), (middle + reach if hits < n else 1.0)

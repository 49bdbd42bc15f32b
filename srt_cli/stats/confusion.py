"""Does the critic know good from bad? Counts of what it says against what is so."""

from collections.abc import Sequence
from dataclasses import dataclass


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
        """Share of right verdicts; null without any."""
        return (self.good_called_good + self.bad_called_bad) / self.n if self.n else None

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean of the two classes' accuracies, 0.5 for a constant critic; null if a class is empty."""
        good = self.good_called_good + self.good_called_bad
        bad = self.bad_called_good + self.bad_called_bad
        if not good or not bad:
            return None
        return (self.good_called_good / good + self.bad_called_bad / bad) / 2

    @property
    def constant(self) -> bool:
        """Whether the critic said the same of every answer, and so told nothing."""
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

"""Is stage 2 worth it? How many pairs, how many of their labels are right, and what such pairs gave.

What is known of the labels comes from the first of: an audit of these pairs, a check whose word stands
in the rows (`srt self-critique --check`), stage 1's check of its critic on held-out rows. What pairs
like these gave stands in `study.csv` beside this file, which `examples/study` writes; where that has no
figure near, nothing is said.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from srt_cli.pairs.pairing import Pairing
from srt_cli.stats.counting import wilson
from srt_cli.tables import many

if TYPE_CHECKING:
    from srt_cli.pairs.audit import Audit

STUDY: Final = Path(__file__).with_name("study.csv")
"""Columns: pairs, precision (0 to 1), gain, low, high (points of the direct answer, 95 %)."""
FEWEST_PAIRS: Final = 32
"""Fewer pairs than this do not move a model; what falls then is the loss on these very answers."""
FEWEST_DECIDED: Final = 16
COIN: Final = 0.5
NEAR_PRECISION: Final = 0.075
NEAR_PAIRS: Final = 2.0
"""A figure of the study is near with at most so many times more or fewer pairs."""


@dataclass(frozen=True)
class Labels:
    """What is known of the labels of some pairs."""

    by: str
    right: int
    decided: int
    """Pairs of which one answer is known to be the better one."""
    equal: int = 0
    """Pairs of two answers that are as good as each other."""

    @property
    def precision(self) -> float:
        """Share of right labels among those decided."""
        return self.right / self.decided

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 %."""
        return wilson(self.right, self.decided)

    def describe(self) -> dict[str, Any]:
        """The manifest's form."""
        return vars(self) | {"precision": self.precision, "interval": self.interval}

    def sentence(self) -> str:
        """The finding, with its interval."""
        low, high = self.interval
        equal = (
            f"; {self.equal} more are of two answers that are equally good" if self.equal else ""
        )
        return (
            f"{self.precision:.0%} [{100 * low:.0f}, {100 * high:.0f}] of the labels are likely right "
            f"({self.right} of {self.decided}, by {self.by}{equal})"
        )


class CheckedPairs:
    """Counts the pairs of both whose answers a check has said whether they pass."""

    def __init__(self) -> None:
        self.right = self.wrong = self.equal = 0

    def add(self, pairing: Pairing) -> None:
        """Count one pair, if both of its answers were checked."""
        chosen, rejected = pairing.chosen.passes, pairing.rejected.passes
        if chosen is None or rejected is None:
            return
        self.right += chosen > rejected
        self.wrong += chosen < rejected
        self.equal += chosen == rejected

    def merge(self, other: "CheckedPairs") -> None:
        """Add the pairs that another one has counted."""
        self.right += other.right
        self.wrong += other.wrong
        self.equal += other.equal

    @property
    def labels(self) -> Labels | None:
        """What they come to; None where no pair was decided."""
        decided = self.right + self.wrong
        return Labels("the check", self.right, decided, self.equal) if decided else None


def labels_of_audit(audit: "Audit | None") -> Labels | None:
    """What an audit says of the labels; None where it decided none."""
    if audit is None or not audit.right + audit.wrong:
        return None
    decided = audit.right + audit.wrong
    return Labels(f"the audit of {audit.judge}", audit.right, decided, audit.ties)


def labels_of_stage_1(tallies: Mapping[str, Any]) -> Labels | None:
    """How often the model put draft and refinement of rows that it never saw in the right order."""
    check = tallies.get("critic_check") or {}
    if not check.get("held_out") or not check.get("decided_order"):
        return None
    return Labels("stage 1's held-out rows", check["right_order"], check["decided_order"])


@dataclass(frozen=True)
class Worth:
    """What is to be expected of stage 2 on some pairs."""

    pairs: int
    labels: Labels | None

    def lines(self, study: Path = STUDY) -> list[str]:
        """For the terminal."""
        asked = f"is stage 2 worth it? {many(self.pairs, 'pair')}"
        if self.labels is None:
            return [
                f"{asked}; how many of their labels are right is not known. A program tells (srt "
                "self-critique --check python:FILE:CALLABLE), or a judge (--audit 50 --audit-judge "
                "SPEC)."
            ]
        found = [f"{asked}; {self.labels.sentence()}"]
        near = _figures_near(study, self.pairs, self.labels.precision)
        if near:
            found.append(f"in the study (docs/study.md) {_what_they_gave(near)}")
        return found

    def warnings(self) -> list[str]:
        """What speaks against training on these pairs."""
        found = []
        few = why_too_few(self.pairs)
        if few is not None:
            found.append(few)
        if (
            self.labels
            and self.labels.decided >= FEWEST_DECIDED
            and self.labels.interval[0] <= COIN
        ):
            found.append(
                f"{self.labels.sentence()}: as a coin would have it. Likely cause: the critic does not "
                "know good from bad on these drafts. Ask for a larger gain (--min-gain), or tune the "
                "critic on its own drafts first: srt collect-feedback --model models/sft."
            )
        return found


def why_too_few(pairs: int) -> str | None:
    """A warning when pairs are too few to move a model; None when they are enough."""
    if pairs >= FEWEST_PAIRS:
        return None
    few = f"{many(pairs, 'pair')} {'is' if pairs == 1 else 'are'} too few to move a model"
    return (
        f"{few}: DPO would learn these answers by heart. More come of more prompts, of srt "
        "self-critique --samples 4 with srt build-prefs --strategy best-worst, and of a "
        "smaller --min-gain."
    )


@dataclass(frozen=True)
class _Figure:
    """A line of the study."""

    pairs: int
    precision: float
    gain: float
    low: float
    high: float


def _figures_near(study: Path, pairs: int, precision: float) -> list[_Figure]:
    """The study's figures for about so many pairs of about this precision."""

    def is_near(figure: _Figure) -> bool:
        times = abs(math.log(figure.pairs / pairs)) / math.log(NEAR_PAIRS)
        return max(times, abs(figure.precision - precision) / NEAR_PRECISION) <= 1

    return [figure for figure in _read(study) if is_near(figure)]


def _what_they_gave(figures: Sequence[_Figure]) -> str:
    """One figure with its interval; the span and the mean of several."""
    pairs = sorted(figure.pairs for figure in figures)
    right = sorted(figure.precision for figure in figures)
    gains = sorted(figure.gain for figure in figures)
    if len(figures) == 1:
        (only,) = figures
        return (
            f"{only.pairs} pairs, {only.precision:.0%} of them right, gave {only.gain:+.1f} points "
            f"[{only.low:+.1f}, {only.high:+.1f}]"
        )
    surely = sum(figure.low > 0 for figure in figures)
    return (
        f"{len(figures)} models gained {gains[0]:+.1f} to {gains[-1]:+.1f} points by such pairs "
        f"({pairs[0]} to {pairs[-1]}, {right[0]:.0%} to {right[-1]:.0%} of them right), "
        f"{sum(gains) / len(gains):+.1f} in the mean; intervals above 0: {surely} of {len(figures)}"
    )


def _read(study: Path) -> Sequence[_Figure]:
    if not study.is_file():
        return ()
    with open(study, encoding="utf-8", newline="") as lines:
        return [
            _Figure(
                int(row["pairs"]), float(row["precision"]), float(row["gain"]), float(row["low"]),
                float(row["high"]),
            )
            for row in csv.DictReader(lines)
        ]  # fmt: skip

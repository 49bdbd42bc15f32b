"""Figures of the pairs, counted as they are built: for the terminal, the manifest and the page."""

import math
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from srt_cli.pairs.building import Decision
from srt_cli.pairs.length_balance import LengthCut
from srt_cli.pairs.pairing import Pairing, preference_of
from srt_cli.pairs.worth import CheckedPairs
from srt_cli.records import Preference
from srt_cli.stats.counting import Moments
from srt_cli.tables import SHOWN_CHARACTERS, Table, one_line

EXAMPLES: Final = 6
LONGER_TO_WARN_AT: Final = 1.3


@dataclass(slots=True)
class LengthFigures:
    """Lengths of chosen and rejected answers, in characters, and how gain goes with them."""

    pairs: int = 0
    chosen: int = 0
    rejected: int = 0
    chosen_longer: int = 0
    _gain_and_gap: Moments = field(default_factory=Moments)

    def add(self, chosen: int, rejected: int, gain: float) -> None:
        """Count one pair."""
        self.pairs += 1
        self.chosen += chosen
        self.rejected += rejected
        self.chosen_longer += chosen > rejected
        self._gain_and_gap.add(gain, chosen - rejected)

    def merge(self, other: "LengthFigures") -> None:
        """Add the pairs of another."""
        self.pairs += other.pairs
        self.chosen += other.chosen
        self.rejected += other.rejected
        self.chosen_longer += other.chosen_longer
        self._gain_and_gap.merge(other._gain_and_gap)

    @property
    def mean_gain(self) -> float | None:
        """Mean gain of the pairs."""
        return self._gain_and_gap.mean_x if self.pairs else None

    @property
    def mean_gap(self) -> float | None:
        """Mean of |chosen| - |rejected|."""
        return (self.chosen - self.rejected) / self.pairs if self.pairs else None

    @property
    def ratio(self) -> float | None:
        """Characters of all chosen answers over those of all rejected ones."""
        return self.chosen / self.rejected if self.rejected else None

    @property
    def correlation(self) -> float | None:
        """Pearson's, of gain and gap; None where either is the same for all pairs."""
        return self._gain_and_gap.correlation

    @property
    def longer_share(self) -> float | None:
        """Share of pairs whose chosen answer is the longer one."""
        return self.chosen_longer / self.pairs if self.pairs else None

    def in_words(self) -> str:
        """The figures in one line."""
        said = (
            f"chosen {_figure(self.ratio, '.2f')} times as long as rejected, longer in "
            f"{_figure(self.longer_share, '.0%')} of {self.pairs} pairs, mean gap "
            f"{_figure(self.mean_gap, '+.0f')} characters"
        )
        if self.correlation is not None:
            said += f"; gain and gap correlate at {self.correlation:+.2f}"
        return said

    def cells(self) -> list[str]:
        """The figures as table cells: pairs, gap, ratio, share of longer ones, correlation."""
        return [
            f"{self.pairs:,}",
            _figure(self.mean_gap, "+.0f"),
            _figure(self.ratio, ".2f"),
            _figure(self.longer_share, ".0%"),
            _figure(self.correlation, "+.2f"),
        ]

    def describe(self) -> dict[str, Any]:
        """The manifest's form."""
        n = self.pairs
        return {
            "pairs": n,
            "mean_chosen_characters": self.chosen / n if n else None,
            "mean_rejected_characters": self.rejected / n if n else None,
            "mean_gap": self.mean_gap,
            "ratio": self.ratio,
            "chosen_longer_share": self.longer_share,
            "correlation_of_gain_and_gap": self.correlation,
        }


@dataclass
class PairSummary:
    """Counts over all decisions, in constant memory."""

    seed: int
    rows: int = 0
    kept: int = 0
    used: int = 0
    """Rows in a kept pair."""
    reasons: Counter[str] = field(default_factory=Counter)
    chosen_scores: Counter[int] = field(default_factory=Counter)
    rejected_scores: Counter[int] = field(default_factory=Counter)
    gains: Counter[int] = field(default_factory=Counter)
    """Whole points of gain, rounded down."""
    left_out: LengthFigures = field(default_factory=LengthFigures)
    """Of pairs that only a rule of length or a near duplicate keeps out."""
    after: LengthFigures = field(default_factory=LengthFigures)
    """Of the kept pairs."""
    length_cut: LengthCut | None = None
    min_gain: float = 0.0
    checked: CheckedPairs = field(default_factory=CheckedPairs)
    """Kept pairs whose answers a check has looked at."""
    cut: int = 0
    """Kept pairs with a draft that the token limit cut off."""

    def __post_init__(self) -> None:
        self._examples = _Few(EXAMPLES, self.seed)

    def add(self, decision: Decision) -> None:
        """Count the decision on one group of rows."""
        self.rows += decision.used
        for _, reason, _ in decision.dropped:
            self.rows += 1
            self.reasons[reason] += 1
        pairing = decision.pairing
        if pairing is None:
            return
        chosen, rejected = pairing
        gain = chosen.score - rejected.score
        lengths = self.after if decision.fault is None else self.left_out
        lengths.add(len(chosen.text), len(rejected.text), gain)
        if decision.fault is not None:
            return
        self.kept += 1
        self.used += decision.used
        self.chosen_scores[round(chosen.score)] += 1
        if rejected.is_scored:
            self.rejected_scores[round(rejected.score)] += 1
        self.gains[math.floor(gain)] += 1
        self._examples.offer(pairing)
        self.checked.add(pairing)
        if chosen.record.response_cut or rejected.record.response_cut:
            self.cut += any(
                each.record.response_cut and each.text == (each.record.response or "").strip()
                for each in (chosen, rejected)
            )

    def merge(self, other: "PairSummary") -> None:
        """Add the decisions that another one has counted."""
        self.rows += other.rows
        self.kept += other.kept
        self.used += other.used
        for name in ("reasons", "chosen_scores", "rejected_scores", "gains"):
            getattr(self, name).update(getattr(other, name))
        self.left_out.merge(other.left_out)
        self.after.merge(other.after)
        self._examples.merge(other._examples)
        self.checked.merge(other.checked)
        self.cut += other.cut

    @property
    def before(self) -> LengthFigures:
        """Of the pairs before the rules of length and near duplicates."""
        both = LengthFigures()
        both.merge(self.left_out)
        both.merge(self.after)
        return both

    @property
    def examples(self) -> list[Preference]:
        """A few kept pairs, picked at random."""
        return self._examples.pairs()

    def describe(self) -> dict[str, Any]:
        """The manifest's form; rows used and dropped add up to the rows read."""
        assert self.used + self.reasons.total() == self.rows
        figures: dict[str, Any] = {
            "rows": self.rows,
            "kept": self.kept,
            "rows_used": self.used,
            "dropped": dict(self.counted_reasons()),
            "min_gain": self.min_gain,
            "mean_gain": self.after.mean_gain,
            "gains": _plain(self.gains),
            "chosen_scores": _plain(self.chosen_scores),
            "rejected_scores": _plain(self.rejected_scores),
            "lengths_before": self.before.describe(),
            "lengths": self.after.describe(),
            "drafts_cut": self.cut,
        }
        if self.length_cut is not None:
            figures["length_balance"] = {
                "method": self.length_cut.method,
                "pairs_before": self.length_cut.before,
                "pairs_after": self.length_cut.after,
                "points_a_hundred_characters": self.length_cut.margin,
            }
        return figures

    def counted_reasons(self) -> list[tuple[str, int]]:
        """Why rows were dropped, the most frequent reason first; ties by alphabet."""
        return sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))

    def reasons_in_words(self) -> str:
        """Why rows were dropped, in one line."""
        return ", ".join(f"{count} {reason}" for reason, count in self.counted_reasons())

    def lines(self) -> list[str]:
        """The summary for the terminal."""
        dropped = f"; dropped: {self.reasons_in_words()}" if self.reasons else ""
        lines = [
            f"{self.rows} rows: {self.kept} kept{dropped}",
            f"mean gain {self.after.mean_gain or 0:+.2f}; pairs by gain {_in_line(self.gains)}",
            f"scores: chosen {_in_line(self.chosen_scores)}; rejected {_in_line(self.rejected_scores)}",
            f"length: {self.after.in_words()}",
        ]
        if self.before.pairs != self.after.pairs:
            lines.insert(3, f"length before its rules: {self.before.in_words()}")
        cost = self.cost_of_balance()
        if cost is not None:
            lines.append(cost)
        if self.cut:
            lines.append(
                f"cut at the token limit: a draft in {self.cut} of {self.kept} pairs "
                f"({self.cut / self.kept:.0%})"
            )
        for pair in self.examples[:1]:
            lines.append(f"for example {pair.id}: {one_line(pair.prompt[-1].content)}")
            lines.append(f"  chosen {pair.chosen_score:g}: {one_line(pair.chosen[0].content)}")
            score = "?" if pair.rejected_score is None else f"{pair.rejected_score:g}"
            lines.append(f"  rejected {score}: {one_line(pair.rejected[0].content)}")
        return lines

    def dropped_table(self) -> Table:
        """Dropped rows by reason."""
        cells = [
            [reason, f"{count:,}", f"{count / self.rows:.1%}"]
            for reason, count in self.counted_reasons()
        ]
        return Table("dropped rows", ["", "rows", "of all"], cells)

    def length_table(self) -> Table:
        """Length before and after the rules of length."""
        cells = [
            [name, *figures.cells()]
            for name, figures in (("before the rules of length", self.before), ("kept", self.after))
        ]
        columns = ["", "pairs", "mean gap", "ratio", "chosen longer", "gain and gap, r"]
        return Table("length of chosen against rejected, in characters", columns, cells)

    def cost_of_balance(self) -> str | None:
        """How many pairs the length balance costs, in one sentence."""
        cut = self.length_cut
        if cut is None:
            return None
        lost = cut.before - cut.after
        share = lost / cut.before if cut.before else 0.0
        price = (
            f": those that gain less than {cut.margin:.2g} points a hundred characters"
            if cut.margin is not None
            else ""
        )
        counted = f"{lost} of {cut.before} pairs ({share:.0%})"
        return f"length balance ({cut.method}) leaves out {counted}{price}"

    def warnings(self) -> list[str]:
        """What the user should think about."""
        ratio = self.after.ratio
        if ratio is None or ratio < LONGER_TO_WARN_AT or self.length_cut is not None:
            return []
        # Where the same side is longer in every pair, there is nothing to balance.
        balance = "--length-balance margin, or " if self.after.longer_share not in (0, 1) else ""
        return [
            f"chosen answers are {ratio:.2f} times as long as rejected ones, and DPO learns length "
            f"too: consider {balance}srt dpo --loss-type sigmoid_norm."
        ]


class _Few:
    """A few pairs, picked by a checksum of their words: fast, and the same in any order."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed % 2**32
        self._picked: list[tuple[int, bytes, Pairing]] = []
        self._worst = 2**32

    def offer(self, pairing: Pairing) -> None:
        words = pairing.chosen.text[:SHOWN_CHARACTERS].encode("utf-8", "surrogatepass")
        mark = zlib.crc32(words, self._seed)
        if mark <= self._worst:
            self._keep([(mark, pairing.fingerprint, pairing)])

    def merge(self, other: "_Few") -> None:
        self._keep(other._picked)

    def _keep(self, more: list[tuple[int, bytes, Pairing]]) -> None:
        best = sorted(self._picked + more, key=lambda entry: entry[:2])
        self._picked = best[: self._size]
        if len(best) >= self._size:
            self._worst = self._picked[-1][0]

    def pairs(self) -> list[Preference]:
        return [preference_of(pairing) for *_, pairing in self._picked]


def _in_line(counts: Mapping[int, int]) -> str:
    """Counts in one line, smallest value first: 1: 120 · 2: 80."""
    return " · ".join(f"{value}: {count}" for value, count in sorted(counts.items()))


def _plain(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(counts.items())}


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

"""Tables of figures, as the terminal and the page both show them, and names that fit into them."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from srt_cli.stats.counting import Z

if TYPE_CHECKING:
    from srt_cli.stats.rates import Estimate

GAP: Final = 3
"""Characters between two columns on a terminal."""
SHORTEST_NAME: Final = 8
SHOWN_CHARACTERS: Final = 100
"""Of a text that is shown in one line."""


def many(count: float, noun: str, plural: str = "s") -> str:
    """A number of things in words: 1 row, 2 rows; `plural` is what the noun takes."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}{'' if count == 1 else plural}"


@dataclass(frozen=True)
class Table:
    """A table for the terminal and the report; columns without a heading hold names.

    The `things` columns behind the first have names as their headings. With `prose` the last column
    holds words, too.
    """

    title: str
    columns: list[str]
    cells: list[list[str]]
    things: int = 0
    prose: bool = False

    @property
    def names(self) -> int:
        """How many columns hold names; the others hold figures."""
        return sum(not column for column in self.columns) or 1

    def fitted(self, width: int) -> "list[Table]":
        """The table within a width: names shortened together, further things in further tables."""
        for things in range(self.things, 1, -1):
            part = self._part(0, things)
            if part._widest(headings=False) <= width:
                starts = range(0, self.things, things)
                parts = [self._part(at, min(things, self.things - at)) for at in starts]
                return [part._shortened(width) for part in parts]
        if self.things > 1:
            return [self._part(at, 1)._shortened(width) for at in range(self.things)]
        return [self._shortened(width)]

    def _part(self, start: int, things: int) -> "Table":
        def cut(row: list[str]) -> list[str]:
            return [row[0], *row[1 + start : 1 + start + things], *row[1 + self.things :]]

        if things == self.things:
            return self
        return Table(self.title, cut(self.columns), [cut(row) for row in self.cells], things)

    def _widths(self, *, headings: bool) -> list[int]:
        """Of every column as it stands; the headings that are names count if `headings`."""
        rows = zip(self.columns, *self.cells, strict=True)
        return [
            max(map(len, column if headings or not 0 < place <= self.things else column[1:]))
            if self.cells or headings
            else 0
            for place, column in enumerate(rows)
        ]

    @property
    def widest(self) -> int:
        """Of the table with nothing shortened."""
        return self._widest()

    def _widest(self, *, headings: bool = True) -> int:
        return sum(self._widths(headings=headings)) + GAP * (len(self.columns) - 1) + 2

    def _shortened(self, width: int) -> "Table":
        """Names cut together, as far as the width asks for it."""
        if self._widest() <= width:
            return self
        if self.things:
            widths = self._widths(headings=False)
            spare = max(0, width - self._widest(headings=False)) // self.things
            heads = self.columns[1 : 1 + self.things]
            narrowest = min(widths[1 : 1 + self.things])
            named = tell_apart(heads, max(SHORTEST_NAME, narrowest + spare))
            columns = [self.columns[0], *named, *self.columns[1 + self.things :]]
            return replace(self, columns=columns)
        widths = self._widths(headings=True)
        left = width - (self._widest() - sum(widths[: self.names]))
        longest = max(widths[: self.names])
        while sum(min(each, longest) for each in widths[: self.names]) > left:
            longest -= 1
        if longest < SHORTEST_NAME:
            return self
        names = list(dict.fromkeys(name for row in self.cells for name in row[: self.names]))
        shown = dict(zip(names, tell_apart(names, longest), strict=True))
        cells = [
            [*(shown[name] for name in row[: self.names]), *row[self.names :]] for row in self.cells
        ]
        return replace(self, cells=cells)


def tell_apart(names: Sequence[str], longest: int) -> list[str]:
    """Names of at most `longest` characters: what all long ones share is cut first.

    `models/llama-3-8b-srt-sft` and `models/llama-3-8b-srt-dpo` become `…sft` and `…dpo`, as far as
    that is needed; a name that fits stays as it is.
    """
    long = list(dict.fromkeys(name for name in names if len(name) > longest))
    if not long:
        return list(names)
    # Whole words are cut off, so that what is left can be read.
    words = {name: re.findall(r"[^-_/:.,# ]+[-_/:.,# ]*|[-_/:.,# ]+", name) for name in long}
    head, tail = _alike(list(words.values())), _alike([each[::-1] for each in words.values()])
    for cut in (0, tail):
        shown = {name: name for name in names}
        for name, parts in words.items():
            end = max(1, len(parts) - cut)
            start = min(head, end - 1)
            while start < end - 1 and _length(parts, start, end) > longest:
                start += 1
            kept = "…" * (start > 0) + "".join(parts[start:end]) + "…" * (end < len(parts))
            shown[name] = shorten(kept, longest)
        if len({*shown.values()}) == len(shown):
            return [shown[name] for name in names]
    # What differs is in the middle of a word.
    return [shorten(name, longest) for name in names]


def _length(parts: Sequence[str], start: int, end: int) -> int:
    return sum(map(len, parts[start:end])) + (start > 0) + (end < len(parts))


def _alike(lists: Sequence[Sequence[str]]) -> int:
    """How many words all lists begin with, as far as none is used up; 0 for a single list."""
    if len(lists) < 2:
        return 0
    alike = takewhile(lambda words: len(set(words)) == 1, zip(*lists, strict=False))
    return min(sum(1 for _ in alike), *(len(each) - 1 for each in lists))


def shorten(name: str, longest: int = 22) -> str:
    """Shorten a name by cutting its middle."""
    if len(name) <= longest:
        return name
    kept = longest - 1
    return name[: kept - kept // 3] + "…" + name[-(kept // 3) :]


def one_line(text: str) -> str:
    """A text in one line, cut at its end where it is long."""
    plain = " ".join(text.split())
    return plain if len(plain) <= SHOWN_CHARACTERS else plain[: SHOWN_CHARACTERS - 1] + "…"


def short_names(specs: Sequence[str]) -> dict[str, str]:
    """A file's stem, a directory's last two parts, a server's model; whole where two would agree."""

    def short(contestant: str) -> str:
        if contestant.startswith(("http://", "https://")):
            return contestant.rpartition("#")[2]
        path = Path(contestant)
        if not path.exists():
            return contestant
        return path.stem if path.suffix else "/".join(path.parts[-2:])

    names = {contestant: short(contestant) for contestant in specs}
    often = Counter(names.values())
    return {full: name if often[name] == 1 else full for full, name in names.items()}


def share(estimate: "Estimate | None") -> str:
    """A share in whole per cent; a dash where there is none."""
    return "-" if estimate is None else f"{estimate.value:.0%}"


def share_with_interval(estimate: "Estimate | None") -> str:
    """A share in whole per cent with its 95 % interval: 71% [59, 80]."""
    if estimate is None:
        return "-"
    low, high = interval_of(estimate)
    return f"{share(estimate)} [{100 * low:.0f}, {100 * high:.0f}]"


def interval_of(
    estimate: "Estimate", possible: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """Its 95 % interval, within what is possible; where all items are alike, what that many leave so.

    No spread is no certainty: of n items all alike, Wilson's interval leaves the share z² / (n + z²) of
    others, which may lie anywhere.
    """
    if estimate.low < estimate.high or estimate.n < 2:
        return max(possible[0], estimate.low), min(possible[1], estimate.high)
    others = Z**2 / (estimate.n + Z**2)
    low, high = (estimate.value + others * (end - estimate.value) for end in possible)
    return low, high


def share_with_error(estimate: "Estimate | None", sign: str = "") -> str:
    """A share in per cent with its standard error, where it has one: 62.1 ± 3.4."""
    if estimate is None:
        return "-"
    # Of items all alike the error is not known to be 0.
    error = f" ± {100 * estimate.standard_error:.1f}" if estimate.standard_error else ""
    return f"{100 * estimate.value:{sign}.1f}{error}"


def score_with_error(estimate: "Estimate | None", sign: str = "") -> str:
    """A score, or a difference of scores, with its standard error: 7.21 ± 0.12."""
    if estimate is None:
        return "-"
    error = f" ± {estimate.standard_error:.2f}" if estimate.standard_error else ""
    return f"{estimate.value:{sign}.2f}{error}"


def p_value(p: float) -> str:
    """A p value with three digits, as far as they tell something."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"

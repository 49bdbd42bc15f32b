"""Tables of figures, as the terminal and the page both show them, and names that fit into them."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from srt_cli.stats.rates import Estimate

GAP: Final = 3
"""Characters between two columns on a terminal."""
SHORTEST_NAME: Final = 8


@dataclass(frozen=True)
class Table:
    """A table for the terminal and the report; columns without a heading hold names.

    The `things` columns behind the first have names as their headings.
    """

    title: str
    columns: list[str]
    cells: list[list[str]]
    things: int = 0

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

    def _widest(self, *, headings: bool = True) -> int:
        return sum(self._widths(headings=headings)) + GAP * (len(self.columns) - 1) + 2

    def _shortened(self, width: int) -> "Table":
        """Names cut, those of a column together, as far as the width asks for it."""
        if self._widest() <= width:
            return self
        if self.things:
            widths = self._widths(headings=False)
            spare = max(0, width - self._widest(headings=False)) // self.things
            heads = self.columns[1 : 1 + self.things]
            longest = [each + spare for each in widths[1 : 1 + self.things]]
            named = tell_apart(heads, max(SHORTEST_NAME, min(longest)))
            columns = [self.columns[0], *named, *self.columns[1 + self.things :]]
            return replace(self, columns=columns)
        widths = self._widths(headings=True)
        left = width - (self._widest() - sum(widths[: self.names]))
        if left < SHORTEST_NAME * self.names:
            return self
        cells = [list(row) for row in self.cells]
        # The shortest first: what it does not need is the others' to take.
        for done, place in enumerate(sorted(range(self.names), key=lambda each: widths[each])):
            share = max(SHORTEST_NAME, left // (self.names - done))
            column = tell_apart([row[place] for row in self.cells], share)
            for row, name in zip(cells, column, strict=True):
                row[place] = name
            left -= max(map(len, column), default=0)
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
    columns = zip(*words.values(), strict=False)
    alike = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    head = min(alike, *(len(each) - 1 for each in words.values()))
    found = {}
    for name, parts in words.items():
        kept = parts[head:] if len(long) > 1 else parts
        while len("".join(kept)) >= longest and len(kept) > 1:
            kept = kept[1:]
        text = "…" + "".join(kept) if len(kept) < len(parts) else name
        found[name] = shorten(text, longest)
    shown = [found.get(name, name) for name in names]
    if len(set(shown)) < len(set(names)):
        # Their ends are alike: what differs is before them, or in the middle.
        found = {name: shorten(name, longest) for name in long}
        shown = [found.get(name, name) for name in names]
    return shown


def shorten(name: str, longest: int = 22) -> str:
    """Shorten a name by cutting its middle."""
    if len(name) <= longest:
        return name
    kept = longest - 1
    return name[: kept - kept // 3] + "…" + name[-(kept // 3) :]


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
    return f"{share(estimate)} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def share_with_error(estimate: "Estimate | None", sign: str = "") -> str:
    """A share in per cent with its standard error, where it has one: 62.1 ± 3.4."""
    if estimate is None:
        return "-"
    error = "" if estimate.standard_error is None else f" ± {100 * estimate.standard_error:.1f}"
    return f"{100 * estimate.value:{sign}.1f}{error}"


def score_with_error(estimate: "Estimate | None", sign: str = "") -> str:
    """A score, or a difference of scores, with its standard error: 7.21 ± 0.12."""
    if estimate is None:
        return "-"
    error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.2f}"
    return f"{estimate.value:{sign}.2f}{error}"


def p_value(p: float) -> str:
    """A p value with three digits, as far as they tell something."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"

"""What every page is made of: a shell from a template, and plots. Every text is escaped, nothing loaded.

The templates lie in `templates/`: `page.html` is the shell of all pages, `parts.html` holds what several
of them show (warnings, tables), `plots.html` draws the SVG plots whose places are reckoned here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import srt_cli
from srt_cli.runs.jsonl import write_atomically
from srt_cli.tables import tell_apart

if TYPE_CHECKING:
    from jinja2 import Environment

LONGEST_LABEL: Final = 30
BAR_HEIGHT: Final = 130
BARS_WIDTH: Final = 480
MOST_GAPS: Final = 20
MOST_POINTS: Final = 600
COLOURS: Final = ("var(--mine)", "var(--bad)", "var(--good)", "var(--base)")
# Curves can be distinguished without colour too.
DASHES: Final = ("", "7 4", "2 3", "9 3 2 3")


def write_page(path: Path, template: str, values: Mapping[str, object]) -> None:
    """Write a page from a template of this package."""
    page = _environment().get_template(template).render(values, version=srt_cli.__version__)
    write_atomically(path, page.encode("utf-8", errors="replace"))


def _part(macro: str, *arguments: object) -> str:
    """A plot that a macro draws: markup, which templates take as it is."""
    drawn: str = getattr(_environment().get_template("plots.html").module, macro)(*arguments)
    return drawn


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("srt_cli.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass(frozen=True)
class Interval:
    """One row of a plot: a value between 0 and 1 with its 95 % interval."""

    label: str
    value: float
    low: float
    high: float
    emphasised: bool = True


@dataclass(frozen=True)
class _Scale:
    """Where 0 and 1 lie, and how high the rows are."""

    left: float
    right: float
    step: float
    rows: int
    top: float = 10

    @property
    def bottom(self) -> float:
        return self.top + self.step * self.rows

    def x(self, share: float) -> float:
        return round(self.left + (self.right - self.left) * min(1.0, max(0.0, share)), 1)


def interval_plot(rows: Sequence[Interval], *, middle: float | None, caption: str) -> str:
    """Dots with intervals on a scale from 0 to 100 %; `middle` draws a line of comparison."""
    wide = _Scale(left=230, right=650, step=34, rows=len(rows))
    narrow = _Scale(left=18, right=322, step=46, rows=len(rows))
    labels = tell_apart([row.label for row in rows], LONGEST_LABEL)
    shown = [replace(row, label=label) for row, label in zip(rows, labels, strict=True)]
    return _part("intervals", shown, wide, narrow, middle, caption)


@dataclass(frozen=True)
class _Bar:
    name: str
    count: int
    left: float
    middle: float
    width: float
    height: float


def bar_plot(bars: Sequence[tuple[str, int]], *, caption: str) -> str:
    """Counts as standing bars, each with its number above and its name below; "" without any."""
    if not bars:
        return ""
    highest = max(1, *(count for _, count in bars))
    step = min(70.0, BARS_WIDTH / len(bars))
    placed = [
        _Bar(
            name,
            count,
            left=round(step * (place + 0.1), 1),
            middle=round(step * (place + 0.5), 1),
            width=round(step * 0.8, 1),
            height=round(BAR_HEIGHT * count / highest, 1),
        )
        for place, (name, count) in enumerate(bars)
    ]
    return _part("bars", placed, BARS_WIDTH, BAR_HEIGHT + 26, caption)


def histogram(counts: Mapping[int, int] | Mapping[float, int], *, caption: str) -> str:
    """How often each value was given, as bars in order; whole values have their gaps between them."""
    shown = {float(value): n for value, n in counts.items()}
    if shown and all(value.is_integer() for value in shown):
        low, high = int(min(shown)), int(max(shown))
        if high - low <= MOST_GAPS:
            shown = dict.fromkeys(map(float, range(low, high + 1)), 0) | shown
    return bar_plot([(f"{value:g}", n) for value, n in sorted(shown.items())], caption=caption)


@dataclass(frozen=True)
class Curve:
    """One line of a plot: values at steps."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Frame:
    """The axes of a line plot: the values at their ends, and where they lie."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 66
    right: int = 706
    top: int = 14
    bottom: int = 214
    width: int = 720
    height: int = 244

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies, in the plot's own units."""
        (x_low, x_high), (y_low, y_high) = self.x, self.y
        across = self.left + (self.right - self.left) * (x - x_low) / (x_high - x_low)
        down = self.top + (self.bottom - self.top) * (y_high - y) / (y_high - y_low)
        return round(across, 1), round(down, 1)


@dataclass(frozen=True)
class _Line:
    label: str
    last: str
    colour: str
    style: str
    paths: list[str]
    dots: list[tuple[float, float]]


def line_plot(curves: Sequence[Curve], *, caption: str, percent: bool = False) -> str:
    """Curves over a common axis of steps, each with its name, its last value and its colour.

    Values that are no numbers leave a gap, and "" is all there is when none is. Long curves are
    thinned to means over equal stretches.
    """
    known = [(x, y) for curve in curves for x, y in curve.points if math.isfinite(y)]
    if not known:
        return ""
    x = _span([x for x, _ in known])
    ticks = nice_ticks(*_span([y for _, y in known]))
    frame = _Frame(x, (ticks[0], ticks[-1]))
    beside = [(frame.place(0, tick)[1], _shown(tick, percent)) for tick in ticks]
    below = [
        (frame.place(tick, 0)[0], f"{tick:.0f}")
        for tick in nice_ticks(*x, most=8)
        if x[0] <= tick <= x[1] and tick == int(tick)
    ]
    lines = [_line(frame, number, curve, percent) for number, curve in enumerate(curves)]
    return _part("lines", frame, beside, below, lines, caption)


def _line(frame: _Frame, number: int, curve: Curve, percent: bool) -> _Line:
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)] or "none"
    last = [y for _, y in curve.points if math.isfinite(y)][-1:]
    stretches = [[frame.place(x, y) for x, y in part] for part in _unbroken(thin(curve.points))]
    return _Line(
        label=curve.label,
        last=_shown(last[0], percent) if last else "",
        colour=colour,
        style=f"stroke:{colour};stroke-dasharray:{dash}",
        paths=["M" + " L".join(f"{x} {y}" for x, y in part) for part in stretches if len(part) > 1],
        dots=[part[0] for part in stretches if len(part) == 1],
    )


def thin(
    points: Sequence[tuple[float, float]], most: int = MOST_POINTS
) -> list[tuple[float, float]]:
    """At most `most` points: means over equal stretches, so that a spike is damped and not missed."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    thinned = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        finite = [y for _, y in part if math.isfinite(y)]
        y = sum(finite) / len(finite) if finite else math.nan
        thinned.append((part[-1][0], y))
    return thinned


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values at equal distances of 1, 2 or 5 times a power of ten that enclose low and high."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low > 1e-12 * max(abs(low), abs(high)):
        return low, high
    # One value all along still needs a scale around it.
    margin = abs(low) / 10 or 1.0
    return low - margin, high + margin


def _unbroken(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            stretches[-1].append((x, y))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _shown(value: float, percent: bool) -> str:
    if percent:
        return f"{value:.0%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

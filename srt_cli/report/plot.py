"""Small SVG plots that need no library and follow the page's colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LABEL_WIDTH = 230
PLOT_WIDTH = 420
ROW_HEIGHT = 34
TOP = 10
NARROW_WIDTH = 340
NARROW_ROW_HEIGHT = 46
NARROW_MARGIN = 18
BAR_HEIGHT = 130
BARS_WIDTH = 480


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
    """Where 0 and 1 lie, and between which heights the rows are."""

    left: float
    width: float
    bottom: float

    def x(self, share: float) -> float:
        return round(self.left + self.width * min(1.0, max(0.0, share)), 1)


def interval_plot(rows: Sequence[Interval], *, middle: float | None, caption: str) -> str:
    """Dots with intervals on a scale from 0 to 100 %; `middle` draws a line of comparison.

    Drawn twice: labels beside the rows, and, for a narrow screen, above them; the style shows one.
    """
    wide = _Scale(LABEL_WIDTH, PLOT_WIDTH, TOP + ROW_HEIGHT * len(rows))
    parts = [
        f'<svg class="wide" viewBox="0 0 {LABEL_WIDTH + PLOT_WIDTH + 80} {wide.bottom + 26}" '
        f'role="img" aria-label="{escape(caption)}">',
        _grid(wide, middle),
        *(_row(row, wide, TOP + ROW_HEIGHT * (n + 0.5)) for n, row in enumerate(rows)),
        "</svg>",
    ]
    narrow = _Scale(
        NARROW_MARGIN, NARROW_WIDTH - 2 * NARROW_MARGIN, TOP + NARROW_ROW_HEIGHT * len(rows)
    )
    parts += [
        f'<svg class="narrow" viewBox="0 0 {NARROW_WIDTH} {narrow.bottom + 26}" aria-hidden="true">',
        _grid(narrow, middle),
        *(_narrow_row(row, narrow, TOP + NARROW_ROW_HEIGHT * n) for n, row in enumerate(rows)),
        "</svg>",
    ]
    return "".join(parts)


def bar_plot(bars: Sequence[tuple[str, int]], *, caption: str) -> str:
    """Counts as standing bars, each with its number above and its name below."""
    highest = max(1, *(count for _, count in bars))
    step = min(70.0, BARS_WIDTH / len(bars))
    bottom = BAR_HEIGHT + 26
    parts = [
        f'<svg class="bars" viewBox="0 0 {BARS_WIDTH} {bottom + 26}" role="img" '
        f'aria-label="{escape(caption)}">'
    ]
    for place, (name, count) in enumerate(bars):
        height = round(BAR_HEIGHT * count / highest, 1)
        left, middle = round(step * (place + 0.1), 1), round(step * (place + 0.5), 1)
        parts.append(
            f'<rect class="bar" x="{left}" y="{bottom - height}" width="{step * 0.8:.1f}" '
            f'height="{height}" rx="3"/>'
            f'<text class="value" x="{middle}" y="{bottom - height - 6}" text-anchor="middle">'
            f'{count}</text><text class="tick" x="{middle}" y="{bottom + 18}" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
    return "".join([*parts, "</svg>"])


def _grid(scale: _Scale, middle: float | None) -> str:
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = scale.x(share)
        parts.append(
            f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{scale.bottom}"/>'
            f'<text class="tick" x="{x}" y="{scale.bottom + 18}" text-anchor="middle">'
            f"{share:.0%}</text>"
        )
    if middle is not None:
        x = scale.x(middle)
        parts.append(f'<line class="middle" x1="{x}" x2="{x}" y1="{TOP}" y2="{scale.bottom}"/>')
    return "".join(parts)


def _row(row: Interval, scale: _Scale, y: float) -> str:
    return (
        f'<text class="label" x="{LABEL_WIDTH - 14}" y="{y + 4}" text-anchor="end">'
        f"{escape(_shorten(row.label))}</text>"
        f"{_dot(row, scale, y)}"
        f'<text class="value" x="{LABEL_WIDTH + PLOT_WIDTH + 12}" y="{y + 4}">{row.value:.1%}</text>'
    )


def _narrow_row(row: Interval, scale: _Scale, y: float) -> str:
    return (
        f'<text class="label" x="{NARROW_MARGIN}" y="{y + 15}">{escape(_shorten(row.label))}</text>'
        f'<text class="value" x="{NARROW_WIDTH - NARROW_MARGIN}" y="{y + 15}" text-anchor="end">'
        f"{row.value:.1%}</text>{_dot(row, scale, y + 29)}"
    )


def _dot(row: Interval, scale: _Scale, y: float) -> str:
    style = "mine" if row.emphasised else "base"
    return (
        f'<line class="reach {style}" x1="{scale.x(row.low)}" x2="{scale.x(row.high)}" '
        f'y1="{y}" y2="{y}"/>'
        f'<circle class="{style}" cx="{scale.x(row.value)}" cy="{y}" r="5.5"/>'
    )


def _shorten(label: str) -> str:
    return label if len(label) <= 32 else "…" + label[-31:]

"""Small SVG plots that need no library and follow the page's colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LABEL_WIDTH = 230
PLOT_WIDTH = 420
ROW_HEIGHT = 34
TOP = 10
BAR_HEIGHT = 130


@dataclass(frozen=True)
class Interval:
    """One row of a plot: a value between 0 and 1 with its 95 % interval."""

    label: str
    value: float
    low: float
    high: float
    emphasised: bool = True


def interval_plot(rows: Sequence[Interval], *, middle: float | None, caption: str) -> str:
    """Dots with intervals on a scale from 0 to 100 %; `middle` draws a line of comparison."""
    bottom = TOP + ROW_HEIGHT * len(rows)
    width, height = LABEL_WIDTH + PLOT_WIDTH + 80, bottom + 26
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(caption)}">',
        *(_tick(share, bottom) for share in (0, 0.25, 0.5, 0.75, 1)),
    ]
    if middle is not None:
        x = _x(middle)
        parts.append(f'<line class="middle" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>')
    parts += [_row(row, TOP + ROW_HEIGHT * (n + 0.5)) for n, row in enumerate(rows)]
    return "".join([*parts, "</svg>"])


def bar_plot(bars: Sequence[tuple[str, int]], *, caption: str) -> str:
    """Counts as standing bars, each with its number above and its name below."""
    highest = max(count for _, count in bars)
    step = min(70.0, (LABEL_WIDTH + PLOT_WIDTH) / len(bars))
    width, bottom = LABEL_WIDTH + PLOT_WIDTH + 80, BAR_HEIGHT + 26
    parts = [f'<svg viewBox="0 0 {width} {bottom + 26}" role="img" aria-label="{escape(caption)}">']
    for place, (name, count) in enumerate(bars):
        height = round(BAR_HEIGHT * count / highest, 1)
        left, middle = round(20 + step * place, 1), round(20 + step * (place + 0.4), 1)
        parts.append(
            f'<rect class="bar" x="{left}" y="{bottom - height}" width="{step * 0.8:.1f}" '
            f'height="{height}" rx="3"/>'
            f'<text class="value" x="{middle}" y="{bottom - height - 6}" text-anchor="middle">'
            f'{count}</text><text class="tick" x="{middle}" y="{bottom + 18}" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
    return "".join([*parts, "</svg>"])


def _x(share: float) -> float:
    return round(LABEL_WIDTH + PLOT_WIDTH * min(1.0, max(0.0, share)), 1)


def _tick(share: float, bottom: float) -> str:
    x = _x(share)
    return (
        f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>'
        f'<text class="tick" x="{x}" y="{bottom + 18}" text-anchor="middle">{share:.0%}</text>'
    )


def _row(row: Interval, y: float) -> str:
    style = "mine" if row.emphasised else "base"
    return (
        f'<text class="label" x="{LABEL_WIDTH - 14}" y="{y + 4}" text-anchor="end">'
        f"{escape(_shorten(row.label))}</text>"
        f'<line class="reach {style}" x1="{_x(row.low)}" x2="{_x(row.high)}" y1="{y}" y2="{y}"/>'
        f'<circle class="{style}" cx="{_x(row.value)}" cy="{y}" r="5.5"/>'
        f'<text class="value" x="{LABEL_WIDTH + PLOT_WIDTH + 12}" y="{y + 4}">{row.value:.1%}</text>'
    )


def _shorten(label: str) -> str:
    return label if len(label) <= 32 else "…" + label[-31:]

"""Line plots over the steps of a training, as SVG that follows the page's colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

LEFT: Final = 66
WIDTH: Final = 640
HEIGHT: Final = 200
TOP: Final = 14
RIGHT: Final = 14
MOST_POINTS: Final = 600
COLOURS: Final = ("var(--mine)", "var(--bad)", "var(--good)", "var(--base)")
# So that a curve is told from another without its colour too.
DASHES: Final = ("", "7 4", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Curve:
    """One line of a plot: values at steps."""

    label: str
    points: Sequence[tuple[float, float]]


def line_plot(curves: Sequence[Curve], *, caption: str, percent: bool = False) -> str:
    """Curves over a common axis of steps, each with its name, its last value and its colour.

    Values that are no numbers leave a gap. Long curves are thinned to means over equal stretches.
    """
    known = [(x, y) for curve in curves for x, y in curve.points if math.isfinite(y)]
    if not known:
        return ""
    x_low, x_high = _span([x for x, _ in known])
    ticks = nice_ticks(*_span([y for _, y in known]))
    y_low, y_high = ticks[0], ticks[-1]

    def place(x: float, y: float) -> str:
        across = LEFT + WIDTH * (x - x_low) / (x_high - x_low)
        down = TOP + HEIGHT * (y_high - y) / (y_high - y_low)
        return f"{across:.1f} {down:.1f}"

    whole = LEFT + WIDTH + RIGHT
    parts = [
        f'<svg viewBox="0 0 {whole} {TOP + HEIGHT + 30}" role="img" aria-label="{escape(caption)}">'
    ]
    for tick in ticks:
        down = TOP + HEIGHT * (y_high - tick) / (y_high - y_low)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{down:.1f}" y2="{down:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{down + 4:.1f}" text-anchor="end">'
            f"{_shown(tick, percent)}</text>"
        )
    for tick in nice_ticks(x_low, x_high, most=8):
        if x_low <= tick <= x_high and tick == int(tick):
            across = LEFT + WIDTH * (tick - x_low) / (x_high - x_low)
            parts.append(
                f'<text class="tick" x="{across:.1f}" y="{TOP + HEIGHT + 20}" '
                f'text-anchor="middle">{tick:.0f}</text>'
            )
    for number, curve in enumerate(curves):
        for stretch in _unbroken(thin(curve.points)):
            path = " L".join(place(x, y) for x, y in stretch)
            if len(stretch) == 1:
                x, y = place(*stretch[0]).split()
                parts.append(
                    f'<circle cx="{x}" cy="{y}" r="3" style="fill:{COLOURS[number % 4]}"/>'
                )
            else:
                parts.append(f'<path class="curve" d="M{path}" style="{_style(number)}"/>')
    return "".join([*parts, "</svg>", _legend(curves, percent)])


def _legend(curves: Sequence[Curve], percent: bool) -> str:
    entries = []
    for number, curve in enumerate(curves):
        last = [y for _, y in curve.points if math.isfinite(y)][-1:]
        if not last:
            continue
        line = (
            f'<svg class="key" viewBox="0 0 28 8"><path class="curve" d="M1 4 L27 4" '
            f'style="{_style(number)}"/></svg>'
        )
        entries.append(
            f"<span>{line}{escape(curve.label)} <b>{_shown(last[0], percent)}</b></span>"
        )
    return f'<p class="legend">{"".join(entries)}</p>'


def _style(number: int) -> str:
    return f"stroke:{COLOURS[number % 4]};stroke-dasharray:{DASHES[number % 4] or 'none'}"


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

"""A page about a preference file: what was kept, what fell out, how long, how many labels are right."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import srt_cli
from srt_cli.pairs.summary import PairSummary
from srt_cli.records import Preference, Prompt
from srt_cli.report.plot import Interval, bar_plot, interval_plot
from srt_cli.report.shell import html_table, write_page
from srt_cli.tables import Table

if TYPE_CHECKING:
    from srt_cli.pairs.audit import Audit


def write_prefs_report(path: Path, name: str, summary: PairSummary, audit: "Audit | None") -> None:
    """Write the summary of a preference file as one HTML file."""
    warnings = [*summary.warnings(), *(audit.warnings() if audit is not None else [])]
    body = "".join(
        [
            f"<header><h1>{escape(name)}: {summary.kept:,} pairs of {summary.rows:,} rows</h1>"
            f"<p class=facts>gain of at least {summary.min_gain:g}, {summary.after.mean_gain or 0:.2f} "
            f"on average · {escape(summary.after.in_words())}</p></header>",
            _warnings(warnings),
            "" if audit is None else _audit(audit),
            _histogram("Gain, in points of the score", summary.gains),
            _histogram("Scores of the chosen", summary.chosen_scores),
            _histogram("Scores of the rejected", summary.rejected_scores),
            _length(summary),
            _dropped(summary),
            _examples(summary.examples),
            f"<footer>Made by srt {escape(srt_cli.__version__)}. The same figures are in the manifest "
            "beside the preferences.</footer>",
        ]
    )
    write_page(path, f"srt build-prefs: {name}", body)


def _warnings(warnings: list[str]) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return (
        f'<section class="warnings"><h2>Read with care</h2><ul>{items}</ul></section>'
        if items
        else ""
    )


def _audit(audit: "Audit") -> str:
    shown = [
        Interval(f"gain of {band.gain:g} or more", band.precision.value, band.precision.low,
                 band.precision.high)
        for band in audit.from_gain
    ]  # fmt: skip
    plot = interval_plot(shown, middle=audit.min_precision, caption="Right labels") if shown else ""
    return (
        f"<section><h2>Right labels</h2><p>{escape(audit.sentence())}. Bars are 95 % intervals; the "
        f"line is the precision looked for.</p>"
        + (f'<div class="plot">{plot}</div>' if plot else "")
        + "</section>"
    )


def _histogram(title: str, counts: Mapping[int, int]) -> str:
    bars = [(str(value), count) for value, count in sorted(counts.items())]
    plot = bar_plot(bars, caption=title)
    return f'<section><h2>{escape(title)}</h2><div class="plot">{plot}</div></section>'


def _length(summary: PairSummary) -> str:
    cost = summary.cost_of_balance()
    note = f"<p>{escape(cost)}.</p>" if cost is not None else ""
    return f"<section><h2>Length</h2>{_html(summary.length_table())}{note}</section>"


def _dropped(summary: PairSummary) -> str:
    if not summary.reasons:
        return ""
    return f"<section><h2>What fell out</h2>{_html(summary.dropped_table())}</section>"


def _html(table: Table) -> str:
    return html_table(table.title, table.columns, table.cells)


def _examples(pairs: list[Preference]) -> str:
    cards = "".join(
        f'<article><p class="prompt">{escape(Prompt(id=pair.id, prompt=pair.prompt).text)}</p>'
        f'<div class="answers">{_answer("chosen", pair.chosen_score, pair.chosen[0].content)}'
        f"{_answer('rejected', pair.rejected_score, pair.rejected[0].content)}</div></article>"
        for pair in pairs
    )
    return f'<section id="examples"><h2>Examples, drawn at random</h2>{cards}</section>'


def _answer(side: str, score: float, text: str) -> str:
    state = "good" if side == "chosen" else "bad"
    return f'<div class="answer {state}"><h3>{side}, score {score:g}</h3><pre>{escape(text)}</pre></div>'

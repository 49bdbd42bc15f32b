"""A page about a critic: what it says, how it says it, and what should make one doubt it."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

import srt_cli
from srt_cli.feedback.summary import CritiqueSummary
from srt_cli.report.plot import bar_plot
from srt_cli.report.shell import html_table, write_page


def write_critic_report(path: Path, title: str, summary: CritiqueSummary) -> None:
    """Write the critic's quality as one HTML file."""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in summary.warnings())
    warnings = (
        f'<section class="warnings"><h2>Read with care</h2><ul>{items}</ul></section>'
        if items
        else ""
    )
    statuses = " · ".join(f"{count} {status}" for status, count in summary.statuses.most_common())
    tables = [html_table("the critic", ["", ""], [[*row] for row in summary.figures()])]
    if summary.checked:
        cells = [
            [name, *map(str, (t.n, t.good_called_good, t.bad_called_good, t.good_called_bad,
                              t.bad_called_bad))]
            for name, t in (
                ("drafts", summary.confusion(refined=False)),
                ("refinements", summary.confusion(refined=True)),
            )
        ]  # fmt: skip
        columns = ["is / says", "n", "good/good", "bad/good", "good/bad", "bad/bad"]
        tables.append(html_table("against the check", columns, cells))
    body = "".join(
        [
            f"<header><h1>{escape(title)}</h1><p class=facts>{summary.rows} rows: "
            f"{escape(statuses)}</p></header>",
            warnings,
            _histogram("Scores of the drafts", summary.draft_scores),
            _histogram("Blind scores of the refinements", summary.blind_scores),
            f"<section><h2>All figures</h2>{''.join(tables)}</section>",
            f"<footer>Made by srt {escape(srt_cli.__version__)}. The same figures are in the "
            "manifest beside the output.</footer>",
        ]
    )
    write_page(path, title, body)


def _histogram(title: str, scores: Mapping[float, int]) -> str:
    if not scores:
        return ""
    bars = [(f"{score:g}", count) for score, count in sorted(scores.items())]
    plot = bar_plot(bars, caption=title)
    return f'<section><h2>{escape(title)}</h2><div class="plot">{plot}</div></section>'

"""A page about a preference file: what was kept and dropped, how long, how many labels are right."""

from pathlib import Path
from typing import TYPE_CHECKING

from srt_cli.pairs.summary import PairSummary
from srt_cli.records import Prompt
from srt_cli.report.html import Interval, histogram, interval_plot, write_page

if TYPE_CHECKING:
    from srt_cli.pairs.audit import Audit


def write_prefs_report(path: Path, name: str, summary: PairSummary, audit: "Audit | None") -> None:
    """Write the summary of a preference file as one HTML file."""
    histograms = {
        "Gain, in points of the score": summary.gains,
        "Scores of the chosen": summary.chosen_scores,
        "Scores of the rejected": summary.rejected_scores,
    }
    values = {
        "title": f"srt build-prefs: {name}",
        "headline": f"{name}: {summary.kept:,} pairs of {summary.rows:,} rows",
        "facts": [
            f"gain of at least {summary.min_gain:g}, {summary.after.mean_gain or 0:.2f} on average",
            summary.after.in_words(),
        ],
        "doubts": [*summary.warnings(), *(audit.warnings() if audit is not None else [])],
        "audited": audit.sentence() if audit is not None else "",
        "precision": _precision(audit) if audit is not None else "",
        "histograms": [
            (title, histogram(counts, caption=title)) for title, counts in histograms.items()
        ],
        "length": summary.length_table(),
        "balance": summary.cost_of_balance() or "",
        "dropped": summary.dropped_table() if summary.reasons else None,
        "examples": [
            (Prompt(id=pair.id, prompt=pair.prompt).text, pair) for pair in summary.examples
        ],
    }
    write_page(path, "prefs.html", values)


def _precision(audit: "Audit") -> str:
    bands = [
        Interval(f"gain of {band.gain:g} or more", found.value, found.low, found.high)
        for band in audit.from_gain
        for found in [band.precision]
    ]
    if not bands:
        return ""
    return interval_plot(bands, middle=audit.min_precision, caption="Right labels")

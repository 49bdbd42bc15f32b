"""A page about a critic: what it says, how it says it, and what should make one doubt it."""

from pathlib import Path

from srt_cli.feedback.summary import CritiqueSummary
from srt_cli.report.html import histogram, write_page
from srt_cli.tables import Table


def write_critic_report(path: Path, title: str, summary: CritiqueSummary) -> None:
    """Write the critic's quality as one HTML file."""
    statuses = [f"{count} {status}" for status, count in summary.statuses.most_common()]
    tables = [Table("the critic", ["", ""], [list(row) for row in summary.figures()])]
    if summary.checked:
        tables.append(_against_the_check(summary))
    values = {
        "title": title,
        "facts": [f"{summary.rows} rows: {statuses[0]}" if statuses else "0 rows", *statuses[1:]],
        "doubts": summary.warnings(),
        "drafts": histogram(summary.draft_scores, caption="Scores of the drafts"),
        "refinements": histogram(summary.blind_scores, caption="Blind scores of the refinements"),
        "tables": tables,
    }
    write_page(path, "critic.html", values)


def _against_the_check(summary: CritiqueSummary) -> Table:
    cells = []
    for name, refined in (("drafts", False), ("refinements", True)):
        found = summary.confusion(refined=refined)
        counts = (found.n, found.good_called_good, found.bad_called_good, found.good_called_bad,
                  found.bad_called_bad)  # fmt: skip
        cells.append([name, *map(str, counts)])
    columns = ["is / says", "n", "good/good", "bad/good", "good/bad", "bad/bad"]
    return Table("against the check", columns, cells)

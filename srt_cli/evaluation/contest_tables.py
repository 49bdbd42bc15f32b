"""What is shown of a contest, on the terminal, on the page and in Markdown: tables, notes, warnings."""

from itertools import combinations
from typing import Final

from srt_cli.evaluation.contest import Contest, Row
from srt_cli.evaluation.drift_table import drift_tables
from srt_cli.evaluation.judge_quality import judge_tables
from srt_cli.evaluation.labels import people_table
from srt_cli.evaluation.verdicts import Comparison, Judged
from srt_cli.stats.rates import PairedDifference
from srt_cli.tables import Table, p_value, share_with_error, share_with_interval, shorten

LC_NOTES: Final = {
    "alpaca_eval": "Equal length: the length-controlled win rate of AlpacaEval 2.",
    "generic": "Equal length: length-controlled with a generic prior; not comparable with AlpacaEval's.",
}


def tables_of(contest: Contest, *, brief: bool = False, drift: bool = True) -> list[Table]:
    """What the check found, what the judges found, the drift, and what the judges are worth.

    `brief` leaves out comparisons with the reference, which other columns show, and those of
    refined answers; `drift` tells whether the drift table is among them.
    """
    name = contest.name_of_judge
    found = []
    if contest.check:
        columns = ["", "", "passes [95 %]", "vs reference", "chars", "parses"]
        cells = [_check_cells(row) for row in contest.rows]
        found.append(Table("passes the check", columns, cells))
    for place, judge in enumerate(contest.judges):
        cells = [
            [
                shorten(row.name) if contest.direct_only else f"{shorten(row.name)} {row.kind}",
                *_judge_cells(row, row.judged[place]),
            ]
            for row in contest.rows
            if row.judged
        ]
        if cells:
            columns = ["", "wins, %", "equal length", "W/T/L", "same twice", "degenerate"]
            title = "wins against the reference"
            found.append(Table(f"{title}, says {shorten(name(judge), 40)}", columns, cells))
    if len(contest.rows) > 2 and contest.comparisons:
        columns = ["", "", "difference [95 %]", "p (Holm)", "detectable"]
        shown = [each for each in contest.comparisons if not brief or _is_brief(contest, each)]
        for by in dict.fromkeys(each.by for each in shown):
            cells = [_comparison_cells(each) for each in shown if each.by == by]
            found.append(Table(f"every two, paired, by {shorten(name(by), 40)}", columns, cells))
    found += drift_tables(contest.stages) if drift else []
    if contest.people:
        found.append(people_table(contest.people, name))
    return found + judge_tables(contest.agreements, contest.repeats, contest.self_preferences, name)


def _is_brief(contest: Contest, comparison: Comparison) -> bool:
    rows = [row for row in contest.rows[1:] if row.use == "response"]
    labels = {label for row in rows for label in (row.name, row.label)}
    return {comparison.a, comparison.b} <= labels


def footnotes_of(contest: Contest) -> list[str]:
    """What a reader needs to know to read the tables rightly."""
    if contest.prompts == 1:
        return [
            "n = 1 prompt: no error, no test and no length control can be given for a single one."
        ]
    notes = [
        f"n = {contest.prompts} prompts; reference: {contest.rows[0].name}, direct; differences in "
        "points, paired over the same prompts."
    ]
    first = next((row.judged[0] for row in contest.rows if row.judged), None)
    if first is not None:
        if first.length_controlled is not None:
            notes.append(LC_NOTES[first.length_controlled.mode])
        if first.orders == "one":
            seen = "is over different prompts" if first.position else "is not seen"
            notes.append(f"Each pair was judged in one order only: position bias {seen}.")
    if contest.judges and (len(contest.rows) > 2 or contest.stages):
        notes.append(
            "p is McNemar's and counts only who wins, the interval also by how much: one may see what "
            "the other does not."
        )
    if any(row.parsed and row.parsed.value < 1 for row in contest.rows):
        notes.append("Where a critique does not parse, the draft stands for the refinement.")
    return notes


def warnings_of(contest: Contest) -> list[str]:
    """What should make a reader doubt a figure, the gravest first."""
    found = [
        f"{stage.name}: {stage.echo.colour} alarm: {stage.echo.reason}."
        for stage in contest.stages
        if stage.echo is not None and stage.echo.colour in ("red", "amber")
    ]
    for row in contest.rows:
        label = contest.label_of(row)
        if row.degenerate.red_flag:
            reasons = ", ".join(f"{n} {why}" for why, n in row.degenerate.reasons.items())
            found.append(
                f"{label}: {row.degenerate.share:.0%} of its outputs are degenerate "
                f"({reasons}); its other figures mean little."
            )
        failed = row.statuses.get("failed", 0) + row.statuses.get("refused", 0)
        if failed:
            found.append(f"{label}: {failed} answers failed or were refused.")
    found += _gaps(contest)
    themselves = {row.contestant for row in contest.rows} & set(contest.judges)
    found += [f"{judge} judges its own answers." for judge in sorted(themselves)]
    return found + [
        each for place in range(len(contest.judges)) for each in _doubts(contest, place)
    ]


def _gaps(contest: Contest) -> list[str]:
    """What could not be compared, and why."""
    found = []
    if len(contest.rows) == 1:
        found.append("The only contestant is the reference itself: nothing was compared.")
    for row in contest.rows[1:]:
        if row.prompts < contest.prompts:
            found.append(
                f"{contest.label_of(row)}: has answers to {row.prompts} of {contest.prompts} prompts; "
                "its figures rest on these."
            )
    compared = {frozenset((each.a, each.b)) for each in contest.comparisons}
    judged = [
        contest.label_of(row) for row in contest.rows if any(j.valid_pairs for j in row.judged)
    ]
    apart = [pair for pair in combinations(judged, 2) if frozenset(pair) not in compared]
    if apart and contest.prompts > 1:
        found.append(
            f"{' and '.join(apart[0])} have fewer than two judged prompts in common and are not "
            f"compared{f'; so with {len(apart) - 1} more' if apart[1:] else ''}."
        )
    return found


def _doubts(contest: Contest, place: int) -> list[str]:
    """What is doubtful in one judge's verdicts: each topic once, with how many rows it holds for."""
    judge = contest.name_of_judge(contest.judges[place])
    says = f", by {judge}" if len(contest.judges) > 1 else ""
    by_topic: dict[str, list[str]] = {}
    for row in contest.rows:
        for doubt in row.judged[place].doubts() if row.judged else ():
            text = f"{contest.label_of(row)}{says}: {doubt.text}"
            by_topic.setdefault(doubt.topic, []).append(text)
    return [
        texts[0] + (f"; much the same holds for {len(texts) - 1} more" if texts[1:] else "") + "."
        for texts in by_topic.values()
    ]


def _check_cells(row: Row) -> list[str]:
    parsed = f"{row.parsed.value:.0%}" if row.parsed else "-"
    return [
        shorten(row.name),
        row.kind,
        share_with_interval(row.pass_rate),
        _difference(row.difference),
        f"{row.characters.value:.0f}" if row.characters else "-",
        parsed,
    ]


def _judge_cells(row: Row, judged: Judged) -> list[str]:
    position, controlled = judged.position, judged.length_controlled
    return [
        share_with_error(judged.win_rate),
        share_with_error(controlled.rate if controlled else None),
        f"{judged.wins}/{judged.ties}/{judged.losses}",
        f"{position.consistency.value:.0%}" if position and position.consistency else "-",
        f"{row.degenerate.share:.0%}",
    ]


def _comparison_cells(comparison: Comparison) -> list[str]:
    paired = comparison.paired
    return [
        shorten(comparison.a),
        f"against {shorten(comparison.b)}",
        _difference(paired),
        p_value(comparison.p_adjusted),
        f"{100 * paired.smallest_detectable:.0f}",
    ]


def _difference(paired: PairedDifference | None) -> str:
    if paired is None:
        return "-"
    found = paired.difference
    return f"{100 * found.value:+.0f} [{100 * found.low:+.0f}, {100 * found.high:+.0f}]"

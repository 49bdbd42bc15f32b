"""The report of an evaluation: one HTML file, no network, every model text escaped."""

from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Final

import srt_cli
from srt_cli.evaluation.contest import Contest, Row
from srt_cli.evaluation.contest_tables import footnotes_of, tables_of, warnings_of
from srt_cli.evaluation.drift_table import drift_tables
from srt_cli.evaluation.evidence import Evidence
from srt_cli.records import STATUSES
from srt_cli.report.examples import examples
from srt_cli.report.plot import Interval, bar_plot, interval_plot
from srt_cli.report.shell import html_table, write_page
from srt_cli.stats.rates import Estimate
from srt_cli.tables import Table, score_with_error, share_with_error, share_with_interval

SHOWN_LENGTHS: Final = {
    "shorter by more than 10%": "shorter",
    "within 10%": "as long",
    "longer by more than 10%": "longer",
}


def write_report(path: Path, contest: Contest, evidence: Evidence, count: int) -> None:
    """Write the page: headline, plots, drift, the whole table, then `count` examples one by one."""
    program = files("srt_cli.report").joinpath("page.js").read_text(encoding="utf-8")
    prompts = evidence.prompts
    rest = path.with_name(f"{path.stem}.more{path.suffix}") if len(prompts) > count else None
    if rest is not None:
        found = examples(contest, evidence, prompts[count:], rest=path)
        write_page(rest, "srt eval: further examples", found, program)
    body = "".join(
        [
            _headline(contest),
            _warnings(contest),
            _plots(contest),
            _drift(contest),
            _table(contest),
            examples(contest, evidence, prompts[:count], rest=rest),
            f"<footer>Made by srt {escape(srt_cli.__version__)}. The figures are in eval.json, "
            "every verdict in judgments.jsonl.</footer>",
        ]
    )
    write_page(path, "srt eval", body, program)


def _headline(contest: Contest) -> str:
    facts = [f"{contest.prompts} prompts", f"reference {contest.reference}"]
    facts += [f"judge {judge}" for judge in contest.judges]
    if contest.check:
        facts.append(f"check {contest.check}")
    sentence = _best_sentence(contest)
    return (
        f"<header><h1>{escape(sentence)}</h1>"
        f"<p class=facts>{' · '.join(escape(fact) for fact in facts)}</p></header>"
    )


def _best_sentence(contest: Contest) -> str:
    # A contestant whose outputs are no answers is no headline, whatever it wins.
    sound = [row for row in contest.rows if not row.degenerate.red_flag]
    compared = [row for row in sound if row.difference is not None]
    if compared:
        best = max(
            compared, key=lambda row: row.difference.difference.value if row.difference else 0
        )
        assert best.difference is not None
        found = best.difference.difference
        sure = "" if found.low > 0 or found.high < 0 else ", which is within the noise"
        points = f"{abs(100 * found.value):.0f} points"
        side = "above" if found.value >= 0 else "below"
        return f"{contest.label_of(best)} passes {points} {side} the reference{sure}."
    judged = [row for row in sound if row.judged and row.judged[0].win_rate]
    if judged:
        best = max(judged, key=_win_value)
        rate = best.judged[0].win_rate
        assert rate is not None
        sure = "" if rate.low > 0.5 or rate.high < 0.5 else ", which is within the noise"
        return f"{contest.label_of(best)} wins {rate.value:.0%} against the reference{sure}."
    if len(sound) < len(contest.rows):
        return "Nothing can be said: the answers are degenerate."
    return "Nothing could be compared."


def _win_value(row: Row) -> float:
    rate = row.judged[0].win_rate if row.judged else None
    return rate.value if rate else 0.0


def _warnings(contest: Contest) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings_of(contest))
    return (
        f'<section class="warnings"><h2>Read with care</h2><ul>{items}</ul></section>'
        if items
        else ""
    )


def _plots(contest: Contest) -> str:
    sections = []
    passing = [
        _interval(contest.label_of(row), r, emphasised=row.contestant != contest.reference)
        for row in contest.rows
        if (r := row.pass_rate) is not None
    ]
    if passing:
        base = contest.rows[0].pass_rate
        middle = base.value if base else None
        plot = interval_plot(passing, middle=middle, caption="Pass rates")
        sections.append(_figure("Pass rate", "Share of answers that pass the check.", plot))
    for place, judge in enumerate(contest.judges):
        says = f", says {escape(contest.name_of_judge(judge))}" if len(contest.judges) > 1 else ""
        judged = [(contest.label_of(row), row.judged[place]) for row in contest.rows if row.judged]
        winning = [_interval(label, w) for label, each in judged if (w := each.win_rate)]
        if winning:
            plot = interval_plot(winning, middle=0.5, caption="Win rates")
            about = "Against the reference's direct answer; ties count half."
            sections.append(_figure(f"Win rate{says}", about, plot))
        controlled = [
            _interval(label, c.rate) for label, each in judged if (c := each.length_controlled)
        ]
        if controlled:
            plot = interval_plot(controlled, middle=0.5, caption="Length-controlled win rates")
            about = "What the win rate would be if both answers were equally long."
            sections.append(_figure(f"Length-controlled win rate{says}", about, plot))
        sections += _judge_plots(contest, place, says)
    return "".join(sections)


def _judge_plots(contest: Contest, place: int, says: str) -> list[str]:
    """What the order of presentation and the length of an answer do to one judge's verdicts."""
    rows = [(contest.label_of(row), row.judged[place]) for row in contest.rows if row.judged]
    by_position, by_length = [], []
    for label, judged in rows:
        if judged.position is not None:
            for name, rate in (
                ("first", judged.position.shown_first), ("second", judged.position.shown_second)
            ):  # fmt: skip
                if rate is not None:
                    text = f"{label}, shown {name}"
                    by_position.append(_interval(text, rate))
        for each in judged.by_length:
            if (rate := each.win_rate) is not None and each.name in SHOWN_LENGTHS:
                text = f"{label}, {SHOWN_LENGTHS[each.name]}"
                by_length.append(_interval(text, rate))
    sections = []
    if by_position:
        plot = interval_plot(by_position, middle=0.5, caption="Win rates by position")
        both = rows[0][1].orders == "both"
        what = "The same pairs in both orders" if both else "Different prompts in each order"
        about = f"{what}; a judge without position bias has equal pairs."
        sections.append(_figure(f"Position{says}", about, plot))
    if by_length:
        plot = interval_plot(by_length, middle=0.5, caption="Win rates by length")
        about = "Win rates where the answer is more than 10 % shorter, about as long, or longer."
        sections.append(_figure(f"Length against preference{says}", about, plot))
    return sections


def _interval(label: str, estimate: Estimate, *, emphasised: bool = True) -> Interval:
    return Interval(label, estimate.value, estimate.low, estimate.high, emphasised)


def _figure(title: str, about: str, plot: str) -> str:
    return (
        f"<section><h2>{title}</h2><p>{about} Bars are 95 % intervals.</p>"
        f'<div class="plot">{plot}</div></section>'
    )


def _drift(contest: Contest) -> str:
    """Each stage's alarm in its colour, what the stages score, and the table."""
    if not contest.stages:
        return ""
    alarms = "".join(
        f'<p class="alarm {stage.echo.colour}"><b>{escape(stage.name)}, {stage.echo.colour}:</b> '
        f"{escape(stage.echo.reason)}.</p>"
        for stage in contest.stages
        if stage.echo is not None
    )
    plots = "".join(
        f"<figure><figcaption>{escape(stage.name)}, scored by {whose}</figcaption>"
        f"{bar_plot(list(counts.items()), caption=f'Scores of {stage.name}, {whose}')}</figure>"
        for stage in contest.stages
        for whose, counts in (
            ("itself", stage.own_histogram), ("an outside scorer", stage.outside_histogram)
        )
        if counts
    )  # fmt: skip
    scores = f'<h3>scores from 1 to 10</h3><div class="figures">{plots}</div>' if plots else ""
    tables = "".join(
        html_table(table.title, table.columns, table.cells)
        for table in drift_tables(contest.stages)
    )
    return f"<section><h2>Drift</h2>{alarms}{tables}{scores}</section>"


def _table(contest: Contest) -> str:
    tables = [
        html_table(table.title, table.columns, table.cells)
        for table in [*tables_of(contest, drift=False), *_further(contest), _lengths(contest)]
    ]
    notes = "".join(f"<p>{escape(note)}</p>" for note in footnotes_of(contest))
    return f"<section><h2>All figures</h2>{''.join(tables)}{notes}</section>"


def _further(contest: Contest) -> list[Table]:
    """What the terminal has no room for: other ways of counting wins, slots, verdicts that fail."""
    found = []
    for place, judge in enumerate(contest.judges):
        judged = [(contest.label_of(row), row.judged[place]) for row in contest.rows if row.judged]
        columns = ["", "discrete [95 %]", "in both orders [95 %]", "gap of the slots", "first slot wins",
                   "longer wins", "n"]  # fmt: skip
        cells = [
            [
                label,
                share_with_interval(each.discrete_win_rate),
                share_with_interval(each.strict_win_rate),
                share_with_error(each.position.gap if each.position else None, "+"),
                share_with_interval(each.position.first_slot_rate if each.position else None),
                share_with_interval(each.prefers_longer),
                str(each.valid_pairs),
            ]
            for label, each in judged
        ]
        name = contest.name_of_judge(judge)
        if cells:
            found.append(Table(f"other ways of counting, says {name}", columns, cells))
        failing = [
            [label, "shown first" if order == "ab" else "shown second",
             *(str(counts.get(status, 0)) for status in STATUSES)]
            for label, each in judged
            for order, counts in each.statuses_by_order.items()
            if counts.keys() - {"ok"}
        ]  # fmt: skip
        if failing:
            found.append(Table(f"verdicts that fail, by {name}", ["", "", *STATUSES], failing))
    return found


def _lengths(contest: Contest) -> Table:
    cells = [
        [
            row.name,
            row.kind,
            _whole(row.characters),
            _whole(row.words),
            score_with_error(row.length_ratio),
        ]
        for row in contest.rows
    ]
    columns = ["", "", "mean characters", "mean words", "length, reference = 1"]
    return Table("length", columns, cells)


def _whole(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.0f}"

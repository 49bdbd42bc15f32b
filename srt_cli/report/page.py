"""The report of an evaluation: one HTML file, no network, every model text escaped."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Final

import srt_cli
from srt_cli.contest import Contest, Row
from srt_cli.records import Judgment, Output, Prompt
from srt_cli.report.plot import Interval, bar_plot, interval_plot
from srt_cli.report.shell import html_table, write_page
from srt_cli.stats.rates import Estimate
from srt_cli.tables import Table

SHOWN_LENGTHS: Final = {
    "shorter by more than 10%": "shorter",
    "within 10%": "as long",
    "longer by more than 10%": "longer",
}
LEAST_ALIKE: Final = 0.3
LONGEST_COMPARED: Final = 1_000_000


def write_report(
    path: Path,
    contest: Contest,
    prompts: Sequence[Prompt],
    outputs: Sequence[Output],
    judgments: Sequence[Judgment],
    examples: int,
) -> None:
    """Write the page: headline, plots, the whole table, then examples one by one."""
    program = files("srt_cli.report").joinpath("page.js").read_text(encoding="utf-8")
    rest = path.with_name(f"{path.stem}.more{path.suffix}") if len(prompts) > examples else None
    if rest is not None:
        more = prompts[examples:]
        found = _examples(contest, more, outputs, judgments, of=len(prompts), rest=None)
        write_page(rest, "srt eval: further examples", found, program)
    body = "".join(
        [
            _headline(contest),
            _warnings(contest),
            _plots(contest),
            _table(contest),
            _examples(contest, prompts[:examples], outputs, judgments, of=len(prompts), rest=rest),
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
    items = "".join(f"<li>{escape(warning)}</li>" for warning in contest.warnings())
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
        judged = [(contest.label_of(row), row.judged[place]) for row in contest.rows if row.judged]
        winning = [_interval(label, w) for label, each in judged if (w := each.win_rate)]
        if winning:
            plot = interval_plot(winning, middle=0.5, caption="Win rates")
            about = f"Against the reference's direct answer, says {escape(judge)}; ties count half."
            sections.append(_figure("Win rate", about, plot))
        controlled = [
            _interval(label, c.rate) for label, each in judged if (c := each.length_controlled)
        ]
        if controlled:
            plot = interval_plot(controlled, middle=0.5, caption="Length-controlled win rates")
            about = "What the win rate would be if both answers were equally long."
            sections.append(_figure("Length-controlled win rate", about, plot))
        sections += _judge_plots(contest, place)
    for stage in contest.stages:
        for whose, counts in (
            ("its own model", stage.own_histogram), ("outside", stage.outside_histogram)
        ):  # fmt: skip
            if counts:
                plot = bar_plot(list(counts.items()), caption=f"Scores of {stage.name}, {whose}")
                title = f"Scores of {escape(stage.name)}, given by {whose}"
                sections.append(
                    f'<section><h2>{title}</h2><div class="plot">{plot}</div></section>'
                )
    return "".join(sections)


def _judge_plots(contest: Contest, place: int) -> list[str]:
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
        about = "The same pairs in both orders; a judge without position bias has equal pairs."
        sections.append(_figure("Position", about, plot))
    if by_length:
        plot = interval_plot(by_length, middle=0.5, caption="Win rates by length")
        about = "Win rates where the answer is more than 10 % shorter, about as long, or longer."
        sections.append(_figure("Length against preference", about, plot))
    return sections


def _interval(label: str, estimate: Estimate, *, emphasised: bool = True) -> Interval:
    return Interval(label, estimate.value, estimate.low, estimate.high, emphasised)


def _figure(title: str, about: str, plot: str) -> str:
    return (
        f"<section><h2>{title}</h2><p>{about} Bars are 95 % intervals.</p>"
        f'<div class="plot">{plot}</div></section>'
    )


def _table(contest: Contest) -> str:
    tables = [
        html_table(table.title, table.columns, table.cells)
        for table in [*contest.tables(), _lengths(contest)]
    ]
    notes = "".join(f"<p>{escape(note)}</p>" for note in contest.footnotes())
    return f"<section><h2>All figures</h2>{''.join(tables)}{notes}</section>"


def _lengths(contest: Contest) -> Table:
    cells = [
        [
            row.name,
            row.kind,
            f"{row.mean_characters:.0f}",
            f"{row.mean_words:.0f}",
            f"{row.length_ratio:.2f}" if row.length_ratio else "-",
        ]
        for row in contest.rows
    ]
    columns = ["", "", "mean characters", "mean words", "length, reference = 1"]
    return Table("length", columns, cells)


def _examples(
    contest: Contest,
    prompts: Sequence[Prompt],
    outputs: Sequence[Output],
    judgments: Sequence[Judgment],
    *,
    of: int,
    rest: Path | None,
) -> str:
    by_prompt: dict[str, list[Output]] = {}
    for output in outputs:
        by_prompt.setdefault(output.id, []).append(output)
    verdicts: dict[tuple[str, str], list[Judgment]] = {}
    for judgment in judgments:
        verdicts.setdefault((judgment.id, judgment.a), []).append(judgment)
    labels = {(row.contestant, row.use): contest.label_of(row) for row in contest.rows}
    cards = []
    for prompt in prompts:
        mine = by_prompt.get(prompt.id, [])
        drafts = {output.contestant: output.response for output in mine if output.use == "response"}
        answers = "".join(
            _answer(
                output,
                labels,
                verdicts.get((prompt.id, f"{output.contestant} {output.use}"), []),
                drafts.get(output.contestant) if output.use != "response" else None,
            )
            for output in mine
        )
        cards.append(
            f'<article><p class="prompt">{escape(prompt.text)}</p>'
            f'<div class="answers">{answers}</div></article>'
        )
    shown = f"{len(cards)} of {of} prompts"
    link = f'<p><a href="{escape(rest.name)}">The other {of - len(cards)}</a></p>' if rest else ""
    return (
        f'<section id="examples"><h2>Examples</h2><p class="tools">'
        '<input id="search" type="search" placeholder="Filter by text" aria-label="Filter by text"> '
        '<label><input id="changed" type="checkbox"> only where answers differ in verdict</label> '
        f'<span id="count">{shown}</span></p>{"".join(cards)}{link}</section>'
    )


def _answer(
    output: Output,
    labels: dict[tuple[str, str], str],
    verdicts: Sequence[Judgment],
    draft: str | None,
) -> str:
    """One answer as a card; a refinement has the words marked that its draft does not have."""
    marks = []
    if output.passed is not None:
        marks.append("passes" if output.passed else "fails")
    marks += [_verdict_word(verdict) for verdict in verdicts]
    if output.parsed is False:
        marks.append("critique did not parse: this is the draft")
    state = "" if output.passed is None else (" good" if output.passed else " bad")
    label = labels[output.contestant, output.use]
    return (
        f'<div class="answer{state}"><h3>{escape(label)}</h3>'
        f"<pre>{_marked(output.response, draft) or '<i>empty</i>'}</pre>"
        f'<p class="marks">{escape(" · ".join(marks))}</p></div>'
    )


def _marked(text: str, draft: str | None) -> str:
    """The text, escaped, with what is new against the draft marked; nothing when all is new."""
    if draft is None or text == draft:
        return escape(text)
    old, new = re.split(r"(\s+)", draft), re.split(r"(\s+)", text)
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    if len(old) * len(new) > LONGEST_COMPARED or matcher.ratio() < LEAST_ALIKE:
        return escape(text)
    parts = []
    for kind, _, _, start, end in matcher.get_opcodes():
        piece = escape("".join(new[start:end]))
        parts.append(f"<mark>{piece}</mark>" if kind in ("replace", "insert") and piece else piece)
    return "".join(parts)


def _verdict_word(verdict: Judgment) -> str:
    shown = "shown first" if verdict.order == "ab" else "shown second"
    if verdict.preference is None:
        return f"no verdict when {shown} ({verdict.status})"
    word = {1.0: "wins", 0.0: "loses", 0.5: "ties"}.get(
        verdict.preference, f"preferred {verdict.preference:.2f}"
    )
    return f"{word} {shown}"

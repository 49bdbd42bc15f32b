"""The report of an evaluation: its figures, and all that was said of each prompt's answers."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Final

from srt_cli.evaluation.contest import Contest, Standing
from srt_cli.evaluation.evidence import Evidence
from srt_cli.evaluation.findings import Findings, footnotes_of, warnings_of
from srt_cli.evaluation.tables import drift_table, further_tables, tables_of
from srt_cli.records import Entrant, FeedbackRecord, Judgment, Output, Prompt, Scored
from srt_cli.report.html import Interval, bar_plot, interval_plot, write_page
from srt_cli.runs.jsonl import write_atomically
from srt_cli.stats.rates import Estimate
from srt_cli.tables import Table, many

SHOWN_LENGTHS: Final = {
    "shorter by more than 10%": "shorter",
    "within 10%": "as long",
    "longer by more than 10%": "longer",
}
PAGE_WIDTH: Final = 110
"""Characters of a table that a page shows side by side; what is wider can be scrolled."""
LEAST_ALIKE: Final = 0.3
LONGEST_COMPARED: Final = 1_000_000


def write_report(path: Path, findings: Findings, evidence: Evidence, count: int) -> None:
    """Write the page: headline, plots, drift, the whole table, then `count` examples one by one."""
    contest, prompts = findings.contest, evidence.prompts
    told = _Told(contest, evidence)
    rest = path.with_name(f"{path.stem}.more{path.suffix}") if len(prompts) > count else None
    if rest is not None:
        further = told.examples(prompts[count:], path)
        title = "srt eval: further examples"
        write_page(rest, "eval_more.html", {"title": title, "examples": further})
    facts = [f"{contest.prompts} prompts", f"reference {contest.reference}"]
    facts += [f"judge {judge}" for judge in contest.judges]
    facts += [f"check {contest.check}"] if contest.check else []
    values = {
        "title": "srt eval",
        "headline": _headline(contest),
        "facts": facts,
        "doubts": warnings_of(findings),
        "plots": [each for each in _plots(contest) if each.svg],
        "stages": findings.stages,
        "drift": _fitted(drift_table(findings.stages)),
        "histograms": list(_histograms(findings)),
        "tables": _fitted([*tables_of(findings, drift=False), *further_tables(contest)]),
        "footnotes": footnotes_of(findings),
        "examples": told.examples(prompts[:count], rest),
    }
    write_page(path, "eval.html", values)


def _fitted(tables: Sequence[Table]) -> list[Table]:
    return [part for table in tables for part in table.fitted(PAGE_WIDTH)]


def write_markdown(path: Path, tables: Sequence[Table], notes: Sequence[str]) -> None:
    """The tables as Markdown, for a pull request or a model card."""
    parts = []
    for table in tables:
        lines = [table.columns, ["---"] * len(table.columns), *table.cells]
        rows = (
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
        parts.append(f"### {table.title}\n\n" + "\n".join(rows))
    text = "\n\n".join([*parts, *notes]) + "\n"
    write_atomically(path, text.encode("utf-8", errors="replace"))


def _headline(contest: Contest) -> str:
    # A contestant whose outputs are no answers is no headline, whatever it wins.
    sound = [row for row in contest.rows if not row.degenerate.red_flag]
    compared = [(row.difference.difference, row) for row in sound if row.difference is not None]
    if compared:
        found, best = max(compared, key=lambda each: each[0].value)
        sure = "" if found.low > 0 or found.high < 0 else ", which is within the noise"
        points = round(abs(100 * found.value))
        if not points:
            return f"{contest.labels[best.entrant]} passes as often as the reference."
        side = "above" if found.value > 0 else "below"
        told = f"{many(points, 'point')} {side} the reference{sure}"
        return f"{contest.labels[best.entrant]} passes {told}."
    judged = [(rate, row) for row in sound if row.judged and (rate := row.judged[0].win_rate)]
    if judged:
        rate, best = max(judged, key=lambda each: each[0].value)
        sure = "" if rate.low > 0.5 or rate.high < 0.5 else ", which is within the noise"
        return f"{contest.labels[best.entrant]} wins {rate.value:.0%} against the reference{sure}."
    if len(sound) < len(contest.rows):
        return "Nothing can be said: the answers are degenerate."
    return "Nothing could be compared."


@dataclass(frozen=True)
class _Plot:
    """A plot with its title and what it shows; the plot is "" where there is nothing to show."""

    title: str
    about: str
    svg: str


def _plots(contest: Contest) -> Iterator[_Plot]:
    passing = [
        _interval(contest, row, row.pass_rate, emphasised=row.contestant != contest.reference)
        for row in contest.rows
    ]
    base = contest.rows[0].pass_rate
    middle = base.value if base else None
    about = "Share of answers that pass the check."
    yield _Plot("Pass rate", about, _drawn(passing, "Pass rates", middle))
    for place, judge in enumerate(contest.judges):
        says = f", says {contest.name_of_judge(judge)}" if len(contest.judges) > 1 else ""
        yield from _judge_plots(contest, place, says)


def _judge_plots(contest: Contest, place: int, says: str) -> Iterator[_Plot]:
    """Who wins, and what order of presentation and length of an answer do to one judge's verdicts."""
    rulings = [(row, row.judged[place]) for row in contest.rows if row.judged]
    wins = [_interval(contest, row, each.win_rate) for row, each in rulings]
    about = "Against the reference's direct answer; ties count half."
    yield _Plot(f"Win rate{says}", about, _drawn(wins, "Win rates"))
    controlled = [
        _interval(contest, row, each.length_controlled.rate)
        for row, each in rulings
        if each.length_controlled is not None
    ]
    about = "What the win rate would be if both answers were equally long."
    plot = _drawn(controlled, "Length-controlled win rates")
    yield _Plot(f"Length-controlled win rate{says}", about, plot)
    by_position = [
        _interval(contest, row, rate, f", shown {name}")
        for row, each in rulings
        if (found := each.position) is not None
        for name, rate in (("first", found.shown_first), ("second", found.shown_second))
    ]
    both = any(each.orders == "both" for _, each in rulings)
    what = "The same pairs in both orders" if both else "Different prompts in each order"
    about = f"{what}; a judge without position bias has equal pairs."
    yield _Plot(f"Position{says}", about, _drawn(by_position, "Win rates by position"))
    by_length = [
        _interval(contest, row, group.win_rate, f", {SHOWN_LENGTHS[group.name]}")
        for row, each in rulings
        for group in each.by_length
        if group.name in SHOWN_LENGTHS
    ]
    about = "Win rates where the answer is more than 10 % shorter, about as long, or longer."
    plot = _drawn(by_length, "Win rates by length")
    yield _Plot(f"Length against preference{says}", about, plot)


def _interval(
    contest: Contest,
    row: Standing,
    found: Estimate | None,
    of: str = "",
    *,
    emphasised: bool = True,
) -> Interval | None:
    if found is None:
        return None
    label = contest.labels[row.entrant] + of
    return Interval(label, found.value, found.low, found.high, emphasised)


def _drawn(rows: Sequence[Interval | None], caption: str, middle: float | None = 0.5) -> str:
    known = [row for row in rows if row is not None]
    return interval_plot(known, middle=middle, caption=caption) if known else ""


def _histograms(findings: Findings) -> Iterator[tuple[str, str]]:
    """What each stage scored its answers, and what an outside scorer did."""
    for stage in findings.stages:
        for whose, counts in (
            ("itself", stage.own_histogram), ("an outside scorer", stage.outside_histogram)
        ):  # fmt: skip
            if counts:
                caption = f"Scores of {stage.name}, {whose}"
                yield (
                    f"{stage.name}, scored by {whose}",
                    bar_plot(list(counts.items()), caption=caption),
                )


@dataclass(frozen=True)
class _Answer:
    """One answer as a card; of a refinement, what its draft does not have is new."""

    label: str
    state: str
    critique: FeedbackRecord | None
    pieces: list[tuple[str, bool]]
    marks: list[str]


@dataclass(frozen=True)
class _Card:
    prompt: str
    answers: list[_Answer]
    differs: bool


@dataclass(frozen=True)
class _Examples:
    """Some of all prompts, and the name of the page that holds the others."""

    cards: list[_Card]
    of: int
    rest: str | None


class _Told:
    """What was said of each output, found by prompt and entrant."""

    def __init__(self, contest: Contest, evidence: Evidence) -> None:
        self._labels = contest.labels
        self._judges = {judge: contest.name_of_judge(judge) for judge in contest.judges}
        self._of = len(evidence.prompts)
        self._outputs: dict[str, list[Output]] = {}
        for output in evidence.outputs:
            self._outputs.setdefault(output.id, []).append(output)
        self._verdicts: dict[tuple[str, Entrant], list[Judgment]] = {}
        for judgment in evidence.judgments:
            self._verdicts.setdefault((judgment.id, judgment.entrant), []).append(judgment)
        self._scores: dict[tuple[str, Entrant], list[Scored]] = {}
        for scored in evidence.scores:
            entrant = Entrant(scored.contestant, scored.use)
            self._scores.setdefault((scored.id, entrant), []).append(scored)
        self._critiques = {
            (contestant, record.id): record
            for contestant, records in evidence.critiques.items()
            for record in records
        }

    def examples(self, prompts: Sequence[Prompt], rest: Path | None) -> _Examples:
        """Cards of these prompts; `rest` is the page that holds the others."""
        cards = [self._card(prompt) for prompt in prompts]
        return _Examples(cards, self._of, rest.name if rest is not None else None)

    def _card(self, prompt: Prompt) -> _Card:
        mine = self._outputs.get(prompt.id, [])
        drafts = {output.contestant: output.response for output in mine if output.use == "response"}
        answers = [
            self._answer(
                output, None if output.use == "response" else drafts.get(output.contestant)
            )
            for output in mine
        ]
        return _Card(prompt.text, answers, self._differs(mine))

    def _answer(self, output: Output, draft: str | None) -> _Answer:
        state = "" if output.passed is None else "good" if output.passed == 1 else "bad"
        refined = output.use == "refinement"
        critique = self._critiques.get((output.contestant, output.id)) if refined else None
        pieces = [piece for piece in marked(output.response, draft) if piece[0]]
        label = self._labels[output.entrant]
        return _Answer(label, state, critique, pieces, self._marks_of(output))

    def _differs(self, outputs: Sequence[Output]) -> bool:
        """Whether checks, judges or the two orders do not all say the same of these answers."""
        checked = {output.passed for output in outputs if output.passed is not None}
        sides = {
            (verdict.preference > 0.5) - (verdict.preference < 0.5)
            for output in outputs
            for verdict in self._verdicts.get((output.id, output.entrant), [])
            if verdict.preference is not None
        }
        return len(checked) > 1 or len(sides) > 1

    def _marks_of(self, output: Output) -> list[str]:
        """Check, verdicts and scores in a few words each; the verdict first."""
        marks = []
        if output.passed is not None:
            share = "fails" if not output.passed else f"passes {output.passed:.0%}"
            marks.append("passes" if output.passed == 1 else share)
        failed = [name for name, value in output.parts.items() if value < 1]
        if failed:
            marks.append(f"not: {', '.join(failed)}")
        if output.status == "truncated":
            marks.append("cut at the token limit")
        key = output.id, output.entrant
        for verdict in self._verdicts.get(key, []):
            name = self._judges.get(verdict.judge, verdict.judge)
            marks.append(_in_words(verdict) + (f" ({name})" if len(self._judges) > 1 else ""))
        for scored in self._scores.get(key, []):
            whose = "its own score" if scored.by == scored.contestant else "outside score"
            marks.append(f"{whose} {'none' if scored.score is None else f'{scored.score:g}'}")
        if output.parsed is False:
            marks.append("critique did not parse: this is the draft")
        return marks


def marked(text: str, draft: str | None) -> list[tuple[str, bool]]:
    """The text in pieces, and whether each is new against the draft; none is when all would be."""
    if draft is None or text == draft:
        return [(text, False)]
    old, new = re.split(r"(\s+)", draft), re.split(r"(\s+)", text)
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    if len(old) * len(new) > LONGEST_COMPARED or matcher.ratio() < LEAST_ALIKE:
        return [(text, False)]
    return [
        ("".join(new[start:end]), kind in ("replace", "insert"))
        for kind, _, _, start, end in matcher.get_opcodes()
    ]


def _in_words(verdict: Judgment) -> str:
    shown = "shown first" if verdict.order == "ab" else "shown second"
    if verdict.preference is None:
        return f"no verdict when {shown} ({verdict.status})"
    word = {1.0: "wins", 0.0: "loses", 0.5: "ties"}.get(
        verdict.preference, f"preferred {verdict.preference:.2f}"
    )
    return f"{word} {shown}"

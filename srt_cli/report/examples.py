"""The prompts one by one: what everyone answered, what was said of it, and how it was judged."""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from pathlib import Path
from typing import Final

from srt_cli.evaluation.contest import Contest
from srt_cli.evaluation.evidence import Evidence
from srt_cli.records import FeedbackRecord, Judgment, Output, Prompt, Scored

LEAST_ALIKE: Final = 0.3
LONGEST_COMPARED: Final = 1_000_000


def examples(
    contest: Contest, evidence: Evidence, prompts: Sequence[Prompt], *, rest: Path | None
) -> str:
    """Cards of these prompts with a filter; `rest` is the page that holds the others."""
    told = _Told(contest, evidence)
    cards = []
    for prompt in prompts:
        mine = told.outputs.get(prompt.id, [])
        drafts = {output.contestant: output.response for output in mine if output.use == "response"}
        answers = "".join(
            _answer(
                output, told, drafts.get(output.contestant) if output.use != "response" else None
            )
            for output in mine
        )
        differs = " data-differs" if told.differs(mine) else ""
        cards.append(
            f'<article{differs}><p class="prompt">{escape(prompt.text)}</p>'
            f'<div class="answers">{answers}</div></article>'
        )
    of = len(evidence.prompts)
    shown = f"{len(cards)} of {of} prompts"
    link = (
        f'<p class="rest">The other {of - len(cards)} are in '
        f'<a href="{escape(rest.name)}">{escape(rest.name)}</a>.</p>'
        if rest
        else ""
    )
    return (
        f'<section id="examples"><h2>Examples</h2><p class="tools">'
        '<input id="search" type="search" placeholder="Filter by text" aria-label="Filter by text"> '
        '<label><input id="changed" type="checkbox"> only where verdicts differ</label> '
        f'<span id="count">{shown}</span></p>{"".join(cards)}{link}</section>'
    )


class _Told:
    """What was said of each output, found by prompt and contestant."""

    def __init__(self, contest: Contest, evidence: Evidence) -> None:
        self.labels = {(row.contestant, row.use): contest.label_of(row) for row in contest.rows}
        self.judge_names = {judge: contest.name_of_judge(judge) for judge in contest.judges}
        self.outputs: dict[str, list[Output]] = {}
        for output in evidence.outputs:
            self.outputs.setdefault(output.id, []).append(output)
        self.verdicts: dict[tuple[str, str], list[Judgment]] = {}
        for judgment in evidence.judgments:
            self.verdicts.setdefault((judgment.id, judgment.a), []).append(judgment)
        self.scores: dict[tuple[str, str, str], list[Scored]] = {}
        for scored in evidence.scores:
            self.scores.setdefault((scored.id, scored.contestant, scored.use), []).append(scored)
        self.critiques: Mapping[tuple[str, str], FeedbackRecord] = {
            (contestant, record.id): record
            for contestant, records in evidence.critiques.items()
            for record in records
        }

    def differs(self, outputs: Sequence[Output]) -> bool:
        """Whether checks, judges or the two orders do not all say the same of these answers."""
        checked = {output.passed for output in outputs if output.passed is not None}
        named = [(output.id, f"{output.contestant} {output.use}") for output in outputs]
        sides = {
            (verdict.preference > 0.5) - (verdict.preference < 0.5)
            for name in named
            for verdict in self.verdicts.get(name, [])
            if verdict.preference is not None
        }
        return len(checked) > 1 or len(sides) > 1

    def marks_of(self, output: Output) -> list[str]:
        """Check, verdicts and scores in a few words each; the verdict first."""
        marks = []
        if output.passed is not None:
            marks.append("passes" if output.passed else "fails")
        name = f"{output.contestant} {output.use}"
        several = len(self.judge_names) > 1
        for verdict in self.verdicts.get((output.id, name), []):
            by = f" ({self.judge_names.get(verdict.judge, verdict.judge)})" if several else ""
            marks.append(_verdict_word(verdict) + by)
        for scored in self.scores.get((output.id, output.contestant, output.use), []):
            whose = "its own score" if scored.by == scored.contestant else "outside score"
            marks.append(f"{whose} {'none' if scored.score is None else f'{scored.score:g}'}")
        if output.parsed is False:
            marks.append("critique did not parse: this is the draft")
        return marks


def _answer(output: Output, told: _Told, draft: str | None) -> str:
    """One answer as a card; a refinement has the words marked that its draft does not have."""
    state = "" if output.passed is None else (" good" if output.passed else " bad")
    record = told.critiques.get((output.contestant, output.id))
    feedback = _feedback(record) if record is not None and output.use == "refinement" else ""
    return (
        f'<div class="answer{state}"><h3>{escape(told.labels[output.contestant, output.use])}</h3>'
        f"{feedback}<pre>{_marked(output.response, draft) or '<i>empty</i>'}</pre>"
        f'<p class="marks">{escape(" · ".join(told.marks_of(output)))}</p></div>'
    )


def _feedback(record: FeedbackRecord) -> str:
    """What led to a refinement: the critique of the draft, or why there is none."""
    if record.feedback is None:
        return f'<p class="feedback">No feedback: {escape(record.reason or record.status)}</p>'
    found = record.feedback
    return (
        f'<p class="feedback"><b>Weaknesses</b> {escape(found.weaknesses)}<br>'
        f"<b>Suggestions</b> {escape(found.suggestions)}<br><b>Score</b> {found.score:g}</p>"
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

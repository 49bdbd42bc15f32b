"""Can a judge be believed? Held against another judge, against itself, and for its own answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from srt_cli.evaluation.judging import Twice
from srt_cli.stats.agreement import Agreement, agreement
from srt_cli.stats.rates import Estimate, mean_with_error, pass_rate
from srt_cli.tables import (
    Table,
    score_with_error,
    share,
    share_with_error,
    share_with_interval,
    shorten,
)

Preferences = Mapping[tuple[str, str], Mapping[str, float]]
"""Per (contestant and use, judge) and prompt, 0 to 1."""


@dataclass(frozen=True)
class JudgesAgree:
    """How often two judges said the same of the same pair."""

    first: str
    second: str
    agreement: Agreement


@dataclass(frozen=True)
class RepeatsItself:
    """The same questions asked a second time, past the journal."""

    judge: str
    same: Estimate | None
    """Verdicts that came out the same; 1 minus this is AlpacaEval's variance of two runs."""
    moved: Estimate | None
    """By how much the preference moved, 0 to 1."""
    asked: int
    unread: int
    """Questions without a valid verdict in both runs."""


@dataclass(frozen=True)
class SelfPreference:
    """A contestant that judges its own answers: its win rate by itself minus by an outside judge."""

    judge: str
    contestant: str
    outside: str
    gap: Estimate
    """Paired over the same pairs, 0 to 1."""


def judges_agree(judges: Sequence[str], preferences: Preferences) -> list[JudgesAgree]:
    """The first judge against each other, over all pairs that both judged."""
    values: dict[str, dict[tuple[str, str], float]] = {judge: {} for judge in judges}
    for (label, judge), by_prompt in preferences.items():
        values[judge] |= {(label, name): value for name, value in by_prompt.items()}
    found = []
    for other in judges[1:]:
        common = [pair for pair in values[judges[0]] if pair in values[other]]
        agreed = agreement(
            [values[judges[0]][pair] for pair in common], [values[other][pair] for pair in common]
        )
        if agreed is not None:
            found.append(JudgesAgree(judges[0], other, agreed))
    return found


def self_preferences(
    judges: Sequence[str], preferences: Preferences, labels: Mapping[str, str]
) -> list[SelfPreference]:
    """Every judge that is a contestant too, against every judge that is not.

    `labels` names each contestant and use for people.
    """
    found = []
    for (label, judge), mine in preferences.items():
        contestant, _, _ = label.rpartition(" ")
        if judge != contestant:
            continue
        for other in judges:
            theirs = preferences.get((label, other), {})
            gaps = [value - theirs[name] for name, value in mine.items() if name in theirs]
            gap = mean_with_error(gaps, (-1.0, 1.0))
            if other != judge and gap is not None:
                found.append(SelfPreference(judge, labels[label], other, gap))
    return found


def repeats_itself(judge: str, questions: Sequence[Twice]) -> RepeatsItself:
    """Count two verdicts on each question."""
    both = [
        (a.preference, b.preference)
        for a, b in questions
        if a.preference is not None and b.preference is not None
    ]
    return RepeatsItself(
        judge=judge,
        same=pass_rate([_side(a) == _side(b) for a, b in both]),
        moved=mean_with_error([abs(a - b) for a, b in both]),
        asked=len(questions),
        unread=len(questions) - len(both),
    )


def _side(preference: float) -> int:
    return (preference > 0.5) - (preference < 0.5)


def judge_tables(
    agreements: Sequence[JudgesAgree],
    repeats: Sequence[RepeatsItself],
    preferences: Sequence[SelfPreference],
    name: Callable[[str], str],
) -> list[Table]:
    """What is known of the judges, a table a kind of knowledge; `name` makes a judge's spec short."""
    found = []
    if agreements:
        columns = ["", "same [95 %]", "ties out", "kappa", "tau-b", "n"]
        cells = [
            [
                f"{shorten(name(each.first), 14)} and {shorten(name(each.second), 14)}",
                share_with_interval(each.agreement.accuracy),
                share(each.agreement.without_ties),
                *_coefficients(each.agreement),
                str(each.agreement.n),
            ]
            for each in agreements
        ]
        found.append(Table("judges against each other", columns, cells))
    if repeats:
        columns = ["", "same [95 %]", "moved, points", "asked twice", "unread"]
        cells = [
            [
                shorten(name(each.judge), 30),
                share_with_interval(each.same),
                share_with_error(each.moved),
                str(each.asked),
                str(each.unread),
            ]
            for each in repeats
        ]
        found.append(Table("the same question twice", columns, cells))
    if preferences:
        columns = ["", "favours itself by, points", "n"]
        cells = [
            [
                f"{shorten(each.contestant, 30)}, against {shorten(name(each.outside), 18)}",
                share_with_error(each.gap, "+"),
                str(each.gap.n),
            ]
            for each in preferences
        ]
        found.append(Table("judges of their own answers", columns, cells))
    return found


def _coefficients(found: Agreement) -> list[str]:
    return [score_with_error(each) for each in (found.kappa, found.kendall)]

"""How reliable a judge is: against people, other judges and itself, and on its own answers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from srt_cli.evaluation.evidence import Evidence
from srt_cli.evaluation.judging import Twice
from srt_cli.evaluation.verdicts import Preferences
from srt_cli.records import Entrant
from srt_cli.stats.agreement import Agreement, agreement
from srt_cli.stats.rates import Estimate, mean_with_error, pass_rate


@dataclass(frozen=True)
class AgreesWithPeople:
    """A judge, or a rule that needs no judge, against the labels."""

    who: str
    agreement: Agreement


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


def judges_agree(evidence: Evidence) -> list[JudgesAgree]:
    """The first judge against each other, over all pairs that both judged."""
    found = []
    first = evidence.judges[0]
    for other in evidence.judges[1:]:
        mine, theirs = (_said_by(judge, evidence.preferences) for judge in (first, other))
        common = [pair for pair in mine if pair in theirs]
        agreed = agreement([mine[pair] for pair in common], [theirs[pair] for pair in common])
        if agreed is not None:
            found.append(JudgesAgree(first, other, agreed))
    return found


def _said_by(judge: str, preferences: Preferences) -> dict[tuple[Entrant, str], float]:
    """One judge's preferences, by entrant and prompt."""
    return {
        (entrant, item): value
        for (entrant, by), by_prompt in preferences.items()
        if by == judge
        for item, value in by_prompt.items()
    }


def self_preferences(evidence: Evidence, labels: Mapping[Entrant, str]) -> list[SelfPreference]:
    """Every judge that is a contestant too, against every judge that is not.

    `labels` names each entrant for people.
    """
    found = []
    for (entrant, judge), mine in evidence.preferences.items():
        if judge != entrant.contestant:
            continue
        for other in evidence.judges:
            theirs = evidence.preferences.get((entrant, other), {})
            gaps = [value - theirs[name] for name, value in mine.items() if name in theirs]
            gap = mean_with_error(gaps, (-1.0, 1.0))
            if other != judge and gap is not None:
                found.append(SelfPreference(judge, labels[entrant], other, gap))
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
        same=pass_rate([_side(a - 0.5) == _side(b - 0.5) for a, b in both]),
        moved=mean_with_error([abs(a - b) for a, b in both]),
        asked=len(questions),
        unread=len(questions) - len(both),
    )


def _side(value: float) -> int:
    return (value > 0) - (value < 0)


def agree_with_people(evidence: Evidence) -> list[AgreesWithPeople]:
    """Each judge, then the rules: the longer answer wins, the first shown wins, the usual label."""
    labels, answers, base = evidence.labels, evidence.answers, evidence.answers[evidence.base]
    found = []
    for judge in dict.fromkeys(judge for _, judge in evidence.preferences):
        said = _said_by(judge, evidence.preferences)
        found.append((judge, [(said[key], label) for key, label in labels.items() if key in said]))
    known = [
        (len(answers[entrant][item].response) - len(base[item].response), label)
        for (entrant, item), label in labels.items()
        if item in answers.get(entrant, {}) and item in base
    ]
    usual = Counter(label for _, label in known).most_common(1)
    found.append(("the longer answer", [((_side(more) + 1) / 2, label) for more, label in known]))
    found.append(("the answer shown first", [(1.0, label) for _, label in known]))
    found.append(("the usual label", [(usual[0][0], label) for _, label in known]))
    return [
        AgreesWithPeople(who, agreed)
        for who, pairs in found
        if (agreed := agreement([p for p, _ in pairs], [label for _, label in pairs])) is not None
    ]

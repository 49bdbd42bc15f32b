"""What an evaluation found: all its figures, built once, and what a reader has to know about them."""

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Final

from srt_cli.evaluation.contest import Contest, count_contest
from srt_cli.evaluation.critic_quality import OwnCritic, own_critic
from srt_cli.evaluation.drift import StageFigures, drift_of
from srt_cli.evaluation.evidence import Evidence
from srt_cli.evaluation.judge_quality import (
    AgreesWithPeople,
    JudgesAgree,
    RepeatsItself,
    SelfPreference,
    agree_with_people,
    judges_agree,
    repeats_itself,
    self_preferences,
)

LC_NOTES: Final = {
    "alpaca_eval": "Equal length: the length-controlled win rate of AlpacaEval 2.",
    "generic": "Equal length: length-controlled with a generic prior; not comparable with AlpacaEval's.",
}


@dataclass(frozen=True)
class Findings:
    """The contest, and what was asked for beyond it."""

    contest: Contest
    agreements: list[JudgesAgree]
    self_preferences: list[SelfPreference]
    """Contestants that judge, against judges that do not compete."""
    repeats: list[RepeatsItself]
    """The same questions asked twice, when that was asked for."""
    people: list[AgreesWithPeople]
    """How far judges and cheap rules agree with human labels, when there are labels."""
    own_critics: list[OwnCritic]
    """Contestants that refined their answers, as critics of them, against the check."""
    stages: list[StageFigures]
    """The drift table, when scores, labelled pairs or objective results were given."""

    def as_plain(self) -> dict[str, Any]:
        """For `eval.json`."""
        plain = asdict(self)
        contest: dict[str, Any] = plain.pop("contest")
        for stage in plain["stages"]:
            del stage["standing"]
        return contest | plain | {"coverage": self.contest.coverage}


def find(evidence: Evidence) -> Findings:
    """Count everything."""
    contest = count_contest(evidence)
    several = len(evidence.judges) > 1
    return Findings(
        contest,
        judges_agree(evidence) if several else [],
        self_preferences(evidence, contest.labels) if several else [],
        [repeats_itself(judge, asked) for judge, asked in evidence.repeats.items()],
        agree_with_people(evidence) if evidence.labels else [],
        _own_critics(evidence, contest),
        drift_of(evidence, contest) if evidence.has_stages else [],
    )


def _own_critics(evidence: Evidence, contest: Contest) -> list[OwnCritic]:
    """In the order of the contestants; those whose critiques were seen."""
    found: list[OwnCritic] = []
    if evidence.good_score is None:
        return found
    for row in contest.rows:
        records = evidence.critiques.get(row.contestant)
        if row.use != "response" or not records:
            continue
        answers = evidence.answers[row.entrant]
        passed = {o.id: float(o.passed) for o in answers.values() if o.passed is not None}
        found.append(own_critic((row.contestant, row.name), records, passed, evidence.good_score))
    return found


def footnotes_of(findings: Findings) -> list[str]:
    """What a reader needs to know to read the tables rightly."""
    contest = findings.contest
    if contest.prompts == 1:
        return [
            "n = 1 prompt: no error, no test and no length control can be given for a single one."
        ]
    compared = (
        f"; reference: {contest.rows[0].name}, direct; differences in points, paired over the same "
        "prompts"
    )
    notes = [f"n = {contest.prompts} prompts{compared if len(contest.rows) > 1 else ''}."]
    first = next((row.judged[0] for row in contest.rows if row.judged), None)
    if first is not None:
        if first.length_controlled is not None:
            notes.append(LC_NOTES[first.length_controlled.mode])
        if first.orders == "one":
            seen = "is over different prompts" if first.position else "is not seen"
            notes.append(f"Each pair was judged in one order only: position bias {seen}.")
    if contest.judges and (len(contest.rows) > 2 or findings.stages):
        notes.append(
            "p is McNemar's and counts only who wins, the interval also by how much: one may see what "
            "the other does not."
        )
    cut = [round(row.cut.value * row.cut.n) if row.cut else 0 for row in contest.rows]
    for text, counts in (
        ("Cut at the token limit", cut),
        ("Hold words of a critique or a template, which are no answer",
         [row.degenerate.reasons.get("template leakage", 0) for row in contest.rows]),
    ):  # fmt: skip
        named = [
            f"{contest.labels[row.entrant]} {count} of {row.prompts}"
            for row, count in zip(contest.rows, counts, strict=True)
            if count
        ]
        if named:
            notes.append(f"{text}: {', '.join(named)}.")
    if any(row.parsed and row.parsed.value < 1 for row in contest.rows):
        notes.append("Where a critique does not parse, the draft stands for the refinement.")
    return notes


def alarms_of(findings: Findings) -> list[str]:
    """Each stage's alarm with its reason, a sentence each."""
    return [
        f"{stage.name}, {stage.echo.colour}: {stage.echo.reason}."
        for stage in findings.stages
        if stage.echo is not None
    ]


def warnings_of(findings: Findings) -> list[str]:
    """What should make a reader doubt a figure, the gravest first."""
    contest = findings.contest
    found = [
        f"{stage.name}: {stage.echo.colour} alarm: {stage.echo.reason}."
        for stage in findings.stages
        if stage.echo is not None and stage.echo.colour in ("red", "amber")
    ]
    for row in contest.rows:
        label = contest.labels[row.entrant]
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
    if len(contest.rows) == 1 and contest.judges:
        found.append("The only contestant is the reference itself: nothing was compared.")
    for row in contest.rows[1:]:
        if row.prompts < contest.prompts:
            found.append(
                f"{contest.labels[row.entrant]}: has answers to {row.prompts} of {contest.prompts} "
                "prompts; its figures rest on these."
            )
    compared = {frozenset((each.a, each.b)) for each in contest.comparisons}
    judged = [
        contest.labels[row.entrant]
        for row in contest.rows
        if any(ruling.valid_pairs for ruling in row.judged)
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
            text = f"{contest.labels[row.entrant]}{says}: {doubt.text}"
            by_topic.setdefault(doubt.topic, []).append(text)
    return [
        texts[0] + (f"; much the same holds for {len(texts) - 1} more" if texts[1:] else "") + "."
        for texts in by_topic.values()
    ]

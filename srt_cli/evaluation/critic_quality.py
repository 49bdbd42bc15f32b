"""How good a critic is: its critiques as texts, and its scores against others' and people's."""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from srt_cli.calls.conduct import Call
from srt_cli.evaluation.evidence import with_blind_scores
from srt_cli.evaluation.labelled_pairs import LabelledPair, ScoredPair
from srt_cli.feedback.critic import Critic, blind_score
from srt_cli.models import Reply
from srt_cli.records import MAX_SCORE, MIN_SCORE, FeedbackRecord, Prompt, Scored
from srt_cli.stats.agreement import ScoreAgreement, score_agreement
from srt_cli.stats.counting import Confusion, confusion
from srt_cli.stats.critiques import generic_share, is_grounded, same_language
from srt_cli.stats.diversity import distinct_pairs
from srt_cli.stats.echo import APART, SelfBias, self_bias
from srt_cli.stats.hygiene import is_same_text
from srt_cli.stats.rates import Estimate, bootstrap_mean, mean_with_error, pass_rate

ACCEPTED_GAIN: Final = 1.0
SCORES: Final = (float(MIN_SCORE), float(MAX_SCORE))
MOST_GENERIC: Final = 0.5


@dataclass(frozen=True)
class OutsideScores:
    """An outside scorer's blind scores of one record's draft and refinement."""

    record: int
    response: float | None
    refinement: float | None


@dataclass(frozen=True)
class AgainstOutside:
    """A critic's own scores held against an outside scorer's, over the rows that have both."""

    scorer: str
    bias: SelfBias | None
    """Own score of the draft minus the outside score of it."""
    own_gain: Estimate | None
    outside_gain: Estimate | None
    inflation: Estimate | None
    """Own gain minus outside gain, paired."""
    false_accepts: Estimate | None
    """Of the pairs that the critic would keep (gain of 1 or more): outside score not higher."""
    agreement: ScoreAgreement | None
    """Between own and outside scores of the drafts: ranks, κ, α, distance."""
    calibration: dict[str, Estimate]
    """Mean outside score of the drafts that got each own score."""


@dataclass(frozen=True)
class CriticQuality:
    """One feedback file."""

    file: str
    critic: str
    rows: int
    valid: Estimate | None
    """Critiques that hold every part."""
    grounded: Estimate | None
    """Weaknesses that take up the draft: a quotation, or four words in a row."""
    same_language: Estimate | None
    """Critiques in the language of the draft, where both are long enough to tell."""
    generic: Estimate | None
    """Share of critiques that could as well stand under another answer."""
    distinct_pairs: Estimate | None
    words: Estimate | None
    """Mean words of a critique."""
    outside: AgainstOutside | None


@dataclass(frozen=True)
class OwnCritic:
    """A contestant as the critic of its own direct answers, against the check."""

    contestant: str
    name: str
    confusion: Confusion
    good_kept: Estimate | None
    """Answers that pass and that it called good."""
    bad_found: Estimate | None
    """Answers that fail and that it called bad."""
    balanced: Estimate | None
    copies: Estimate | None
    """Refinements that repeat the answer."""


def own_critic(
    contestant: tuple[str, str],
    records: Sequence[FeedbackRecord],
    passed: Mapping[str, float],
    good_score: float,
) -> OwnCritic:
    """Count a contestant's (spec, name) critiques; `passed` is the check's word on each answer."""
    read = [
        (record.feedback.score >= good_score, passed[record.id] == 1)
        for record in records
        if record.feedback is not None and record.id in passed
    ]
    table = confusion([says for says, _ in read], [is_good for _, is_good in read])
    value, interval = table.balanced_accuracy, table.balanced_interval
    copied = [
        is_same_text(record.refinement, record.response)
        for record in records
        if record.refinement is not None and record.response is not None
    ]
    return OwnCritic(
        *contestant,
        table,
        pass_rate([says for says, is_good in read if is_good]),
        pass_rate([not says for says, is_good in read if not is_good]),
        None if value is None or interval is None else Estimate(value, *interval, table.n),
        pass_rate(copied),
    )


@dataclass(frozen=True)
class PairAccuracy:
    """How often a critic scored the chosen answer higher."""

    critic: str
    accuracy: Estimate | None
    """Ties count as wrong; over pairs with both scores."""
    with_half_ties: Estimate | None
    without_ties: Estimate | None
    ties: int
    unread: int
    gap: Estimate | None
    """Mean score of the chosen minus that of the rejected."""
    longer_wins: Estimate | None
    """The baseline: how often the longer answer is the chosen one."""
    pairs: int


def score_record(
    critic: Critic, number: int, record: FeedbackRecord
) -> Generator[Call, Reply, OutsideScores]:
    """Score draft and refinement independently, blind."""
    prompt = Prompt(id=record.id, prompt=record.prompt)
    scores: list[float | None] = []
    for text in (record.response, record.refinement):
        if not text:
            scores.append(None)
            continue
        said = yield from blind_score(critic, prompt, text, f"{record.id} outside score")
        scores.append(said.score)
    return OutsideScores(number, *scores)


def own_quality(
    contestant: str,
    records: Sequence[FeedbackRecord],
    scores: Sequence[Scored],
    scorer: str | None,
) -> CriticQuality:
    """A contestant's critiques of its own answers, with the blind scores that were asked for."""
    mine = [scored for scored in scores if scored.contestant == contestant]
    outside = {(s.id, s.use): s.score for s in mine if s.by == scorer}
    theirs = [
        OutsideScores(
            number, outside.get((row.id, "response")), outside.get((row.id, "refinement"))
        )
        for number, row in enumerate(records)
    ]
    return critic_quality(contestant, with_blind_scores(records, mine), scorer, theirs)


def critic_quality(
    file: str,
    records: Sequence[FeedbackRecord],
    scorer: str | None,
    outside: Sequence[OutsideScores],
) -> CriticQuality:
    """Count one file."""
    answered = [record for record in records if record.response]
    critiqued = [record for record in answered if record.feedback is not None]
    texts = [f"{r.feedback.weaknesses} {r.feedback.suggestions}" for r in critiqued if r.feedback]
    grounded, languages = [], []
    for text, record in zip(texts, critiqued, strict=True):
        assert record.feedback is not None
        assert record.response is not None
        grounded.append(is_grounded(record.feedback.weaknesses, record.response))
        languages.append(same_language(text, record.response))
    return CriticQuality(
        file=file,
        critic=records[0].critic if records else "-",
        rows=len(records),
        valid=pass_rate([record.status == "ok" for record in answered]),
        grounded=pass_rate(grounded),
        same_language=pass_rate([same for same in languages if same is not None]),
        generic=generic_share(texts),
        distinct_pairs=distinct_pairs(texts),
        words=mean_with_error([float(len(text.split())) for text in texts], (0.0, math.inf)),
        outside=_against(scorer, records, outside) if scorer else None,
    )


def _against(
    scorer: str, records: Sequence[FeedbackRecord], outside: Sequence[OutsideScores]
) -> AgainstOutside:
    drafts: list[tuple[float, float]] = []
    gains: list[tuple[float, float]] = []
    for scored in outside:
        record = records[scored.record]
        if record.feedback is None or scored.response is None:
            continue
        own = record.feedback.score
        drafts.append((own, scored.response))
        if record.refinement_score is not None and scored.refinement is not None:
            gains.append((record.refinement_score - own, scored.refinement - scored.response))
    own_scores = [own for own, _ in drafts]
    outside_scores = [theirs for _, theirs in drafts]
    accepted = [theirs for own, theirs in gains if own >= ACCEPTED_GAIN]
    by_score: dict[float, list[float]] = {}
    for own, theirs in drafts:
        by_score.setdefault(own, []).append(theirs)
    means = {
        f"{score:g}": mean_with_error(values, SCORES) for score, values in sorted(by_score.items())
    }
    return AgainstOutside(
        scorer=scorer,
        bias=self_bias(own_scores, outside_scores),
        own_gain=mean_with_error([own for own, _ in gains], APART),
        outside_gain=mean_with_error([theirs for _, theirs in gains], APART),
        inflation=mean_with_error([own - theirs for own, theirs in gains], APART),
        false_accepts=pass_rate([gain <= 0 for gain in accepted]),
        agreement=score_agreement(own_scores, outside_scores),
        calibration={score: mean for score, mean in means.items() if mean is not None},
    )


def count_pairs(
    critic: str, pairs: Sequence[LabelledPair], scored: Sequence[ScoredPair]
) -> PairAccuracy:
    """How often the chosen answer's score is the higher (the paper's Table 5).

    Ties count as wrong, as half, and not at all, because the paper does not say what it does with
    them; unread pairs are counted apart.
    """
    both = [
        (s.chosen, s.rejected) for s in scored if s.chosen is not None and s.rejected is not None
    ]
    decided = [(a, b) for a, b in both if a != b]
    longer = [len(p.chosen) > len(p.rejected) for p in pairs if len(p.chosen) != len(p.rejected)]
    halves = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in both]
    return PairAccuracy(
        critic=critic,
        accuracy=pass_rate([a > b for a, b in both]),
        with_half_ties=bootstrap_mean(halves) if halves else None,
        without_ties=pass_rate([a > b for a, b in decided]),
        ties=len(both) - len(decided),
        unread=len(scored) - len(both),
        gap=mean_with_error([a - b for a, b in both], APART),
        longer_wins=pass_rate(longer),
        pairs=len(pairs),
    )


def warnings_of(found: Sequence[CriticQuality]) -> list[str]:
    """What should stop a reader from training on these critiques."""
    warnings = []
    for each in found:
        outside = each.outside
        if outside and outside.inflation and outside.inflation.low > 0:
            warnings.append(
                f"{each.file}: the critic sees {outside.inflation.value:.1f} points more gain than "
                f"{outside.scorer} does"
            )
        if outside and outside.agreement and outside.agreement.spearman is None:
            warnings.append(f"{each.file}: one of the two scorers gives every draft the same score")
        if each.generic is not None and each.generic.value > MOST_GENERIC:
            share_of = f"{each.generic.value:.0%}"
            warnings.append(f"{each.file}: {share_of} of the critiques are interchangeable")
    return warnings

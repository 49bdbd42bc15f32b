"""How good the critiques of feedback files are: by themselves, and against an outside scorer."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Final

from srt_cli.calls.conduct import Call
from srt_cli.evaluation.evidence import with_blind_scores
from srt_cli.feedback.critic import Critic, blind_score
from srt_cli.models import Reply
from srt_cli.records import MAX_SCORE, MIN_SCORE, FeedbackRecord, Prompt, Scored
from srt_cli.stats.agreement import ScoreAgreement, score_agreement
from srt_cli.stats.critiques import generic_share, is_grounded, same_language
from srt_cli.stats.diversity import distinct_pairs
from srt_cli.stats.echo import APART, SelfBias, self_bias
from srt_cli.stats.rates import Estimate, mean_with_error, pass_rate
from srt_cli.tables import (
    Table,
    figures_as_rows,
    score_with_error,
    share_with_interval,
    shorten,
)

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


def quality_tables(found: Sequence[CriticQuality]) -> list[Table]:
    """What the critiques are like, and, with a scorer, what their scores are worth; a column a file."""
    names = [each.file for each in found]
    texts = [
        ("rows", [str(each.rows) for each in found]),
        ("whole", [share_with_interval(each.valid) for each in found]),
        ("about the answer", [share_with_interval(each.grounded) for each in found]),
        ("in its language", [share_with_interval(each.same_language) for each in found]),
        ("generic", [share_with_interval(each.generic) for each in found]),
        ("words", [f"{each.words.value:.0f}" if each.words else "-" for each in found]),
    ]
    tables = [figures_as_rows("critiques", names, texts)]
    scored = [each.outside for each in found if each.outside is not None]
    if not scored:
        return tables
    biases = [each.bias for each in scored]
    agreements = [each.agreement for each in scored]
    scores = [
        ("bias, own - outside", [score_with_error(b.bias if b else None, "+") for b in biases]),
        ("  one-sided (dskew)", [score_with_error(b.skewness if b else None) for b in biases]),
        ("  rank correlation", [score_with_error(a.spearman if a else None) for a in agreements]),
        ("  tau-b", [score_with_error(a.kendall if a else None) for a in agreements]),
        (
            "  kappa, quadratic",
            [score_with_error(a.weighted_kappa if a else None) for a in agreements],
        ),
        (
            "  alpha, ordinal",
            [score_with_error(a.alpha_ordinal if a else None) for a in agreements],
        ),
        ("refining gains, own", [score_with_error(each.own_gain, "+") for each in scored]),
        ("refining gains, outside", [score_with_error(each.outside_gain, "+") for each in scored]),
        ("inflation", [score_with_error(each.inflation, "+") for each in scored]),
        ("false accepts", [share_with_interval(each.false_accepts) for each in scored]),
    ]
    scorer = shorten(scored[0].scorer, 40)
    tables.append(figures_as_rows(f"their scores, against {scorer}", names, scores))
    return tables


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

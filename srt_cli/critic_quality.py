"""How good the critiques of feedback files are: by themselves, and against an outside scorer."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Final

from scipy import stats as scipy_stats

from srt_cli.calls import Call
from srt_cli.critique import Critic, blind_score
from srt_cli.models import Reply
from srt_cli.records import FeedbackRecord, Prompt
from srt_cli.stats.critiques import generic_share, is_grounded
from srt_cli.stats.drift import SelfBias, distinct_pairs, self_bias
from srt_cli.stats.rates import Estimate, mean_with_error, pass_rate
from srt_cli.tables import Table, share, shorten

ACCEPTED_GAIN: Final = 1.0


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
    rank_correlation: float | None
    """Spearman's, between own and outside scores of the drafts."""
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
    generic: float | None
    """Share of critiques that could as well stand under another answer."""
    distinct_pairs: float | None
    mean_words: float | None
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
        scores.append((yield from blind_score(critic, prompt, text, f"{record.id} outside score")))
    return OutsideScores(number, *scores)


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
    grounded = [
        is_grounded(r.feedback.weaknesses, r.response)
        for r in critiqued
        if r.feedback and r.response
    ]
    return CriticQuality(
        file=file,
        critic=records[0].critic if records else "-",
        rows=len(records),
        valid=pass_rate([record.status == "ok" for record in answered]),
        grounded=pass_rate(grounded),
        generic=generic_share(texts),
        distinct_pairs=distinct_pairs(texts),
        mean_words=sum(len(text.split()) for text in texts) / len(texts) if texts else None,
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
    varied = len(set(own_scores)) > 1 and len(set(outside_scores)) > 1
    by_score: dict[float, list[float]] = {}
    for own, theirs in drafts:
        by_score.setdefault(own, []).append(theirs)
    means = {f"{score:g}": mean_with_error(values) for score, values in sorted(by_score.items())}
    return AgainstOutside(
        scorer=scorer,
        bias=self_bias(own_scores, outside_scores),
        own_gain=mean_with_error([own for own, _ in gains]),
        outside_gain=mean_with_error([theirs for _, theirs in gains]),
        inflation=mean_with_error([own - theirs for own, theirs in gains]),
        false_accepts=pass_rate([gain <= 0 for gain in accepted]),
        rank_correlation=(
            float(scipy_stats.spearmanr(own_scores, outside_scores).statistic) if varied else None
        ),
        calibration={score: mean for score, mean in means.items() if mean is not None},
    )


def quality_tables(found: Sequence[CriticQuality]) -> list[Table]:
    """What the critiques are like, and, with a scorer, what their scores are worth."""
    texts = Table(
        "critiques",
        ["", "rows", "whole", "about the answer", "generic", "words"],
        [
            [
                shorten(each.file),
                str(each.rows),
                share(each.valid),
                share(each.grounded),
                f"{each.generic:.0%}" if each.generic is not None else "-",
                f"{each.mean_words:.0f}" if each.mean_words is not None else "-",
            ]
            for each in found
        ],
    )
    columns = ["", "bias", "rank corr.", "own gain", "outside", "inflation", "false accepts"]
    cells = [
        [
            shorten(each.file),
            _signed(each.outside.bias.bias if each.outside.bias else None),
            "-" if each.outside.rank_correlation is None
            else f"{each.outside.rank_correlation:+.2f}",
            _signed(each.outside.own_gain),
            _signed(each.outside.outside_gain),
            _signed(each.outside.inflation),
            share(each.outside.false_accepts),
        ]
        for each in found
        if each.outside is not None
    ]  # fmt: skip
    return [texts, Table("their scores against an outside scorer", columns, cells)][
        : 1 + bool(cells)
    ]


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
        if outside and outside.rank_correlation is None and outside.bias:
            warnings.append(f"{each.file}: one of the two scorers gives every draft the same score")
        if each.generic is not None and each.generic > 0.5:
            warnings.append(f"{each.file}: {each.generic:.0%} of the critiques are interchangeable")
    return warnings


def _signed(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    error = f" ± {estimate.standard_error:.2f}" if estimate.standard_error is not None else ""
    return f"{estimate.value:+.2f}{error}"

"""The drift table's figures: one stage after the other, and whether its critic still sees the truth."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from srt_cli.evaluation.contest import Contest, Standing
from srt_cli.evaluation.critic_quality import (
    SCORES,
    CriticQuality,
    PairAccuracy,
    count_pairs,
    own_quality,
)
from srt_cli.evaluation.evidence import Evidence
from srt_cli.records import MAX_SCORE, MIN_SCORE
from srt_cli.stats.agreement import ScoreAgreement, score_agreement
from srt_cli.stats.diversity import distinct_pairs, diversity_change, self_bleu
from srt_cli.stats.echo import Echo, SelfBias, Signs, echo_alarm, self_bias
from srt_cli.stats.rates import (
    Estimate,
    PairedDifference,
    difference_to_half,
    holm,
    mean_with_error,
    paired_difference,
    pass_rate,
    ratio_of_means,
)


@dataclass(frozen=True)
class SincePrevious:
    """A stage against the stage before, over the same prompts."""

    by: str
    """The judge, or the check."""
    paired: PairedDifference
    p_adjusted: float
    """McNemar's p after Holm's correction over the steps."""


@dataclass(frozen=True)
class StageFigures:
    """One stage: what it wins, how long it writes, what it says of itself, what others say of it."""

    standing: Standing
    """Its direct answers in the contest; in `eval.json` it stands there."""
    name: str
    prompts: int
    win_rate: Estimate | None
    equal_length: Estimate | None
    pass_rate: Estimate | None
    to_previous: SincePrevious | None
    length_ratio: Estimate | None
    """To the reference, in characters."""
    length_to_previous: Estimate | None
    own_score: Estimate | None
    outside_score: Estimate | None
    bias: SelfBias | None
    scores_agree: ScoreAgreement | None
    """Its own scores and the outside ones, of the same answers: ranks, κ, α, distance."""
    own_histogram: dict[str, int]
    """How many answers got each score from their own model."""
    outside_histogram: dict[str, int]
    top_share: Estimate | None
    """Share of its own scores that are the highest possible."""
    pair_accuracy: PairAccuracy | None
    """Its scores on held-out pairs that people chose from (the paper's Table 5)."""
    pairs_to_previous: PairedDifference | None
    critiques: CriticQuality | None
    """Of its own answers: whole, generic, what its refinements gain by own and outside scores."""
    distinct_pairs: Estimate | None
    self_bleu: Estimate | None
    diversity_to_previous: float | None
    """Distinct-2 against the stage before, answers cut to the same length."""
    degenerate: Estimate | None
    objective: dict[str, Estimate]
    """Results of lm-evaluation-harness, by task and metric."""
    echo: Echo | None
    """Against the stage before; None for the first."""


@dataclass(frozen=True)
class _Facts:
    """What one contestant answered and was told, by prompt."""

    standing: Standing
    texts: dict[str, str]
    values: Mapping[str, float] | None
    """Preferences by the first judge, else passes of the check; None for the reference of a judge."""
    own: dict[str, float]
    outside: dict[str, float]


def drift_of(evidence: Evidence, contest: Contest) -> list[StageFigures]:
    """Each contestant's direct answers, in the order in which they were named."""
    facts = [_facts_of(evidence, row) for row in contest.rows if row.use == "response"]
    stages: list[StageFigures] = []
    for place, mine in enumerate(facts):
        before = facts[place - 1] if place else None
        stages.append(_stage_of(evidence, mine, before, facts[0]))
    return _adjusted(stages)


def _yardstick(evidence: Evidence) -> str:
    return evidence.judges[0] if evidence.judges else "check"


def _facts_of(evidence: Evidence, standing: Standing) -> _Facts:
    answers = evidence.answers[standing.entrant]
    values: Mapping[str, float] | None = None
    if not evidence.judges:
        values = {o.id: float(o.passed) for o in answers.values() if o.passed is not None}
    elif standing.judged:
        values = evidence.preferences.get((standing.entrant, _yardstick(evidence)), {})
    own: dict[str, float] = {}
    outside: dict[str, float] = {}
    for scored in evidence.scores:
        mine = (scored.contestant, scored.use) == standing.entrant
        if mine and scored.score is not None:
            (own if scored.by == scored.contestant else outside)[scored.id] = scored.score
    texts = {output.id: output.response for output in answers.values()}
    return _Facts(standing, texts, values, own, outside)


def _stage_of(
    evidence: Evidence, mine: _Facts, before: _Facts | None, first: _Facts
) -> StageFigures:
    row = mine.standing
    judged = row.judged[0] if row.judged else None
    controlled = judged.length_controlled if judged else None
    both = [name for name in mine.own if name in mine.outside]
    own_and_outside = [mine.own[name] for name in both], [mine.outside[name] for name in both]
    scored_pairs = evidence.scored_pairs.get(row.contestant)
    critiques = evidence.critiques.get(row.contestant)
    growth = _length_ratio(mine, before) if before else None
    shared = [name for name in mine.texts if before and name in before.texts]
    change = None
    if before is not None:
        old, new = ([facts.texts[name] for name in shared] for facts in (before, mine))
        change = diversity_change(old, new)
    against_pairs = _pairs_step(evidence, row, before.standing) if before else None
    step = _step(mine, before) if before else None
    by = _yardstick(evidence)
    texts = list(mine.texts.values())
    return StageFigures(
        standing=row,
        name=row.name,
        prompts=row.prompts,
        win_rate=judged.win_rate if judged else None,
        equal_length=controlled.rate if controlled else None,
        pass_rate=row.pass_rate,
        to_previous=SincePrevious(by, step, step.p_value) if step else None,
        length_ratio=_length_ratio(mine, first) if mine is not first else None,
        length_to_previous=growth,
        own_score=mean_with_error(list(mine.own.values()), SCORES),
        outside_score=mean_with_error(list(mine.outside.values()), SCORES),
        bias=self_bias(*own_and_outside),
        scores_agree=score_agreement(*own_and_outside),
        own_histogram=_histogram(mine.own.values()),
        outside_histogram=_histogram(mine.outside.values()),
        top_share=pass_rate([score == MAX_SCORE for score in mine.own.values()]),
        pair_accuracy=count_pairs(row.contestant, evidence.pairs, scored_pairs)
        if scored_pairs
        else None,
        pairs_to_previous=against_pairs,
        critiques=own_quality(row.contestant, critiques, evidence.scores, evidence.scorer)
        if critiques
        else None,
        distinct_pairs=distinct_pairs(texts),
        self_bleu=self_bleu(texts),
        diversity_to_previous=change,
        degenerate=row.degenerate.rate,
        objective=dict(evidence.objective.get(row.contestant, {})),
        echo=_echo(mine, before, growth, change, against_pairs) if before else None,
    )


def _step(mine: _Facts, before: _Facts) -> PairedDifference | None:
    """Against the stage before by judge or check; a judge's reference stands at one half."""
    if mine.values is None:
        return None
    if before.values is None:
        return difference_to_half(list(mine.values.values()))
    shared = [name for name in mine.values if name in before.values]
    return paired_difference(
        [mine.values[name] for name in shared], [before.values[name] for name in shared]
    )


def _length_ratio(mine: _Facts, other: _Facts) -> Estimate | None:
    shared = [name for name in mine.texts if name in other.texts]
    return ratio_of_means(
        [len(mine.texts[name]) for name in shared], [len(other.texts[name]) for name in shared]
    )


def _pairs_step(evidence: Evidence, row: Standing, before: Standing) -> PairedDifference | None:
    """How often the chosen answer scores higher, against the stage before, over pairs both scored."""
    mine = evidence.scored_pairs.get(row.contestant)
    theirs = evidence.scored_pairs.get(before.contestant)
    if mine is None or theirs is None:
        return None
    read = [
        (float(a.right), float(b.right))
        for a, b in zip(mine, theirs, strict=True)
        if a.right is not None and b.right is not None
    ]
    return paired_difference([a for a, _ in read], [b for _, b in read])


def _echo(
    mine: _Facts,
    before: _Facts,
    growth: Estimate | None,
    change: float | None,
    pairs: PairedDifference | None,
) -> Echo:
    items = [
        name
        for name in mine.own
        if name in mine.outside and name in before.own and name in before.outside
    ]
    signs = Signs(
        length_growth=growth.value if growth else None,
        gain=_gain(mine.standing, before.standing),
        diversity_change=change,
        pair_accuracy=pairs,
    )
    return echo_alarm(
        [before.own[name] for name in items],
        [mine.own[name] for name in items],
        [before.outside[name] for name in items],
        [mine.outside[name] for name in items],
        signs,
    )


def _gain(row: Standing, before: Standing) -> float | None:
    """In wins at equal length, else in passes of the check; None where there is neither."""
    mine, theirs = _equal_length(row), _equal_length(before)
    if (row.judged or before.judged) and mine is not None and theirs is not None:
        return mine - theirs
    if row.pass_rate is not None and before.pass_rate is not None:
        return row.pass_rate.value - before.pass_rate.value
    return None


def _equal_length(row: Standing) -> float | None:
    """Wins at equal length; the reference itself, which is not judged, stands at one half."""
    if not row.judged:
        return 0.5
    controlled = row.judged[0].length_controlled
    return controlled.rate.value if controlled else None


def _adjusted(stages: Sequence[StageFigures]) -> list[StageFigures]:
    """The stages with the p values of their steps corrected for how many steps there are."""
    steps = [stage.to_previous for stage in stages if stage.to_previous]
    adjusted = iter(holm([step.paired.p_value for step in steps]))
    return [
        replace(stage, to_previous=replace(stage.to_previous, p_adjusted=next(adjusted)))
        if stage.to_previous
        else stage
        for stage in stages
    ]


def _histogram(scores: Iterable[float]) -> dict[str, int]:
    """Counts by score, every whole score from 1 to 10 among them."""
    counts = Counter({f"{score:g}": 0 for score in range(MIN_SCORE, MAX_SCORE + 1)})
    counts.update(f"{score:g}" for score in scores)
    return dict(counts) if counts.total() else {}

"""How often is the chosen answer really the better one? An outside judge looks at a sample of pairs.

Preferences that a model writes about itself carry its errors. The audit estimates their share, which
a robust loss can then take into account (`srt dpo --loss-type robust --label-smoothing auto`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from srt_cli.asking import Asking
from srt_cli.judging import Judge, Order, judge_pairs, output_of
from srt_cli.records import Output, Preference, Prompt
from srt_cli.stats.rates import Estimate, pass_rate
from srt_cli.tables import Table, share_with_interval

FEWEST_FOR_A_BAND = 10


@dataclass(frozen=True)
class GainBand:
    """Pairs of at least this gain: how often the judge agrees that the chosen one is better."""

    gain: float
    precision: Estimate


@dataclass(frozen=True)
class Audit:
    """What the judge said of the sample."""

    judge: str
    right: int
    wrong: int
    ties: int
    invalid: int
    """Pairs without a valid verdict in both orders."""
    precision: Estimate | None
    """Right among those where the judge preferred one, with Wilson's interval."""
    noise: float | None
    """1 - precision: the share of pairs whose labels should be the other way round."""
    from_gain: tuple[GainBand, ...]
    min_precision: float
    gain_to_ask_for: float | None
    """The smallest gain from which precision reaches `min_precision`; null when none does."""


def audit_pairs(
    asking: Asking, judge_spec: str, pairs: Sequence[Preference], min_precision: float
) -> Audit:
    """Have each pair judged in both orders, without a word of which one was chosen."""
    with asking.open(judge_spec) as model:
        orders: tuple[Order, ...] = ("ab", "ba")
        shown = [
            (_prompt_of(pair), _output(pair, "chosen"), _output(pair, "rejected"), order)
            for pair in pairs
            for order in orders
        ]
        judgments = judge_pairs(asking, "auditing", Judge(model), shown)
    found = [judgment.preference for judgment in judgments]
    return count_audit(judge_spec, pairs, found, min_precision)


def count_audit(
    judge: str,
    pairs: Sequence[Preference],
    preferences: Sequence[float | None],
    min_precision: float,
) -> Audit:
    """Count preferences for the chosen answer, two a pair (both orders), in the order of the pairs."""
    decided: list[tuple[float, bool]] = []
    ties = invalid = 0
    for number, pair in enumerate(pairs):
        first, second = preferences[2 * number : 2 * number + 2]
        if first is None or second is None:
            invalid += 1
        elif first + second == 1:
            ties += 1
        else:
            decided.append((pair.chosen_score - pair.rejected_score, first + second > 1))
    precision = pass_rate([right for _, right in decided])
    bands = []
    for gain in sorted({gain for gain, _ in decided}):
        band = pass_rate([right for each, right in decided if each >= gain])
        if band is not None and band.n >= FEWEST_FOR_A_BAND:
            bands.append(GainBand(gain, band))
    enough = (band.gain for band in bands if band.precision.value >= min_precision)
    right = sum(is_right for _, is_right in decided)
    return Audit(
        judge=judge,
        right=right,
        wrong=len(decided) - right,
        ties=ties,
        invalid=invalid,
        precision=precision,
        noise=None if precision is None else 1 - precision.value,
        from_gain=tuple(bands),
        min_precision=min_precision,
        gain_to_ask_for=next(enough, None),
    )


def audit_table(audit: Audit) -> Table:
    """Precision by the gain that is asked for."""
    cells = [
        [
            f"{band.gain:g}",
            share_with_interval(band.precision),
            str(band.precision.n),
        ]
        for band in audit.from_gain
    ]
    return Table("chosen is better, says the judge", ["gain from", "pairs right", "n"], cells)


def sentence_of(audit: Audit) -> str:
    """The finding in one sentence, with what to do about it."""
    counted = f"{audit.right} right, {audit.wrong} wrong, {audit.ties} ties, {audit.invalid} unread"
    if audit.precision is None:
        return f"audit by {audit.judge}: {counted}; nothing can be said of the labels"
    found = audit.precision
    advice = ""
    if found.value < audit.min_precision:
        advice = (
            f"; --min-gain {audit.gain_to_ask_for:g} reaches {audit.min_precision:.0%}"
            if audit.gain_to_ask_for is not None
            else f"; no --min-gain reaches {audit.min_precision:.0%}"
        )
    right = f"{share_with_interval(found)} of the labels are right"
    return f"audit by {audit.judge}: {right} ({counted}){advice}"


def _prompt_of(pair: Preference) -> Prompt:
    only = len(pair.prompt) == 1
    return Prompt(id=pair.id, prompt=pair.prompt[0].content if only else pair.prompt)


def _output(pair: Preference, side: str) -> Output:
    text = (pair.chosen if side == "chosen" else pair.rejected)[-1].content
    return output_of(pair.id, side, "response", text)

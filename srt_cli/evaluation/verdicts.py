"""What a judge's verdicts on one contestant come to: rates, length control, position, comparisons."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from srt_cli.evaluation.judging import Orders
from srt_cli.records import Entrant, Judgment, Output, Prompt
from srt_cli.stats.length_control import (
    LengthControlled,
    difficulties_of,
    length_controlled_win_rate,
)
from srt_cli.stats.rates import (
    Doubt,
    Estimate,
    PairedDifference,
    Position,
    bounded,
    clustered_error,
    discrete_win_rate,
    holm,
    paired_difference,
    position_bias,
    position_bias_apart,
    strict_win_rate,
    win_rate,
)
from srt_cli.tables import one_line

LONGER_BY_CHARACTERS: Final = 30
LENGTH_BINS: Final = (0.1, 0.25)
SHAKY_CONSISTENCY: Final = 0.75
MOST_GAP: Final = 0.05
FEWEST_FOR_A_HABIT: Final = 10

Preferences = Mapping[tuple[Entrant, str], Mapping[str, float]]
"""By entrant and judge: each prompt's preference for the entrant, 0 to 1."""
Opponents = tuple[Prompt, Output, Output]
"""A prompt with an entrant's answer to it, and the reference's."""


@dataclass(frozen=True)
class LengthBin:
    """Win rate over the pairs whose lengths stand so to each other."""

    name: str
    win_rate: Estimate | None


@dataclass(frozen=True)
class Ruling:
    """What one judge said of one contestant against the reference."""

    judge: str
    orders: Orders
    win_rate: Estimate | None
    discrete_win_rate: Estimate | None
    strict_win_rate: Estimate | None
    length_controlled: LengthControlled | None
    wins: int
    ties: int
    losses: int
    position: Position | None
    prefers_longer: Estimate | None
    """Over pairs that differ by more than 30 characters: how often the longer answer won."""
    by_length: tuple[LengthBin, ...]
    statuses: dict[str, int]
    statuses_by_order: dict[str, dict[str, int]]
    first_unread: str
    """What the judge said, in one line, where it first gave no verdict; empty where it always did."""
    pairs: int
    valid_pairs: int

    def doubts(self) -> list[Doubt]:
        """What should make a reader doubt these verdicts."""
        found = list(self.length_controlled.warnings) if self.length_controlled else []
        if self.position is not None:
            slot = {0.0: "second", 1.0: "first"}.get(self.position.first_slot_rate.value)
            if slot is not None and self.position.n >= FEWEST_FOR_A_HABIT:
                why = f"{self.judge} always prefers the answer shown {slot}: its verdicts tell nothing"
                found.append(Doubt("one slot always", why))
            consistency = self.position.consistency
            if consistency is not None and consistency.value < SHAKY_CONSISTENCY:
                why = (
                    f"{self.judge} says the same in both orders in only "
                    f"{consistency.value:.0%} of the pairs; its verdicts are shaky"
                )
                found.append(Doubt("consistency", why))
            gap = self.position.gap
            if gap and gap.standard_error is not None:
                beyond_noise = abs(gap.value) > 3 * gap.standard_error
                if beyond_noise and abs(gap.value) > MOST_GAP:
                    slot = "second" if gap.value > 0 else "first"
                    points = f"{100 * abs(gap.value):.0f} points"
                    why = f"{self.judge} favours the answer shown {slot} by {points}"
                    found.append(Doubt(f"favours the {slot}", why))
        if self.valid_pairs < self.pairs:
            bad = ", ".join(f"{n} {s}" for s, n in self.statuses.items() if s != "ok")
            wanted = "in both orders " if self.orders == "both" else ""
            why = (
                f"{self.pairs - self.valid_pairs} of {self.pairs} pairs have no valid verdict "
                f"{wanted}of {self.judge} ({bad or 'missing'}) and are not scored"
            )
            if self.first_unread:
                why += f"; the first reply without one: {self.first_unread!r}"
            found.append(Doubt("no verdict", why))
        return found


def _by_order(verdicts: Sequence[Judgment]) -> dict[str, dict[str, float]]:
    """Valid preferences for `a` by order of presentation and prompt."""
    by_order: dict[str, dict[str, float]] = {"ab": {}, "ba": {}}
    for verdict in verdicts:
        if verdict.preference is not None:
            by_order[verdict.order][verdict.id] = verdict.preference
    return by_order


def preferences_of(verdicts: Sequence[Judgment], orders: Orders) -> dict[str, float]:
    """Each prompt's preference for `a`: the mean of its orders; prompts without all are left out."""
    by_order = _by_order(verdicts)
    if orders == "one":
        return by_order["ba"] | by_order["ab"]
    return {
        name: (value + by_order["ba"][name]) / 2
        for name, value in by_order["ab"].items()
        if name in by_order["ba"]
    }


def preferences_by_entrant(judgments: Sequence[Judgment], orders: Orders) -> Preferences:
    """The preferences that all judgments come to."""
    groups: dict[tuple[Entrant, str], list[Judgment]] = {}
    for judgment in judgments:
        groups.setdefault((judgment.entrant, judgment.judge), []).append(judgment)
    return {pair: preferences_of(given, orders) for pair, given in groups.items()}


def count_verdicts(
    judge: str, orders: Orders, opponents: Sequence[Opponents], verdicts: Sequence[Judgment]
) -> Ruling:
    """Count one judge's verdicts; with `both` orders a pair counts only with valid verdicts in both."""
    preferences = preferences_of(verdicts, orders)
    valid = [each for each in opponents if each[0].id in preferences]
    y = [preferences[prompt.id] for prompt, _, _ in valid]
    lengths = [len(mine.response) for _, mine, _ in valid]
    reference = [len(theirs.response) for _, _, theirs in valid]
    texts = [prompt.text for prompt, _, _ in valid]
    first, second = _by_slot(verdicts, preferences, orders)
    bias = position_bias if orders == "both" else position_bias_apart
    rate = win_rate(y)
    if rate is not None and len(set(texts)) < len(texts):
        error = clustered_error(y, texts)
        rate = bounded(rate.value, error, rate.n) if error is not None else rate
    longer = [
        value if a > b else 1 - value
        for value, a, b in zip(y, lengths, reference, strict=True)
        if abs(a - b) > LONGER_BY_CHARACTERS
    ]
    by_order: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        by_order.setdefault(verdict.order, Counter())[verdict.status] += 1
    return Ruling(
        judge=judge,
        orders=orders,
        win_rate=rate,
        discrete_win_rate=discrete_win_rate(y),
        strict_win_rate=strict_win_rate(first, second) if orders == "both" else None,
        length_controlled=length_controlled_win_rate(
            y, lengths, reference, difficulties_of(texts) if texts else None
        ),
        wins=sum(value > 0.5 for value in y),
        ties=sum(value == 0.5 for value in y),
        losses=sum(value < 0.5 for value in y),
        position=bias(first, second),
        prefers_longer=discrete_win_rate(longer),
        by_length=_by_length(y, lengths, reference),
        statuses=dict(Counter(verdict.status for verdict in verdicts)),
        first_unread=next((one_line(v.raw) for v in verdicts if v.status != "ok"), ""),
        statuses_by_order={order: dict(counts) for order, counts in sorted(by_order.items())},
        pairs=len(opponents),
        valid_pairs=len(valid),
    )


def _by_slot(
    verdicts: Sequence[Judgment], valid: Mapping[str, float], orders: Orders
) -> tuple[list[float], list[float]]:
    """Preferences for `a` when it was shown first, and second; of the same pairs with both orders."""
    by_order = _by_order(verdicts)
    if orders == "one":
        return list(by_order["ab"].values()), list(by_order["ba"].values())
    return [by_order["ab"][name] for name in valid], [by_order["ba"][name] for name in valid]


def _by_length(
    y: Sequence[float], mine: Sequence[int], theirs: Sequence[int]
) -> tuple[LengthBin, ...]:
    """Win rates where the answer is shorter, longer, or within a share of the reference's length."""
    shares = [(a - b) / max(1, b) for a, b in zip(mine, theirs, strict=True)]
    near = LENGTH_BINS[0]
    groups = {
        f"shorter by more than {near:.0%}": [
            v for v, s in zip(y, shares, strict=True) if s < -near
        ],
        **{
            f"within {most:.0%}": [v for v, s in zip(y, shares, strict=True) if abs(s) <= most]
            for most in LENGTH_BINS
        },
        f"longer by more than {near:.0%}": [v for v, s in zip(y, shares, strict=True) if s > near],
    }
    return tuple(LengthBin(name, win_rate(values)) for name, values in groups.items())


@dataclass(frozen=True)
class Comparison:
    """Two contestants over the prompts that both have, by one yardstick."""

    a: str
    b: str
    by: str
    paired: PairedDifference
    p_adjusted: float
    """McNemar's p after Holm's correction over all comparisons by the same yardstick."""


def compare_all(by: str, values: Mapping[str, Mapping[str, float]]) -> list[Comparison]:
    """Every two contestants, paired over their common prompts; `values` are per name and prompt."""
    found = []
    for b, a in combinations(values, 2):
        common = [name for name in values[a] if name in values[b]]
        paired = paired_difference(
            [values[a][name] for name in common], [values[b][name] for name in common]
        )
        if paired is not None:
            found.append((a, b, paired))
    adjusted = holm([paired.p_value for *_, paired in found])
    return [Comparison(a, b, by, d, p) for (a, b, d), p in zip(found, adjusted, strict=True)]

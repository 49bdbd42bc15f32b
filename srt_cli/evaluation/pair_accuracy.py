"""How often a critic scored the better answer higher: the paper's Table 5, by whoever was asked.

A pair is right when the chosen answer's score is the higher. Ties are counted apart, because the
paper does not say what it does with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from srt_cli.evaluation.labelled_pairs import LabelledPair, ScoredPair
from srt_cli.stats.echo import APART
from srt_cli.stats.rates import Estimate, bootstrap_mean, mean_with_error, pass_rate
from srt_cli.tables import Table, figures_as_rows, score_with_error, share_with_interval


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


def count_pairs(
    critic: str, pairs: Sequence[LabelledPair], scored: Sequence[ScoredPair]
) -> PairAccuracy:
    """Accuracy with ties as wrong, as half, and left out; unread pairs are counted apart."""
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


def pairs_table(found: Sequence[PairAccuracy]) -> Table:
    """One column a critic."""
    rows = [
        ("right", [share_with_interval(each.accuracy) for each in found]),
        ("  ties out", [share_with_interval(each.without_ties) for each in found]),
        ("ties", [str(each.ties) for each in found]),
        ("unread", [str(each.unread) for each in found]),
        ("score gap", [score_with_error(each.gap, "+") for each in found]),
        ("the longer is chosen", [share_with_interval(each.longer_wins) for each in found]),
    ]
    return figures_as_rows("scores chosen above rejected", [each.critic for each in found], rows)

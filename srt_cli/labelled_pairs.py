"""Does a critic know the better answer? It scores both sides of labelled pairs, one by one.

The paper's Table 5: a pair is right when the chosen answer's score is the higher. Ties are counted
apart, because the paper does not say what it does with them.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srt_cli.artifacts import read_rows
from srt_cli.calls import Call
from srt_cli.critique import Critic, blind_score
from srt_cli.errors import SrtError
from srt_cli.models import Reply
from srt_cli.records import Prompt
from srt_cli.stats.agreement import bootstrap_mean
from srt_cli.stats.rates import Estimate, mean_with_error, pass_rate
from srt_cli.tables import Table, share, share_with_interval, shorten


@dataclass(frozen=True)
class Pair:
    """A prompt with an answer that people preferred, and one that they did not."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class ScoredPair:
    """A critic's scores of both sides; null where its reply could not be read."""

    id: str
    chosen: float | None
    rejected: float | None


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


def read_pairs(path: Path, limit: int | None = None) -> Iterator[Pair]:
    """Rows with `prompt` (text or turns), `chosen` and `rejected` (text, or turns as in TRL).

    Raises `SrtError` naming file and line.
    """
    for place, (number, row) in enumerate(read_rows(path)):
        if limit is not None and place >= limit:
            return
        try:
            chosen, rejected = _text_of(row["chosen"]), _text_of(row["rejected"])
            rest = {name: row[name] for name in row if name not in ("chosen", "rejected")}
            if "prompt" not in rest and isinstance(row["chosen"], list):
                rest["prompt"] = row["chosen"][:-1]
            yield Pair(Prompt.from_row({"id": f"line {number}", **rest}), chosen, rejected)
        except KeyError as missing:
            found = ", ".join(row) or "nothing"
            raise SrtError(f"{path}:{number}: no {missing} (found: {found}).") from None
        except ValueError as error:
            raise SrtError(f"{path}:{number}: {error}.") from None


def _text_of(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        return str(answer[-1]["content"])
    raise ValueError("chosen and rejected must be texts, or turns that end in the answer")


def score_pair(critic: Critic, pair: Pair) -> Generator[Call, Reply, ScoredPair]:
    """Score both answers independently, blind."""
    scores = []
    for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        name = f"{pair.prompt.id} {side}"
        scores.append((yield from blind_score(critic, pair.prompt, text, name)))
    return ScoredPair(pair.prompt.id, *scores)


def count_pairs(critic: str, pairs: list[Pair], scored: list[ScoredPair]) -> PairAccuracy:
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
        gap=mean_with_error([a - b for a, b in both]),
        longer_wins=pass_rate(longer),
        pairs=len(pairs),
    )


def pairs_table(found: list[PairAccuracy]) -> Table:
    """One row a critic."""
    columns = ["", "right [95 %]", "ties out", "ties", "unread", "gap", "longer wins"]
    cells = [
        [
            shorten(each.critic),
            share_with_interval(each.accuracy),
            share(each.without_ties),
            str(each.ties),
            str(each.unread),
            f"{each.gap.value:+.2f}" if each.gap else "-",
            share(each.longer_wins),
        ]
        for each in found
    ]
    return Table("scores chosen above rejected", columns, cells)

"""From groups of feedback rows to pairs: every row ends in a pair or is dropped with a reason."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec
import orjson

from srt_cli.pairs.answers import FirstAnswers
from srt_cli.pairs.length_balance import LengthCut, Shape
from srt_cli.pairs.pairing import (
    STRATEGIES,
    Pairing,
    Refined,
    ScoreKind,
    Strategy,
    against_first,
    answers_of,
)
from srt_cli.pairs.rows import GroupedRows, InputRow, RowGroup
from srt_cli.pairs.rules import NearDuplicates, PairRules, near_duplicates_of, text_of

FAR: Final = 2**63


@dataclass(frozen=True)
class PairPlan:
    """How rows become pairs: the strategy, and every filter."""

    strategy: Strategy
    rho: float
    score: ScoreKind
    rules: PairRules
    near_duplicates: float | None = None
    length_cut: LengthCut | None = None
    first: FirstAnswers | None = None
    """Whose answers are rejected, in place of a draft's."""


class Decision(msgspec.Struct, gc=False):
    """What became of one group of rows."""

    pairing: Pairing | None = None
    """The group's pair, if it has one that passed every rule of its own."""
    fault: str | None = None
    """Why the pair is dropped all the same; None if it is kept."""
    place: int = FAR
    """The place of the pair in the output: that of its first row."""
    used: int = 0
    """Number of rows in the kept pair."""
    dropped: list[tuple[int, str, bytes]] = []
    """Place, reason and line of each other row."""

    @property
    def kept(self) -> Pairing | None:
        """The pair, if it is kept."""
        return self.pairing if self.fault is None else None

    def drop(self, row: InputRow, reason: str, place: int | None = None) -> None:
        """Drop a row."""
        dropped = {"id": row.record.id, "reason": reason, "row": orjson.loads(row.line)}
        line = orjson.dumps(dropped, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)
        self.dropped.append((row.place if place is None else place, reason, line))


def decide(rows: GroupedRows, plan: PairPlan, label: str) -> Iterator[Decision]:
    """Decide on every group, one by one.

    Near duplicates are looked for in an order that does not depend on the order of the input.
    """
    near = near_duplicates_of(plan.near_duplicates, plan.rules.excluded)
    for group in rows.groups(label, in_order_of_keys=near is not None):
        yield decide_on(group, plan, near)


def decide_on(group: RowGroup, plan: PairPlan, near: NearDuplicates | None = None) -> Decision:
    """Decide on one group."""
    decision = Decision()
    for row, place in group.repeated:
        decision.drop(row, "duplicate", place)
    usable: list[InputRow] = []
    answers: list[Refined] = []
    for row in group.rows:
        found = answers_of(row.record, plan.score, plan.strategy)
        if isinstance(found, str):
            decision.drop(row, found)
        else:
            usable.append(row)
            answers += found
    if not usable:
        return decision
    pairing = found_one = STRATEGIES[plan.strategy](answers, plan.rho)
    if pairing is not None and plan.first is not None:
        pairing = against_first(pairing, plan.first)
    if pairing is not None:
        _judge(pairing, usable, plan, near, decision)
        return decision
    why = "no answer of the first model" if found_one else f"no pair by {plan.strategy}"
    for row in usable:
        decision.drop(row, why)
    return decision


def _judge(
    pairing: Pairing,
    usable: list[InputRow],
    plan: PairPlan,
    near: NearDuplicates | None,
    decision: Decision,
) -> None:
    """Check a pair against every rule; the rows that are not in it are dropped in any case."""
    fault = plan.rules.fault_of(pairing)
    if fault is None:
        decision.pairing = pairing
        fault = decision.fault = _late_fault(pairing, plan, near)
    for row in usable:
        if row.record is not pairing.chosen.record and row.record is not pairing.rejected.record:
            same = plan.strategy == "refine"
            decision.drop(row, "duplicate" if same else f"not chosen by {plan.strategy}")
        elif fault is not None:
            decision.drop(row, fault)
        else:
            decision.used += 1
            decision.place = min(row.place, decision.place)


def _late_fault(pairing: Pairing, plan: PairPlan, near: NearDuplicates | None) -> str | None:
    """The filters on a pair that passed every rule of its own: length, and others like it."""
    too_long = plan.rules.is_too_long(pairing)
    if too_long is not None:
        return too_long
    if near is not None and not near.add(text_of(pairing[0].record.prompt)):
        return "near duplicate of another prompt"
    if plan.length_cut is not None and not plan.length_cut.keeps(shape_of(pairing)):
        return "length balance"
    return None


def shape_of(pairing: Pairing) -> Shape:
    """The figures of a pair that balancing lengths looks at."""
    gap = len(pairing.chosen.text) - len(pairing.rejected.text)
    return Shape(gap, pairing.gain, pairing.fingerprint)

"""All that an evaluation was told: outputs, verdicts, scores; its figures rest on this alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from srt_cli.evaluation.judging import Orders, Twice
from srt_cli.evaluation.labelled_pairs import LabelledPair, ScoredPair
from srt_cli.records import FeedbackRecord, Judgment, Output, Prompt, Record, Scored
from srt_cli.runs.jsonl import OrderedWriter


@dataclass(frozen=True)
class Evidence:
    """What was answered, and what was said of it."""

    prompts: Sequence[Prompt]
    outputs: Sequence[Output]
    judgments: Sequence[Judgment]
    reference: str
    judges: Sequence[str]
    orders: Orders
    repeats: Mapping[str, Sequence[Twice]] = field(default_factory=dict)
    """By judge: the questions that it was asked twice."""
    scores: Sequence[Scored] = ()
    critiques: Mapping[str, Sequence[FeedbackRecord]] = field(default_factory=dict)
    """By contestant: its critiques of its own direct answers."""
    pairs: Sequence[LabelledPair] = ()
    scored_pairs: Mapping[str, Sequence[ScoredPair]] = field(default_factory=dict)
    """By contestant: its scores of both sides of each of `pairs`."""


def beside(out: Path, name: str) -> Path:
    """Where a further file of an evaluation goes: two in one folder do not overwrite each other."""
    return out.with_name(name if out.stem == "eval" else f"{out.stem}.{name}")


def write_evidence(out: Path, evidence: Evidence) -> None:
    """Write it as files beside the figures: outputs, judgments and, where there are any, the rest."""
    _write(out.with_name(out.stem + ".outputs.jsonl"), evidence.outputs)
    _write(beside(out, "judgments.jsonl"), evidence.judgments)
    again = [second for twice in evidence.repeats.values() for _, second in twice]
    if again:
        _write(out.with_name(out.stem + ".repeats.jsonl"), again)
    if evidence.scores:
        _write(out.with_name(out.stem + ".scores.jsonl"), evidence.scores)
    own = [record for records in evidence.critiques.values() for record in records]
    if own:
        scored = with_blind_scores(own, evidence.scores)
        _write(out.with_name(out.stem + ".feedback.jsonl"), scored)


def with_blind_scores(
    records: Sequence[FeedbackRecord], scores: Sequence[Scored]
) -> list[FeedbackRecord]:
    """The records with their own model's blind score of each refinement, where there is one."""
    own = {
        (s.contestant, s.id): s.score
        for s in scores
        if s.by == s.contestant and s.use == "refinement"
    }
    return [
        row.model_copy(update={"refinement_score": own[row.critic, row.id]})
        if (row.critic, row.id) in own
        else row
        for row in records
    ]


def _write(path: Path, records: Iterable[Record]) -> None:
    writer = OrderedWriter(path)
    try:
        writer.add(0, records)
        writer.commit()
    finally:
        writer.discard()

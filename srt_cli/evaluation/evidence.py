"""All that an evaluation was told: outputs, verdicts, scores, labels. Its figures rest on this alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from srt_cli.evaluation.judging import Orders, Twice
from srt_cli.evaluation.labelled_pairs import LabelledPair, ScoredPair
from srt_cli.evaluation.verdicts import Preferences, preferences_by_entrant
from srt_cli.records import Entrant, FeedbackRecord, Judgment, Output, Prompt, Scored
from srt_cli.stats.rates import Estimate


@dataclass(frozen=True)
class Evidence:
    """What was answered, and what was said of it."""

    prompts: Sequence[Prompt]
    outputs: Sequence[Output]
    judgments: Sequence[Judgment]
    reference: str
    judges: Sequence[str]
    orders: Orders
    check: str | None = None
    good_score: float | None = None
    """From this score on, a contestant calls its own answer good; None where nobody asks."""
    scorer: str | None = None
    repeats: Mapping[str, Sequence[Twice]] = field(default_factory=dict)
    """By judge: the questions that it was asked twice."""
    scores: Sequence[Scored] = ()
    critiques: Mapping[str, Sequence[FeedbackRecord]] = field(default_factory=dict)
    """By contestant: its critiques of its own direct answers."""
    pairs: Sequence[LabelledPair] = ()
    scored_pairs: Mapping[str, Sequence[ScoredPair]] = field(default_factory=dict)
    """By contestant: its scores of both sides of each of `pairs`."""
    labels: Mapping[tuple[Entrant, str], float] = field(default_factory=dict)
    """What people said, by entrant and prompt: 1 for the entrant, 0 for the reference, 1/2 a tie."""
    objective: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """By contestant: results of lm-evaluation-harness, by task and metric."""

    @property
    def base(self) -> Entrant:
        """The reference's direct answers, with which all others are compared."""
        return Entrant(self.reference, "response")

    @cached_property
    def answers(self) -> Mapping[Entrant, Mapping[str, Output]]:
        """Each entrant's outputs, by prompt."""
        found: dict[Entrant, dict[str, Output]] = {}
        for output in self.outputs:
            found.setdefault(output.entrant, {})[output.id] = output
        return found

    @cached_property
    def preferences(self) -> Preferences:
        """What all judgments come to."""
        return preferences_by_entrant(self.judgments, self.orders)

    @property
    def has_stages(self) -> bool:
        """Whether anything was asked for that only a drift table shows."""
        return bool(self.scores or self.objective or self.scored_pairs)


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

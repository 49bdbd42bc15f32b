"""What a critique run came to: shown at its end, because a useless critic should be seen at once."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from srt_cli import console
from srt_cli.calls import Tally
from srt_cli.records import FeedbackRecord, Usage
from srt_cli.stats.confusion import Confusion, confusion


@dataclass(frozen=True)
class Verdict:
    """Whether the critic called an answer good, and whether the check says it is."""

    refined: bool
    says_good: bool
    is_good: bool


@dataclass
class CritiqueSummary:
    """Counts over all rows of a run, filled row by row."""

    calls: Tally = field(default_factory=Tally)
    statuses: Counter[str] = field(default_factory=Counter)
    draft_scores: Counter[float] = field(default_factory=Counter)
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    better: int = 0
    equal: int = 0
    worse: int = 0
    total_gain: float = 0.0
    copies: int = 0
    draft_characters: int = 0
    refinement_characters: int = 0
    usage: Usage = field(default_factory=Usage)
    first_failure: str | None = None

    def add(self, records: Iterable[FeedbackRecord], verdicts: Iterable[Verdict]) -> None:
        """Count one row."""
        self.verdicts.update(verdicts)
        for record in records:
            self.statuses[record.status] += 1
            self.usage = self.usage + record.usage
            if record.status == "failed" and self.first_failure is None:
                self.first_failure = record.reason
            if record.feedback is not None:
                self.draft_scores[record.feedback.score] += 1
            if record.status == "ok" and record.gain is not None:
                self._add_refinement(record, record.gain)

    def _add_refinement(self, record: FeedbackRecord, gain: float) -> None:
        assert record.response is not None
        assert record.refinement is not None
        self.better += gain > 0
        self.equal += gain == 0
        self.worse += gain < 0
        self.total_gain += gain
        self.copies += record.refinement.strip() == record.response.strip()
        self.draft_characters += len(record.response)
        self.refinement_characters += len(record.refinement)

    @property
    def rows(self) -> int:
        """Records written."""
        return self.statuses.total()

    @property
    def mean_gain(self) -> float | None:
        """Mean blind score of the refinements minus mean score of their drafts."""
        scored = self.better + self.equal + self.worse
        return self.total_gain / scored if scored else None

    @property
    def length_ratio(self) -> float | None:
        """Characters of the refinements over characters of their drafts."""
        return self.refinement_characters / self.draft_characters if self.draft_characters else None

    def confusion(self, *, refined: bool | None = None) -> Confusion:
        """Says good against is good, over drafts, refinements, or both."""
        kept = [v for v in self.verdicts.elements() if refined is None or v.refined == refined]
        return confusion([v.says_good for v in kept], [v.is_good for v in kept])

    def note(self) -> str:
        """The short form for the progress line."""
        bad = self.rows - self.statuses["ok"]
        return f"{bad} not ok" if bad else ""

    def warnings(self) -> list[str]:
        """What should make a user look before they train on this."""
        found = []
        scored = self.draft_scores.total()
        if scored >= 10 and len(self.draft_scores) == 1:
            (score,) = self.draft_scores
            found.append(
                f"the critic gave every one of {scored} drafts the score {score:g}: it tells nothing. "
                "Use another critic, or feedback with a balanced share of good and bad drafts."
            )
        checked = self.confusion()
        if checked.n >= 10 and checked.constant:
            found.append(
                f"the critic said the same of all {checked.n} checked answers: it is constant."
            )
        if self.rows and self.statuses["ok"] < self.rows / 2:
            found.append(
                f"only {self.statuses['ok']} of {self.rows} rows are ok "
                f"({', '.join(f'{n} {s}' for s, n in self.statuses.most_common() if s != 'ok')})."
            )
        return found

    def tallies(self) -> dict[str, Any]:
        """The manifest's form."""
        tallies: dict[str, Any] = {
            "rows": self.rows,
            "statuses": dict(sorted(self.statuses.items())),
            "calls_made": self.calls.paid,
            "calls_from_journal": self.calls.from_journal,
            "draft_scores": {f"{score:g}": n for score, n in sorted(self.draft_scores.items())},
            "mean_gain": self.mean_gain,
            "better": self.better,
            "equal": self.equal,
            "worse": self.worse,
            "copies": self.copies,
            "length_ratio": self.length_ratio,
        }
        if self.verdicts:
            for name, refined in (("drafts", False), ("refinements", True)):
                table = self.confusion(refined=refined)
                tallies[f"confusion_{name}"] = vars(table) | {"accuracy": table.accuracy}
        return tallies

    def close(self, where: str, then: str) -> None:
        """Tell the user what the critic did, where the result is, and the next command."""
        parts = " · ".join(f"{count} {status}" for status, count in self.statuses.most_common())
        console.say(f"rows: {parts}")
        if self.calls.from_journal:
            console.say(
                f"calls: {self.calls.paid} made, {self.calls.from_journal} taken from the journal"
            )
        if self.mean_gain is not None:
            console.say(
                f"refinement against draft, scored blind: {self.better} better, {self.equal} equal, "
                f"{self.worse} worse; mean gain {self.mean_gain:+.2f}; {self.copies} copies; "
                f"length x{self.length_ratio or 0:.2f}"
            )
        if self.draft_scores:
            histogram = "  ".join(f"{s:g}: {n}" for s, n in sorted(self.draft_scores.items()))
            console.say(f"scores of the drafts: {histogram}")
        if self.verdicts:
            show_confusion(
                "the critic against the check",
                [
                    ("drafts", self.confusion(refined=False)),
                    ("refinements", self.confusion(refined=True)),
                ],
            )
        console.finish(where, then)


def show_confusion(title: str, tables: Iterable[tuple[str, Confusion]]) -> None:
    """Print confusion tables, one row a set of answers."""
    rows = []
    for name, table in tables:
        accuracy = "-" if table.balanced_accuracy is None else f"{table.balanced_accuracy:.0%}"
        rows.append(
            [
                name,
                str(table.n),
                str(table.good_called_good),
                str(table.bad_called_good),
                str(table.good_called_bad),
                str(table.bad_called_bad),
                accuracy,
            ]
        )
    columns = ("", "n", "good/good", "bad/good", "good/bad", "bad/bad", "balanced accuracy")
    console.talk_table(f"{title} (is/says)", columns, rows)

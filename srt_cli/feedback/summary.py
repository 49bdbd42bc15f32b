"""What came of a critique run, shown at its end: a useless critic should be seen at once."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from srt_cli import console
from srt_cli.calls.conduct import Tally
from srt_cli.feedback.story import CheckedAnswer, CheckedRow
from srt_cli.models import THOUGHT_UNTIL_LIMIT
from srt_cli.records import PLANTED, Feedback, FeedbackRecord, Usage
from srt_cli.stats.counting import Confusion, Copied, Moments, confusion, wilson
from srt_cli.stats.hygiene import is_same_text
from srt_cli.templates import checklist_score, is_as_asked

FEWEST_COMPARED: Final = 10
SHORTER, LONGER = 0.5, 2.0
"""Length of the refinements, draft = 1, beyond which length is what is learnt."""


def form_of(record: FeedbackRecord, kind: str) -> str:
    """How a critic's reply of one kind was read."""
    readable = record.feedback if kind == "critique" else record.refinement_score
    if readable is None:
        return "unread"
    if f"{kind} unread 1" in record.raw:
        return "asked again"
    if f"{kind} cut off" in record.raw:
        return "longer"
    asked = is_as_asked(record.raw[kind], expect_refinement=kind == "critique")
    return "as asked" if asked else "mended"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _share(count: int, total: int) -> str:
    return f"{count} of {total}" + (f" ({count / total:.0%})" if total else "")


@dataclass
class Beliefs:
    """Integer scores against expected ones, over the rows that have both for draft and refinement."""

    pairs: int = 0
    integer_ties: int = 0
    expected_ties: int = 0
    decided: int = 0
    same_order: int = 0
    integer_and_expected: Moments = field(default_factory=Moments)

    def add(self, record: FeedbackRecord) -> None:
        """Count one row, if its scores have expectations."""
        feedback, after = record.feedback, record.refinement_score_mean
        if feedback is None or feedback.score_mean is None or after is None:
            return
        assert record.refinement_score is not None
        gain, expected = record.refinement_score - feedback.score, after - feedback.score_mean
        self.pairs += 1
        self.integer_ties += gain == 0
        self.expected_ties += expected == 0
        if gain and expected:
            self.decided += 1
            self.same_order += (gain > 0) == (expected > 0)
        self.integer_and_expected.add(feedback.score, feedback.score_mean)
        self.integer_and_expected.add(record.refinement_score, after)

    def sentence(self) -> str:
        """For the end of a run."""
        return (
            f"expected scores: {self.pairs} pairs, of which {self.integer_ties} tie by integer and "
            f"{self.expected_ties} by expectation; where both decide, the order is the same in "
            f"{_share(self.same_order, self.decided)}; correlation "
            f"{_shown(self.integer_and_expected.correlation, '+.2f')}"
        )

    def tallies(self) -> dict[str, Any]:
        """The manifest's form."""
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return counts | {"correlation": self.integer_and_expected.correlation}


@dataclass
class CritiqueSummary:
    """Counts over all rows of a run, filled row by row."""

    calls: Tally = field(default_factory=Tally)
    owed: int = 0
    """Rows that are not whole yet."""
    next_step: str | None = None
    """What to do about them."""
    statuses: Counter[str] = field(default_factory=Counter)
    draft_scores: Counter[float] = field(default_factory=Counter)
    expected_scores: int = 0
    """Drafts whose score has an expectation."""
    checked: Counter[CheckedAnswer] = field(default_factory=Counter)
    better: int = 0
    equal: int = 0
    worse: int = 0
    total_gain: float = 0.0
    copies: int = 0
    draft_characters: int = 0
    refinement_characters: int = 0
    usage: Usage = field(default_factory=Usage)
    only_thoughts: Counter[bool] = field(default_factory=Counter)
    """Rows that ended before an answer came; True counts drafts, False a critic's replies."""
    firsts: dict[str, FeedbackRecord] = field(default_factory=dict)
    """By status, the first row that ended so."""
    blind_scores: Counter[float] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    """How the critic's replies were read: as asked, mended, longer, asked again, unread."""
    length_and_score: Moments = field(default_factory=Moments)
    beliefs: Beliefs = field(default_factory=Beliefs)
    weaknesses: Counter[int] = field(default_factory=Counter)
    """Digests of what was criticised, to find a critic that always says the same."""
    checklists: int = 0
    """Feedback that answers items with yes or no."""
    drafts: int = 0
    drafts_cut: int = 0
    """Drafts that the token limit cut off."""
    critiques_cut: int = 0
    labels: Counter[tuple[str, bool | str]] = field(default_factory=Counter)
    """By kind of score: whether it agrees with the check on which of the two is better, or ties."""
    orders_agree: Counter[bool] = field(default_factory=Counter)
    """Comparisons in both orders: whether both name the same text."""
    copied: Copied = field(default_factory=Copied)
    itself: bool = False
    """Whether the critic is the model that wrote the drafts."""

    planted: int = 0
    planted_found: int = 0
    """Planted faults, and those that made the critic score the answer lower."""

    def add(self, row: CheckedRow) -> None:
        """Count one row; what is said of drafts and refinements leaves planted faults out."""
        self.checked.update(row.checked)
        for before, record in zip([None, *row.records], row.records, strict=False):
            self.statuses[record.status] += 1
            self.usage = self.usage + record.usage
            self.firsts.setdefault(record.status, record)
            if record.reason is not None and record.reason.endswith(THOUGHT_UNTIL_LIMIT):
                self.only_thoughts[record.response is None] += 1
            if record.policy == PLANTED:
                self._add_planted(record, before)
                continue
            self.drafts += record.round == 1 and "response" in record.raw
            self.drafts_cut += record.response_cut
            self.critiques_cut += record.at_limit and record.response is not None
            if record.feedback is not None:
                self._add_feedback(record, record.feedback)
            for kind in ("critique", "score"):
                if kind in record.raw:
                    self.forms[form_of(record, kind)] += 1
            if record.refinement_score is not None:
                self.blind_scores[record.refinement_score] += 1
            if record.status == "ok" and record.gain is not None:
                self.beliefs.add(record)
                self._add_refinement(record, record.gain)

    def _add_planted(self, record: FeedbackRecord, good: FeedbackRecord | None) -> None:
        if record.feedback is not None and good is not None and good.refinement_score is not None:
            self.planted += 1
            self.planted_found += record.feedback.score < good.refinement_score

    def _add_feedback(self, record: FeedbackRecord, feedback: Feedback) -> None:
        self.draft_scores[feedback.score] += 1
        self.expected_scores += feedback.score_mean is not None
        self.length_and_score.add(len(record.response or ""), feedback.score)
        self.weaknesses[hash(feedback.weaknesses.strip().lower())] += 1
        self.checklists += checklist_score(feedback.weaknesses) is not None

    def _add_labels(self, record: FeedbackRecord, gain: float) -> None:
        """Whether each kind of score puts draft and refinement in the check's order."""
        assert record.feedback is not None
        before, after = record.response_passes, record.refinement_passes
        gains: dict[str, float] = {"integer": gain}
        if record.feedback.score_mean is not None and record.refinement_score_mean is not None:
            gains["expected"] = record.refinement_score_mean - record.feedback.score_mean
        if odds := record.odds.get("refinement"):
            gains["compared"] = sum(odds) - 1
            self.orders_agree[(odds[0] > 0.5) == (odds[1] > 0.5)] += 1
        if before is None or after is None or before == after:
            return
        for kind, found in gains.items():
            self.labels[kind, "tie" if not found else (found > 0) == (after > before)] += 1

    def _add_refinement(self, record: FeedbackRecord, gain: float) -> None:
        self._add_labels(record, gain)
        assert record.response is not None
        assert record.refinement is not None
        self.better += gain > 0
        self.equal += gain == 0
        self.worse += gain < 0
        self.total_gain += gain
        copies = is_same_text(record.refinement, record.response)
        self.copies += copies
        self.copied.add(copies, record.response_passes)
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
        """The critic's word against the check's, over drafts, refinements, or both."""
        kept = [v for v in self.checked.elements() if refined is None or v.refined == refined]
        return confusion([v.says_good for v in kept], [v.is_good for v in kept])

    def label_precision(self) -> dict[str, dict[str, Any]]:
        """By kind of score: labels that the check decides, right ones with Wilson's interval, ties."""
        found = {}
        for kind in ("integer", "expected", "compared"):
            right, wrong = self.labels[kind, True], self.labels[kind, False]
            if right + wrong:
                found[kind] = {
                    "right": right, "decided": right + wrong, "ties": self.labels[kind, "tie"],
                    "interval": wilson(right, right + wrong),
                }  # fmt: skip
        return found

    @property
    def score_entropy_bits(self) -> float | None:
        """Entropy of the drafts' scores; 0 for a critic that gives one score to all."""
        total = self.draft_scores.total()
        if not total:
            return None
        shares = [count / total for count in self.draft_scores.values()]
        return abs(sum(share * math.log2(share) for share in shares))

    @property
    def repeated_weaknesses(self) -> float | None:
        """Share of critiques whose weaknesses another row has word for word."""
        total = self.weaknesses.total()
        repeated = sum(count for count in self.weaknesses.values() if count > 1)
        return repeated / total if total else None

    def figures(self) -> list[tuple[str, str]]:
        """What the critic is like, name and value."""
        compared = self.better + self.equal + self.worse
        replies = self.forms.total()
        figures = [
            ("entropy of the drafts' scores, in bits", _shown(self.score_entropy_bits, ".2f")),
            ("correlation of score and length", _shown(self.length_and_score.correlation, "+.2f")),
            ("refinements scored better than the draft", _share(self.better, compared)),
            ("scored equal", _share(self.equal, compared)),
            ("scored worse", _share(self.worse, compared)),
            ("refinements that copy the draft", _share(self.copies, compared)),
            ("length, draft = 1", _shown(self.length_ratio, ".2f")),
            ("weaknesses said of several answers", _shown(self.repeated_weaknesses, ".0%")),
            ("drafts cut at the token limit", _share(self.drafts_cut, self.drafts)),
            ("critiques cut at the token limit", _share(self.critiques_cut, self.rows)),
        ]
        named = ("as asked", "mended", "longer", "asked again", "unread")
        return figures + [
            (f"replies {form}", _share(self.forms[form], replies))
            for form in named
            if self.forms[form]
        ]

    def note(self) -> str:
        """The short form for the progress line."""
        bad = self.rows - self.statuses["ok"]
        return f"{bad} not ok" if bad else ""

    @property
    def first_not_ok(self) -> FeedbackRecord | None:
        """The first of those rows that most ended like, where they are not ok."""
        usual = [status for status, _ in self.statuses.most_common() if status != "ok"]
        return self.firsts[usual[0]] if usual else None

    @property
    def unusable(self) -> str:
        """How many rows ended how, but for those that are ok."""
        return ", ".join(
            f"{n} {status}" for status, n in self.statuses.most_common() if status != "ok"
        )

    def warnings(self) -> list[str]:
        """What should make a user look before they train on this."""
        found = []
        scored = self.draft_scores.total()
        if scored >= 10 and len(self.draft_scores) == 1 and not self.itself:
            (score,) = self.draft_scores
            found.append(
                f"the critic gave every one of {scored} drafts the score {score:g}: it tells nothing. "
                "Use another critic, or feedback with a balanced share of good and bad drafts."
            )
        checked = self.confusion()
        if checked.n >= 10 and checked.constant and not self.itself:
            found.append(
                f"the critic said the same of all {checked.n} checked answers: it is constant."
            )
        ratio = self.length_ratio
        compared = self.better + self.equal + self.worse
        if ratio is not None and compared >= FEWEST_COMPARED and not SHORTER < ratio < LONGER:
            way = "longer" if ratio > 1 else "shorter"
            found.append(
                f"refinements are {ratio:.2f} times as long as their drafts: a model that learns from "
                f"them learns to write {way} before all else, and a critic to tell drafts by their "
                f"length. Let drafts come out as long as good answers are (--max-new-tokens, --system)."
            )
        for of_draft, flag in ((True, "--max-new-tokens"), (False, "--critic-max-tokens")):
            if self.only_thoughts[of_draft]:
                whose = "a draft's" if of_draft else "a critic's"
                found.append(
                    f"{self.only_thoughts[of_draft]} of {self.rows} rows end in {whose} thoughts, at "
                    f"the token limit and before any answer. Raise {flag}, and pass --overwrite with "
                    "it: the journal stays, and calls that ask the same are not made again."
                )
        if self.rows and self.statuses["ok"] < self.rows / 2:
            found.append(
                f"only {self.statuses['ok']} of {self.rows} rows are ok ({self.unusable})."
            )
        return found

    def tallies(self) -> dict[str, Any]:
        """The manifest's form."""
        tallies: dict[str, Any] = {
            "rows": self.rows,
            "statuses": dict(sorted(self.statuses.items())),
            "calls_made": self.calls.paid,
            "calls_from_journal": self.calls.known_before,
            "draft_scores": {f"{score:g}": n for score, n in sorted(self.draft_scores.items())},
            "mean_gain": self.mean_gain,
            "better": self.better,
            "equal": self.equal,
            "worse": self.worse,
            "copies": self.copies,
            "length_ratio": self.length_ratio,
            "blind_scores": {f"{score:g}": n for score, n in sorted(self.blind_scores.items())},
            "score_entropy_bits": self.score_entropy_bits,
            "score_length_correlation": self.length_and_score.correlation,
            "repeated_weaknesses": self.repeated_weaknesses,
            "drafts": self.drafts,
            "drafts_cut": self.drafts_cut,
            "replies": dict(sorted(self.forms.items())),
        }
        if self.planted:
            tallies |= {"planted": self.planted, "planted_found": self.planted_found}
        if self.beliefs.pairs:
            tallies["expected_scores"] = self.beliefs.tallies()
        if precision := self.label_precision():
            tallies["label_precision"] = precision
        if self.orders_agree:
            tallies["orders_agree"] = self.orders_agree[True] / self.orders_agree.total()
        if self.checked:
            for name, refined in (("drafts", False), ("refinements", True)):
                table = self.confusion(refined=refined)
                tallies[f"confusion_{name}"] = vars(table) | {"accuracy": table.accuracy}
        return tallies

    def close(self, where: str, then: str) -> None:
        """Tell the user what the critic did, where the result is, and the next command."""
        parts = " · ".join(f"{count} {status}" for status, count in self.statuses.most_common())
        console.say(f"rows: {parts}")
        if (bad := self.first_not_ok) is not None and self.statuses["ok"]:
            console.say(f"the first that is {bad.status}: {bad.id}: {bad.reason}")
        if self.calls.known_before:
            console.say(
                f"calls: {self.calls.paid} made, {self.calls.known_before} taken from the journal"
            )
        if self.mean_gain is not None:
            console.say(
                f"refinement against draft, scored blind: {self.better} better, {self.equal} equal, "
                f"{self.worse} worse; mean gain {self.mean_gain:+.2f}; {self.copies} copies; "
                f"length x{self.length_ratio or 0:.2f}"
            )
        if self.planted:
            console.say(
                f"planted faults: {self.planted}, of which the critic scores "
                f"{_share(self.planted_found, self.planted)} lower than the same answer without"
            )
        cut = {"drafts": (self.drafts_cut, self.drafts)}
        cut["critiques"] = self.critiques_cut, self.rows
        named = ", ".join(f"{_share(*counts)} {what}" for what, counts in cut.items() if counts[0])
        if named:
            console.say(f"cut at the token limit: {named}")
        if self.draft_scores:
            histogram = "  ".join(f"{s:g}: {n}" for s, n in sorted(self.draft_scores.items()))
            entropy = _shown(self.score_entropy_bits, ".2f")
            console.say(f"scores of the drafts: {histogram}; entropy {entropy} bits")
            said = []
            if self.repeated_weaknesses:
                said.append(
                    f"{self.repeated_weaknesses:.0%} of the weaknesses are said of several answers"
                )
            if (correlation := self.length_and_score.correlation) is not None:
                said.insert(0, f"score and length correlate {correlation:+.2f}")
            if said:
                console.say("; ".join(said))
        if self.beliefs.pairs:
            console.say(self.beliefs.sentence())
        if self.orders_agree:
            agree = _share(self.orders_agree[True], self.orders_agree.total())
            console.say(f"compared: both orders name the same of draft and refinement in {agree}")
        for kind, figures in self.label_precision().items():
            decided, (low, high) = figures["decided"], figures["interval"]
            console.say(
                f"labels by {kind} scores, against the check: {figures['right'] / decided:.0%} "
                f"[{100 * low:.0f}, {100 * high:.0f}] of {decided} right, {figures['ties']} ties"
            )
        odd = {form: n for form, n in self.forms.most_common() if form != "as asked"}
        if odd:
            named = ", ".join(f"{count} {form}" for form, count in odd.items())
            console.say(f"critic's replies: {self.forms['as asked']} as asked, {named}")
        if self.checked:
            show_confusion(
                "the critic against the check",
                [
                    ("drafts", self.confusion(refined=False)),
                    ("refinements", self.confusion(refined=True)),
                ],
            )
        console.finish(where, then if not self.owed else self.next_step)


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

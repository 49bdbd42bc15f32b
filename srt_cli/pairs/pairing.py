"""Which answers to a prompt make a pair: the strategies of `srt build-prefs`.

A strategy sees all records of a prompt (samples, rounds, files) and returns one pair of candidates:
texts with a score, each a draft or a refinement. `refine` sees the records of one draft and its
refinement. No strategy depends on the order of the records.
"""

import hashlib
import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

import msgspec
import orjson
import xxhash

from srt_cli.pairs.answers import FirstAnswers
from srt_cli.pairs.rows import PairRow, ScoredRow
from srt_cli.records import Message, Preference
from srt_cli.templates import checklist_score

Strategy = Literal["refine", "best-worst", "refine-best", "tiers"]
ScoreKind = Literal["integer", "expected", "compared", "checklist"]
NO_SCORE: Final[dict[ScoreKind, str]] = {
    "expected": "no expected score", "compared": "no comparison", "checklist": "no checklist",
}  # fmt: skip
"""Why a row whose scores are of another kind can be in no pair."""
BETWEEN: Final = "\x1d"
"""Texts of one digest."""
EVEN: Final = 0.5
POINTS: Final = 10.0
"""Between a text that is surely better and one that is surely worse, by comparison."""


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """One scored answer to a prompt."""

    text: str
    score: float
    record: PairRow
    passes: float | None = None
    """What a check said of it; None where none was asked."""
    is_scored: bool = True
    """Whether the score is its own, and not that of the draft whose place it takes."""
    by: str | None = None
    """The first model, of whose answers it is one."""

    @property
    def order(self) -> tuple[float, int, str]:
        """Sort key: higher score, then shorter text, then alphabet; never the order of the input."""
        return (-self.score, len(self.text), self.text)


class Refined(NamedTuple):
    """A draft and its refinement, each with a score; an answer that has none stands for both."""

    draft: Candidate
    refinement: Candidate


class Pairing(NamedTuple):
    """A better and a worse answer to one prompt."""

    chosen: Candidate
    rejected: Candidate

    @property
    def gain(self) -> float:
        """How much higher the chosen answer scores."""
        return self.chosen.score - self.rejected.score

    @property
    def fingerprint(self) -> bytes:
        """A 16-byte digest of the texts of the pair."""
        return digest(_transcript(self.chosen.record.prompt), self.chosen.text, self.rejected.text)


def refined_of(row: PairRow, kind: ScoreKind) -> Refined | str:
    """The draft and refinement of a row, or the reason why the row can be in no pair."""
    if row.status != "ok":
        return row.status
    if row.sample < 0:
        return "planted fault"
    response, refinement = row.response, row.refinement
    feedback, blind, after_score = row.feedback, row.refinement_feedback, row.refinement_score
    if response is None or refinement is None or feedback is None or after_score is None:
        return "incomplete"
    before_score: float | None = feedback.score
    if kind == "expected":
        before_score, after_score = feedback.score_mean, row.refinement_score_mean
    elif kind == "compared":
        odds, draft_odds = row.mean_odds("refinement"), row.mean_odds("sample")
        if odds is None:
            return NO_SCORE[kind]
        # Drafts stand where the other samples' drafts leave them, a refinement so far from its draft
        # as the odds say: a sure win is as many points above as a sure loss would be below.
        before_score = POINTS * (EVEN if draft_odds is None else draft_odds)
        after_score = before_score + POINTS * (2 * odds - 1)
    elif kind == "checklist":
        before_score = checklist_score(feedback.weaknesses)
        after_score = None if blind is None else checklist_score(blind.weaknesses)
    if before_score is None or after_score is None:
        return NO_SCORE[kind]
    draft, refined = response.strip(), refinement.strip()
    if not draft or not refined:
        return "empty"
    return Refined(
        Candidate(draft, before_score, row, row.response_passes),
        Candidate(refined, after_score, row, row.refinement_passes),
    )


def answers_of(row: PairRow, kind: ScoreKind, strategy: Strategy) -> list[Refined] | str:
    """What a row brings to a strategy, or the reason why the row can be in no pair."""
    if not isinstance(row, ScoredRow):
        found = refined_of(row, kind)
        return found if isinstance(found, str) else [found]
    if strategy in ("refine", "refine-best"):
        return "no refinement"
    if kind != "integer":
        return NO_SCORE[kind]
    scored = [Candidate(text.strip(), score, row) for text, score in row.answers]
    return [Refined(answer, answer) for answer in scored if answer.text] or "empty"


def candidates_of(rows: Sequence[Refined]) -> list[Candidate]:
    """Drafts and refinements, best first; a text that occurs twice has its mean score."""
    same: dict[str, list[Candidate]] = {}
    for row in rows:
        for candidate in row[: 1 if row.refinement is row.draft else 2]:
            same.setdefault(candidate.text, []).append(candidate)
    return sorted(map(_at_mean_score, same.values()), key=lambda candidate: candidate.order)


def _at_mean_score(same: Sequence[Candidate]) -> Candidate:
    """One candidate for several of the same text."""
    if len(same) == 1:
        return same[0]
    mean = math.fsum(candidate.score for candidate in same) / len(same)
    return msgspec.structs.replace(same[0], score=mean)


def refine(rows: Sequence[Refined], rho: float) -> Pairing | None:
    """The refinement against its draft (paper, section 3.2); the rows hold the same two texts."""
    if len(rows) == 1:
        return Pairing(rows[0].refinement, rows[0].draft)
    return Pairing(
        _at_mean_score([row.refinement for row in rows]),
        _at_mean_score([row.draft for row in rows]),
    )


def best_worst(rows: Sequence[Refined], rho: float) -> Pairing | None:
    """The best of all drafts and refinements against the worst, as in Self-Rewarding."""
    candidates = candidates_of(rows)
    return Pairing(candidates[0], candidates[-1]) if len(candidates) > 1 else None


def refine_best(rows: Sequence[Refined], rho: float) -> Pairing | None:
    """The refinement of the best draft against the worst draft (SCRPO, arXiv 2512.05387)."""
    best = min(rows, key=lambda row: (row.draft.order, row.refinement.order))
    worst = max(rows, key=lambda row: row.draft.order)
    return Pairing(best.refinement, worst.draft)


def tiers(rows: Sequence[Refined], rho: float) -> Pairing | None:
    """The shortest of the top tier against the longest of the bottom tier.

    With scores from s_low to s_high, the top tier holds those of at least (1 - rho) s_high +
    rho s_low, the bottom tier those of at most (1 - rho) s_low + rho s_high; rho 0 keeps the
    extremes (Meta-Rewarding, arXiv 2407.19594, section 2.2). Written so that no rounding leaves an
    extreme out of its tier.
    """
    candidates = candidates_of(rows)
    if len(candidates) < 2:
        return None
    high, low = candidates[0].score, candidates[-1].score
    width = rho * (high - low)
    top = [c for c in candidates if c.score >= high - width]
    bottom = [c for c in candidates if c.score <= low + width]
    chosen = min(top, key=lambda c: (len(c.text), c.order))
    rejected = max(bottom, key=lambda c: (len(c.text), c.order))
    return Pairing(chosen, rejected)


STRATEGIES: Final[Mapping[Strategy, Callable[[Sequence[Refined], float], Pairing | None]]] = {
    "refine": refine,
    "best-worst": best_worst,
    "refine-best": refine_best,
    "tiers": tiers,
}


def group_key(row: PairRow, strategy: Strategy, seed: int | None = None) -> bytes:
    """A digest that is equal for the rows that a strategy must see together.

    It is of the prompt's text, not its id, which another file may give to another prompt. A seed that
    nobody knows lets a faster hash do, whose order of keys means nothing.
    """
    text = _transcript(row.prompt)
    if strategy == "refine":
        text = f"{text}{BETWEEN}{(row.response or '').strip()}{BETWEEN}{(row.refinement or '').strip()}"
    return digest(text) if seed is None else xxhash.xxh3_128_digest(text.encode(), seed)


def against_first(pairing: Pairing, first: FirstAnswers) -> Pairing | None:
    """The pair with the first model's answer as the rejected one; None where there is none.

    An answer without a score counts as much as the one whose place it takes.
    """
    record = pairing.chosen.record
    answer = first.answer_to(record.prompt, record.id)
    if answer is None:
        return None
    scored = answer.score is not None
    score = pairing.rejected.score if answer.score is None else answer.score
    rejected = Candidate(
        answer.text, score, record, answer.passes, is_scored=scored, by=answer.model
    )
    return Pairing(pairing.chosen, rejected)


def preference_of(pairing: Pairing) -> Preference:
    """A pair in TRL's conversational form."""
    return Preference.model_validate_json(line_of(pairing))


def line_of(pairing: Pairing) -> bytes:
    """A pair as its JSONL line, as `to_line` writes a `Preference`, but much faster."""
    chosen, rejected = pairing
    record = chosen.record
    prompt = record.prompt
    row = {
        "id": pair_id(record),
        "prompt": [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else [{"role": turn.role, "content": turn.content} for turn in prompt],
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "chosen_score": chosen.score,
        "rejected_score": rejected.score if rejected.is_scored else None,
        "source": record.critic,
    }
    if rejected.by is not None:
        row["rejected_by"] = rejected.by
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def pair_id(record: PairRow) -> str:
    """The id of the pair whose chosen answer is in a record."""
    first = record.sample == 0 and record.round == 1
    return record.id if first else f"{record.id}/{record.sample}/{record.round}"


def fingerprint_of(pair: Preference) -> bytes:
    """A 16-byte digest of the texts of a pair, equal to `Pairing.fingerprint`."""
    return digest(_transcript(pair.prompt), pair.chosen[0].content, pair.rejected[0].content)


def pair_key(pair: Preference) -> str:
    """How labels name a pair."""
    return fingerprint_of(pair).hex()


def text_key(text: str) -> str:
    """How labels name a text."""
    return digest(text).hex()


def digest(*texts: str) -> bytes:
    """A 16-byte digest of texts."""
    return hashlib.blake2b(BETWEEN.join(texts).encode(), digest_size=16).digest()


def _transcript(prompt: str | Sequence[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in prompt)


class Picker(Protocol):
    """Picks some of the pairs that it is offered."""

    def offer(self, pairing: Pairing) -> None:
        """Consider a pair."""
        ...

    def merge(self, other: Any) -> None:
        """Take what another picker of the same kind has picked among other pairs."""
        ...

    def pairs(self) -> list[Preference]:
        """What was picked, in an order that does not depend on the input's."""
        ...


class Sample:
    """Picks `size` pairs at random: the same ones in whatever order they come."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._salt = (seed % 2**64).to_bytes(8)
        self._heap: list[tuple[int, bytes, Pairing]] = []

    def offer(self, pairing: Pairing) -> None:
        """Consider a pair."""
        if not self._size:
            return
        fingerprint = pairing.fingerprint
        mixed = hashlib.blake2b(fingerprint, digest_size=8, salt=self._salt).digest()
        # A heap keeps its smallest entry on top, and the smallest digests are wanted: so negate.
        self._take((-int.from_bytes(mixed), fingerprint, pairing))

    def _take(self, entry: tuple[int, bytes, Pairing]) -> None:
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        elif entry[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, entry)

    def merge(self, other: "Sample") -> None:
        """Take what another sample of the same size and seed has picked among other pairs."""
        for entry in other._heap:
            self._take(entry)

    def pairs(self) -> list[Preference]:
        """The sample, in an order that does not depend on the input's."""
        entries = sorted(self._heap, key=lambda entry: entry[:2])
        return [preference_of(pairing) for *_, pairing in entries]


class Wanted:
    """Picks the pairs of the given fingerprints."""

    def __init__(self, fingerprints: Collection[bytes]) -> None:
        self._fingerprints = fingerprints
        self._found: dict[bytes, Pairing] = {}

    def offer(self, pairing: Pairing) -> None:
        """Take the pair if it is one of them."""
        fingerprint = pairing.fingerprint
        if fingerprint in self._fingerprints:
            self._found[fingerprint] = pairing

    def merge(self, other: "Wanted") -> None:
        """Take what another one has found among other pairs."""
        self._found |= other._found

    def pairs(self) -> list[Preference]:
        """Those that were offered, in the order of their fingerprints."""
        return [preference_of(self._found[name]) for name in sorted(self._found)]

"""Which answers to one prompt make a pair: the strategies of `srt build-prefs`.

Every strategy sees the records of one prompt (all samples, rounds and files) and gives pairs of
candidates: texts with a score, each a draft or a refinement.
"""

import hashlib
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from srt_cli.records import FeedbackRecord, Preference

Strategy = Literal["refine", "best-worst", "refine-best", "tiers"]


@dataclass(frozen=True)
class Candidate:
    """One scored answer to a prompt."""

    text: str
    score: float
    record: FeedbackRecord

    @property
    def order(self) -> tuple[float, int, str]:
        """Higher scores first, then shorter texts, then the alphabet: never the order of the input."""
        return (-self.score, len(self.text), self.text)


Pairing = tuple[Candidate, Candidate]
"""Chosen and rejected."""


def candidates_of(records: Sequence[FeedbackRecord]) -> list[Candidate]:
    """Drafts and refinements that have a score, each text once, at its mean score, best first."""
    scores: dict[str, list[float]] = {}
    first: dict[str, FeedbackRecord] = {}
    for record in records:
        scored = [(record.refinement, record.refinement_score)]
        if record.feedback is not None:
            scored.append((record.response, record.feedback.score))
        for text, score in scored:
            plain = (text or "").strip()
            if plain and score is not None and record.status == "ok":
                scores.setdefault(plain, []).append(score)
                first.setdefault(plain, record)
    found = [
        Candidate(text, math.fsum(given) / len(given), first[text])
        for text, given in scores.items()
    ]
    return sorted(found, key=lambda candidate: candidate.order)


def best_worst(records: Sequence[FeedbackRecord], rho: float) -> Pairing | None:
    """The best of all drafts and refinements against the worst (Self-Rewarding's way)."""
    candidates = candidates_of(records)
    return (candidates[0], candidates[-1]) if len(candidates) > 1 else None


def refine_best(records: Sequence[FeedbackRecord], rho: float) -> Pairing | None:
    """The refinement of the best draft against the worst draft."""
    drafts = [
        (Candidate(record.response.strip(), record.feedback.score, record), record)
        for record in records
        if record.status == "ok" and record.feedback and (record.response or "").strip()
        and record.response is not None
    ]  # fmt: skip
    if not drafts:
        return None
    drafts.sort(key=lambda pair: (pair[0].order, pair[1].refinement or ""))
    best, worst = drafts[0][1], drafts[-1][0]
    if not (best.refinement or "").strip() or best.refinement_score is None:
        return None
    assert best.refinement is not None
    return Candidate(best.refinement.strip(), best.refinement_score, best), worst


def tiers(records: Sequence[FeedbackRecord], rho: float) -> Pairing | None:
    """The shortest of the top tier against the longest of the bottom tier.

    With scores from s_low to s_high, the top tier holds those of at least (1 - rho) s_high +
    rho s_low, the bottom tier those of at most (1 - rho) s_low + rho s_high; rho 0 keeps the
    extremes (Meta-Rewarding, arXiv 2407.19594, section 2.2).
    """
    candidates = candidates_of(records)
    if len(candidates) < 2:
        return None
    high, low = candidates[0].score, candidates[-1].score
    top = [c for c in candidates if c.score >= (1 - rho) * high + rho * low]
    bottom = [c for c in candidates if c.score <= (1 - rho) * low + rho * high]
    chosen = min(top, key=lambda c: (len(c.text), c.order))
    rejected = max(bottom, key=lambda c: (len(c.text), c.order))
    return chosen, rejected


GROUPING: Final[Mapping[Strategy, Callable[[Sequence[FeedbackRecord], float], Pairing | None]]] = {
    "best-worst": best_worst,
    "refine-best": refine_best,
    "tiers": tiers,
}


def grouped(records: Iterator[FeedbackRecord]) -> Iterator[list[FeedbackRecord]]:
    """The records of each prompt together, in the order in which prompts first appear."""
    groups: dict[str, list[FeedbackRecord]] = {}
    for record in records:
        groups.setdefault(record.id, []).append(record)
    yield from groups.values()


class Sample:
    """A fixed number of pairs, the same ones whatever the order in which they come."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._heap: list[tuple[int, str, Preference]] = []

    def offer(self, fingerprint: bytes, pair: Preference) -> None:
        """Consider a pair; `fingerprint` are uniform bytes that stand for it."""
        digest = hashlib.blake2b(fingerprint, digest_size=8, salt=self._seed.to_bytes(8)).digest()
        # A heap keeps its smallest on top; those with the smallest digests are wanted.
        entry = (-int.from_bytes(digest), pair.id, pair)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        elif entry[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, entry)

    def pairs(self) -> list[Preference]:
        """The sample, in an order of its own."""
        return [pair for *_, pair in sorted(self._heap, key=lambda entry: entry[:2])]

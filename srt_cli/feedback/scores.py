"""The expected score: the sum of p(s) * s over the scores that a critic might have written.

An integer score hides how sure the critic is; two answers scored 7 tie, although one was nearly an 8.
(RLAIF, arXiv 2309.00267, takes the expectation instead.) The log-probabilities beside the score's
own tokens tell. In many tokenizers 10 is two tokens, 1 and 0, so the likelihood of a first 1 belongs
to 1 and to 10; which share goes where stands at the place behind a 1, if one was written.
"""

import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from srt_cli.calls.conduct import Call
from srt_cli.models import VERDICTS, Model, Reply, Request, Thinks, TokenLogprobs
from srt_cli.records import MAX_SCORE, MIN_SCORE, Message, Usage
from srt_cli.templates import score_digits_at, score_of_share, verdicts_at

SCORE_LOGPROBS: Final = 20
"""How many alternatives to a token are asked for where scores are to have an expectation."""
NEGLIGIBLE: Final = 0.005
"""A first 1 less likely than this moves the expectation by less than 0.05."""
_NUMBER: Final = re.compile(r"(?P<digits>\d+)(?P<rest>.*)", re.DOTALL)


@dataclass(frozen=True)
class ScoreBelief:
    """Probabilities of the scores, as far as the tokens tell; they need not add up to 1."""

    scores: Mapping[int, float]
    open_one: float = 0.0
    """Probability of a first 1 of which it is not known whether a 0 would follow."""

    @property
    def is_open(self) -> bool:
        """Whether a look behind the 1 would change the expectation."""
        return self.open_one > NEGLIGIBLE * (sum(self.scores.values()) + self.open_one)

    def resolve(self, zero_follows: float) -> "ScoreBelief":
        """Share a first 1 between 1 and 10."""
        scores = dict(self.scores)
        scores[1] = scores.get(1, 0.0) + self.open_one * (1 - zero_follows)
        scores[10] = scores.get(10, 0.0) + self.open_one * zero_follows
        return ScoreBelief(scores)

    @property
    def mean(self) -> float | None:
        """The expected score; None where it is not known well enough."""
        total = sum(self.scores.values())
        if self.is_open or total <= 0:
            return None
        return sum(score * share for score, share in self.scores.items()) / total


def read_belief(text: str, digits_at: int, logprobs: Sequence[TokenLogprobs]) -> ScoreBelief | None:
    """What a critic believed where the digits of its score begin; None without log-probabilities.

    `digits_at` counts characters of the reply, as the log-probabilities' offsets do.
    """
    for place, following in zip(logprobs, [*logprobs[1:], None], strict=False):
        if place.offset is None or not place.top:
            continue
        if not place.offset <= digits_at < place.offset + len(place.token):
            continue
        if text[place.offset : place.offset + len(place.token)] != place.token:
            return None
        belief = _first_place(place, digits_at - place.offset)
        next_at = place.offset + len(place.token)
        wrote_one = text[digits_at:next_at] == "1"
        if wrote_one and following is not None and following.offset == next_at:
            return belief.resolve(zero_share(following.top))
        return belief
    return None


def _first_place(place: TokenLogprobs, lead: int) -> ScoreBelief:
    """Scores by the tokens that might stand at a score's first digit."""
    prefix = place.token[:lead]
    scores: dict[int, float] = {}
    open_one = 0.0
    knows_ten = False
    for token, logprob in place.top.items():
        number = _NUMBER.fullmatch(token[lead:]) if token.startswith(prefix) else None
        if number is None:
            continue
        score, share = int(number["digits"]), math.exp(logprob)
        knows_ten |= score == MAX_SCORE
        if number["digits"] == "1" and not number["rest"]:
            open_one += share
        elif MIN_SCORE <= score <= MAX_SCORE:
            scores[score] = scores.get(score, 0.0) + share
    belief = ScoreBelief(scores, open_one)
    # Where 10 is a token of its own, a 1 is a 1.
    return belief.resolve(0.0) if knows_ten else belief


def zero_share(top: Mapping[str, float]) -> float:
    """Probability that a 0 stands at the place behind a 1."""
    total = sum(math.exp(logprob) for logprob in top.values())
    zeros = sum(math.exp(logprob) for token, logprob in top.items() if token.startswith("0"))
    return zeros / total if total > 0 else 0.0


def expected_checklist_score(reply: Reply, weaknesses: str) -> float | None:
    """The score of a checklist by the mean of P(yes) against P(no) over its items.

    None where the log-probabilities of a verdict are not known.
    """
    begun = {place.offset: place for place in reply.logprobs or () if place.offset is not None}
    at_verdicts = []
    for verdict_at in verdicts_at(reply.text, weaknesses):
        # Most tokens of a verdict begin with the space before it.
        place = begun.get(verdict_at - 1) or begun.get(verdict_at)
        if place is None:
            return None
        yes, no = (
            sum(
                math.exp(logprob)
                for token, logprob in place.top.items()
                if token.strip().lower() == word
            )
            for word in VERDICTS
        )
        if yes + no <= 0:
            return None
        at_verdicts.append(yes / (yes + no))
    return score_of_share(sum(at_verdicts) / len(at_verdicts)) if at_verdicts else None


@dataclass(frozen=True)
class Scoring:
    """A question to a critic, and the reply in which it gave a score."""

    model: Model
    asked: Sequence[Message]
    reply: Reply
    score: float
    name: str
    thinks: Thinks = Thinks()


def expected_score(scoring: Scoring) -> Generator[Call, Reply, tuple[float | None, Usage]]:
    """The expectation of one score, and what it cost to look behind a likely 1 not written.

    None without log-probabilities.
    """
    reply = scoring.reply
    if not reply.logprobs or not float(scoring.score).is_integer():
        return None, Usage()
    digits_at = score_digits_at(reply.text, scoring.score)
    if digits_at is None:
        return None, Usage()
    belief = read_belief(reply.text, digits_at, reply.logprobs)
    looks = scoring.model.continues and not reply.thoughts
    if belief is None or not belief.is_open or not looks:
        return (belief.mean if belief is not None else None), Usage()
    begun = Message(role="assistant", content=reply.text[:digits_at] + "1")
    request = Request(
        (*scoring.asked, begun), max_tokens=1, top_logprobs=SCORE_LOGPROBS, continues=True,
        thinks=scoring.thinks,
    )  # fmt: skip
    look = yield Call(scoring.model, request, f"{scoring.name}, behind a 1")
    if not look.logprobs:
        return None, look.usage
    return belief.resolve(zero_share(look.logprobs[0].top)).mean, look.usage

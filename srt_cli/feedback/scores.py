"""One answer's score as a critic believes it: the expectation of one judgement, the mean of several."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from srt_cli.calls.conduct import Call
from srt_cli.feedback.expected_score import TOP_LOGPROBS, read_belief, zero_share
from srt_cli.models import Reply, Request
from srt_cli.records import Message, Prompt, Usage
from srt_cli.templates import ParsedCritique, parse_critique, score_digits_at

if TYPE_CHECKING:
    from srt_cli.feedback.story import Critic

SAMPLE_TEMPERATURE: Final = 0.7
"""Of the judgements after the first: at temperature 0 they would all be the same."""


@dataclass(frozen=True)
class Judged:
    """An answer's mean score over one or several judgements, and what they cost beside the first."""

    mean: float | None
    raw: dict[str, str]
    usage: Usage


def mean_score(
    critic: "Critic",
    prompt: Prompt,
    text: str,
    asked: Sequence[Message],
    first: tuple[Reply, ParsedCritique],
    name: str,
) -> Generator[Call, Reply, Judged]:
    """What the critic believes of an answer that it has judged once already, `asked` so.

    With `--score-samples N`, N - 1 more judgements are drawn, blind, and averaged with the first;
    one that cannot be read does not count. Null when one judgement is all there is, and it came
    without log-probabilities.
    """
    reply, parsed = first
    raw: dict[str, str] = {}
    usage = Usage()
    if parsed.score is None:
        return Judged(None, raw, usage)
    expected, cost = yield from _expected_score(critic, asked, reply, parsed.score, name)
    usage += cost
    if critic.score_samples == 1:
        return Judged(expected, raw, usage)
    means = [parsed.score if expected is None else expected]
    for number in range(1, critic.score_samples):
        again = f"{name}, sample {number + 1}"
        drawn = yield critic.call("score", prompt, text, again, sample=number)
        raw[f"sample {number + 1}"] = drawn.text
        usage += drawn.usage
        score = parse_critique(drawn.text, expect_refinement=False).score
        if drawn.finish_reason != "stop" or score is None:
            continue
        asked = critic.messages(prompt, text)
        expected, cost = yield from _expected_score(critic, asked, drawn, score, again)
        usage += cost
        means.append(score if expected is None else expected)
    return Judged(sum(means) / len(means), raw, usage)


def _expected_score(
    critic: "Critic", asked: Sequence[Message], reply: Reply, score: float, name: str
) -> Generator[Call, Reply, tuple[float | None, Usage]]:
    """The expectation of one judgement; looks behind a likely 1 that was not written."""
    digits_at = score_digits_at(reply.text, score)
    if digits_at is None or not reply.logprobs or not float(score).is_integer():
        return None, Usage()
    belief = read_belief(reply.text, digits_at, reply.logprobs)
    if belief is None or not belief.is_open or not critic.model.continues:
        return (belief.mean if belief is not None else None), Usage()
    begun = Message(role="assistant", content=reply.text[:digits_at] + "1")
    look = yield Call(
        critic.model,
        Request(
            (*asked, begun),
            max_tokens=1,
            top_logprobs=TOP_LOGPROBS,
            continues=True,
        ),
        f"{name}, behind a 1",
    )
    if not look.logprobs:
        return None, look.usage
    return belief.resolve(zero_share(look.logprobs[0].top)).mean, look.usage

"""respond -> critique -> blind score: the pass that both feedback stages share.

One row's story is one generator (`critique_row`); `calls.conduct` runs many of them side by side.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from srt_cli.calls.conduct import Call
from srt_cli.feedback.expected_score import TOP_LOGPROBS
from srt_cli.feedback.scores import SAMPLE_TEMPERATURE, mean_score
from srt_cli.feedback.summary import Verdict
from srt_cli.models import Model, Reply, Request, Task, TaskKind
from srt_cli.records import (
    Feedback,
    FeedbackRecord,
    Message,
    Prompt,
    Status,
    Usage,
)
from srt_cli.templates import (
    IMPROVED_HEADING,
    ParsedCritique,
    critic_messages,
    parse_critique,
    parse_preference,
    reask_messages,
    self_critique_messages,
)

BLIND_SCORE_STOP: Final = (IMPROVED_HEADING,)
CriticKind = Literal["critique", "score"]
Step = Literal["critique", "draft score", "score"]
"""What is asked of a critic in a row's story; also the name under which its reply is kept."""
CALL_NAMES: Final[dict[Step, str]] = {
    "critique": "critique", "draft score": "blind score of the draft", "score": "blind score",
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How a model is asked to write."""

    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Critic:
    """A critic and its way of being asked: Table 1, or in the policy's own conversation."""

    model: Model
    sampling: Sampling
    in_conversation: bool
    max_reasks: int = 0
    """How often a reply that cannot be read is asked for again."""
    longer_once: bool = False
    """Whether a reply that was cut off gets one more try with twice the room."""
    expects: bool = False
    """Whether log-probabilities are asked for, so that scores have an expectation."""
    score_samples: int = 1
    """How many judgements of one answer are averaged."""

    def messages(self, prompt: Prompt, response: str) -> list[Message]:
        """The chat that asks for feedback on one response."""
        ask = self_critique_messages if self.in_conversation else critic_messages
        return ask(prompt, response)

    def call(
        self,
        kind: TaskKind,
        prompt: Prompt,
        response: str,
        name: str,
        *,
        messages: Sequence[Message] | None = None,
        room: int = 1,
        sample: int = 0,
    ) -> Call:
        """Ask for feedback and refinement (`critique`), or for feedback alone (`score`).

        `messages` replaces the usual question, `room` multiplies the token limit, and a `sample`
        after the first is drawn at a temperature.
        """
        sampling = self.sampling
        if sample:
            sampling = replace(sampling, temperature=SAMPLE_TEMPERATURE)
        if room != 1:
            sampling = replace(sampling, max_new_tokens=room * sampling.max_new_tokens)
        request = _request(
            messages if messages is not None else self.messages(prompt, response),
            sampling,
            Task(kind, prompt, (response,)),
            stop=BLIND_SCORE_STOP if kind == "score" else (),
            sample=sample,
        )
        if self.expects and self.model.gives_logprobs:
            request = replace(request, top_logprobs=TOP_LOGPROBS, logprobs_at="digits")
        return Call(self.model, request, name)


def respond_call(policy: Model, sampling: Sampling, prompt: Prompt, sample: int) -> Call:
    """Ask the policy for a draft."""
    request = _request(prompt.messages, sampling, Task("respond", prompt), sample=sample)
    return Call(policy, request, f"{prompt.id}/{sample} response")


def _request(
    messages: Iterable[Message],
    sampling: Sampling,
    task: Task,
    *,
    stop: tuple[str, ...] = (),
    sample: int = 0,
) -> Request:
    return Request(
        messages=tuple(messages),
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=stop,
        sample=sample,
        task=task,
    )


@dataclass
class _Story:
    """What is known of one row so far; turns into its record whatever happens."""

    prompt: Prompt
    policy: str
    critic: str
    sample: int
    round: int
    response: str | None = None
    feedback: Feedback | None = None
    refinement: str | None = None
    refinement_score: float | None = None
    refinement_score_mean: float | None = None
    refinement_feedback: Feedback | None = None
    status: Status = "ok"
    reason: str | None = None
    raw: dict[str, str] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    def hear(self, what: str, reply: Reply) -> bool:
        """Take in a reply; false when it is no usable text, with the status saying why."""
        self.raw[what] = reply.text
        self.usage = self.usage + reply.usage
        if reply.status != "ok":
            return self.end(reply.status, f"{what}: {reply.reason}")
        return True

    def set_aside(self, what: str, reply: Reply | None) -> None:
        """Keep an unusable reply under another name: the one given, or the one heard last."""
        if reply is not None:
            self.raw[what] = reply.text
            self.usage = self.usage + reply.usage
        else:
            self.raw[what] = self.raw.pop(what.partition(" unread")[0])

    def end(self, status: Status, reason: str) -> bool:
        """The story ends early."""
        self.status, self.reason = status, reason
        return False

    def record(self) -> FeedbackRecord:
        """The line this row becomes."""
        return FeedbackRecord(
            id=self.prompt.id,
            prompt=self.prompt.prompt,
            response=self.response,
            feedback=self.feedback,
            refinement=self.refinement,
            refinement_score=self.refinement_score,
            refinement_score_mean=self.refinement_score_mean,
            refinement_feedback=self.refinement_feedback,
            status=self.status,
            reason=self.reason,
            raw=self.raw,
            policy=self.policy,
            critic=self.critic,
            sample=self.sample,
            round=self.round,
            usage=self.usage,
        )


def critique_row(
    prompt: Prompt,
    policy: tuple[Model, Sampling] | None,
    critic: Critic,
    *,
    scorer: Critic | None = None,
    sample: int = 0,
    rounds: int = 1,
    stop_when_worse: bool = False,
) -> Generator[Call, Reply, list[FeedbackRecord]]:
    """One prompt from draft to blind score; one record a round, each refining the last.

    Without a policy the prompt's own response is the draft. With a `scorer`, every score is its, and
    the critic writes feedback and refinement alone. A round that does not end `ok` ends the row:
    there is nothing to refine further.
    """
    policy_spec = policy[0].spec if policy is not None and prompt.response is None else "given"
    critic_spec = (scorer or critic).model.spec
    story = _Story(prompt, policy_spec, critic_spec, sample, round=1)
    if prompt.response is not None:
        story.response = prompt.response
    else:
        assert policy is not None
        reply = yield respond_call(*policy, prompt, sample)
        # A draft cut at the limit is still a draft to criticise; what is missing is a weakness.
        if not story.hear("response", reply) and not reply.is_beginning:
            return [story.record()]
        story.status, story.reason, story.response = "ok", None, reply.text.strip()

    records = []
    for round_number in range(1, rounds + 1):
        yield from _critique_and_refine(story, critic, scorer)
        records.append(story.record())
        if story.status != "ok" or (stop_when_worse and is_worse(records[-1])):
            break
        story = _Story(prompt, policy_spec, critic_spec, sample, round_number + 1, story.refinement)
    return records


def is_worse(record: FeedbackRecord) -> bool:
    """Whether the refinement is scored lower than its draft: by belief where known, else by score."""
    assert record.feedback is not None
    before, after = record.feedback.score_mean, record.refinement_score_mean
    if before is not None and after is not None:
        return after < before
    return record.gain is not None and record.gain < 0


def _critique_and_refine(
    story: _Story, critic: Critic, scorer: Critic | None
) -> Generator[Call, Reply, None]:
    assert story.response is not None
    written = yield from _ask_critic(story, critic, "critique", story.response)
    if written is None:
        return
    parsed, mean = written
    story.feedback = parsed.feedback
    if parsed.problems:
        story.end("unparsed", "critique: " + ", ".join(parsed.problems))
        return
    story.refinement = parsed.refinement
    assert story.feedback is not None
    assert story.refinement is not None
    if scorer is not None:
        scored = yield from _ask_critic(story, scorer, "draft score", story.response)
        if scored is None or scored[0].score is None:
            if scored is not None:
                story.end("unparsed", "draft score: " + ", ".join(scored[0].problems))
            return
        mean = scored[1]
        story.feedback = story.feedback.model_copy(update={"score": scored[0].score})
    story.feedback = story.feedback.model_copy(update={"score_mean": mean})

    # The paper's precaution: a critic that has seen its own feedback scores the refinement higher.
    judged = yield from _ask_critic(story, scorer or critic, "score", story.refinement)
    if judged is None:
        return
    blind, story.refinement_score_mean = judged
    story.refinement_score, story.refinement_feedback = blind.score, blind.feedback
    if blind.feedback is not None:
        expected = {"score_mean": story.refinement_score_mean}
        story.refinement_feedback = blind.feedback.model_copy(update=expected)
    if blind.score is None:
        story.end("unparsed", "score: " + ", ".join(blind.problems))


def _ask_critic(
    story: _Story, critic: Critic, step: Step, text: str
) -> Generator[Call, Reply, tuple[ParsedCritique, float | None] | None]:
    """One judgement of one text, and its mean score; null when no reply could be read as one.

    A reply that was cut off gets more room once, one that lacks a part is asked for again with the
    parser's complaint. Every reply is kept in `raw`.
    """
    whole = step == "critique"
    kind: CriticKind = "critique" if whole else "score"
    name = f"{story.prompt.id}/{story.sample} round {story.round} {CALL_NAMES[step]}"
    messages = critic.messages(story.prompt, text)
    room = 1
    reply = yield critic.call(kind, story.prompt, text, name, messages=messages)
    if reply.finish_reason == "length" and critic.longer_once:
        story.set_aside(f"{step} cut off", reply)
        room = 2
        reply = yield critic.call(
            kind, story.prompt, text, f"{name}, longer", messages=messages, room=room
        )
    for attempt in range(critic.max_reasks + 1):
        usable = story.hear(step, reply)
        parsed = parse_critique(reply.text, expect_refinement=whole)
        unread = bool(parsed.problems) if whole else parsed.score is None
        if not usable or not unread or attempt == critic.max_reasks:
            break
        story.set_aside(f"{step} unread {attempt + 1}", None)
        messages = reask_messages(messages, reply.text, parsed.problems, expect_refinement=whole)
        asked_again = f"{name}, asked again {attempt + 1}"
        reply = yield critic.call(
            kind, story.prompt, text, asked_again, messages=messages, room=room
        )
    if not usable:
        story.feedback = parsed.feedback if whole else story.feedback
        return None
    if unread:
        return parsed, None
    judged = yield from mean_score(critic, story.prompt, text, messages, (reply, parsed), name)
    story.raw |= {f"{step} {what}": said for what, said in judged.raw.items()}
    story.usage = story.usage + judged.usage
    return parsed, judged.mean


def blind_score(
    critic: Critic, prompt: Prompt, text: str, name: str
) -> Generator[Call, Reply, float | None]:
    """One score of one text, asked once; null when no whole reply came or it holds no score."""
    reply = yield critic.call("score", prompt, text, name)
    parsed = parse_critique(reply.text, expect_refinement=False)
    return parsed.score if reply.finish_reason == "stop" else None


@dataclass(frozen=True)
class Check:
    """A program that knows good answers, and the score from which the critic calls one good."""

    model: Model
    good_score: float


@dataclass(frozen=True)
class CheckedRow:
    """One prompt's records, with the check's verdict on each draft and refinement, if asked."""

    records: list[FeedbackRecord]
    verdicts: list[Verdict]


def checked_row(
    prompt: Prompt,
    story: Generator[Call, Reply, list[FeedbackRecord]],
    check: Check | None,
) -> Generator[Call, Reply, CheckedRow]:
    """A row's story, then the check's word on each answer that got a score."""
    records = yield from story
    verdicts: list[Verdict] = []
    if check is None:
        return CheckedRow(records, [])
    for record in records:
        scored = [(record.response, record.feedback.score if record.feedback else None, False)]
        scored.append((record.refinement, record.refinement_score, True))
        for text, score, refined in scored:
            if text is None or score is None:
                continue
            task = Task("check", prompt, (text,))
            reply = yield Call(check.model, Request((), 0, task=task), f"{prompt.id} check")
            truth = parse_preference(reply.text)
            if truth is not None:
                verdicts.append(Verdict(refined, score >= check.good_score, truth == 1))
    return CheckedRow(records, verdicts)

"""respond -> critique -> blind score: the pass that both feedback stages share.

One row's story is one generator (`critique_row`); `calls.conduct` runs many of them side by side.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from srt_cli.calls import Call
from srt_cli.critique_summary import Verdict
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
CALL_NAMES: Final[dict[CriticKind, str]] = {"critique": "critique", "score": "blind score"}


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
    ) -> Call:
        """Ask for feedback and refinement (`critique`), or for feedback alone (`score`).

        `messages` replaces the usual question, `room` multiplies the token limit.
        """
        sampling = self.sampling
        if room != 1:
            sampling = replace(sampling, max_new_tokens=room * sampling.max_new_tokens)
        request = _request(
            messages if messages is not None else self.messages(prompt, response),
            sampling,
            Task(kind, prompt, (response,)),
            stop=BLIND_SCORE_STOP if kind == "score" else (),
        )
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
    refinement_feedback: Feedback | None = None
    status: Status = "ok"
    reason: str | None = None
    raw: dict[str, str] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    def hear(self, what: str, reply: Reply) -> bool:
        """Take in a reply; false when it is no usable text, with the status saying why."""
        self.raw[what] = reply.text
        self.usage = self.usage + reply.usage
        if reply.finish_reason == "failed":
            return self.end("failed", f"{what}: {reply.error}")
        if reply.finish_reason == "refused":
            return self.end("refused", f"{what}: refused by the model or a content filter")
        if reply.finish_reason == "length":
            return self.end("truncated", f"{what}: cut off at the token limit")
        if not reply.text.strip():
            return self.end("unparsed", f"{what}: empty reply")
        return True

    def set_aside(self, what: str, reply: Reply | None) -> None:
        """Keep an unusable reply under another name: the one given, or the one heard last."""
        if reply is not None:
            self.raw[what] = reply.text
            self.usage = self.usage + reply.usage
        else:
            self.raw[what] = self.raw.pop(what.split()[0])

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
    sample: int = 0,
    rounds: int = 1,
) -> Generator[Call, Reply, list[FeedbackRecord]]:
    """One prompt from draft to blind score; one record a round, each refining the last.

    Without a policy the prompt's own response is the draft. A round that does not end `ok` ends
    the row: there is nothing to refine further.
    """
    policy_spec = policy[0].spec if policy is not None and prompt.response is None else "given"
    story = _Story(prompt, policy_spec, critic.model.spec, sample, round=1)
    if prompt.response is not None:
        story.response = prompt.response
    else:
        assert policy is not None
        reply = yield respond_call(*policy, prompt, sample)
        # A draft cut at the limit is still a draft to criticise; what is missing is a weakness.
        if not story.hear("response", reply) and story.status != "truncated":
            return [story.record()]
        story.status, story.reason, story.response = "ok", None, reply.text.strip()

    records = []
    for round_number in range(1, rounds + 1):
        yield from _critique_and_refine(story, critic)
        records.append(story.record())
        if story.status != "ok":
            break
        story = _Story(
            prompt, policy_spec, critic.model.spec, sample, round_number + 1, story.refinement
        )
    return records


def _critique_and_refine(story: _Story, critic: Critic) -> Generator[Call, Reply, None]:
    assert story.response is not None
    parsed = yield from _ask_critic(story, critic, "critique", story.response)
    if parsed is None:
        return
    story.feedback = parsed.feedback
    if parsed.problems:
        story.end("unparsed", "critique: " + ", ".join(parsed.problems))
        return
    story.refinement = parsed.refinement
    assert story.refinement is not None

    # The paper's precaution: a critic that has seen its own feedback scores the refinement higher.
    blind = yield from _ask_critic(story, critic, "score", story.refinement)
    if blind is None:
        return
    story.refinement_score, story.refinement_feedback = blind.score, blind.feedback
    if blind.score is None:
        story.end("unparsed", "score: " + ", ".join(blind.problems))


def _ask_critic(
    story: _Story, critic: Critic, kind: CriticKind, text: str
) -> Generator[Call, Reply, ParsedCritique | None]:
    """One judgement of one text; null when no reply came that could be read as one.

    A reply that was cut off gets more room once, one that lacks a part is asked for again with the
    parser's complaint. Every reply is kept in `raw`.
    """
    whole = kind == "critique"
    name = f"{story.prompt.id}/{story.sample} round {story.round} {CALL_NAMES[kind]}"
    messages = critic.messages(story.prompt, text)
    room = 1
    reply = yield critic.call(kind, story.prompt, text, name, messages=messages)
    if reply.finish_reason == "length" and critic.longer_once:
        story.set_aside(f"{kind} cut off", reply)
        room = 2
        reply = yield critic.call(
            kind, story.prompt, text, f"{name}, longer", messages=messages, room=room
        )
    for attempt in range(critic.max_reasks + 1):
        usable = story.hear(kind, reply)
        parsed = parse_critique(reply.text, expect_refinement=whole)
        unread = bool(parsed.problems) if whole else parsed.score is None
        if not usable or not unread or attempt == critic.max_reasks:
            break
        story.set_aside(f"{kind} unread {attempt + 1}", None)
        messages = reask_messages(messages, reply.text, parsed.problems, expect_refinement=whole)
        asked_again = f"{name}, asked again {attempt + 1}"
        reply = yield critic.call(
            kind, story.prompt, text, asked_again, messages=messages, room=room
        )
    if not usable and whole:
        story.feedback = parsed.feedback
    return parsed if usable else None


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

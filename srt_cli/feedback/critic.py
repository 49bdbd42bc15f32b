"""A critic: how it is asked, and what it says of one text. The one blind score stands here.

An external critic gets the paper's Table 1 in one message; a model that was trained on feedback is
asked in its own conversation, the way it was trained.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from srt_cli.calls.conduct import Call
from srt_cli.feedback.scores import (
    SCORE_LOGPROBS,
    Scoring,
    expected_checklist_score,
    expected_score,
)
from srt_cli.models import Model, Reply, Request, Task, Thinks, parse_spec
from srt_cli.records import Feedback, Message, Prompt, Status, Usage
from srt_cli.templates import (
    IMPROVED_HEADING,
    LETTER_REQUIREMENTS,
    LETTERS,
    ParsedCritique,
    checklist_messages,
    critic_messages,
    judge_messages,
    parse_checklist,
    parse_critique,
    parse_preference,
    parse_refinement,
    read_letter,
    reask_messages,
    refine_messages,
    render_feedback,
    self_critique_messages,
)

BLIND_SCORE_STOP: Final = (IMPROVED_HEADING,)
SAMPLE_TEMPERATURE: Final = 0.7
"""Of the judgements after the first: at temperature 0 they would all be the same."""


OutsidePrompt = Literal["table-1", "checklist"]
CriticPrompt = Literal["auto", "conversation", OutsidePrompt]
ScoredBy = Literal["written", "checklist"]
"""Where a trained model's scores come from: the number it writes, or its checklist's verdicts."""
LETTER_LOGPROBS: Final = 20
"""How many alternatives to the letter are asked for: the most that OpenAI's API tells."""
LEAST_SHARE: Final = 0.5
"""Of the probability, what the letters must hold; with less, their odds are not the judge's word."""


def asked_in_conversation(prompt: CriticPrompt, spec: str) -> bool:
    """How a critic is asked: in conversation, or (False) in one message, by Table 1 or a checklist.

    `auto` means for every command: in conversation what runs in process, as `srt` trains it; by
    Table 1 what answers on a server.
    """
    return parse_spec(spec).in_process if prompt == "auto" else prompt == "conversation"


def scores_by_checklist(in_conversation: bool, score: ScoredBy, prompt: CriticPrompt) -> bool:
    """Whether a critic is read item by item: as it was trained, or as it is asked in one message."""
    return (score if in_conversation else prompt) == "checklist"


@dataclass(frozen=True)
class Sampling:
    """How a model is asked to write."""

    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int = 0
    thinks: Thinks = Thinks()

    def request(self, messages: Iterable[Message], task: Task, sample: int = 0) -> Request:
        """The call that asks so; a blind score stops before it would write an improved response."""
        return Request(
            messages=tuple(messages),
            max_tokens=self.max_new_tokens + self.thinks.tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=BLIND_SCORE_STOP if task.kind == "score" else (),
            sample=sample,
            thinks=self.thinks,
            task=task,
        )


@dataclass(frozen=True)
class Question:
    """What a critic is asked: feedback and refinement (`critique`), or feedback alone (`score`)."""

    kind: Literal["critique", "score"]
    prompt: Prompt
    text: str
    name: str = ""
    """For people who read the journal."""


@dataclass(frozen=True)
class Critic:
    """A critic and its way of being asked."""

    model: Model
    sampling: Sampling
    in_conversation: bool
    by_checklist: bool = False
    """Whether its feedback is a checklist, and the score is the share of items that are met."""
    max_reasks: int = 0
    """How often a reply that cannot be read is asked for again."""
    longer_once: bool = False
    """Whether a reply that was cut off gets one more try with twice the room."""
    expects: bool = False
    """Whether log-probabilities are asked for, so that scores have an expectation."""
    score_samples: int = 1
    """How many judgements of one text are averaged."""

    def messages(self, question: Question) -> list[Message]:
        """The chat that asks for feedback on one text."""
        if self.in_conversation:
            return self_critique_messages(question.prompt, question.text)
        ask = checklist_messages if self.reads_items else critic_messages
        return ask(question.prompt, question.text)

    @property
    def reads_items(self) -> bool:
        """Whether scores come from the items of a checklist; a program's feedback has its own."""
        return self.by_checklist and not self.model.is_program

    def read(self, text: str, *, whole: bool) -> ParsedCritique:
        """What its reply holds; a `whole` one has an improved response too.

        A model in its own conversation writes a checklist as its weaknesses; the number below, which
        it was trained to write too, does not count.
        """
        if self.reads_items and not self.in_conversation:
            return parse_checklist(text, expect_refinement=whole)
        return parse_critique(text, expect_refinement=whole, by_verdicts=self.reads_items)

    def call(
        self, question: Question, messages: Sequence[Message], room: int = 1, sample: int = 0
    ) -> Call:
        """One try: `room` multiplies the token limit; a `sample` after the first is drawn warm."""
        sampling = replace(self.sampling, max_new_tokens=room * self.sampling.max_new_tokens)
        if sample:
            sampling = replace(sampling, temperature=SAMPLE_TEMPERATURE)
        task = Task(question.kind, question.prompt, (question.text,))
        request = sampling.request(messages, task, sample)
        if self.expects and self.model.gives_logprobs:
            places: Literal["digits", "verdicts"] = "verdicts" if self.reads_items else "digits"
            request = replace(request, top_logprobs=SCORE_LOGPROBS, logprobs_at=places)
        return Call(self.model, request, question.name)


@dataclass
class Replies:
    """Every reply to one question: the one that counts under "", others by what became of them."""

    raw: dict[str, str] = field(default_factory=dict)
    thoughts: dict[str, str] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    def keep(self, name: str, reply: Reply) -> None:
        """Keep one under a name."""
        self.raw[name] = reply.text
        if reply.thoughts:
            self.thoughts[name] = reply.thoughts
        self.usage += reply.usage


@dataclass(frozen=True)
class Criticism:
    """What a critic said of one text, after every try."""

    parsed: ParsedCritique
    status: Status
    reason: str | None
    """Why the status is not `ok`; None when it is."""
    replies: "Replies"
    mean: float | None = None
    """The expected score; None where log-probabilities are not known, or it was not asked for."""

    @property
    def score(self) -> float | None:
        """The score, if a whole reply holds one."""
        return self.parsed.score if self.status == "ok" else None


def blind_score(
    critic: Critic, prompt: Prompt, text: str, name: str
) -> Generator[Call, Reply, Criticism]:
    """Score one text by a call that knows of no feedback on it (paper, section 3.1.1)."""
    return (yield from criticise(critic, Question("score", prompt, text, name)))


def criticise(critic: Critic, question: Question) -> Generator[Call, Reply, Criticism]:
    """One judgement of one text.

    A reply that was cut off gets more room once, one that lacks a part is asked for again with the
    parser's complaint.
    """
    whole = question.kind == "critique"
    replies = Replies()
    messages, room = critic.messages(question), 1
    reply = yield critic.call(question, messages)
    if reply.at_limit and critic.longer_once:
        replies.keep("cut off", reply)
        room = 2
        reply = yield critic.call(_named(question, "longer"), messages, room)
    for attempt in range(1, critic.max_reasks + 2):
        parsed = critic.read(reply.text, whole=whole)
        unread = bool(parsed.problems) if whole else parsed.score is None
        if reply.status != "ok" or not unread or attempt > critic.max_reasks:
            break
        replies.keep(f"unread {attempt}", reply)
        messages = reask_messages(
            messages, reply.text, parsed.problems,
            expect_refinement=whole, by_checklist=critic.by_checklist,
        )  # fmt: skip
        reply = yield critic.call(_named(question, f"asked again {attempt}"), messages, room)
    replies.keep("", reply)
    if reply.status != "ok":
        return Criticism(parsed, reply.status, reply.reason, replies)
    if unread or parsed.score is None:
        told = ", ".join(parsed.problems)
        if critic.model.is_program and {"no weaknesses", "no suggestions"} & {*parsed.problems}:
            told += ' (return "None." for what there is nothing to say of)'
        return Criticism(parsed, "unparsed", told, replies)
    thinks = critic.sampling.thinks
    first = Scoring(critic.model, messages, reply, parsed.score, question.name, thinks)
    mean = yield from _mean_score(critic, question, first, parsed, replies)
    return Criticism(parsed, "ok", None, replies, mean)


def improve(
    critic: Critic, prompt: Prompt, text: str, feedback: Feedback, name: str
) -> Generator[Call, Reply, Criticism]:
    """Have a text improved by feedback that somebody else wrote; its score is not shown.

    The refinement is that of `parsed`. A reply that was cut off gets more room once.
    """
    said = render_feedback(feedback, drop=("score",))
    messages = refine_messages(prompt, text, said)
    task = Task("refine", prompt, (text, said))
    replies = Replies()
    request = critic.sampling.request(messages, task)
    reply = yield Call(critic.model, request, name)
    if reply.at_limit and critic.longer_once:
        replies.keep("cut off", reply)
        longer = replace(critic.sampling, max_new_tokens=2 * critic.sampling.max_new_tokens)
        reply = yield Call(critic.model, longer.request(messages, task), f"{name}, longer")
    replies.keep("", reply)
    refinement = parse_refinement(reply.text)
    parsed = ParsedCritique(None, None, None, refinement, ())
    if reply.status != "ok":
        return Criticism(parsed, reply.status, reply.reason, replies)
    if refinement is None:
        return Criticism(parsed, "unparsed", "no improved response", replies)
    return Criticism(parsed, "ok", None, replies)


def read_critique(text: str) -> ParsedCritique:
    """A critique that somebody wrote elsewhere, in whatever form; without headings, it is one text."""
    parsed = parse_critique(text)
    whole = parsed.weaknesses is not None and parsed.suggestions is not None
    if whole or parsed.refinement is not None:
        return parsed
    return ParsedCritique(text.strip() or None, "", parsed.score, None, ())


def _mean_score(
    critic: Critic, question: Question, first: Scoring, parsed: ParsedCritique, replies: Replies
) -> Generator[Call, Reply, float | None]:
    """The mean of what a critic believes in one or several judgements; its replies are kept.

    With `score_samples` N, N - 1 more are drawn, blind; one that cannot be read does not count.
    None when one judgement is all there is, and it came without log-probabilities.
    """
    expected = yield from _expectation(critic, first, parsed, replies)
    if critic.score_samples == 1:
        return expected
    means = [first.score if expected is None else expected]
    blind = replace(question, kind="score")
    messages = critic.messages(question)
    for sample in range(1, critic.score_samples):
        again = _named(blind, f"sample {sample + 1}")
        reply = yield critic.call(again, messages, sample=sample)
        replies.keep(f"sample {sample + 1}", reply)
        parsed = critic.read(reply.text, whole=False)
        if reply.status != "ok" or parsed.score is None:
            continue
        scoring = Scoring(critic.model, messages, reply, parsed.score, again.name, first.thinks)
        expected = yield from _expectation(critic, scoring, parsed, replies)
        means.append(parsed.score if expected is None else expected)
    return sum(means) / len(means)


def _expectation(
    critic: Critic, scoring: Scoring, parsed: ParsedCritique, replies: Replies
) -> Generator[Call, Reply, float | None]:
    """The expectation of one score, where it stands: at its items' verdicts, or at its digits."""
    if critic.reads_items:
        return expected_checklist_score(scoring.reply, parsed.weaknesses or "")
    expected, cost = yield from expected_score(scoring)
    replies.usage += cost
    return expected


def compare(
    critic: Critic, prompt: Prompt, texts: tuple[str, str], name: str
) -> Generator[Call, Reply, tuple[float, float] | None]:
    """P(the first of two texts is better) when it is shown first, and when it is shown second.

    The odds of one letter, as `srt eval` asks a judge; without log-probabilities the letter itself.
    None where a reply names none.
    """
    found = []
    for shown, order in ((texts, "first"), (texts[::-1], "second")):
        request = Request(
            tuple(judge_messages(prompt, *shown, LETTER_REQUIREMENTS)), max_tokens=1,
            top_logprobs=LETTER_LOGPROBS, thinks=replace(critic.sampling.thinks, tokens=0),
            task=Task("judge", prompt, shown),
        )  # fmt: skip
        reply = yield Call(critic.model, request, f"{name}, shown {order}")
        odds = _odds_of_first(critic.model, reply)
        if odds is None:
            return None
        found.append(odds if order == "first" else 1 - odds)
    return found[0], found[1]


def _odds_of_first(model: Model, reply: Reply) -> float | None:
    if model.is_program:
        return parse_preference(reply.text)
    if reply.logprobs:
        share, odds = read_letter(reply.logprobs[0].top)
        return odds if share >= LEAST_SHARE else None
    return {LETTERS[0]: 1.0, LETTERS[1]: 0.0}.get(reply.text.strip())


def _named(question: Question, which: str) -> Question:
    """The same question at another try."""
    return replace(question, name=f"{question.name}, {which}")

"""The roles, told once: draft, critique, refinement, blind score; for every command.

One row's story is one generator (`tell`); `calls` runs many of them side by side.
"""

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Final, Literal

from srt_cli.calls.conduct import Call
from srt_cli.feedback.critic import (
    Critic,
    Criticism,
    Question,
    Sampling,
    blind_score,
    compare,
    criticise,
    improve,
)
from srt_cli.feedback.written import Critique, WrittenRow
from srt_cli.models import Model, Reply, Request, Task
from srt_cli.reading import part_thoughts
from srt_cli.records import (
    GIVEN,
    PLANTED,
    Feedback,
    FeedbackRecord,
    Message,
    Prompt,
    Status,
    Usage,
)
from srt_cli.stats.hygiene import is_same_text
from srt_cli.templates import contrast_messages, parse_preference

Asked = Literal["critique", "draft score", "refinement", "score"]
"""What is asked of a critic in a row's story; also the name under which its reply is kept."""
CALL_NAMES: Final[dict[Asked, str]] = {
    "critique": "critique", "draft score": "blind score of the draft",
    "refinement": "improved response", "score": "blind score",
}  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """Who writes drafts, and how it is asked."""

    model: Model
    sampling: Sampling

    def call(self, prompt: Prompt, sample: int = 0) -> Call:
        """Ask for a draft."""
        request = self.sampling.request(prompt.messages, Task("respond", prompt), sample)
        return Call(self.model, request, f"{prompt.id}/{sample} response")


@dataclass(frozen=True)
class Contrast:
    """Who plants a fault in a refinement, and from which blind score on a refinement is good."""

    model: Model
    sampling: Sampling
    good_score: float

    def call(self, prompt: Prompt, good: str, sample: int) -> Call:
        """Ask for a good answer with one fault."""
        task = Task("contrast", prompt, (good,))
        request = self.sampling.request(contrast_messages(prompt, good), task)
        return Call(self.model, request, f"{prompt.id}/{sample} contrast")


@dataclass(frozen=True)
class Roles:
    """Who drafts, criticises, refines and scores, and how often."""

    critic: Critic | None
    """None where the critiques are written already."""
    policy: Policy | None = None
    """None where every prompt brings its response."""
    scorer: Critic | None = None
    """Who gives every score, where it is not the critic; of written critiques, those that they lack."""
    refiner: Critic | None = None
    """Who writes the improved responses that written critiques lack."""
    scores: bool = True
    """Whether refinements are scored blind; without, the critic's first score is all there is."""
    rounds: int = 1
    """Refinements in a row, each of the last."""
    stop_when_worse: bool = False
    contrast: Contrast | None = None
    """Who plants a fault in good refinements; None where nobody does."""
    compares: bool = False
    """Whether who scores also says which is better, of refinement and draft, and of the samples."""


@dataclass(frozen=True)
class Draft:
    """The answer with which a row begins: the prompt's own, or what a policy replied."""

    prompt: Prompt
    policy: str
    sample: int
    text: str
    reply: Reply | None = None
    """None for the prompt's own, unless it holds thoughts."""

    @property
    def is_usable(self) -> bool:
        """Whether it can be criticised: one cut at the limit can, what is missing is a weakness."""
        return self.reply is None or self.reply.status == "ok" or self.reply.is_beginning


def write_draft(policy: Policy, prompt: Prompt, sample: int = 0) -> Generator[Call, Reply, Draft]:
    """Have a policy answer a prompt."""
    reply = yield policy.call(prompt, sample)
    return Draft(prompt, policy.model.spec, sample, reply.text.strip(), reply)


def tell(
    roles: Roles, prompt: Prompt, sample: int = 0
) -> Generator[Call, Reply, list[FeedbackRecord]]:
    """One prompt from draft to blind score; a record a round. A given response is the draft.

    With a contrast, a good refinement is followed by a record of the same text with one fault.
    """
    if prompt.response is not None:
        thoughts, answer = part_thoughts(prompt.response)
        given = Reply(answer, "stop", thoughts=thoughts) if thoughts else None
        draft = Draft(prompt, GIVEN, sample, answer.strip() if given else prompt.response, given)
    else:
        assert roles.policy is not None
        draft = yield from write_draft(roles.policy, prompt, sample)
    records = yield from refine(roles, draft)
    return records + (yield from plant_fault(roles, prompt, records[-1]))


def plant_fault(
    roles: Roles, prompt: Prompt, record: FeedbackRecord
) -> Generator[Call, Reply, list[FeedbackRecord]]:
    """A good refinement with one fault, criticised like any draft, so that only the fault differs.

    None where the refinement is not good, or nothing was changed.
    """
    score, good, contrast = record.refinement_score, record.refinement, roles.contrast
    if contrast is None or score is None or good is None or score < contrast.good_score:
        return []
    reply = yield contrast.call(prompt, good, record.sample)
    if reply.status == "ok" and reply.text.strip() == good.strip():
        return []
    # Below 0, so that it is no sample of the policy's.
    fault = Draft(prompt, PLANTED, -1 - record.sample, reply.text.strip(), reply)
    return (yield from refine(replace(roles, rounds=1), fault))


def refine(roles: Roles, draft: Draft) -> Generator[Call, Reply, list[FeedbackRecord]]:
    """Criticise, refine and score a draft; one record a round, each refining the last.

    A round that does not end `ok` ends the row: there is nothing to refine further.
    """
    assert roles.critic is not None
    critic = (roles.scorer or roles.critic).model.spec
    row = _Round(draft.prompt.id, draft.prompt.prompt, draft.policy, critic, draft.sample)
    if draft.reply is not None:
        row.raw, row.usage = {"response": draft.reply.text}, draft.reply.usage
        row.response_cut = draft.reply.at_limit
        if draft.reply.thoughts:
            row.thoughts = {"response": draft.reply.thoughts}
        if not draft.is_usable:
            row.status, row.reason = draft.reply.status, f"response: {draft.reply.reason}"
            return [row.record()]
    text: str | None = draft.text
    records: list[FeedbackRecord] = []
    while text is not None and len(records) < roles.rounds:
        if records:
            row = _Round(row.id, row.prompt, row.policy, critic, row.sample, len(records) + 1)
        row.response = text
        yield from _tell_round(row, roles, draft.prompt)
        records.append(row.record())
        goes_on = row.status == "ok" and not (roles.stop_when_worse and is_worse(records[-1]))
        text = row.refinement if goes_on else None
    return records


def step_that_failed(record: FeedbackRecord) -> str:
    """The name of the call at which a record ended that is not ok; its repeats add to that name."""
    step = (record.reason or "").partition(":")[0]
    if step == "response":
        planted = record.policy == PLANTED
        sample = -1 - record.sample if planted else record.sample
        return f"{record.id}/{sample} {'contrast' if planted else step}"
    return _name_of(record, next(asked for asked in CALL_NAMES if asked == step))


def _name_of(row: "FeedbackRecord | _Round", step: Asked) -> str:
    return f"{row.id}/{row.sample} round {row.round} {CALL_NAMES[step]}"


def is_worse(record: FeedbackRecord) -> bool:
    """Whether the refinement is scored lower than its draft: by belief where known, else by score."""
    assert record.feedback is not None
    before, after = record.feedback.score_mean, record.refinement_score_mean
    if before is not None and after is not None:
        return after < before
    return record.gain is not None and record.gain < 0


@dataclass
class _Round:
    """What is known of one round so far, as its record has it; becomes that whatever happens."""

    id: str
    prompt: str | list[Message]
    policy: str
    critic: str
    sample: int
    round: int = 1
    response: str | None = None
    feedback: Feedback | None = None
    refinement: str | None = None
    refinement_score: float | None = None
    refinement_score_mean: float | None = None
    refinement_feedback: Feedback | None = None
    status: Status = "ok"
    reason: str | None = None
    raw: dict[str, str] = field(default_factory=dict)
    thoughts: dict[str, str] = field(default_factory=dict)
    response_cut: bool = False
    odds: dict[str, tuple[float, float]] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    def name(self, step: Asked) -> str:
        """What a call is for, in words."""
        return _name_of(self, step)

    def hear(self, step: Asked, said: Criticism) -> bool:
        """Take in what a critic said; False when that ends the row."""
        for kept, told in (self.raw, said.replies.raw), (self.thoughts, said.replies.thoughts):
            kept |= {f"{step} {which}".rstrip(): text for which, text in told.items()}
        self.usage += said.replies.usage
        if said.status != "ok":
            self.status, self.reason = said.status, f"{step}: {said.reason}"
        return said.status == "ok"

    def lacks(self, step: Asked, what: str) -> None:
        """Note what a written critique lacks, which ends the row."""
        self.status, self.reason = "unparsed", f"{step}: {what}"

    def record(self) -> FeedbackRecord:
        """The line this round becomes."""
        return FeedbackRecord(**vars(self))


def _tell_round(row: _Round, roles: Roles, prompt: Prompt) -> Generator[Call, Reply, None]:
    """Criticise and refine the row's response, and score the refinement."""
    assert row.response is not None
    assert roles.critic is not None
    question = Question("critique", prompt, row.response, row.name("critique"))
    said = yield from criticise(roles.critic, question)
    row.feedback = said.parsed.feedback
    if not row.hear("critique", said):
        return
    assert row.feedback is not None
    assert said.parsed.refinement is not None
    row.refinement = said.parsed.refinement
    scorer = roles.scorer or roles.critic
    if roles.scorer is not None:
        said = yield from blind_score(scorer, prompt, row.response, row.name("draft score"))
        if not row.hear("draft score", said):
            return
    row.feedback = row.feedback.model_copy(update={"score": said.score, "score_mean": said.mean})
    if roles.scores:
        yield from _score_refinement(row, scorer, prompt)
    if roles.compares and row.status == "ok":
        named = f"{row.id}/{row.sample} round {row.round} comparison"
        odds = yield from _compared(scorer, prompt, (row.refinement, row.response), named)
        row.odds |= {"refinement": odds} if odds else {}


def _score_refinement(row: _Round, scorer: Critic, prompt: Prompt) -> Generator[Call, Reply, None]:
    """The paper's precaution: a critic that has seen its own feedback scores the refinement higher."""
    assert row.refinement is not None
    said = yield from blind_score(scorer, prompt, row.refinement, row.name("score"))
    if not row.hear("score", said):
        return
    row.refinement_score, row.refinement_score_mean = said.score, said.mean
    if said.parsed.feedback is not None:
        expected = {"score_mean": said.mean}
        row.refinement_feedback = said.parsed.feedback.model_copy(update=expected)


def _compared(
    critic: Critic, prompt: Prompt, texts: tuple[str, str], name: str
) -> Generator[Call, Reply, tuple[float, float] | None]:
    """The odds of the first of two texts in both orders; even for equal ones, without a call."""
    if is_same_text(*texts):
        return EVEN
    return (yield from compare(critic, prompt, texts, name))


EVEN: Final = (0.5, 0.5)


@dataclass(frozen=True)
class Check:
    """A program that knows good answers, and the score from which the critic calls one good."""

    model: Model
    good_score: float


@dataclass(frozen=True)
class CheckedAnswer:
    """Whether the critic called an answer good, and whether the check says it is."""

    refined: bool
    says_good: bool
    is_good: bool


@dataclass(frozen=True)
class CheckedRow:
    """One prompt's records, and what the check said of each draft and refinement, if asked."""

    records: list[FeedbackRecord]
    checked: list[CheckedAnswer]


def check_call(model: Model, prompt: Prompt, text: str) -> Call:
    """Ask a program whether an answer is good."""
    task = Task("check", prompt, (text,))
    return Call(model, Request((), 0, task=task), f"{prompt.id} check")


def tell_and_check(
    roles: Roles, check: Check | None, prompt: Prompt, sample: int
) -> Generator[Call, Reply, CheckedRow]:
    """A row's story, then the check's word on each answer that got a score."""
    records = yield from tell(roles, prompt, sample)
    checked: list[CheckedAnswer] = []
    if check is None:
        return CheckedRow(records, checked)
    for place, record in enumerate(records):
        scored = [(record.response, record.feedback.score if record.feedback else None, False)]
        scored.append((record.refinement, record.refinement_score, True))
        for text, score, refined in scored:
            if text is None or score is None:
                continue
            reply = yield check_call(check.model, prompt, text)
            truth = parse_preference(reply.text)
            if truth is not None:
                said = CheckedAnswer(refined, score >= check.good_score, truth == 1)
                checked.append(said)
                passes = {"refinement_passes" if refined else "response_passes": truth}
                records[place] = records[place].model_copy(update=passes)
    return CheckedRow(records, checked)


def tell_and_compare(
    roles: Roles, check: Check | None, prompt: Prompt, samples: int
) -> Generator[Call, Reply, CheckedRow]:
    """The stories of all samples of a prompt, then their drafts against each other."""
    records: list[FeedbackRecord] = []
    checked: list[CheckedAnswer] = []
    for sample in range(samples):
        row = yield from tell_and_check(roles, check, prompt, sample)
        records += row.records
        checked += row.checked
    scorer = roles.scorer or roles.critic
    assert scorer is not None
    drafts = [
        place
        for place, row in enumerate(records)
        if row.round == 1 and row.status == "ok" and row.sample >= 0
    ]
    for one, other in combinations(drafts, 2):
        texts = records[one].response or "", records[other].response or ""
        samples_named = records[one].sample, records[other].sample
        named = f"{prompt.id} samples {samples_named[0]} and {samples_named[1]} compared"
        odds = yield from _compared(scorer, prompt, texts, named)
        if odds is None:
            continue
        # The other is shown second where the one is shown first.
        for place, with_sample, said in (
            (one, samples_named[1], odds),
            (other, samples_named[0], (1 - odds[1], 1 - odds[0])),
        ):
            known = records[place].odds | {f"sample {with_sample}": said}
            records[place] = records[place].model_copy(update={"odds": known})
    return CheckedRow(records, checked)


# --- Critiques that are written already --------------------------------------------------------


def complete(roles: Roles, written: WrittenRow, by: str) -> Generator[Call, Reply, CheckedRow]:
    """One written critique as a record; what it lacks is asked of `refiner` and `scorer`.

    `by` stands for the critic where the critique does not name its own.
    """
    prompt, critique, sample = written
    row = _Round(prompt.id, prompt.prompt, critique.policy, critique.critic or by, sample)
    row.response = prompt.response
    yield from _complete_round(row, roles, prompt, critique)
    return CheckedRow([row.record()], [])


def _complete_round(
    row: _Round, roles: Roles, prompt: Prompt, critique: Critique
) -> Generator[Call, Reply, None]:
    assert row.response is not None
    words = {"weaknesses": critique.weaknesses, "suggestions": critique.suggestions}
    if not any(text and text.strip() for text in words.values()):
        told = 'no weaknesses and no suggestions (write "None." where there is nothing to improve)'
        row.lacks("critique", told)
        return
    if missing := [f"no {name}" for name, text in words.items() if text is None]:
        row.lacks("critique", ", ".join(missing))
        return
    score, mean = critique.score, critique.score_mean
    if score is None and roles.scorer is not None:
        said = yield from blind_score(roles.scorer, prompt, row.response, row.name("draft score"))
        if not row.hear("draft score", said):
            return
        score, mean = said.score, said.mean
    if score is None:
        asked = "no overall score (--critic-for score=SPEC asks for one)"
        row.lacks("critique", critique.problem or asked)
        return
    row.feedback = Feedback.model_validate({**words, "score": score, "score_mean": mean})
    row.refinement = critique.refinement
    if row.refinement is None and roles.refiner is not None:
        name = row.name("refinement")
        said = yield from improve(roles.refiner, prompt, row.response, row.feedback, name)
        if not row.hear("refinement", said):
            return
        row.refinement = said.parsed.refinement
    if row.refinement is None:
        row.lacks("critique", "no improved response (--critic-for refinement=SPEC asks for one)")
        return
    row.refinement_score = critique.refinement_score
    row.refinement_score_mean = critique.refinement_score_mean
    row.refinement_feedback = critique.refinement_feedback
    if row.refinement_score is None and roles.scorer is not None:
        yield from _score_refinement(row, roles.scorer, prompt)
    elif row.refinement_score is None:
        row.lacks("score", "nobody scored the improved response (--critic-for score=SPEC)")

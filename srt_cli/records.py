"""Every line we read or write, as pydantic models: frozen, and strict about unknown fields.

Only `Prompt` keeps extra fields, because a program critic may need them (constraints, unit tests).
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, Field

from srt_cli.forms import FieldNames, RowAsRead, read_row

Role = Literal["system", "user", "assistant"]
Status = Literal["ok", "unparsed", "truncated", "refused", "failed"]
STATUSES: Final[tuple[Status, ...]] = get_args(Status)

MIN_SCORE, MAX_SCORE = 1, 10


def _is_empty(value: object) -> bool:
    return not value


def _is_none(value: object) -> bool:
    return value is None


class Record(BaseModel):
    """One line of a JSONL artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(Record):
    """One turn of a conversation, as chat templates and TRL spell it."""

    role: Role
    content: str


class Usage(Record):
    """Tokens of one or more model calls, as the model's own tokenizer counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
        )


class Prompt(Record):
    """What the policy is asked: one instruction, or the chat so far.

    `response`, if the input row has one, takes the place of the policy's draft.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    id: str
    prompt: str | list[Message]
    response: str | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any], names: FieldNames | None = None) -> Self:
        """Read a row in any form that `srt_cli.forms` knows.

        Raises `ValueError`, with a sentence for the user, when it has none or asks nothing.
        """
        return cls.of(read_row(row, names))

    @classmethod
    def of(cls, read: RowAsRead) -> Self:
        """The prompt of a row; its id is a digest of the prompt where the row gives none."""
        prompt: str | list[Message]
        if isinstance(read.prompt, str):
            prompt = read.prompt
        else:
            prompt = [Message.model_validate(turn) for turn in read.prompt]
        identifier = content_id(prompt) if read.id is None else read.id
        return cls(id=identifier, prompt=prompt, response=read.response, **read.rest)

    @property
    def messages(self) -> list[Message]:
        """The prompt as chat turns; the last one is the user's."""
        return as_messages(self.prompt)

    @property
    def text(self) -> str:
        """The prompt as text: the instruction itself, or a transcript of the turns."""
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1:
            return self.prompt[0].content
        return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in self.prompt)

    @property
    def texts(self) -> list[str]:
        """What others may name the prompt by: its text, and that without its system turn."""
        turns = [turn for turn in self.messages if turn.role != "system"]
        without = self.model_copy(update={"prompt": turns})
        return list(dict.fromkeys([self.text, without.text]))


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """A prompt as chat turns; plain text becomes one user turn."""
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)


def content_id(prompt: str | list[Message]) -> str:
    """A short digest of a prompt: its id when the row gives none."""
    turns = [f"{turn.role}\x1f{turn.content}" for turn in as_messages(prompt)]
    return hashlib.blake2b("\x1e".join(turns).encode(), digest_size=6).hexdigest()


class Feedback(Record):
    """A critic's language feedback on one response (paper, Table 1); the score is 1 to 10.

    `score_mean` is the critic's expected score, the sum of p(s) * s over the scores it might have
    written; None without log-probabilities.
    """

    weaknesses: str
    suggestions: str
    score: float = Field(ge=MIN_SCORE, le=MAX_SCORE)
    score_mean: float | None = Field(default=None, ge=MIN_SCORE, le=MAX_SCORE)


GIVEN: Final = "given"
"""The policy of a record whose response stood in the input."""
PLANTED: Final = "planted"
"""The policy of a record whose response is a refinement with a fault planted in it."""


class FeedbackRecord(Record):
    """A draft, its feedback and its refinement, as collect-feedback and self-critique write them.

    `refinement_score` and `refinement_feedback` come from a second call that never saw the first
    feedback (paper, section 3.1.1). What a bad reply left out is None, and `reason` says why.
    The expected scores (`..._mean`) are optional: older records have none.
    """

    id: str
    prompt: str | list[Message]
    response: str | None
    feedback: Feedback | None
    refinement: str | None
    refinement_score: float | None = Field(ge=MIN_SCORE, le=MAX_SCORE)
    refinement_score_mean: float | None = Field(default=None, ge=MIN_SCORE, le=MAX_SCORE)
    refinement_feedback: Feedback | None
    status: Status
    reason: str | None
    raw: dict[str, str]
    thoughts: dict[str, str] = Field(default_factory=dict, exclude_if=_is_empty)
    """What the models thought, under the names of `raw`; left out where none did."""
    response_cut: bool = Field(default=False, exclude_if=_is_empty)
    """Whether the token limit cut the draft off; left out where not."""
    odds: dict[str, tuple[float, float]] = Field(default_factory=dict, exclude_if=_is_empty)
    """What the critic said when it compared, shown first and shown second: of the refinement against
    the draft (`refinement`), of the draft against that of another sample (`sample 1`)."""
    response_passes: float | None = Field(default=None, ge=0, le=1, exclude_if=_is_none)
    """What a check said of the draft, 1 for a pass; left out where none was asked."""
    refinement_passes: float | None = Field(default=None, ge=0, le=1, exclude_if=_is_none)
    policy: str
    critic: str
    sample: int
    """Which of the policy's drafts; below 0 where the response is no draft but `PLANTED`."""
    round: int
    usage: Usage

    @property
    def at_limit(self) -> bool:
        """Whether the row ends with a reply that the token limit cut off."""
        return self.status == "truncated" and "limit" in (self.reason or "")

    @property
    def gain(self) -> float | None:
        """Blind score of the refinement minus score of the draft; None if either is missing."""
        if self.feedback is None or self.refinement_score is None:
            return None
        return self.refinement_score - self.feedback.score


class Preference(Record):
    """A pair in TRL's conversational form: `chosen` and `rejected` answer `prompt`.

    Scores and source are those of the critic that made the pair; None where others made it.
    """

    id: str
    prompt: list[Message] = Field(min_length=1)
    chosen: list[Message] = Field(min_length=1)
    rejected: list[Message] = Field(min_length=1)
    chosen_score: float | None = None
    rejected_score: float | None = None
    source: str | None = None
    rejected_by: str | None = Field(default=None, exclude_if=_is_empty)
    """The first model, where its answer was taken in place of a draft."""

    @property
    def gain(self) -> float | None:
        """How much higher the chosen answer scores; None where a score is not known."""
        if self.chosen_score is None or self.rejected_score is None:
            return None
        return self.chosen_score - self.rejected_score


class HandLabel(Record):
    """A person's verdict on a pair: digests of the pair and of the better text, None for neither."""

    pair: str = Field(pattern=r"^[0-9a-f]{32}$")
    better: str | None = Field(pattern=r"^[0-9a-f]{32}$")


class Dropped(Record):
    """A row that was dropped from an artifact, and why."""

    id: str
    reason: str
    row: dict[str, Any]


class Entrant(NamedTuple):
    """Who is compared: a contestant, by its answers (`response`) or by what it refines them to."""

    contestant: str
    use: str

    def __str__(self) -> str:
        """As judgments name it on disk."""
        return f"{self.contestant} {self.use}"

    @classmethod
    def read(cls, text: str) -> "Entrant":
        """From its name in a judgment."""
        contestant, _, use = text.rpartition(" ")
        return cls(contestant, use)

    @property
    def kind(self) -> str:
        """`direct` for the first answer, `refined` behind the model's own critique, or more often."""
        if self.use == "response":
            return "direct"
        return "refined" + self.use.removeprefix("refinement").replace("-", " x")


class Judgment(Record):
    """A verdict in one presentation order: `preference` is 1 for `a`, 0 for `b`, None if unread.

    It is about `a` and `b` whichever of them was shown first.
    """

    id: str
    a: str
    b: str
    order: Literal["ab", "ba"]
    preference: float | None = Field(ge=0, le=1)
    verdict: str
    status: Status
    raw: str
    thoughts: str = Field(default="", exclude_if=_is_empty)
    judge: str
    usage: Usage

    @property
    def entrant(self) -> Entrant:
        """Whose output `a` is; `b` is the reference's."""
        return Entrant.read(self.a)


class Scored(Record):
    """A blind score of one output, given by its own model or by another critic (`by`)."""

    id: str
    contestant: str
    use: str = "response"
    by: str
    score: float | None
    status: Status
    raw: str
    thoughts: str = Field(default="", exclude_if=_is_empty)


class Output(Record):
    """A contestant's answer to one prompt of `srt eval`.

    `use` says which of its texts this is; refinement-2 refines the refinement. `parsed` says whether
    the critique behind a refinement could be read; if not, the output is the draft.
    """

    id: str
    contestant: str
    use: str = Field(pattern=r"^(response|refinement(-\d+)?)$")
    response: str
    thoughts: str = Field(default="", exclude_if=_is_empty)
    """What its model thought before it wrote this text."""
    parsed: bool | None = None
    status: Status = "ok"
    passed: bool | float | None = None
    """What the check said; a share where it said one."""
    parts: dict[str, float] = Field(default_factory=dict, exclude_if=_is_empty)
    """What it said of named parts, and what further checks said: 0 to 1 each."""

    @property
    def entrant(self) -> Entrant:
        """Whose output this is."""
        return Entrant(self.contestant, self.use)

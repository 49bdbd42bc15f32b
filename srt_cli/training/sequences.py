"""From records to token ids and labels: which tokens are trained is decided here alone.

A feedback record becomes one conversation (design of the method, paper section 3.1.2):

    user: prompt · assistant: response · user: critique request · assistant: feedback + refinement

Prompt and request never carry loss. Every trained turn ends with the end-of-turn token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from transformers import PreTrainedTokenizerBase

from srt_cli.errors import SrtError
from srt_cli.models.chat import encode_chat, end_of_turn_id
from srt_cli.records import Feedback, FeedbackRecord, Message, Preference, as_messages
from srt_cli.templates import CRITIQUE_REQUEST, FeedbackField, render_feedback, render_refinement
from srt_cli.training.rows import PARTS, Part

IGNORED: Final = -100


@dataclass(frozen=True)
class TokenSequence:
    """One training example: `labels` repeats `input_ids` where a token is trained, else -100."""

    id: str
    input_ids: list[int]
    labels: list[int]
    parts: tuple[tuple[Part, range], ...]
    """Where each part stands, trained or not; an end-of-turn token belongs to what it closes."""

    @property
    def trained(self) -> dict[Part, int]:
        """Trained tokens per part."""
        return {
            part: sum(
                self.labels[place] != IGNORED
                for named, places in self.parts
                if named == part
                for place in places
            )
            for part in PARTS
        }

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the first answer."""
        return self.parts[0][1].start

    def tokens_of(self, part: Part) -> int:
        """Tokens of one part, trained or not."""
        return sum(len(places) for named, places in self.parts if named == part)


def feedback_sequence(
    tokenizer: PreTrainedTokenizerBase,
    record: FeedbackRecord,
    loss_on: Sequence[Part],
    drop: Sequence[FeedbackField] = (),
) -> TokenSequence:
    """The paper's sequence of one record; with all three parts in `loss_on` its loss is Eq. 1.

    `drop` leaves fields of the feedback out of the target (paper, Table 6).
    """
    assert record.response is not None
    assert record.feedback is not None
    assert record.refinement is not None
    told = _Criticised(
        record.id, as_messages(record.prompt), record.response, record.feedback, record.refinement
    )
    return _conversation(tokenizer, told, loss_on, drop)


def refinement_sequence(
    tokenizer: PreTrainedTokenizerBase, record: FeedbackRecord
) -> TokenSequence:
    """Prompt and refinement, as if it were the first answer (paper, Table 6: "Refinement Only")."""
    assert record.refinement is not None
    answer = Message(role="assistant", content=record.refinement.strip())
    messages = [*as_messages(record.prompt), answer]
    return _answers(tokenizer, record.id, messages, [len(messages) - 1], "refinement")


def chat_sequence(
    tokenizer: PreTrainedTokenizerBase, identifier: str, messages: Sequence[Message]
) -> TokenSequence:
    """Other chat data (`--mix`): every assistant turn carries loss."""
    answers = [place for place, turn in enumerate(messages) if turn.role == "assistant"]
    return _answers(tokenizer, identifier, list(messages), answers, "mix")


def _answers(
    tokenizer: PreTrainedTokenizerBase,
    identifier: str,
    messages: list[Message],
    answers: list[int],
    part: Part,
) -> TokenSequence:
    ids = encode_chat(tokenizer, messages, add_generation_prompt=False)
    turns = [_turn(tokenizer, ids, messages[: place + 1]) for place in answers]
    labels = _labels(ids, turns)
    return TokenSequence(identifier, ids, labels, tuple((part, turn) for turn in turns))


def refinement_feedback_sequence(
    tokenizer: PreTrainedTokenizerBase,
    record: FeedbackRecord,
    loss_on: Sequence[Part],
    drop: Sequence[FeedbackField] = (),
) -> TokenSequence:
    """A refinement as the first answer, with its own blind feedback: shows what good looks like.

    Its improved response is the refinement unchanged, so that the reply is complete; this copy
    carries no loss, because a model trained to copy also copies what it has just criticised (in the
    quickstart 68 of 80 times). Not in the paper.
    """
    assert record.refinement is not None
    assert record.refinement_feedback is not None
    told = _Criticised(
        f"{record.id}:refinement",
        as_messages(record.prompt),
        record.refinement,
        record.refinement_feedback,
        record.refinement,
        good=True,
    )
    return _conversation(tokenizer, told, loss_on, drop)


@dataclass(frozen=True)
class _Criticised:
    """An answer with its feedback, as it is put into a conversation."""

    id: str
    prompt: list[Message]
    answer: str
    feedback: Feedback
    improved: str
    good: bool = False
    """Whether the answer is a refinement, and the improved response its copy."""


def _conversation(
    tokenizer: PreTrainedTokenizerBase,
    told: _Criticised,
    loss_on: Sequence[Part],
    drop: Sequence[FeedbackField],
) -> TokenSequence:
    answer: Part = "refinement" if told.good else "response"
    answered = [*told.prompt, Message(role="assistant", content=told.answer.strip())]
    asked = [*answered, Message(role="user", content=CRITIQUE_REQUEST)]
    feedback_text = render_feedback(told.feedback, drop)
    improved = render_refinement("") if feedback_text else render_refinement("").lstrip("\n")
    whole_text = feedback_text + improved + told.improved.strip()
    whole = [*asked, Message(role="assistant", content=whole_text)]
    ids = encode_chat(tokenizer, whole, add_generation_prompt=False)

    first = _turn(tokenizer, ids, answered)
    second = _turn(tokenizer, ids, whole)
    # A token that straddles a border belongs to what follows: the shorter text lacks it.
    border = _border(tokenizer, ids, asked, feedback_text) if feedback_text else second.start
    end = second.stop - 1
    trained: list[range] = []
    if answer in loss_on:
        trained.append(first)
    if "feedback" in loss_on:
        trained.append(range(second.start, border))
    if "refinement" in loss_on:
        heading = _border(tokenizer, ids, asked, feedback_text + improved) if told.good else end
        trained.append(range(border, heading))
    # Whatever of the turn is trained, the turn must end: its end-of-turn token is trained with it.
    ends_feedback = "feedback" in loss_on and "refinement" not in loss_on
    if ends_feedback or "refinement" in loss_on:
        trained.append(range(end, second.stop))
    parts: list[tuple[Part, range]] = [
        (answer, first),
        ("feedback", range(second.start, border)),
        ("refinement", range(border, end)),
        ("feedback" if ends_feedback else "refinement", range(end, second.stop)),
    ]
    return TokenSequence(told.id, ids, _labels(ids, trained), tuple(parts))


def _labels(ids: list[int], trained: Sequence[range]) -> list[int]:
    labels = [IGNORED] * len(ids)
    for places in trained:
        labels[places.start : places.stop] = ids[places.start : places.stop]
    return labels


def _turn(tokenizer: PreTrainedTokenizerBase, ids: list[int], until: Sequence[Message]) -> range:
    """Where the last turn of `until` stands in `ids`, its end-of-turn token included.

    Raises `SrtError` when the template writes this turn differently once the chat goes on.
    """
    opening = encode_chat(tokenizer, until[:-1], add_generation_prompt=True)
    closed = encode_chat(tokenizer, until, add_generation_prompt=False)
    end = closed.index(end_of_turn_id(tokenizer), len(opening)) + 1
    if closed[: len(opening)] != opening or ids[:end] != closed[:end]:
        raise SrtError(
            f"{tokenizer.name_or_path}: its chat template rewrites earlier turns when the chat goes "
            "on, so a turn cannot be trained as it is generated. Pass a --chat-template that does not."
        )
    return range(len(opening), end)


def _border(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], asked: list[Message], text: str
) -> int:
    """Where `text`, the beginning of the last turn behind `asked`, ends in `ids`."""
    begun = [*asked, Message(role="assistant", content=text)]
    return _common_prefix(ids, encode_chat(tokenizer, begun, add_generation_prompt=False))


def _common_prefix(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    shorter = min(len(one), len(other))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)


@dataclass(frozen=True)
class PairIds:
    """One preference pair as token ids; both answers end with the end-of-turn token."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def preference_ids(tokenizer: PreTrainedTokenizerBase, pair: Preference) -> PairIds:
    """The ids of a pair's prompt and answers, as TRL's `DataCollatorForPreference` takes them."""
    prompt = encode_chat(tokenizer, pair.prompt, add_generation_prompt=True)
    answers = []
    for answer in (pair.chosen, pair.rejected):
        ids = encode_chat(tokenizer, [*pair.prompt, *answer], add_generation_prompt=False)
        turn = _turn(tokenizer, ids, [*pair.prompt, *answer])
        answers.append(ids[turn.start : turn.stop])
    return PairIds(pair.id, prompt, answers[0], answers[1])

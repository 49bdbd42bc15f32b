"""Records to token ids and labels: which tokens are trained is decided here and nowhere else.

A feedback record becomes one conversation (design of the method, paper section 3.1.2):

    user: prompt · assistant: response · user: critique request · assistant: feedback + refinement

Prompt and request never carry loss. Every trained turn ends with the end-of-turn token.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Final, Literal

from transformers import PreTrainedTokenizerBase

from srt_cli.errors import SrtError
from srt_cli.models.chat import encode_chat, end_of_turn_id
from srt_cli.records import Feedback, FeedbackRecord, Message, Preference, as_messages
from srt_cli.templates import CRITIQUE_REQUEST, render_feedback, render_refinement

IGNORED: Final = -100
Part = Literal["response", "feedback", "refinement"]
PARTS: Final[tuple[Part, ...]] = ("response", "feedback", "refinement")


@dataclass(frozen=True)
class Sequence:
    """One training example: `labels` repeats `input_ids` where a token is trained, else -100."""

    id: str
    input_ids: list[int]
    labels: list[int]
    trained: dict[Part, int]
    """Trained tokens per part, end-of-turn tokens counted with the part they close."""


def feedback_sequence(
    tokenizer: PreTrainedTokenizerBase, record: FeedbackRecord, loss_on: SequenceOf[Part]
) -> Sequence:
    """The paper's sequence of one record; with all three parts in `loss_on` its loss is Eq. 1."""
    assert record.response is not None
    assert record.feedback is not None
    assert record.refinement is not None
    return _conversation(
        tokenizer,
        record.id,
        as_messages(record.prompt),
        (record.response, "response"),
        record.feedback,
        record.refinement,
        loss_on,
        copied=False,
    )


def refinement_feedback_sequence(
    tokenizer: PreTrainedTokenizerBase, record: FeedbackRecord, loss_on: SequenceOf[Part]
) -> Sequence:
    """A refinement as the first answer, with its own blind feedback: shows what good looks like.

    Its improved response is the refinement unchanged, so that the reply is complete; this copy
    bears no loss, for a model trained to copy also copies what it has just criticised (in the
    quickstart 68 of 80 times). Not in the paper.
    """
    assert record.refinement is not None
    assert record.refinement_feedback is not None
    return _conversation(
        tokenizer,
        f"{record.id}:refinement",
        as_messages(record.prompt),
        (record.refinement, "refinement"),
        record.refinement_feedback,
        record.refinement,
        loss_on,
        copied=True,
    )


def _conversation(
    tokenizer: PreTrainedTokenizerBase,
    identifier: str,
    prompt: list[Message],
    answer: tuple[str, Part],
    feedback: Feedback,
    refinement: str,
    loss_on: SequenceOf[Part],
    *,
    copied: bool,
) -> Sequence:
    answered = [*prompt, Message(role="assistant", content=answer[0].strip())]
    asked = [*answered, Message(role="user", content=CRITIQUE_REQUEST)]
    feedback_text = render_feedback(feedback)
    whole_text = feedback_text + render_refinement(refinement.strip())
    whole = [*asked, Message(role="assistant", content=whole_text)]
    ids = encode_chat(tokenizer, whole, add_generation_prompt=False)

    first = _turn(tokenizer, ids, answered)
    second = _turn(tokenizer, ids, whole)
    # A token that straddles a border belongs to what follows: the shorter text lacks it.
    border = _border(tokenizer, ids, asked, feedback_text)
    end = range(second.stop - 1, second.stop)
    parts: list[tuple[Part, range]] = [
        (answer[1], first),
        ("feedback", range(second.start, border)),
        ("refinement", range(border, second.stop)),
    ]
    if copied:
        heading = _border(tokenizer, ids, asked, feedback_text + render_refinement(""))
        parts[2:] = [("refinement", range(border, heading)), ("refinement", end)]
    trained_parts = [(part, places) for part, places in parts if part in loss_on]
    if "feedback" in loss_on and "refinement" not in loss_on:
        # The turn must still end: its end-of-turn token is trained with the feedback.
        trained_parts.append(("feedback", end))
    labels = [IGNORED] * len(ids)
    trained: dict[Part, int] = dict.fromkeys(PARTS, 0)
    for part, places in trained_parts:
        trained[part] += len(places)
        for place in places:
            labels[place] = ids[place]
    return Sequence(identifier, ids, labels, trained)


def _turn(tokenizer: PreTrainedTokenizerBase, ids: list[int], until: SequenceOf[Message]) -> range:
    """Where the last turn of `until` stands in `ids`, its end-of-turn token included.

    Raises `SrtError` when the template writes this turn otherwise once the chat goes on.
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
    """A pair's ids, prompt and answers apart, as TRL's `DataCollatorForPreference` takes them."""
    prompt = encode_chat(tokenizer, pair.prompt, add_generation_prompt=True)
    answers = []
    for answer in (pair.chosen, pair.rejected):
        ids = encode_chat(tokenizer, [*pair.prompt, *answer], add_generation_prompt=False)
        turn = _turn(tokenizer, ids, [*pair.prompt, *answer])
        answers.append(ids[turn.start : turn.stop])
    return PairIds(pair.id, prompt, answers[0], answers[1])

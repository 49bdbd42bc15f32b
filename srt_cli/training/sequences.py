"""From records to token ids and labels: which tokens are trained is decided here alone.

A feedback record becomes one conversation (design of the method, paper section 3.1.2):

    user: prompt · assistant: response · user: critique request · assistant: feedback + refinement

Prompt and request never carry loss. Every trained turn stands as it is generated, and ends with the
end-of-turn token. Where the template keeps earlier turns so, the conversation is one sequence;
where it rewrites them, each trained turn is a sequence of its own.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from srt_cli.models.chat import ChatFormat, Turn, UnfitChat
from srt_cli.reading import part_thoughts
from srt_cli.records import Feedback, FeedbackRecord, Message, Preference, Prompt, as_messages
from srt_cli.templates import (
    CRITIQUE_REQUEST,
    LETTER_REQUIREMENTS,
    LETTERS,
    FeedbackField,
    judge_messages,
    judgements_in,
    render_feedback,
    render_refinement,
)
from srt_cli.training.rows import PARTS, Part, Thoughts

IGNORED: Final = -100


@dataclass(frozen=True)
class TokenSequence:
    """One training example: `labels` repeats `input_ids` where a token is trained, else -100."""

    id: str
    input_ids: list[int]
    labels: list[int]
    parts: tuple[tuple[Part, range], ...]
    """Where each part stands, trained or not; an end-of-turn token belongs to what it closes."""
    piece: str = ""
    """Which turns of a conversation these are, where the template rewrites the others."""
    good: bool | None = None
    """Whether the answer that is criticised is good; None where none is, or nobody asked."""

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


@dataclass(frozen=True)
class _Taught:
    """A turn, where its parts stand in its ids, and what of it is trained."""

    turn: Turn
    parts: list[tuple[Part, range]]
    trained: list[range]


def feedback_sequences(
    chat: ChatFormat,
    record: FeedbackRecord,
    loss_on: Sequence[Part],
    drop: Sequence[FeedbackField] = (),
    thoughts: Thoughts = "drop",
) -> list[TokenSequence]:
    """The paper's sequence of one record; with all three parts in `loss_on` its loss is Eq. 1.

    `drop` leaves fields of the feedback out of the target (paper, Table 6). `thoughts` kept are
    trained with the turn that they came before.
    """
    assert record.response is not None
    assert record.feedback is not None
    assert record.refinement is not None
    told = _Criticised(
        record.id, as_messages(record.prompt), record.response, record.feedback, record.refinement,
        thoughts=record.thoughts if thoughts == "keep" else {},
    )  # fmt: skip
    return _conversation(chat, told, loss_on, drop)


def refinement_sequence(chat: ChatFormat, record: FeedbackRecord) -> list[TokenSequence]:
    """Prompt and refinement, as if it were the first answer (paper, Table 6: "Refinement Only")."""
    assert record.refinement is not None
    turn = chat.turn(as_messages(record.prompt), record.refinement.strip())
    return _sequences(record.id, [_Taught(turn, [("refinement", turn.place)], [turn.place])])


def chat_sequences(
    chat: ChatFormat, identifier: str, messages: Sequence[Message], thoughts: Thoughts = "drop"
) -> list[TokenSequence]:
    """Other chat data (`--mix`): every assistant turn that answers something carries loss.

    Raises `UnfitChat` when none does.
    """
    answers = without_thoughts(messages)
    turns = [
        chat.turn(
            answers[:place],
            turn.content,
            part_thoughts(messages[place].content)[0] if thoughts == "keep" else "",
        )
        for place, turn in enumerate(answers)
        if turn.role == "assistant"
        and turn.content.strip()
        and any(before.role == "user" for before in answers[:place])
    ]
    if not turns:
        raise UnfitChat("no assistant turn answers a user's")
    taught = [_Taught(turn, [("mix", turn.place)], [turn.place]) for turn in turns]
    return _sequences(identifier, taught)


def without_thoughts(messages: Sequence[Message]) -> list[Message]:
    """A chat whose assistant turns hold answers alone."""
    return [
        turn.model_copy(update={"content": part_thoughts(turn.content)[1]})
        if turn.role == "assistant"
        else turn
        for turn in messages
    ]


def comparison_sequences(chat: ChatFormat, record: FeedbackRecord) -> list[TokenSequence]:
    """Draft and refinement in both orders, asked about as by `srt eval`; the better one's letter.

    Loss is on the letter alone. Empty where the scores tie. Not in the paper.
    """
    assert record.response is not None
    assert record.refinement is not None
    if not record.gain:
        return []
    prompt = Prompt(id=record.id, prompt=record.prompt)
    shown = record.refinement.strip(), record.response.strip()
    better_first = record.gain > 0
    found = []
    for texts, letter in ((shown, LETTERS[not better_first]), (shown[::-1], LETTERS[better_first])):
        turn = chat.turn(judge_messages(prompt, *texts, LETTER_REQUIREMENTS), letter)
        place = range(turn.place.start, turn.place.stop - 1)
        found += _sequences(record.id, [_Taught(turn, [("comparison", place)], [place])])
    return found


def refinement_feedback_sequences(
    chat: ChatFormat,
    record: FeedbackRecord,
    loss_on: Sequence[Part],
    drop: Sequence[FeedbackField] = (),
) -> list[TokenSequence]:
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
    return _conversation(chat, told, loss_on, drop)


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
    thoughts: Mapping[str, str] = field(default_factory=dict)
    """What is trained of thoughts, by the reply that they came before."""


def _conversation(
    chat: ChatFormat,
    told: _Criticised,
    loss_on: Sequence[Part],
    drop: Sequence[FeedbackField],
) -> list[TokenSequence]:
    answer: Part = "refinement" if told.good else "response"
    text = told.answer.strip()
    asked = [
        *told.prompt,
        Message(role="assistant", content=text),
        Message(role="user", content=CRITIQUE_REQUEST),
    ]
    first = chat.turn(told.prompt, text, told.thoughts.get("response", ""))
    answered = _Taught(first, [(answer, first.place)], [first.place] if answer in loss_on else [])
    return _sequences(told.id, [answered, _criticism(chat, asked, told, loss_on, drop)])


def _criticism(
    chat: ChatFormat,
    asked: list[Message],
    told: _Criticised,
    loss_on: Sequence[Part],
    drop: Sequence[FeedbackField],
) -> _Taught:
    """The turn that holds feedback and improved response."""
    feedback_text = render_feedback(told.feedback, drop)
    improved = render_refinement("") if feedback_text else render_refinement("").lstrip("\n")
    thoughts = told.thoughts.get("critique", "")
    turn = chat.turn(asked, feedback_text + improved + told.improved.strip(), thoughts)
    ids, place = turn.ids, turn.place
    # A token that straddles a border belongs to what follows: the shorter text lacks it.
    begun = chat.turn(asked, feedback_text, thoughts).ids
    border = _common_prefix(ids, begun) if feedback_text else place.start
    end = place.stop - 1
    trained: list[range] = []
    if "feedback" in loss_on:
        trained.append(range(place.start, border))
    if "refinement" in loss_on:
        heading = end
        if told.good:
            heading = _common_prefix(ids, chat.turn(asked, feedback_text + improved).ids)
        trained.append(range(border, heading))
    # Whatever of the turn is trained, the turn must end: its end-of-turn token is trained with it.
    ends_feedback = "feedback" in loss_on and "refinement" not in loss_on
    if ends_feedback or "refinement" in loss_on:
        trained.append(range(end, place.stop))
    parts: list[tuple[Part, range]] = [
        ("feedback", range(place.start, border)),
        ("refinement", range(border, end)),
        ("feedback" if ends_feedback else "refinement", range(end, place.stop)),
    ]
    return _Taught(turn, parts, trained)


def _sequences(identifier: str, taught: Sequence[_Taught]) -> list[TokenSequence]:
    """The turns of one conversation as sequences: as one, if each is read as it was generated."""
    groups: list[list[_Taught]] = []
    for each in taught:
        before = groups[-1][-1].turn.ids if groups else []
        if groups and each.turn.prompt[: len(before)] == before:
            groups[-1].append(each)
        else:
            groups.append([each])
    if len(groups) == 1:
        return [_sequence(identifier, groups[0], "")]
    done, found = 0, []
    for group in groups:
        named = (
            f"turn {done + 1}" if len(group) == 1 else f"turns {done + 1} to {done + len(group)}"
        )
        done += len(group)
        if any(len(places) for each in group for places in each.trained):
            found.append(_sequence(identifier, group, f"{named} of {len(taught)}"))
    return found


def _sequence(identifier: str, group: Sequence[_Taught], piece: str) -> TokenSequence:
    last = group[-1].turn
    ids = last.ids + last.after
    labels = [IGNORED] * len(ids)
    for places in (places for each in group for places in each.trained):
        labels[places.start : places.stop] = ids[places.start : places.stop]
    parts = tuple(part for each in group for part in each.parts)
    return TokenSequence(identifier, ids, labels, parts, piece)


def _common_prefix(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    shorter = min(len(one), len(other))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)


def judging_tokens(chat: ChatFormat, sequence: TokenSequence) -> list[int]:
    """Places of the trained tokens in which feedback judges: `yes`, `no`, the digits of the score."""
    found = list[int]()
    for places in (places for part, places in sequence.parts if part == "feedback"):
        ids = sequence.input_ids[places.start : places.stop]

        def characters(tokens: int, ids: list[int] = ids) -> int:
            return len(str(chat.tokenizer.decode(ids[:tokens])))

        for span in judgements_in(str(chat.tokenizer.decode(ids))):
            first = bisect_right(range(len(ids)), span.start, key=characters) - 1
            last = bisect_left(range(len(ids)), span.end, key=characters)
            found += range(places.start + first, places.start + last)
    return [place for place in found if sequence.labels[place] != IGNORED]


@dataclass(frozen=True)
class PairIds:
    """One preference pair as token ids; both answers end with the end-of-turn token."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def preference_ids(chat: ChatFormat, pair: Preference) -> PairIds:
    """The ids of a pair's prompt and answers, as TRL's `DataCollatorForPreference` takes them."""
    prompt = list(pair.prompt)
    chosen, rejected = (
        chat.turn([*prompt, *answer[:-1]], answer[-1].content)
        for answer in (pair.chosen, pair.rejected)
    )
    if chosen.prompt != rejected.prompt:
        raise UnfitChat("the last turns of chosen and rejected do not answer the same")
    return PairIds(pair.id, chosen.prompt, chosen.said, rejected.said)

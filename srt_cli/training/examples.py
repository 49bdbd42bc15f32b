"""Rows to examples: token ids within the length that is allowed, and a look at their health."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from srt_cli.errors import SrtError
from srt_cli.models.chat import end_of_turn_id
from srt_cli.records import FeedbackRecord, Preference, Record
from srt_cli.training.rows import (
    PARTS,
    Chat,
    Fallen,
    Mix,
    Prepared,
    Targets,
    draw_chats,
    read_chats,
    require_both_sides,
    split_rows,
)
from srt_cli.training.sequences import (
    PairIds,
    Sequence,
    chat_sequence,
    feedback_sequence,
    preference_ids,
    refinement_feedback_sequence,
    refinement_sequence,
)

LENGTH_RATIO_TO_WARN_AT: Final = 1.3
Example = TypeVar("Example", Sequence, PairIds)


@dataclass(frozen=True)
class LengthLimit:
    """The most tokens a row may have, whose limit that is, and what happens to longer rows."""

    tokens: int
    of_model: bool
    """Whether the model's positions end there, below --max-length."""
    truncation: Literal["refuse", "drop"]

    @property
    def named(self) -> str:
        """For a sentence."""
        if self.of_model:
            return f"the model's {self.tokens} positions"
        return f"--max-length {self.tokens}"

    @property
    def advice(self) -> str:
        """How rows that are too long can be kept, or left out."""
        raised = "Take a model of more positions" if self.of_model else "Raise --max-length"
        return f"{raised}, or leave them out with --truncation drop."


def length_limit(
    max_length: int, positions: int | None, truncation: Literal["refuse", "drop"]
) -> LengthLimit:
    """`--max-length`, or the model's positions where these are fewer."""
    if positions is not None and positions < max_length:
        return LengthLimit(positions, True, truncation)
    return LengthLimit(max_length, False, truncation)


# --- sft ---------------------------------------------------------------------------------------


def prepare_sft(
    tokenizer: PreTrainedTokenizerBase,
    records: SequenceOf[FeedbackRecord],
    targets: Targets,
    mixes: SequenceOf[Mix],
    limit: LengthLimit,
    *,
    good_score: float,
    eval_split: float,
    seed: int,
    refuse: bool = True,
) -> Prepared[Sequence]:
    """Token ids and masks of feedback records and of the chats mixed in.

    A mix's weight counts against the feedback records that are trained on. Raises `SrtError` for a
    row that does not fit (unless it may be dropped, or `refuse` is False, for a plan), and for one
    that would teach nothing.
    """
    train, held_out = split_rows(records, lambda record: record.prompt, eval_split)
    require_both_sides(train, held_out, eval_split)
    chats, held_chats = _mixed(mixes, len(train), eval_split, seed)

    def encode(some: SequenceOf[FeedbackRecord]) -> list[tuple[Sequence, Record]]:
        return [
            (sequence, record)
            for record in some
            for sequence in _sequences(tokenizer, record, targets, good_score)
        ]

    def encode_chats(some: SequenceOf[Chat]) -> list[tuple[Sequence, Record]]:
        return [(chat_sequence(tokenizer, chat.id, chat.messages), chat) for chat in some]

    prepared = _fit(
        encode(train) + encode_chats(chats),
        encode(held_out) + encode_chats(held_chats),
        lambda sequence: len(sequence.input_ids),
        limit,
        "sequences",
        refuse,
    )
    check_labels(prepared.train + prepared.held_out, end_of_turn_id(tokenizer))
    _describe_sequences(prepared)
    _warn_of_pad(tokenizer, prepared)
    return prepared


def _sequences(
    tokenizer: PreTrainedTokenizerBase, record: FeedbackRecord, targets: Targets, good_score: float
) -> list[Sequence]:
    if targets.refinement_only:
        return [refinement_sequence(tokenizer, record)]
    sequences = [feedback_sequence(tokenizer, record, targets.loss_on, targets.drop)]
    own = record.refinement_feedback
    if targets.refinement_feedback and own is not None and own.score >= good_score:
        sequences.append(
            refinement_feedback_sequence(tokenizer, record, targets.loss_on, targets.drop)
        )
    return sequences


def _mixed(
    mixes: SequenceOf[Mix], rows: int, eval_split: float, seed: int
) -> tuple[list[Chat], list[Chat]]:
    drawn: list[Chat] = []
    held_out: list[Chat] = []
    for mix in mixes:
        chats, held = split_rows(read_chats(mix.path), lambda chat: chat.messages[:-1], eval_split)
        if not chats:
            raise SrtError(f"--eval-split {eval_split:g} leaves no chat of {mix.path} to train on.")
        drawn += draw_chats(chats, max(1, round(mix.weight * rows)), seed)
        held_out += held
    return drawn, held_out


def check_labels(sequences: SequenceOf[Sequence], end_of_turn: int) -> None:
    """Raise `SrtError` for rows without a trained token, or that teach no turn to end."""
    untrained = [s.id for s in sequences if not any(s.trained.values())]
    if untrained or not sequences:
        raise SrtError(
            f"no token would be trained in {', '.join(untrained[:3]) or 'any row'}. "
            "Look at --loss-on and --drop, and at the masks: --dry-run --show-masks 3."
        )
    endless = [s.id for s in sequences if end_of_turn not in s.labels]
    if endless:
        raise SrtError(
            f"no end-of-turn token would be trained in {', '.join(endless[:3])}, so the model would "
            "not learn to stop. Look at the masks: --dry-run --show-masks 3."
        )


def _describe_sequences(prepared: Prepared[Sequence]) -> None:
    tokens = {part: sum(s.trained[part] for s in prepared.train) for part in PARTS}
    trained = {part: count for part, count in tokens.items() if count}
    total = sum(len(s.input_ids) for s in prepared.train)
    prepared.tallies |= {"tokens": total, "trained_tokens": trained}
    named = ", ".join(f"{count} of {part}" for part, count in trained.items())
    prepared.sentences.append(
        f"{len(prepared.train)} sequences, {total} tokens, trained: {named}"
        + (f"; {len(prepared.held_out)} held out" if prepared.held_out else "")
    )


def _warn_of_pad(tokenizer: PreTrainedTokenizerBase, prepared: Prepared[Example]) -> None:
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        prepared.warnings.append(
            f"{tokenizer.name_or_path}: the tokenizer has no token to pad with but its end token. "
            "Training masks padding itself; give the model a pad token before others serve it."
        )


# --- dpo ---------------------------------------------------------------------------------------


def prepare_dpo(
    tokenizer: PreTrainedTokenizerBase,
    pairs: SequenceOf[Preference],
    limit: LengthLimit,
    *,
    eval_split: float,
    loss_type: str,
    refuse: bool = True,
) -> Prepared[PairIds]:
    """Token ids of preference pairs; pairs of two equal answers fall out.

    Raises `SrtError` for a pair that does not fit (unless it may be dropped).
    """
    telling, warnings, fallen = _telling_pairs(pairs)
    train, held_out = split_rows(telling, lambda pair: pair.prompt, eval_split)
    require_both_sides(train, held_out, eval_split)

    def encode(some: SequenceOf[Preference]) -> list[tuple[PairIds, Record]]:
        return [(preference_ids(tokenizer, pair), pair) for pair in some]

    prepared = _fit(encode(train), encode(held_out), longest_side, limit, "pairs", refuse)
    prepared.fallen = fallen + prepared.fallen
    prepared.warnings = warnings + prepared.warnings
    _describe_pairs(prepared, loss_type)
    _warn_of_pad(tokenizer, prepared)
    return prepared


def longest_side(pair: PairIds) -> int:
    """Tokens of the prompt with the longer answer."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def _telling_pairs(
    pairs: SequenceOf[Preference],
) -> tuple[list[Preference], list[str], list[Fallen]]:
    """Pairs whose answers differ; warns of pairs that repeat or contradict one another."""
    telling, fallen = [], []
    seen: set[tuple[str, str, str]] = set()
    repeated = contradicting = 0
    for pair in pairs:
        prompt, chosen, rejected = (
            repr(turns) for turns in (pair.prompt, pair.chosen, pair.rejected)
        )
        if chosen == rejected:
            fallen.append(Fallen(pair.id, "chosen and rejected are the same", pair))
            continue
        repeated += (prompt, chosen, rejected) in seen
        contradicting += (prompt, rejected, chosen) in seen
        seen.add((prompt, chosen, rejected))
        telling.append(pair)
    warnings = []
    if fallen:
        warnings.append(
            f"{len(fallen)} pairs prefer an answer to itself and teach nothing; they were left out."
        )
    if repeated:
        warnings.append(
            f"{repeated} pairs stand there more than once and weigh so much more. "
            "Remove them from the preferences if that is not meant."
        )
    if contradicting:
        warnings.append(
            f"{contradicting} pairs say the opposite of another pair; together they teach nothing. "
            "Look at how the preferences were made."
        )
    return telling, warnings, fallen


def _describe_pairs(prepared: Prepared[PairIds], loss_type: str) -> None:
    chosen = sum(len(pair.chosen_ids) for pair in prepared.train)
    rejected = sum(len(pair.rejected_ids) for pair in prepared.train)
    ratio = chosen / rejected
    prepared.tallies |= {
        "chosen_tokens": chosen,
        "rejected_tokens": rejected,
        "length_ratio": ratio,
    }
    prepared.sentences.append(
        f"{len(prepared.train)} pairs; chosen {ratio:.2f} times as long as rejected, in tokens"
        + (f"; {len(prepared.held_out)} held out" if prepared.held_out else "")
    )
    if ratio > LENGTH_RATIO_TO_WARN_AT and loss_type == "sigmoid":
        prepared.warnings.append(
            f"chosen answers are {ratio:.2f} times as long as rejected ones, and DPO learns length "
            "too. Consider --loss-type sigmoid_norm, or build-prefs --max-length-ratio."
        )


# --- Length ------------------------------------------------------------------------------------


def _fit(
    train: list[tuple[Example, Record]],
    held_out: list[tuple[Example, Record]],
    length_of: Callable[[Example], int],
    limit: LengthLimit,
    kind: Literal["sequences", "pairs"],
    refuse: bool,
) -> Prepared[Example]:
    """Examples within the limit; longer ones are refused, or fall out. They are never cut."""
    everything = train + held_out
    long = [(example, row) for example, row in everything if length_of(example) > limit.tokens]
    if long and refuse and limit.truncation == "refuse":
        worst, _ = max(long, key=lambda pair: length_of(pair[0]))
        raise SrtError(
            f"{len(long)} of {len(everything)} {kind} exceed {limit.named} "
            f"(the longest, {worst.id}: {length_of(worst)} tokens). {limit.advice}"
        )
    kept = [example for example, _ in train if length_of(example) <= limit.tokens]
    if not kept:
        raise SrtError(f"none of {len(everything)} {kind} fits {limit.named}. Raise --max-length.")
    prepared = Prepared(
        train=kept,
        held_out=[example for example, _ in held_out if length_of(example) <= limit.tokens],
        fallen=[Fallen(example.id, f"longer than {limit.named}", row) for example, row in long],
        tallies={kind: len(kept), f"{kind}_too_long": len(long)},
    )
    if held_out:
        prepared.tallies["held_out"] = len(prepared.held_out)
    if long:
        prepared.warnings.append(f"{len(long)} {kind} over {limit.named} were left out.")
    return prepared

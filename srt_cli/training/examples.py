"""From rows to examples: token ids within the length limit, and checks that they teach something."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress, cycle, islice
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from srt_cli.errors import SrtError, TooManyFailures
from srt_cli.models.chat import ChatFormat, UnfitChat
from srt_cli.pairs.worth import why_too_few
from srt_cli.records import (
    PLANTED,
    FeedbackRecord,
    Message,
    Preference,
    Record,
    as_messages,
)
from srt_cli.stats.hygiene import is_same_text
from srt_cli.training.rows import (
    PARTS,
    Chat,
    Fallen,
    FeedbackFile,
    FileFigures,
    Prepared,
    SftTask,
    by_weight,
    draw_rows,
    read_chats,
    require_both_sides,
    split_rows,
)
from srt_cli.training.sequences import (
    PairIds,
    TokenSequence,
    chat_sequences,
    comparison_sequences,
    feedback_sequences,
    preference_ids,
    refinement_feedback_sequences,
    refinement_sequence,
    without_thoughts,
)
from srt_cli.training.setup import Setup, positions_of

LENGTH_RATIO_TO_WARN_AT: Final = 1.3
Ids = TypeVar("Ids", TokenSequence, PairIds)


@dataclass(frozen=True)
class LengthLimit:
    """The maximum tokens in a row, who sets that limit, and what happens to longer rows."""

    tokens: int
    of_model: bool
    """Whether it is the model's number of positions, which is below --max-length."""
    drops: bool
    """Whether longer rows are dropped; otherwise a training refuses them and a plan counts them."""
    refuses: bool

    @property
    def named(self) -> str:
        """For a sentence."""
        if self.of_model:
            return f"the model's {self.tokens} positions"
        return f"--max-length {self.tokens}"

    @property
    def advice(self) -> str:
        """What to do about rows that are too long."""
        raised = "Take a model of more positions" if self.of_model else "Raise --max-length"
        return f"{raised}, or leave them out with --truncation drop."


def length_limit(setup: Setup) -> LengthLimit:
    """`--max-length`, or the model's positions where these are fewer."""
    positions, longest = positions_of(setup.model), setup.values.max_length
    of_model = positions is not None and positions < longest
    drops = setup.options.truncation == "drop"
    return LengthLimit(
        positions if positions is not None and of_model else longest,
        of_model,
        drops,
        refuses=not drops and not setup.options.dry_run,
    )


# --- sft ---------------------------------------------------------------------------------------


def prepare_sft(
    setup: Setup,
    chat: ChatFormat,
    files: Sequence[FeedbackFile],
    task: SftTask,
) -> Prepared[TokenSequence]:
    """Token ids and masks of the feedback in `files`, by their weights, and of the chats mixed in.

    A mix's weight counts against the feedback records that are trained on. Raises `SrtError` for a
    row that does not fit (unless it may be dropped, or this is a plan), and for one that would teach
    nothing.
    """
    if task.thoughts == "keep" and not chat.holds_thoughts:
        raise SrtError(
            f"--thoughts keep: the chat template of {task.model} has no place for thoughts. Leave it "
            "out, or pass a --chat-template that has one."
        )
    share = setup.options.eval_split
    sides = [split_rows(each.kept, lambda record: record.prompt, share) for each in files]
    train, held_out = ([row for side in sides for row in side[which]] for which in (0, 1))
    require_both_sides(train, held_out, share)
    fitting = _Fitting(setup.options.unfit == "drop")

    def encode(some: Sequence[FeedbackRecord], path: Path) -> list[tuple[TokenSequence, Record]]:
        return fitting.examples(
            some,
            lambda record: _sequences(chat, record, task),
            lambda row: f"{path}: row {row.id}",
        )

    encoded: list[list[tuple[TokenSequence, Record]]] = []
    held: list[tuple[TokenSequence, Record]] = []
    figures = []
    for each, (mine, kept_back) in zip(files, sides, strict=True):
        path, weight = each.file.path, each.file.weight
        drawn = by_weight(mine, weight, setup.options.seed)
        encoded.append(encode(drawn, path))
        held += encode(kept_back, path)
        of_file = FileFigures(str(path), weight, each.read, len(each.kept), len(kept_back))
        figures.append(replace(of_file, trained=len(drawn)))
    chats, held_chats = _mixed(setup, task, sum(each.trained for each in figures))

    def encode_chats(some: Sequence[Chat]) -> list[tuple[TokenSequence, Record]]:
        return fitting.examples(
            some,
            lambda row: chat_sequences(chat, row.id, row.messages, task.thoughts),
            lambda row: f"--mix {row.id}",
        )

    feedback = list(chain.from_iterable(encoded))
    if task.targets.balance:
        feedback = _balanced(feedback)
    limit = length_limit(setup)
    prepared = _within(
        limit,
        feedback + encode_chats(chats),
        held + encode_chats(held_chats),
        lambda sequence: len(sequence.input_ids),
        "sequences",
    )
    _require_both_sides_still(prepared, share, limit)
    check_labels(prepared.train + prepared.held_out, chat.end_id)
    if len(files) > 1:
        file_of = {id(s): n for n, some in enumerate(encoded) for s, _ in some}
        for sequence in prepared.train:
            if id(sequence) in file_of:
                figures[file_of[id(sequence)]].tokens += len(sequence.input_ids)
        prepared.files = figures
        prepared.tallies["files"] = [vars(of_file) for of_file in figures]
    if task.targets.balance:
        goods = Counter(s.good for s in prepared.train)
        prepared.sentences.append(
            f"balanced: {goods[True]} critiques of good answers, {goods[False]} of bad ones"
        )
    _describe_sequences(prepared)
    fitting.tell(prepared)
    _warn_of_chat(chat, prepared)
    return prepared


def _sequences(chat: ChatFormat, record: FeedbackRecord, task: SftTask) -> list[TokenSequence]:
    compared = comparison_sequences(chat, record) if task.compare else []
    return _of_feedback(chat, record, task) + compared


def _of_feedback(chat: ChatFormat, record: FeedbackRecord, task: SftTask) -> list[TokenSequence]:
    targets = task.targets
    assert record.feedback is not None
    good = record.feedback.score >= task.good_score
    if record.policy == PLANTED:
        # Its refinement is trained in the row that the fault was planted in, and its response never.
        parts = tuple(part for part in targets.loss_on if part != "response")
        if targets.refinement_only or not parts:
            return []
        told = feedback_sequences(chat, record, parts, targets.drop, task.thoughts)
        return [replace(sequence, good=good) for sequence in told]
    if targets.refinement_only:
        return refinement_sequence(chat, record)
    told = feedback_sequences(chat, record, targets.loss_on, targets.drop, task.thoughts)
    sequences = [replace(sequence, good=good) for sequence in told]
    own = record.refinement_feedback
    if targets.refinement_feedback and own is not None and own.score >= task.good_score:
        told = refinement_feedback_sequences(chat, record, targets.loss_on, targets.drop)
        # A good draft that was left as it is would be told twice, and once as a copy to be learnt.
        is_copy = is_same_text(record.refinement or "", record.response or "")
        sequences = [] if is_copy else sequences
        sequences += [replace(sequence, good=True) for sequence in told]
    return sequences


def _balanced(
    examples: list[tuple[TokenSequence, Record]],
) -> list[tuple[TokenSequence, Record]]:
    """The rarer of critiques of good and of bad answers again and again, until they are as many.

    Raises `SrtError` when there are none of one kind.
    """
    good, bad = ([each for each in examples if each[0].good is kind] for kind in (True, False))
    rarer, missing = min((good, "good"), (bad, "bad"), key=lambda kind: len(kind[0]))
    if not rarer:
        raise SrtError(
            f"--balance: no answer in the feedback is {missing}, so there is nothing to balance. Add "
            "good ones with --refinement-feedback, or bad ones with srt collect-feedback --contrast."
        )
    return examples + list(islice(cycle(rarer), abs(len(good) - len(bad))))


AnyRow = TypeVar("AnyRow", FeedbackRecord, Chat, Preference)


@dataclass
class _Fitting:
    """Rows as examples; those that the chat template does not take are refused or dropped."""

    drops: bool
    fallen: list[Fallen] = field(default_factory=list)

    def examples(
        self,
        rows: Sequence[AnyRow],
        encode: Callable[[AnyRow], list[Ids]],
        place: Callable[[AnyRow], str],
    ) -> list[tuple[Ids, Record]]:
        """The examples of each row, with the row; raises `SrtError` that names its place."""
        found: list[tuple[Ids, Record]] = []
        for row in rows:
            try:
                found += [(example, row) for example in encode(row)]
            except UnfitChat as error:
                if not self.drops:
                    raise SrtError(
                        f"{place(row)}: {error}. Leave such rows out with --unfit drop, or pass "
                        "another --chat-template."
                    ) from None
                self.fallen.append(Fallen(row.id, str(error), row))
        return found

    def tell(self, prepared: Prepared[Any]) -> None:
        """Count what was dropped."""
        prepared.fallen = self.fallen + prepared.fallen
        if self.fallen:
            prepared.tallies["unfit"] = len(self.fallen)
            prepared.warnings.append(
                f"{len(self.fallen)} rows that the model's chat template does not take were left out."
            )


def _mixed(setup: Setup, task: SftTask, rows: int) -> tuple[list[Chat], list[Chat]]:
    share = setup.options.eval_split
    drawn: list[Chat] = []
    held_out: list[Chat] = []
    for mix in task.mixes:
        chats, held = split_rows(read_chats(mix.path), lambda chat: chat.messages[:-1], share)
        if not chats:
            raise SrtError(f"--eval-split {share:g} leaves no chat of {mix.path} to train on.")
        drawn += draw_rows(chats, max(1, round(mix.weight * rows)), setup.options.seed)
        held_out += held
    return drawn, held_out


def check_labels(sequences: Sequence[TokenSequence], end_of_turn: int) -> None:
    """Raise `SrtError` for rows without a trained token, or that do not teach a turn to end."""
    untrained = [s.id for s in sequences if not any(s.trained.values())]
    if untrained or not sequences:
        raise SrtError(
            f"no token would be trained in {', '.join(untrained[:3]) or 'any row'}. "
            "Look at --loss-on and --drop, and at the masks: --dry-run --show-masks 3."
        )
    # A comparison trains one letter, and is asked for one token.
    endless = [
        s.id for s in sequences if end_of_turn not in s.labels and not s.trained["comparison"]
    ]
    if endless:
        raise SrtError(
            f"no end-of-turn token would be trained in {', '.join(endless[:3])}, so the model would "
            "not learn to stop. Look at the masks: --dry-run --show-masks 3."
        )


def _describe_sequences(prepared: Prepared[TokenSequence]) -> None:
    tokens = {part: sum(s.trained[part] for s in prepared.train) for part in PARTS}
    trained = {part: count for part, count in tokens.items() if count}
    total = sum(len(s.input_ids) for s in prepared.train)
    if pieces := sum(bool(s.piece) for s in prepared.train):
        prepared.tallies["turns_apart"] = pieces
        prepared.split = (
            f"{pieces} sequences hold a turn of a longer conversation: the model's chat template "
            "rewrites earlier turns, so each trained turn is a sequence of its own."
        )
        prepared.sentences.append(prepared.split)
    prepared.tallies |= {"tokens": total, "trained_tokens": trained}
    named = ", ".join(f"{count} of {part}" for part, count in trained.items())
    prepared.sentences.append(
        f"{len(prepared.train)} sequences, {total} tokens, trained: {named}"
        + (f"; {len(prepared.held_out)} held out" if prepared.held_out else "")
    )


def _warn_of_chat(chat: ChatFormat, prepared: Prepared[Ids]) -> None:
    tokenizer = chat.tokenizer
    if chat.writes_date:
        prepared.warnings.append(
            f"{tokenizer.name_or_path}: its chat template writes the date, so what is trained depends "
            "on the day. A training that is continued keeps its first day's."
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        prepared.warnings.append(
            f"{tokenizer.name_or_path}: the tokenizer has no token to pad with but its end token. "
            "Training masks padding itself; give the model a pad token before others serve it."
        )


# --- dpo ---------------------------------------------------------------------------------------


def prepare_dpo(
    setup: Setup, chat: ChatFormat, prefs: str, pairs: Sequence[Preference]
) -> Prepared[PairIds]:
    """Token ids of preference pairs; pairs of two equal answers are dropped.

    Raises `SrtError` for a pair that does not fit (unless it may be dropped, or this is a plan).
    """
    share = setup.options.eval_split
    answers = [_answers_alone(pair) for pair in pairs]
    telling, warnings, fallen = _telling_pairs(answers)
    if thinking := sum(alone != pair for alone, pair in zip(answers, pairs, strict=True)):
        warnings.append(f"{thinking} pairs hold thoughts; their answers alone are trained.")
    train, held_out = split_rows(telling, lambda pair: pair.prompt, share)
    require_both_sides(train, held_out, share)

    fitting = _Fitting(setup.options.unfit == "drop")

    same: list[Fallen] = []

    def encode(some: Sequence[Preference]) -> list[tuple[PairIds, Record]]:
        examples = fitting.examples(
            some, lambda pair: [preference_ids(chat, pair)], lambda pair: f"{prefs}: row {pair.id}"
        )
        equal = [ids.chosen_ids == ids.rejected_ids for ids, _ in examples]
        reason = "chosen and rejected are the same tokens"
        same.extend(Fallen(ids.id, reason, row) for ids, row in compress(examples, equal))
        return [example for example, drop in zip(examples, equal, strict=True) if not drop]

    limit = length_limit(setup)
    prepared = _within(limit, encode(train), encode(held_out), longest_side, "pairs")
    _require_both_sides_still(prepared, share, limit)
    prepared.fallen = fallen + same + prepared.fallen
    prepared.warnings = warnings + prepared.warnings
    if same:
        prepared.warnings.append(
            "pairs whose answers are the same tokens teach nothing; they were left out: "
            f"{len(same)}."
        )
    _describe_pairs(prepared, setup.values.loss_type)
    if few := why_too_few(len(prepared.train)):
        prepared.warnings.append(few)
    fitting.tell(prepared)
    _warn_of_chat(chat, prepared)
    return prepared


def _answers_alone(pair: Preference) -> Preference:
    sides = {name: getattr(pair, name) for name in ("prompt", "chosen", "rejected")}
    return pair.model_copy(update={name: without_thoughts(turns) for name, turns in sides.items()})


def longest_side(pair: PairIds) -> int:
    """Tokens of the prompt with the longer answer."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def _telling_pairs(
    pairs: Sequence[Preference],
) -> tuple[list[Preference], list[str], list[Fallen]]:
    """Pairs whose answers differ; warns of pairs that repeat or contradict each other."""
    telling, fallen, silent = [], [], []
    seen: set[tuple[str, str, str]] = set()
    repeated = contradicting = 0
    for pair in pairs:
        prompt, chosen, rejected = (
            repr(turns) for turns in (pair.prompt, pair.chosen, pair.rejected)
        )
        if chosen == rejected:
            fallen.append(Fallen(pair.id, "chosen and rejected are the same", pair))
            continue
        if not pair.chosen[-1].content.strip():
            silent.append(Fallen(pair.id, "the chosen answer has no words", pair))
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
            f"{repeated} pairs stand there more than once and count more than once. "
            "Remove them from the preferences if that is not meant."
        )
    if contradicting:
        warnings.append(
            f"{contradicting} pairs say the opposite of another pair; together they teach nothing. "
            "Look at how the preferences were made."
        )
    if silent:
        warnings.append(f"{len(silent)} pairs prefer silence to an answer; they were left out.")
    return telling, warnings, fallen + silent


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


def _within(
    limit: LengthLimit,
    train: list[tuple[Ids, Record]],
    held_out: list[tuple[Ids, Record]],
    length_of: Callable[[Ids], int],
    kind: Literal["sequences", "pairs"],
) -> Prepared[Ids]:
    """Examples within the limit; longer ones are refused or dropped. They are never cut."""
    everything = train + held_out
    long = [(example, row) for example, row in everything if length_of(example) > limit.tokens]
    if long and limit.refuses:
        worst, _ = max(long, key=lambda pair: length_of(pair[0]))
        raise SrtError(
            f"{len(long)} of {len(everything)} {kind} exceed {limit.named} "
            f"(the longest, {worst.id}: {length_of(worst)} tokens). {limit.advice}"
        )
    kept, held = (
        [(example, row) for example, row in side if length_of(example) <= limit.tokens]
        for side in (train, held_out)
    )
    if not everything:
        raise TooManyFailures(f"none of the {kind} is left to train on.")
    if not kept:
        raise TooManyFailures(
            f"none of {len(everything)} {kind} fits {limit.named}. Raise --max-length."
        )
    prepared = Prepared(
        train=[example for example, _ in kept],
        held_out=[example for example, _ in held],
        prompts=_prompts(held) or _prompts(kept),
        fallen=[Fallen(example.id, f"longer than {limit.named}", row) for example, row in long],
        tallies={kind: len(kept), f"{kind}_too_long": len(long)},
    )
    if held_out:
        prepared.tallies["held_out"] = len(prepared.held_out)
    if long:
        prepared.warnings.append(f"{len(long)} {kind} over {limit.named} were left out.")
        if limit.drops:
            prepared.too_long = (
                f"{len(long)} rows exceed {limit.named}; they are left out, never cut."
            )
        else:
            prepared.too_long = (
                f"{len(long)} rows exceed {limit.named}: a run would refuse them. {limit.advice}"
            )
    return prepared


def _require_both_sides_still(prepared: Prepared[Any], share: float, limit: LengthLimit) -> None:
    """What is dropped may be all that was held out; a plan that drops nothing only counts it."""
    if limit.drops or limit.refuses:
        require_both_sides(prepared.train, prepared.held_out, share)


def _prompts(examples: Sequence[tuple[Ids, Record]]) -> list[list[Message]]:
    """The prompts of the examples' rows, once each; of chats mixed in there are none."""
    prompts = {
        repr(row.prompt): as_messages(row.prompt)
        for _, row in examples
        if isinstance(row, FeedbackRecord | Preference)
    }
    return list(prompts.values())

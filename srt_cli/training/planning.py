"""From prepared rows to the plan that `--dry-run` shows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from srt_cli.training.examples import LengthLimit, longest_side
from srt_cli.training.fitting import Fit
from srt_cli.training.packing import Packing, pack_length, sft_passes
from srt_cli.training.plan import Measured, Plan, Steps
from srt_cli.training.recipes import Chosen
from srt_cli.training.rows import PARTS, Fallen, Prepared
from srt_cli.training.sequences import IGNORED, PairIds
from srt_cli.training.sequences import Sequence as TokenSequence
from srt_cli.training.setup import Setup

Stretches = list[tuple[str, str]]


@dataclass(frozen=True)
class Work:
    """What stage 1 knows before its weights are loaded."""

    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared[TokenSequence]
    limit: LengthLimit
    packing: Packing
    fit: Fit


@dataclass(frozen=True)
class PairWork:
    """What stage 2 knows before its weights are loaded."""

    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared[PairIds]
    limit: LengthLimit
    fit: Fit


def plan_sft(
    work: Work,
    rows: int,
    chosen: Chosen,
    show_masks: int,
    measured: Measured | None,
    advice: str | None,
) -> Plan:
    """The plan of stage 1; `rows` is how many were read."""
    prepared, packing = work.prepared, work.packing
    train = prepared.train
    lengths = {"prompt": [s.prompt_tokens for s in train]}
    lengths |= {
        part: counts for part in PARTS if (counts := [n for s in train if (n := s.tokens_of(part))])
    }
    lengths["whole row"] = [len(s.input_ids) for s in train]
    shown = f"rows are {'' if packing.on else 'not '}packed: {packing.reason}"
    return Plan(
        stage="sft",
        rows=rows,
        reasons=prepared.reasons,
        train=len(train),
        held_out=len(prepared.held_out),
        too_long=_too_long(prepared.fallen, work.limit),
        lengths=lengths,
        steps=sft_steps(lengths["whole row"], packing, work.fit.setup),
        chosen=chosen,
        fit=work.fit,
        packing=shown,
        masks=[
            (
                f"row {s.id}: what is trained stands between ⟦ and ⟧",
                sequence_stretches(work.tokenizer, s),
            )
            for s in train[:show_masks]
        ],
        warnings=[*prepared.warnings, *([advice] if advice else [])],
        measured=measured,
    )


def plan_dpo(
    work: PairWork,
    rows: int,
    chosen: Chosen,
    show_masks: int,
    measured: Measured | None,
    warnings: Sequence[str],
) -> Plan:
    """The plan of stage 2; `rows` is how many pairs were read."""
    prepared = work.prepared
    train = prepared.train
    return Plan(
        stage="dpo",
        rows=rows,
        reasons=prepared.reasons,
        train=len(train),
        held_out=len(prepared.held_out),
        too_long=_too_long(prepared.fallen, work.limit),
        lengths={
            "prompt": [len(pair.prompt_ids) for pair in train],
            "chosen": [len(pair.chosen_ids) for pair in train],
            "rejected": [len(pair.rejected_ids) for pair in train],
            "prompt with the longer": [longest_side(pair) for pair in train],
        },
        steps=dpo_steps(train, work.fit.setup),
        chosen=chosen,
        fit=work.fit,
        packing=None,
        masks=[
            (
                f"pair {pair.id}: the two answers that are compared",
                pair_stretches(work.tokenizer, pair),
            )
            for pair in train[:show_masks]
        ],
        warnings=[*prepared.warnings, *warnings],
        measured=measured,
    )


def sft_steps(lengths: Sequence[int], packing: Packing, setup: Setup) -> Steps:
    """How long the training is; packs are counted as if they could be filled to the brim."""
    passes = -(-len(lengths) // setup.micro_batch)
    if packing.on:
        passes = -(-sum(lengths) // pack_length(lengths, setup.micro_batch))
    _, accumulation = sft_passes(lengths, packing, setup)
    steps = _steps(len(lengths), passes, accumulation, sum(lengths), setup)
    return replace(steps, packed=packing.on)


def dpo_steps(pairs: Sequence[PairIds], setup: Setup) -> Steps:
    """How long the training is; a pair's tokens are those of both its rows."""
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    passes = -(-len(pairs) // setup.micro_batch)
    return _steps(len(pairs), passes, setup.accumulation, tokens, setup)


def _steps(rows: int, passes: int, accumulation: int, tokens: int, setup: Setup) -> Steps:
    share = -(-passes // setup.processes)
    return Steps(rows, share, accumulation, setup.values.epochs, tokens)


def _too_long(fallen: Iterable[Fallen], limit: LengthLimit) -> str | None:
    long = sum(row.reason.startswith("longer than") for row in fallen)
    if not long:
        return None
    if limit.truncation == "drop":
        return f"{long} rows exceed {limit.named}; they are left out, never cut."
    return f"{long} rows exceed {limit.named}: a run would refuse them. {limit.advice}"


def sequence_stretches(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence) -> Stretches:
    """The row's text, cut where another part begins to be trained, or none."""
    named = [""] * len(sequence.input_ids)
    for part, places in sequence.parts:
        for place in places:
            if sequence.labels[place] != IGNORED:
                named[place] = part
    stretches: Stretches = []
    for part, tokens in groupby(zip(named, sequence.input_ids, strict=True), lambda pair: pair[0]):
        stretches.append((_text(tokenizer, [token for _, token in tokens]), part))
    return stretches


def pair_stretches(tokenizer: PreTrainedTokenizerBase, pair: PairIds) -> Stretches:
    """Prompt, chosen and rejected answer of a pair."""
    return [
        (_text(tokenizer, pair.prompt_ids), ""),
        (_text(tokenizer, pair.chosen_ids), "chosen"),
        ("\n", ""),
        (_text(tokenizer, pair.rejected_ids), "rejected"),
    ]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    decoded: Any = tokenizer.decode(ids)
    return str(decoded)

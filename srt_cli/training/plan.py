"""The plan of a training, before a step is made: rows, tokens, steps, values, memory, time."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final, Generic

from transformers import PreTrainedTokenizerBase

from srt_cli import console
from srt_cli.models.chat import ChatFormat
from srt_cli.tables import many
from srt_cli.training.batches import Packing, largest_pass, pack_length
from srt_cli.training.examples import longest_side
from srt_cli.training.health import stays_in_warm_up
from srt_cli.training.memory import GIB, Fit
from srt_cli.training.rows import PARTS, Example, FileFigures, Prepared
from srt_cli.training.sequences import IGNORED, PairIds, TokenSequence
from srt_cli.training.setup import Setup

BINS: Final = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
Stretches = list[tuple[str, str]]
"""Stretches of text, each with the part that is trained, or with none."""


@dataclass(frozen=True)
class Ready(Generic[Example]):
    """Everything that is known before the weights are loaded."""

    chat: ChatFormat
    prepared: Prepared[Example]
    fit: Fit
    packing: Packing | None = None
    """None for dpo, which TRL cannot pack."""


@dataclass(frozen=True)
class Steps:
    """How long a training is."""

    rows: int
    passes_an_epoch: int
    """Forward passes of one process."""
    accumulation: int
    epochs: float
    tokens_an_epoch: int
    packed: bool = False

    @property
    def an_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return math.ceil(self.passes_an_epoch / self.accumulation)

    @property
    def total(self) -> int:
        """Optimizer steps of the training, as transformers counts them."""
        return math.ceil(self.epochs * self.an_epoch)


@dataclass(frozen=True)
class Measured:
    """What a probe found."""

    seconds_a_token: float
    """Of forward and backward passes."""
    seconds_an_update: float
    """Of the optimizer, once a step."""
    reference_seconds_a_token: float
    """Of the reference's log-probs, which are computed once, before the first step."""
    seconds: float
    """How long the probe itself took."""
    peak_bytes: int | None
    """On a GPU, the most that was allocated."""

    def seconds_of(self, steps: Steps) -> float:
        """How long the steps of a training take."""
        tokens = steps.tokens_an_epoch * steps.epochs
        return tokens * self.seconds_a_token + steps.total * self.seconds_an_update

    def seconds_of_reference(self, steps: Steps) -> float:
        """How long it takes to compute the reference's log-probs beforehand."""
        return steps.tokens_an_epoch * self.reference_seconds_a_token


@dataclass(frozen=True)
class Plan:
    """What `--dry-run` shows besides."""

    read: int
    """Rows of the input."""
    lengths: Mapping[str, Sequence[int]]
    """Tokens of each part of each row."""
    steps: Steps
    masks: Sequence[tuple[str, Stretches]]
    """For some rows a title, and their text."""


# --- What is planned ---------------------------------------------------------------------------


def plan_sft(ready: Ready[TokenSequence], read: int) -> Plan:
    """The plan of stage 1; `read` counts the rows of the input."""
    train, setup = ready.prepared.train, ready.fit.setup
    lengths = {"prompt": [s.prompt_tokens for s in train]}
    lengths |= {
        part: counts for part in PARTS if (counts := [n for s in train if (n := s.tokens_of(part))])
    }
    lengths["whole row"] = [len(s.input_ids) for s in train]
    masks = [
        (
            f"row {s.id}{_piece(s)}: what is trained stands between ⟦ and ⟧",
            sequence_stretches(ready.chat.tokenizer, s),
        )
        for s in train[: setup.options.show_masks]
    ]
    assert ready.packing is not None
    return Plan(read, lengths, sft_steps(lengths["whole row"], ready.packing, setup), masks)


def _piece(sequence: TokenSequence) -> str:
    return f" ({sequence.piece}, a sequence of its own)" if sequence.piece else ""


def plan_dpo(ready: Ready[PairIds], read: int) -> Plan:
    """The plan of stage 2; `read` counts the pairs of the input."""
    train, setup = ready.prepared.train, ready.fit.setup
    lengths = {
        "prompt": [len(pair.prompt_ids) for pair in train],
        "chosen": [len(pair.chosen_ids) for pair in train],
        "rejected": [len(pair.rejected_ids) for pair in train],
        "prompt with the longer": [longest_side(pair) for pair in train],
    }
    masks = [
        (
            f"pair {pair.id}: the two answers that are compared",
            pair_stretches(ready.chat.tokenizer, pair),
        )
        for pair in train[: setup.options.show_masks]
    ]
    return Plan(read, lengths, dpo_steps(train, setup), masks)


def sft_steps(lengths: Sequence[int], packing: Packing, setup: Setup) -> Steps:
    """How long the training is; packs are counted as if each could be filled."""
    passes = -(-len(lengths) // setup.micro_batch)
    if packing.on:
        passes = -(-sum(lengths) // pack_length(lengths, setup.micro_batch))
    a_step = largest_pass(lengths, packing, setup).a_step
    share = -(-passes // setup.processes)
    steps = Steps(len(lengths), share, a_step, setup.values.epochs, sum(lengths))
    return replace(steps, packed=packing.on)


def dpo_steps(pairs: Sequence[PairIds], setup: Setup) -> Steps:
    """How long the training is; a pair's tokens are those of both its sequences."""
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    share = -(-len(pairs) // (setup.micro_batch * setup.processes))
    return Steps(len(pairs), share, setup.accumulation, setup.values.epochs, tokens)


# --- What is shown -----------------------------------------------------------------------------


def show_plan(ready: Ready[Any], plan: Plan, measured: Measured | None) -> None:
    """Print the plan as the command's result, with the time that a probe found."""
    for title, stretches in plan.masks:
        console.marked(title, stretches)
    _show_rows(ready.prepared, plan.read)
    _show_tokens(plan.lengths)
    _show_values(ready.fit.setup)
    _show_memory(ready.fit)
    console.result(describe_steps(plan.steps, ready.fit.setup))
    if ready.packing is not None:
        console.result(ready.packing.sentence())
    if measured is not None:
        _show_time(plan.steps, measured)
    idle = stays_in_warm_up(plan.steps.total, ready.fit.setup.values.warmup)
    for warning in [*ready.prepared.warnings, *([idle] if idle else [])]:
        console.warn(warning)


def _show_rows(prepared: Prepared[Any], read: int) -> None:
    rows = [["read", str(read)], ["trained on", str(len(prepared.train))]]
    rows += [["held out", str(len(prepared.held_out))]] if prepared.held_out else []
    rows += [[f"dropped: {reason}", str(count)] for reason, count in prepared.reasons.items()]
    console.table("rows", ["", "rows"], rows)
    _show_files(prepared.files)
    if prepared.split is not None:
        console.result(f"{prepared.split}\n")
    if prepared.too_long is not None:
        console.result(f"{prepared.too_long}\n")


def _show_files(files: Sequence[FileFigures]) -> None:
    if not files:
        return
    columns = ["", "weight", "read", "kept", "held out", "trained on", "tokens"]
    cells = [
        [each.file, f"{each.weight:g}", *map(str, (each.rows, each.kept, each.held_out)),
         str(each.trained), f"{each.tokens:,}"]
        for each in files
    ]  # fmt: skip
    console.table("rows by file", columns, cells)


def _show_tokens(lengths: Mapping[str, Sequence[int]]) -> None:
    longest = max((max(counts) for counts in lengths.values() if counts), default=0)
    used = next((place for place, edge in enumerate(BINS) if longest <= edge), len(BINS))
    edges = BINS[: used + 1]
    heads = [f"to {edge}" for edge in edges] + (["more"] if longest > BINS[-1] else [])
    rows = []
    for part, counts in lengths.items():
        if not counts:
            continue
        binned = Counter(sum(count > edge for edge in edges) for count in counts)
        ordered = sorted(counts)
        figures = [
            sum(counts), round(sum(counts) / len(counts)), ordered[len(ordered) // 2], ordered[-1]
        ]  # fmt: skip
        rows.append(
            [part, *map(str, figures), *(str(binned.get(n) or "·") for n in range(len(heads)))]
        )
    console.table(
        "tokens, and how many rows have that many",
        ["", "all", "mean", "median", "most", *heads],
        rows,
    )


def _show_values(setup: Setup) -> None:
    rows = [
        [name, _plain(value), setup.values.sources[name]]
        for name, value in setup.values.settings(setup.stage).items()
        if setup.adapters is not None or not name.startswith("lora_")
    ]
    console.table("values", ["", "value", "from"], rows, prose=True)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _show_memory(fit: Fit) -> None:
    place = fit.setup.place
    if fit.memory is None:
        console.result("memory: not known before the model is loaded\n")
        return
    parts = vars(fit.memory) | {"together": fit.memory.total}
    if fit.setup.stage == "sft":
        parts.pop("reference")
    elif not fit.memory.reference:
        parts["reference (its log-probs are computed beforehand)"] = parts.pop("reference")
        parts["together"] = parts.pop("together")
    rows = [[name, f"{size / GIB:.2f}"] for name, size in parts.items()]
    if fit.available is not None:
        rows.append([f"free on this {place.placement.device}", f"{fit.available / GIB:.2f}"])
    console.table("memory of a step", ["", "GiB"], rows)
    console.result(place.sentence())
    if not fit.fits:
        console.result(
            "This does not fit. Lower --micro-batch or --max-length, or take --method lora or qlora."
        )


def _show_time(steps: Steps, measured: Measured) -> None:
    training, reference = measured.seconds_of(steps), measured.seconds_of_reference(steps)
    speed = steps.tokens_an_epoch * steps.epochs / training
    before = f" ({duration(reference)} of it for the reference's log-probs)" if reference else ""
    peak = measured.peak_bytes
    console.result(
        f"about {duration(training + reference)}{before}, at {speed:,.0f} tokens/s "
        f"(measured in {duration(measured.seconds)} of real steps"
        + (f"; they took {peak / GIB:.1f} GiB)" if peak is not None else ")")
    )


def describe_steps(steps: Steps, setup: Setup) -> str:
    """How rows, passes and steps are related, in one sentence."""
    most = setup.values.global_batch
    if steps.packed and steps.rows > most:
        rows = f"about {most}"
    elif steps.rows % most and steps.rows > most:
        rows = f"up to {most}"
    else:
        rows = str(min(steps.rows, most))
    passes = min(steps.accumulation, steps.passes_an_epoch)
    return (
        f"{many(steps.total, 'step')}: {many(steps.epochs, 'epoch')} of {steps.an_epoch}, "
        f"each of {rows} rows in {many(passes, 'forward pass', 'es')}"
        + (f" of each of {setup.processes} processes" if setup.processes > 1 else "")
    )


def duration(seconds: float) -> str:
    """A duration in the unit that people would use."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


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

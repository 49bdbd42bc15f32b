"""The plan of a training, before a step is made: rows, tokens, steps, values, memory, time."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from srt_cli import console
from srt_cli.training.fitting import GIB, Fit
from srt_cli.training.recipes import Chosen
from srt_cli.training.setup import Setup

BINS: Final = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


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
    """Everything that `--dry-run` shows."""

    stage: str
    rows: int
    reasons: Mapping[str, int]
    """Rows that fall out, per reason."""
    train: int
    held_out: int
    too_long: str | None
    """What a run would do about rows over the limit, if there are any."""
    lengths: Mapping[str, Sequence[int]]
    """Tokens of each part of each row."""
    steps: Steps
    chosen: Chosen
    fit: Fit
    packing: str | None
    masks: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    """For some rows a title, and stretches of text with the part that is trained, or none."""
    warnings: Sequence[str]
    measured: Measured | None


def show_plan(plan: Plan) -> None:
    """Print the plan as the command's result."""
    for title, stretches in plan.masks:
        console.marked(title, stretches)
    _show_rows(plan)
    _show_tokens(plan.lengths)
    _show_values(plan.chosen, plan.stage, adapters=plan.fit.setup.adapters is not None)
    _show_memory(plan.fit, plan.stage)
    _show_steps(plan)
    for warning in plan.warnings:
        console.warn(warning)


def _show_rows(plan: Plan) -> None:
    rows = [["read", str(plan.rows)], ["trained on", str(plan.train)]]
    rows += [["held out", str(plan.held_out)]] if plan.held_out else []
    rows += [[f"dropped: {reason}", str(count)] for reason, count in plan.reasons.items()]
    console.table("rows", ["", "rows"], rows)
    if plan.too_long is not None:
        console.result(f"{plan.too_long}\n")


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
        "tokens, and how many rows have so many",
        ["", "all", "mean", "median", "most", *heads],
        rows,
    )


def _show_values(chosen: Chosen, stage: str, *, adapters: bool) -> None:
    values = chosen.settings("dpo" if stage == "dpo" else "sft")
    rows = [
        [name, _plain(value), chosen.sources.get(name, "")]
        for name, value in values.items()
        if adapters or not name.startswith("lora_")
    ]
    console.table("values", ["", "value", "from"], rows)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _show_memory(fit: Fit, stage: str) -> None:
    place = fit.setup.place
    if fit.memory is None:
        console.result("memory: not known before the model is loaded\n")
        return
    parts = vars(fit.memory) | {"together": fit.memory.total}
    if stage == "sft":
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


def _show_steps(plan: Plan) -> None:
    steps, setup = plan.steps, plan.fit.setup
    console.result(describe_steps(steps, setup))
    if plan.packing is not None:
        console.result(plan.packing)
    if plan.measured is not None:
        _show_time(steps, plan.measured)


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
    """How rows, passes and steps hang together, in one sentence."""
    most = setup.values.global_batch
    if steps.packed and steps.rows > most:
        rows = f"about {most}"
    elif steps.rows % most and steps.rows > most:
        rows = f"up to {most}"
    else:
        rows = str(min(steps.rows, most))
    passes = min(steps.accumulation, steps.passes_an_epoch)
    return (
        f"{_many(steps.total, 'step')}: {_many(steps.epochs, 'epoch')} of {steps.an_epoch}, "
        f"each of {rows} rows in {_many(passes, 'forward pass', 'es')}"
        + (f" of each of {setup.processes} processes" if setup.processes > 1 else "")
    )


def _many(count: float, noun: str, plural: str = "s") -> str:
    return f"{count:g} {noun}{'' if count == 1 else plural}"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

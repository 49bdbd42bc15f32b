"""A few real steps on a copy that is thrown away: how fast this machine trains.

They are shorter than the training's, so that passes and optimizer are timed apart: a real step has
more passes for each call of the optimizer.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

import orjson
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from srt_cli import console
from srt_cli.runs.run import Manifest, Run
from srt_cli.training.order import LengthGroupedOrder
from srt_cli.training.plan import Measured
from srt_cli.training.setup import Setup

Row = TypeVar("Row")

STEPS: Final = 3
"""The first warms up and is not counted."""
PASSES_A_STEP: Final = 2


def probe_setup(setup: Setup) -> Setup:
    """The same training with short steps, and few of them."""
    passes = min(PASSES_A_STEP, setup.accumulation)
    values = replace(setup.values, global_batch=setup.micro_batch * setup.processes * passes)
    return replace(
        setup,
        values=values,
        fields=setup.fields | {"max_steps": STEPS},
        early_stopping=None,
        report_to=(),
    )


def rows_of_probe(rows: Sequence[Row], lengths: Sequence[int], setup: Setup) -> list[Row]:
    """The rows that the training itself would take first: of all lengths, like ones together."""
    order = LengthGroupedOrder(lengths, setup.micro_batch, setup.seed)
    needed = STEPS * probe_setup(setup).values.global_batch
    return [rows[index] for index in islice(order, needed)]


def probe(command: str, train: Callable[[Run], Any]) -> Measured:
    """Let `train` train into a directory that is gone afterwards, and read its figures off."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with _thrown_away() as folder, _optimizer_clock() as optimizer:
        run = Run(Manifest(command=command, settings={}, runtime={}), folder, None)
        console.hush()
        try:
            train(run)
        finally:
            console.speak()
        rows = [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    steps = [row for row in rows if "loss" in row]
    updates = optimizer.seconds or [0.0] * len(steps)
    # The first step warms up.
    counted, updates = (steps[1:], updates[1:]) if len(steps) > 1 else (steps, updates)
    tokens = sum(row["tokens"] for row in counted)
    seconds = sum(row["seconds"] for row in counted)
    reference = run.manifest.tallies.get("reference_seconds", 0.0)
    return Measured(
        seconds_a_token=(seconds - sum(updates)) / tokens,
        seconds_an_update=sum(updates) / len(updates),
        reference_seconds_a_token=reference / sum(row["tokens"] for row in steps),
        seconds=sum(row["seconds"] for row in steps) + reference,
        peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )


@dataclass
class _OptimizerClock:
    seconds: list[float] = field(default_factory=list)
    """Of each call of an optimizer's `step`."""
    started: float = 0.0

    def start(self, *_: Any) -> None:
        self.started = _now()

    def stop(self, *_: Any) -> None:
        self.seconds.append(_now() - self.started)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


@contextmanager
def _optimizer_clock() -> Iterator[_OptimizerClock]:
    clock = _OptimizerClock()
    hooks = (
        register_optimizer_step_pre_hook(clock.start),
        register_optimizer_step_post_hook(clock.stop),
    )
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _thrown_away() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="srt-probe-") as folder:
        yield Path(folder)

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
from typing import Any, Final

import orjson
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from srt_cli import console
from srt_cli.runs.run import Manifest, Run
from srt_cli.training.batches import LengthGroupedOrder
from srt_cli.training.loop import METRICS, Tuned
from srt_cli.training.plan import Measured, Ready
from srt_cli.training.rows import Example
from srt_cli.training.samples import Sampler
from srt_cli.training.setup import Setup, Training

STEPS: Final = 3
"""The first warms up and is not counted."""
PASSES_A_STEP: Final = 2


def probe(
    ready: Ready[Example],
    lengths: Sequence[int],
    train: Callable[[Training, list[Example]], Tuned],
) -> Measured:
    """Let `train` train into a directory that is gone afterwards, and read its figures off.

    It gets the rows that the training itself would take first: of all `lengths`, like ones together.
    """
    setup = _with_short_steps(ready.fit.setup)
    order = LengthGroupedOrder(lengths, setup.micro_batch, setup.options.seed)
    needed = STEPS * setup.values.global_batch
    rows = [ready.prepared.train[index] for index in islice(order, needed)]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with (
        tempfile.TemporaryDirectory(prefix="srt-probe-") as folder,
        _optimizer_clock() as optimizer,
    ):
        run = Run(Manifest(command=setup.stage, settings={}, runtime={}), Path(folder), None)
        packed = ready.packing is not None and ready.packing.on
        training = Training(setup, ready.chat, run, Sampler(ready.chat, []), packed)
        console.hush()
        try:
            tuned = train(training, rows)
        finally:
            console.speak()
        metrics = [orjson.loads(line) for line in (run.out / METRICS).read_bytes().splitlines()]
    steps = [row for row in metrics if "loss" in row]
    updates = optimizer.seconds or [0.0] * len(steps)
    # The first step warms up.
    counted, updates = (steps[1:], updates[1:]) if len(steps) > 1 else (steps, updates)
    tokens = sum(row["tokens"] for row in counted)
    seconds = sum(row["seconds"] for row in counted)
    return Measured(
        seconds_a_token=(seconds - sum(updates)) / tokens,
        seconds_an_update=sum(updates) / len(updates),
        reference_seconds_a_token=tuned.reference_seconds / sum(row["tokens"] for row in steps),
        seconds=sum(row["seconds"] for row in steps) + tuned.reference_seconds,
        peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )


def _with_short_steps(setup: Setup) -> Setup:
    """The same training with short steps, and few of them."""
    passes = min(PASSES_A_STEP, setup.accumulation)
    return replace(
        setup,
        options=replace(setup.options, early_stopping=None, report_to=()),
        values=replace(setup.values, global_batch=setup.micro_batch * setup.processes * passes),
        fields={**setup.fields, "max_steps": STEPS},
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

"""A few real steps on a copy that is thrown away: how many tokens a second this machine trains."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import orjson
import torch

from srt_cli import console
from srt_cli.artifacts import Manifest, Run
from srt_cli.training.plan import Measured
from srt_cli.training.setup import Setup

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


def rows_needed(setup: Setup) -> int:
    """How many rows the probe's steps take."""
    return STEPS * probe_setup(setup).values.global_batch


def probe(command: str, train: Callable[[Run], Any]) -> Measured:
    """Let `train` train into a directory that is gone afterwards, and read its figures off."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with _thrown_away() as folder:
        run = Run(Manifest(command=command, settings={}, runtime={}), folder, None)
        console.hush()
        try:
            train(run)
        finally:
            console.speak()
        rows = [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    steps = [row for row in rows if "loss" in row]
    counted = steps[1:] or steps
    seconds = sum(row["seconds"] for row in counted)
    return Measured(
        tokens_per_second=sum(row["tokens"] for row in counted) / seconds,
        seconds=sum(row["seconds"] for row in steps),
        peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    )


@contextmanager
def _thrown_away() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="srt-probe-") as folder:
        yield Path(folder)

"""Run a TRL trainer so that it can be watched, stopped, killed and resumed bit for bit."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
import torch
from transformers import PrinterCallback, ProgressCallback

from srt_cli import console
from srt_cli.report.training import write_training_page
from srt_cli.runs.run import Run
from srt_cli.training.checkpoints import (
    fingerprint,
    full_disk_in_one_sentence,
    newest_checkpoint,
    refuse_other_training,
)
from srt_cli.training.health import DpoStart, never_left_warm_up
from srt_cli.training.meter import MeteredTrainer, meter_for, throughput
from srt_cli.training.processes import AgreedStop, is_main, team
from srt_cli.training.samples import SAMPLES, Sampler, summarise
from srt_cli.training.setup import Setup
from srt_cli.training.trackers import keep_events_beside, tracking
from srt_cli.training.watch import METRICS, Watch, best_evaluation


@dataclass(frozen=True)
class Trained:
    """What a finished training came to."""

    steps: int
    first_loss: float | None
    final_loss: float | None
    seconds: float
    """Of this call alone, evaluations and checkpoints included; the rates count training only."""
    tokens: int = 0
    trained_tokens: int = 0
    tokens_per_second: float = 0.0
    trained_tokens_per_second: float = 0.0
    mfu: float | None = None
    best_step: int | None = None
    """Whose weights were kept, when `--early-stopping` looked for the best."""
    best_eval_loss: float | None = None

    def sentence(self) -> str:
        """For the terminal."""
        text = f"{self.steps} steps in {self.seconds:.0f} s"
        if self.tokens_per_second:
            text += (
                f", {self.tokens_per_second:,.0f} tokens/s "
                f"({self.trained_tokens_per_second:,.0f} trained)"
            )
        if self.mfu is not None:
            text += f", MFU {self.mfu:.0%}"
        if self.best_step is not None:
            text += f"; best weights of step {self.best_step}, eval loss {self.best_eval_loss:.3f}"
        return text


def train(
    trainer: MeteredTrainer,
    run: Run,
    setup: Setup,
    sampler: Sampler,
    start: DpoStart | None = None,
) -> Trained:
    """Train to the end, from the newest whole checkpoint if there is one.

    Ctrl-C and SIGTERM finish the step, save a checkpoint and raise `KeyboardInterrupt`. Raises
    `SrtError` for a checkpoint of another training, what `health` cannot let pass, or a full disk.
    """
    run.at_end(lambda: write_training_page(run.out, run.manifest))
    mark = fingerprint(run, setup)
    checkpoint, done = team().share(newest_checkpoint(run.out))
    if checkpoint is not None:
        refuse_other_training(checkpoint, mark)
        console.say(f"going on from step {done} ({checkpoint})")
    rows = team().share(_keep_until(run.out / METRICS, done) if is_main() else None)
    sampler.rows = _keep_until(run.out / SAMPLES, done) if is_main() else []
    frozen = setup.adapters is not None
    trainer.meter = meter_for(trainer.model, setup.place, setup.processes, base_frozen=frozen)
    started = time.monotonic()
    trackers = setup.report_to if is_main() else ()
    with tracking(trackers, run.out), console.progress("training", None) as progress:
        watch = Watch(
            run, trainer.meter, sampler, progress, start, mark, setup.save_every,
            setup.early_stopping,
            steps=[row for row in rows if "loss" in row],
            evaluations=[row for row in rows if "loss" not in row],
        )  # fmt: skip
        _attach(trainer, watch)
        keep_events_beside(trainer, run.out)
        with _stop_after_the_step(watch), _deterministic(setup), full_disk_in_one_sentence(run):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    run.manifest.progress = f"{state.global_step} of {state.max_steps} steps"
    if watch.stop_asked:
        raise AgreedStop
    if watch.stopped_early:
        run.manifest.progress += ", stopped early"
    if warning := never_left_warm_up(watch.steps):
        run.warn(warning)
    run.manifest.tallies |= {"samples": summarise(sampler.rows)} if sampler.rows else {}
    return _come_to(watch, state.global_step, time.monotonic() - started)


def _attach(trainer: MeteredTrainer, watch: Watch) -> None:
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    # Set only now: transformers would insist that its own schedule of checkpoints finds the best.
    trainer.args.load_best_model_at_end = watch.patience is not None


def _come_to(watch: Watch, steps: int, seconds: float) -> Trained:
    best = best_evaluation(watch.evaluations) if watch.patience is not None else None
    figures: dict[str, Any] = throughput(watch.steps)
    return Trained(
        steps=steps,
        first_loss=watch.steps[0]["loss"] if watch.steps else None,
        final_loss=watch.steps[-1]["loss"] if watch.steps else None,
        seconds=seconds,
        best_step=best.step if best else None,
        best_eval_loss=best.loss if best else None,
        **figures,
    )


@contextmanager
def _deterministic(setup: Setup) -> Iterator[None]:
    """transformers has chosen the kernels when it made the trainer; here that ends again."""
    if setup.deterministic:
        console.say(
            "deterministic: only kernels that give the same result every time; on a GPU each is "
            "waited for, which is slower"
        )
    try:
        yield
    finally:
        if setup.deterministic:
            torch.use_deterministic_algorithms(False)


@contextmanager
def _stop_after_the_step(watch: Watch) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the step and saves; the second stops at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if watch.stop_asked:
            raise KeyboardInterrupt
        watch.stop_asked = True
        console.say("stopping after this step, with a checkpoint; once more stops at once")

    earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Lines behind the checkpoint come again, and must not stand there twice; returns the others."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if step and row["step"] <= step:
            kept.append(row)
    option = orjson.OPT_APPEND_NEWLINE
    path.write_bytes(b"".join(orjson.dumps(row, option=option) for row in kept))
    return kept

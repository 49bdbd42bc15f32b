"""Run a TRL trainer so that it can be watched, stopped, killed and resumed bit for bit."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import orjson
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from srt_cli import console
from srt_cli.artifacts import Run
from srt_cli.errors import SrtError
from srt_cli.training.checkpoints import mark_whole, newest_checkpoint
from srt_cli.training.processes import AgreedStop, is_main, team

SAVE_EVERY_SECONDS: Final = 600.0
LN_2_TOLERANCE: Final = 5e-3


@dataclass
class _Watch(TrainerCallback):
    """Sees every step: progress, metrics, health, checkpoints, and the user's wish to stop."""

    out: Path
    save_every: int | None
    tokens_an_epoch: int
    first_loss: float | None
    """What the first batch's loss must be, if that is known beforehand (DPO: ln 2)."""
    advance: Callable[[int, str], None] = lambda steps, note: None
    stop_asked: bool = False
    losses: list[float] = field(default_factory=list)
    _saved_at: float = field(default_factory=time.monotonic)
    _started: float = field(default_factory=time.monotonic)
    _started_epoch: float | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        due = time.monotonic() - self._saved_at > SAVE_EVERY_SECONDS
        if self.save_every is not None:
            due = state.global_step % self.save_every == 0
        # Clocks and signals differ between processes; what they do next may not.
        due, self.stop_asked = team().any(due, self.stop_asked)
        if state.global_step < state.max_steps:
            control.should_save = due or self.stop_asked
        if self.stop_asked:
            control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        team().wait()
        if is_main():
            mark_whole(self.out, state.global_step)
        self._saved_at = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self.losses.append(loss)
        if is_main():
            with open(self.out / "metrics.jsonl", "ab") as metrics:
                metrics.write(orjson.dumps({"step": state.global_step, **logs}) + b"\n")
        if not math.isfinite(loss):
            raise SrtError(
                f"the loss of step {state.global_step} is {loss}: training has diverged. "
                "Lower --learning-rate, or look at the data of this step."
            )
        self._check_first_loss(loss, state)
        self.advance(1, f"loss {loss:.3f}  {self._tokens_per_second(state)}")

    def _check_first_loss(self, loss: float, state: TrainerState) -> None:
        if self.first_loss is None or state.global_step != 1:
            return
        if abs(loss - self.first_loss) > LN_2_TOLERANCE:
            raise SrtError(
                f"the first batch's loss is {loss:.4f}, not ln 2 = {self.first_loss:.4f}: the "
                "reference is not the model that training starts from. Start anew with --overwrite."
            )

    def _tokens_per_second(self, state: TrainerState) -> str:
        epoch = state.epoch or 0.0
        if self._started_epoch is None:
            self._started_epoch = epoch
            self._started = time.monotonic()
            return ""
        elapsed = time.monotonic() - self._started
        done = (epoch - self._started_epoch) * self.tokens_an_epoch
        return f"{done / elapsed:.0f} tokens/s" if elapsed > 0 else ""


@dataclass(frozen=True)
class Trained:
    """What a finished training came to."""

    steps: int
    first_loss: float | None
    final_loss: float | None
    seconds: float


def train(
    trainer: Trainer,
    run: Run,
    *,
    save_every: int | None,
    tokens_an_epoch: int,
    first_loss: float | None = None,
) -> Trained:
    """Train to the end, from the newest whole checkpoint if there is one.

    Ctrl-C and SIGTERM finish the step, save a checkpoint and raise `KeyboardInterrupt`. Raises
    `SrtError` on a loss that is not finite, or a first DPO loss that is not ln 2.
    """
    checkpoint, done = team().share(newest_checkpoint(run.out))
    if checkpoint is not None:
        console.say(f"going on from step {done} ({checkpoint})")
    if is_main():
        _keep_metrics_until(run.out / "metrics.jsonl", done)
    watch = _Watch(run.out, save_every, tokens_an_epoch, first_loss)
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    steps = _steps_of(trainer)
    started = time.monotonic()
    with console.progress("training", steps) as progress, _stop_after_the_step(watch):
        progress.advance(done)
        watch.advance = progress.advance
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if watch.stop_asked:
        run.manifest.progress = f"{trainer.state.global_step} of {steps} steps"
        raise AgreedStop
    run.manifest.progress = f"{steps} of {steps} steps"
    losses = [
        float(entry["loss"])
        for line in (run.out / "metrics.jsonl").read_bytes().splitlines()
        if "loss" in (entry := orjson.loads(line))
    ]
    return Trained(
        steps=trainer.state.global_step,
        first_loss=losses[0] if losses else None,
        final_loss=losses[-1] if losses else None,
        seconds=time.monotonic() - started,
    )


def _steps_of(trainer: Trainer) -> int:
    args = trainer.args
    dataset: Any = trainer.train_dataset
    batches = math.ceil(len(dataset) / (args.per_device_train_batch_size * team().size))
    steps_an_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * steps_an_epoch)


@contextmanager
def _stop_after_the_step(watch: _Watch) -> Iterator[None]:
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


def _keep_metrics_until(path: Path, step: int) -> None:
    """Steps behind the checkpoint are trained again, and must not stand there twice."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            if orjson.loads(line)["step"] <= step:
                kept.append(line)
        except (orjson.JSONDecodeError, KeyError):
            continue
    path.write_bytes(b"".join(kept))

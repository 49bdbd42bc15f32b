"""Sees every step of a training: progress, metrics, health, samples, checkpoints, and when to stop."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from srt_cli.console import ProgressLine
from srt_cli.errors import SrtError
from srt_cli.runs.run import Run
from srt_cli.training import health
from srt_cli.training.arguments import CHECKPOINTS
from srt_cli.training.checkpoints import mark_whole
from srt_cli.training.meter import Meter
from srt_cli.training.place import sharding
from srt_cli.training.processes import is_main, team
from srt_cli.training.samples import Sampler

SAVE_EVERY_SECONDS: Final = 600.0
METRICS: Final = "metrics.jsonl"
SHOWN: Final = {
    "loss": ("loss", ".3f"),
    "eval_loss": ("eval loss", ".3f"),
    "learning_rate": ("lr", ".2g"),
    "grad_norm": ("grad norm", ".2f"),
    "rewards/margins": ("margin", ".3f"),
    "rewards/accuracies": ("accuracy", ".0%"),
    "logps/chosen": ("log p chosen", ".1f"),
    "logps/rejected": ("rejected", ".1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "mfu": ("MFU", ".0%"),
}


@dataclass
class Watch(TrainerCallback):
    """TRL's trainer calls it after every step, evaluation and checkpoint."""

    run: Run
    meter: Meter
    sampler: Sampler
    progress: ProgressLine
    start: health.DpoStart | None
    fingerprint: Mapping[str, Any]
    save_every: int | None
    patience: int | None
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Lines of `metrics.jsonl` so far that are training steps."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """The other lines."""
    stop_asked: bool = False
    stopped_early: bool = False
    _saved_at: float = field(default_factory=time.monotonic)
    _warned: set[str] = field(default_factory=set)

    @property
    def out(self) -> Path:
        return self.run.out

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.expect(state.max_steps)
        self.progress.advance(state.global_step)
        if self.patience is not None and (best := best_evaluation(self.evaluations)) is not None:
            # The directory may have been moved since.
            state.best_model_checkpoint = str(self._checkpoint(best.step))
        if state.global_step == 0:
            self._sample(state, kwargs["model"])
        self.meter.restart()

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

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        row = {"step": state.global_step, **(logs or {})}
        is_step = "loss" in row
        if not is_step and not any(name.startswith("eval_") for name in row):
            return
        (self.steps if is_step else self.evaluations).append(row)
        if is_main():
            with open(self.out / METRICS, "ab") as metrics:
                metrics.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        if is_step:
            self._check_health(state)
        self.progress.advance(int(is_step), figures=figures_of(row))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.patience is not None and (best := best_evaluation(self.evaluations)) is not None:
            if best.step == state.global_step:
                state.best_model_checkpoint = str(self._checkpoint(best.step))
                control.should_save = True
            elif best.waited >= self.patience:
                control.should_training_stop = self.stopped_early = True
        self._sample(state, kwargs["model"])
        self.meter.restart()
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        team().wait()
        if is_main():
            mark_whole(self.out, state.global_step, self.fingerprint)
        self._saved_at = time.monotonic()
        self.meter.restart()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.stop_asked:
            self._sample(state, kwargs["model"])

    def _checkpoint(self, step: int) -> Path:
        return self.out / CHECKPOINTS / f"checkpoint-{step}"

    def _sample(self, state: TrainerState, model: Any) -> None:
        # Weights that GPUs share would have to be gathered for every token.
        if is_main() and sharding() is None:
            self.sampler.sample(model, state.global_step, self.out)
        self._warn("length", health.length_drift(self.sampler.rows))

    def _check_health(self, state: TrainerState) -> None:
        aborts: list[health.Rule] = [health.diverged, health.nothing_trained]
        if self.start is not None:
            aborts.append(health.wrong_start(self.start))
        for rule in aborts:
            if (message := rule(self.steps)) is not None:
                raise SrtError(message)
        self._warn("gradient", health.exploding_gradient(self.steps))
        if health.looked_at_now(state.global_step) or state.global_step == state.max_steps:
            for name, warns in health.WARNINGS.items():
                self._warn(name, warns(self.steps))

    def _warn(self, name: str, message: str | None) -> None:
        """Each kind of warning comes once."""
        if message is not None and name not in self._warned:
            self._warned.add(name)
            self.run.warn(message)


@dataclass(frozen=True)
class Best:
    """The lowest validation loss so far."""

    step: int
    loss: float
    waited: int
    """Evaluations since then."""


def best_evaluation(rows: Sequence[Mapping[str, Any]]) -> Best | None:
    """Read off the metrics, so that it survives a resume; null before the first evaluation.

    Step 0 is left out: its weights are the ones that training began with.
    """
    evaluated = [
        (row["eval_loss"], row["step"]) for row in rows if "eval_loss" in row and row["step"]
    ]
    if not evaluated:
        return None
    loss, step = min(evaluated)
    return Best(step, loss, sum(later > step for _, later in evaluated))


def figures_of(row: Mapping[str, Any]) -> dict[str, str]:
    """What the terminal shows of a step or an evaluation."""
    return {label: format(row[name], spec) for name, (label, spec) in SHOWN.items() if name in row}

"""Run a TRL trainer so that it can be watched, stopped, killed and resumed bit for bit."""

import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

import orjson
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from srt_cli import console
from srt_cli.console import ProgressLine
from srt_cli.errors import SrtError
from srt_cli.report.training import write_training_page
from srt_cli.tables import many
from srt_cli.training import health
from srt_cli.training.batches import LengthGroupedOrder
from srt_cli.training.checkpoints import (
    fingerprint,
    full_disk_in_one_sentence,
    mark_whole,
    newest_checkpoint,
    refuse_other_training,
)
from srt_cli.training.memory import keep_freed_memory
from srt_cli.training.options import TrainingOptions
from srt_cli.training.plan import duration
from srt_cli.training.processes import AgreedStop, is_main, team
from srt_cli.training.samples import SAMPLES, summarise
from srt_cli.training.setup import (
    CHECKPOINTS,
    Training,
    TrainingPlace,
    keep_events_beside,
    sharding,
    tracking,
    training_arguments,
)

EVALUATIONS_A_RUN: Final = 10
SAVE_EVERY_SECONDS: Final = 600.0
# Multiply-adds count twice; forward 2, and backward 2 for the activations and 2 for the weights.
FLOPS_A_PARAMETER: Final = 6
FLOPS_A_PARAMETER_OF_A_FROZEN_BASE: Final = 4
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


@dataclass(frozen=True)
class Trained:
    """The figures of a finished training."""

    steps: int
    first_loss: float | None
    final_loss: float | None
    seconds: float
    """Of all these steps, like the rates: without evaluations, samples and checkpoints."""
    tokens: int = 0
    trained_tokens: int = 0
    tokens_per_second: float = 0.0
    trained_tokens_per_second: float = 0.0
    mfu: float | None = None
    best_step: int | None = None
    """The step whose weights were kept under `--early-stopping`."""
    best_eval_loss: float | None = None
    planned_steps: int | None = None
    epochs: float | None = None
    """Passes over the data that these steps made."""

    def passes(self, planned: float) -> str:
        """Passes over the data, for the model card."""
        if self.epochs is None or self.epochs > planned - 0.005:  # they are counted in floats
            return f"{planned}"
        return f"{self.epochs:.3g} of {planned:g}"

    def sentence(self) -> str:
        """For the terminal."""
        text = f"{many(self.steps, 'step')} in {duration(self.seconds)} of training"
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


class Tuned(NamedTuple):
    """A trained model with its figures."""

    model: PreTrainedModel | PeftModel
    """Its adapter apart."""
    trained: Trained
    reference_seconds: float = 0.0
    """How long dpo's reference took, before the first step."""


@dataclass
class TokenMeter:
    """Counts tokens over all processes; its clock stands still while nothing is trained."""

    flops_a_token: float = 0.0
    peak_flops: float | None = None
    """Of all devices together; None where it is not known (and on every CPU)."""
    _counts: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.long))
    _started: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        """Forget the time since the last reading: an evaluation, samples, a checkpoint."""
        self._started = time.monotonic()

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Take note of a forward pass's batch."""
        counts = count_tokens(inputs)
        self._counts = self._counts.to(counts.device) + counts

    def read(self, trainer: Trainer) -> dict[str, float]:
        """The figures since the last reading, under their names in `metrics.jsonl`."""
        counts: Any = self._counts.to(trainer.accelerator.device)
        tokens, trained = trainer.accelerator.reduce(counts, reduction="sum").tolist()
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        self._counts, self._started = torch.zeros_like(self._counts), now
        figures = {
            "tokens": tokens,
            "trained_tokens": trained,
            "seconds": round(seconds, 6),
            "tokens_per_second": round(tokens / seconds, 3),
        }
        share = mfu(tokens / seconds, self.flops_a_token, self.peak_flops)
        return figures if share is None else figures | {"mfu": round(share, 4)}


class WatchedTrainer(Trainer):
    """A trainer with its own order of rows, whose log says what each step trained and how fast."""

    meter: TokenMeter = TokenMeter()

    def __init__(self, *, order: LengthGroupedOrder, **arguments: Any) -> None:
        self._order = order
        super().__init__(**arguments)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthGroupedOrder:
        return self._order

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.meter.count(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self.meter.read(self)
        super().log(logs, *args, **kwargs)


def trainer_arguments(training: Training, *, evaluates: bool) -> dict[str, Any]:
    """For TRL's configs; evaluations come before the first step, at intervals, and at the end."""
    arguments = training_arguments(training.setup, training.out)
    if evaluates:
        arguments |= {
            "eval_strategy": "steps",
            # A float below 1 is a share of the steps.
            "eval_steps": training.setup.options.eval_every or 1 / EVALUATIONS_A_RUN,
            "eval_on_start": team().share(newest_checkpoint(training.out)[0] is None),
            "per_device_eval_batch_size": training.setup.micro_batch,
        }
    return arguments


def train(
    trainer: WatchedTrainer, training: Training, start: health.DpoStart | None = None
) -> Trained:
    """Train to the end, from the newest whole checkpoint if there is one.

    Ctrl-C, SIGTERM and SIGHUP finish the step, save a checkpoint and raise `KeyboardInterrupt`. Raises
    `SrtError` for a checkpoint of another training, a failed check of `health`, or a full disk.
    """
    run, setup, options = training.run, training.setup, training.setup.options
    run.at_end(lambda: write_training_page(run.out, run.manifest))
    mark = fingerprint(training)
    checkpoint, done = team().share(newest_checkpoint(run.out))
    if checkpoint is not None:
        refuse_other_training(checkpoint, mark)
        console.say(f"going on from step {done} ({checkpoint})")
    rows = team().share(_keep_until(run.out / METRICS, done) if is_main() else None)
    sampler = training.sampler
    sampler.rows = _keep_until(run.out / SAMPLES, done) if is_main() else []
    frozen = setup.adapters is not None
    if setup.place.keeps_freed:
        keep_freed_memory()
    trainer.meter = meter_for(trainer.model, setup.place, setup.processes, base_frozen=frozen)
    started = time.monotonic()
    trackers = options.report_to if is_main() else ()
    with tracking(trackers, run.out), console.progress("training", None) as progress:
        watch = Watch(
            training, trainer.meter, progress, start, mark,
            steps=[row for row in rows if "loss" in row],
            evaluations=[row for row in rows if "loss" not in row],
        )  # fmt: skip
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        # Set only now: transformers would insist that its own schedule of checkpoints finds the best.
        trainer.args.load_best_model_at_end = options.early_stopping is not None
        keep_events_beside(trainer, run.out)
        with (
            _stop_after_the_step(watch),
            _deterministic(options.deterministic),
            full_disk_in_one_sentence(run),
        ):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    early = ", stopped early" if watch.stopped_early and not watch.stop_asked else ""
    run.reached(f"{state.global_step} of {state.max_steps} steps{early}")
    if watch.stop_asked:
        raise AgreedStop
    if warning := health.never_left_warm_up(watch.steps):
        run.warn(warning)
    if sampler.rows:
        run.tally({"samples": summarise(sampler.rows)})
    best = best_evaluation(watch.evaluations) if options.early_stopping is not None else None
    figures: dict[str, Any] = {"seconds": time.monotonic() - started, **throughput(watch.steps)}
    return Trained(
        steps=state.global_step,
        first_loss=watch.steps[0]["loss"] if watch.steps else None,
        final_loss=watch.steps[-1]["loss"] if watch.steps else None,
        planned_steps=state.max_steps,
        epochs=state.epoch,
        best_step=best.step if best else None,
        best_eval_loss=best.loss if best else None,
        **figures,
    )


@dataclass
class Watch(TrainerCallback):
    """The callback that TRL's trainer calls after every step, evaluation and checkpoint."""

    training: Training
    meter: TokenMeter
    progress: ProgressLine
    start: health.DpoStart | None
    mark: Mapping[str, Any]
    """The fingerprint that marks every checkpoint."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Lines of `metrics.jsonl` so far that are training steps."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """The other lines."""
    stop_asked: bool = False
    stopped_early: bool = False
    _saved_at: float = field(default_factory=time.monotonic)
    _warned: set[str] = field(default_factory=set)

    @property
    def options(self) -> TrainingOptions:
        return self.training.setup.options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self.progress.expect(state.max_steps)
        self.progress.advance(state.global_step)
        if (
            self.options.early_stopping is not None
            and (best := best_evaluation(self.evaluations)) is not None
        ):
            # The directory may have been moved since.
            state.best_model_checkpoint = str(self._checkpoint(best.step))
        if state.global_step == 0:
            self._sample(state, more["model"])
        self.meter.restart()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> TrainerControl:
        due = time.monotonic() - self._saved_at > SAVE_EVERY_SECONDS
        if self.options.save_every is not None:
            due = state.global_step % self.options.save_every == 0
        # Clocks and signals differ between processes; what they do next may not.
        due, self.stop_asked = team().any(due, self.stop_asked)
        if state.global_step < state.max_steps:
            control.should_save = due or self.stop_asked
        if self.stop_asked:
            control.should_training_stop = True
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        row = {"step": state.global_step, **more["logs"]}
        is_step = "loss" in row
        if not is_step and not any(name.startswith("eval_") for name in row):
            return
        (self.steps if is_step else self.evaluations).append(row)
        if is_main():
            with open(self.training.out / METRICS, "ab") as metrics:
                metrics.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        if is_step:
            self._check_health(state)
        self.progress.advance(int(is_step), figures=figures_of(row))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> TrainerControl:
        if (
            self.options.early_stopping is not None
            and (best := best_evaluation(self.evaluations)) is not None
        ):
            if best.step == state.global_step:
                state.best_model_checkpoint = str(self._checkpoint(best.step))
                control.should_save = True
            elif best.waited >= self.options.early_stopping:
                control.should_training_stop = self.stopped_early = True
        self._sample(state, more["model"])
        self.meter.restart()
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        team().wait()
        if is_main():
            mark_whole(self.training.out, state.global_step, self.mark)
        self._saved_at = time.monotonic()
        self.meter.restart()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if not self.stop_asked:
            self._sample(state, more["model"])

    def _checkpoint(self, step: int) -> Path:
        return self.training.out / CHECKPOINTS / f"checkpoint-{step}"

    def _sample(self, state: TrainerState, model: Any) -> None:
        # Weights that GPUs share would have to be gathered for every token.
        if is_main() and sharding() is None:
            self.training.sampler.sample(model, state.global_step, self.training.out)
        self._warn("length", health.length_drift(self.training.sampler.rows))

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
        """Warn once for each kind."""
        if message is not None and name not in self._warned:
            self._warned.add(name)
            self.training.run.warn(message)


@dataclass(frozen=True)
class Best:
    """The lowest validation loss so far."""

    step: int
    loss: float
    waited: int
    """Evaluations since then."""


def best_evaluation(rows: Sequence[Mapping[str, Any]]) -> Best | None:
    """Find the best evaluation in the metrics, so that it survives a resume; None before the first.

    Step 0 is left out: its weights are the ones that training began with.
    """
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row and row["step"]}
    # None is what stands on disk for a loss that is no number.
    finite = [
        (loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)
    ]
    if not finite:
        return None
    loss, step = min(finite)
    return Best(step, loss, sum(later > step for later in losses))


def figures_of(row: Mapping[str, Any]) -> dict[str, str]:
    """What the terminal shows of a step or an evaluation."""
    return {label: format(row[name], spec) for name, (label, spec) in SHOWN.items() if name in row}


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """Undo the global switch that transformers set when it made the trainer."""
    if on:
        console.say(
            "deterministic: only kernels that give the same result every time; on a GPU each is "
            "waited for, which is slower"
        )
    try:
        yield
    finally:
        if on:
            torch.use_deterministic_algorithms(False)


@contextmanager
def _stop_after_the_step(watch: Watch) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP ends the step and saves; the second stops at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if watch.stop_asked:
            raise KeyboardInterrupt
        watch.stop_asked = True
        console.say("stopping after this step, with a checkpoint; once more stops at once")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    earlier = {number: signal.signal(number, ask) for number in heard}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Delete lines written after a checkpoint, whose steps will be repeated; returns the others."""
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


# --- How fast it is: tokens, trained tokens and seconds of each step ---------------------------


def count_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens and trained tokens of a batch of TRL's SFT or DPO collator, padding left out."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    tokens = mask.sum() if mask is not None else torch.tensor(ids.numel(), device=ids.device)
    if "completion_mask" in inputs:
        trained = inputs["completion_mask"].sum()
    else:
        trained = (inputs["labels"][..., 1:] != -100).sum()
    return torch.stack([tokens, trained]).long()


def meter_for(model: Any, place: TrainingPlace, processes: int, *, base_frozen: bool) -> TokenMeter:
    """A meter that knows the model's FLOPs per token and the devices' peak."""
    factor = FLOPS_A_PARAMETER_OF_A_FROZEN_BASE if base_frozen else FLOPS_A_PARAMETER
    peak = _peak_flops(place)
    return TokenMeter(
        flops_a_token=float(factor * model.num_parameters()),
        peak_flops=None if peak is None else peak * processes,
    )


def _peak_flops(place: TrainingPlace) -> float | None:
    if place.placement.device != "cuda":
        return None
    try:  # TRL's own table of devices; not part of its public interface
        from trl.trainer.utils import get_peak_flops
    except ImportError:
        return None
    dtype = "bfloat16" if place.bf16 else "float32"
    found: float | None = get_peak_flops(torch.cuda.get_device_name(), dtype)
    return found


def mfu(tokens_per_second: float, flops_a_token: float, peak_flops: float | None) -> float | None:
    """Model FLOPs utilisation: the model's FLOPs per second over the devices' peak."""
    return None if not peak_flops else tokens_per_second * flops_a_token / peak_flops


def throughput(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures of a whole training from its metrics: sums, and rates over the sums."""
    steps = [row for row in rows if row.get("seconds")]
    total = {
        name: sum(float(row[name]) for row in steps)
        for name in ("tokens", "trained_tokens", "seconds")
    }
    if not steps:
        return {}
    found = {
        "seconds": total["seconds"],
        "tokens": int(total["tokens"]),
        "trained_tokens": int(total["trained_tokens"]),
        "tokens_per_second": total["tokens"] / total["seconds"],
        "trained_tokens_per_second": total["trained_tokens"] / total["seconds"],
    }
    if all("mfu" in row for row in steps):
        # Weighted by time: the work done over the work that could have been done.
        found["mfu"] = sum(row["mfu"] * row["seconds"] for row in steps) / total["seconds"]
    return found

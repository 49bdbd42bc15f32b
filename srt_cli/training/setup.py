"""How a training runs on this machine: what the options, the recipe and the device come to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from srt_cli import console
from srt_cli.errors import UsageError
from srt_cli.training.fields import parse_fields
from srt_cli.training.lora import Adapters, adapters_of
from srt_cli.training.options import TrainingOptions
from srt_cli.training.place import TrainingPlace, decide_training_place
from srt_cli.training.processes import team
from srt_cli.training.recipes import Hyperparameters, StageName
from srt_cli.training.trackers import check_trackers

CONFIG_CLASSES: Final[Mapping[StageName, type[TrainingArguments]]] = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
}


@dataclass(frozen=True)
class Setup:
    """Everything that both trainers are told alike."""

    values: Hyperparameters
    place: TrainingPlace
    adapters: Adapters | None
    micro_batch: int
    """Rows a forward pass on one device."""
    processes: int
    seed: int
    fields: dict[str, Any]
    """`--set`: fields of TRL's config."""
    save_every: int | None
    eval_every: int | None
    """Steps between evaluations; null: ten a training."""
    early_stopping: int | None
    deterministic: bool
    report_to: tuple[str, ...]

    @property
    def accumulation(self) -> int:
        """Forward passes a step on one device."""
        return self.values.global_batch // (self.micro_batch * self.processes)


def set_up(options: TrainingOptions, values: Hyperparameters, stage: StageName) -> Setup:
    """Decide place and batches; `--micro-batch` defaults to 2 on a CPU, 8 on a GPU.

    Raises `UsageError` for a `--set` that TRL does not know or a `--global-batch` that the processes
    cannot share, `SrtError` for a method that this machine cannot do.
    """
    check_trackers(options.report_to)
    check_early_stopping(options)
    place = decide_training_place(options.method)
    micro = options.micro_batch or (8 if place.placement.device == "cuda" else 2)
    processes = team().size
    return Setup(
        values=values,
        place=place,
        adapters=adapters_of(options, values),
        micro_batch=divide_batch(values.global_batch, micro, processes),
        processes=processes,
        seed=options.seed,
        fields=parse_fields(options.set, CONFIG_CLASSES[stage]),
        save_every=options.save_every,
        eval_every=options.eval_every,
        early_stopping=options.early_stopping,
        deterministic=options.deterministic,
        report_to=options.report_to,
    )


def divide_batch(global_batch: int, micro_batch: int, processes: int) -> int:
    """Rows a forward pass: `micro_batch`, or the next smaller number that the step divides into.

    So `--global-batch` is kept exactly. Raises `UsageError` where the processes cannot share it.
    """
    if micro_batch < 1 or global_batch < 1:
        raise UsageError("--micro-batch and --global-batch are rows, 1 or more.")
    share, rest = divmod(global_batch, processes)
    if rest:
        near = max(1, share) * processes
        raise UsageError(
            f"--global-batch {global_batch} cannot be shared evenly by {processes} processes. "
            f"Choose a multiple of {processes}, such as {near}, or another number of processes."
        )
    fitting = next(rows for rows in range(min(micro_batch, share), 0, -1) if share % rows == 0)
    if fitting < micro_batch:
        console.say(
            f"{fitting} rows a forward pass instead of {micro_batch}: a step has {share} rows in each "
            "process, and they must divide"
        )
    return fitting


def check_early_stopping(options: TrainingOptions) -> None:
    """Raise `UsageError` when there is nothing to stop early by."""
    if options.early_stopping is None:
        return
    if not options.eval_split:
        raise UsageError(
            "--early-stopping looks at the validation loss: hold rows out with --eval-split, "
            "such as 0.1."
        )
    if options.early_stopping < 1:
        raise UsageError("--early-stopping waits for 1 evaluation or more.")

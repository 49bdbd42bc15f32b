"""How a training runs on this machine: what the options, the recipe and the device come to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from srt_cli.recipes import Hyperparameters, StageName
from srt_cli.training.fields import parse_fields
from srt_cli.training.lora import Adapters, adapters_of
from srt_cli.training.place import TrainingPlace, decide_training_place
from srt_cli.training_options import TrainingOptions

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

    @property
    def accumulation(self) -> int:
        """Forward passes a step on one device."""
        return max(1, self.values.global_batch // (self.micro_batch * self.processes))


def set_up(options: TrainingOptions, values: Hyperparameters, stage: StageName) -> Setup:
    """Decide place and batches; `--micro-batch` defaults to 2 on a CPU, 8 on a GPU.

    Raises `UsageError` for a `--set` that TRL does not know, `SrtError` for a method that this
    machine cannot do.
    """
    place = decide_training_place(options.method)
    micro = options.micro_batch or (8 if place.placement.device == "cuda" else 2)
    return Setup(
        values=values,
        place=place,
        adapters=adapters_of(options, values),
        micro_batch=min(micro, values.global_batch),
        processes=1,
        seed=options.seed,
        fields=parse_fields(options.set, CONFIG_CLASSES[stage]),
        save_every=options.save_every,
    )

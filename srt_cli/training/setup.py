"""How a training runs on this machine: what the options, the recipe and the device come to."""

from dataclasses import dataclass

from srt_cli.recipes import Hyperparameters
from srt_cli.training.lora import Adapters, adapters_of
from srt_cli.training.place import TrainingPlace, decide_training_place
from srt_cli.training_options import TrainingOptions


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
    fields: tuple[str, ...]
    """`--set`: fields of TRL's config, as KEY=VALUE."""
    save_every: int | None

    @property
    def accumulation(self) -> int:
        """Forward passes a step on one device."""
        return max(1, self.values.global_batch // (self.micro_batch * self.processes))


def set_up(options: TrainingOptions, values: Hyperparameters) -> Setup:
    """Decide place and batches; `--micro-batch` defaults to 2 on a CPU, 8 on a GPU."""
    place = decide_training_place(options.method)
    micro = options.micro_batch or (8 if place.placement.device == "cuda" else 2)
    return Setup(
        values=values,
        place=place,
        adapters=adapters_of(options, values),
        micro_batch=min(micro, values.global_batch),
        processes=1,
        seed=options.seed,
        fields=options.set,
        save_every=options.save_every,
    )

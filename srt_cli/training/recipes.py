"""Published recipes: what a training uses where the user says nothing, each with its source."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from srt_cli.errors import UsageError
from srt_cli.training.options import LearningRateSchedule, LossType, RecipeName, TrainingOptions

StageName = Literal["sft", "dpo"]

LARGE_PARAMETERS: Final = 30e9
SMALL_PARAMETERS: Final = 1e9
LORA_FACTOR: Final = 10.0
LORA_FACTOR_SOURCE: Final = "10 times the rate for all weights (LoRA Without Regret, 2025)"


UNSTATED: Final = ("weight_decay", "max_grad_norm", "lora_r", "lora_alpha", "lora_dropout")
"""What most recipes do not state."""


@dataclass(frozen=True)
class Recipe:
    """One stage of one recipe. `learning_rate` is for training all weights of 1B to 30B parameters."""

    source: str
    learning_rate: float
    lr_schedule: LearningRateSchedule
    warmup: float
    epochs: float
    global_batch: int
    max_length: int
    large_learning_rate: float | None = None
    """The recipe's own rate from 30B parameters on, if it has one."""
    lora_learning_rate: float | None = None
    """The recipe's own rate for adapters; without one, ten times the rate for all weights."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_r: int = 64
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    beta: float = 0.0
    loss_type: LossType = "sigmoid"
    silent_on: tuple[str, ...] = UNSTATED
    """Values that its authors do not state; for these the ones above are our choice."""


SFT: Final[Mapping[RecipeName, Recipe]] = {
    "srt": Recipe("SRT paper (arXiv 2406.07168), section 4.1", 1e-5, "cosine", 0.1, 5, 32, 8192),
    "tulu2": Recipe(
        "open-instruct, configs/train_configs/sft/tulu2_7b.yaml", 2e-5, "linear", 0.03, 3, 128, 4096,
        large_learning_rate=1e-5, lora_learning_rate=1e-4, lora_alpha=16, lora_dropout=0.1,
        silent_on=("max_grad_norm",),
    ),
    "tulu3": Recipe(
        "open-instruct, docs/tulu3.md", 5e-6, "linear", 0.03, 2, 128, 4096, large_learning_rate=2e-6
    ),
    "zephyr": Recipe(
        "alignment-handbook, recipes/zephyr-7b-beta", 2e-5, "cosine", 0.1, 1, 128, 2048,
        lora_r=16, lora_alpha=16, silent_on=("weight_decay", "max_grad_norm", "lora_dropout"),
    ),
    "smol": Recipe(
        "alignment-handbook, recipes/smollm2/sft/config_smol.yaml", 1e-3, "cosine", 0.1, 2, 128, 8192
    ),
}  # fmt: skip

DPO: Final[Mapping[RecipeName, Recipe]] = {
    "srt": Recipe(
        "SRT paper (arXiv 2406.07168), section 4.1", 5e-7, "cosine", 0.1, 1, 32, 8192, beta=0.01,
        silent_on=("global_batch", "max_length", *UNSTATED),
    ),
    "tulu2": Recipe(
        "open-instruct, configs/train_configs/dpo/default.yaml", 5e-7, "linear", 0.1, 3, 32, 2048,
        beta=0.1,
    ),
    "tulu3": Recipe(
        "open-instruct, docs/tulu3.md", 5e-7, "linear", 0.1, 1, 128, 2048,
        large_learning_rate=2e-7, beta=5.0, loss_type="sigmoid_norm",
    ),
    "zephyr": Recipe(
        "alignment-handbook, recipes/zephyr-7b-beta", 5e-7, "cosine", 0.1, 1, 128, 1024,
        lora_r=128, lora_alpha=128, beta=0.01,
        silent_on=("weight_decay", "max_grad_norm", "lora_dropout"),
    ),
    "smol": Recipe(
        "alignment-handbook, recipes/smollm2/dpo/config_smol.yaml", 1e-6, "cosine", 0.1, 2, 128,
        1024, beta=0.5,
    ),
    "apo": Recipe(
        "alignment-handbook, recipes/smollm3/dpo/apo.yaml", 1e-6, "cosine", 0.1, 1, 32, 24576,
        max_grad_norm=0.2, beta=0.05, loss_type="apo_zero",
        silent_on=("weight_decay", "lora_r", "lora_alpha", "lora_dropout"),
    ),
}  # fmt: skip

RECIPES: Final[Mapping[StageName, Mapping[RecipeName, Recipe]]] = {"sft": SFT, "dpo": DPO}


@dataclass(frozen=True)
class Hyperparameters:
    """What a training uses, under the names of the options, and where each value comes from."""

    learning_rate: float
    lr_schedule: LearningRateSchedule
    warmup: float
    epochs: float
    global_batch: int
    max_length: int
    weight_decay: float
    max_grad_norm: float
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    beta: float
    """For dpo alone, like `loss_type`."""
    loss_type: LossType
    sources: Mapping[str, str]

    def settings(self, stage: StageName) -> dict[str, Any]:
        """The values that the stage uses, for the manifest."""
        return {name: getattr(self, name) for name in _names(stage)}


def _names(stage: StageName) -> list[str]:
    names = [field.name for field in fields(Hyperparameters) if field.name != "sources"]
    return [name for name in names if stage == "dpo" or name not in ("beta", "loss_type")]


def choose_hyperparameters(
    options: TrainingOptions, stage: StageName, parameters: int | None
) -> Hyperparameters:
    """The options' values, and the recipe's where they have none.

    `parameters` is the size of the model, None while it is unknown. Raises `UsageError` for a recipe
    without this stage.
    """
    recipe = RECIPES[stage].get(options.recipe)
    if recipe is None:
        having = ", ".join(RECIPES[stage])
        raise UsageError(f"--recipe {options.recipe} has no {stage} stage. Choose one of {having}.")
    rate, rate_source = _learning_rate(recipe, options, parameters)
    values = asdict(recipe) | {"learning_rate": rate}
    sources = {}
    for name in _names(stage):
        given = getattr(options, name)
        if given is not None:
            values[name], sources[name] = given, "given"
        elif name in recipe.silent_on:
            sources[name] = f"srt's choice; {recipe.source} does not state it"
        else:
            sources[name] = rate_source if name == "learning_rate" else recipe.source
    return Hyperparameters(**{name: values[name] for name in _names("dpo")}, sources=sources)


def _learning_rate(
    recipe: Recipe, options: TrainingOptions, parameters: int | None
) -> tuple[float, str]:
    rate, source = recipe.learning_rate, recipe.source
    large = parameters is not None and parameters >= LARGE_PARAMETERS
    if large and recipe.large_learning_rate is not None:
        rate, source = recipe.large_learning_rate, f"{source}, for 70B"
    if options.method == "full":
        return rate, source
    if recipe.lora_learning_rate is not None:
        return recipe.lora_learning_rate, f"{source}, for LoRA"
    return rate * LORA_FACTOR, f"{LORA_FACTOR_SOURCE}; {source}"


def advise_on_size(
    options: TrainingOptions, stage: StageName, parameters: int | None
) -> str | None:
    """Advice on the learning rate for a model far smaller than the paper's; None for others."""
    small = parameters is not None and parameters < SMALL_PARAMETERS
    if not small or options.learning_rate is not None or options.recipe == "smol":
        return None
    rate, count = RECIPES[stage]["smol"].learning_rate, parameters or 0
    if RECIPES[stage][options.recipe].learning_rate >= rate:
        return None
    size = f"{count / 1e6:.0f}M" if count >= 1e6 else f"{count:,}"
    return (
        f"this model has {size} parameters, and the recipe's learning rate is "
        f"for 7B and more; SmolLM2's recipe trains such models at {rate:g} (--recipe smol)."
    )

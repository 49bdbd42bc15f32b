"""The knobs that `sft` and `dpo` share; each is declared here once.

Where the default is None, the recipe decides (`recipes.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from srt_cli.errors import UsageError
from srt_cli.options import runtime, setting, typed_flags

Method = Literal["full", "lora", "qlora"]
LearningRateSchedule = Literal["cosine", "linear", "constant_with_warmup"]
LossType = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop",
]  # fmt: skip
"""The preference losses as TRL's `DPOConfig.loss_type` names them."""
PackingChoice = Literal["auto", "bfd", "off"]
Precision = Literal["auto", "fp32", "bf16"]
RecipeName = Literal["srt", "tulu2", "tulu3", "zephyr", "smol", "apo"]


@dataclass(frozen=True)
class TrainingOptions:
    """How weights are trained; names as in TRL and peft where they have one."""

    out: Path
    """Declared by each stage, with its own default."""
    recipe: RecipeName = setting(
        "srt", "Where unset values come from: the paper (srt) or a published recipe.",
        group="Training", common=True,
    )  # fmt: skip
    method: Method = setting(
        "full", "Train all weights (paper), adapters on all linear layers (lora), or adapters on a "
        "4-bit base (qlora).", group="Training", common=True,
    )  # fmt: skip
    learning_rate: float | None = setting(
        None, "Peak learning rate.", otherwise="the recipe's for method and model size",
        group="Training", common=True,
    )  # fmt: skip
    epochs: float | None = setting(
        None, "Passes over the data.", otherwise="the recipe's",
        positive=True, group="Training", common=True,
    )  # fmt: skip
    global_batch: int | None = setting(
        None, "Rows per step over all processes.", otherwise="the recipe's (paper: 32)",
        positive=True, group="Training",
    )  # fmt: skip
    micro_batch: int | None = setting(
        None, "Rows per forward pass.",
        otherwise="2 on a CPU, 8 on a GPU", positive=True, group="Training",
    )  # fmt: skip
    lr_schedule: LearningRateSchedule | None = setting(
        None, "Schedule of the learning rate.", otherwise="the recipe's (paper: cosine)",
        group="Training",
    )  # fmt: skip
    warmup: float | None = setting(
        None, "Share of the steps spent warming up.", otherwise="the recipe's (paper: 0.1)",
        group="Training", metavar="SHARE",
    )  # fmt: skip
    weight_decay: float | None = setting(
        None, "Weight decay.", otherwise="the recipe's (paper: not stated, 0)", group="Training"
    )
    max_grad_norm: float | None = setting(
        None, "Clip gradients at this norm.", otherwise="the recipe's (paper: not stated, 1)",
        group="Training",
    )  # fmt: skip
    precision: Precision = setting(
        "auto", "Multiply in bfloat16 (weights stay float32), or in float32. auto: whichever is faster "
        "on this machine; a run goes on as it began.", group="Training",
    )  # fmt: skip
    max_length: int | None = setting(
        None, "Maximum tokens in a row.",
        otherwise="the recipe's (paper: 8192)", positive=True, group="Data",
    )  # fmt: skip
    truncation: Literal["refuse", "drop"] = setting(
        "refuse", "What to do with rows that do not fit: refuse to train, or drop them.",
        group="Data",
    )  # fmt: skip
    lora_r: int | None = setting(
        None, "Rank of the adapters.", otherwise="the recipe's", positive=True, group="Adapters"
    )
    lora_alpha: int | None = setting(
        None, "Scale of the adapters.", otherwise="the recipe's", positive=True, group="Adapters"
    )
    lora_dropout: float | None = setting(
        None, "Dropout of the adapters.", otherwise="the recipe's", group="Adapters"
    )
    dora: bool = setting(
        False, "Let adapters learn direction and magnitude separately (DoRA).", group="Adapters"
    )
    rslora: bool = setting(
        False, "Scale adapters by alpha over the root of the rank (rsLoRA).", group="Adapters"
    )
    set: tuple[str, ...] = setting(
        (), "Any other field of TRL's SFTConfig or DPOConfig. Repeatable.",
        group="Training", metavar="KEY=VALUE",
    )  # fmt: skip
    unfit: Literal["refuse", "drop"] = setting(
        "refuse", "What to do with rows that the model's chat template does not take, such as "
        "system turns: refuse to train, or drop them.", group="Data",
    )  # fmt: skip
    chat_template: str | None = setting(
        None, "Another chat template for the model: a .jinja file, one of the model's own by name, or "
        "one that TRL ships (such as qwen3).", group="Model", metavar="NAME|FILE",
    )  # fmt: skip
    eval_split: float = setting(
        0.0, "Share of the prompts to hold out for a validation loss.",
        group="Data", metavar="SHARE",
    )  # fmt: skip
    eval_every: int | None = setting(
        None, "Steps between evaluations.", otherwise="ten evaluations in all",
        positive=True, group="Training", metavar="STEPS",
    )  # fmt: skip
    seed: int = setting(
        42, "Seed of the data order, dropout and new adapters.",
        group="Training", common=True,
    )  # fmt: skip
    limit: int | None = setting(
        None, "Use only the first N rows.", positive=True, group="Data", common=True
    )
    num_processes: int | None = runtime(
        None, "Train in N processes on this machine, one per GPU; also on a CPU.",
        positive=True, group="Many processes", common=True,
    )  # fmt: skip
    accelerate_config: str | None = runtime(
        None, "How processes share the work: multi_gpu, fsdp2, zero2, zero3, or an "
        "accelerate config file.", group="Many processes", metavar="NAME|FILE",
    )  # fmt: skip
    dry_run: bool = runtime(
        False, "Show the plan: rows, tokens, steps, memory and values. Write nothing.",
        group="Run", common=True,
    )  # fmt: skip
    probe: bool = runtime(
        False, "With --dry-run: time a few steps on a copy that is thrown away.", group="Run"
    )
    show_masks: int = runtime(
        0, "With --dry-run: show the first N rows and mark what is trained.", group="Run"
    )
    save_every: int | None = runtime(
        None, "Steps between checkpoints.", otherwise="every ten minutes",
        positive=True, group="Run", metavar="STEPS",
    )  # fmt: skip
    early_stopping: int | None = setting(
        None, "Stop when the validation loss has not fallen for N evaluations, and keep the best "
        "weights. Needs --eval-split.", positive=True, group="Training",
    )  # fmt: skip
    deterministic: bool = setting(
        False, "Use only kernels that give the same result every time. Slower on a GPU.",
        group="Training",
    )  # fmt: skip
    samples: int = runtime(
        4, "At each evaluation, or at start and end, let the model answer N prompts (samples.jsonl).",
        group="Output",
    )  # fmt: skip
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = runtime(
        (), "Also send the metrics to this tracker. Repeatable.", group="Output"
    )
    merge: bool = setting(
        True, "Save an adapter merged into its base; --no-merge saves the adapter alone.",
        group="Adapters",
    )  # fmt: skip
    merge_base: Literal["original", "dequantised"] = setting(
        "original", "What to merge a qlora adapter into: the base as it was, or as rounded to 4 bits.",
        group="Adapters",
    )  # fmt: skip
    push_to_hub: str | None = runtime(
        None, "Upload the finished model as a private repository.",
        group="Output", metavar="ORG/NAME",
    )  # fmt: skip
    hub_public: bool = runtime(False, "Make what --push-to-hub uploads public.", group="Output")
    keep_checkpoints: bool = runtime(
        False, "Keep the checkpoints once training has finished.", group="Output"
    )
    trust_remote_code: bool = runtime(
        False, "Let a model directory run its own code.", group="Model"
    )
    overwrite: bool = runtime(
        False, "Delete the output directory and start over.", group="Run", common=True
    )


def refuse_alone(options: TrainingOptions) -> None:
    """Raise `UsageError` for an option that was typed, and does nothing without another one."""
    typed = typed_flags(options)
    for flag, given in {"--probe": options.probe, "--show-masks": options.show_masks > 0}.items():
        if given and flag in typed and not options.dry_run:
            raise UsageError(
                f"{flag} is a part of --dry-run, which trains nothing. Pass both, or leave it out."
            )
    if options.hub_public and "--hub-public" in typed and options.push_to_hub is None:
        raise UsageError("--hub-public is for what --push-to-hub uploads. Pass both.")

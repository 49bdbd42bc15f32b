"""The knobs that `sft` and `dpo` share; each is declared here once.

Where the default is None, the recipe decides (`recipes.py`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from srt_cli.options import runtime, setting

Method = Literal["full", "lora", "qlora"]
LearningRateSchedule = Literal["cosine", "linear", "constant_with_warmup"]
LossType = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop",
]  # fmt: skip
"""The preference losses as TRL's `DPOConfig.loss_type` names them."""
RecipeName = Literal["srt", "tulu2", "tulu3", "zephyr", "smol", "apo"]


@dataclass(frozen=True)
class TrainingOptions:
    """How weights are trained; names as in TRL and peft where they have one."""

    recipe: RecipeName = setting(
        "srt", "Where values that are not given come from: srt is the paper, the others are "
        "published recipes.",
    )  # fmt: skip
    method: Method = setting(
        "full", "Train all weights (paper), adapters on all linear layers (lora), or adapters on "
        "a base of 4 bits (qlora)."
    )  # fmt: skip
    learning_rate: float | None = setting(
        None, "Peak learning rate; default: the recipe's for method and size of the model."
    )
    epochs: float | None = setting(None, "Passes over the data; default: the recipe's.")
    global_batch: int | None = setting(
        None, "Rows a step over all processes; default: the recipe's (paper: 32)."
    )
    micro_batch: int | None = setting(None, "Rows a forward pass; default: 2 on a CPU, 8 on a GPU.")
    lr_schedule: LearningRateSchedule | None = setting(
        None, "Course of the learning rate; default: the recipe's (paper: cosine)."
    )
    warmup: float | None = setting(
        None, "Share of the steps that warm up; default: the recipe's (paper: 0.1)."
    )
    weight_decay: float | None = setting(
        None, "Weight decay; default: the recipe's (paper: not stated, 0)."
    )
    max_grad_norm: float | None = setting(
        None, "Gradients are clipped at this norm; default: the recipe's (paper: not stated, 1)."
    )
    max_length: int | None = setting(
        None, "Most tokens a row may have; default: the recipe's (paper: 8192)."
    )
    truncation: Literal["refuse", "drop"] = setting(
        "refuse", "What happens to rows that do not fit: refuse the run, or drop them."
    )
    lora_r: int | None = setting(None, "Rank of the adapters; default: the recipe's.")
    lora_alpha: int | None = setting(None, "Scale of the adapters; default: the recipe's.")
    lora_dropout: float | None = setting(None, "Dropout of the adapters; default: the recipe's.")
    dora: bool = setting(False, "Adapters learn direction and size apart (DoRA).")
    rslora: bool = setting(False, "Scale adapters by alpha over the root of the rank (rsLoRA).")
    set: tuple[str, ...] = setting(
        (), "Any other field of TRL's SFTConfig or DPOConfig. Several times.", metavar="KEY=VALUE"
    )
    chat_template: Path | None = setting(
        None, "A .jinja file, if the model has none.", metavar="FILE"
    )
    eval_split: float = setting(
        0.0, "Share of the prompts to hold out, for a loss on rows that are not trained on."
    )
    eval_every: int | None = setting(
        None, "Steps between evaluations; default: ten of them in a training.", metavar="STEPS"
    )
    seed: int = setting(42, "Seed of the data order and of dropout.")
    limit: int | None = setting(None, "Use only the first N rows.")
    num_processes: int | None = runtime(
        None, "Train in N processes on this machine, one a GPU; on a CPU too.", metavar="N"
    )
    accelerate_config: str | None = runtime(
        None, "How the processes share the work: multi_gpu, fsdp2, zero2, zero3, or a FILE of "
        "accelerate.", metavar="NAME|FILE",
    )  # fmt: skip
    dry_run: bool = runtime(
        False, "Show the plan: rows, tokens, steps, memory, where values come from. Writes nothing."
    )
    probe: bool = runtime(
        False, "With --dry-run: make a few steps on a copy that is thrown away, to tell the time."
    )
    show_masks: int = runtime(
        0, "With --dry-run: show the first N rows, with what is trained marked."
    )
    save_every: int | None = runtime(
        None, "Steps between checkpoints; default: every ten minutes.", metavar="STEPS"
    )
    early_stopping: int | None = setting(
        None, "Stop when the validation loss has not fallen for N evaluations, and keep the best "
        "weights; needs --eval-split.", metavar="N"
    )  # fmt: skip
    deterministic: bool = setting(
        False, "Only kernels that give the same result every time: slower on a GPU."
    )
    samples: int = runtime(
        4, "Let the model in training answer N prompts now and then, into samples.jsonl."
    )
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = runtime(
        (), "Send the metrics to this tracker too. Several times.",
        metavar="tensorboard|wandb|trackio",
    )  # fmt: skip
    merge: bool = setting(
        True, "Save an adapter merged into its base; --no-merge saves the adapter alone."
    )
    merge_base: Literal["original", "dequantised"] = setting(
        "original", "What an adapter of qlora is merged into: the base as it is, or as its 4 bits "
        "rounded it."
    )  # fmt: skip
    push_to_hub: str | None = runtime(
        None, "Upload the finished model under this name, for your eyes only.", metavar="ORG/NAME"
    )
    hub_public: bool = runtime(False, "Let everybody see what --push-to-hub uploads.")
    keep_checkpoints: bool = runtime(False, "Keep the checkpoints of a finished training.")
    trust_remote_code: bool = runtime(False, "Let a model directory run its own code.")
    overwrite: bool = runtime(False, "Delete the directory and start anew.")

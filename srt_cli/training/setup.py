"""How a training runs on this machine: what the options, the recipe and the device come to."""

import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel
from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils.import_utils import is_flash_attn_2_available
from trl import DPOConfig, SFTConfig

from srt_cli import console
from srt_cli.errors import SrtError, UsageError
from srt_cli.models.chat import ChatFormat
from srt_cli.models.weights import (
    ADAPTER_CONFIG,
    Loading,
    Placement,
    base_of,
    bf16_on_cpu,
    decide_placement,
    load_tokenizer,
    load_weights,
    names_folder,
    resolve_source,
)
from srt_cli.options import typed_flags
from srt_cli.runs.run import TEMPLATE_DAY, Run, read_manifest
from srt_cli.training.options import TrainingOptions
from srt_cli.training.processes import team
from srt_cli.training.recipes import (
    Hyperparameters,
    StageName,
    advise_on_size,
    choose_hyperparameters,
)
from srt_cli.training.samples import Sampler

CHECKPOINTS: Final = "checkpoints"
BF16_PARAMETERS: Final = 30_000_000
"""Smaller models spend their time elsewhere than in products."""
EVENTS: Final = "tensorboard"
CONFIG_CLASSES: Final[Mapping[StageName, type[TrainingArguments]]] = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
}

# Any one of these serves; the first is in the extra of the tracker's name.
PACKAGES: Final = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
PROJECT: Final = "srt"
"""Of the trackers."""
# Fields that an option of ours decides, or the way we train: --set would contradict it.
DECIDED: Final[Mapping[str, str]] = {
    "output_dir": "--out", "num_train_epochs": "--epochs", "learning_rate": "--learning-rate",
    "lr_scheduler_type": "--lr-schedule", "warmup_steps": "--warmup",
    "weight_decay": "--weight-decay", "max_grad_norm": "--max-grad-norm",
    "per_device_train_batch_size": "--micro-batch", "gradient_accumulation_steps": "--global-batch",
    "seed": "--seed", "data_seed": "--seed", "full_determinism": "--deterministic",
    "report_to": "--report-to", "max_length": "--max-length", "beta": "--beta",
    "loss_type": "--loss-type", "label_smoothing": "--label-smoothing", "packing": "--packing",
    "padding_free": "--packing", "eval_strategy": "--eval-split", "eval_steps": "--eval-every",
    "eval_on_start": "--eval-split",
    "save_strategy": "--save-every", "save_steps": "--save-every",
    "trust_remote_code": "--trust-remote-code", "bf16": "--precision",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo",
         "hub_always_push", "hub_revision"), "--push-to-hub",
    ),
}  # fmt: skip


# --- Where it computes -------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingPlace:
    """Where and how a training computes, with the reason; for the manifest."""

    placement: Placement
    bf16: bool
    """Whether matrix products are computed in bfloat16 (autocast)."""
    attention: str
    """As transformers' `attn_implementation` names it."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass instead of kept."""
    checkpointing_reason: str = "not decided yet"
    keeps_freed: bool = False
    """Whether the process keeps the memory that a step frees for the next one."""

    def describe(self) -> dict[str, Any]:
        """Device, weights' dtype, autocast, attention, and why."""
        return self.placement.describe() | {
            "bf16_autocast": self.bf16,
            "attention": self.attention,
            "activation_checkpointing": self.checkpointing,
            "activation_checkpointing_reason": self.checkpointing_reason,
            "keeps_freed_memory": self.keeps_freed,
        }

    def sentence(self) -> str:
        """For the terminal."""
        dtype = str(self.placement.dtype).removeprefix("torch.")
        products = ", products in bfloat16" if self.bf16 and dtype == "float32" else ""
        twice = "activations computed twice" if self.checkpointing else "activations kept"
        return (
            f"training on {self.placement.device}, {dtype} weights{products}: {self.placement.reason}; "
            f"{twice}: {self.checkpointing_reason}"
        )


def decide_training_place(options: TrainingOptions, parameters: int | None) -> TrainingPlace:
    """Choose device and formats for this machine; `memory.fit` decides about checkpointing later.

    Weights that are trained stay float32, with bfloat16 products where the device is faster at them;
    weights that only carry adapters are bfloat16 on a GPU that computes it. A run that has begun
    goes on as it began, on whatever machine. Raises `SrtError` for qlora without bitsandbytes.
    """
    method = options.method
    if method == "qlora" and find_spec("bitsandbytes") is None:
        raise SrtError(
            "--method qlora needs the package bitsandbytes: pip install 'srt-cli[quant]'."
        )
    found = decide_placement()
    bf16, reason = _decide_precision(options, found, parameters)
    if method == "full" or not bf16 or found.device == "cpu":
        reason = f"{reason}; weights stay float32 while they are trained"
        placement = Placement(found.device, torch.float32, reason)
    else:
        reason = f"{reason}; only the adapters are trained, in float32"
        placement = Placement(found.device, torch.bfloat16, reason)
    on_gpu = found.device == "cuda"
    attention = "flash_attention_2" if on_gpu and is_flash_attn_2_available() else "sdpa"
    return TrainingPlace(placement, bf16, attention, checkpointing=False)


def _decide_precision(
    options: TrainingOptions, found: Placement, parameters: int | None
) -> tuple[bool, str]:
    """Whether products are computed in bfloat16, and why."""
    if options.precision == "bf16" and found.device == "cuda" and found.dtype != torch.bfloat16:
        raise UsageError(f"--precision bf16: {found.reason}. Leave it away.")
    if options.precision != "auto":
        return options.precision == "bf16", f"--precision {options.precision}"
    if (began := _precision_of_run(options)) is not None:
        return began, f"this training began in {'bfloat16' if began else 'float32'}"
    if found.device != "cpu":
        return found.dtype == torch.bfloat16, found.reason
    if parameters is not None and parameters < BF16_PARAMETERS:
        return False, "a small model gains nothing by bfloat16 on a CPU"
    return bf16_on_cpu()


def _precision_of_run(options: TrainingOptions) -> bool | None:
    """Whether the training that stands in `--out` computes in bfloat16; None where none has begun."""
    earlier = None if options.overwrite else read_manifest(options.out)
    models = earlier.models.values() if earlier is not None else ()
    said = [model["bf16_autocast"] for model in models if "bf16_autocast" in model]
    return bool(said[0]) if said else None


def sharding() -> Literal["fsdp", "zero"] | None:
    """Whether accelerate spreads the weights over the GPUs, as its launcher says; never on a CPU."""
    if not torch.cuda.is_available():
        return None
    if _is_on("ACCELERATE_USE_FSDP"):
        return "fsdp"
    return "zero" if _is_on("ACCELERATE_USE_DEEPSPEED") else None


def accelerate_checkpoints() -> bool:
    """Whether FSDP itself recomputes activations; transformers must not do it too."""
    return sharding() == "fsdp" and _is_on("FSDP_ACTIVATION_CHECKPOINTING")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


# --- Adapters ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapters:
    """Rank, scale, dropout and kind, as peft's `LoraConfig` names them."""

    r: int
    alpha: int
    dropout: float
    dora: bool
    rslora: bool


def adapters_of(options: TrainingOptions, values: Hyperparameters) -> Adapters | None:
    """The adapters that a training uses; None when it trains all weights."""
    if options.method == "full":
        return None
    return Adapters(
        values.lora_r, values.lora_alpha, values.lora_dropout, options.dora, options.rslora
    )


def lora_config(adapters: Adapters | None) -> LoraConfig | None:
    """All linear layers but the head: attention-only adapters lose at equal size."""
    if adapters is None:
        return None
    return LoraConfig(
        r=adapters.r,
        lora_alpha=adapters.alpha,
        lora_dropout=adapters.dropout,
        use_dora=adapters.dora,
        use_rslora=adapters.rslora,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def quantization() -> BitsAndBytesConfig:
    """Four bits as in QLoRA (arXiv 2305.14314): NF4, double quantization."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )


# --- The setup ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """How a training runs, as far as it is known before any data is read."""

    stage: StageName
    options: TrainingOptions
    model: str
    """What is trained, as `--model` names it."""
    continues: bool
    """Whether `model` is an adapter that is trained further instead of merged."""
    values: Hyperparameters
    advice: tuple[str, ...]
    """What the recipe's learning rate and the method mean for this model."""
    place: TrainingPlace
    adapters: Adapters | None
    micro_batch: int
    """Rows per forward pass on one device."""
    processes: int
    fields: Mapping[str, Any]
    """`--set`: fields of TRL's config."""
    carries_state: bool = False
    """Whether a token reads a state that all tokens before it left, as in Mamba: no mask parts rows."""

    @property
    def accumulation(self) -> int:
        """Forward passes per step on one device."""
        return self.values.global_batch // (self.micro_batch * self.processes)

    @property
    def base(self) -> str:
        """The weights that training starts from, without an adapter that is trained further."""
        return base_of(self.model) if self.continues else self.model

    @property
    def four_bit(self) -> bool:
        """Whether the base is held in 4 bits."""
        return self.options.method == "qlora"


@dataclass(frozen=True)
class Training:
    """What a training is: how it runs, how its model writes chats, and the run that it writes."""

    setup: Setup
    chat: ChatFormat
    run: Run
    sampler: Sampler
    packed: bool = False
    """Whether several rows share one row of a forward pass."""

    @property
    def out(self) -> Path:
        """Where the model, its metrics and its checkpoints go."""
        return self.run.out


def set_up(
    options: TrainingOptions, stage: StageName, model: str, *, continues: bool = False
) -> Setup:
    """Decide values, place and batches; `--micro-batch` defaults to 2 on a CPU, 8 on a GPU.

    Raises `UsageError` for a `--set` that TRL does not know or a `--global-batch` that the processes
    cannot share, `SrtError` for a method that this machine cannot do.
    """
    refuse_idle_flags(options)
    empty = empty_model(model)
    parameters = None if empty is None else int(empty.num_parameters())
    values = choose_hyperparameters(options, stage, parameters)
    check_trackers(options.report_to)
    check_early_stopping(options)
    place = decide_training_place(options, parameters)
    size_advice = advise_on_size(options, stage, parameters)
    expert_advice = None
    if empty is not None:
        place = replace(place, attention=attention_for(empty, place.attention))
        expert_advice = advise_on_experts(empty, options)
    micro = options.micro_batch or (8 if place.placement.device == "cuda" else 2)
    processes = team().size
    return Setup(
        stage=stage,
        options=options,
        model=model,
        continues=continues,
        values=values,
        advice=tuple(filter(None, (size_advice, expert_advice))),
        place=place,
        adapters=adapters_of(options, values),
        micro_batch=divide_batch(values.global_batch, micro, processes),
        processes=processes,
        fields=parse_fields(options.set, CONFIG_CLASSES[stage]),
        carries_state=empty is not None and bool(empty._is_stateful),
    )


def divide_batch(global_batch: int, micro_batch: int, processes: int) -> int:
    """Rows per forward pass: `micro_batch`, or the next smaller number that divides the step.

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


def refuse_idle_flags(options: TrainingOptions) -> None:
    """Raise `UsageError` where a flag is about adapters, and none are trained."""
    about = ("--lora-r", "--lora-alpha", "--lora-dropout", "--dora", "--rslora")
    idle = [flag for flag in about if flag in typed_flags(options)]
    if idle and options.method == "full":
        raise UsageError(
            f"{idle[0]} is about adapters, and --method full trains none. Pass --method lora, or "
            "leave it out."
        )


def check_early_stopping(options: TrainingOptions) -> None:
    """Raise `UsageError` when `--early-stopping` has no validation loss to watch."""
    if options.early_stopping is None:
        return
    if not options.eval_split:
        raise UsageError(
            "--early-stopping looks at the validation loss: hold rows out with --eval-split, "
            "such as 0.1."
        )


# --- The model itself --------------------------------------------------------------------------


def config_of(name: str) -> PretrainedConfig | None:
    """A model's configuration, of an adapter its base's; None when it is not on this machine."""
    try:
        source = str(resolve_source(base_of(name)))
        config = AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None
    assert isinstance(config, PretrainedConfig)
    return config


def empty_model(name: str) -> PreTrainedModel | None:
    """A model without data, by its configuration; None when that is not on this machine."""
    config = config_of(name)
    if config is None:
        return None
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()  # building without data has untied what the configuration ties
    except (OSError, ValueError, KeyError):
        return None
    assert isinstance(model, PreTrainedModel)
    return model


def count_parameters(name: str) -> int | None:
    """How many parameters a model has, by its configuration; None when that is not on this machine."""
    model = empty_model(name)
    return None if model is None else int(model.num_parameters())


def attention_for(model: PreTrainedModel, wanted: str) -> str:
    """The attention that is wanted where the model has it; else what transformers takes for it."""
    has = model._supports_flash_attn if wanted == "flash_attention_2" else model._supports_sdpa
    return wanted if has else str(model.config._attn_implementation)


def advise_on_experts(model: PreTrainedModel, options: TrainingOptions) -> str | None:
    """A warning where adapters leave a model's experts out; None where there are none."""
    held = sum(
        weight.numel()
        for name, module in model.named_modules()
        if "expert" in name and not isinstance(module, nn.Linear)
        for weight in module.parameters(recurse=False)
    )
    if options.method == "full" or not held:
        return None
    return (
        f"this model's experts, {held / model.num_parameters():.0%} of its parameters, are no linear "
        f"layers and get no adapters: --method {options.method} trains the other layers alone. "
        "--method full trains the experts too."
    )


def refuse_lost_start(setup: Setup) -> None:
    """Raise where the adapter that training goes on from is none, or its base is not there."""
    model = setup.model
    if setup.continues and (base_of(model) == model or setup.options.method == "full"):
        raise UsageError(
            f"--adapter continue trains the adapter in {model} further: it needs an adapter "
            "directory as --model (srt sft --no-merge), and --method lora or qlora."
        )
    while (base := base_of(model)) != model:
        if names_folder(base) and not Path(base).expanduser().exists():
            raise SrtError(
                f"{model} is an adapter, and its base cannot be had: {base}: no such directory. Put it "
                f"back, or name where it is now in {model}/{ADAPTER_CONFIG}."
            )
        model = base


def positions_of(name: str) -> int | None:
    """How many positions a model has; None when its configuration does not say or is not here."""
    config = config_of(name)
    text = config.get_text_config() if config is not None else None
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def load_policy(setup: Setup) -> PreTrainedModel | PeftModel:
    """The weights on their device, in train mode; in 4 bits for qlora.

    Weights that GPUs share stay where transformers puts them, and accelerate places the parts.
    """
    model: PreTrainedModel | PeftModel = load_weights(
        setup.base,
        placement=setup.place.placement,
        trust_remote_code=setup.options.trust_remote_code,
        loading=Loading(
            attention=setup.place.attention,
            quantization=quantization() if setup.four_bit else None,
            move=sharding() is None,
        ),
    )
    if setup.continues:
        adapter = str(resolve_source(setup.model))
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    if setup.options.method == "full":
        model.requires_grad_(True)  # peft leaves weights that carried an adapter frozen
    model.train()
    return model


def chat_of(setup: Setup, run: Run | None) -> ChatFormat:
    """How the model writes chats; a run that is continued keeps the date of its first day."""
    tokenizer = load_tokenizer(setup.model, chat_template=setup.options.chat_template)
    chat = ChatFormat(tokenizer)
    if run is None or not chat.writes_date:
        return chat
    first = run.manifest.started
    if run.earlier is not None:
        first = run.earlier.tally(TEMPLATE_DAY, str) or run.earlier.started
    run.tally({TEMPLATE_DAY: first})
    run.save()  # before the first step: a run that is killed leaves it behind
    return replace(chat, day=datetime.fromisoformat(first).astimezone())


# --- What TRL is told --------------------------------------------------------------------------


def training_arguments(setup: Setup, out: Path) -> dict[str, Any]:
    """Arguments for `SFTConfig` and `DPOConfig` that avoid their unsafe defaults.

    TRL's own defaults would take bf16 on a CPU, checkpoint activations and cut at 1024 tokens.
    """
    values, place, options = setup.values, setup.place, setup.options
    on_gpu = place.placement.device == "cuda"
    return {
        "output_dir": str(out / CHECKPOINTS),
        "num_train_epochs": values.epochs,
        "learning_rate": values.learning_rate,
        "lr_scheduler_type": values.lr_schedule,
        # A float below 1 is a share of the steps.
        "warmup_steps": values.warmup,
        "weight_decay": values.weight_decay,
        "max_grad_norm": values.max_grad_norm,
        "per_device_train_batch_size": setup.micro_batch,
        "gradient_accumulation_steps": setup.accumulation,
        "seed": options.seed,
        "data_seed": options.seed,
        "use_cpu": place.placement.device == "cpu",
        "bf16": place.bf16,
        "fp16": False,
        "activation_checkpointing": place.checkpointing and not accelerate_checkpoints(),
        "max_length": None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "save_total_limit": 2,
        "full_determinism": options.deterministic,
        **tracker_arguments(options.report_to, out),
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        "remove_unused_columns": True,
        # Every weight takes part in every loss; looking for others costs time in each step.
        "ddp_find_unused_parameters": False,
    }


def parse_fields(given: Sequence[str], config_class: type[TrainingArguments]) -> dict[str, Any]:
    """`--set KEY=VALUE` as arguments of TRL's config class.

    Raises `UsageError` for an unknown key (naming the nearest), a key that an option of ours decides
    (naming that option), or a value of another type.
    """
    known = {field.name: field for field in dataclasses.fields(config_class)}
    hints = typing.get_type_hints(config_class)
    parsed = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: write KEY=VALUE.")
        if key in DECIDED:
            raise UsageError(f"--set {key}: {DECIDED[key]} decides this. Use that option.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(f"--set {key}: {config_class.__name__} has no such field.{hint}")
        try:
            parsed[key] = _read_value(value, TypeAdapter(hints[key]))
        except ValidationError:
            wanted = _name_of(hints[key])
            raise UsageError(f"--set {key}={value}: the value is not {wanted}.") from None
    return parsed


def _read_value(text: str, adapter: TypeAdapter[Any]) -> Any:
    try:
        return adapter.validate_json(text)
    except ValidationError:
        return adapter.validate_python(text)  # a text needs no quotes


def _name_of(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_name_of(part) for part in typing.get_args(hint) if part is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    return str(getattr(hint, "__name__", hint))


# --- Trackers: transformers' own integrations, only when asked for -----------------------------


def check_trackers(names: Sequence[str]) -> None:
    """Raise `SrtError` for a tracker whose package is not installed."""
    for name in names:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise SrtError(
                f"--report-to {name} needs the package {PACKAGES[name][0]}: "
                f"pip install 'srt-cli[{name}]'."
            )


def tracker_arguments(names: Sequence[str], out: Path) -> dict[str, Any]:
    """For TRL's configs; without a name nothing is reported."""
    if not names:
        return {"report_to": "none"}
    return {"report_to": list(names), "run_name": str(out), "project": PROJECT}


def keep_events_beside(trainer: Trainer, out: Path) -> None:
    """Move TensorBoard's files from among the checkpoints, with which they would be deleted."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(out / EVENTS)


@contextmanager
def tracking(names: Sequence[str], out: Path) -> Iterator[None]:
    """Open a tracker that needs an account before the first step, and close it; trackers talk on stderr.

    Raises `SrtError` when Weights & Biases will not take the run.
    """
    if not names:
        yield
        return
    with redirect_stdout(sys.stderr):
        finish = _open_wandb(out) if "wandb" in names else None
        failed = True
        try:
            yield
            failed = False
        finally:
            if finish is not None:
                finish(exit_code=int(failed))


def _open_wandb(out: Path) -> Any:
    """Begin the run that transformers' integration will find; returns the function that ends it."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    try:
        # The integration itself would take the project huggingface.
        wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=str(out))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise SrtError(
            f"--report-to wandb: {reason}. To keep the run on this machine instead, set "
            "WANDB_MODE=offline."
        ) from error
    return wandb.finish

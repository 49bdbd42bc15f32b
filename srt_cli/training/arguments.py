"""What TRL's trainers are told: our schedule, and any of their own fields by `--set`."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

from srt_cli.errors import UsageError
from srt_cli.training.setup import Setup

CHECKPOINTS: Final = "checkpoints"

# Fields that an option of ours, or the way we run, decides: setting them apart would contradict it.
DECIDED: Final[Mapping[str, str]] = {
    "output_dir": "--out", "num_train_epochs": "--epochs", "learning_rate": "--learning-rate",
    "lr_scheduler_type": "--lr-schedule", "warmup_steps": "--warmup",
    "weight_decay": "--weight-decay", "max_grad_norm": "--max-grad-norm",
    "per_device_train_batch_size": "--micro-batch", "gradient_accumulation_steps": "--global-batch",
    "seed": "--seed", "data_seed": "--seed", "max_length": "--max-length", "beta": "--beta",
    "loss_type": "--loss-type", "label_smoothing": "--label-smoothing", "packing": "--packing",
    "save_strategy": "--save-every", "save_steps": "--save-every",
    "trust_remote_code": "--trust-remote-code",
}  # fmt: skip


def training_arguments(setup: Setup, out: Path) -> dict[str, Any]:
    """Arguments for `SFTConfig` and `DPOConfig` that leave none of their traps open.

    TRL's own defaults would take bf16 on a CPU, checkpoint activations and cut at 1024 tokens.
    """
    values, place = setup.values, setup.place
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
        "seed": setup.seed,
        "data_seed": setup.seed,
        "use_cpu": place.placement.device == "cpu",
        "bf16": place.bf16,
        "fp16": False,
        "activation_checkpointing": place.checkpointing,
        "max_length": None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        "remove_unused_columns": True,
    }


def parse_fields(given: Sequence[str], config_class: type[TrainingArguments]) -> dict[str, Any]:
    """`--set KEY=VALUE` as arguments of TRL's config class.

    Raises `UsageError` for a key that it has not (naming the nearest), one that an option of ours
    decides (naming that), or a value of another type.
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

"""`--set KEY=VALUE`: any field of TRL's own configuration that no option of ours decides."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments

from srt_cli.errors import UsageError

# Fields that an option of ours, or the way we run, decides: setting them apart would contradict it.
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
    "trust_remote_code": "--trust-remote-code",
}  # fmt: skip


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

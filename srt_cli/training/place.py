"""Where a training computes, and in which number formats, with the reason."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from srt_cli.errors import SrtError
from srt_cli.models.weights import Placement, decide_placement
from srt_cli.training.options import Method


@dataclass(frozen=True)
class TrainingPlace:
    """Where and how a training computes, with the reason; for the manifest."""

    placement: Placement
    bf16: bool
    """Whether matrix products are computed in bfloat16 (autocast)."""
    attention: str
    """As transformers' `attn_implementation` names it."""
    checkpointing: bool
    """Whether activations are computed again in the backward pass instead of kept."""
    checkpointing_reason: str = "not decided yet"

    def describe(self) -> dict[str, Any]:
        """Device, weights' dtype, autocast, attention, and why."""
        return self.placement.describe() | {
            "bf16_autocast": self.bf16,
            "attention": self.attention,
            "activation_checkpointing": self.checkpointing,
            "activation_checkpointing_reason": self.checkpointing_reason,
        }

    def sentence(self) -> str:
        """For the terminal."""
        dtype = str(self.placement.dtype).removeprefix("torch.")
        twice = "activations computed twice" if self.checkpointing else "activations kept"
        return (
            f"training on {self.placement.device}, {dtype} weights: {self.placement.reason}; "
            f"{twice}: {self.checkpointing_reason}"
        )


def decide_training_place(method: Method) -> TrainingPlace:
    """Device and formats for this machine; `fitting` decides about checkpointing later.

    Weights that are trained stay float32, with bfloat16 products where the device computes them;
    weights that only carry adapters are bfloat16 there. Raises `SrtError` for qlora without
    bitsandbytes.
    """
    found = decide_placement()
    bf16 = found.dtype == torch.bfloat16
    if method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise SrtError(
            "--method qlora needs the package bitsandbytes: pip install 'srt-cli[quant]'."
        )
    if method == "full" or not bf16:
        reason = f"{found.reason}; weights stay float32 while they are trained"
        placement = Placement(found.device, torch.float32, reason)
    else:
        reason = f"{found.reason}; only the adapters are trained, in float32"
        placement = Placement(found.device, found.dtype, reason)
    on_gpu = found.device == "cuda"
    attention = "flash_attention_2" if on_gpu and is_flash_attn_2_available() else "sdpa"
    return TrainingPlace(placement, bf16, attention, checkpointing=False)


def sharding() -> Literal["fsdp", "zero"] | None:
    """Whether accelerate spreads the weights over the GPUs, as its launcher says; never on a CPU."""
    if not torch.cuda.is_available():
        return None
    if _is_on("ACCELERATE_USE_FSDP"):
        return "fsdp"
    return "zero" if _is_on("ACCELERATE_USE_DEEPSPEED") else None


def accelerate_checkpoints() -> bool:
    """Whether FSDP itself computes activations again; transformers must not do it twice."""
    return sharding() == "fsdp" and _is_on("FSDP_ACTIVATION_CHECKPOINTING")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")

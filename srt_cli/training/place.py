"""The model that is trained: its size, its adapters, where and in which number formats it computes."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from srt_cli.errors import SrtError
from srt_cli.models.weights import Placement, base_of, decide_placement, resolve_source
from srt_cli.training.options import Method, TrainingOptions
from srt_cli.training.recipes import Hyperparameters


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
    """Device and formats for this machine; `memory.fit` decides about checkpointing later.

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


def count_parameters(name: str) -> int | None:
    """How many parameters a model has, from its configuration alone; None when that is not here."""
    config = config_of(name)
    if config is None:
        return None
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()  # building without data has untied what the configuration ties
        return int(model.num_parameters())
    except (OSError, ValueError, KeyError):
        return None


def positions_of(name: str) -> int | None:
    """How many positions a model has; None when its configuration does not say, or is not here."""
    config = config_of(name)
    text = config.get_text_config() if config is not None else None
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None

"""Adapters on all linear layers while training, merged into the weights that are saved."""

from dataclasses import dataclass

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from srt_cli.training.options import TrainingOptions
from srt_cli.training.recipes import Hyperparameters


@dataclass(frozen=True)
class Adapters:
    """Rank, scale, dropout and kind, as peft's `LoraConfig` names them."""

    r: int
    alpha: int
    dropout: float
    dora: bool
    rslora: bool


def adapters_of(options: TrainingOptions, values: Hyperparameters) -> Adapters | None:
    """The adapters that a training uses; null when it trains all weights."""
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

"""LoRA: adapters on all linear layers while training, merged into the weights that are saved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, Trainer


@dataclass(frozen=True)
class Lora:
    """Rank, scale and dropout, as peft's `LoraConfig` names them."""

    r: int
    alpha: int
    dropout: float


def lora_config(lora: Lora) -> LoraConfig:
    """All linear layers but the head: attention-only adapters lose at equal size."""
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def merge_and_keep_adapter(trainer: Trainer, out: Path, lora: Lora | None) -> PreTrainedModel:
    """The trained model; an adapter is saved under `adapter/`, then merged."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if lora is not None:
        assert isinstance(model, PeftModel)
        model.save_pretrained(str(out / "adapter"))
        model = model.merge_and_unload()
    assert isinstance(model, PreTrainedModel)
    return model

"""The trained weights, whole: from one process, or gathered from the GPUs that share them."""

from typing import Any

from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from srt_cli.errors import SrtError
from srt_cli.training.lora import Adapters, lora_config
from srt_cli.training.merging import drop_reference
from srt_cli.training.processes import is_main


def whole_model(trainer: Trainer, adapters: Adapters | None) -> PreTrainedModel | PeftModel | None:
    """The trained model, its adapter apart, in the main process; null in the others.

    Every process must call this: under FSDP and ZeRO-3 each holds a part of the weights.
    """
    # Without accelerate's rounding to bfloat16: the model is to answer as it will from disk.
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
        weights = trainer.accelerator.get_state_dict(engine)
        if is_main():
            model = rebuild(model, weights, adapters)
    if isinstance(model, PeftModel):
        drop_reference(model)
    return model if is_main() else None


def rebuild(model: Any, weights: dict[str, Tensor], adapters: Adapters | None) -> Any:
    """An ordinary model on the CPU, of the same kind as `model`, that holds `weights`.

    Raises `SrtError` when `weights` lacks some of the model's.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # Made of nothing, and not by from_pretrained, which under ZeRO-3 would split it again.
    with init_empty_weights(include_buffers=False):
        fresh: Any = type(base)(base.config)
        if (config := lora_config(adapters)) is not None:
            fresh = get_peft_model(fresh, config)
    fresh.load_state_dict(weights, strict=False, assign=True)
    fresh.tie_weights()
    lacking = [name for name, weight in fresh.named_parameters() if weight.device.type == "meta"]
    if lacking:
        raise SrtError(
            f"the gathered weights lack {len(lacking)} of the model's tensors ({lacking[0]}). The "
            "checkpoints hold them: keep them with --keep-checkpoints, and report this."
        )
    return fresh

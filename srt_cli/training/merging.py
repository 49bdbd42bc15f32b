"""An adapter and its base become one model; never in 4 bits."""

from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from srt_cli.models.weights import Placement, load_weights
from srt_cli.training.options import TrainingOptions
from srt_cli.training.setup import Setup

ADAPTER: Final = "adapter"
REFERENCE: Final = "ref"
"""The frozen copy that TRL adds when DPO goes on with an adapter."""


def merge(
    model: PeftModel, base: str, options: TrainingOptions, setup: Setup, out: Path
) -> PreTrainedModel:
    """The model with its adapter added to the weights; the adapter itself is kept in `adapter/`.

    An adapter trained on 4 bits is merged into the un-quantised base, read anew: as it is
    (`--merge-base original`), or rounded as the adapter knew it (`dequantised`).
    """
    directory = out / ADAPTER
    model.save_pretrained(str(directory))
    if options.method != "qlora":
        merged: Any = model.merge_and_unload()
    else:
        dtype = torch.bfloat16 if setup.place.bf16 else torch.float32
        placement = Placement(setup.place.placement.device, dtype, "merged un-quantised")
        whole = load_weights(base, placement=placement, trust_remote_code=options.trust_remote_code)
        if options.merge_base == "dequantised":
            copy_dequantised(model.get_base_model(), whole)
        merged = PeftModel.from_pretrained(whole, str(directory)).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged


def copy_dequantised(quantized: Any, whole: Any) -> None:
    """Give `whole` the weights that the 4 bits of `quantized` stand for."""
    from bitsandbytes.functional import dequantize_4bit

    modules = dict(whole.named_modules())
    for name, module in quantized.named_modules():
        weight: Any = getattr(module, "weight", None)
        if getattr(weight, "quant_state", None) is None:
            continue
        # peft wraps a layer and keeps it one level below.
        target = modules[name.removesuffix(".base_layer")]
        full = dequantize_4bit(weight.data, weight.quant_state)
        with torch.no_grad():
            target.weight.copy_(full.to(target.weight.dtype))


def name_base(model: PeftModel, base: str) -> None:
    """Let the adapter's own configuration name its base so that it is found from anywhere."""
    path = Path(base.removeprefix("hf:")).expanduser()
    found = str(path.resolve()) if path.exists() else base
    for config in model.peft_config.values():
        config.base_model_name_or_path = found


def drop_reference(model: PeftModel) -> None:
    """Take away TRL's frozen copy, which would be saved beside the adapter."""
    if REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)

"""Weights in the order in which oneDNN reads them, so that a CPU need not reorder them at every step.

torch multiplies by a plain weight as it lies, which for the few rows of a decoding step is slow: a
step of 16 rows takes about half the time with packed weights, one of 64 two thirds.
"""

from functools import partial
from typing import Any, Final

import torch
from torch import nn

from srt_cli.models.weights import own_memory_bytes

MEMORY_SHARE: Final = 1 / 8
"""Of the memory; the packed weights stand beside the plain ones."""


def pack_weights(model: nn.Module) -> bool:
    """Let the linear layers of a float32 model on a CPU use packed weights; false where they cannot.

    Results differ from the plain ones by rounding alone.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    if not layers or not _is_supported(layers[0]):
        return False
    if sum(layer.weight.nbytes for layer in layers) > MEMORY_SHARE * own_memory_bytes():
        return False
    for layer in layers:
        layer.__dict__["forward"] = _packed_forward(layer)
    return True


def _packed_forward(layer: nn.Linear) -> Any:
    operations: Any = torch.ops.mkldnn
    packed = operations._reorder_linear_weight(layer.weight.detach(), None)
    return partial(_multiply, operations._linear_pointwise, packed, layer.bias)


def _multiply(
    operation: Any, packed: torch.Tensor, bias: torch.Tensor | None, states: torch.Tensor
) -> torch.Tensor:
    product: torch.Tensor = operation(states, packed, bias, "none", [], "")
    return product


def _is_supported(layer: nn.Linear) -> bool:
    """Whether this torch has the operations, and they multiply rightly; they are torch's own."""
    weight = layer.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    states = torch.linspace(-1, 1, 2 * layer.in_features).reshape(2, -1)
    try:
        with torch.inference_mode():
            return torch.allclose(_packed_forward(layer)(states), layer(states), atol=1e-3)
    except (AttributeError, RuntimeError):
        return False

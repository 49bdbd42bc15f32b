"""How linear layers multiply on a CPU: packed for oneDNN, in 8 bits, or as they lie.

torch multiplies by a plain weight as it lies, and oneDNN reorders it at every step, which for the few
rows of a decoding step is slow: one of 16 rows takes about half the time with packed weights, one of 64
two thirds.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from srt_cli.errors import SrtError
from srt_cli.models.weights import own_memory_bytes

PACKED_SHARE: Final = 1 / 8
"""Of the memory, for packed weights; they stand beside the plain ones."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""From states (..., in) to (..., out)."""
MakeProduct = Callable[[Sequence[nn.Linear]], Product]
"""Layers that multiply the same states, as one product with their outputs side by side."""


def use_in(model: nn.Module, make: MakeProduct) -> None:
    """Let each linear layer of a model multiply by a product of its own."""
    if make is not in_turn:
        layers = _linear_layers(model)
        for layer, product in zip(layers, [make([layer]) for layer in layers], strict=True):
            layer.__dict__["forward"] = product


def in_turn(layers: Sequence[nn.Linear]) -> Product:
    """By plain weights, one layer after the other."""
    if len(layers) == 1:
        return layers[0]
    return lambda states: torch.cat([layer(states) for layer in layers], dim=-1)


def packs(model: nn.Module) -> bool:
    """Whether a model's weights can be packed: float32 on a CPU, and within a share of its memory."""
    layers = _linear_layers(model)
    if not layers or not _multiplies_packed(layers[0]):
        return False
    return sum(layer.weight.nbytes for layer in layers) <= PACKED_SHARE * own_memory_bytes()


def packed(layers: Sequence[nn.Linear]) -> Product:
    """By weights in oneDNN's order; differs from the plain product by rounding alone."""
    operations: Any = torch.ops.mkldnn
    weights = operations._reorder_linear_weight(_weight_of(layers), None)
    return partial(_multiply, operations._linear_pointwise, weights, _bias_of(layers))


def in_int8(layers: Sequence[nn.Linear]) -> Product:
    """In 8 bits: weights rounded a row at a time, activations as they come.

    Raises `SrtError` where this torch, or the device, cannot.
    """
    try:
        product = _in_int8(layers)
        with torch.inference_mode():
            product(torch.zeros(2, layers[0].in_features))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise SrtError(
            f"--cpu-int8: this torch cannot multiply in 8 bits here ({str(error).splitlines()[0]}). "
            "Leave it away."
        ) from None
    return product


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if type(layer) is nn.Linear]


def _weight_of(layers: Sequence[nn.Linear]) -> torch.Tensor:
    """Weights of layers, (out of all, in)."""
    return torch.cat([layer.weight.detach() for layer in layers])


def _bias_of(layers: Sequence[nn.Linear]) -> torch.Tensor | None:
    """Biases of layers, (out of all,); none where no layer has one."""
    if all(layer.bias is None for layer in layers):
        return None
    biases = [layer.weight.new_zeros(len(layer.weight)) for layer in layers]
    for bias, layer in zip(biases, layers, strict=True):
        if layer.bias is not None:
            bias.copy_(layer.bias.detach())
    return torch.cat(biases)


def _multiply(
    operation: Any, weights: torch.Tensor, bias: torch.Tensor | None, states: torch.Tensor
) -> torch.Tensor:
    product: torch.Tensor = operation(states, weights, bias, "none", [], "")
    return product


def _multiplies_packed(layer: nn.Linear) -> bool:
    """Whether this torch has the operations, and they multiply rightly; they are torch's own."""
    weight = layer.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    states = torch.linspace(-1, 1, 2 * layer.in_features).reshape(2, -1)
    try:
        with torch.inference_mode():
            return torch.allclose(packed([layer])(states), layer(states), atol=1e-3)
    except (AttributeError, RuntimeError):
        return False


def _in_int8(layers: Sequence[nn.Linear]) -> Product:
    operations: Any = torch.ops.quantized
    weight = _weight_of(layers).float()
    scales = weight.abs().amax(1).clamp_min(1e-8) / 127  # (out,)
    with warnings.catch_warnings(action="ignore"):  # that torch will drop it, as is caught above
        rounded = torch.quantize_per_channel(
            weight, scales, torch.zeros(len(scales), dtype=torch.long), 0, torch.qint8
        )
    bias = _bias_of(layers)
    prepacked = operations.linear_prepack(rounded, None if bias is None else bias.float())
    return partial(_multiply_int8, operations, prepacked)


def _multiply_int8(operations: Any, weights: Any, states: torch.Tensor) -> torch.Tensor:
    # A reduced range, for sums of 8 bits would overflow on CPUs without VNNI.
    product: torch.Tensor = operations.linear_dynamic(states, weights, True)
    return product

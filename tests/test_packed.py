"""Packed weights multiply as the plain ones do, and stand aside where they cannot."""

import pytest
import torch

from srt_cli.models.local import static
from srt_cli.models.local.static import pack_weights
from srt_cli.models.weights import load_weights

IDS = torch.tensor([[5, 9, 13, 2, 8], [1, 2, 3, 4, 5]])

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def logits_of(model):
    with torch.inference_mode():
        return model(IDS).logits


def test_a_packed_model_gives_the_same_logits(tiny_model):
    model = load_weights(str(tiny_model))
    plain = logits_of(model)
    assert pack_weights(model)
    found = logits_of(model)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    layer = model.lm_head
    layer.__dict__["forward"].args[1].mul_(2)  # what is multiplied by is the packed copy
    assert not torch.allclose(logits_of(model), plain, atol=1e-2)


def test_a_layer_with_a_bias_and_an_empty_batch():
    layer = torch.nn.Linear(6, 4)
    states = torch.arange(24.0).reshape(2, 2, 6)
    wanted = torch.nn.functional.linear(states, layer.weight, layer.bias)
    assert pack_weights(torch.nn.Sequential(layer))
    with torch.inference_mode():
        torch.testing.assert_close(layer(states), wanted)
        assert layer(states[:0]).shape == (0, 2, 4)


def test_models_that_cannot_be_packed_are_left_alone(monkeypatch):
    half = torch.nn.Sequential(torch.nn.Linear(6, 4, dtype=torch.bfloat16))
    assert not pack_weights(half)
    assert not pack_weights(torch.nn.Sequential(torch.nn.ReLU()))
    layer = torch.nn.Linear(6, 4)
    monkeypatch.setattr(static, "PACKED_SHARE", 0)
    assert not pack_weights(torch.nn.Sequential(layer))
    monkeypatch.undo()
    monkeypatch.setattr(static, "_multiply", lambda operation, weights, bias, states: states[:, :4])
    assert not pack_weights(torch.nn.Sequential(layer))
    assert "forward" not in vars(layer)

"""Packed weights multiply as the plain ones do, and stand aside where they cannot."""

import json

import pytest
import torch
from conftest import read_jsonl, write_jsonl

from srt_cli.errors import SrtError
from srt_cli.models import ModelOptions
from srt_cli.models.local import static
from srt_cli.models.local.local import LocalModel
from srt_cli.models.local.static import count_in_int8, pack_weights
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


def test_eight_bits_are_near_and_not_the_same(tiny_model):
    model = load_weights(str(tiny_model))
    plain = logits_of(model)
    count_in_int8(model)
    found = logits_of(model)
    assert not torch.equal(found, plain)
    assert (found - plain).norm() < 0.1 * plain.norm()
    layer = torch.nn.Linear(6, 4)
    states = torch.arange(24.0).reshape(2, 2, 6)
    wanted = torch.nn.functional.linear(states, layer.weight, layer.bias)
    count_in_int8(torch.nn.Sequential(layer))
    with torch.inference_mode():
        torch.testing.assert_close(layer(states), wanted, atol=0.3, rtol=0.1)
    with pytest.raises(SrtError, match="cannot multiply in 8 bits here"):
        count_in_int8(torch.nn.ReLU())


def test_cpu_int8_writes_other_drafts_which_no_other_run_takes_over(srt, tmp_path, tiny_model):
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": str(n), "prompt": f"q {n}"} for n in range(4)])
    (tmp_path / "critic.py").write_text(
        "def critique(prompt, response):\n"
        "    return {'weaknesses': 'w', 'suggestions': 's', 'score': 3}, 'better'\n"
    )
    line = ("collect-feedback", "--model", tiny_model, "--critic", "python:critic.py:critique")
    line += ("--max-new-tokens", 24)
    said = {}
    for out, extra in (("plain", ()), ("int8", ("--cpu-int8",))):
        finished = srt(*line, *extra, "--out", f"{out}.jsonl")
        assert finished.code == 0, finished.stderr
        manifest = json.loads((tmp_path / f"{out}.run.json").read_text())
        (policy,) = (m for m in manifest["models"].values() if m.get("weights"))
        said[out] = policy["weights"], policy["identity"].endswith("+int8")
    assert said["int8"] == ("int8 in linear layers (--cpu-int8)", True)
    assert said["plain"] == ("packed for oneDNN", False)
    one, other = ([row["response"] for row in read_jsonl(tmp_path / f"{n}.jsonl")] for n in said)
    assert len(one) == len(other) == 4
    refused = srt(*line, "--out", "int8.jsonl")
    assert refused.code == 1
    assert "cpu-int8" in refused.stderr


def test_cpu_int8_is_for_static_batches_on_a_cpu(tiny_model):
    with pytest.raises(SrtError, match="--cpu-int8: is for static batches on a CPU"):
        LocalModel("m", str(tiny_model), ModelOptions(int8=True, engine="continuous"))

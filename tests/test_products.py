"""Packed weights multiply as the plain ones do, and stand aside where they cannot."""

import json

import pytest
import torch
from conftest import read_jsonl, write_jsonl

from srt_cli.errors import SrtError
from srt_cli.models import ModelOptions
from srt_cli.models.local import products
from srt_cli.models.local.local import LocalModel
from srt_cli.models.local.products import in_int8, in_turn, packed, packs, use_in
from srt_cli.models.weights import load_weights

IDS = torch.tensor([[5, 9, 13, 2, 8], [1, 2, 3, 4, 5]])

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def logits_of(model):
    with torch.inference_mode():
        return model(IDS).logits


def wanted_of(layers, states):
    return torch.cat([torch.nn.functional.linear(states, at.weight, at.bias) for at in layers], -1)


def test_a_packed_model_gives_the_same_logits(tiny_model):
    model = load_weights(str(tiny_model))
    plain = logits_of(model)
    assert packs(model)
    use_in(model, packed)
    found = logits_of(model)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    model.lm_head.__dict__["forward"].args[1].mul_(2)  # what is multiplied by is the packed copy
    assert not torch.allclose(logits_of(model), plain, atol=1e-2)


@pytest.mark.parametrize(
    ("make", "near"), [(packed, (1e-5, 1e-5)), (in_turn, (0, 0)), (in_int8, (0.3, 0.1))]
)
def test_layers_side_by_side_with_a_bias_and_without(make, near):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 4), torch.nn.Linear(6, 3, bias=False)]
    states = torch.arange(24.0).reshape(2, 2, 6)
    absolute, relative = near
    with torch.inference_mode():
        for some in (layers, layers[:1], layers[1:]):
            found, wanted = make(some)(states), wanted_of(some, states)
            torch.testing.assert_close(found, wanted, atol=absolute, rtol=relative)
        if make is not in_int8:
            assert make(layers)(states[:0]).shape == (0, 2, 7)


def test_models_that_cannot_be_packed_are_left_alone(monkeypatch):
    assert not packs(torch.nn.Sequential(torch.nn.Linear(6, 4, dtype=torch.bfloat16)))
    assert not packs(torch.nn.Sequential(torch.nn.ReLU()))
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    assert packs(model)
    monkeypatch.setattr(products, "PACKED_SHARE", 0)
    assert not packs(model)
    monkeypatch.undo()
    monkeypatch.setattr(products, "_multiply", lambda operation, weights, bias, states: states)
    assert not packs(model)


def test_eight_bits_are_near_and_not_the_same(tiny_model, monkeypatch):
    model = load_weights(str(tiny_model))
    plain = logits_of(model)
    use_in(model, in_int8)
    found = logits_of(model)
    assert not torch.equal(found, plain)
    assert (found - plain).norm() < 0.1 * plain.norm()

    def absent(*given):
        raise RuntimeError("planted: no engine")

    monkeypatch.setattr(products, "_multiply_int8", absent)
    with pytest.raises(SrtError, match=r"cannot multiply in 8 bits here \(planted: no engine\)"):
        use_in(load_weights(str(tiny_model)), in_int8)


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

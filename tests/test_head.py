"""The log-probs that a CPU computes for training: TRL's own, at the labelled tokens alone."""

import json

import pytest
import torch
from conftest import read_jsonl, write_jsonl
from safetensors.torch import load_file
from test_dpo import pair_rows
from test_sft import feedback_rows
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from srt_cli.models import weights
from srt_cli.stages.sft import Sft
from srt_cli.training import dpo, head, setup, sft
from srt_cli.training.head import score_on_cpu

FIGURES = ("log_probs", "entropy", "mean_logits", "is_top1", "label_mask", "loss")


def scored(tiny_model, **changes):
    """A model with TRL's head, as its trainers make one."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, config=config, dtype=torch.float32)
    add_fused_lm_head(model, outputs=FIGURES[:4])
    return model


def pair_batch():
    """Three pairs, padded on the right: (6, 12) ids, what is seen, and labels of the answers."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 200, (6, 12), generator=draw)
    seen, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for pair, (prompt, chosen, rejected) in enumerate([(3, 9, 5), (5, 2, 6), (4, 3, 3)]):
        ids[3 + pair, :prompt] = ids[pair, :prompt]
        for row, answer in ((pair, chosen), (3 + pair, rejected)):
            seen[row, : prompt + answer] = 1
            labels[row, prompt : prompt + answer] = ids[row, prompt : prompt + answer]
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}


@pytest.mark.parametrize("pairs", [True, False])
def test_figures_and_gradients_are_those_of_trl(tiny_model, pairs):
    batch = pair_batch()
    theirs, ours = scored(tiny_model), scored(tiny_model)
    assert score_on_cpu(ours, bf16=False, pairs=pairs)
    assert ours.srt_head.pairs is pairs
    wanted, found = (model(**batch, fused_lm_head=True) for model in (theirs, ours))
    for name in FIGURES:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=0)
    for output in (wanted, found):
        # As DPO weighs them: each row by a factor of its own.
        (output.log_probs.sum(1) * torch.tensor([0.5, 0.1, 0.2, -0.5, -0.1, -0.2])).sum().backward()
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-5, rtol=1e-4)


def test_products_in_bfloat16_differ_by_their_rounding_alone(tiny_model):
    batch, wanted = pair_batch(), scored(tiny_model)
    found = scored(tiny_model)
    assert score_on_cpu(found, bf16=True, pairs=True)
    one, other = (model(**batch, fused_lm_head=True) for model in (wanted, found))
    assert not torch.equal(other.log_probs, one.log_probs)
    torch.testing.assert_close(other.log_probs, one.log_probs, atol=0.05, rtol=0.03)
    other.loss.backward()
    one.loss.backward()
    for theirs, ours in zip(wanted.parameters(), found.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(
            ours.grad, theirs.grad, atol=0.1 * theirs.grad.abs().max(), rtol=0
        )


def test_a_prompt_is_read_once_for_both_answers(tiny_model):
    model, read = scored(tiny_model), []
    assert score_on_cpu(model, bf16=False, pairs=True)
    layer = model.base_model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[:2]))
    batch = pair_batch()
    model(**batch, fused_lm_head=True)
    assert read == [(3, 17)]  # prompt of 3, answers of 9 and 5: the longest of three rows
    batch["input_ids"][3, 0] += 1  # no longer the same prompt
    model(**batch, fused_lm_head=True)
    assert read[1:] == [(6, 12)]


def test_a_model_or_batch_of_another_shape_is_left_to_trl(tiny_model, monkeypatch):
    for changes in ({"final_logit_softcapping": 30.0}, {"logits_scaling": 4.0}):
        assert not score_on_cpu(scored(tiny_model, **changes), bf16=False, pairs=True)
    biased = scored(tiny_model)
    biased.lm_head = torch.nn.Linear(*reversed(biased.lm_head.weight.shape))
    assert not score_on_cpu(biased, bf16=False, pairs=False)
    windowed = scored(tiny_model, sliding_window=4)
    assert score_on_cpu(windowed, bf16=False, pairs=True)
    assert not windowed.srt_head.pairs
    placeless = scored(tiny_model)
    read = placeless.base_model.forward
    placeless.base_model.forward = lambda position_ids=None, **given: read(**given)
    assert score_on_cpu(placeless, bf16=False, pairs=True)
    assert not placeless.srt_head.pairs  # found by the trial: positions are not taken
    monkeypatch.setattr(head, "MOST_LOGITS", 10)
    plain = scored(tiny_model)
    assert score_on_cpu(plain, bf16=False, pairs=False)
    monkeypatch.setattr(head._LogProbs, "apply", None)
    assert plain(**pair_batch(), fused_lm_head=True).log_probs.shape == (6, 11)


def test_two_steps_of_both_stages_end_as_with_the_head_of_trl(
    srt, tmp_path, tiny_model, monkeypatch
):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(4))
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows(4))
    left_to_trl = []

    def line(command, out):
        common = (
            "--model",
            tiny_model,
            "--global-batch",
            4,
            "--epochs",
            2,
            "--samples",
            0,
            "--out",
            out,
        )
        more = ("--critic-check", 0) if command == "sft" else ("--learning-rate", 1e-4)
        assert srt(command, *common, *more, "--out", out).code == 0
        losses = [row["loss"] for row in read_jsonl(tmp_path / out / "metrics.jsonl")]
        return losses, load_file(tmp_path / out / "model.safetensors")

    for command, module in (("sft", sft), ("dpo", dpo)):
        ours = line(command, f"{command}-ours")
        with monkeypatch.context() as patch:
            patch.setattr(module, "score_on_cpu", lambda *_, **__: left_to_trl.append(1))
            theirs = line(command, f"{command}-theirs")
        assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
        assert len(ours[0]) == 2
        for name, weight in ours[1].items():
            torch.testing.assert_close(weight, theirs[1][name], atol=1e-6, rtol=0)
    assert len(left_to_trl) == 3  # dpo asks before and after the reference's log-probs


def test_precision_follows_the_cpu_is_recorded_and_kept_by_a_run(
    srt, tmp_path, tiny_model, monkeypatch
):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(2))
    line = ("sft", "--model", tiny_model, "--global-batch", 2, "--epochs", 1, "--samples", 0)
    monkeypatch.setattr(setup, "BF16_PARAMETERS", 0)
    monkeypatch.setattr(setup, "bf16_on_cpu", lambda: (True, "it is faster"))
    assert srt(*line, "--critic-check", 0, "--out", "fast").code == 0
    monkeypatch.setattr(setup, "bf16_on_cpu", lambda: (False, "it is slower"))
    assert srt(*line, "--critic-check", 0, "--out", "plain").code == 0
    said = {}
    for out in ("fast", "plain"):
        manifest = json.loads((tmp_path / out / "run.json").read_text())
        place = manifest["models"][str(tiny_model)]
        said[out] = (place["dtype"], place["bf16_autocast"], place["dtype_reason"].split(";")[0])
        weights_there = load_file(tmp_path / out / "model.safetensors")
        assert {weight.dtype for weight in weights_there.values()} == {torch.float32}
    assert said["fast"] == ("float32", True, "it is faster")
    assert said["plain"] == ("float32", False, "it is slower")
    one, other = (read_jsonl(tmp_path / out / "metrics.jsonl")[0]["loss"] for out in said)
    assert one != other
    assert one == pytest.approx(other, abs=0.02)

    def place_of(**options):
        return setup.set_up(Sft(**options), "sft", str(tiny_model)).place

    kept = place_of(out=tmp_path / "fast")
    assert (kept.bf16, kept.placement.reason.split(";")[0]) == (
        True,
        "this training began in bfloat16",
    )
    assert not place_of(out=tmp_path / "fast", overwrite=True).bf16
    assert place_of(precision="bf16").bf16
    monkeypatch.setattr(setup, "BF16_PARAMETERS", 10**9)
    monkeypatch.setattr(setup, "bf16_on_cpu", lambda: (True, "it is faster"))
    assert not place_of().bf16  # a small model


def test_a_cpu_without_the_instructions_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "_gain_of_bf16", lambda: 2.0)
    named = tmp_path / "cpuinfo"
    monkeypatch.setattr(weights, "CPUINFO", named)
    assert weights.bf16_on_cpu() == (False, "this CPU has no instructions for bfloat16")
    named.write_text("flags : fpu avx512f avx512_bf16 sse\n")
    wanted = "this CPU has avx512_bf16, and products of bfloat16 take 50% of float32's time"
    assert weights.bf16_on_cpu() == (True, wanted)
    monkeypatch.setattr(weights, "_gain_of_bf16", lambda: 0.8)
    assert not weights.bf16_on_cpu()[0]
    monkeypatch.undo()
    assert 0.05 < weights._gain_of_bf16() < 50

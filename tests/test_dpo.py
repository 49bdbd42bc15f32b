"""srt dpo through the front door, on a two-layer model."""

import json
import math

import pytest
from conftest import read_jsonl, write_jsonl


def pair_rows(count=8):
    return [
        {
            "id": str(n),
            "prompt": [{"role": "user", "content": f"Say {n} in words."}],
            "chosen": [{"role": "assistant", "content": f"It is the number {n} in words."}],
            "rejected": [{"role": "assistant", "content": f"It is {n}."}],
            "chosen_score": 9.0,
            "rejected_score": 3.0,
            "source": "c",
        }
        for n in range(count)
    ]


@pytest.fixture
def train(srt, tmp_path, tiny_model):
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows())

    def run(*extra):
        line = ["dpo", "--model", tiny_model, "--global-batch", 4, "--learning-rate", 1e-3]
        return srt(*line, "--beta", 0.1, "--samples", 0, *extra)

    return run


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_first_loss_is_ln_2_and_the_margin_grows(train, tmp_path, method):
    finished = train("--epochs", 5, "--method", method)
    assert finished.code == 0, finished.stderr
    rows = read_jsonl(tmp_path / "models/dpo/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"] + 0.05
    assert (tmp_path / "models/dpo/model.safetensors").is_file()


def test_answers_of_the_same_tokens_are_no_pair(srt, tmp_path, tiny_model):
    rows = pair_rows()
    rows[0]["chosen"][0]["content"] = rows[0]["rejected"][0]["content"]
    rows[1]["chosen"][0]["content"] = (
        rows[1]["rejected"][0]["content"] + "\n"
    )  # a template trims it
    write_jsonl(tmp_path / "prefs.jsonl", rows)
    template = (tiny_model / "chat_template.jinja").read_text()
    trims = template.replace("message['content']", "message['content'] | trim")
    (tmp_path / "trims.jinja").write_text(trims)
    line = ("dpo", "--model", tiny_model, "--chat-template", "trims.jinja", "--learning-rate", 1e-3)
    finished = srt(*line, "--samples", 0)
    assert finished.code == 0, finished.stderr
    assert "1 pairs prefer an answer to itself and teach nothing" in finished.stderr
    assert "the same tokens teach nothing; they were left out: 1." in finished.stderr
    reasons = {
        row["id"]: row["reason"] for row in read_jsonl(tmp_path / "models/dpo/dpo.dropped.jsonl")
    }
    assert reasons == {
        "0": "chosen and rejected are the same",
        "1": "chosen and rejected are the same tokens",
    }


def test_without_a_pair_to_train_on_the_exit_code_is_3(srt, tmp_path, tiny_model):
    rows = pair_rows(2)
    for row in rows:
        row["chosen"] = row["rejected"]
    write_jsonl(tmp_path / "prefs.jsonl", rows)
    finished = srt("dpo", "--model", tiny_model)
    assert finished.code == 3
    assert "none of the pairs is left to train on" in finished.stderr


def test_manifest_and_terminal_say_which_weights_were_the_reference(train, tmp_path, tiny_model):
    finished = train()
    assert f"reference: {tiny_model}" in finished.stderr
    manifest = json.loads((tmp_path / "models/dpo/run.json").read_text())
    assert manifest["models"]["reference"]["spec"] == str(tiny_model)
    assert len(manifest["models"]["reference"]["weights"]) == 16


def test_a_live_reference_is_the_model_that_training_starts_from(srt, tmp_path, tiny_model):
    """TRL alone would load it from the path in the model's configuration: the adapter's base."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from srt_cli.models.weights import load_tokenizer
    from srt_cli.training.setup import Adapters, lora_config

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = get_peft_model(base, lora_config(Adapters(4, 8, 0.0, dora=False, rslora=False)))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "tuned")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "tuned")
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows(8))
    line = ("dpo", "--model", "tuned", "--global-batch", 4, "--learning-rate", 1e-3, "--beta", 0.1)
    losses = []
    for out, more in (("before", ()), ("live", ("--set", "precompute_ref_log_probs=false"))):
        finished = srt(*line, "--out", out, "--samples", 0, *more)
        assert finished.code == 0, finished.stderr
        losses.append([row["loss"] for row in read_jsonl(tmp_path / out / "metrics.jsonl")])
    assert losses[1][0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_training_that_lies_in_its_warm_up_says_that_it_changed_nothing(train, tmp_path):
    planned = train("--global-batch", 8, "--dry-run", "--out", tmp_path / "planned")
    assert "would lie in the warm-up, at learning rate 0, and change nothing" in planned.stderr
    finished = train("--global-batch", 8)
    assert "lay in the warm-up, at learning rate 0, and changed nothing" in finished.stderr
    other = train("--global-batch", 8, "--warmup", 0, "--out", tmp_path / "other")
    assert "changed nothing" not in other.stderr

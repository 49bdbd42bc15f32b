"""srt sft through the front door, on a two-layer model."""

import json

import pytest
from conftest import read_jsonl, write_jsonl


def feedback_rows(count=8, **changes):
    rows = []
    for n in range(count):
        row = {
            "id": str(n),
            "prompt": f"Say {n} in words.",
            "response": f"It is {n}.",
            "feedback": {"weaknesses": "Digits.", "suggestions": "Use words.", "score": 3},
            "refinement": f"It is the number {n} in words.",
            "refinement_score": 9,
            "refinement_feedback": {"weaknesses": "None.", "suggestions": "None.", "score": 9},
            "status": "ok",
            "reason": None,
            "raw": {},
            "policy": "p",
            "critic": "c",
            "sample": 0,
            "round": 1,
            "usage": {},
        }
        rows.append(row | changes)
    return rows


@pytest.fixture
def train(srt, tmp_path, tiny_model):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows())

    def run(*extra):
        line = ["sft", "--model", tiny_model, "--global-batch", 4, "--learning-rate", 1e-2]
        return srt(*line, "--critic-check", 0, *extra)

    return run


def test_a_model_directory_stands_alone(train, tmp_path):
    finished = train("--epochs", 2)
    assert finished.code == 0, finished.stderr
    names = {path.name for path in (tmp_path / "models/sft").iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "metrics.jsonl", "model.safetensors", "run.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert finished.stdout == "models/sft: a model   next: srt self-critique --model models/sft\n"


def test_the_loss_falls_and_every_step_is_recorded(train, tmp_path):
    train("--epochs", 5)
    losses = [row["loss"] for row in read_jsonl(tmp_path / "models/sft/metrics.jsonl")]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 1


def test_the_manifest_says_device_dtype_and_why(train, tmp_path, tiny_model):
    train("--epochs", 1)
    manifest = json.loads((tmp_path / "models/sft/run.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["settings"]["model"] == str(tiny_model)
    assert manifest["tallies"]["kept"] == 8
    place = manifest["models"][str(tiny_model)]
    assert place["dtype"] == "float32"
    assert place["dtype_reason"]

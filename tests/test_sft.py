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
        for option in ("--critic-check", "--samples"):
            line += [] if option in extra else [option, 0]
        return srt(*line, *extra)

    return run


def test_a_model_directory_stands_alone(train, tmp_path):
    finished = train("--epochs", 2, "--samples", 4)
    assert finished.code == 0, finished.stderr
    names = {path.name for path in (tmp_path / "models/sft").iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "metrics.jsonl", "model.safetensors", "run.json", "samples.jsonl", "tokenizer.json",
        "tokenizer_config.json", "training.html",
    }  # fmt: skip
    assert finished.stdout == "models/sft: a model   next: srt self-critique --model models/sft\n"


def test_the_loss_falls_and_every_step_is_recorded(train, tmp_path):
    train("--epochs", 5)
    losses = [row["loss"] for row in read_jsonl(tmp_path / "models/sft/metrics.jsonl")]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 1


def test_a_critic_check_that_was_cut_off_is_all_that_is_left(srt, train, tmp_path, tiny_model):
    train("--epochs", 1)
    path = tmp_path / "models/sft/run.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"status": "started"}))
    before = (tmp_path / "models/sft/model.safetensors").stat().st_mtime_ns
    finished = train("--epochs", 1, "--critic-check", 2)
    assert finished.code == 0, finished.stderr
    assert "only the critic check is left" in finished.stderr
    assert "the tuned model as a critic" in finished.stderr
    assert (tmp_path / "models/sft/model.safetensors").stat().st_mtime_ns == before


def test_a_model_that_was_stopped_before_it_was_read_back_is_saved_and_read_again(train, tmp_path):
    train("--epochs", 1)
    out = tmp_path / "models/sft"
    manifest = json.loads((out / "run.json").read_text())
    saved = manifest["tallies"].pop("saved")
    (out / "run.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    before = (out / "model.safetensors").read_bytes()
    again = train("--epochs", 1)
    assert again.code == 0, again.stderr
    assert "read back from models/sft" in again.stderr
    assert (out / "model.safetensors").read_bytes() == before
    assert json.loads((out / "run.json").read_text())["tallies"]["saved"] == saved


def test_the_manifest_says_device_dtype_and_why(train, tmp_path, tiny_model):
    train("--epochs", 1)
    manifest = json.loads((tmp_path / "models/sft/run.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["settings"]["model"] == str(tiny_model)
    assert manifest["tallies"]["kept"] == 8
    place = manifest["models"][str(tiny_model)]
    assert place["dtype"] == "float32"
    assert place["dtype_reason"]


def test_the_same_line_again_has_nothing_to_do_and_another_is_refused(train, tmp_path):
    train("--epochs", 1)
    digest = (tmp_path / "models/sft/model.safetensors").read_bytes()
    again = train("--epochs", 1)
    assert again.code == 0
    assert "nothing to do" in again.stderr
    other = train("--epochs", 2)
    assert other.code == 1
    assert "--epochs was 1.0, now 2.0" in other.stderr
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(9))
    changed = train("--epochs", 1)
    assert changed.code == 1
    assert "its content has changed" in changed.stderr
    assert (tmp_path / "models/sft/model.safetensors").read_bytes() == digest


def test_rows_that_break_the_papers_rules_fall_out_with_their_reason(srt, tmp_path, tiny_model):
    rows = [
        *feedback_rows(2),
        feedback_rows(1, id="worse", refinement_score=2)[0],
        feedback_rows(1, id="unread", status="unparsed", feedback=None)[0],
    ]
    write_jsonl(tmp_path / "feedback.jsonl", rows)
    line = ("sft", "--model", tiny_model, "--epochs", 1, "--critic-check", 0, "--samples", 0)
    finished = srt(*line)
    assert "4 rows: 2 kept; dropped: 1 refinement scored lower, 1 unparsed" in finished.stderr
    dropped = read_jsonl(tmp_path / "models/sft/sft.dropped.jsonl")
    assert {row["id"]: row["reason"] for row in dropped} == {
        "worse": "refinement scored lower",
        "unread": "unparsed",
    }


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_without_a_row_to_train_on_the_exit_code_is_3(srt, tmp_path, tiny_model, more):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(2, status="unparsed"))
    finished = srt("sft", "--model", tiny_model, *more)
    assert finished.code == 3
    assert "no row is left to train on" in finished.stderr


def test_a_row_that_does_not_fit_is_refused_or_dropped_never_cut(train, tmp_path):
    long = feedback_rows(1, id="long", response="word " * 300)[0]
    write_jsonl(tmp_path / "feedback.jsonl", [*feedback_rows(4), long])
    refused = train("--epochs", 1, "--max-length", 200)
    assert refused.code == 1
    assert "1 of 5 sequences exceed --max-length 200 (the longest, long:" in refused.stderr
    dropped = train("--epochs", 1, "--max-length", 200, "--truncation", "drop")
    assert dropped.code == 0, dropped.stderr
    assert "1 sequences over --max-length 200 were left out" in dropped.stderr


def test_loss_on_names_parts_and_nothing_else(train):
    finished = train("--loss-on", "response,score")
    assert finished.code == 2
    assert "name some of response, feedback, refinement" in finished.stderr


def test_the_model_comes_from_the_manifest_of_the_data(srt, tmp_path, tiny_model):
    given = [row | {"policy": "given"} for row in feedback_rows(4)]
    write_jsonl(tmp_path / "feedback.jsonl", given)
    refused = srt("sft", "--epochs", 1)
    assert refused.code == 2
    assert "names no policy to train. Pass --model." in refused.stderr
    write_jsonl(tmp_path / "some.jsonl", [row | {"policy": str(tiny_model)} for row in given[:2]])
    named = srt("sft", "--data", "some.jsonl", "--dry-run")
    assert named.code == 0, named.stderr
    assert f"model: {tiny_model}, by the first row of some.jsonl\n" in named.stderr
    manifest = {
        "command": "collect-feedback",
        "settings": {"model": str(tiny_model)},
        "runtime": {},
    }
    (tmp_path / "feedback.run.json").write_text(json.dumps(manifest))
    assert srt("sft", "--epochs", 1, "--critic-check", 0, "--samples", 0).code == 0


def test_the_first_loss_is_that_of_transformers_alone(train, tmp_path, tiny_model):
    """Independent of TRL: mean over trained tokens of the first batch, padded on the right."""
    import torch
    from transformers import AutoModelForCausalLM

    from srt_cli.models.chat import ChatFormat
    from srt_cli.models.weights import load_tokenizer
    from srt_cli.records import FeedbackRecord
    from srt_cli.training.rows import PARTS
    from srt_cli.training.sequences import feedback_sequences

    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(4))
    train("--epochs", 1, "--micro-batch", 2)
    tokenizer = load_tokenizer(str(tiny_model))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    total, count = 0.0, 0
    for row in feedback_rows(4):
        (sequence,) = feedback_sequences(ChatFormat(tokenizer), FeedbackRecord(**row), PARTS)
        logits = model(torch.tensor([sequence.input_ids])).logits[0]
        for place, label in enumerate(sequence.labels[1:]):
            if label != -100:
                total -= float(logits[place].log_softmax(-1)[label])
                count += 1
    first = read_jsonl(tmp_path / "models/sft/metrics.jsonl")[0]["loss"]
    assert first == pytest.approx(total / count, abs=1e-4)


def test_a_good_draft_that_was_left_as_it_is_is_told_once(train, tmp_path):
    rows = feedback_rows(4)
    good = {"weaknesses": "None.", "suggestions": "None.", "score": 9}
    rows[0] |= {"refinement": rows[0]["response"], "feedback": good}
    write_jsonl(tmp_path / "feedback.jsonl", rows)
    trained = train("--refinement-feedback")
    assert "7 sequences" in trained.stderr

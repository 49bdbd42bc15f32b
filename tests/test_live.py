"""What a training shows and leaves behind while it runs: metrics, figures, samples, trackers, page."""

import json
import math
import sqlite3
import subprocess

import pytest
import torch
from conftest import read_jsonl, write_jsonl
from killing import command, environment
from test_dpo import pair_rows
from test_sft import feedback_rows

from srt_cli.training.loop import Best, best_evaluation, count_tokens, mfu, throughput

SFT = ("sft", "--global-batch", 4, "--learning-rate", 1e-2, "--critic-check", 0)
DPO = ("dpo", "--global-batch", 4, "--learning-rate", 1e-3, "--beta", 0.1)


@pytest.fixture
def sft(srt, tmp_path, tiny_model):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows())
    return lambda *extra: srt(*SFT, "--model", tiny_model, *extra)


@pytest.fixture
def dpo(srt, tmp_path, tiny_model):
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows())
    return lambda *extra: srt(*DPO, "--model", tiny_model, *extra)


def manifest_of(folder):
    return json.loads((folder / "run.json").read_text())


def test_every_step_says_what_it_trained_and_how_fast(sft, tmp_path):
    finished = sft("--epochs", 2, "--samples", 0)
    assert finished.code == 0, finished.stderr
    rows = read_jsonl(tmp_path / "models/sft/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name in ("loss", "learning_rate", "grad_norm", "seconds", "entropy", "mean_token_accuracy"):
        assert all(math.isfinite(row[name]) for row in rows), name
    tallies = manifest_of(tmp_path / "models/sft")["tallies"]
    # Two epochs; the counts are those of the data, with no padding in them.
    assert sum(row["tokens"] for row in rows) == 2 * tallies["tokens"]
    trained = sum(tallies["trained_tokens"].values())
    assert sum(row["trained_tokens"] for row in rows) == 2 * trained
    training = tallies["training"]
    seconds = sum(row["seconds"] for row in rows)
    assert training["tokens_per_second"] == pytest.approx(2 * tallies["tokens"] / seconds)
    assert f"{training['tokens_per_second']:,.0f} tokens/s" in finished.stderr
    assert f"({training['trained_tokens_per_second']:,.0f} trained)" in finished.stderr
    assert training["mfu"] is None
    assert "MFU" not in finished.stderr


def test_a_terminal_is_shown_the_figures_of_the_step(dpo, capsys):
    finished = dpo("--epochs", 2, "--samples", 0)
    (line,) = [each for each in finished.stderr.splitlines() if each.startswith("training: ")]
    assert line.startswith("training: 4/4 in ")
    named = (
        "loss",
        "lr",
        "grad norm",
        "margin",
        "accuracy",
        "log p chosen",
        "rejected",
        "tokens/s",
    )
    for name in named:
        assert f"{name} " in line


def test_a_bar_shows_the_figures_below_it(monkeypatch):
    from rich.console import Console

    from srt_cli import console

    talk = Console(force_terminal=True, width=100, record=True)
    monkeypatch.setattr(console, "_talk", talk)
    with console.progress("training", None) as progress:
        progress.expect(4)
        progress.advance(1, figures={"loss": "0.693", "tokens/s": "1,234"})
        progress.advance(1, figures={"loss": "0.500"})
    shown = talk.export_text()
    assert "2/4" in shown
    assert "loss 0.500" in shown
    assert "tokens/s 1,234" in shown


def test_padding_and_masks_are_not_counted():
    sft = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, 6, 7, -100], [-100, -100, -100, 8]]),
    }
    assert count_tokens(sft).tolist() == [7, 3]
    dpo = {
        "input_ids": torch.tensor([[5, 6, 7], [5, 8, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "completion_mask": torch.tensor([[0, 1, 1], [0, 1, 0]]),
    }
    assert count_tokens(dpo).tolist() == [5, 3]
    packed = {
        "input_ids": torch.tensor([[5, 6, 7, 8]]),
        "labels": torch.tensor([[-100, 6, -100, 8]]),
    }
    assert count_tokens(packed).tolist() == [4, 2]


def test_mfu_is_six_flops_a_parameter_and_token_over_the_peak():
    # 20,000 tokens/s of a model of 1e9 parameters on an H100: 1.2e14 of 9.89e14.
    assert mfu(20_000, 6e9, 989e12) == pytest.approx(0.12134, abs=1e-5)
    assert mfu(20_000, 6e9, None) is None


def test_the_rates_of_a_training_are_its_sums_over_its_seconds():
    rows = [
        {"tokens": 100, "trained_tokens": 40, "seconds": 1.0, "mfu": 0.4},
        {"tokens": 300, "trained_tokens": 80, "seconds": 3.0, "mfu": 0.2},
    ]
    assert throughput(rows) == {
        "seconds": 4.0, "tokens": 400, "trained_tokens": 120, "tokens_per_second": 100.0,
        "trained_tokens_per_second": 30.0, "mfu": pytest.approx(0.25),
    }  # fmt: skip
    assert throughput([]) == {}


def test_samples_are_written_at_start_and_end_and_summed_up(sft, tmp_path):
    finished = sft("--epochs", 2, "--samples", 3)
    assert finished.code == 0, finished.stderr
    rows = read_jsonl(tmp_path / "models/sft/samples.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 0, 4, 4, 4]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Say 0 in words."}]
    assert rows[0]["text"] != rows[3]["text"]
    for row in rows:
        assert 0 < row["tokens"] <= 128
        assert row["stopped"] in (True, False)
    summary = manifest_of(tmp_path / "models/sft")["tallies"]["samples"]
    assert summary["last"]["step"] == 4
    mean = sum(row["tokens"] for row in rows[3:]) / 3
    assert summary["last"]["tokens"] == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_samples_leave_no_trace_in_the_weights(stage, sft, dpo, tmp_path):
    """Dropout draws from the random state that sampling must not touch."""
    train = {"sft": sft, "dpo": dpo}[stage]
    lora = ("--method", "lora", "--lora-dropout", 0.2, "--epochs", 2)
    weights = []
    for count in (0, 2):
        out = tmp_path / f"models/{count}"
        finished = train("--samples", count, "--out", out, *lora)
        assert finished.code == 0, finished.stderr
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_tensorboard_gets_the_metrics_and_nobody_else_does(sft, tmp_path):
    pytest.importorskip("tensorboardX")
    finished = sft("--epochs", 2, "--samples", 0, "--report-to", "tensorboard")
    assert finished.code == 0, finished.stderr
    (events,) = (tmp_path / "models/sft/tensorboard").glob("events*")
    content = events.read_bytes()
    for name in (b"train/loss", b"train/tokens_per_second", b"train/learning_rate"):
        assert content.count(name) == 4
    assert sft("--epochs", 2, "--samples", 0, "--out", "models/quiet").code == 0
    assert not (tmp_path / "models/quiet/tensorboard").exists()


def tracked(tmp_path, tiny_model, tracker, **variables):
    """A training that reports, in a process of its own: trackers keep state, and read it early."""
    pytest.importorskip(tracker)
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows())
    line = command(*SFT, "--model", tiny_model, "--epochs", 2, "--report-to", tracker)
    ours = {name: value for name, value in environment().items() if not name.startswith("WANDB_")}
    return subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, env=ours | variables,
    )  # fmt: skip


def test_wandb_gets_the_metrics_also_where_there_is_no_network(tmp_path, tiny_model):
    done = tracked(tmp_path, tiny_model, "wandb", WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    for name in (b"train/loss", b"train/tokens_per_second", b"train/learning_rate"):
        assert content.count(name) >= 4
    assert b"models/sft" in content
    assert b"\x03srt" in content  # the project, with its length


def test_wandb_without_an_account_is_one_sentence(tmp_path, tiny_model):
    done = tracked(tmp_path, tiny_model, "wandb", NETRC=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "error: --report-to wandb: No API key configured" in done.stderr
    assert "Traceback" not in done.stderr


def test_trackio_gets_the_metrics_and_keeps_off_stdout(tmp_path, tiny_model):
    done = tracked(tmp_path, tiny_model, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("models/sft: a model")
    with sqlite3.connect(tmp_path / "trackio" / "srt.db") as kept:
        rows = kept.execute("select run_name, metrics from metrics").fetchall()
    kept_steps = [json.loads(metrics) for _, metrics in rows if b"train/loss" in metrics]
    steps = [row for row in read_jsonl(tmp_path / "models/sft/metrics.jsonl") if "loss" in row]
    assert [row["train/loss"] for row in kept_steps] == [row["loss"] for row in steps]
    assert {name for name, _ in rows} == {"models/sft"}


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_one_sentence(sft, tmp_path, tracker, monkeypatch):
    import importlib.util

    from srt_cli.training import setup

    find = importlib.util.find_spec
    monkeypatch.setattr(setup, "find_spec", lambda name: None if name == tracker else find(name))
    finished = sft("--report-to", tracker)
    assert finished.code == 1
    assert finished.stderr.count("\n") == 1
    assert (
        f"--report-to {tracker} needs the package {tracker}: pip install 'srt-cli[{tracker}]'"
        in (finished.stderr)
    )
    assert not (tmp_path / "models").exists()


def test_an_unknown_tracker_is_refused(sft):
    finished = sft("--report-to", "notebook")
    assert finished.code == 2
    assert "--report-to" in finished.stderr


def test_early_stopping_keeps_the_best_weights(srt, tmp_path, tiny_model):
    """A rate that makes things worse: the first evaluation is the best, and is what is saved."""
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(16))
    line = (*SFT, "--model", tiny_model, "--samples", 0, "--eval-split", 0.3, "--eval-every", 2)
    line += ("--learning-rate", 0.3, "--lr-schedule", "constant_with_warmup", "--warmup", 0)
    finished = srt(*line, "--epochs", 10, "--early-stopping", 2)
    assert finished.code == 0, finished.stderr
    out = tmp_path / "models/sft"
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if "eval_loss" in row and row["step"]]
    manifest = manifest_of(out)
    training = manifest["tallies"]["training"]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert (training["best_step"], training["best_eval_loss"]) == (best["step"], best["eval_loss"])
    assert rows[-1]["step"] == best["step"] + 4
    assert manifest["progress"].endswith("stopped early")
    card = (out / "README.md").read_text()
    steps, planned = training["steps"], training["planned_steps"]
    assert f"- steps: {steps} of {planned}\n" in card
    assert f"- epochs: {training['epochs']:.3g} of 10\n" in card
    assert training["epochs"] == rows[-1]["epoch"]
    assert f"best weights of step {best['step']}" in finished.stderr
    # What is saved is what had the best loss: a run that ends there has the same weights.
    shorter = srt(
        *line, "--epochs", 10, "--out", "models/shorter", "--set", f"max_steps={best['step']}"
    )
    assert shorter.code == 0, shorter.stderr
    one, other = (tmp_path / name / "model.safetensors" for name in (out, "models/shorter"))
    assert one.read_bytes() == other.read_bytes()


def test_a_validation_loss_that_is_no_number_is_never_the_best():
    on_disk = [{"step": step, "eval_loss": loss} for step, loss in enumerate((9, 2, None, 3))]
    assert best_evaluation(on_disk) == (best := Best(step=1, loss=2, waited=2))
    on_disk[2]["eval_loss"] = math.nan
    assert best_evaluation(on_disk) == best
    assert best_evaluation(on_disk[2:3]) is None


def test_early_stopping_needs_held_out_rows(sft):
    finished = sft("--early-stopping", 2)
    assert finished.code == 2
    assert "hold rows out with --eval-split" in finished.stderr


def test_deterministic_asks_torch_for_it_and_says_so(sft, tmp_path):
    weights = []
    for name in ("one", "two"):
        finished = sft("--epochs", 1, "--samples", 0, "--deterministic", "--out", f"models/{name}")
        assert finished.code == 0, finished.stderr
        weights.append((tmp_path / "models" / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert "only kernels that give the same result every time" in finished.stderr
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_diverged_training_aborts_and_its_page_says_why(sft, tmp_path):
    finished = sft("--epochs", 4, "--samples", 0, "--learning-rate", 1e20, "--max-grad-norm", 1e9)
    assert finished.code == 1
    assert "training has diverged. Lower --learning-rate" in finished.stderr
    manifest = manifest_of(tmp_path / "models/sft")
    assert manifest["status"] == "failed"
    assert "training has diverged" in (tmp_path / "models/sft/training.html").read_text()


def test_warnings_of_health_come_once_and_stand_in_the_manifest(dpo, tmp_path):
    finished = dpo("--epochs", 16, "--samples", 0, "--learning-rate", 1e-1)
    assert finished.code == 0, finished.stderr
    assert finished.stderr.count("every chosen answer has been preferred") == 1
    warnings = manifest_of(tmp_path / "models/dpo")["warnings"]
    assert sum("every chosen answer has been preferred" in warning for warning in warnings) == 1

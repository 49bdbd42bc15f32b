"""kill -9, SIGTERM and a full disk in training, then the same line: equal to an uninterrupted run."""

import json
import signal
from pathlib import Path

import pytest
from conftest import read_jsonl, write_jsonl
from killing import Started, kill_when, lines_in, run, sha256
from test_dpo import pair_rows
from test_sft import feedback_rows

SFT = ("sft", "--global-batch", 4, "--epochs", 20, "--learning-rate", 1e-3, "--critic-check", 0,
       "--samples", 0)  # fmt: skip
DPO = ("dpo", "--global-batch", 4, "--epochs", 3, "--save-every", 3, "--learning-rate", 1e-3,
       "--samples", 0)  # fmt: skip


@pytest.fixture(scope="module")
def straight_sft(tmp_path_factory, tiny_model):
    """A model directory that was trained without a break."""
    folder = tmp_path_factory.mktemp("straight")
    write_jsonl(folder / "feedback.jsonl", feedback_rows(16))
    run(folder, *SFT, "--model", tiny_model)
    return folder / "models/sft"


def assert_same_training(out: Path, straight: Path) -> None:
    assert sha256(out / "model.safetensors") == sha256(straight / "model.safetensors")
    losses = [
        [row["loss"] for row in read_jsonl(each / "metrics.jsonl")] for each in (out, straight)
    ]
    assert losses[0] == losses[1]
    assert not (out / "checkpoints").exists()


def test_sft_ends_with_the_same_weights_also_from_a_torn_checkpoint(
    tmp_path, straight_sft, tiny_model
):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(16))
    line = (*SFT, "--model", tiny_model, "--save-every", 7)
    out = tmp_path / "models/sft"
    kill_when(tmp_path, (out / "checkpoints/checkpoint-14/whole").exists, *line)
    assert not (out / "config.json").exists()
    for torn in out.glob("checkpoints/checkpoint-*"):
        if torn.name != "checkpoint-7":
            (torn / "whole").unlink(missing_ok=True)
            (torn / "optimizer.pt").write_bytes(b"torn")
    run(tmp_path, *line)
    assert_same_training(out, straight_sft)


def test_sigterm_saves_a_checkpoint_and_exits_130(tmp_path, straight_sft, tiny_model):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(16))
    line = (*SFT, "--model", tiny_model)
    out = tmp_path / "models/sft"
    started = Started(tmp_path, *line)
    started.send_when(lambda: lines_in(out / "metrics.jsonl") >= 5, signal.SIGTERM)
    code, stderr = started.wait()
    assert code == 130
    assert "error: stopped; what is complete is written" in stderr
    assert "Traceback" not in stderr
    assert '"status": "interrupted"' in (out / "run.json").read_text()
    assert list(out.glob("checkpoints/checkpoint-*/whole"))
    run(tmp_path, *line)
    assert_same_training(out, straight_sft)


def test_dpo_ends_with_the_same_weights(two_folders, tiny_model):
    for folder in two_folders:
        write_jsonl(folder / "prefs.jsonl", pair_rows(16))
    straight, killed = (folder / "models/dpo" for folder in two_folders)
    run(two_folders[0], *DPO, "--model", tiny_model)
    marker = killed / "checkpoints/checkpoint-6/whole"
    kill_when(two_folders[1], marker.exists, *DPO, "--model", tiny_model)
    run(two_folders[1], *DPO, "--model", tiny_model)
    assert_same_training(killed, straight)


def test_adapters_with_dropout_stop_early_with_the_same_weights(two_folders, tiny_model):
    """Dropout's random state, the best weights and the patience used up so far survive a kill."""
    line = ("sft", "--model", tiny_model, "--method", "lora", "--lora-dropout", 0.1,
            "--global-batch", 4, "--epochs", 12, "--learning-rate", 2, "--warmup", 0,
            "--lr-schedule", "constant_with_warmup", "--eval-split", 0.3, "--eval-every", 1,
            "--early-stopping", 2, "--save-every", 1, "--critic-check", 0)  # fmt: skip
    for folder in two_folders:
        write_jsonl(folder / "feedback.jsonl", feedback_rows(16))
    straight, killed = (folder / "models/sft" for folder in two_folders)
    run(two_folders[0], *line)
    training = manifest(straight)["tallies"]["training"]
    assert training["best_step"] + 2 == training["steps"]
    marker = killed / f"checkpoints/checkpoint-{training['best_step'] + 1}/whole"
    kill_when(two_folders[1], marker.exists, *line)
    run(two_folders[1], *line)
    steps = [row for row in read_jsonl(killed / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, training["steps"] + 1))
    assert sha256(killed / "model.safetensors") == sha256(straight / "model.safetensors")
    resumed = manifest(killed)["tallies"]["training"]
    for name in ("best_step", "best_eval_loss", "steps", "final_loss", "tokens"):
        assert resumed[name] == training[name], name
    # Like steps and tokens, the seconds are of both sittings.
    assert resumed["seconds"] == pytest.approx(sum(row["seconds"] for row in steps))
    samples = [read_jsonl(folder / "samples.jsonl") for folder in (straight, killed)]
    assert samples[0] == samples[1]


def manifest(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_a_checkpoint_under_an_edited_manifest_is_refused(srt, tmp_path, tiny_model):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(8))
    line = ("sft", "--model", tiny_model, "--global-batch", 4, "--critic-check", 0, "--samples", 0)
    line += ("--epochs", 2, "--save-every", 2, "--keep-checkpoints")
    assert srt(*line, "--learning-rate", 1e-3).code == 0
    out = tmp_path / "models/sft"
    edited = manifest(out) | {"status": "started"}
    edited["settings"]["learning_rate"] = 5e-4
    (out / "run.json").write_text(json.dumps(edited))
    (out / "config.json").unlink()
    refused = srt(*line, "--learning-rate", 5e-4)
    assert refused.code == 1
    assert "checkpoint-2: is of another training (--learning-rate was 0.001, now 0.0005)" in (
        refused.stderr
    )


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("settings", "seed", 7, "--seed was 42, now 7"),
        ("settings", "global_batch", 8, "--global-batch was 4, now 8"),
        ("data", "data", "bb", "the digest of --data was 'aa', now 'bb'"),
        ("templates", "critique", "dd", "template critique was 'cc', now 'dd'"),
        ("place", "processes", 2, "processes was 1, now 2"),
    ],
)
def test_what_differs_from_a_checkpoint_is_named(tmp_path, kind, name, value, message):
    from srt_cli.errors import SrtError
    from srt_cli.training.checkpoints import mark_whole, newest_checkpoint, refuse_other_training

    def training():
        return {
            "settings": {"seed": 42, "global_batch": 4},
            "data": {"data": "aa"},
            "templates": {"critique": "cc"},
            "place": {"processes": 1},
        }

    (tmp_path / "checkpoints/checkpoint-3").mkdir(parents=True)
    mark_whole(tmp_path, 3, training())
    checkpoint, step = newest_checkpoint(tmp_path)
    assert step == 3
    refuse_other_training(checkpoint, training())
    several = training()
    several["settings"]["seed"] = [42]  # an option that takes several values since
    refuse_other_training(checkpoint, several)
    other = training()
    other[kind][name] = value
    with pytest.raises(SrtError, match="is of another training") as refused:
        refuse_other_training(checkpoint, other)
    assert f"({message})" in str(refused.value)


def test_a_disk_that_fills_up_while_saving_is_said_and_the_run_goes_on(tmp_path, tiny_model):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(8))
    line = ("sft", "--model", tiny_model, "--global-batch", 4, "--epochs", 3, "--samples", 0,
            "--save-every", 2, "--critic-check", 0)  # fmt: skip
    # Room for the weights, and not for the optimizer's state, which is twice as large.
    room = (tiny_model / "model.safetensors").stat().st_size * 3 // 2
    code, stderr = Started(tmp_path, *line, room=room).wait()
    assert code == 1, stderr
    assert "Traceback" not in stderr
    assert "models/sft: cannot be written, the disk is full. Free some space and run" in stderr
    out = tmp_path / "models/sft"
    assert not list(out.glob("checkpoints/checkpoint-*"))
    assert manifest(out)["status"] == "failed"
    run(tmp_path, *line)
    assert (out / "config.json").exists()

"""kill -9 at any moment, then the same line again: the result is an uninterrupted run's."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import read_jsonl, write_jsonl
from test_dpo import pair_rows
from test_sft import feedback_rows

CRITIC = """
import time
from srt_cli.records import Feedback

def respond(prompt):
    time.sleep(0.004)
    return "It is " + prompt.text

def critique(prompt, response):
    time.sleep(0.004)
    good = response.endswith("!")
    feedback = Feedback(weaknesses="Dull.", suggestions="Spirit.", score=9 if good else 4)
    return feedback, response + "!"
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "srt_cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(folder: Path, *arguments: object) -> None:
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def kill_when(folder: Path, ready: Callable[[], bool], *arguments: object) -> None:
    """Start a command and kill -9 it as soon as `ready` says so."""
    process = subprocess.Popen(
        command(*arguments), cwd=folder, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, "the command ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def two_folders(tmp_path):
    folders = tmp_path / "straight", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    return folders


def test_collect_feedback_pays_for_nothing_twice(two_folders):
    straight, killed = two_folders
    for folder in two_folders:
        (folder / "critic.py").write_text(CRITIC)
        write_jsonl(folder / "prompts.jsonl", [{"id": n, "prompt": f"p{n}"} for n in range(40)])
    line = ("collect-feedback", "--model", "python:critic.py:respond",
            "--critic", "python:critic.py:critique")  # fmt: skip
    run(straight, *line)
    journal = killed / "feedback.journal.jsonl"
    for answered in (5, 30, 70, 110):
        kill_when(killed, lambda n=answered: lines_in(journal) >= n, *line)
        assert not (killed / "feedback.jsonl").exists()
    run(killed, *line)
    assert (killed / "feedback.jsonl").read_bytes() == (straight / "feedback.jsonl").read_bytes()
    keys = [row["key"] for row in read_jsonl(journal)]
    assert len(keys) == len(set(keys)) == 120


def test_ctrl_c_writes_what_is_complete_and_exits_130(tmp_path):
    (tmp_path / "critic.py").write_text(CRITIC)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"p{n}"} for n in range(2000)])
    line = ("collect-feedback", "--model", "python:critic.py:respond",
            "--critic", "python:critic.py:critique")  # fmt: skip
    process = subprocess.Popen(
        command(*line), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    while lines_in(tmp_path / "feedback.journal.jsonl") < 150:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "error: stopped; what is complete is written" in stderr
    assert "Traceback" not in stderr
    written = lines_in(tmp_path / "feedback.jsonl")
    assert 0 < written < 2000
    manifest = (tmp_path / "feedback.run.json").read_text()
    assert '"status": "interrupted"' in manifest
    assert f'"progress": "{written} of 2000"' in manifest


def test_self_critique_goes_on_byte_for_byte(two_folders, tiny_model):
    straight, killed = two_folders
    for folder in two_folders:
        write_jsonl(folder / "prompts.jsonl", [{"id": n, "prompt": f"p {n}"} for n in range(24)])
    line = ("self-critique", "--model", tiny_model, "--batch-size", 4,
            "--max-new-tokens", 24, "--critic-max-tokens", 24)  # fmt: skip
    run(straight, *line)
    journal = killed / "self-feedback.journal.jsonl"
    for answered in (4, 32):
        kill_when(killed, lambda n=answered: lines_in(journal) >= n, *line)
    run(killed, *line)
    first = (straight / "self-feedback.jsonl").read_bytes()
    assert (killed / "self-feedback.jsonl").read_bytes() == first
    assert len({row["response"] for row in read_jsonl(killed / "self-feedback.jsonl")}) > 12


JUDGE = """
import time

def judge(prompt, a, b):
    time.sleep(0.004)
    return float(len(a) > len(b))
"""


def build_prefs_files(folder: Path, rows: int) -> tuple[object, ...]:
    """Feedback and a judge in a folder; the line that builds preferences and audits them."""
    (folder / "judge.py").write_text(JUDGE)
    write_jsonl(folder / "self-feedback.jsonl", feedback_rows(rows))
    return (
        "build-prefs", "--strategy", "best-worst", "--max-length-ratio", 99, "--format", "kto",
        "--length-balance", "none", "--audit", 60, "--audit-judge", "python:judge.py:judge",
        "--label-page", "label.html",
    )  # fmt: skip


MADE = ("prefs.jsonl", "prefs.dropped.jsonl", "prefs.kto.jsonl", "label.html")


def assert_same_preferences(killed: Path, straight: Path) -> None:
    for name in MADE:
        there = [(folder / name).exists() for folder in (killed, straight)]
        assert there[0] == there[1], name
        if there[0]:
            assert (killed / name).read_bytes() == (straight / name).read_bytes(), name
    audits = [
        json.loads((folder / "prefs.run.json").read_text())["tallies"]["audit"]
        for folder in (killed, straight)
    ]
    assert audits[0] == audits[1]
    assert not list(killed.glob("*.tmp"))


def test_build_prefs_killed_in_its_audit_judges_nothing_twice(two_folders):
    straight, killed = two_folders
    for folder in two_folders:
        line = build_prefs_files(folder, 80)
    run(straight, *line)
    journal = killed / "prefs.journal.jsonl"
    for answered in (3, 50, 100):
        kill_when(killed, lambda n=answered: lines_in(journal) >= n, *line)
        assert lines_in(killed / "prefs.jsonl") == lines_in(straight / "prefs.jsonl")
    run(killed, *line)
    assert_same_preferences(killed, straight)
    keys = [row["key"] for row in read_jsonl(journal)]
    assert len(keys) == len(set(keys)) == 120


def test_build_prefs_killed_while_it_writes_leaves_nothing_half_done(two_folders):
    straight, killed = two_folders
    for folder in two_folders:
        line = build_prefs_files(folder, 4000)
    run(straight, *line)
    kill_when(killed, (killed / "prefs.run.json").exists, *line)
    kill_when(killed, (killed / "prefs.jsonl.tmp").exists, *line)
    assert not (killed / "prefs.jsonl").exists()
    run(killed, *line)
    assert_same_preferences(killed, straight)


SFT = ("sft", "--global-batch", 4, "--epochs", 20, "--learning-rate", 1e-3, "--critic-check", 0)
DPO = ("dpo", "--global-batch", 4, "--epochs", 3, "--save-every", 3, "--learning-rate", 1e-3)


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
    process = subprocess.Popen(
        command(*line), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    out = tmp_path / "models/sft"
    while lines_in(out / "metrics.jsonl") < 5:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
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
    limited = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "from srt_cli.cli import main\n"
        "sys.argv = ['srt', *sys.argv[1:]]\n"
        "main()\n"
    )
    full = subprocess.run(
        [sys.executable, "-c", limited, *map(str, line)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert "models/sft: cannot be written, the disk is full. Free some space and run" in full.stderr
    out = tmp_path / "models/sft"
    assert not list(out.glob("checkpoints/checkpoint-*"))
    assert manifest(out)["status"] == "failed"
    run(tmp_path, *line)
    assert (out / "config.json").exists()


def test_self_critique_in_two_processes_goes_on_after_a_kill(two_folders, tiny_model):
    straight, killed = two_folders
    for folder in two_folders:
        write_jsonl(folder / "prompts.jsonl", [{"id": n, "prompt": f"p {n}"} for n in range(16)])
    line = ("self-critique", "--model", tiny_model, "--batch-size", 2,
            "--max-new-tokens", 24, "--critic-max-tokens", 24)  # fmt: skip
    run(straight, *line)

    def some_are_answered() -> bool:
        return sum(map(lines_in, killed.glob("self-feedback.journal.part-*.jsonl"))) >= 4

    kill_when(killed, some_are_answered, *line, "--num-processes", 2)
    assert not (killed / "self-feedback.jsonl").exists()
    run(killed, *line, "--num-processes", 2)
    first = (straight / "self-feedback.jsonl").read_bytes()
    assert (killed / "self-feedback.jsonl").read_bytes() == first
    assert not list(killed.glob("*.part-*"))


def test_a_process_that_is_killed_leaves_its_rows_to_the_others(tmp_path, tiny_model):
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"p {n}"} for n in range(8)])
    line = ("self-critique", "--model", tiny_model, "--batch-size", 2, "--num-processes", 2,
            "--max-new-tokens", 24, "--critic-max-tokens", 24)  # fmt: skip
    process = subprocess.Popen(
        command(*line), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    part = tmp_path / "self-feedback.journal.part-1.jsonl"
    while not lines_in(part):
        assert process.poll() is None
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    worker = next(
        child
        for child in map(int, children)
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    os.kill(worker, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "a process ended early (exit -9); its rows are made here" in stderr
    assert lines_in(tmp_path / "self-feedback.jsonl") == 8

"""kill -9 at any moment, then the same line again: the result is an uninterrupted run's."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import read_jsonl, write_jsonl
from killing import (
    Started,
    command,
    environment,
    is_loading,
    kill_when,
    lines_in,
    run,
    spawned_by,
    wait_until_gone,
)
from test_sft import feedback_rows

from srt_cli.cli import STOPPED

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


NO_USABLE_ROW = 3
"""How a run of the tiny model ends: the tokens it is given hold no whole critique."""


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
    run(straight, *line, code=NO_USABLE_ROW)
    journal = killed / "self-feedback.journal.jsonl"
    for answered in (4, 32):
        kill_when(killed, lambda n=answered: lines_in(journal) >= n, *line)
    run(killed, *line, code=NO_USABLE_ROW)
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
        "build-prefs", "--strategy", "best-worst", "--max-length-ratio", 99, "--export", "kto",
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
    kill_when(killed, (killed / ".prefs.jsonl.srt.tmp").exists, *line)
    assert not (killed / "prefs.jsonl").exists()
    run(killed, *line)
    assert_same_preferences(killed, straight)


def test_self_critique_in_two_processes_goes_on_after_a_kill(two_folders, tiny_model):
    straight, killed = two_folders
    for folder in two_folders:
        write_jsonl(folder / "prompts.jsonl", [{"id": n, "prompt": f"p {n}"} for n in range(16)])
    line = ("self-critique", "--model", tiny_model, "--batch-size", 2,
            "--max-new-tokens", 24, "--critic-max-tokens", 24)  # fmt: skip
    run(straight, *line, code=NO_USABLE_ROW)

    def some_are_answered() -> bool:
        return sum(map(lines_in, killed.glob("self-feedback.journal.part-*.jsonl"))) >= 4

    kill_when(killed, some_are_answered, *line, "--num-processes", 2)
    assert not (killed / "self-feedback.jsonl").exists()
    run(killed, *line, "--num-processes", 2, code=NO_USABLE_ROW)
    first = (straight / "self-feedback.jsonl").read_bytes()
    assert (killed / "self-feedback.jsonl").read_bytes() == first
    assert not list(killed.glob("*.part-*"))


def test_a_process_that_is_killed_leaves_its_rows_to_the_others(tmp_path, tiny_model):
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"p {n}"} for n in range(8)])
    line = ("self-critique", "--model", tiny_model, "--batch-size", 2, "--num-processes", 2,
            "--max-new-tokens", 24, "--critic-max-tokens", 24)  # fmt: skip
    started = Started(tmp_path, *line)
    part = tmp_path / "self-feedback.journal.part-1.jsonl"
    started.wait_until(lambda: lines_in(part) > 0)
    worker = spawned_by(started.pid)[0]
    os.kill(worker, signal.SIGKILL)
    code, stderr = started.wait()
    assert code == NO_USABLE_ROW, stderr
    assert "a process ended early (exit -9); its rows are made here" in stderr
    assert lines_in(tmp_path / "self-feedback.jsonl") == 8


def test_ctrl_c_reaches_two_processes_and_keeps_what_is_done(two_folders, tiny_model):
    straight, stopped = two_folders
    for folder in two_folders:
        write_jsonl(folder / "prompts.jsonl", [{"id": n, "prompt": f"p {n}"} for n in range(16)])
    line = ("self-critique", "--model", tiny_model, "--batch-size", 2,
            "--max-new-tokens", 24, "--critic-max-tokens", 24)  # fmt: skip
    run(straight, *line, code=NO_USABLE_ROW)
    line += ("--num-processes", 2)

    def some_are_answered(parent: int) -> bool:
        return sum(map(lines_in, stopped.glob("self-feedback.journal.part-*.jsonl"))) >= 4

    # The first while the processes load their libraries, the second while they answer.
    for ready in (is_loading, some_are_answered):
        started = Started(stopped, *line)
        started.wait_until(lambda ready=ready, pid=started.pid: ready(pid))
        os.killpg(started.session, signal.SIGINT)  # as a terminal does: to all of them
        code, stderr = started.wait()
        assert code == 130
        assert "error: stopped; what is complete is written" in stderr
        assert "Traceback" not in stderr
        assert "ended early" not in stderr
        wait_until_gone(started.session)
        assert not list(stopped.glob("*.part-*"))
        assert '"status": "interrupted"' in (stopped / "self-feedback.run.json").read_text()
    kept = read_jsonl(stopped / "self-feedback.journal.jsonl")
    assert len(kept) >= 4
    run(stopped, *line, code=NO_USABLE_ROW)
    first = (straight / "self-feedback.jsonl").read_bytes()
    assert (stopped / "self-feedback.jsonl").read_bytes() == first
    journal = read_jsonl(stopped / "self-feedback.journal.jsonl")
    assert journal[: len(kept)] == kept
    assert len({row["key"] for row in journal}) == len(journal)


def of_programs(folder: Path, rows: int) -> tuple[str, ...]:
    """Prompts and a critic in a folder; the line that collects the critic's feedback on them."""
    (folder / "critic.py").write_text(CRITIC)
    write_jsonl(folder / "prompts.jsonl", [{"id": n, "prompt": f"p {n}"} for n in range(rows)])
    return ("collect-feedback", "--model", "python:critic.py:respond",
            "--critic", "python:critic.py:critique")  # fmt: skip


# What a library may leave behind: something that aborts when the process tears it down.
TORN_DOWN = """
import ctypes
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)
"""


def test_a_stopped_run_ends_with_its_own_code_whatever_a_library_leaves_behind(tmp_path):
    line = of_programs(tmp_path, rows=2)
    stops = "\n    import os, signal\n    os.kill(os.getpid(), signal.SIGINT)\n"
    critic = CRITIC.replace("def respond(prompt):", "def respond(prompt):" + stops)
    (tmp_path / "critic.py").write_text(TORN_DOWN + critic)
    ended = subprocess.run(
        command(*line), cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert (ended.returncode, "what is complete is written" in ended.stderr) == (130, True)


STOPPED_IN_A_CALLBACK = """
import signal, sys, time, weakref
from srt_cli.__main__ import run
from srt_cli.stages import build_prefs

def begin(options):
    held = {"a thing"}
    watched = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGINT))
    del held
    time.sleep(20)

build_prefs.run = begin
sys.argv = ["srt", "build-prefs"]
run()
"""


def test_ctrl_c_during_a_callback_that_python_protects_still_stops_the_run(tmp_path):
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", STOPPED_IN_A_CALLBACK],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (130, f"error: {STOPPED}\n")
    assert time.monotonic() - began < 15


def close_its_terminal(folder: Path, answered: int, *line: str, deaf: bool = False) -> int:
    """The exit code of a command whose terminal is closed after so many replies.

    One that is `deaf` hears no hang-up, as under nohup.
    """
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        if deaf:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.execve(sys.executable, command(*line), environment())
    while lines_in(folder / "feedback.journal.jsonl") < answered:
        time.sleep(0.01)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_closed_terminal_ends_a_run_as_sigterm_does(tmp_path):
    line = of_programs(tmp_path, 20_000)
    assert close_its_terminal(tmp_path, 300, *line) == 130
    manifest = json.loads((tmp_path / "feedback.run.json").read_text())
    assert manifest["status"] == "interrupted"
    assert 0 < lines_in(tmp_path / "feedback.jsonl") < 20_000
    assert not list(tmp_path.glob("*.tmp"))


def test_nohup_keeps_a_run_going_when_the_terminal_closes(tmp_path):
    line = of_programs(tmp_path, 200)
    process = subprocess.Popen(["nohup", *command(*line)], cwd=tmp_path, env=environment())
    while lines_in(tmp_path / "feedback.journal.jsonl") < 300:
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    assert lines_in(tmp_path / "feedback.jsonl") == 200


def test_a_run_that_outlives_its_terminal_ends_as_well_as_any_other(tmp_path):
    line = of_programs(tmp_path, 200)
    assert close_its_terminal(tmp_path, 100, *line, deaf=True) == 0
    assert lines_in(tmp_path / "feedback.jsonl") == 200

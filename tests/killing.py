"""Commands as processes of their own, to be killed at a chosen moment."""

import atexit
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from conftest import signals_kept
from nursery import Nursery

from srt_cli.cli import main


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "srt_cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(folder: Path, *arguments: object, code: int = 0) -> None:
    """A command that nobody kills needs no process of its own, and no second loading of torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["srt", *map(str, arguments)])
        try:
            with signals_kept():
                main()
            ended = 0
        except SystemExit as stop:
            ended = int(stop.code or 0)
    assert ended == code


class Started:
    """A command in a process of its own, forked from one that has loaded what it needs."""

    def __init__(self, folder: Path, *arguments: object, room: int | None = None) -> None:
        kind = "torch" if arguments[0] in ("self-critique", "sft", "dpo") else "calls"
        self._talk = folder.with_suffix(".talk")
        self.pid, self.session = _nursery(kind).fork(list(map(str, arguments)), self._talk, room)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready` says so."""
        deadline = time.monotonic() + 120
        while not ready():
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), "the command has ended before"
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def send_when(self, ready: Callable[[], bool], number: signal.Signals) -> None:
        """Send a signal as soon as `ready` says so."""
        self.wait_until(ready)
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """Its exit code, and what it said on stderr."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), self._talk.read_text()


def kill_when(folder: Path, ready: Callable[[], bool], *arguments: object) -> None:
    """Start a command and kill -9 it as soon as `ready` says so."""
    started = Started(folder, *arguments)
    started.send_when(ready, signal.SIGKILL)
    started.wait()


@cache
def _nursery(kind: str) -> Nursery:
    nursery = Nursery(kind, environment())
    atexit.register(nursery.close)
    return nursery


def spawned_by(parent: int) -> list[int]:
    """Worker processes that a command has started, Python's own helper left out."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [
        int(child) for child in children if "spawn_main" in _read(Path(f"/proc/{child}/cmdline"))
    ]


def is_loading(parent: int) -> bool:
    """Whether a worker process has begun to import what it needs."""
    return any("pydantic_core" in _read(Path(f"/proc/{n}/maps")) for n in spawned_by(parent))


def wait_until_gone(session: int) -> None:
    """Fail unless every process of a session ends within a few seconds."""
    deadline = time.monotonic() + 10
    while left := _alive_in(session):
        assert time.monotonic() < deadline, f"orphans: {left}"
        time.sleep(0.05)


def _alive_in(session: int) -> list[str]:
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        content = _read(stat)
        state, _, _, its_session = (content.rpartition(")")[2].split() or ["Z", "", "", "0"])[:4]
        if int(its_session) == session and state != "Z":
            alive.append(content[:80])
    return alive


def _read(path: Path) -> str:
    """A file of /proc; empty when the process has just gone."""
    try:
        return path.read_text()
    except OSError:
        return ""


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

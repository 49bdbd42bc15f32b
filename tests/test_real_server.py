"""llama.cpp's own server with SmolLM2: what a loopback server cannot show."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import read_jsonl, write_jsonl

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp"
    ),
]

SERVE = """
import sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.n_parallel, parameters.n_ctx = int(sys.argv[3]), int(sys.argv[4])
parameters.cpuparams.n_threads, parameters.warmup = 1, False
server = xllamacpp.Server(parameters)
time.sleep(600)
"""
CRITIC = """
def critique(prompt, response):
    return {"weaknesses": "Thin.", "suggestions": "More.", "score": 6}, response + " And more."
"""


class RealServer:
    """A server in a process of its own, which can be killed and started again at its port."""

    def __init__(self, weights: Path, slots: int = 2, context: int = 4096) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.line = [sys.executable, "-c", SERVE, str(weights), str(self.port)]
        self.line += [str(slots), str(context)]
        self.start()

    @property
    def spec(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1#smollm2"

    def start(self, *, wait: bool = True) -> None:
        self.process = subprocess.Popen(
            self.line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while wait and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.1)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def real(smollm2_gguf):
    servers = []

    def start(**options):
        servers.append(RealServer(smollm2_gguf, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def _rows(folder, count):
    (folder / "critic.py").write_text(CRITIC)
    rows = [{"id": str(n), "prompt": f"Name {n + 2} fruits."} for n in range(count)]
    write_jsonl(folder / "prompts.jsonl", rows)


def test_one_slot_and_a_short_timeout_lose_no_row(srt, real, tmp_path):
    server = real(slots=1)
    _rows(tmp_path, 30)
    line = ("collect-feedback", "--model", server.spec, "--critic", "python:critic.py:critique")
    result = srt(*line, "--max-new-tokens", 12, "--timeout", 4)
    assert result.code == 0, result.stderr
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert [row["id"] for row in rows if row["status"] in ("ok", "truncated")] == [
        str(n) for n in range(30)
    ]


def test_a_server_that_is_killed_and_starts_again_costs_no_row(srt, real, tmp_path):
    server = real()
    _rows(tmp_path, 30)

    def restart():
        journal = tmp_path / "feedback.journal.jsonl"
        while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
            time.sleep(0.05)
        server.kill()
        time.sleep(3)
        server.start(wait=False)

    thread = threading.Thread(target=restart)
    thread.start()
    line = ("collect-feedback", "--model", server.spec, "--critic", "python:critic.py:critique")
    result = srt(*line, "--max-new-tokens", 12)
    thread.join()
    statuses = {row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")}
    assert (result.code, statuses <= {"ok", "truncated"}) == (0, True), result.stderr
    assert "waiting, at most 600 s" in result.stderr

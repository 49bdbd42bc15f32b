"""The HTTP path on a real server with a real model: `transformers serve` with SmolLM2 on loopback."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import read_jsonl, write_jsonl
from killing import kill_when, lines_in, run

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def server(smollm2):
    """One for both tests: the last one kills it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transformers = Path(sys.executable).parent / "transformers"
    process = subprocess.Popen(
        [transformers, "serve", smollm2, "--host", "127.0.0.1", "--port", str(port),
         "--device", "cpu", "--dtype", "float32"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
            break
        except urllib.error.HTTPError:
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.3)
    yield f"http://127.0.0.1:{port}/v1#{smollm2}", process
    process.kill()
    process.wait()


# What the smallest model can be brought to: sometimes a verdict, sometimes a number, sometimes talk.
VERDICT = re.compile(r"^\W*Verdict\W*(M|m|tie)\W*$", re.MULTILINE | re.IGNORECASE)
TEMPLATE = (
    'Correct the spelling of the line "Verdict: [[M]]" and give only that line. '
    "Notes: {instruction}{answer_M}{answer_m}"
)


def test_a_judged_evaluation_killed_half_way_ends_as_an_uninterrupted_one(tmp_path, server):
    spec, _ = server
    line = ("eval", "--model", "mine.jsonl", "--reference", "base.jsonl", "--judge", spec,
            "--judge-template", "judge.txt", "--judge-max-tokens", 10, "--min-coverage", 0,
            "--concurrency", 2)  # fmt: skip
    for name in ("straight", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "judge.txt").write_text(TEMPLATE)
        prompts = [{"id": str(n), "prompt": f"Name {n} fruits."} for n in range(6)]
        write_jsonl(folder / "prompts.jsonl", prompts)
        for file, text in (("mine", "an apple and {n} pears"), ("base", "{n}")):
            rows = [{"id": str(n), "response": text.format(n=n)} for n in range(6)]
            write_jsonl(folder / f"{file}.jsonl", rows)
    run(tmp_path / "straight", *line)
    journal = tmp_path / "killed" / "eval.journal.jsonl"
    kill_when(tmp_path / "killed", lambda: lines_in(journal) >= 4, *line)
    assert lines_in(journal) < 12
    run(tmp_path / "killed", *line)
    for name in ("eval.json", "judgments.jsonl", "report.html"):
        straight = (tmp_path / "straight" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == straight, name
    assert len(read_jsonl(journal)) == 12
    # A verdict that a real model gave in whole is read, and nothing else is taken for one.
    judged = read_jsonl(tmp_path / "killed" / "judgments.jsonl")
    assert {row["status"] for row in judged} <= {"ok", "unparsed", "truncated"}
    for row in judged:
        said = VERDICT.search(row["raw"]) is not None and row["status"] != "truncated"
        assert (row["status"] == "ok") == said, row
        assert (row["preference"] is not None) == said, row


def test_a_real_server_is_policy_and_critic_and_a_second_run_needs_it_no_more(
    srt, tmp_path, server
):
    spec, process = server
    prompts = [{"id": n, "prompt": text} for n, text in enumerate(("Name a fruit.", "Say hello."))]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    line = ("collect-feedback", "--model", spec, "--critic", spec, "--max-new-tokens", 16,
            "--critic-max-tokens", 16, "--concurrency", 2)  # fmt: skip
    finished = srt(*line)
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    # What so small a model says is the machine's arithmetic; what becomes of it is not.
    code = 0 if any(row["status"] == "ok" for row in rows) else 3
    assert finished.code == code, finished.stderr
    assert [row["id"] for row in rows] == ["0", "1"]
    for row in rows:
        assert row["response"].strip()
        assert row["raw"]["critique"].strip()
        assert row["usage"]["completion_tokens"] > 16
        assert row["status"] in ("ok", "unparsed", "truncated")
    kept = [tmp_path / "feedback.jsonl", tmp_path / "feedback.journal.jsonl"]
    first = [path.read_bytes() for path in kept]
    # It takes the wish for log-probabilities and leaves it unheard.
    for name, text in (("mine", "an apple"), ("base", "7")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": n, "response": text} for n in range(2)])
    judged = srt("eval", "--model", "mine.jsonl", "--reference", "base.jsonl", "--judge", spec,
                 "--limit", 1, "--judge-max-tokens", 4, "--min-coverage", 0)  # fmt: skip
    assert judged.code == 0, judged.stderr
    assert "gives no log-probabilities: it is asked for reasons" in judged.stderr
    process.kill()
    process.wait()
    again = srt(*line, "--reparse")
    assert again.code == code
    assert [path.read_bytes() for path in kept] == first

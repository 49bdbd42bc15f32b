"""The journal: what was paid for once is never lost and never paid for twice."""

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srt_cli.errors import SrtError
from srt_cli.runs.journal import Journal, request_key

KEYS = [request_key({"n": n}) for n in range(5)]


def test_a_reply_is_found_again_by_its_request(tmp_path):
    path = tmp_path / "x.journal.jsonl"
    with Journal(path) as journal:
        journal.append(KEYS[0], "first", {"text": "a\nb"})
        assert journal.get(KEYS[0])["text"] == "a\nb"
    with Journal(path) as journal:
        assert journal.get(KEYS[0])["text"] == "a\nb"
        assert journal.get(KEYS[1]) is None


def test_equal_requests_have_equal_keys_whatever_the_order_of_their_fields():
    assert request_key({"a": 1, "b": [2]}) == request_key({"b": [2], "a": 1})
    assert request_key({"a": 1}) != request_key({"a": 2})


@given(cut=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_a_torn_last_line_is_owed_again_and_the_others_stay(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("journal") / "x.journal.jsonl"
    with Journal(path) as journal:
        for key in KEYS[:3]:
            journal.append(key, "call", {"text": "t" * 20})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Journal(path) as journal:
        assert [key in journal for key in KEYS[:3]] == [True, True, False]
        journal.append(KEYS[2], "call", {"text": "again"})
    with Journal(path) as journal:
        assert journal.get(KEYS[2])["text"] == "again"
        assert journal.get(KEYS[1])["text"] == "t" * 20


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "5",
        "null",
        '"text"',
        "{}",
        '{"key": 5}',
        '{"key": "zz", "text": "t"}',
        '{"key": "KEY"}',
        '{"key": "KEY", "text": null}',
        '{"key": "KEY", "text": ["t"]}',
        '{"key": "KEY", "text": "t", "model": []}',
        '{"key": "KEY", "text": "t", "usage": 7}',
        '{"key": "KEY", "text": "t", "usage": {"prompt_tokens": "many"}}',
        '{"key": "KEY", "text": "t", "usage": {}, "cost": "dear"}',
    ],
)
def test_a_line_that_is_json_and_no_reply_is_torn(tmp_path, line):
    path = tmp_path / "x.journal.jsonl"
    with Journal(path) as journal:
        journal.append(KEYS[0], "call", {"text": "t"})
    with open(path, "a") as file:
        file.write(line.replace("KEY", KEYS[1].hex()) + "\n")
    with Journal(path) as journal:
        assert journal.unreadable == 1
        assert (KEYS[0] in journal, KEYS[1] in journal) == (True, False)
        journal.append(KEYS[1], "call", {"text": "again"})
    with Journal(path) as journal:
        assert journal.get(KEYS[1])["text"] == "again"


def test_a_second_writer_is_refused(tmp_path):
    path = tmp_path / "x.journal.jsonl"
    with Journal(path), pytest.raises(SrtError, match="another srt run is writing here"):
        Journal(path)
    Journal(path).close()


def test_kill_9_leaves_every_finished_append_behind(tmp_path):
    path = tmp_path / "x.journal.jsonl"
    program = (
        "import sys; from pathlib import Path; from srt_cli.runs.journal import *\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for n in range(5): journal.append(request_key({'n': n}), 'c', {'text': str(n)})\n"
        "print('done', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"done\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with Journal(path) as journal:
        assert [journal.get(key)["text"] for key in KEYS] == ["0", "1", "2", "3", "4"]


def test_a_full_disk_tears_no_line(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.journal.jsonl"
    program = (
        "import resource, signal, sys; from pathlib import Path; from srt_cli.runs.journal import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "try:\n"
        "    for n in range(9): journal.append(request_key({'n': n}), 'c', {'text': 'x' * 50})\n"
        "except OSError: sys.exit(7)"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == 7
    assert path.read_bytes().endswith(b"}\n")
    with Journal(path) as journal:
        assert len(journal) == 2
        assert journal.unreadable == 0


def test_parts_are_found_whatever_the_journal_is_called(tmp_path):
    name = "fb[1]*?.journal.jsonl"
    with Journal(tmp_path / name) as journal:
        with Journal(journal.part("1"), beside=journal.path) as part:
            part.append(b"k" * 16, "p1 critique", {"text": "x"})
        with Journal(tmp_path / "fb1.journal.part-1.jsonl") as other:
            other.append(b"o" * 16, "p2 critique", {"text": "y"})
        journal.absorb_parts()
        assert list(journal) == [b"k" * 16]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fb1.journal.part-1.jsonl", name]

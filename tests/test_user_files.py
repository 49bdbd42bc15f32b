"""No run costs a user a file of their own, and what a run is told to read or write it may be a link,
a pipe or a compressed file."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading

import pytest
from conftest import read_jsonl, write_jsonl

from srt_cli.errors import SrtError
from srt_cli.runs.jsonl import OrderedWriter, write_atomically

PROGRAM = """\
def respond(prompt):
    return "A short answer."


def critique(prompt, response):
    return {"weaknesses": "thin", "suggestions": "more", "score": 6}, response + " Better."
"""
LINE = ("collect-feedback", "--model", "python:p.py:respond", "--critic", "python:p.py:critique")


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "p.py").write_text(PROGRAM)
    write_jsonl(
        tmp_path / "prompts.jsonl", [{"id": str(n), "prompt": f"task {n}"} for n in range(3)]
    )
    return tmp_path


def test_changes_by_hand_are_noticed_before_the_same_line_replaces_them(srt, folder):
    assert srt(*LINE).code == 0
    out = folder / "feedback.jsonl"
    written = out.read_bytes()
    edited = written.replace(b"thin", b"very thin")
    out.write_bytes(edited)
    refused = srt(*LINE)
    assert refused.code == 1
    assert refused.stderr.endswith(
        "error: feedback.jsonl: was changed after srt wrote it. Rename it to keep the changes, or "
        "replace it with --overwrite.\n"
    )
    assert out.read_bytes() == edited
    out.rename(folder / "mine.jsonl")
    assert srt(*LINE).code == 0
    assert out.read_bytes() == written
    out.write_bytes(edited)
    assert srt(*LINE, "--overwrite").code == 0
    assert out.read_bytes() == written


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            (*LINE, "--out", "prompts.jsonl", "--overwrite"),
            "--out prompts.jsonl: would replace prompts.jsonl, the input of --prompts.",
        ),
        (
            ("build-prefs", "--data", "in.jsonl", "--data", "link.jsonl", "--out", "out.jsonl"),
            "--out out.jsonl: would replace link.jsonl, the input of --data.",
        ),
        (
            ("build-prefs", "--data", "p.dropped.jsonl", "--out", "p.jsonl"),
            "--out p.jsonl: would replace p.dropped.jsonl, the input of --data.",
        ),
        (
            ("sft", "--data", "models/own.jsonl", "--model", "m", "--out", "models", "--overwrite"),
            "--out models: would replace models/own.jsonl, the input of --data.",
        ),
    ],
)
def test_an_input_is_never_the_output(srt, folder, line, message):
    (folder / "models").mkdir()
    rows = [json.loads(line) for line in FEEDBACK.splitlines()]
    for name in ("in.jsonl", "p.dropped.jsonl", "models/own.jsonl"):
        write_jsonl(folder / name, rows)
    (folder / "link.jsonl").symlink_to("out.jsonl")
    write_jsonl(folder / "out.jsonl", rows)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused = srt(*line)
    assert (refused.code, message in refused.stderr) == (2, True), refused.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


FEEDBACK = (
    '{"id": "1", "prompt": "p", "response": "rough", "feedback": {"weaknesses": "w", '
    '"suggestions": "s", "score": 3}, "refinement": "better", "refinement_score": 9, '
    '"refinement_feedback": null, '
    '"status": "ok", "reason": null, "raw": {}, "policy": "given", "critic": "c", "sample": 0, '
    '"round": 1, "usage": {}}'
)


def test_a_file_of_the_user_beside_the_output_stays(srt, folder):
    victim = folder / "victim"
    victim.write_text("precious")
    for name in ("feedback.jsonl", "feedback.run.json"):
        (folder / f"{name}.tmp").write_text("mine")
        (folder / f".{name}.srt.tmp").symlink_to(victim)
    assert srt(*LINE).code == 0
    assert victim.read_text() == "precious"
    assert (folder / "feedback.jsonl.tmp").read_text() == "mine"
    assert len(read_jsonl(folder / "feedback.jsonl")) == 3
    assert not list(folder.glob(".*.tmp"))


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    left = tmp_path / ".x.json.srt.tmp"
    left.write_text("half")
    write_atomically(tmp_path / "x.json", b"whole")
    assert (tmp_path / "x.json").read_bytes() == b"whole"
    assert not left.exists()


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    first = OrderedWriter(tmp_path / "x.jsonl")
    with pytest.raises(SrtError, match=r"x\.jsonl: another srt run is writing it"):
        OrderedWriter(tmp_path / "x.jsonl")
    first.append(b"1\n")
    first.commit()
    assert (tmp_path / "x.jsonl").read_bytes() == b"1\n"


def test_a_link_as_output_is_written_through(srt, folder):
    (folder / "big").mkdir()
    (folder / "feedback.jsonl").symlink_to(folder / "big" / "there.jsonl")
    assert srt(*LINE).code == 0
    assert (folder / "feedback.jsonl").is_symlink()
    assert len(read_jsonl(folder / "big" / "there.jsonl")) == 3
    assert "nothing to do" in srt(*LINE).stdout


def test_an_output_that_ends_in_gz_is_gzip_and_the_same_every_time(srt, folder):
    assert srt(*LINE, "--out", "f.jsonl.gz").code == 0
    written = (folder / "f.jsonl.gz").read_bytes()
    assert len(gzip.decompress(written).splitlines()) == 3
    (folder / "f.jsonl.gz").unlink()
    assert srt(*LINE, "--out", "f.jsonl.gz").code == 0
    assert (folder / "f.jsonl.gz").read_bytes() == written
    read = srt("build-prefs", "--data", "f.jsonl.gz")
    assert "no pair is left (3 tie)" in read.stderr


def feed(path, content):
    writer = threading.Thread(target=path.write_bytes, args=(content,), daemon=True)
    writer.start()
    return writer


def test_a_pipe_is_an_input(srt, folder):
    os.mkfifo(folder / "pipe")
    writer = feed(folder / "pipe", (folder / "prompts.jsonl").read_bytes())
    assert srt(*LINE, "--prompts", "pipe").code == 0
    writer.join()
    assert len(read_jsonl(folder / "feedback.jsonl")) == 3
    writer = feed(folder / "pipe", FEEDBACK.encode())
    assert srt("build-prefs", "--data", "pipe").code == 0
    writer.join()
    assert len(read_jsonl(folder / "prefs.jsonl")) == 1


def test_process_substitution_is_an_input(folder):
    line = " ".join(LINE)
    command = f"{sys.executable} -m srt_cli {line} --prompts <(cat prompts.jsonl)"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(read_jsonl(folder / "feedback.jsonl")) == 3


def test_a_linked_model_directory_is_emptied_and_stays_a_link(tmp_path):
    from srt_cli.runs.run import clear_directory

    (tmp_path / "big").mkdir()
    (tmp_path / "big/run.json").write_text("{}")
    (tmp_path / "big/checkpoints").mkdir()
    (tmp_path / "model").symlink_to("big")
    clear_directory(tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert list((tmp_path / "big").iterdir()) == []


@pytest.mark.parametrize(
    "reply",
    [
        {"text": "t"},
        {"text": "t", "finish_reason": "stop", "usage": {"tokens": 3}},
        {"text": "t", "finish_reason": "stop", "usage": {}, "logprobs": [{"letter": "x"}]},
    ],
)
def test_a_reply_in_the_journal_that_nobody_can_read_is_owed_again(srt, folder, reply):
    assert srt(*LINE).code == 0
    written = (folder / "feedback.jsonl").read_bytes()
    journal = folder / "feedback.journal.jsonl"
    rows = read_jsonl(journal)
    write_jsonl(journal, [{"key": rows[0]["key"], "call": "c", "model": "m"} | reply, *rows[1:]])
    (folder / "feedback.jsonl").unlink()
    finished = srt(*LINE)
    assert finished.code == 0, finished.stderr
    assert (folder / "feedback.jsonl").read_bytes() == written


@pytest.mark.parametrize("name", ["closed/out.jsonl", "p.py/out.jsonl", "x" * 300 + ".jsonl"])
def test_a_path_that_cannot_be_written_is_named_with_a_way_out(srt, folder, name):
    (folder / "closed").mkdir(mode=0o500)
    finished = srt(*LINE, "--out", name)
    if os.getuid() == 0 and name.startswith("closed"):
        pytest.skip("root writes everywhere")
    assert finished.code == 1
    *_, last = finished.stderr.splitlines()
    assert last.startswith(f"error: {name.partition('/')[0]}")
    assert re.search(r"(Check the path|Choose a shorter name|choose another path)\.$", last)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("overwrite = true", "srt.toml: overwrite replaces outputs, which"),
        (
            'out = "../elsewhere.jsonl"',
            "srt.toml: out = '../elsewhere.jsonl' leads out of its folder",
        ),
        (
            'out = "/etc/feedback.jsonl"',
            "srt.toml: out = '/etc/feedback.jsonl' leads out of its folder",
        ),
        (
            'out = "away/feedback.jsonl"',
            "srt.toml: out = 'away/feedback.jsonl' leads out of its folder",
        ),
        ('report = "../page.html"', "srt.toml: report = '../page.html' leads out of its folder"),
    ],
)
def test_a_found_srt_toml_replaces_nothing_and_stays_in_its_folder(srt, folder, preset, message):
    (folder / "away").symlink_to("/tmp")
    (folder / "srt.toml").write_text(preset + "\n")
    finished = srt(*LINE)
    assert (finished.code, message in finished.stderr) == (1, True), finished.stderr
    assert (
        "may not do. Pass it as a flag, or name the file with --config srt.toml." in finished.stderr
    )
    (folder / "srt.toml").write_text('out = "inside/feedback.jsonl"\noverwrite = false\n')
    assert srt(*LINE).code == 0
    assert len(read_jsonl(folder / "inside/feedback.jsonl")) == 3


def test_a_found_srt_toml_uploads_nothing_and_its_addresses_are_said(srt, folder):
    (folder / "srt.toml").write_text('push-to-hub = "me/mine"\n')
    refused = srt("sft", "--data", "feedback.jsonl")
    assert "srt.toml: push_to_hub = 'me/mine' uploads a model, which" in refused.stderr
    (folder / "srt.toml").write_text('critic = "http://127.0.0.1:9/v1#m"\n')
    said = srt("collect-feedback", "--dry-run").stderr
    assert "srt.toml: critic is http://127.0.0.1:9/v1#m\n" in said

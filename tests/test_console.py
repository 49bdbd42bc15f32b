"""What reaches the terminal: text of any origin is shown, and none of it is obeyed."""

import io
import os
import re
import subprocess
import sys
import unicodedata

import pytest
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from loopback_server import Answer, LoopbackServer
from rich.console import Console

from srt_cli import console

LONG = "/data/home/someone/projects/2026/experiments/refinement/round-3/runs/2026-11-26/models/dpo"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ümläut, 漢字, 👩‍🚀", "plain, ümläut, 漢字, 👩‍🚀"),
        ("tab\tand\nnewline", "tab\tand\nnewline"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("over\rwritten", "over\\rwritten"),
        ("\x9b31m of C1", "\\x9b31m of C1"),
        ("abc\u202edcba", "abc\\u202edcba"),
        ("\u2066hidden\u2069\u200f\u061c", "\\u2066hidden\\u2069\\u200f\\u061c"),
        ("\U000e0041\ufeff\u2028", "\\U000e0041\\ufeff\\u2028"),
        ("half \ud83d of one", "half \\ud83d of one"),
    ],
)
def test_what_would_steer_a_terminal_is_shown(text, shown):
    assert console.visible(text) == shown


@given(st.text())
def test_nothing_visible_is_a_control_character(text):
    left = {unicodedata.category(char) for char in console.visible(text) if char not in "\n\t"}
    assert not left & {"Cc", "Cs", "Zl", "Zp"}
    assert not set(console.visible(text)) & set(
        "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns that both consoles print to; gives what was written so far."""
    written = io.StringIO()
    screen = Console(file=written, force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr(console, "_talk", screen)
    monkeypatch.setattr(console, "_result", screen)
    return written.getvalue


EVIL = "\x1b[31mred\x1b]8;;http://evil\x07 [bold]markup[/bold] [/nothing]"
SHOWN = "\\x1b[31mred\\x1b]8;;http://evil\\x07 [bold]markup[/bold] [/nothing]"


def without_style(text):
    """The text less the styling that rich itself writes."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.mark.parametrize(
    "show",
    [
        lambda: console.say(EVIL),
        lambda: console.warn(EVIL),
        lambda: console.fail(EVIL),
        lambda: console.result(EVIL),
        lambda: console.finish(EVIL, EVIL),
        lambda: console.marked(EVIL, [(EVIL, EVIL), (EVIL, "")]),
        lambda: console.table(EVIL, ["", "n"], [["a", "1"]]),
        lambda: console.talk_table("t", ["", EVIL], [["a", "1"]]),
        lambda: console.talk_table("t", ["", "n"], [[EVIL, "1"]]),
    ],
    ids=["say", "warn", "fail", "result", "finish", "marked", "title", "heading", "cell"],
)  # fmt: skip
def test_every_door_to_the_terminal_cleans(show, terminal, monkeypatch):
    monkeypatch.setattr(console._talk, "width", 200)
    show()
    assert SHOWN in without_style(terminal())
    assert "\x1b[31mred" not in terminal()
    assert "\x07" not in terminal()


def test_our_own_styling_stays(terminal):
    console.warn("look")
    assert terminal().startswith("\x1b[33mwarning: \x1b[0m")


def test_what_is_waited_for_is_shown_cleaned_and_does_not_stay(terminal, monkeypatch, capsys):
    with console.waiting(EVIL), console.progress("in it", 1) as line:
        line.advance()
    assert SHOWN in without_style(terminal())
    assert "\x07" not in terminal()
    assert terminal().endswith("\x1b[1A\x1b[2K")  # up, and the line is cleared
    monkeypatch.setattr(console, "_talk", Console(stderr=True, highlight=False))
    with console.waiting("loading"):
        pass
    assert capsys.readouterr().err == ""


def test_progress_cleans_what_it_shows_on_a_terminal(terminal):
    with console.progress(f"by {EVIL}", 2) as line:
        line.advance(note=EVIL, figures={EVIL: EVIL})
    assert "\x1b]8" not in terminal()
    assert "\x07" not in terminal()
    assert "[/nothing]" in terminal()


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_progress_line_repeats_no_long_path(on_terminal, terminal, monkeypatch, capsys):
    if not on_terminal:
        monkeypatch.setattr(console, "_talk", Console(stderr=True, highlight=False))
    with console.progress(f"answers of {LONG}", 2) as line:
        line.advance()
    shown = without_style(terminal()) if on_terminal else capsys.readouterr().err
    assert "answers of …" in shown
    assert "models/dpo" in shown
    assert LONG not in shown
    assert "1/2" in shown


def test_elsewhere_progress_is_plain_lines(srt, capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_LINE_EVERY_S", 0.0)
    with console.progress("reading", 2) as line:
        line.advance(note="1 failed", figures={"loss": "0.5"})
        line.advance()
    assert capsys.readouterr().err == (
        "reading: 1/2 in 0 s  1 failed  loss 0.5\n"
        "reading: 2/2 in 0 s  loss 0.5\n"
        "reading: 2/2 in 0 s  loss 0.5\n"
    )


def test_a_servers_message_cannot_steer_the_terminal(srt, tmp_path):
    evil = "no \x1b]0;mine\x07\u202eflow"
    server = LoopbackServer(lambda body, number: Answer(status=401, error={"message": evil}))
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "q", "response": "r"}])
    finished = srt("collect-feedback", "--critic", server.spec)
    server.close()
    assert finished.code == 5
    assert not set("\x1b\x07\u202e") & set(finished.stdout + finished.stderr)
    assert "\\x1b]0;mine\\x07\\u202eflow" in finished.stderr


def test_a_reader_that_leaves_early_takes_nothing_with_it():
    program = "from srt_cli import console\nfor _ in range(3): console.result('x' * 9999)"
    reading, writing = os.pipe()
    os.close(reading)
    finished = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (finished.returncode, finished.stderr) == (0, b"")

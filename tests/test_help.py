"""What a person sees of the command line: help, completion, and options that were renamed."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import read_jsonl, write_jsonl

from srt_cli import cli
from srt_cli.options import GROUPS, flag_of, knob_of
from srt_cli.records import Feedback, FeedbackRecord, Usage

HEADINGS = {"Examples", "Help", *GROUPS}


def page(srt, monkeypatch, *line, columns=100):
    monkeypatch.setenv("COLUMNS", str(columns))
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    return finished.stdout


def examples_of(text):
    """The pasted lines, continuations joined."""
    found = text.split("\nExamples\n")[1].split("\n\n")[0]
    return textwrap.dedent(found).replace("\\\n", "").splitlines()


def options_by_heading(text):
    """Every option's flag -> the heading under which it stands, as often as it stands there."""
    found, heading = [], ""
    for line in text.splitlines():
        if line in HEADINGS:
            heading = line
        if option := re.match(r"  --(\[no-\])?([a-z0-9-]+)", line):
            found.append((f"--{option[2]}", heading))
    return found


@pytest.mark.parametrize("columns", [1, 24, 30, 40])
def test_help_can_be_read_in_a_narrow_terminal(columns, srt, monkeypatch):
    for line in (("--help",), ("sft", "--help"), ("eval", "--help-all")):
        text = page(srt, monkeypatch, *line, columns=columns)
        assert "Show" in text or "show" in text


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("command", cli.STAGES)
def test_a_commands_help_fits_a_page(command, columns, srt, monkeypatch):
    text = page(srt, monkeypatch, command, "--help", columns=columns)
    lines = text.splitlines()
    assert max(map(len, lines)) <= min(columns, 100)
    assert len(lines) <= (58 if columns == 80 else 45)
    assert 11 <= len(options_by_heading(text)) <= 15
    assert len(examples_of(text)) == 2
    assert lines[-1] == (
        f"All {len(fields(cli._load(command)[0])) + 1} options: srt {command} --help-all"
    )


@pytest.mark.parametrize("command", cli.STAGES)
def test_every_option_stands_under_exactly_one_heading(command, srt, monkeypatch):
    text = page(srt, monkeypatch, command, "--help-all")
    found = options_by_heading(text)
    flags = [flag for flag, _ in found]
    assert sorted(flags) == sorted(
        [flag_of(field) for field in fields(cli._load(command)[0])] + ["--config", "--help-all"]
    )
    assert {heading for _, heading in found} <= {*GROUPS, "Help"}
    short = options_by_heading(page(srt, monkeypatch, command, "--help"))
    assert set(short) <= set(found)


@pytest.mark.parametrize("command", cli.STAGES)
def test_examples_can_be_pasted(command, srt, monkeypatch):
    """None is wrapped, and each is a line that the command itself would take."""
    text = page(srt, monkeypatch, command, "--help-all", columns=80)
    shown = text.split("\nExamples\n")[1].split("\n\n")[0].splitlines()
    assert max(map(len, shown)) <= 76
    flags = {flag_of(field) for field in fields(cli._load(command)[0])}
    for example in examples_of(text):
        words = shlex.split(example)
        assert words[:2] == ["srt", command]
        assert {word for word in words if word.startswith("--")} <= flags


@pytest.mark.parametrize("command", cli.STAGES)
def test_a_switch_shows_its_no_only_where_it_is_on(command, srt, monkeypatch):
    text = page(srt, monkeypatch, command, "--help-all")
    on = {
        f"--[no-]{flag_of(field)[2:]}"
        for field in fields(cli._load(command)[0])
        if field.type is bool and field.default
    }
    assert set(re.findall(r"^  (--\[no-\][a-z0-9-]+)", text, re.M)) == on
    assert not re.findall(r"^  --no-", text, re.M)


def test_a_preset_switch_is_still_taken_back_by_its_no(srt, tmp_path):
    (tmp_path / "srt.toml").write_text("dry_run = true\n")
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "q", "response": "r"}])
    (tmp_path / "critic.py").write_text(
        "def critique(prompt, response):\n    return 5, 'w', 's', 'b'"
    )
    line = ("collect-feedback", "--critic", "python:critic.py:critique")
    assert srt(*line).code == 0
    assert not (tmp_path / "feedback.jsonl").exists()
    srt(*line, "--no-dry-run")
    assert (tmp_path / "feedback.jsonl").exists()


def test_build_prefs_shows_options_of_calls_only_among_all_and_as_the_audits(srt, monkeypatch):
    calls = {"--concurrency", "--max-cost", "--batch", "--price", "--timeout", "--rpm"}
    short = dict(options_by_heading(page(srt, monkeypatch, "build-prefs", "--help")))
    assert not calls & set(short)
    assert short["--audit"] == "Audit"
    every = dict(options_by_heading(page(srt, monkeypatch, "build-prefs", "--help-all")))
    assert {every[flag] for flag in calls} == {"Audit"}


def test_the_help_of_srt_lists_every_command_under_its_stage(srt, monkeypatch):
    text = page(srt, monkeypatch, "--help", columns=80)
    assert max(map(len, text.splitlines())) <= 80
    assert re.findall(r"^  ([a-z][a-z0-9-]+)", text, re.M) == list(cli.STAGES)
    for line in ("Stage 1", "Stage 2", "Evaluation", "Options"):
        assert line in text.splitlines()
    assert "--install-completion" in text


# Completion


def bash_completes(line, folder):
    """What bash offers for the last word of a line, with the script that srt installs."""
    program = folder / "bin"
    program.mkdir(exist_ok=True)
    srt = program / "srt"
    srt.write_text(f'#!/bin/sh\nexec {sys.executable} -m srt_cli "$@"\n')
    srt.chmod(0o755)
    words = [*shlex.split(line), ""] if line.endswith(" ") else shlex.split(line)
    script = f"""
        eval "$(_SRT_COMPLETE=source_bash srt)"
        COMP_WORDS=({" ".join(shlex.quote(word) for word in words)})
        COMP_CWORD={len(words) - 1}
        _srt_completion srt
        printf '%s\\n' "${{COMPREPLY[@]}}"
        complete -p srt >&2
    """
    environment = {
        **os.environ, "PATH": f"{program}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(cli.__file__).parents[1]),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert "-o default" in done.stderr  # files, where nothing else is known
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("srt ", list(cli.STAGES)),
        ("srt se", ["self-critique"]),
        ("srt dpo --loss-type apo", ["apo_zero", "apo_down"]),
        ("srt sft --method ", ["full", "lora", "qlora"]),
        ("srt build-prefs --export ", ["axolotl", "llamafactory", "ms-swift", "openrlhf", "kto"]),
        ("srt eval --use re", ["response", "refinement"]),
        ("srt eval --critic-p", ["--critic-prompt"]),
        ("srt eval --critic-prompt ", ["auto", "conversation", "table-1", "checklist"]),
        ("srt self-critique --no", ["--no-expected-score"]),
        ("srt build-prefs --form", []),
        ("srt sft --data fee", []),
    ],
)  # fmt: skip
def test_bash_completes(line, offered, tmp_path):
    assert bash_completes(line, tmp_path) == offered


def test_bash_offers_every_option_of_a_command_and_no_former_one(tmp_path):
    offered = bash_completes("srt build-prefs --", tmp_path)
    flags = {flag_of(field) for field in fields(cli._load("build-prefs")[0])}
    assert set(offered) == flags | {"--config", "--help", "--help-all", "--no-hygiene"}


@pytest.mark.parametrize(
    ("shell", "begins"),
    [("bash", "_srt_completion() {"), ("zsh", "#compdef srt"), ("fish", "complete --command srt")],
)
def test_a_script_for_each_shell_is_shown(shell, begins, srt, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    finished = srt("--show-completion", shell)
    assert finished.code == 0
    assert finished.stdout.strip().startswith(begins)


# Options that were renamed

FEEDBACK = FeedbackRecord(
    id="a", prompt="Name a fruit.", response="A carrot.",
    feedback=Feedback(weaknesses="w", suggestions="s", score=4), refinement="An apple.",
    refinement_score=8, refinement_feedback=None, status="ok", reason=None, raw={}, policy="p",
    critic="c", sample=0, round=1, usage=Usage(),
)  # fmt: skip
FORMER = "warning: --format is now --export. The old spelling still works.\n"


@pytest.fixture
def feedback(tmp_path):
    return write_jsonl(tmp_path / "self-feedback.jsonl", [FEEDBACK.model_dump(mode="json")])


@pytest.mark.parametrize("where", ["flag", "srt.toml", "table", "config"])
def test_a_former_name_still_works_and_says_so_once(where, srt, feedback, tmp_path):
    line = ["build-prefs"]
    if where == "flag":
        line += ["--format", "kto", "--format", "axolotl"]
    elif where == "config":
        (tmp_path / "mine.toml").write_text('format = ["kto", "axolotl"]\n')
        line += ["--config", "mine.toml"]
    else:
        table = "[build-prefs]\n" if where == "table" else ""
        (tmp_path / "srt.toml").write_text(f'{table}format = ["kto", "axolotl"]\n')
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    assert finished.stderr.count(FORMER) == 1
    assert len(read_jsonl(tmp_path / "prefs.kto.jsonl")) == 2
    assert len(read_jsonl(tmp_path / "prefs.axolotl.jsonl")) == 1
    settings = json.loads((tmp_path / "prefs.run.json").read_text())["settings"]
    assert settings["export"] == ["kto", "axolotl"]
    assert "format" not in settings


def test_a_preset_under_the_former_name_yields_to_a_flag(srt, feedback, tmp_path):
    (tmp_path / "srt.toml").write_text('format = ["kto"]\n')
    assert srt("build-prefs", "--export", "axolotl").code == 0
    assert (tmp_path / "prefs.axolotl.jsonl").exists()
    assert not (tmp_path / "prefs.kto.jsonl").exists()


def test_both_names_of_one_option_are_refused(srt, feedback):
    finished = srt("build-prefs", "--export", "kto", "--format", "axolotl")
    assert finished.code == 2
    assert finished.stderr == "error: --export and --format are the same option. Give one.\n"


def test_a_run_finished_under_the_former_name_is_the_same_run(srt, feedback, tmp_path):
    assert srt("build-prefs", "--export", "kto").code == 0
    path = tmp_path / "prefs.run.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["format"] = manifest["settings"].pop("export")
    path.write_text(json.dumps(manifest))
    assert srt("build-prefs", "--export", "kto").code == 0
    path.write_text(json.dumps(manifest))
    assert srt("build-prefs", "--format", "kto").code == 0
    path.write_text(json.dumps(manifest))
    refused = srt("build-prefs", "--export", "axolotl")
    assert refused.code == 1
    assert "--export was ['kto'], now ['axolotl']" in refused.stderr
    (tmp_path / "old.run.json").write_text(json.dumps(manifest))
    again = srt("build-prefs", "--config", "old.run.json", "--out", "again.jsonl")
    assert again.code == 0, again.stderr
    assert FORMER in again.stderr


def test_a_former_value_is_read_as_todays(srt, tmp_path):
    write_jsonl(tmp_path / "prefs.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    (tmp_path / "critic.py").write_text(
        "from srt_cli.records import Feedback\n"
        "def critique(prompt, response):\n"
        "    return Feedback(weaknesses='w', suggestions='s', score=len(response)), response\n"
    )
    line = ("eval", "--pairs", "prefs.jsonl", "--model", "python:critic.py:critique")
    finished = srt(*line, "--critique-style", "message")
    assert finished.code == 0, finished.stderr
    assert (
        "warning: --critique-style is now --critic-prompt, and its value message is table-1. "
        "The old spelling still works.\n"
    ) in finished.stderr
    path = tmp_path / "eval.run.json"
    manifest = json.loads(path.read_text())
    assert manifest["settings"]["critic_prompt"] == "table-1"
    del manifest["settings"]["critic_prompt"]
    manifest["settings"]["critique_style"] = "message"
    path.write_text(json.dumps(manifest))
    again = srt(*line, "--critic-prompt", "table-1")
    assert again.code == 0, again.stderr
    assert "warning" not in again.stderr


def test_a_shared_preset_goes_only_to_the_command_that_takes_its_value(srt, feedback, tmp_path):
    (tmp_path / "srt.toml").write_text('export = "alpaca_eval"\n')  # of eval alone, until now
    assert srt("build-prefs").code == 0
    (tmp_path / "srt.toml").write_text('export = "gguf"\n')
    assert srt("build-prefs").code == 2


@pytest.mark.parametrize("command", cli.STAGES)
def test_help_texts_are_whole_sentences(command):
    for field in fields(cli._load(command)[0]):
        text = knob_of(field).help
        assert re.match(r"[A-Z\-a-z].*\.$", text), (field.name, text)
        assert "Several times" not in text
        assert "Most tokens" not in text

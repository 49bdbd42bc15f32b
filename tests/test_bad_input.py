"""Bad input gets one sentence: where, what, and what to do next."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc

import pytest
from conftest import read_jsonl, write_jsonl

CRITIC = """
from pathlib import Path
def critique(prompt, response):
    raise AssertionError('never called')
def _not_for_others(prompt, response):
    pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "critic.py").write_text(CRITIC)
    return tmp_path


def collect(srt, *extra):
    return srt("collect-feedback", "--critic", "python:critic.py:critique", *extra)


def rows(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "prompts.jsonl: the file is empty."),
        ("\n\n", "prompts.jsonl: the file is empty."),
        (rows({"prompt": "p"}) + "{oops\n", "prompts.jsonl:2: not valid JSON ("),
        ('[\n{"prompt": "p"}\n]\n', "prompts.jsonl:1: not one JSON record a line."),
        (rows(["p"]), "prompts.jsonl:1: not a JSON object. This is a JSON array"),
        (rows("p"), "prompts.jsonl:1: not a JSON object."),
        (
            rows(*[{"prompt": "p"}] * 1, {"id": 1, "query": "q"}),
            'prompts.jsonl:2: no "prompt", "instruction" or "messages" (found: id, query). '
            "Rename the field or pass --prompt-field query.",
        ),
        (rows({"prompt": "  "}), "prompts.jsonl:1: the prompt is empty."),
        *(
            (
                '{"prompt": "p", "meta": ' + "[" * deep + "]" * deep + "}\n",
                "prompts.jsonl:1: is nested more than 100 levels deep. Leave the deep field out.",
            )
            for deep in (100, 900, 100_000)
        ),
        (rows({"prompt": 3}), "prompts.jsonl:1: the prompt is int, not text or messages."),
        (rows({"messages": []}), "prompts.jsonl:1: the conversation has no user turn"),
        (rows({"messages": [{"role": "robot", "content": "x"}]}), "prompts.jsonl:1: role: input"),
        (
            rows(
                {"id": "a", "prompt": "p"}, {"id": "b", "prompt": "q"}, {"id": "a", "prompt": "r"}
            ),
            "prompts.jsonl:3: id 'a' is already on line 1.",
        ),
        (rows({"prompt": "p"}, {"prompt": "p"}), "is already on line 1."),
    ],
)
def test_a_bad_prompts_file_is_named_with_its_line(srt, folder, content, message):
    (folder / "prompts.jsonl").write_text(content)
    finished = collect(srt)
    assert finished.code == 1
    assert finished.stderr.startswith(f"error: {message}") or message in finished.stderr
    assert finished.stdout == ""
    assert not (folder / "feedback.run.json").exists()


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "utf-16.jsonl.gz", "-"])
def test_a_small_file_that_unpacks_to_an_endless_line_fills_no_memory(
    srt, folder, monkeypatch, name
):
    monkeypatch.setattr("srt_cli.runs.jsonl.MOST_BYTES", 2**20)
    bomb = rows({"prompt": "p"}).encode() + b'{"prompt": "' + b"x" * 2**25
    (folder / "bomb").write_bytes(bomb)
    (folder / "bomb.jsonl.gz").write_bytes(gzip.compress(bomb))
    (folder / "utf-16.jsonl.gz").write_bytes(gzip.compress(bomb.decode().encode("utf-16")))
    with open(folder / "bomb") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        del bomb
        tracemalloc.start()
        finished = collect(srt, "--prompts", name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert finished.code == 1
    assert f"{name}:2: is longer than 1 MiB. Split it, or leave it out." in finished.stderr
    assert peak < 2**25


def test_a_prompt_of_twenty_megabytes_comes_through_whole(srt, folder):
    text = "word " * 4_000_000
    (folder / "prompts.jsonl").write_text(rows({"prompt": text, "response": "r"}))
    (folder / "critic.py").write_text(
        "def critique(prompt, response):\n"
        "    return {'weaknesses': 'w', 'suggestions': 's', 'score': 3}, 'better'\n"
    )
    finished = collect(srt)
    assert finished.code == 0, finished.stderr[-500:]
    (row,) = (folder / "feedback.jsonl").read_bytes().splitlines()
    assert json.loads(row)["prompt"] == text


def test_text_that_is_not_utf_8_is_named_with_its_line(srt, folder):
    (folder / "prompts.jsonl").write_bytes(b'{"prompt": "ok"}\n{"prompt": "caf\xe9"}\n')
    finished = collect(srt)
    assert finished.code == 1
    assert "prompts.jsonl:2: not UTF-8 (byte 16). Convert it: iconv" in finished.stderr


def test_a_missing_file_is_said_with_the_way_to_get_it(srt):
    finished = collect(srt)
    assert finished.code == 1
    assert "prompts.jsonl: no such file. Make one" in finished.stderr
    assert "Make it first: srt self-critique" in srt("build-prefs").stderr


def test_a_directory_where_a_file_is_expected(srt, folder):
    (folder / "prompts.jsonl").mkdir()
    finished = collect(srt)
    assert finished.code == 1
    assert "prompts.jsonl: is a directory, where a JSONL file is expected" in finished.stderr


@pytest.mark.parametrize(
    ("spec", "code", "message"),
    [
        ("./nowhere", 2, "./nowhere: no such file or directory."),
        ("a/b/c", 2, "a/b/c: no such file or directory."),
        ("model.gguf", 2, "model.gguf: no such file or directory."),
        ("http://127.0.0.1:1/v1", 2, "which model? Write http://127.0.0.1:1/v1#NAME."),
        ("what is this", 2, "is no model"),
        ("critic.py", 2, "critic.py: this file is no model. Name python:critic.py:CALLABLE."),
        ("prompts.jsonl", 2, "this file is no model. Name a directory or a FILE.gguf."),
        ("localhost:8000", 2, "a server is http://HOST:PORT/v1#NAME."),
        ("http://[::1/v1#m", 2, "'http://[::1/v1' is no address of a server."),
        ("http://h:99999/v1#m", 2, "'http://h:99999/v1' is no address of a server."),
        (f"http://{64 * 'a'}.com/v1#m", 2, "is no address of a server."),
        ("http:///v1#m", 2, "'http:///v1' is no address of a server."),
        ("http://127.0.0.1:1/v1,#m", 2, "'' is no address of a server."),
        ("python:critic.py:nothing", 2, "critic.py has no callable 'nothing' (it has: critique)."),
        ("python:critic.py", 2, "write python:FILE_OR_MODULE:CALLABLE"),
        ("python:missing.py:f", 1, "missing.py: no such file."),
        ("python:no.such.module:f", 1, "no such module"),
        ("python:far.py:f", 1, "far.py: cannot be imported (ImportError: "),
    ],
)
def test_an_unknown_model_is_said_before_any_work(srt, folder, spec, code, message):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "p", "response": "r"}])
    (folder / "far.py").write_text(f"from {40 * '.'} import f\n")
    finished = srt("collect-feedback", "--critic", spec)
    assert finished.code == code
    assert message in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert not (folder / "feedback.jsonl").exists()


def test_an_output_of_another_command_is_refused(srt, folder):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "p", "response": "r"}])
    (folder / "feedback.jsonl").write_text("mine\n")
    finished = collect(srt)
    assert finished.code == 1
    assert (
        "feedback.jsonl: exists, and no run of srt is known to have written it" in finished.stderr
    )
    assert (folder / "feedback.jsonl").read_text() == "mine\n"


def test_a_manifest_that_is_not_ours_is_left_alone(srt, folder):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "p", "response": "r"}])
    (folder / "feedback.run.json").write_text("{}")
    finished = collect(srt)
    assert finished.code == 1
    said = "feedback.run.json: not a manifest of srt, and stands where one would. Rename it."
    assert said in finished.stderr


def test_a_bad_value_in_a_configuration_names_option_and_reason(srt, folder):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "p", "response": "r"}])
    (folder / "mine.toml").write_text('temperature = "hot"\n')
    finished = collect(srt, "--config", "mine.toml")
    assert finished.code == 2
    assert "--temperature 'hot': must be a number." in finished.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("--temperature", "-1"), "--temperature -1: must be 0 or more."),
        (("--temperature", "nan"), "--temperature nan: must be 0 or more."),
        (("--max-new-tokens", 0), "--max-new-tokens 0: must be 1 or more."),
        (("--max-cost", "-5"), "--max-cost -5: must be 0 or more."),
        (("--rpm", 0), "--rpm 0: must be above 0."),
        (("--concurrency", "-2"), "--concurrency -2: must be 1 or more."),
        (("--max-reasks", "-1"), "--max-reasks -1: must be 0 or more."),
        (("--seed", "-1"), "--seed -1: must be 0 or more."),
        (("--limit", "few"), "--limit 'few': must be a whole number."),
        (("--limit", "1.5"), "--limit '1.5': must be a whole number."),
        (("--engine", "statik"), "--engine 'statik': must be auto, static or continuous. Did you "
         "mean static?"),
    ],
)  # fmt: skip
def test_a_number_or_word_that_makes_no_sense_is_refused(srt, folder, line, said):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "p", "response": "r"}])
    finished = collect(srt, *line)
    assert finished.code == 2
    assert finished.stderr == f"error: {said}\n"
    assert not (folder / "feedback.jsonl").exists()


@pytest.mark.parametrize("command", ["collect-feedback", "sft", "build-prefs", "dpo", "eval"])
def test_no_command_takes_no_rows_and_no_training_no_epochs(srt, command):
    for rows in (0, -1):
        finished = srt(command, "--limit", rows)
        assert (finished.code, finished.stderr) == (
            2, f"error: --limit {rows}: must be 1 or more.\n"
        )  # fmt: skip
    if command in ("sft", "dpo"):
        assert srt(command, "--epochs", 0).stderr == "error: --epochs 0: must be above 0.\n"


def test_a_full_disk_is_said_and_the_run_can_go_on(folder):
    (folder / "critic.py").write_text(
        "from srt_cli.records import Feedback\n"
        "def critique(prompt, response):\n"
        "    return Feedback(weaknesses='w' * 400, suggestions='s', score=3), response + '!'\n"
    )
    rows = [{"id": n, "prompt": f"p{n}", "response": "r"} for n in range(40)]
    write_jsonl(folder / "prompts.jsonl", rows)
    line = ["collect-feedback", "--critic", "python:critic.py:critique"]
    limited = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "from srt_cli.cli import main\n"
        "sys.argv = ['srt', *sys.argv[1:]]\n"
        "main()\n"
    )
    environment = os.environ | {"COLUMNS": "200"}
    full = subprocess.run(
        [sys.executable, "-c", limited, *line],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert "file too large" in full.stderr.lower()
    again = subprocess.run(
        [sys.executable, "-m", "srt_cli", *line],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0
    assert len((folder / "feedback.jsonl").read_text().splitlines()) == 40


def test_a_disk_without_a_free_byte_is_said_and_the_run_can_go_on(tmp_path):
    may = subprocess.run("unshare -rm true", shell=True, capture_output=True, check=False)
    if may.returncode:
        pytest.skip("only where a user may mount a small disk")
    (tmp_path / "critic.py").write_text(
        "def critique(prompt, response):\n"
        "    return {'weaknesses': 'w' * 400, 'suggestions': 's', 'score': 3}, response + '!'\n"
    )
    rows = [{"id": n, "prompt": f"p{n}", "response": "r"} for n in range(40)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    srt = f"{sys.executable} -m srt_cli collect-feedback --critic python:critic.py:critique"
    filled = (
        "mkdir disk; mount -t tmpfs -o size=400k tmpfs disk; cp critic.py prompts.jsonl disk; cd disk\n"
        "head -c 16K /dev/zero > room; cat /dev/zero > ballast 2> /dev/null; rm room\n"
        f"{srt}; echo ended with $? >&2; rm ballast\n"
        f"exec {srt}\n"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", filled],
        cwd=tmp_path, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "feedback.journal.jsonl: no space left on device. Free some space, then" in done.stderr
    assert "ended with 1" in done.stderr
    assert done.returncode == 0, done.stderr
    assert "rows: 40 ok" in done.stderr
    assert "taken from the journal" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_traceback_comes_back_on_request(srt, folder, monkeypatch):
    from srt_cli.errors import SrtError

    monkeypatch.setenv("SRT_TRACEBACK", "1")
    with pytest.raises(SrtError):
        collect(srt)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('limit = "two"', "srt.toml: --limit 'two': must be a whole number."),
        ("temperature = -1", "srt.toml: --temperature -1: must be 0 or more."),
        ("[colect-feedback]", "unknown table [colect-feedback]. Did you mean [collect-feedback]?"),
        ("[collect_feedback]\nlimit = 0", "srt.toml: --limit 0: must be 1 or more."),
    ],
)
def test_a_fault_in_srt_toml_is_said_with_the_file(srt, folder, content, said):
    (folder / "srt.toml").write_text(content + "\n")
    finished = collect(srt)
    assert finished.code == 2
    assert said in finished.stderr


def test_the_table_of_another_command_is_none_of_this_ones_business(srt, folder):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "p", "response": "r"}])
    (folder / "srt.toml").write_text("[sft]\nepochs = 2\n[self-critique]\nsamples = 4\n")
    assert collect(srt, "--dry-run").code == 0


def test_a_page_that_would_be_a_directory_is_refused_before_any_work(srt, folder):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "p", "response": "r"}])
    (folder / "pages").mkdir()
    finished = collect(srt, "--report", "pages")
    assert (finished.code, finished.stderr) == (
        2, "error: --report pages: is a directory, where a file is expected.\n"
    )  # fmt: skip
    assert not (folder / "feedback.run.json").exists()


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("collect-feedback", "--prompts"),
        ("sft", "--data"),
        ("dpo", "--prefs"),
        ("eval", "--prompts"),
    ],
)
def test_a_file_without_an_option_is_told_its_option(srt, command, flag):
    finished = srt(command, "mine.jsonl")
    assert (finished.code, finished.stderr) == (
        2, f"error: mine.jsonl: belongs to no option. Did you mean {flag} mine.jsonl?\n"
    )  # fmt: skip


def test_values_behind_a_repeatable_option_are_its_own(srt):
    refused = srt("eval", "--model", "./a", "./b", "--judge", "gpt-4")
    assert "error: ./a: no such file" in refused.stderr


def test_a_configuration_that_is_not_there_is_said_once(srt):
    finished = collect(srt, "--config", "nope.toml")
    assert (finished.code, finished.stderr) == (
        1, "error: nope.toml: no such file. Check the path.\n"
    )  # fmt: skip


def test_outputs_that_are_not_there_are_said_before_their_manifest_is_missed(srt):
    finished = srt("eval", "--model", "outputs.jsonl", "--judge", "python:critic.py:critique")
    assert (finished.code, finished.stderr) == (
        2, "error: outputs.jsonl: no such file. Check the path.\n"
    )  # fmt: skip


def test_a_run_that_stopped_before_its_first_reply_binds_no_other(srt, folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "p", "response": "r"}])
    stopped = srt("collect-feedback", "--critic", "gpt-4", "--max-requests", 0)
    assert stopped.code == 4
    assert (folder / "feedback.jsonl").read_bytes() == b""
    (folder / "critic.py").write_text(
        "def critique(prompt, response):\n"
        "    return {'weaknesses': 'w', 'suggestions': 's', 'score': 3}, 'better'\n"
    )
    finished = collect(srt)
    assert finished.code == 0, finished.stderr
    assert "feedback.jsonl: 1 row" in finished.stdout
    refused = srt("collect-feedback", "--critic", "gpt-4", "--max-requests", 0)
    assert (refused.code, "belongs to a run with other settings" in refused.stderr) == (1, True)


@pytest.mark.parametrize(
    "line",
    [("self-critique",), ("eval",), ("eval", "--pairs", "prompts.jsonl")],
    ids=["self-critique", "eval", "eval of pairs"],
)
def test_a_model_that_was_never_made_is_not_sought_on_the_hub(srt, tmp_path, line):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    finished = srt(*line)
    assert finished.code == 2
    assert "no such directory here. srt sft and srt dpo make models there" in finished.stderr


def test_an_option_given_twice_has_its_last_value_and_says_so(srt, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "A", "response": "x"}])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "B", "response": "x"}])
    (tmp_path / "c.py").write_text(
        "def critique(prompt, response):\n"
        "    return {'weaknesses': 'w', 'suggestions': 's', 'score': 4}, response + '!'\n"
    )
    line = ("collect-feedback", "--critic", "python:c.py:critique", "--prompts", "a.jsonl")
    finished = srt(*line, "--prompts=b.jsonl", "--seed", 7, "--seed", 7)
    assert finished.code == 0, finished.stderr
    assert "--prompts is given twice: b.jsonl counts, and not a.jsonl\n" in finished.stderr
    assert "--seed is given twice" not in finished.stderr
    again = srt(*line, "--prompts=b.jsonl", "--system", "--seed", "--seed", 1, "--system", "")
    assert "--seed is given twice" not in again.stderr
    assert "--system is given twice: '' counts, and not --seed\n" in again.stderr
    (row,) = read_jsonl(tmp_path / "feedback.jsonl")
    assert row["prompt"] == "B"

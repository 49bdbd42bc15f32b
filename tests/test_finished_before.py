"""A folder finished by version 0.1.0: every line is found done, and no call is made again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_jsonl

from srt_cli.models import ModelOptions, Request, Task, canonical_request, open_model
from srt_cli.records import Message, Prompt
from srt_cli.runs.journal import request_key

FINISHED = ROOT / "tests/finished_by_0_1_0"
LINES = (FINISHED / "commands.txt").read_text().splitlines()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(FINISHED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return tmp_path


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob(pattern)}


def out_of(line: str) -> str:
    """The file or directory that a line of `commands.txt` made."""
    command, *rest = line.split()
    defaults = {
        "collect-feedback": "feedback.jsonl", "sft": "models/sft", "dpo": "models/dpo",
        "self-critique": "self-feedback.jsonl", "build-prefs": "prefs.jsonl", "eval": "eval.json",
    }  # fmt: skip
    return rest[rest.index("--out") + 1] if "--out" in rest else defaults[command]


def assert_still_says(now: Any, before: Any) -> None:
    """Today's JSON says what the earlier one said; it may say more."""
    if isinstance(before, dict):
        assert set(before) <= set(now)
        if "ties" in before and before["ties"] == before["win_rate"]["n"]:
            # Of nothing but ties, 0.1.0 called the prior's own pull a rate at equal length.
            before = before | {"length_controlled": {"rate": before["win_rate"]}}
        for name, value in before.items():
            assert_still_says(now[name], value)
    elif isinstance(before, list):
        assert len(now) == len(before)
        for one, other in zip(now, before, strict=True):
            assert_still_says(one, other)
    else:
        assert now == (pytest.approx(before) if isinstance(before, float) else before)


@pytest.mark.parametrize("line", LINES)
def test_a_line_run_again_changes_nothing_and_calls_nobody(line, srt, folder):
    finished = srt(*line.split())
    assert finished.code == 0, finished.stderr
    assert not (folder / "calls.txt").exists()
    for pattern in ("*journal.jsonl", "*.safetensors"):
        assert contents(folder, pattern) == contents(FINISHED, pattern)
    for path in FINISHED.glob("*.jsonl"):
        assert_still_says(read_jsonl(folder / path.name), read_jsonl(path))
    command, out = line.split()[0], out_of(line)
    if command not in ("build-prefs", "eval"):  # these two count again what they find
        assert "nothing to do" in finished.stdout + finished.stderr
    if command == "eval":
        now, before = (json.loads((each / out).read_text()) for each in (folder, FINISHED))
        assert_still_says(now, before)


@pytest.mark.parametrize("line", [line for line in LINES if "feedback" in out_of(line)])
def test_lost_feedback_comes_back_from_the_journal(line, srt, folder):
    out = out_of(line)
    (folder / out).unlink()
    finished = srt(*line.split())
    # Not one of its rows is ok, which is said by the exit code since.
    unusable = all(row["status"] != "ok" for row in read_jsonl(FINISHED / out))
    assert finished.code == (3 if unusable else 0), finished.stderr
    assert not (folder / "calls.txt").exists()
    assert contents(folder, "*journal.jsonl") == contents(FINISHED, "*journal.jsonl")
    assert_still_says(read_jsonl(folder / out), read_jsonl(FINISHED / out))


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("build-prefs")])
def test_lost_pairs_are_built_again_from_the_feedback(line, srt, folder):
    (folder / "prefs.jsonl").unlink()
    assert srt(*line.split()).code == 0
    assert_still_says(read_jsonl(folder / "prefs.jsonl"), read_jsonl(FINISHED / "prefs.jsonl"))


def test_one_more_sample_pays_only_for_itself(srt, folder):
    """Its drafts are the model's own, so only the critic's calls of the first prompt are counted."""
    line = "collect-feedback --model base --critic python:critic.py:critique --limit 6"
    (folder / "prompts.jsonl").write_text(
        (folder / "prompts.jsonl").read_text()
        + '{"id": "new", "prompt": "New?", "response": "No"}\n'
    )
    finished = srt(*line.split(), "--limit", 7)
    assert finished.code == 0, finished.stderr
    assert (folder / "calls.txt").read_text() == "critique new\ncritique new\n"
    assert len(read_jsonl(folder / "feedback.jsonl")) == 7


ASKED = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="What is moss?"),
)
MOSS = Prompt.model_validate({"id": "moss", "prompt": "What is moss?", "topic": "plants"})
REQUESTS = {
    "plain": Request(ASKED, max_tokens=512),
    "sampled": Request(ASKED, max_tokens=64, temperature=0.7, top_p=0.9, seed=42, sample=3),
    "stopped": Request(ASKED, max_tokens=2048, stop=("### Improved Response",), seed=42),
    "scored": Request(ASKED, max_tokens=1, top_logprobs=20, logprobs_at="digits"),
    "continued": Request(
        (*ASKED, Message(role="assistant", content="Score: [[")),
        max_tokens=4, top_logprobs=5, continues=True,
    ),
    "task": Request(ASKED, max_tokens=8, task=Task("critique", MOSS, ("It is green.",))),
}  # fmt: skip
# As 51b2e33 computed them: who changes one of these has every user pay again.
KEYS = {
    "gpt-4": {
        "plain": "340f592644282a73a341c73cbef38c65",
        "sampled": "841362082de2a5c73ae50f2bfce79ff3",
        "stopped": "35195f2ddb6f225767f4856d88d8a05f",
        "scored": "edf9c570fca60b8a18ca9dbb7958e756",
        "continued": "40160c82ccaa90182f30cbf52302cce4",
        "task": "02269db0826e076e0aaf92b0564bc6d1",
    },
    "openai:gpt-4o-mini": {"plain": "1ff438533e11f7ee07b04ce87a6fc76f"},
    "http://host:8000/v1#ORG/NAME": {
        "plain": "a0192029483e4439b2d4eedc84bda36f",
        "sampled": "1288233dda849a64636c26acfe2ee8df",
        "stopped": "d5676b8b2ebb3a17bf8bbd93ded31d33",
        "scored": "d43517319f3347bfa5c933877a8289b7",
        "continued": "2822024cc5bf04c85af5a69dc0ad595f",
        "task": "7e58a43d11444a35ef3eef0bb6f031a2",
    },
    "http://a:1/v1,http://b:2/v1/#NAME": {"plain": "9d65a10ba55bd0981dc04b7270649743"},
    "base": {
        "plain": "de05afb6d52887ef2da759a313ba589e",
        "sampled": "7bedf56a1d27209c1a7571ce10932d5f",
        "scored": "df8bb434aeae760aca67d3acd796f515",
        "continued": "a621e3189b6fdd0ceee848d6221ce510",
        "task": "271098bb43d48620ac22d6cbfa4b418f",
    },
    "python:critic.py:critique": {
        "plain": "44dd094399b6f59ee2d3f420bd582e1c",
        "sampled": "0de669a9358a00c4c65b64a7d8a882f9",
        "task": "c8ba2af79662de5047d602d86750b07e",
    },
}


@pytest.mark.parametrize("spec", KEYS)
def test_the_keys_of_the_journal_stay(spec, folder):
    model = open_model(spec, ModelOptions(offline=True))
    keys = {
        name: request_key(canonical_request(model, REQUESTS[name])).hex() for name in KEYS[spec]
    }
    model.close()
    assert keys == KEYS[spec]


def test_the_key_names_another_address_of_openai(folder, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://proxy.test/v1")
    model = open_model("gpt-4", ModelOptions(offline=True))
    key = request_key(canonical_request(model, REQUESTS["plain"])).hex()
    model.close()
    assert key == "6c852b4fcb7cd1fdbd1395decd36cb2c"


def test_an_option_that_0_1_0_did_not_have_stood_at_its_default(srt, folder):
    line = "collect-feedback --model base --critic python:critic.py:critique"
    finished = srt(*line.split(), "--reasoning-effort", "low")
    assert finished.code != 0
    assert "--reasoning-effort" in finished.stderr
    assert not (folder / "calls.txt").exists()

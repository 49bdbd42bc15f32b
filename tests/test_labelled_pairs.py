"""srt eval --pairs: a critic that scores both sides of labelled pairs."""

import json

import pytest
from conftest import write_jsonl
from loopback_server import Answer, LoopbackServer

CRITIC = """
from srt_cli.records import Feedback

def by_length(prompt, response):
    score = 9 if len(response) > 10 else 3
    return Feedback(weaknesses="w", suggestions="s", score=score), response

def base(prompt):
    return "base"

def check(prompt, response):
    return True

def broken(prompt, response):
    raise RuntimeError("no")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "c.py").write_text(CRITIC)
    turns = [{"role": "user", "content": "q"}]
    rows = [
        {"prompt": "q", "chosen": "a long good answer", "rejected": "bad"},
        {"prompt": "q", "chosen": "good", "rejected": "a long bad answer"},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": turns, "chosen": [{"role": "assistant", "content": "a long good answer"}],
         "rejected": [{"role": "assistant", "content": "bad"}]},
    ]  # fmt: skip
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    return tmp_path


def test_accuracy_counts_ties_apart(srt, folder):
    finished = srt("eval", "--pairs", "pairs.jsonl", "--model", "python:c.py:by_length")
    assert finished.code == 0, finished.stderr
    (found,) = json.loads((folder / "eval.json").read_text())["pairs"]
    assert found["accuracy"]["value"] == 0.5
    assert found["with_half_ties"]["value"] == 0.625
    assert found["without_ties"]["value"] == pytest.approx(2 / 3)
    assert (found["ties"], found["unread"], found["pairs"]) == (1, 0, 4)
    assert found["longer_wins"]["value"] == 0.75
    assert "scores chosen above rejected" in finished.stdout


def test_a_plan_sends_and_writes_nothing(srt, folder):
    (folder / "c.py").write_text(CRITIC + "\ndef told(prompt, response):\n    open('asked', 'w')\n")
    before = sorted(path.name for path in folder.iterdir())
    line = ("eval", "--pairs", "pairs.jsonl", "--model", "python:c.py:told")
    finished = srt(*line, "--dry-run")
    assert finished.code == 0, finished.stderr
    assert "scores: 8" in finished.stdout
    assert "owed: calls, tokens" in finished.stdout
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_critic_that_cannot_be_read_exits_3_without_a_figure(srt, folder):
    finished = srt("eval", "--pairs", "pairs.jsonl", "--model", "python:c.py:broken")
    assert finished.code == 3
    (found,) = json.loads((folder / "eval.json").read_text())["pairs"]
    assert found["accuracy"] is None
    assert found["unread"] == 4


def test_a_local_model_is_asked_in_conversation_unless_told_otherwise(srt, folder, tiny_model):
    line = ("eval", "--pairs", "pairs.jsonl", "--model", tiny_model, "--limit", 1,
            "--critic-max-tokens", 4)  # fmt: skip
    assert srt(*line).code == 3
    assert srt(*line, "--critic-prompt", "table-1", "--out", "other.json").code == 3
    keys = [
        {json.loads(line)["key"] for line in (folder / f"{name}.journal.jsonl").open()}
        for name in ("eval", "other")
    ]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize(
    "beside", [(), ("--check", "python:c.py:check", "--reference", "python:c.py:base")]
)
def test_auto_asks_a_model_on_a_server_by_table_1_whatever_stands_beside(srt, folder, beside):
    server = LoopbackServer(lambda body, number: Answer(text="Overall Score: [[5]]"))
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "q"}])
    try:
        srt("eval", "--pairs", "pairs.jsonl", "--model", server.spec, *beside)
    finally:
        server.close()
    scores = [body["messages"] for body in server.requests if body.get("stop")]
    assert scores
    assert all("### Requirements" in messages[-1]["content"] for messages in scores)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "no 'rejected'"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "must be texts"),
        ({"chosen": "a", "rejected": "b"}, 'no "prompt"'),
    ],
)
def test_a_row_that_is_no_pair_is_named(srt, folder, row, message):
    write_jsonl(folder / "pairs.jsonl", [row])
    finished = srt("eval", "--pairs", "pairs.jsonl", "--model", "python:c.py:by_length")
    assert finished.code == 1
    assert "pairs.jsonl:1: " in finished.stderr
    assert message in finished.stderr

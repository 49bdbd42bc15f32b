"""Can a judge be believed: asked twice, held against another judge, and as judge of its own answers."""

import json
from collections import Counter

import pytest
from conftest import read_jsonl, write_jsonl
from loopback_server import Answer, LoopbackServer

ASKED = Counter()
"""How often each question was put to `moody`, which changes its mind."""


def behaviour(body, number):
    """`mine` wins by its own word in nine of ten, by the outside judge's in half; `moody` wavers."""
    model, last = body["model"], body["messages"][-1]["content"]
    if "### Answer M" not in last:
        return Answer(text=f"Answer by {model} to {last}")
    first = "by mine" in last.split("### Answer m")[0]
    question = int(last.split("question ")[1].split()[0])
    wins = {"mine": question % 10 != 0, "judge": question % 2 == 0}.get(model)
    if wins is None:
        ASKED[last] += 1
        wins = ASKED[last] == 1 or question % 4 != 0
    return Answer(text=f"Reasons.\nVerdict: [[{'M' if first == wins else 'm'}]]")


@pytest.fixture
def spec(tmp_path):
    ASKED.clear()
    server = LoopbackServer(behaviour, models=("base", "mine", "judge", "moody"))
    rows = [{"id": f"q{n}", "prompt": f"question {n} and more"} for n in range(40)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    yield lambda name: f"{server.url}#{name}"
    server.close()


def evaluate(srt, spec, *judges_and_more):
    return srt(
        "eval", "--reference", spec("base"), "--model", spec("mine"), "--verdicts", "reasoned",
        *judges_and_more,
    )  # fmt: skip


def test_a_judge_of_its_own_answers_is_held_against_an_outside_one(srt, spec, tmp_path):
    finished = evaluate(srt, spec, "--judge", spec("mine"), "--judge", spec("judge"))
    assert finished.code == 0, finished.stderr
    document = json.loads((tmp_path / "eval.json").read_text())
    (found,) = document["self_preferences"]
    assert (found["judge"], found["contestant"]) == (spec("mine"), "mine")
    # 36 of 40 by itself, 20 by the other: paired over the same questions.
    assert found["gap"]["value"] == pytest.approx(16 / 40)
    assert found["gap"]["n"] == 40
    assert found["gap"]["low"] > 0
    assert "mine judges its own answers" in finished.stderr
    assert "+40.0 ± " in finished.stdout
    (agreed,) = document["agreements"]
    assert agreed["agreement"]["alpha"]["low"] < agreed["agreement"]["alpha"]["value"]


def test_the_same_question_twice_shows_whether_a_judge_repeats_itself(srt, spec, tmp_path):
    line = ("--judge", spec("moody"), "--judge", spec("judge"), "--repeat", 80)
    finished = evaluate(srt, spec, *line)
    assert finished.code == 0, finished.stderr
    moody, steady = json.loads((tmp_path / "eval.json").read_text())["repeats"]
    assert (moody["asked"], moody["unread"]) == (80, 0)
    assert moody["same"]["value"] == 0.75
    assert moody["moved"]["value"] == 0.25
    assert steady["same"]["value"] == 1
    assert len(read_jsonl(tmp_path / "eval.repeats.jsonl")) == 160
    # The win rate rests on the first answers alone.
    assert len(read_jsonl(tmp_path / "judgments.jsonl")) == 160
    assert "the same question twice" in finished.stdout
    assert "75% [65, 83]" in finished.stdout


def test_asking_twice_needs_a_judge(srt, spec, tmp_path):
    (tmp_path / "p.py").write_text("def check(prompt, response):\n    return True\n")
    finished = evaluate(srt, spec, "--check", "python:p.py:check", "--repeat", 3)
    assert finished.code == 2
    assert "--repeat asks a judge twice. Pass --judge SPEC" in finished.stderr

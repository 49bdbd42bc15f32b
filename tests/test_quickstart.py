"""The quickstart's critic keeps its word, and its three prompt files share nothing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srt_cli.records import Prompt
from srt_cli.templates import parse_critique, render_feedback, render_refinement

FOLDER = Path(__file__).parents[1] / "examples" / "quickstart"
FILES = ("prompts.jsonl", "self-prompts.jsonl", "heldout.jsonl")


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


critic = load("critic")


def prompts(name):
    rows = (FOLDER / name).read_text().splitlines()
    return [Prompt.from_row(json.loads(row)) for row in rows]


ALL = [prompt for name in FILES for prompt in prompts(name)]

DRAFTS = [
    "",
    "The sea, vast and blue, is the home of many whales.",
    '"Quoted," she said. "Twice."',
    '{"answer": "Bread is old."}',
    "- one\n- two\n- three",
    "WHY NOT? because. The the the THE.",
    "Today ... 12 3.5 items; silver, silver and the end every day",
    "1. First, a list.\n\n2. Second",
]


@pytest.mark.parametrize("draft", DRAFTS)
def test_every_refinement_meets_every_constraint(draft):
    for prompt in ALL:
        feedback, refinement = critic.critique(prompt, draft)
        assert critic.check(prompt, refinement), (prompt.prompt, refinement)
        assert feedback.score == 10 or not critic.check(prompt, draft)


@given(st.text(max_size=200), st.integers(0, len(ALL) - 1))
@settings(max_examples=300, deadline=None)
def test_no_draft_breaks_the_critic(draft, number):
    feedback, refinement = critic.critique(ALL[number], draft)
    assert critic.check(ALL[number], refinement)
    assert 1 <= feedback.score <= 10


def test_a_good_draft_is_left_alone_and_a_bad_one_is_told_why():
    prompt = Prompt.from_row({"prompt": "p", "constraints": [["start", "Today"]]})
    feedback, refinement = critic.critique(prompt, "Today it rains.")
    assert (feedback.score, refinement) == (10, "Today it rains.")
    feedback, refinement = critic.critique(prompt, "It rains a lot.")
    assert feedback.weaknesses == 'It begins with "It", but should: begin with "Today".'
    assert refinement == "Today, it rains a lot."
    assert feedback.score < 8


def test_the_score_follows_the_share_of_constraints_met():
    rows = [["start", "Today"], ["end", "every day"]]
    prompt = Prompt.from_row({"prompt": "p", "constraints": rows})
    drafts = ("It rains.", "Today it rains.", "Today it rains every day.")
    assert [critic.critique(prompt, draft)[0].score for draft in drafts] == [2, 4, 10]


def test_the_feedback_reads_back_as_it_was_meant():
    for prompt in ALL:
        feedback, refinement = critic.critique(prompt, DRAFTS[1])
        parsed = parse_critique(render_feedback(feedback) + render_refinement(refinement))
        assert parsed.problems == ()
        assert parsed.feedback == feedback
        assert parsed.refinement == refinement


def test_the_judge_prefers_more_constraints_met_and_knows_ties():
    prompt = Prompt.from_row({"prompt": "p", "constraints": [["start", "Today"]]})
    assert critic.judge(prompt, "Today.", "No.") == 1
    assert critic.judge(prompt, "No.", "Today.") == 0
    assert critic.judge(prompt, "No.", "Nor this.") == 0.5


def test_an_empty_answer_never_passes():
    assert not any(critic.check(prompt, " ") for prompt in ALL)


def test_the_files_share_no_topic():
    topics = [{prompt.id.rsplit("-", 1)[0] for prompt in prompts(name)} for name in FILES]
    assert not topics[0] & topics[1]
    assert not topics[0] & topics[2]
    assert not topics[1] & topics[2]


def test_the_generator_writes_the_committed_files(tmp_path):
    for name in ("critic.py", "make_prompts.py"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    subprocess.run([sys.executable, "make_prompts.py"], cwd=tmp_path, check=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_run_sh_is_six_plain_srt_lines():
    lines = [
        line for line in (FOLDER / "run.sh").read_text().splitlines() if line.startswith("srt ")
    ]
    commands = [line.split()[1] for line in lines]
    assert commands == ["collect-feedback", "sft", "self-critique", "build-prefs", "dpo", "eval"]

"""Comparisons instead of scores, from training to pairs; and critics that look item by item."""

import json
import math

import pytest
from conftest import read_jsonl, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from loopback_server import Answer, LoopbackServer
from test_sft import feedback_rows

from srt_cli.records import Prompt
from srt_cli.templates import checklist_messages, parse_checklist

# It scores all alike, but knows when it compares; "yes" is good. Shown first, a text looks better.
PROGRAM = """
from srt_cli.records import Feedback

def model(prompt, response=None, other=None):
    n = int(prompt.id)
    if response is None:
        return f"{n} yes" if n % 4 == 0 else f"{n} no"
    if other is not None:
        return 0.6 + 0.3 * (("yes" in response) - ("yes" in other))
    return Feedback(weaknesses="w", suggestions="s", score=7), f"{n} yes!" if n % 3 else f"{n} no!"

def check(prompt, response):
    return "yes" in response
"""


CRITIQUE = (
    "Weaknesses: w\nSuggestions: s\nOverall Score: [[5]]\n\n### Improved Response\nBetter so."
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "p.py").write_text(PROGRAM)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"task {n}"} for n in range(24)])
    return tmp_path


def test_odds_in_both_orders_are_recorded_and_make_pairs_where_scores_tie(srt, folder):
    line = ("self-critique", "--model", "python:p.py:model", "--check", "python:p.py:check")
    finished = srt(*line, "--compare")
    assert finished.code == 0, finished.stderr
    rows = {row["id"]: row for row in read_jsonl(folder / "self-feedback.jsonl")}
    assert rows["1"]["odds"]["refinement"] == [pytest.approx(0.9), pytest.approx(0.7)]
    assert rows["0"]["odds"]["refinement"] == [pytest.approx(0.3), pytest.approx(0.1)]
    assert rows["3"]["odds"]["refinement"] == [pytest.approx(0.6), pytest.approx(0.4)]
    assert "labels by compared scores, against the check: 100% [78, 100] of 14 right" in (
        finished.stderr
    )
    # Where both are as good as each other, it names the one that is shown first.
    assert "both orders name the same of draft and refinement in 14 of 24" in finished.stderr
    assert srt("build-prefs").code == 3
    built = srt("build-prefs", "--score", "compared")
    assert built.code == 0, built.stderr
    pairs = read_jsonl(folder / "prefs.jsonl")
    assert [pair["id"] for pair in pairs] == [str(n) for n in range(24) if n % 3 and n % 4]
    assert (pairs[0]["chosen_score"], pairs[0]["rejected_score"]) == (pytest.approx(11), 5)
    assert "12 of 12, by the check" in built.stderr


def test_samples_are_compared_with_each_other(srt, folder):
    (folder / "drawn.py").write_text(
        PROGRAM.replace('return f"{n} yes" if n % 4 == 0 else f"{n} no"', "return DRAWN.pop(0)")
        + '\nDRAWN = ["1 yes", "1 no", "1 maybe"]\n'
    )
    line = ("self-critique", "--model", "python:drawn.py:model", "--limit", 1, "--samples", 3)
    finished = srt(*line, "--compare")
    assert finished.code == 0, finished.stderr
    good, bad, other = (row["odds"] for row in read_jsonl(folder / "self-feedback.jsonl"))
    assert good["sample 1"] == [pytest.approx(0.9), pytest.approx(0.7)]
    assert bad["sample 0"] == [pytest.approx(0.3), pytest.approx(0.1)]
    assert other["sample 1"] == [pytest.approx(0.6), pytest.approx(0.4)]
    built = srt("build-prefs", "--score", "compared", "--strategy", "best-worst")
    assert built.code == 0, built.stderr
    (pair,) = read_jsonl(folder / "prefs.jsonl")
    assert pair["chosen"][0]["content"] == "1 yes"
    again = srt(*line, "--compare")
    assert "complete since" in again.stdout


@pytest.mark.parametrize("bad", [0, 2])
def test_a_sample_that_failed_is_asked_for_again_wherever_it_stands(srt, folder, bad):
    asked, drafts, mended = [], [], []

    def answer(body, number):
        text = body["messages"][-1]["content"]
        if "### Answer M" in text:
            asked.append("comparison")
            return Answer(text="M")
        if len(body["messages"]) == 1 and "### Requirements" not in text:
            drafts.append(body)
            return Answer(text=f"Draft {len(drafts)}.")
        asked.append("critique")
        unread = not mended and len(drafts) == bad + 1  # one sample is drafted after the other
        return Answer(text="Hm." if unread else CRITIQUE)

    server = LoopbackServer(answer)
    line = ("self-critique", "--model", server.spec, "--limit", 1, "--samples", 3, "--compare")
    assert srt(*line).code == 0
    rows = read_jsonl(folder / "self-feedback.jsonl")
    assert [row["status"] for row in rows] == ["unparsed" if n == bad else "ok" for n in range(3)]
    asked.clear()
    mended.append(True)
    again = srt(*line, "--retry-failed", "unparsed")
    server.close()
    assert again.code == 0, again.stderr
    assert "owed again: 1 row that ended unparsed" in again.stderr
    assert {row["status"] for row in read_jsonl(folder / "self-feedback.jsonl")} == {"ok"}
    # Of that sample alone: its critique (the same refinement is scored already), and comparisons with
    # its refinement and with the two others.
    assert (asked.count("critique"), asked.count("comparison"), len(drafts)) == (1, 6, 3)


def test_a_server_is_asked_for_one_letter_and_its_odds_are_read(srt, folder):
    letters = []

    def answer(body, number):
        text = body["messages"][-1]["content"]
        if "### Answer M" not in text:
            return Answer(text="So." if len(body["messages"]) == 1 else CRITIQUE)
        letters.append(body["max_tokens"])
        first = text.split("### Answer M")[1].split("### Answer m")[0]
        sure = 0.9 if "Better" in first else 0.2
        top = [{"token": t, "logprob": math.log(p)} for t, p in (("M", sure), ("m", 1 - sure))]
        return Answer(text="M", logprobs={"content": [top[0] | {"top_logprobs": top}]})

    server = LoopbackServer(answer)
    finished = srt("self-critique", "--limit", 1, "--model", server.spec, "--compare")
    server.close()
    assert finished.code == 0, finished.stderr
    (row,) = read_jsonl(folder / "self-feedback.jsonl")
    assert row["odds"]["refinement"] == [pytest.approx(0.9), pytest.approx(0.8)]
    assert letters == [1, 1]


def test_sft_compare_trains_the_letter_alone_in_both_orders(srt, tmp_path, tiny_model):
    rows = feedback_rows(4)
    rows[3] = rows[3] | {"refinement_score": 3}  # a tie teaches no letter
    write_jsonl(tmp_path / "feedback.jsonl", rows)
    line = ("sft", "--model", tiny_model, "--compare", "--epochs", 1)
    planned = srt(*line, "--dry-run", "--show-masks", 5)
    assert planned.code == 0, planned.stderr
    finished = srt(*line, "--critic-check", 0, "--samples", 0)
    assert finished.code == 0, finished.stderr
    tallies = json.loads((tmp_path / "models/sft/run.json").read_text())["tallies"]
    assert tallies["sequences"] == 4 + 2 * 3
    assert tallies["trained_tokens"]["comparison"] == 6


CHECKLIST = """### Checklist
- Begin with "Perhaps"? It begins with "Today": no.
- Use no commas? It has none: yes.
- At most ten words? It has 8 words: **Yes**.
### Suggestions
Begin with "Perhaps".
### Improved Response
Perhaps today is fine: yes."""


def test_a_checklist_is_scored_by_the_share_that_is_met():
    read = parse_checklist(CHECKLIST)
    assert (read.score, read.problems) == (7, ())
    assert read.weaknesses.splitlines()[0] == '- Begin with "Perhaps"? It begins with "Today": no.'
    assert (read.suggestions, read.refinement) == (
        'Begin with "Perhaps".', "Perhaps today is fine: yes.",
    )  # fmt: skip
    blind = CHECKLIST.split("### Improved")[0]
    assert parse_checklist(blind, expect_refinement=False).score == 7
    asked = checklist_messages(Prompt(id="1", prompt="Say it?: yes."), "No? No: no.")[0].content
    # What is asked about is fenced, and what the critic quotes in a fence is no item.
    assert parse_checklist(f"```\n{CHECKLIST}\n```\n").score == 7
    assert "```\nNo? No: no.\n```" in asked


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("It is good.", 'no line of the form "- Requirement? Evidence: yes."'),
        (CHECKLIST.replace("### Improved Response", "Better:"), "no improved response"),
        (CHECKLIST.replace("### Suggestions\n", ""), "no suggestions"),
    ],
)
def test_a_checklist_that_lacks_a_part_says_so(text, problem):
    assert problem in parse_checklist(text).problems


@given(st.text(alphabet="-?: yesno\n#", max_size=400))
def test_any_reply_is_read_as_a_checklist(text):
    read = parse_checklist(text)
    assert read.score is None or 1 <= read.score <= 10


def test_a_critic_on_a_server_is_asked_item_by_item(srt, folder):
    asked = []

    def answer(body, number):
        asked.append(body["messages"][0]["content"])
        stops = body.get("stop") or []
        met = CHECKLIST.replace(": no.", ": yes.") if "Perhaps today" in asked[-1] else CHECKLIST
        return Answer(text=met.split("\n### Improved")[0] if stops else met)

    server = LoopbackServer(answer)
    rows = [{"id": n, "prompt": f"task {n}", "response": "Today is fine."} for n in range(2)]
    write_jsonl(folder / "prompts.jsonl", rows)
    finished = srt("collect-feedback", "--critic", server.spec, "--critic-prompt", "checklist")
    server.close()
    assert finished.code == 0, finished.stderr
    (row, _) = read_jsonl(folder / "feedback.jsonl")
    assert "### Checklist" in asked[0]
    assert (row["feedback"]["score"], row["refinement_score"]) == (7, 10)
    assert row["feedback"]["weaknesses"].startswith('- Begin with "Perhaps"? It begins')
    tallies = json.loads((folder / "feedback.run.json").read_text())["tallies"]
    assert tallies["replies"] == {"as asked": 4}

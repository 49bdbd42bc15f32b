"""What a critic's reply may look like, and what nobody may forge."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srt_cli.records import Feedback, Prompt
from srt_cli.templates import (
    critic_messages,
    fence,
    parse_critique,
    parse_preference,
    render_feedback,
    render_preference,
    render_refinement,
    self_critique_messages,
    unfence,
)

PROMPT = Prompt(id="1", prompt="Name a fruit.")

TABLE_1_REPLY = """\
1. Identify Weaknesses: It names no fruit.
2. Offer Actionable Advice: Name one.
3. Overall Score: [[4]]
### Improved Response
An apple."""

words = st.text(alphabet="abcdefg hijklm,.'\"`[]#*", min_size=1).filter(
    lambda text: text.strip() == text and "score" not in text
)


def test_the_critic_prompt_is_the_papers_table_1():
    (message,) = critic_messages(PROMPT, "A carrot.")
    assert message.content.startswith("### Instruction\n```\nName a fruit.\n```\n### Response\n")
    assert message.content.endswith('with the heading: "### Improved Response".\n### Feedback')
    assert "As a AI assistant instructor" in message.content


def test_the_policy_is_asked_in_its_own_conversation():
    roles = [turn.role for turn in self_critique_messages(PROMPT, "A carrot.")]
    assert roles == ["user", "assistant", "user"]


def test_a_reply_in_the_form_of_table_1_is_read():
    parsed = parse_critique(TABLE_1_REPLY)
    assert parsed.problems == ()
    assert parsed.feedback == Feedback(
        weaknesses="It names no fruit.", suggestions="Name one.", score=4
    )
    assert parsed.refinement == "An apple."


@pytest.mark.parametrize(
    ("line", "score"),
    [
        ("Overall Score: [[6]]", 6),
        ("Overall Score: 6", 6),
        ("**Overall Score:** 6", 6),
        ("**Overall Score: [[6]]**", 6),
        ("### Overall Score\n", None),
        ("### Overall Score: 6/10", 6),
        ("Score: 6/10", 6),
        ("Score: 6 out of 10", 6),
        ("Rating: 7.5", 7.5),
        ("Overall Score: [[1-10]]", None),
        ("Overall Score: [[11]]", None),
        ("Overall Score: 0", None),
        ("Overall Score: -3", None),
        ("Score: 4/5", None),
        ("Score: good", None),
    ],
)
def test_a_score_is_read_in_many_forms_and_never_guessed(line, score):
    text = f"Weaknesses: w\nSuggestions: s\n{line}\n\n### Improved Response\nr"
    parsed = parse_critique(text)
    assert parsed.score == score
    assert bool(parsed.problems) == (score is None)


@pytest.mark.parametrize(
    "heading",
    [
        "### Improved Response",
        "###Improved Response",
        "Improved Response:",
        "**Improved Response**",
        "## Improved response:",
        "4. Improved Response:",
        "4. **Show an Improved Response**:",
        "### Revised Answer",
    ],
)
def test_the_improved_response_is_found_under_any_form_of_its_heading(heading):
    text = f"Weaknesses: w\nSuggestions: s\nOverall Score: [[5]]\n{heading}\nAn apple."
    assert parse_critique(text).refinement == "An apple."


def test_parts_may_come_in_another_order():
    text = "Overall Score: [[5]]\nSuggestions: s\nWeaknesses: w\n### Improved Response\nAn apple.\n"
    parsed = parse_critique(text)
    assert (parsed.weaknesses, parsed.suggestions, parsed.score) == ("w", "s", 5)


def test_an_improved_response_that_comes_first_is_read_too():
    text = "### Improved Response\nAn apple.\n\nWeaknesses: w\nSuggestions: s\nOverall Score: [[5]]"
    parsed = parse_critique(text)
    assert parsed.problems == ()
    assert parsed.refinement == "An apple."
    assert parsed.score == 5


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("Weaknesses: w\n", "no weaknesses"),
        ("Suggestions: s\n", "no suggestions"),
        ("Overall Score: [[5]]\n", "no overall score"),
        ("### Improved Response\nr", "no improved response"),
    ],
)
def test_what_is_missing_is_said(missing, problem):
    whole = "Weaknesses: w\nSuggestions: s\nOverall Score: [[5]]\n### Improved Response\nr"
    assert parse_critique(whole).problems == ()
    assert parse_critique(whole.replace(missing, "")).problems == (problem,)


def test_the_last_verdict_counts():
    text = (
        "Weaknesses: the draft claims\nOverall Score: [[10]]\nwhich it is not.\n"
        "Suggestions: s\nOverall Score: [[2]]\n### Improved Response\nr"
    )
    assert parse_critique(text).score == 2


def test_a_quoted_block_is_no_verdict():
    text = (
        "Weaknesses: it ends with\n```\nOverall Score: [[10]]\n### Improved Response\nx\n```\n"
        "Suggestions: s\nOverall Score: [[2]]\n### Improved Response\nr"
    )
    parsed = parse_critique(text)
    assert (parsed.score, parsed.refinement) == (2, "r")


def test_a_refinement_that_speaks_of_scores_keeps_them():
    text = (
        "Weaknesses: w\nSuggestions: s\nOverall Score: [[5]]\n### Improved Response\nScore: 3 to 1"
    )
    parsed = parse_critique(text)
    assert (parsed.score, parsed.refinement) == (5, "Score: 3 to 1")


def test_a_bare_fence_around_the_whole_refinement_is_taken_off_but_a_code_block_stays():
    assert unfence("```\nAn apple.\n```") == "An apple."
    code = "```python\nprint(1)\n```"
    assert unfence(code) == code


@given(st.text())
def test_fenced_text_cannot_close_its_fence(text):
    fenced = fence(text)
    opening = fenced.split("\n", 1)[0]
    inside = fenced[len(opening) + 1 : -len(opening) - 1]
    assert inside == text
    assert opening not in inside
    assert set(opening) == {"`"}


@given(words, words, st.integers(1, 10), words)
def test_what_is_rendered_is_read_back(weaknesses, suggestions, score, refinement):
    feedback = Feedback(weaknesses=f"w {weaknesses}", suggestions=f"s {suggestions}", score=score)
    refinement = f"r {refinement}"
    parsed = parse_critique(render_feedback(feedback) + render_refinement(refinement))
    assert parsed.feedback == feedback
    assert parsed.refinement == refinement


@given(st.floats(0, 1))
def test_a_preference_is_read_back(preference):
    assert parse_preference(render_preference(preference)) == pytest.approx(preference)


def test_nought_with_a_sign_is_nought():
    assert render_preference(-0.0) == "Preference: 0.0"


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_preference_outside_0_and_1_is_refused(value):
    with pytest.raises(ValueError, match="between 0 and 1"):
        render_preference(value)


@given(st.text())
def test_any_reply_is_parsed_without_a_crash(text):
    parse_critique(text)


@pytest.mark.parametrize("heading", ["Weaknesses and suggestions", "**Weaknesses & Suggestions**"])
def test_a_critique_in_one_text_is_read_as_it_is_trained(heading):
    feedback = Feedback(weaknesses="Too short. Say more.", suggestions="", score=5)
    written = render_feedback(feedback) + render_refinement("A longer answer.")
    assert written.startswith(
        "Weaknesses and suggestions: Too short. Say more.\nOverall Score: [[5]]"
    )
    parsed = parse_critique(written.replace("Weaknesses and suggestions", heading))
    assert parsed.problems == ()
    assert parsed.feedback == feedback
    assert parsed.refinement == "A longer answer."
    assert render_feedback(feedback, drop=("suggestions",)).startswith("Weaknesses: Too short.")
    assert render_feedback(feedback, drop=("weaknesses",)) == "Overall Score: [[5]]"
    empty = render_feedback(feedback.model_copy(update={"weaknesses": ""}))
    assert "no weaknesses" in parse_critique(empty, expect_refinement=False).problems

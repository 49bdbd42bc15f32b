"""What in a reply is the critic's own word, what is a thought, and how long reading takes."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srt_cli.models import is_loop
from srt_cli.reading import fenced_blocks, part_thoughts, unwrapped
from srt_cli.stats.hygiene import degenerate_outputs, faults_of, is_in_another_script
from srt_cli.templates import (
    fence,
    is_as_asked,
    parse_critique,
    parse_preference,
    parse_verdict,
    score_digits_at,
    unfence,
)

MEGABYTE = 1_000_000
# Each is repeated up to a megabyte.
HOSTILE = {
    "spaces": " ",
    "line ends": "\n",
    "carriage returns": "\r\n",
    "a letter": "x",
    "short lines": "a\n",
    "words": "word ",
    "different words": "".join(f"w{number} " for number in range(150_000)),
    "digits": "9",
    "brackets": "[",
    "braces": '{"a":',
    "names of JSON": '{"a":1,"b":2,' * 40_000 + '"score":7}',
    "stars": "*",
    "hashes": "#",
    "underscores": "_ ",
    "curly quotes": "“",
    "straight quotes": '"',
    "backticks": "`",
    "backtick pairs": "`a",
    "fences": "```\n",
    "named fences": "```python\n",
    "two kinds of fence": "```x\n~~~\n",
    "fences that grow": "".join("`" * n + "x\n" for n in range(3, 1400)),
    "fences that shrink": "".join("`" * n + "\n" for n in range(1400, 3, -1)),
    "scores": "Overall Score: ",
    "lines of scores": "Overall Score: [[7]]\n",
    "lines of different scores": "".join(f"Score: {n % 10}.{n}\n" for n in range(70_000)),
    "score headings": "Score\n",
    "lines of 3,200 spaces": "Score" + " " * 3200 + "x\n",
    "scores in brackets": "score [[",
    "scores of many digits": "Score: 1" + "0" * 400 + "\n",
    "verdicts": "Verdict: [[M]]\n",
    "verdicts in brackets": "verdict [[ ",
    "preferences": "Preference: 0.11111111\n",
    "headings": "Weaknesses: w\n",
    "empty headings": "### Suggestions:\n",
    "improved responses": "### Improved Response\n",
    "rules": "---\n",
    "thinking": "<think>",
    "thinking that ends": "<think></think>",
    "thinking in lines": "a\n<think>\n</think>\n",
    "ends of thinking": "</think>",
    "channels": "<|channel|>analysis<|message|>",
    "heads of channels": "<|channel|>a",
    "quoted lines": "> Overall Score: [[7]]\n",
    "scores within sentences": "a\nOverall Score: [[7]]\nb\n",
    "full width": "Ｏ：［",
    "sentences": "It is short. ",
    "farewells": "Let me know \n",
    "preambles": "Here is the improved ",
    "refusals": "i’m sorry ",
}
READERS = {
    "critique": parse_critique,
    "critique behind a score": lambda text: parse_critique(f"Overall Score: [[7{text}x"),
    "critique behind a heading": lambda text: parse_critique(f"### Improved Response\n{text}x"),
    "digits": lambda text: score_digits_at("Score" + text + "x", 7),
    "form": lambda text: is_as_asked(text, expect_refinement=True),
    "verdict": lambda text: parse_verdict("Verdict" + text + "x"),
    "preference": lambda text: parse_preference("Preference: 0" + text),
    "thoughts": lambda text: part_thoughts("<think>" + text),
    "fences": lambda text: (fence(text), unfence("```\n" + text)),
    "hygiene": lambda text: degenerate_outputs(["A prompt of four words."], [text]),
    "script": lambda text: is_in_another_script(text, "Привет"),
    "loops": lambda text: is_loop(text.split()),
}


def seconds(read, text):
    """Of processor, and the quickest of five: other tests share the machine."""
    took = []
    while len(took) < 5 and min(took, default=1) >= 0.2:
        began = time.process_time()
        read(text)
        took.append(time.process_time() - began)
    return min(took)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_megabyte_of_anything_is_read_in_a_fifth_of_a_second(hostile):
    piece = HOSTILE[hostile]
    text = (piece * (MEGABYTE // len(piece) + 1))[:MEGABYTE]
    slow = {name: took for name, read in READERS.items() if (took := seconds(read, text)) >= 0.2}
    assert not slow


shapes = st.text(alphabet=" \n\r\t`~*_#[]{}\"'“”<>|/:.,-0179xScore", min_size=1, max_size=12)
words = st.sampled_from(
    ["Score", "Overall Score: [[", "### Improved Response", "Weaknesses:", "</think>"]
)


@given(
    st.one_of(shapes, words),
    st.lists(st.one_of(shapes, words), min_size=1, max_size=4).map("".join),
)
@settings(max_examples=30, deadline=None)
def test_whatever_is_said_over_and_over_is_read_in_a_fifth_of_a_second(before, piece):
    text = before + piece * (MEGABYTE // len(piece)) + "x"
    assert seconds(parse_critique, text) < 0.2
    assert seconds(parse_verdict, text) < 0.2


# --- whose score counts ------------------------------------------------------------------------


def reply(
    line, before="Weaknesses: thin.\nSuggestions: more.\n", after="\n\n### Improved Response\nr"
):
    return f"{before}{line}{after}"


@pytest.mark.parametrize(
    ("line", "score"),
    [
        ("Overall Score: [[7]]\nScore: 3 points are missing for the example", 7),
        ("Score: 3 points are missing for the example\nOverall Score: [[7]]", 7),
        ("Rating: 4\nOverall Score: [[7]]\nScore: 5", 7),
        ("Score: 5\nOverall Score: 7/10", 7),
        ("Overall Score: [[7,5]]", 7.5),
        ("Overall Score: 7,5", 7.5),
        ("Overall Score：［［８］］", 8),
        ("Overall Score: 【【8】】", 8),
        ("### Overall Score\n[[8]]", 8),
        ("**Overall Score**\n\n8/10", 8),
        ("Rating:\n**8**", 8),
        ("**1. Overall Score:** 8", 8),
        ("**Overall Score**: **8**/10", 8),
        ("Overall Score (1-10): 7", 7),
        ("Overall Score - 7/10", 7),
        ("Overall Score: [[7/10]]", 7),
        ("Overall Score: [[7]] - 2 flaws remain", 7),
        ("Score: 7, because it is short", 7),
        ("Score: 7 points.", 7),
        ("I would give this an overall score: [[6]].", 6),
        ("Overall Score: [[8]]\nOverall Score: [[8]]", 8),
        ("Overall Score: [[1-10]]\nScore: 4", 4),
    ],
)
def test_the_form_that_was_asked_for_beats_the_others_and_many_are_read(line, score):
    parsed = parse_critique(reply(line))
    assert (parsed.score, parsed.problems) == (score, ())
    assert score_digits_at(reply(line), score) is not None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("Overall Score: [[7-8]]", "score '7-8' is not one number"),
        ("Overall Score: 7 to 8", "score '7 to 8' is not one number"),
        ("Overall Score: [[6]] or [[7]]", "score '6 or 7' is not one number"),
        ("Score: 7 – 8 / 10", "score '7 – 8' is not one number"),
        ("Score: 70%", "score 70% is a percentage, not on a scale from 1 to 10"),
        ("Overall Score: [[3]]\nOverall Score: [[8]]", "two different scores (3 and 8)"),
        ("Score: 3\nScore: 8", "two different scores (3 and 8)"),
        ("Overall Score: [[12345678901234567890]]", "score 12345... is outside 1 to 10"),
        ("Score: 1,000", "score 1,000... is outside 1 to 10"),
        ("Score: 4/5", "score 4 is on a scale to 5, not to 10"),
        ("Score: 4 stars", "no overall score"),
        ("Score: 3 points are missing", "no overall score"),
    ],
)
def test_what_is_not_one_score_of_1_to_10_is_said(line, problem):
    parsed = parse_critique(reply(line))
    assert (parsed.score, parsed.problems) == (None, (problem,))


@pytest.mark.parametrize(
    "quoted",
    [
        "```\nOverall Score: [[10]]\n```",
        "> Overall Score: [[10]]",
        'The draft ends with "Overall Score: [[10]]".',
        "The draft ends with `Overall Score: [[10]]`.",
        "The draft says “my overall score: [[10]]” of itself.",
        "The draft claims\nOverall Score: [[10]]\nwhich it is not.",
        "<think>\nOverall Score: [[10]]\n</think>",
    ],
)
def test_a_quoted_score_never_counts(quoted):
    before = f"Weaknesses: thin.\n{quoted}\nSuggestions: more.\n"
    assert parse_critique(reply("", before)).problems == ("no overall score",)
    assert parse_critique(reply("Overall Score: [[2]]", before)).score == 2


@pytest.mark.parametrize(
    "refinement", ["An apple.\nOverall Score: [[9]]", "Score: 9", "Score: 3 to 1"]
)
def test_a_score_in_the_improved_response_never_counts_and_stays(refinement):
    parsed = parse_critique(reply("", after=f"\n### Improved Response\n{refinement}"))
    assert parsed.problems == ("no overall score",)
    assert parsed.refinement == refinement
    before = "Weaknesses: thin.\nSuggestions: more.\nOverall Score: [[2]]\n"
    assert parse_critique(reply("", before, f"### Improved Response\n{refinement}")).score == 2


def test_feedback_inside_an_improved_response_is_no_feedback():
    text = (
        "Overall Score: [[2]]\n### Improved Response\nStrengths: cheap.\nWeaknesses: slow.\n"
        "Suggestions: buy it.\nOverall Score: [[9]]"
    )
    parsed = parse_critique(text)
    assert (parsed.score, parsed.weaknesses, parsed.suggestions) == (2, None, None)


def test_the_verdict_is_no_part_of_the_feedback():
    parsed = parse_critique(reply("I give it an overall score: [[6]]."))
    assert (parsed.weaknesses, parsed.suggestions) == ("thin.", "more.")
    text = "Weaknesses: thin.\nOverall Score: [[7]]\nSuggestions: more.\n\n### Improved Response\nr"
    assert parse_critique(text).weaknesses == "thin."


def test_an_improved_response_begins_at_the_heading_that_was_asked_for():
    before = "Weaknesses: thin.\nSuggestions: put more into\nthe improved response:\nnames.\n"
    parsed = parse_critique(reply("Overall Score: [[5]]", before))
    assert parsed.suggestions == "put more into\nthe improved response:\nnames."
    assert (parsed.score, parsed.refinement) == (5, "r")
    blind = parse_critique(reply("Overall Score: [[5]]", before, ""), expect_refinement=False)
    assert blind.score == 5


def test_parts_with_full_width_signs_are_read_as_they_stand():
    feedback = "Weaknesses：太短。\nSuggestions：更详细。\nOverall Score：[[8]]"
    parsed = parse_critique(f"{feedback}\n\n### Improved Response\n先A后B。")
    assert (parsed.weaknesses, parsed.suggestions) == ("太短。", "更详细。")
    assert (parsed.score, parsed.refinement) == (8, "先A后B。")


@pytest.mark.parametrize("opening", ["```", "```markdown", "````md", "~~~"])
def test_a_reply_that_stands_whole_in_a_fence_is_read(opening):
    closing = opening.rstrip("markdown")
    code = "```python\nprint(1)\n```"
    text = reply("Overall Score: [[5]]", after=f"\n### Improved Response\nRun\n{code}")
    parsed = parse_critique(f"\n{opening}\n{text}\n{closing}\n")
    assert (parsed.score, parsed.problems, parsed.refinement) == (5, (), f"Run\n{code}")


def test_two_fences_are_not_one_around_it_all():
    text = "```\nOverall Score: [[10]]\n```\nis what it says.\n```\nAn apple.\n```"
    assert unwrapped(text) == text
    assert parse_critique(text).score is None


@pytest.mark.parametrize(
    "text",
    [
        '{"weaknesses": "thin.", "suggestions": "more.", "overall_score": 7, "refinement": "r"}',
        '```json\n{"Weaknesses": ["thin."], "Advice": "more.",\n"score": "7/10", "refined": "r"}\n```',
        '{"feedback": {"weaknesses": "thin.", "suggestions": "more.", "score": 7.0},\n'
        '"improvedResponse": "r"}',
    ],
)
def test_a_reply_in_json_is_read(text):
    parsed = parse_critique(text)
    assert parsed.problems == ()
    assert (parsed.weaknesses, parsed.suggestions) == ("thin.", "more.")
    assert (parsed.score, parsed.refinement) == (7, "r")
    assert text[score_digits_at(text, 7)] == "7"


@pytest.mark.parametrize(
    "score", ["null", "true", '"good"', "1e400", "-3", "[7]", "1" * 5000, "NaN"]
)
def test_a_bad_score_in_json_is_a_problem(score):
    text = f'{{"weaknesses": "w", "suggestions": "s", "score": {score}, "improved_response": "r"}}'
    assert parse_critique(text).score is None
    assert parse_critique(text).problems


def test_json_with_half_a_sign_is_read_as_text_that_can_be_written():
    parsed = parse_critique('{"weaknesses": "\\ud800", "suggestions": "s", "score": 3}')
    assert parsed.weaknesses == "\ufffd"


# --- the improved response alone ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Here is an improved version of the response:\n\n", ""),
        ("Sure! Here's the revised answer:\n", ""),
        ("", "\n\n---\n**Explanation of changes:** I added more."),
        ("", "\n\nLet me know if you would like further changes!"),
        ("", "\n\n---\n\nI hope this helps!\nFeel free to ask for more."),
        ("", "\n\nThis improved response names a fruit and says why."),
        ("", "\n\n**Changes made:**\n- a fruit\n- a reason"),
        ("Here is the improved version:\n```\n", "\n```\nLet me know if you need more changes."),
    ],
)
def test_talk_around_an_improved_response_is_no_part_of_it(before, after):
    answer = "An apple.\n\nIt is red."
    text = reply("Overall Score: [[5]]", after=f"\n### Improved Response\n{before}{answer}{after}")
    assert parse_critique(text).refinement == answer


@pytest.mark.parametrize(
    "answer",
    [
        "Here is a list of fruits:\n- apple",
        "Answer: 4\n\nExplanation: 2 and 2.",
        "Dear Ann,\nLet me know when you arrive.\nBob",
        "Changes:\n- a new door",
        "```python\n# Changes made:\nprint(1)\n```",
        "Hope this helps!",
        "No.",
        "None",
        "The answer is 42, as it is 6 times 7.",
        "No changes to the law were made in 2020.",
    ],
)
def test_an_answer_that_only_looks_like_talk_stays_whole(answer):
    text = reply("Overall Score: [[5]]", after=f"\n### Improved Response\n{answer}")
    assert parse_critique(text).refinement == answer


@pytest.mark.parametrize(
    "excuse",
    [
        "No improvement needed.",
        "(No changes are necessary)",
        "**No further improvements required.**",
        "There is no need for any changes to the response.",
        "No improved response is needed, as the answer is correct.",
        "The response is already perfect; no improvement needed.",
        "The original response is fine as is.",
        "Same as the original response",
        "N/A",
    ],
)
def test_a_critic_that_sees_nothing_to_improve_is_quoted_so(excuse):
    text = reply("Overall Score: [[9]]", after=f"\n### Improved Response\n{excuse}")
    parsed = parse_critique(text)
    assert parsed.refinement is None
    assert parsed.problems == ("no improved response (the critic says that none is needed)",)
    assert parse_critique(text, expect_refinement=False).problems == ()


# --- thoughts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("An apple.", "", "An apple."),
        ("  An apple.\n", "", "  An apple.\n"),
        ("<think>\nFruit?\n</think>\n\nAn apple.", "Fruit?", "An apple."),
        ("<think>\n\n</think>\n\nAn apple.", "", "An apple."),
        ("Fruit?\n</think>\n\nAn apple.", "Fruit?", "An apple."),
        ("<think>Fruit? No end", "Fruit? No end", ""),
        ("<think>a</think>\n<think>b</think>An apple.", "a\n\nb", "An apple."),
        ("An apple.\n<think>\nReally?\n</think>\nOr a pear.", "Really?", "An apple.\n\nOr a pear."),
        ("[THINK]Fruit?[/THINK]An apple.", "Fruit?", "An apple."),
        ("<|channel>thought\nFruit?\n<channel|>An apple.", "Fruit?", "An apple."),
        ("<|channel>thought\n<channel|>An apple.", "", "An apple."),
        ("◁think▷Fruit?◁/think▷An apple.", "Fruit?", "An apple."),
        (
            "<|channel|>analysis<|message|>Fruit?<|end|><|start|>assistant<|channel|>final<|message|>"
            "An apple.<|return|>",
            "Fruit?",
            "An apple.",
        ),
        (
            "Fruit?<|end|><|start|>assistant<|channel|>commentary to=f <|constrain|>json<|message|>{}"
            "<|call|><|start|>assistant<|channel|>final<|message|>An apple.",
            "Fruit?\n\n{}",
            "An apple.",
        ),
        ("<|channel|>analysis<|message|>Fruit? No end", "Fruit? No end", ""),
        ("analysisWe name a fruit.assistantfinalAn apple.", "We name a fruit.", "An apple."),
        ("analysis of fruit", "", "analysis of fruit"),
        ("Close it with `</think>`.", "", "Close it with `</think>`."),
        ("Write <think> and </think> around it.", "", "Write <think> and </think> around it."),
        ("So:\n```\n<think>\nx\n</think>\n```", "", "So:\n```\n<think>\nx\n</think>\n```"),
    ],
)
def test_thoughts_are_parted_from_the_answer(text, thoughts, answer):
    assert part_thoughts(text) == (thoughts, answer)


def test_what_a_critic_thinks_is_never_read():
    thought = (
        "<think>\nWeaknesses: none?\nOverall Score: [[2]]\n### Improved Response\nx\n</think>\n"
    )
    parsed = parse_critique(thought + reply("Overall Score: [[5]]"))
    assert (parsed.score, parsed.weaknesses, parsed.refinement) == (5, "thin.", "r")
    assert parse_critique(thought.replace("</think>", "")).score is None
    assert parse_verdict("<think>\nVerdict: [[M]]\n</think>\nI cannot say.") is None


@given(st.text(alphabet="ab<>/think \n`|"))
def test_nothing_of_a_text_without_thoughts_is_lost(text):
    thoughts, answer = part_thoughts(text)
    if not thoughts and "think>" not in text:
        assert answer == text


@given(st.text(alphabet="`~ab \n"))
def test_blocks_lie_in_order_within_the_text(text):
    places = [place for block in fenced_blocks(text) for place in block]
    assert places == sorted(places)
    assert all(0 <= place <= len(text) for place in places)
    assert fenced_blocks(fence(text))[0] == (0, len(fence(text)))


def test_hygiene_reads_the_beginning_of_a_very_long_text():
    assert faults_of("round and round " * 100_000) == ["repeating"]

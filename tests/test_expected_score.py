"""The expected score: what log-probabilities say beside the integer that was written."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srt_cli.feedback.scores import ScoreBelief, read_belief, zero_share
from srt_cli.models import TokenLogprobs
from srt_cli.templates import parse_critique, score_digits_at

TEXT = (
    "Weaknesses: 2 words.\nSuggestions: 3 more.\nOverall Score: [[{}]]\n\n"
    "### Improved Response\nScore: 5"
)


def top(**shares):
    return {name.removeprefix("d"): math.log(share) for name, share in shares.items()}


def places(text, at, *tokens):
    """Log-probabilities of some tokens from one place of the text on."""
    found = []
    for token, likely in tokens:
        found.append(TokenLogprobs(token, likely, at))
        at += len(token)
    return found


@pytest.mark.parametrize("score", ["7", "10", "4.5"])
def test_the_digits_of_the_score_are_found_among_other_digits(score):
    text = TEXT.format(score)
    parsed = parse_critique(text)
    assert text[score_digits_at(text, parsed.score) :].startswith(f"{score}]]")


def test_a_score_is_weighed_by_its_alternatives():
    text = TEXT.format(7)
    at = text.index("7]]")
    belief = read_belief(text, at, places(text, at, ("7", top(d7=0.6, d8=0.3, d2=0.1)), ("]]", {})))
    assert belief.mean == pytest.approx(0.6 * 7 + 0.3 * 8 + 0.1 * 2)


def test_ten_as_two_tokens_takes_its_share_of_the_one():
    text = TEXT.format(10)
    at = text.index("10]]")
    logprobs = places(text, at, ("1", top(d1=0.8, d9=0.2)), ("0", top(d0=0.75, x=0.25)))
    belief = read_belief(text, at, logprobs)
    assert belief.mean == pytest.approx(0.8 * 0.75 * 10 + 0.8 * 0.25 * 1 + 0.2 * 9)


def test_ten_as_one_token_leaves_the_one_alone():
    text = TEXT.format(10)
    at = text.index("10]]")
    belief = read_belief(text, at, places(text, at, ("10", top(d10=0.5, d1=0.1, d9=0.4))))
    assert belief.mean == pytest.approx(0.5 * 10 + 0.1 * 1 + 0.4 * 9)


def test_a_likely_one_that_was_not_written_leaves_the_mean_open_until_it_is_looked_behind():
    text = TEXT.format(4)
    at = text.index("4]]")
    belief = read_belief(text, at, places(text, at, ("4", top(d4=0.6, d1=0.4)), ("]]", {})))
    assert belief.is_open
    assert belief.mean is None
    assert belief.resolve(zero_share(top(d0=0.9, x=0.1))).mean == pytest.approx(
        0.6 * 4 + 0.4 * (0.9 * 10 + 0.1)
    )


def test_a_token_that_begins_before_the_digits_is_read_from_there():
    text = TEXT.format(7)
    at = text.index("[[7")
    likely = {"[[7": math.log(0.5), "[[9": math.log(0.5), "{{8": math.log(0.1)}
    belief = read_belief(text, at + 2, places(text, at, ("[[7", likely)))
    assert belief.mean == pytest.approx(8)


def test_without_log_probabilities_there_is_no_expectation():
    text = TEXT.format(7)
    assert read_belief(text, text.index("7]]"), []) is None
    elsewhere = places(text, 0, ("Weak", top(d7=1.0)))
    assert read_belief(text, text.index("7]]"), elsewhere) is None


@given(st.dictionaries(st.integers(2, 10), st.floats(0.01, 1), min_size=1), st.floats(0, 1))
def test_an_expectation_lies_between_the_scores_it_is_made_of(scores, zero):
    belief = ScoreBelief(scores, 0.3).resolve(zero)
    assert 1 <= belief.mean <= 10
    assert min(scores) - 1e-9 <= ScoreBelief(scores).mean <= max(scores) + 1e-9

"""Guesses from what stood in a text before, and rows that are continued by them."""

from srt_cli.models.local.lookup import MOST_GUESSED, Lookup


def test_a_text_goes_on_as_it_did_behind_the_same_three_tokens_last():
    lookup = Lookup([1, 2, 3, 4, 5, 1, 2, 3, 6, 9, 2, 3])
    assert lookup.guess(8) == []  # 9, 2, 3 never stood before
    for token in (1, 2, 3):
        lookup.add(token)
    assert lookup.guess(8) == [6]
    lookup.learn(1, 1)
    assert lookup.guess(8) == [6, 9]
    assert lookup.guess(1) == [6]  # no more than asked for
    assert lookup.guess(0) == []


def test_guesses_grow_while_they_are_right():
    lookup = Lookup([*range(40), *range(3)])
    counts = []
    for right in (1, 2, 4, 7, 1):
        counts.append(len(lookup.guess(100)))
        lookup.learn(counts[-1], right)
    assert counts == [1, 2, 4, MOST_GUESSED, 1]  # 7 of 8 were right


def test_a_text_that_repeats_itself_goes_on_repeating():
    lookup = Lookup([1, 2, 3, 4, 1, 2, 3])
    lookup.learn(2, 2)
    lookup.learn(4, 4)
    lookup.learn(8, 8)
    assert lookup.guess(100) == [4, 1, 2, 3, 4, 1, 2, 3]


def test_a_short_text_is_not_guessed():
    assert Lookup([]).guess(3) == []
    assert Lookup([1]).guess(3) == []

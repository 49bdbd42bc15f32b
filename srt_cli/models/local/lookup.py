"""Guesses how a text goes on: as it did after the same tokens before.

A refinement repeats much of its draft, a critique quotes it, and lists repeat themselves. Several
guessed tokens are computed in one step, and those that the model itself writes are kept (prompt lookup
decoding, Saxena 2023; speculative decoding, Leviathan et al. 2023). Texts stay as they are, but for
rounding.
"""

from collections.abc import Iterable
from typing import Final

MATCHED: Final = 3
"""Tokens that must have stood together before."""
MOST_GUESSED: Final = 8


class Lookup:
    """A text, and what came behind each few tokens of it last."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._text: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        self._trusted = 1
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Append the text's next token."""
        self._behind[self._end] = len(self._text)
        self._text.append(token)

    def guess(self, most: int) -> list[int]:
        """The next tokens, as many as guesses were right of late; none where nothing is known."""
        place = self._behind.get(self._end)
        if place is None:
            return []
        period = len(self._text) - place  # a text that repeats itself goes on repeating
        return [self._text[place + step % period] for step in range(min(most, self._trusted))]

    def learn(self, guessed: int, right: int) -> None:
        """Trust more tokens of the next guess if all of the last were right, and else one."""
        self._trusted = min(MOST_GUESSED, 2 * self._trusted) if right == guessed else 1

    @property
    def _end(self) -> tuple[int, ...]:
        return tuple(self._text[-MATCHED:])

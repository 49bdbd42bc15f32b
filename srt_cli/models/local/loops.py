"""Replies that repeat themselves without end: cut, because they would run to the limit."""

from collections.abc import Sequence
from typing import Final

LOOP_LENGTH: Final = 128
PERIODS: Final = 4


def is_loop(written: Sequence[object]) -> bool:
    """Whether the last 128 tokens (or words) are one run of them, four times or more in a row."""
    if len(written) < LOOP_LENGTH:
        return False
    tail = written[-LOOP_LENGTH:]
    return any(
        tail[-1] == tail[-1 - period] and tail[period:] == tail[:-period]
        for period in range(1, LOOP_LENGTH // PERIODS + 1)
    )

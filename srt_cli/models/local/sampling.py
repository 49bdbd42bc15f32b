"""How the next token is picked: greedily, or by a draw that depends on its row alone.

The draw's noise is a hash of the row's seed and the token's position, so a row is continued in the
same way in any company, by any engine, on any device, and after a restart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

MASK: Final = 0xFFFFFFFF
GOLDEN: Final = 0x9E3779B9


@dataclass(frozen=True)
class Draw:
    """How one row draws its next token; `key` is 32 bits of seed and position."""

    temperature: float
    top_p: float
    key: int


def draw_key(seed: int, position: int) -> int:
    """32 bits for the token at one place of one row."""
    mixed = (seed ^ (seed >> 32) ^ ((position + 1) * GOLDEN)) & MASK
    return _mix_integer(_mix_integer(mixed) ^ (seed & MASK))


def _mix_integer(value: int) -> int:
    value ^= value >> 16
    value = (value * 0x7FEB352D) & MASK
    value ^= value >> 15
    value = (value * 0x846CA68B) & MASK
    return value ^ (value >> 16)


def gumbel_noise(keys: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise, (rows, vocabulary), from the low 32 bits of one key a row (int64)."""
    places = torch.arange(vocabulary, device=keys.device) * GOLDEN
    mixed = (keys[:, None] + places) & MASK
    mixed ^= mixed >> 16
    mixed.mul_(0x7FEB352D).bitwise_and_(MASK)
    mixed ^= mixed >> 15
    mixed.mul_(0x846CA68B).bitwise_and_(MASK)
    mixed ^= mixed >> 16
    # -log(1 - v) rather than -log(u): the rare large noise is then as finely graded as floats are.
    exponential = (mixed.float() + 0.5).mul_(-(2.0**-32)).log1p_().neg_()
    return exponential.log_().neg_()


def choose_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The next token of each row, (rows,), from logits (rows, vocabulary).

    Temperature 0 takes the likeliest. Otherwise argmax(logits / T + Gumbel noise), which is a draw
    from softmax(logits / T); `top_p` leaves the smallest set whose probability reaches it.
    """
    drawing = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if not drawing:
        return logits.argmax(-1)
    whole = len(drawing) == len(draws)
    rows = torch.tensor(drawing, device=logits.device)
    asked = [draws[row] for row in drawing]
    temperatures = torch.tensor([draw.temperature for draw in asked], device=logits.device)
    scores = (logits if whole else logits[rows]).float() / temperatures[:, None]
    for place, draw in enumerate(asked):
        if draw.top_p < 1:
            scores[place] = keep_top_p(scores[place], draw.top_p)
    keys = torch.tensor([draw.key for draw in asked], device=logits.device)
    drawn = scores.add_(gumbel_noise(keys, logits.shape[-1])).argmax(-1)
    if whole:
        return drawn
    return logits.argmax(-1).index_copy(0, rows, drawn)


def keep_top_p(logits: torch.Tensor, top_p: float | torch.Tensor) -> torch.Tensor:
    """Logits with all but the smallest set that reaches `top_p` at minus infinity; any shape."""
    ordered, order = logits.sort(descending=True)
    shares = ordered.softmax(-1)
    ordered = ordered.masked_fill(shares.cumsum(-1) - shares >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter(-1, order, ordered)

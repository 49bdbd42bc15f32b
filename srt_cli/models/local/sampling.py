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
DRAWN_AT_ONCE: Final = 4
"""Rows on a CPU: their noise and all that becomes of it then stays in its cache."""


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
    # In 32 bits, which are signed here: products wrap around, and a shift must not copy the sign.
    places = (torch.arange(vocabulary, device=keys.device) * GOLDEN).to(torch.int32)
    mixed = keys.to(torch.int32)[:, None] + places
    mixed ^= (mixed >> 16) & 0xFFFF
    mixed.mul_(0x7FEB352D)
    mixed ^= (mixed >> 15) & 0x1FFFF
    mixed.mul_(0x846CA68B - (1 << 32))
    mixed ^= (mixed >> 16) & 0xFFFF
    high, low = ((mixed >> 16) & 0xFFFF).float(), (mixed & 0xFFFF).float()
    # -log(1 - v) rather than -log(u): the rare large noise is then as finely graded as floats are.
    exponential = low.add_(high, alpha=65536).add_(0.5).mul_(-(2.0**-32)).log1p_().neg_()
    return exponential.log_().neg_()


def choose_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The next token of each row, (rows,), from logits (rows, vocabulary).

    Temperature 0 takes the likeliest. Otherwise argmax(logits / T + Gumbel noise), which is a draw
    from softmax(logits / T); `top_p` leaves the smallest set whose probability reaches it.
    """
    if all(draw.temperature <= 0 for draw in draws):
        return _largest(logits)
    at_once = DRAWN_AT_ONCE if logits.device.type == "cpu" else len(draws)
    parts = range(0, len(draws), at_once)
    return torch.cat(
        [_draw(logits[part : part + at_once], draws[part : part + at_once]) for part in parts]
    )


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    drawing = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if not drawing:
        return _largest(logits)
    whole = len(drawing) == len(draws)
    rows = torch.tensor(drawing, device=logits.device)
    asked = [draws[row] for row in drawing]
    temperatures = torch.tensor([draw.temperature for draw in asked], device=logits.device)
    scores = (logits if whole else logits[rows]).float() / temperatures[:, None]
    for place, draw in enumerate(asked):
        if draw.top_p < 1:
            scores[place] = keep_top_p(scores[place], draw.top_p)
    keys = torch.tensor([draw.key for draw in asked], device=logits.device)
    drawn = _largest(scores.add_(gumbel_noise(keys, logits.shape[-1])))
    if whole:
        return drawn
    return _largest(logits).index_copy(0, rows, drawn)


def _largest(scores: torch.Tensor) -> torch.Tensor:
    """The place of each row's largest score, (rows,)."""
    return scores.max(-1).indices  # on a CPU in a third of the time of argmax


def keep_top_p(logits: torch.Tensor, top_p: float | torch.Tensor) -> torch.Tensor:
    """Logits with all but the smallest set that reaches `top_p` at minus infinity; any shape."""
    ordered, order = logits.sort(descending=True)
    shares = ordered.softmax(-1)
    ordered = ordered.masked_fill(shares.cumsum(-1) - shares >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter(-1, order, ordered)

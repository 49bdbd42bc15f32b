"""Choosing pairs so that length says little about which answer is better.

Refinements are nearly always longer than drafts, and DPO learns length too. Three methods leave
pairs out until the mean of |chosen| - |rejected| is as near to zero as whole pairs allow.
"""

import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

from srt_cli.pairs.external_sort import ExternalSort

Balance = Literal["none", "margin", "subset", "matched"]
STEPS_A_DOUBLING: Final = 4
"""When pairs are matched, gaps within a factor of 2^(1/4) count as equal."""
GROUP_BYTES: Final = 2
_FIGURES: Final = struct.Struct("<qd")


class Shape(NamedTuple):
    """The figures of a pair that balancing looks at."""

    gap: int
    """Characters of the chosen answer minus those of the rejected one."""
    gain: float
    fingerprint: bytes


@dataclass(frozen=True)
class LengthCut:
    """Which pairs stay: in each group, those whose key comes after the group's cut."""

    method: Balance
    cuts: Mapping[bytes, bytes]
    before: int
    after: int
    margin: float | None = None
    """For `margin`: the gain, in points, that a pair needs per hundred characters."""

    def keeps(self, shape: Shape) -> bool:
        """Whether a pair stays."""
        if not shape.gap:
            return True
        group, key = _place(self.method, shape)
        return key > self.cuts.get(group, b"")


def balance_lengths(method: Balance, shapes: Iterable[Shape], folder: Path) -> LengthCut:
    """Decide which pairs stay, from the figures of all of them.

    `margin` leaves out those with the least gain per character of the gap (DICE, arXiv 2406.09760,
    subtracts a price for length from the reward). `subset` leaves out those with the largest gap,
    which costs the fewest pairs. `matched` keeps, among pairs of about the same gap, as many with
    the longer as with the shorter answer chosen, picked by their fingerprints. Too many pairs for
    memory are sorted in files in `folder`.
    """
    total = count = 0
    sizes: Counter[bytes] = Counter()
    with ExternalSort(folder) as placed:
        for shape in shapes:
            count += 1
            if shape.gap:
                total += shape.gap
                group, key = _place(method, shape)
                sizes[group] += 1
                placed.add(group + key + _FIGURES.pack(shape.gap, shape.gain))
        if method == "matched":
            cuts = _match(placed, sizes)
            left_out = sum(max(0, sizes[g] - sizes[_other_side(g)]) for g in sizes)
            return LengthCut(method, cuts, count, count - left_out)
        cuts, left_out, margin = _thin_out(placed, total)
        shown = margin if method == "margin" else None
        return LengthCut(method, cuts, count, count - left_out, shown)


def _thin_out(placed: ExternalSort, total: int) -> tuple[dict[bytes, bytes], int, float | None]:
    """Leave out pairs of the heavier side, in order, while the sum comes nearer to zero."""
    side = _side(total)
    cuts: dict[bytes, bytes] = {}
    left_out, margin = 0, None
    for entry in placed:
        group = entry[:GROUP_BYTES]
        if group[:1] != side:
            continue
        gap, gain = _FIGURES.unpack(entry[-_FIGURES.size :])
        if abs(total - gap) >= abs(total):
            break
        total -= gap
        left_out += 1
        cuts[group] = entry[GROUP_BYTES : -_FIGURES.size]
        margin = 100 * gain / abs(gap)
    return cuts, left_out, margin


def _match(placed: ExternalSort, sizes: Mapping[bytes, int]) -> dict[bytes, bytes]:
    """Cut each group down to the size of the group of the same gap on the other side."""
    cuts: dict[bytes, bytes] = {}
    seen: Counter[bytes] = Counter()
    for entry in placed:
        group = entry[:GROUP_BYTES]
        if seen[group] < sizes[group] - sizes.get(_other_side(group), 0):
            cuts[group] = entry[GROUP_BYTES : -_FIGURES.size]
        seen[group] += 1
    return cuts


def _place(method: Balance, shape: Shape) -> tuple[bytes, bytes]:
    """A pair's group and its key there; the pairs with the smallest keys are left out first."""
    size = abs(shape.gap)
    if method == "matched":
        step = round(STEPS_A_DOUBLING * math.log2(size))
        return _side(shape.gap) + bytes([min(step, 255)]), shape.fingerprint
    # Floats above zero are ordered as their bytes are, most significant first.
    order = shape.gain / size if method == "margin" else 1 / size
    return _side(shape.gap) + b" ", struct.pack(">d", order) + shape.fingerprint


def _side(gap: int) -> bytes:
    return b"+" if gap > 0 else b"-"


def _other_side(group: bytes) -> bytes:
    return (b"-" if group[:1] == b"+" else b"+") + group[1:]

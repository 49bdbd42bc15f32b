"""How alike a model's answers are to each other: different word pairs, and self-BLEU."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from srt_cli.stats.rates import Estimate, jackknife, mean_with_error, within

BLEU_ORDERS: Final = (1, 2, 3, 4)
SMOOTHING: Final = 0.1


def distinct_pairs(texts: Sequence[str]) -> Estimate | None:
    """Distinct-2 (Li et al. 2016): different word pairs over all word pairs of all texts.

    The error is the jackknife's over texts. None with fewer than two texts that hold a pair.
    """
    counts = [counted for text in texts if (counted := Counter(pairwise(text.lower().split())))]
    if len(counts) < 2:
        return None
    everywhere = Counter[tuple[str, str]]()
    for mine in counts:
        everywhere.update(mine)
    different, total = len(everywhere), everywhere.total()
    left_out = [
        (different - sum(everywhere[pair] == n for pair, n in mine.items()))
        / max(1, total - mine.total())
        for mine in counts
    ]
    return within(jackknife(different / total, left_out))


def diversity_change(before: Sequence[str], after: Sequence[str]) -> float | None:
    """Distinct-2 of `after` over that of `before`, answers to the same prompts, at equal length.

    Longer texts repeat more pairs by themselves, so both answers to a prompt are cut to as many
    words as the shorter one has. None where that leaves nothing to compare.
    """
    cut_before, cut_after = [], []
    for old, new in zip(before, after, strict=True):
        words = old.split(), new.split()
        shortest = min(map(len, words))
        cut_before.append(" ".join(words[0][:shortest]))
        cut_after.append(" ".join(words[1][:shortest]))
    base, now = distinct_pairs(cut_before), distinct_pairs(cut_after)
    return now.value / base.value if base is not None and now is not None else None


def self_bleu(texts: Sequence[str]) -> Estimate | None:
    """Mean BLEU-4 of each text against all others (Zhu et al. 2018): 1 is one text over and over.

    BLEU's clipped precisions and brevity penalty with the nearest length; an order without a match
    counts 0.1 (Chen and Cherry 2014, their first smoothing). Texts of fewer than four words fall
    out; None with fewer than two left.
    """
    words = [split for text in texts if len(split := text.lower().split()) >= max(BLEU_ORDERS)]
    if len(words) < 2:
        return None
    logs = [0.0] * len(words)
    for order in BLEU_ORDERS:
        grams = [
            Counter(tuple(text[place : place + order]) for place in range(len(text) - order + 1))
            for text in words
        ]
        most = _two_most(grams)
        for place, mine in enumerate(grams):
            matched = sum(
                min(count, most[gram][1] if count == most[gram][0] else most[gram][0])
                for gram, count in mine.items()
            )
            logs[place] += math.log((matched or SMOOTHING) / mine.total()) / len(BLEU_ORDERS)
    lengths = sorted(map(len, words))
    scores = [
        math.exp(log + _brevity(len(text), lengths)) for log, text in zip(logs, words, strict=True)
    ]
    found = mean_with_error(scores)
    return None if found is None else within(found)


def _two_most(
    grams: Sequence[Counter[tuple[str, ...]]],
) -> dict[tuple[str, ...], tuple[int, int]]:
    """For each run of words its highest and second-highest count in one text."""
    most: dict[tuple[str, ...], tuple[int, int]] = {}
    for mine in grams:
        for gram, count in mine.items():
            first, second = most.get(gram, (0, 0))
            most[gram] = (count, first) if count > first else (first, max(second, count))
    return most


def _brevity(length: int, lengths: Sequence[int]) -> float:
    """The logarithm of BLEU's brevity penalty against the nearest length among the others."""
    others = list(lengths)
    others.remove(length)
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return min(0.0, 1 - nearest / length)

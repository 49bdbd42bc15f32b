"""What critiques are like as texts: about this answer, or about any."""

import random
import re
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import combinations
from typing import Final

from srt_cli.stats.hygiene import ngrams
from srt_cli.stats.rates import Estimate, pass_rate

GROUNDING_NGRAM: Final = 4
SHORTEST_QUOTE: Final = 8
GENERIC_NGRAM: Final = 5
GENERIC_LIKENESS: Final = 0.5
MOST_COMPARED: Final = 1000
FEWEST_LETTER_BYTES: Final = 60


def is_grounded(weaknesses: str, response: str) -> bool:
    """Whether a critique takes up the answer: a quoted span of it, or four words in a row."""
    plain = " ".join(response.lower().split())
    quoted = re.findall(r"[\"“'‘`]([^\"”'’`]+)[\"”'’`]", weaknesses)
    spans = (" ".join(quote.lower().split()) for quote in quoted if len(quote) >= SHORTEST_QUOTE)
    if any(span in plain for span in spans):
        return True
    return bool(_ngrams(weaknesses, GROUNDING_NGRAM) & _ngrams(response, GROUNDING_NGRAM))


def same_language(critique: str, answer: str) -> bool | None:
    """Whether both are in one language (langid's classifier).

    None where a text is too short to tell, and without py3langid (`knows_languages`).
    """
    if not knows_languages():
        return None
    letters = ("".join(filter(str.isalpha, text)) for text in (critique, answer))
    if any(len(each.encode()) < FEWEST_LETTER_BYTES for each in letters):
        return None
    import py3langid

    return bool(py3langid.classify(critique)[0] == py3langid.classify(answer)[0])


def knows_languages() -> bool:
    """Whether py3langid is installed, without which languages cannot be told apart."""
    return find_spec("py3langid") is not None


def generic_share(critiques: Sequence[str], seed: int = 0) -> Estimate | None:
    """Share of critiques that another one shares half its 5-grams with (Jaccard >= 0.5).

    Over at most 1,000 of them, drawn with a seed, with Wilson's interval; None with fewer than two.
    """
    if len(critiques) < 2:
        return None
    chosen = list(critiques)
    if len(chosen) > MOST_COMPARED:
        chosen = random.Random(seed).sample(chosen, MOST_COMPARED)
    grams = [_ngrams(text, GENERIC_NGRAM) for text in chosen]
    generic: set[int] = set()
    for a, b in combinations(range(len(grams)), 2):
        if a in generic and b in generic:
            continue
        # The smaller set bounds the likeness, which spares most of the work.
        small, large = sorted((len(grams[a]), len(grams[b])))
        if not small or small < GENERIC_LIKENESS * large:
            continue
        shared = len(grams[a] & grams[b])
        if shared >= GENERIC_LIKENESS * (small + large - shared):
            generic |= {a, b}
    return pass_rate([place in generic for place in range(len(chosen))])


def _ngrams(text: str, size: int) -> set[tuple[str, ...]]:
    return set(ngrams(text.lower(), size))

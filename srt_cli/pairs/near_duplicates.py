"""Prompts that nearly repeat another one, found by MinHash (Broder 1997) without comparing all."""

from typing import Final

from srt_cli.stats.hygiene import words_of

PERMUTATIONS: Final = 128
RUN_OF_WORDS: Final = 3
SEED: Final = 42


class NearDuplicates:
    """An index of prompts; two are alike when they share enough runs of three words.

    The share is Jaccard's: runs in both over runs in either, estimated from 128 permutations
    (standard error at most 0.045). Memory grows by about 1.6 KB a prompt.
    """

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHashDeduplicator

        self._index = RMinHashDeduplicator(
            threshold=threshold, num_perm=PERMUTATIONS, use_lsh=True, seed=SEED
        )
        self._count = 0
        self._last: tuple[str, bool] | None = None

    def add(self, text: str) -> bool:
        """Take a prompt unless one like it was taken before; whether it was taken.

        The same text several times in a row counts as one prompt.
        """
        if self._last is not None and self._last[0] == text:
            return self._last[1]
        from rensa import RMinHash

        words = words_of(text.lower())
        runs = max(1, len(words) - RUN_OF_WORDS + 1)
        shingles = [" ".join(words[place : place + RUN_OF_WORDS]) for place in range(runs)]
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
        sketch.update(shingles)
        self._count += 1
        taken = bool(self._index.add(str(self._count), sketch))
        self._last = text, taken
        return taken

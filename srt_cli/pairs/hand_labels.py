"""Pairs judged by people: what the page saves, and how it is read again.

A label names its pair and the better text by digests, so that neither the page nor its answers tell
which text is the refinement, and nothing depends on which side a text was shown.
"""

from pathlib import Path

from srt_cli.errors import SrtError
from srt_cli.pairs.pairing import digest, fingerprint_of
from srt_cli.records import HandLabel, Preference
from srt_cli.runs.jsonl import read_records


def key_of(pair: Preference) -> str:
    """What stands for a pair in labels."""
    return fingerprint_of(pair).hex()


def text_key(text: str) -> str:
    """What stands for a text in labels."""
    return digest(text).hex()


class HandLabels:
    """The answers of one or several people; of the same pair several times, the mean counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._better: dict[bytes, list[str | None]] = {}
        for label in read_records(path, HandLabel.model_validate):
            self._better.setdefault(bytes.fromhex(label.pair), []).append(label.better)

    @property
    def fingerprints(self) -> frozenset[bytes]:
        """The pairs that were judged."""
        return frozenset(self._better)

    def preference(self, pair: Preference) -> float | None:
        """1 where the chosen answer was called better, 0 where the other was, 0.5 for neither."""
        values = {
            text_key(pair.chosen[0].content): 1.0,
            text_key(pair.rejected[0].content): 0.0,
            None: 0.5,
        }
        given = self._better.get(fingerprint_of(pair), [])
        if any(better not in values for better in given):
            raise SrtError(
                f"{self.path}: the label of pair {key_of(pair)} names neither of its texts. "
                "Was this file saved by the page that --label-page wrote?"
            )
        return sum(values[better] for better in given) / len(given) if given else None

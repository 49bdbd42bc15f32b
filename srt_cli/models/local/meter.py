"""What generation in this process came to, for the manifest."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

ADDED: Final = ("completion_tokens", "batches", "halved_for_memory")


@dataclass
class Throughput:
    """Tokens written, the time they took, and how batches fared."""

    tokens: int = 0
    seconds: float = 0.0
    batches: int = 0
    largest_batch: int = 0
    halvings: int = 0

    @contextmanager
    def timing(self, rows: int, *, batches: int = 1) -> Iterator[None]:
        """Count a batch and the seconds it takes, also when it fails.

        A continuous engine has none: rows come and go.
        """
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started
            self.batches += batches
            self.largest_batch = max(self.largest_batch, rows)

    def describe(self) -> dict[str, float | int]:
        """The manifest's form."""
        per_second = round(self.tokens / self.seconds, 1) if self.seconds else 0.0
        return {
            "completion_tokens": self.tokens,
            "tokens_per_second": per_second,
            **({"batches": self.batches} if self.batches else {}),
            "largest_batch": self.largest_batch,
            "halved_for_memory": self.halvings,
        }


def together(described: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """One description of a model that was open in several processes for so long."""
    whole: dict[str, Any] = {}
    for one in described:
        whole |= one
    if "completion_tokens" in whole:
        added = [name for name in ADDED if name in whole]
        whole |= {name: sum(one.get(name, 0) for one in described) for name in added}
        whole["largest_batch"] = max(one["largest_batch"] for one in described)
        whole["tokens_per_second"] = round(whole["completion_tokens"] / max(seconds, 1e-3), 1)
    return whole

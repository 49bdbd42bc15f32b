"""What generation in this process came to, for the manifest."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Meter:
    """Tokens written, the time they took, and how batches fared."""

    tokens: int = 0
    seconds: float = 0.0
    batches: int = 0
    largest_batch: int = 0
    halvings: int = 0

    @contextmanager
    def timing(self, rows: int) -> Iterator[None]:
        """Count a batch and the seconds it takes, also when it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started
            self.batches += 1
            self.largest_batch = max(self.largest_batch, rows)

    def describe(self) -> dict[str, float | int]:
        """The manifest's form."""
        per_second = round(self.tokens / self.seconds, 1) if self.seconds else 0.0
        return {
            "completion_tokens": self.tokens,
            "tokens_per_second": per_second,
            "batches": self.batches,
            "largest_batch": self.largest_batch,
            "halved_for_memory": self.halvings,
        }

"""The order in which rows are trained: random, with rows of like length in one forward pass."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from torch.utils.data import Sampler

from srt_cli.training.meter import MeteredTrainer

PASSES_A_POOL = 16


class LengthGroupedOrder(Sampler[int]):
    """Indices such that each run of `micro_batch` has like lengths, which saves padding.

    The order of an epoch follows from seed and epoch alone, so that a resumed run repeats it;
    transformers' own grouping draws from the global generator and does not.
    """

    def __init__(self, lengths: Sequence[int], micro_batch: int, seed: int) -> None:
        self._lengths = lengths
        self._micro_batch = micro_batch
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed}/{self._epoch}")
        indices = list(range(len(self._lengths)))
        draw.shuffle(indices)
        pool = self._micro_batch * PASSES_A_POOL
        passes = []
        for start in range(0, len(indices), pool):
            chunk = sorted(indices[start : start + pool], key=self._lengths.__getitem__)
            passes += [
                chunk[place : place + self._micro_batch]
                for place in range(0, len(chunk), self._micro_batch)
            ]
        # A short pass stays last: the trainer cuts the flat order into passes again.
        whole = [each for each in passes if len(each) == self._micro_batch]
        rest = [each for each in passes if len(each) < self._micro_batch]
        draw.shuffle(whole)
        return iter([index for each in whole + rest for index in each])


class OrderedTrainer(MeteredTrainer):
    """A trainer that takes rows in the order it is given, which puts those of like length together."""

    def __init__(self, *, order: LengthGroupedOrder, **arguments: Any) -> None:
        self._order = order
        super().__init__(**arguments)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthGroupedOrder:
        return self._order

"""From rows to forward passes: their order, packing, and the copy on disk that all processes read.

Packing puts several rows into one, without padding. Position ids tell them apart: from
these transformers builds a block-diagonal attention mask (flash attention needs none). So a packed
row has the same loss as the row alone.
"""

import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from datasets import Dataset, Features, Value, load_from_disk
from datasets import Sequence as ListOf
from torch.utils.data import Sampler
from trl import pack_dataset

from srt_cli.errors import UsageError
from srt_cli.training.memory import LargestPass
from srt_cli.training.options import PackingChoice
from srt_cli.training.setup import CHECKPOINTS, Setup

TOKEN_ID: Final = "int32"
PASSES_A_POOL: Final = 16
PADDING_TO_PACK_AT: Final = 0.1
"""Packs cost the square of their length without flash attention, so padding must cost more."""

Columns = Mapping[str, list[list[int]]]
"""Token ids of all rows, under TRL's names."""


# --- Order -------------------------------------------------------------------------------------


class LengthGroupedOrder(Sampler[int]):
    """Random indices such that each run of `micro_batch` has like lengths, which saves padding.

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


# --- Packing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """Whether rows are packed, and why; for the terminal and the manifest."""

    on: bool
    reason: str

    def sentence(self) -> str:
        """For the terminal."""
        return f"rows are {'' if self.on else 'not '}packed: {self.reason}"


def decide_packing(choice: PackingChoice, lengths: Sequence[int], setup: Setup) -> Packing:
    """Apply `--packing`; auto packs where attention skips other rows, or padding would cost more.

    Raises `UsageError` for bfd with a model whose rows cannot be parted within a pack.
    """
    if setup.carries_state:
        why = "this model would carry its state from one row of a pack into the next"
        if choice == "bfd":
            raise UsageError(f"--packing bfd: {why}. Leave it out.")
        return Packing(False, why)
    if choice != "auto":
        return Packing(choice == "bfd", f"--packing {choice}")
    if setup.place.attention == "flash_attention_2":
        return Packing(True, "flash attention computes each row of a pack apart")
    padding = _padding_share(lengths, setup.micro_batch, setup.options.seed)
    found = f"rows of like length share a pass, and {padding:.0%} of its tokens are padding"
    if padding > PADDING_TO_PACK_AT:
        return Packing(True, f"although {found}")
    return Packing(False, found)


def _padding_share(lengths: Sequence[int], micro_batch: int, seed: int) -> float:
    """The share of padding among the tokens of an epoch's forward passes, without packing."""
    order = [lengths[index] for index in LengthGroupedOrder(lengths, micro_batch, seed)]
    passes = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
    return 1 - sum(lengths) / sum(len(each) * max(each) for each in passes)


def pack_length(lengths: Sequence[int], micro_batch: int) -> int:
    """Tokens of a pack: those of `micro_batch` average rows, so that it costs the same memory.

    At least the longest row's: no row is ever cut.
    """
    mean = sum(lengths) / len(lengths)
    return max(max(lengths), round(micro_batch * mean))


def pack(columns: Columns, tokens: int) -> dict[str, list[list[int]]]:
    """Pack rows, best fit decreasing; `seq_lengths` tells them apart again."""
    packed = pack_dataset(Dataset.from_dict(dict(columns)), seq_length=tokens, strategy="bfd")
    return {name: packed[name][:] for name in (*columns, "seq_lengths")}


def packs_a_step(rows: int, packs: int, global_batch: int, processes: int) -> int:
    """Packs per process and step, so that a step has about `global_batch` rows over all processes."""
    return max(1, round(global_batch * packs / rows / processes))


def largest_pass(lengths: Sequence[int], packing: Packing, setup: Setup) -> LargestPass:
    """The largest forward pass over rows of these lengths, and how many make a step."""
    if not packing.on:
        return LargestPass(setup.micro_batch, max(lengths), setup.accumulation)
    tokens = pack_length(lengths, setup.micro_batch)
    packs = -(-sum(lengths) // tokens)
    step = packs_a_step(len(lengths), packs, setup.values.global_batch, setup.processes)
    return LargestPass(1, tokens, step)


# --- On disk -----------------------------------------------------------------------------------


def keep_rows(columns: Columns, out: Path) -> Dataset:
    """Columns of token ids as a data set on disk, beside the checkpoints and deleted with them.

    The main process makes them once, and every process maps them into memory. Rows of the same
    content are found again, with what TRL caches beside them: a resumed dpo need not recompute the
    log-probs of the reference.
    """
    features = Features({name: ListOf(Value(TOKEN_ID)) for name in columns})
    made = Dataset.from_dict(dict(columns), features=features)
    folder = out / CHECKPOINTS / f"rows-{made._fingerprint}"
    if not folder.is_dir():
        half = folder.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        made.save_to_disk(half)
        os.replace(half, folder)
    kept = load_from_disk(str(folder))
    assert isinstance(kept, Dataset)
    return kept

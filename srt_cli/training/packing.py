"""Packing: several rows in one forward pass without padding, each of them seeing only itself.

Rows of a pack are told apart by their position ids, from which transformers builds an attention mask
of separate blocks (flash attention, the blocks themselves). So a packed row's loss is that of the
row alone.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Final, Literal

from datasets import Dataset
from trl import pack_dataset

from srt_cli.training.memory import Batch
from srt_cli.training.order import LengthGroupedOrder
from srt_cli.training.setup import Setup

PackingChoice = Literal["auto", "bfd", "off"]
PADDING_TO_PACK_AT: Final = 0.1
"""Without flash attention a pack's attention costs the square of its length; padding must cost more."""


@dataclass(frozen=True)
class Packing:
    """Whether rows are packed, and why; for the terminal and the manifest."""

    on: bool
    reason: str


def decide_packing(choice: PackingChoice, lengths: SequenceOf[int], setup: Setup) -> Packing:
    """`--packing`; auto packs where attention skips what lies between rows, or padding costs more."""
    if choice != "auto":
        return Packing(choice == "bfd", f"--packing {choice}")
    if setup.place.attention == "flash_attention_2":
        return Packing(True, "flash attention computes each row of a pack apart")
    padding = padding_share(lengths, setup.micro_batch, setup.seed)
    found = f"rows of like length share a pass, and {padding:.0%} of its tokens are padding"
    if padding > PADDING_TO_PACK_AT:
        return Packing(True, f"although {found}")
    return Packing(False, found)


def padding_share(lengths: SequenceOf[int], micro_batch: int, seed: int) -> float:
    """The share of padding among the tokens of an epoch's forward passes, without packing."""
    computed = sum(
        len(lengths_of) * max(lengths_of) for lengths_of in passes(lengths, micro_batch, seed)
    )
    return 1 - sum(lengths) / computed


def passes(lengths: SequenceOf[int], micro_batch: int, seed: int) -> list[list[int]]:
    """The lengths of the rows in each forward pass of the first epoch."""
    order = [lengths[index] for index in LengthGroupedOrder(lengths, micro_batch, seed)]
    return [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]


def pack_length(lengths: SequenceOf[int], micro_batch: int) -> int:
    """Tokens of a pack: those of `micro_batch` average rows, so that it costs the same memory.

    At least the longest row's: no row is ever cut.
    """
    mean = sum(lengths) / len(lengths)
    return max(max(lengths), round(micro_batch * mean))


def pack(columns: dict[str, list[list[int]]], tokens: int) -> dict[str, list[list[int]]]:
    """Rows put together, best fit first; `seq_lengths` tells them apart again."""
    packed = pack_dataset(Dataset.from_dict(columns), seq_length=tokens, strategy="bfd")
    return {name: packed[name][:] for name in (*columns, "seq_lengths")}


def packs_a_step(rows: int, packs: int, global_batch: int, processes: int) -> int:
    """Packs a process takes a step, so that a step has about `global_batch` rows over all of them."""
    return max(1, round(global_batch * packs / rows / processes))


def sft_passes(lengths: SequenceOf[int], packing: Packing, setup: Setup) -> tuple[Batch, int]:
    """The largest forward pass, and how many of them a process makes a step."""
    if not packing.on:
        return Batch(setup.micro_batch, max(lengths)), setup.accumulation
    tokens = pack_length(lengths, setup.micro_batch)
    packs = -(-sum(lengths) // tokens)
    return Batch(1, tokens), packs_a_step(
        len(lengths), packs, setup.values.global_batch, setup.processes
    )

"""Does a training fit the device, and must it compute activations twice so that it does?"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from srt_cli.training.memory import Batch, Memory, estimate_memory
from srt_cli.training.place import sharding
from srt_cli.training.setup import Setup

SAFE_SHARE: Final = 0.9
"""Of what is free on a device; the rest is for fragments and the libraries' own buffers."""
GIB: Final = 2**30


@dataclass(frozen=True)
class Fit:
    """What a step needs, what there is, and what was decided."""

    memory: Memory | None
    """Null when the model's configuration is not at hand, or cannot be run without data."""
    available: int | None
    """Bytes free for one process; null where the system does not say."""
    setup: Setup
    """With activation checkpointing as decided."""

    @property
    def fits(self) -> bool:
        """Whether the step fits; also true where it cannot be known."""
        if self.memory is None or self.available is None:
            return True
        return self.memory.total <= SAFE_SHARE * self.available


def fit(setup: Setup, name: str, batch: Batch, passes_a_step: int, *, four_bit: bool) -> Fit:
    """Estimate a step's memory; checkpoint activations only if it would not fit without."""
    available = available_memory(setup)
    plain = _estimate(setup, name, batch, passes_a_step, four_bit, checkpointing=False)
    if plain is None:
        on_gpu = setup.place.placement.device == "cuda"
        return _decided(setup, None, available, on_gpu, "what a step needs is not known beforehand")
    if available is None:
        reason = f"a step needs {plain.total / GIB:.1f} GiB, and how much is free is not known"
        return _decided(setup, plain, available, False, reason)
    needs = (
        f"a step needs {plain.total / GIB:.1f} GiB without it, and {available / GIB:.1f} are free"
    )
    if plain.total <= SAFE_SHARE * available:
        return _decided(setup, plain, available, False, needs)
    saving = _estimate(setup, name, batch, passes_a_step, four_bit, checkpointing=True)
    return _decided(setup, saving, available, True, needs)


def available_memory(setup: Setup) -> int | None:
    """Bytes free for one process on its device; null where the system does not say."""
    if setup.place.placement.device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        if "SC_PHYS_PAGES" not in os.sysconf_names:
            return None
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // setup.processes


def _estimate(
    setup: Setup, name: str, batch: Batch, passes: int, four_bit: bool, *, checkpointing: bool
) -> Memory | None:
    memory = estimate_memory(
        name,
        setup.place,
        setup.adapters,
        batch,
        four_bit=four_bit,
        accumulates=passes > 1,
        live_reference=setup.fields.get("precompute_ref_log_probs") is False
        and setup.adapters is None,
        optimizer=str(setup.fields.get("optim", "adamw_torch_fused")),
        checkpointing=checkpointing,
    )
    if memory is None or sharding() is None:
        return memory
    # FSDP and ZeRO spread everything but the activations over the processes.
    shards = setup.processes
    return replace(
        memory,
        weights=memory.weights // shards,
        gradients=memory.gradients // shards,
        optimizer=memory.optimizer // shards,
        reference=memory.reference // shards,
    )


def _decided(
    setup: Setup, memory: Memory | None, available: int | None, checkpointing: bool, reason: str
) -> Fit:
    place = replace(setup.place, checkpointing=checkpointing, checkpointing_reason=reason)
    return Fit(memory, available, replace(setup, place=place))

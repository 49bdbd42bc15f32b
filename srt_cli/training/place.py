"""Where a training computes, and in which number formats, with the reason."""

from dataclasses import dataclass
from typing import Any

import torch

from srt_cli.models.weights import Placement, decide_placement


@dataclass(frozen=True)
class TrainingPlace:
    """Where and how a training computes, with the reason; for the manifest."""

    placement: Placement
    bf16: bool

    def describe(self) -> dict[str, Any]:
        """Device, weights' dtype, autocast, and why."""
        return self.placement.describe() | {"bf16_autocast": self.bf16}


def decide_training_place() -> TrainingPlace:
    """Full precision master weights everywhere; bfloat16 autocast where the device computes it."""
    found = decide_placement()
    bf16 = found.dtype == torch.bfloat16
    reason = f"{found.reason}; weights stay float32 while they are trained"
    return TrainingPlace(Placement(found.device, torch.float32, reason), bf16)

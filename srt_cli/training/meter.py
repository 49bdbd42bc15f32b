"""How fast a training is: tokens, trained tokens and seconds of each step, and the peak's share."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Trainer

from srt_cli.training.setup import TrainingPlace

# Multiply-adds count twice; forward 2, and backward 2 for the activations and 2 for the weights.
FLOPS_A_PARAMETER: Final = 6
FLOPS_A_PARAMETER_OF_A_FROZEN_BASE: Final = 4


@dataclass
class TokenMeter:
    """Counts tokens over all processes; its clock stands still while nothing is trained."""

    flops_a_token: float = 0.0
    peak_flops: float | None = None
    """Of all devices together; None where it is not known (and on every CPU)."""
    _counts: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.long))
    _started: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        """Forget the time since the last reading: an evaluation, samples, a checkpoint."""
        self._started = time.monotonic()

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Take note of a forward pass's batch."""
        counts = count_tokens(inputs)
        self._counts = self._counts.to(counts.device) + counts

    def read(self, trainer: Trainer) -> dict[str, float]:
        """The figures since the last reading, under their names in `metrics.jsonl`."""
        counts: Any = self._counts.to(trainer.accelerator.device)
        tokens, trained = trainer.accelerator.reduce(counts, reduction="sum").tolist()
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        self._counts, self._started = torch.zeros_like(self._counts), now
        figures = {
            "tokens": tokens,
            "trained_tokens": trained,
            "seconds": round(seconds, 6),
            "tokens_per_second": round(tokens / seconds, 3),
        }
        share = mfu(tokens / seconds, self.flops_a_token, self.peak_flops)
        return figures if share is None else figures | {"mfu": round(share, 4)}


def count_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens and trained tokens of a batch of TRL's SFT or DPO collator, padding left out."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    tokens = mask.sum() if mask is not None else torch.tensor(ids.numel(), device=ids.device)
    if "completion_mask" in inputs:
        trained = inputs["completion_mask"].sum()
    else:
        trained = (inputs["labels"][..., 1:] != -100).sum()
    return torch.stack([tokens, trained]).long()


def meter_for(model: Any, place: TrainingPlace, processes: int, *, base_frozen: bool) -> TokenMeter:
    """A meter that knows what the model costs a token and what the devices can do."""
    factor = FLOPS_A_PARAMETER_OF_A_FROZEN_BASE if base_frozen else FLOPS_A_PARAMETER
    peak = _peak_flops(place)
    return TokenMeter(
        flops_a_token=float(factor * model.num_parameters()),
        peak_flops=None if peak is None else peak * processes,
    )


def _peak_flops(place: TrainingPlace) -> float | None:
    if place.placement.device != "cuda":
        return None
    try:  # TRL's own table of devices; not part of its public interface
        from trl.trainer.utils import get_peak_flops
    except ImportError:
        return None
    dtype = "bfloat16" if place.bf16 else "float32"
    found: float | None = get_peak_flops(torch.cuda.get_device_name(), dtype)
    return found


def mfu(tokens_per_second: float, flops_a_token: float, peak_flops: float | None) -> float | None:
    """Model FLOPs utilisation: the model's floating point work a second over the devices' peak."""
    return None if not peak_flops else tokens_per_second * flops_a_token / peak_flops


def throughput(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures of a whole training from its metrics: sums, and rates over the sums."""
    steps = [row for row in rows if row.get("seconds")]
    total = {
        name: sum(float(row[name]) for row in steps)
        for name in ("tokens", "trained_tokens", "seconds")
    }
    if not steps:
        return {}
    found = {
        "tokens": int(total["tokens"]),
        "trained_tokens": int(total["trained_tokens"]),
        "tokens_per_second": total["tokens"] / total["seconds"],
        "trained_tokens_per_second": total["trained_tokens"] / total["seconds"],
    }
    if all("mfu" in row for row in steps):
        # Weighted by time: the work done over the work that could have been done.
        found["mfu"] = sum(row["mfu"] * row["seconds"] for row in steps) / total["seconds"]
    return found

"""What DPO optimises, and what its loss must be before the first step."""

import math
from dataclasses import dataclass
from typing import Any, Final

from srt_cli.errors import UsageError
from srt_cli.training.options import LossType

SMOOTHED: Final[tuple[LossType, ...]] = ("robust", "exo_pair", "aot", "aot_unpaired")
"""The losses in which TRL uses `label_smoothing`; in the others it does nothing."""


@dataclass(frozen=True)
class Objective:
    """A preference loss and what is added to it; names as in TRL's `DPOConfig`."""

    loss_type: LossType
    beta: float
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    """Weight of the mean negative log-likelihood of the chosen answers (RPO)."""
    ld_alpha: float | None = None
    """Weight of the tokens behind the shorter answer's length (LD-DPO, arXiv 2409.06411)."""

    def arguments(self) -> dict[str, Any]:
        """For `DPOConfig`."""
        with_nll = self.nll_weight > 0
        return {
            "beta": self.beta,
            "loss_type": [self.loss_type, *(["sft"] if with_nll else [])],
            "loss_weights": [1.0, *([self.nll_weight] if with_nll else [])],
            "label_smoothing": self.label_smoothing,
            "ld_alpha": self.ld_alpha,
        }

    def first_loss(self) -> float | None:
        """The loss where policy and reference agree; null where it also depends on the answers."""
        if self.nll_weight > 0:
            return None
        ln_2, beta, smoothing = math.log(2), self.beta, self.label_smoothing
        match self.loss_type:
            case "sigmoid" | "sigmoid_norm" | "robust" | "aot" | "aot_unpaired":
                return ln_2
            case "hinge" | "apo_zero" | "apo_down":
                return 1.0
            case "ipo":
                return (1 / (2 * beta)) ** 2
            case "exo_pair":
                return -ln_2 - 0.5 * math.log(smoothing * (1 - smoothing))
            case "nca_pair" | "bco_pair":
                return 2 * ln_2
            case "sppo_hard":
                return 2 * (0.5 / beta) ** 2
            case "discopop":
                return 0.5 * ln_2 + 0.5


def refuse_idle_smoothing(loss_type: LossType, given: bool, share: float) -> None:
    """Raise `UsageError` where label smoothing would do nothing, or would be needed and is not given."""
    if given and loss_type not in SMOOTHED:
        raise UsageError(
            f"--label-smoothing does nothing under --loss-type {loss_type}. "
            "Pass --loss-type robust."
        )
    if loss_type == "exo_pair" and not share:
        raise UsageError("--loss-type exo_pair needs a --label-smoothing above 0, such as 0.001.")

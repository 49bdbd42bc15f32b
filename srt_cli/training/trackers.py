"""Trackers that the metrics also go to: transformers' own integrations, only when asked for."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback

from srt_cli.errors import SrtError

# Any one of these serves; the first is in the extra of the tracker's name.
PACKAGES: Final = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
EVENTS: Final = "tensorboard"
PROJECT: Final = "srt"


def check_trackers(names: Sequence[str]) -> None:
    """Raise `SrtError` for a tracker whose package is not installed."""
    for name in names:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise SrtError(
                f"--report-to {name} needs the package {PACKAGES[name][0]}: "
                f"pip install 'srt-cli[{name}]'."
            )


def tracker_arguments(names: Sequence[str], out: Path) -> dict[str, Any]:
    """For TRL's configs; without a name nothing is reported to anyone."""
    if not names:
        return {"report_to": "none"}
    return {"report_to": list(names), "run_name": str(out), "project": PROJECT}


def keep_events_beside(trainer: Trainer, out: Path) -> None:
    """TensorBoard's files would stand among the checkpoints, and go with them."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(out / EVENTS)

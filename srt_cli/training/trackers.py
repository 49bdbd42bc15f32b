"""Trackers that the metrics also go to: transformers' own integrations, only when asked for."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def tracking(names: Sequence[str], out: Path) -> Iterator[None]:
    """Open what needs an account before the first step, and close it; trackers talk on stderr.

    Raises `SrtError` when Weights & Biases will not take the run.
    """
    if not names:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        finish = _open_wandb(out) if "wandb" in names else None
        failed = True
        try:
            yield
            failed = False
        finally:
            if finish is not None:
                finish(exit_code=int(failed))


def _open_wandb(out: Path) -> Any:
    """Begin the run that transformers' integration will find; gives what ends it."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    try:
        # The integration itself would take the project huggingface.
        wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=str(out))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise SrtError(
            f"--report-to wandb: {reason}. To keep the run on this machine instead, set "
            "WANDB_MODE=offline."
        ) from error
    return wandb.finish

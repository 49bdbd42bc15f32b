"""Checkpoints: which one a training goes on from, and when it may not."""

import shutil
from pathlib import Path
from typing import Final

from srt_cli.artifacts import InputFile, Manifest, Run
from srt_cli.errors import SrtError
from srt_cli.training.arguments import CHECKPOINTS

WHOLE_MARKER: Final = "whole"


def mark_whole(out: Path, step: int) -> None:
    """Written last: a checkpoint without it was cut off and is never resumed from."""
    (out / CHECKPOINTS / f"checkpoint-{step}" / WHOLE_MARKER).touch()


def newest_checkpoint(out: Path) -> tuple[Path | None, int]:
    """The newest whole checkpoint and its step; (null, 0) when there is none."""
    whole = [marker.parent for marker in (out / CHECKPOINTS).glob(f"checkpoint-*/{WHOLE_MARKER}")]
    steps = {int(path.name.rpartition("-")[2]): path for path in whole}
    return (steps[max(steps)], max(steps)) if steps else (None, 0)


def clear_checkpoints(out: Path) -> None:
    """Take the checkpoints of a finished training away."""
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def refuse_changed_inputs(run: Run) -> None:
    """A model half or wholly trained on other data or templates is not continued on these."""
    if run.earlier is None:
        return
    changed = _changed_inputs(run.earlier, run.manifest)
    if changed:
        raise SrtError(
            f"{run.out}: was trained on another {' and '.join(changed)}. "
            "Choose another --out, or start anew with --overwrite."
        )


def _changed_inputs(earlier: Manifest, now: Manifest) -> list[str]:
    changed = []
    for name, file in now.inputs.items():
        before = earlier.inputs.get(name, InputFile(path=file.path))
        if before.sha256 is not None and before.sha256 != file.sha256:
            changed.append(f"{file.path} (its content has changed)")
    if earlier.templates != now.templates:
        changed.append("set of templates")
    return changed

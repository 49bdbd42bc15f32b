"""Which run and checkpoint a training resumes from, and when it must not."""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import orjson
from safetensors import SafetensorError, safe_open

from srt_cli import console
from srt_cli.errors import SrtError, UsageError
from srt_cli.models.weights import ADAPTER_CONFIG
from srt_cli.runs.jsonl import write_json
from srt_cli.runs.run import (
    InputFile,
    Manifest,
    Run,
    clear_directory,
    open_run,
    template_input,
)
from srt_cli.training.setup import CHECKPOINTS, Setup, Training, chat_of, refuse_lost_start

WHOLE_MARKER: Final = "whole"
NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_training(setup: Setup, inputs: Mapping[str, Path], resolved: Mapping[str, Any]) -> Run:
    """Begin or continue the run that trains into `--out`.

    `resolved` are settings that the command line left open. Raises `SrtError` when the model there
    was trained with other settings, data or templates. A dry run touches nothing.
    """
    options = setup.options
    start = Path(setup.model)
    if start.exists() and options.out.resolve() == start.resolve():
        raise UsageError(
            f"--out {options.out}: is the model that training starts from. Choose another --out."
        )
    run = open_run(
        setup.stage,
        options,
        inputs=dict(inputs) | template_input(options.chat_template),
        directory=True,
        resolved={"model": setup.model} | setup.values.settings(setup.stage) | dict(resolved),
    )
    if not run.complete:  # a refusal leaves nothing behind, and costs no model
        refuse_lost_start(setup)
        if not options.dry_run:
            chat_of(setup, None).check()
    if options.overwrite and not options.dry_run:
        run.refuse_another()
        clear_directory(options.out)
    if run.earlier is not None:  # how it computes is kept, whenever this run is killed
        run.describe_models(run.earlier.models)
    _refuse_changed_inputs(run)
    if run.complete:
        _refuse_lost_model(setup)
        console.say("trained already under these settings; nothing to do")
    return run


def _refuse_lost_model(setup: Setup) -> None:
    """Raise `SrtError` where a training has finished, and its model is not whole any more."""
    out, options = setup.options.out, setup.options
    alone = options.method != "full" and not options.merge
    index = out / "model.safetensors.index.json"
    weights = ["adapter_model.safetensors" if alone else "model.safetensors"]
    if index.is_file():
        weights = sorted(set(orjson.loads(index.read_bytes())["weight_map"].values()))
    whole = [ADAPTER_CONFIG if alone else "config.json", "tokenizer_config.json", *weights]
    lost = [f"{name} is not there" for name in whole if not (out / name).is_file()]
    for name in weights:
        try:
            with safe_open(out / name, "pt"):
                pass
        except FileNotFoundError:
            continue
        except SafetensorError:
            lost.append(f"{name} is damaged")
    if lost:
        raise SrtError(
            f"{out}: its training has finished, but {lost[0]}. Put the file back, or train "
            "again with --overwrite."
        )


def _refuse_changed_inputs(run: Run) -> None:
    """Refuse to continue a model that was trained on other data or templates."""
    if run.earlier is None:
        return
    changed = _changed_inputs(run.earlier, run.manifest)
    if changed:
        raise SrtError(
            f"{run.out}: was trained on another {' and '.join(changed)}. "
            "Choose another --out, or start over with --overwrite."
        )


def _changed_inputs(earlier: Manifest, now: Manifest) -> list[str]:
    changed = []
    for name, file in now.inputs.items():
        before = earlier.inputs.get(name, InputFile(path=file.path))
        if before.sha256 is not None and before.sha256 != file.sha256:
            changed.append(f"{file.path} (its content has changed)")
    if not now.says_the_same(earlier):
        changed.append("set of templates")
    return changed


def fingerprint(training: Training) -> dict[str, Any]:
    """What must match for a checkpoint to be resumed: settings, data, templates, and the batches.

    It stands in the checkpoint itself, because a `run.json` can be edited or lost.
    """
    manifest, setup = training.run.manifest, training.setup
    return {
        "settings": manifest.settings,
        "data": {name: file.sha256 for name, file in manifest.inputs.items()},
        "templates": manifest.templates,
        "place": {
            "rows a forward pass": setup.micro_batch,
            "processes": setup.processes,
            "packing": training.packed,
            "bf16": setup.place.bf16,
        },
    }


def mark_whole(out: Path, step: int, mark: Mapping[str, Any]) -> None:
    """Write the mark, last: a checkpoint without it was cut off and is never resumed."""
    write_json(out / CHECKPOINTS / f"checkpoint-{step}" / WHOLE_MARKER, mark)


def newest_checkpoint(out: Path) -> tuple[Path | None, int]:
    """The newest whole checkpoint and its step; (None, 0) when there is none."""
    whole = [marker.parent for marker in (out / CHECKPOINTS).glob(f"checkpoint-*/{WHOLE_MARKER}")]
    steps = {int(path.name.rpartition("-")[2]): path for path in whole}
    return (steps[max(steps)], max(steps)) if steps else (None, 0)


def refuse_other_training(checkpoint: Path, now: Mapping[str, Any]) -> None:
    """Raise `SrtError` when a checkpoint was made with other settings or data, naming them."""
    try:
        then = orjson.loads((checkpoint / WHOLE_MARKER).read_bytes())
    except orjson.JSONDecodeError:
        raise SrtError(
            f"{checkpoint}: does not say how it was made. Start over with --overwrite."
        ) from None
    differing = [
        f"{_named(kind, name)} was {was!r}, now {value!r}"
        for kind, values in now.items()
        for name, value in values.items()
        # A setting that did not exist then has been compared with its default by the run.
        # One that took a single value then may be a list of it.
        if (was := then.get(kind, {}).get(name, value if kind == "settings" else None)) != value
        and [was] != value
    ]
    if differing:
        raise SrtError(
            f"{checkpoint}: is of another training ({'; '.join(differing)}). "
            "Choose another --out, or start over with --overwrite."
        )


def _named(kind: str, name: str) -> str:
    if kind == "settings":
        return "--" + name.replace("_", "-")
    return {"data": f"the digest of --{name}", "templates": f"template {name}"}.get(kind, name)


def take_away_torn(out: Path) -> None:
    """Delete checkpoints that were cut off: on a full disk they leave no room for the next one."""
    for directory in (out / CHECKPOINTS).glob("checkpoint-*"):
        if not (directory / WHOLE_MARKER).exists():
            shutil.rmtree(directory, ignore_errors=True)


def clear_checkpoints(out: Path) -> None:
    """Delete the checkpoints of a finished training."""
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


@contextmanager
def full_disk_in_one_sentence(run: Run) -> Iterator[None]:
    """Turn a full disk into an `SrtError` that says where the same line will resume."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _says_disk_is_full(error):
            raise
        take_away_torn(run.out)
        _, step = newest_checkpoint(run.out)
        again = f"go on from step {step}" if step else "start again"
        raise SrtError(
            f"{run.out}: cannot be written, the disk is full. Free some space and run the same line "
            f"again: it will {again}."
        ) from error


def _says_disk_is_full(error: BaseException) -> bool:
    """Also recognises what safetensors and torch turn the `OSError` into."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return True
    text = str(error).lower()
    words = (
        "no space left", "file too large", "quota exceeded",
        "pytorchstreamwriter", "inline_container", "unexpected pos",
    )  # fmt: skip
    return any(word in text for word in words)

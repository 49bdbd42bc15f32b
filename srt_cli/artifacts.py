"""JSONL in and out, and the run around it: manifest, continuing, refusing, never overwriting."""

import contextlib
import gzip
import hashlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import srt_cli
from srt_cli import console
from srt_cli.errors import BudgetReached, QuotaError, SrtError, UsageError
from srt_cli.journal import Journal
from srt_cli.options import differing_settings, values_of
from srt_cli.records import Dropped, Record, Usage
from srt_cli.templates import template_digests

Row = TypeVar("Row")
RunStatus = Literal["started", "complete", "interrupted", "failed"]

DATA_SUFFIXES: Final = (".jsonl", ".json", ".jsonl.gz")
REPORTED_PACKAGES: Final = (
    "torch", "transformers", "trl", "accelerate", "peft", "datasets", "openai", "pydantic",
)  # fmt: skip


# --- JSONL -------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file, a `.gz` of one, or stdin (`-`).

    Raises `SrtError` naming file and line for what is not UTF-8, not JSON, or not an object.
    """
    if path.is_dir():
        raise SrtError(f"{path}: is a directory, where a JSONL file is expected.")
    try:
        with _open_lines(path) as lines:
            yield from _parse_lines(path, lines)
    except FileNotFoundError:
        raise SrtError(f"{path}: no such file.{_hint_for_missing(path)}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SrtError(f"{path}: not a readable gzip file ({error}).") from error


def _open_lines(path: Path) -> contextlib.AbstractContextManager[Iterable[bytes]]:
    if str(path) == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _parse_lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    empty = True
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        empty = False
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise SrtError(f"{path}:{number}: {_why_not_json(line, error)}") from None
        if not isinstance(row, dict):
            hint = " This is a JSON array: write one record a line (jq -c '.[]')."
            raise SrtError(
                f"{path}:{number}: not a JSON object.{hint if isinstance(row, list) else ''}"
            )
        yield number, row
    if empty:
        raise SrtError(f"{path}: the file is empty. It needs one JSON record a line.")


def _why_not_json(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as decoding:
        return f"not UTF-8 (byte {decoding.start + 1}). Convert it: iconv -f LATIN1 -t UTF-8."
    if text.strip() in ("[", "{"):
        return "not one JSON record a line. Convert it: jq -c '.[]' FILE.json > FILE.jsonl."
    return f"not valid JSON ({error.msg}, column {error.colno}). Mend or delete this line."


def _hint_for_missing(path: Path) -> str:
    makers = {
        "prompts.jsonl": "Make one: a JSON record a line, with a field prompt. Or pass --prompts.",
        "feedback.jsonl": "Make it first: srt collect-feedback.",
        "self-feedback.jsonl": "Make it first: srt self-critique.",
        "prefs.jsonl": "Make it first: srt build-prefs.",
    }
    return f" {makers[path.name]}" if path.name in makers else " Check the path."


def read_records(
    path: Path, parse: Callable[[Mapping[str, Any]], Row], *, limit: int | None = None
) -> Iterator[Row]:
    """Read an artifact of ours, naming file and line of a record that does not fit."""
    for position, (number, row) in enumerate(read_rows(path)):
        if limit is not None and position >= limit:
            return
        try:
            yield parse(row)
        except ValidationError as error:
            raise SrtError(f"{path}:{number}: {describe_invalid(error)}") from None


def describe_invalid(error: ValidationError) -> str:
    """What is wrong with a record, in one sentence that names the field."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the record"
    return f"{where}: {first['msg'].lower()}. Was this file written by another version or tool?"


class OrderedWriter:
    """Write rows in index order although they finish in any order; renamed into place at the end.

    Rows wait as bytes only until the ones before them are there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb")  # noqa: SIM115  held until commit()
        self._waiting: dict[int, bytes] = {}
        self._next = 0
        self.rows = 0

    def add(self, index: int, records: Iterable[Record]) -> None:
        """Take the records that input row `index` became (none is allowed)."""
        self._add(index, [to_line(record) for record in records])

    def add_plain(self, index: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take rows in another tool's form."""
        option = orjson.OPT_APPEND_NEWLINE
        self._add(index, [orjson.dumps(dict(row), option=option) for row in rows])

    def _add(self, index: int, lines: list[bytes]) -> None:
        self.rows += len(lines)
        self._waiting[index] = b"".join(lines)
        while self._next in self._waiting:
            self._file.write(self._waiting.pop(self._next))
            self._next += 1

    def append(self, line: bytes) -> None:
        """Take the line behind all that were given; the quick way of those that come in order."""
        self._file.write(line)
        self._next += 1
        self.rows += 1

    def commit(self) -> None:
        """Write what still waits behind a gap, sync, and put the file in its place."""
        for index in sorted(self._waiting):
            self._file.write(self._waiting[index])
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def to_line(record: Record) -> bytes:
    """A record as its JSONL line."""
    return orjson.dumps(record.model_dump(mode="json"), option=orjson.OPT_APPEND_NEWLINE)


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically."""
    write_atomically(path, orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Manifests ---------------------------------------------------------------------------------


class InputFile(BaseModel):
    """A file that a run read, and the run that made it, if we know."""

    path: str
    sha256: str | None = None
    rows: int | None = None
    run: str | None = None


class Manifest(BaseModel):
    """What a run was and what came of it; stands beside its output as `X.run.json`."""

    model_config = ConfigDict(extra="ignore")

    version: int = 1
    id: str = Field(default_factory=lambda: secrets.token_hex(4))
    command: str
    status: RunStatus = "started"
    progress: str | None = None
    started: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    finished: str | None = None
    settings: dict[str, Any]
    runtime: dict[str, Any]
    inputs: dict[str, InputFile] = {}
    outputs: dict[str, str] = {}
    output_sha256: str | None = None
    models: dict[str, dict[str, Any]] = {}
    templates: dict[str, str] = Field(default_factory=template_digests)
    versions: dict[str, str] = {}
    git: dict[str, Any] | None = None
    hardware: dict[str, Any] = {}
    tallies: dict[str, Any] = {}
    usage: dict[str, Usage] = {}
    cost: dict[str, Any] = {}
    warnings: list[str] = []
    error: str | None = None


def manifest_path(artifact: Path) -> Path:
    """Where an artifact's manifest stands: `run.json` in a model directory, else `X.run.json`."""
    if not is_data_file(artifact):
        return artifact / "run.json"
    return artifact.with_name(artifact.name.removesuffix(".gz").rsplit(".", 1)[0] + ".run.json")


def is_data_file(path: Path) -> bool:
    """Whether a path names a data file; anything else is a model directory (`models/v1.0` too)."""
    return not path.is_dir() and (path.is_file() or path.name.endswith(DATA_SUFFIXES))


def read_manifest(artifact: Path) -> Manifest | None:
    """The manifest beside an artifact; null when there is none, or it is not ours."""
    path = manifest_path(artifact)
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError):
        raise SrtError(
            f"{path}: not a manifest of srt. Move it away, or choose another --out."
        ) from None


def inherited(artifact: Path, name: str) -> str | None:
    """A setting of the run that made an artifact, e.g. which model wrote its drafts."""
    manifest = read_manifest(artifact)
    value = manifest.settings.get(name) if manifest else None
    return value if isinstance(value, str) else None


class Run:
    """One command's run: opens the manifest, holds the journal, and closes both truthfully.

    Leaving the `with` block normally means complete; by `KeyboardInterrupt`, interrupted; by an
    error, failed. Warnings and tallies go into the manifest as they are known.
    """

    def __init__(self, manifest: Manifest, out: Path, earlier: Manifest | None) -> None:
        self.manifest = manifest
        self.out = out
        self.earlier = earlier
        self.whole = True
        """False when rows are still owed although nothing went wrong."""
        self._cleanup = contextlib.ExitStack()
        self._at_end: list[Callable[[], None]] = []

    def __enter__(self) -> "Run":
        self.save()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()
        if error is None:
            self.manifest.status = "complete" if self.whole else "interrupted"
            if self.out.is_file():
                self.manifest.output_sha256 = sha256_of(self.out)
        elif isinstance(error, KeyboardInterrupt | BudgetReached | QuotaError):
            self.manifest.status = "interrupted"
            self.manifest.error = str(error) or None
        else:
            self.manifest.status = "failed"
            self.manifest.error = f"{kind.__name__ if kind else ''}: {error}"
        self.manifest.finished = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
            self.save()
            for act in self._at_end:
                act()

    @property
    def complete(self) -> bool:
        """Whether an earlier run under these settings has finished."""
        return self.earlier is not None and self.earlier.status == "complete"

    @property
    def up_to_date(self) -> bool:
        """Whether a complete output of these very inputs and templates stands there untouched."""
        if self.earlier is None or not self.complete or not self.out.is_file():
            return False
        now, then = self.manifest, self.earlier
        inputs = {name: file.sha256 for name, file in now.inputs.items()}
        return (
            bool(inputs)
            and None not in inputs.values()
            and inputs == {name: file.sha256 for name, file in then.inputs.items()}
            and now.settings == then.settings
            and now.templates == then.templates
            and now.versions["srt"] == then.versions.get("srt")
            and then.output_sha256 == sha256_of(self.out)
        )

    @property
    def journal_path(self) -> Path:
        """Where the journal beside the output stands."""
        stem = self.out.name.removesuffix(".jsonl").removesuffix(".json")
        return self.out.with_name(f"{stem}.journal.jsonl")

    def journal(self) -> Journal:
        """The journal beside the output, open for this run alone."""
        journal = Journal(self.journal_path)
        self._cleanup.enter_context(journal)
        if journal.unreadable:
            self.warn(
                f"{journal.path}: {journal.unreadable} torn lines; their calls are made again."
            )
        return journal

    def warn(self, message: str) -> None:
        """Note something the user should know, in the manifest and on the terminal."""
        if message not in self.manifest.warnings:
            self.manifest.warnings.append(message)
            console.warn(message)

    def at_end(self, act: Callable[[], None]) -> None:
        """Do this once the manifest says how the run ended."""
        self._at_end.append(act)

    def save(self) -> None:
        """Write the manifest as it stands."""
        write_json(manifest_path(self.out), self.manifest.model_dump(mode="json"))

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process of the run, it can be read there, and writes nothing."""
        return _SilentRun, (self.manifest, self.out, self.earlier)


class _SilentRun(Run):
    """A run as the processes see it that neither print nor write."""

    def save(self) -> None:
        pass

    def warn(self, message: str) -> None:
        pass


def open_run(
    command: str,
    config: Any,
    out: Path,
    *,
    inputs: Mapping[str, Path],
    overwrite: bool,
    directory: bool = False,
    resolved: Mapping[str, Any] | None = None,
) -> Run:
    """Begin a run that writes `out`, or continue the one that did.

    The same settings continue it; other settings are refused, naming what differs; `overwrite`
    starts anew (the journal stays: what it holds was paid for, and other settings have other
    keys). `resolved` gives settings that were left open on the command line and found elsewhere.
    """
    if directory == is_data_file(out):
        kind = "a directory" if directory else "a file ending in .jsonl (eval: .json)"
        raise UsageError(f"--out {out}: srt {command} writes {kind}.")
    settings = values_of(config, "setting") | dict(resolved or {})
    earlier = read_manifest(out)
    if not overwrite:
        _refuse_other_runs_output(command, config, settings, out, earlier)
    manifest = Manifest(
        command=command,
        settings=settings,
        runtime=values_of(config, "runtime"),
        inputs={name: describe_input(path) for name, path in inputs.items()},
        outputs={"out": str(out)},
        versions=_versions(),
        git=_git_state(),
        hardware={"machine": platform.machine(), "cpus": os.cpu_count(), "os": platform.platform()},
    )
    return Run(manifest, out, None if overwrite else earlier)


def _refuse_other_runs_output(
    command: str, config: Any, settings: Mapping[str, Any], out: Path, earlier: Manifest | None
) -> None:
    if earlier is None:
        if out.is_dir() and any(out.iterdir()):
            raise SrtError(f"{out}: a directory with other content. Choose another --out.")
        if out.exists() and not out.is_dir():
            raise SrtError(
                f"{out}: exists, and no run of srt is known to have written it. "
                "Choose another --out, or replace it with --overwrite."
            )
        return
    if not out.exists() or (out.is_dir() and _holds_only_notes(out)):
        return
    if earlier.command != command:
        raise SrtError(
            f"{out}: belongs to a run of srt {earlier.command}. "
            "Choose another --out, or replace it with --overwrite."
        )
    differing = differing_settings(config, earlier.settings, settings)
    if differing:
        named = "; ".join(
            f"{flag} was {was!r}, now {now!r}" for flag, (was, now) in differing.items()
        )
        raise SrtError(
            f"{out}: belongs to a run with other settings ({named}). "
            "Choose another --out, or replace it with --overwrite."
        )


def _holds_only_notes(directory: Path) -> bool:
    """Whether a training stopped before it made anything: no weights, no checkpoint."""
    notes = ("run.json", ".dropped.jsonl")
    return all(path.name.endswith(notes) for path in directory.iterdir())


def clear_directory(path: Path) -> None:
    """Delete a model directory of ours, for `--overwrite`; refuses one that is not ours."""
    if not path.exists():
        return
    if not (path / "run.json").is_file() and any(path.iterdir()):
        raise SrtError(
            f"{path}: not a directory that srt made; it is left alone. Choose another --out."
        )
    shutil.rmtree(path)


def describe_input(path: Path) -> InputFile:
    """A file's path, digest and maker, for the manifest."""
    manifest = read_manifest(path) if str(path) != "-" else None
    digest = sha256_of(path) if path.is_file() else None
    rows = None
    if digest is not None and path.suffix == ".jsonl":
        with open(path, "rb") as lines:
            rows = sum(not line.isspace() for line in lines)
    run = manifest.id if manifest else None
    return InputFile(path=str(path), sha256=digest, rows=rows, run=run)


def template_input(template: Path | None, name: str = "chat_template") -> dict[str, Path]:
    """A template given as a file, as an input: another content is another run."""
    return {} if template is None else {name: template}


def _versions() -> dict[str, str]:
    versions = {"srt": srt_cli.__version__, "python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _git_state() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout

    try:
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


# --- Rows that fell out ------------------------------------------------------------------------


def dropped_path(artifact: Path) -> Path:
    """Where the rows that fell out of an artifact stand."""
    return artifact.with_name(artifact.name.removesuffix(".jsonl") + ".dropped.jsonl")


class DroppedRows:
    """Counts what falls out of an artifact by reason, and writes `X.dropped.jsonl` beside it."""

    def __init__(self, artifact: Path) -> None:
        self.path = dropped_path(artifact)
        self.reasons: Counter[str] = Counter()
        self._writer = OrderedWriter(self.path)

    def add(self, identifier: str, reason: str, row: Record) -> None:
        """Note one row and why it fell out."""
        dropped = Dropped(id=identifier, reason=reason, row=row.model_dump(mode="json"))
        self.add_line(reason, to_line(dropped))

    def add_line(self, reason: str, line: bytes) -> None:
        """Note one row by its whole line, as a `Dropped` record is written."""
        self._writer.append(line)
        self.reasons[reason] += 1

    def commit(self) -> None:
        """Put the file in its place, or take an old one away when nothing fell out."""
        if self.reasons:
            self._writer.commit()
        else:
            self._writer.discard()
            self.path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Leave nothing half-written behind; harmless after `commit`."""
        self._writer.discard()

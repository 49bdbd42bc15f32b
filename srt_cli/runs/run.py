"""The run behind an output: its manifest, and whether it is continued, refused or replaced."""

import contextlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Literal, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

import srt_cli
from srt_cli import console
from srt_cli.errors import BudgetReached, QuotaError, SrtError, UsageError
from srt_cli.options import (
    as_declared,
    differing_settings,
    flag_named,
    under_todays_names,
    values_of,
)
from srt_cli.records import Usage
from srt_cli.runs.journal import Journal
from srt_cli.runs.jsonl import (
    BUFFER_BYTES,
    NewFile,
    as_json,
    dropped_path,
    is_data_file,
    is_held,
    is_stream,
    kept_by,
    sha256_of,
)
from srt_cli.templates import template_digests

RunStatus = Literal["started", "complete", "interrupted", "failed"]
Figure = TypeVar("Figure")
TEMPLATE_DAY: Final = "template_day"
"""The tally of a run whose chat template writes the date: when it was first asked, ISO 8601."""

REPORTED_PACKAGES: Final = (
    "torch", "transformers", "trl", "accelerate", "peft", "datasets", "openai", "pydantic",
)  # fmt: skip


class InputFile(BaseModel):
    """A file that a run read."""

    path: str
    sha256: str | None = None
    """Of its bytes; None for what is no file: a directory, stdin."""
    rows: int | None = None
    """Lines that are not blank; None where they were not counted."""
    run: str | None = None
    """The id of the run that made it, if its manifest says so."""


class GitState(BaseModel):
    """Where the working folder stood in git."""

    commit: str
    dirty: bool


class Hardware(BaseModel):
    """The machine that a run ran on."""

    machine: str | None = None
    cpus: int | None = None
    os: str | None = None

    @classmethod
    def here(cls) -> Self:
        """This machine."""
        return cls(machine=platform.machine(), cpus=os.cpu_count(), os=platform.platform())


class Manifest(BaseModel):
    """What a run was and what came of it; stands beside its output as `X.run.json`."""

    model_config = ConfigDict(extra="ignore")

    version: int = 1
    id: str = Field(default_factory=lambda: secrets.token_hex(4))
    """Random; the manifests of runs that read this output name it."""
    command: str
    status: RunStatus = "started"
    progress: str | None = None
    """How far it got, e.g. "412 of 512"."""
    started: str = Field(default_factory=lambda: _now())
    """UTC, ISO 8601, to the second."""
    finished: str | None = None
    settings: dict[str, Any]
    """The options that change the result, by field name; a run is continued only under the same."""
    runtime: dict[str, Any]
    """The options that change only speed, place or looks."""
    inputs: dict[str, InputFile] = {}
    outputs: dict[str, str] = {}
    """Paths, by what they are: `out`, `report`."""
    journal_bytes: int = 0
    """Of the journal when the run was first begun, however often it was interrupted since."""
    output_sha256: str | None = None
    """Of a data file, as the run left it; None for a model directory."""
    written: dict[str, list[str]] | None = None
    """SHA-256 of every file that this run and those before it wrote, by its path from here; behind that
    of the one that it replaced, for a run may be killed between. None in a run of version 0.1.0."""
    models: dict[str, dict[str, Any]] = {}
    """By spec: each model's identity, device, dtype and why, as its `describe()` says."""
    templates: dict[str, str] = Field(default_factory=template_digests)
    """Short digests of everything that srt says to models."""
    versions: dict[str, str] = {}
    git: GitState | None = None
    hardware: Hardware = Hardware()
    tallies: dict[str, Any] = {}
    """The command's own figures; what a later command reads of them it reads with `tally`."""
    usage: dict[str, Usage] = {}
    cost: dict[str, Any] = {}
    """Calls, tokens and dollars, as `calls.cost.Cost.describe()` says."""
    warnings: list[str] = []
    error: str | None = None

    def says_the_same(self, earlier: "Manifest") -> bool:
        """Whether all that an earlier run said to models is said in the same words now."""
        return earlier.templates.items() <= self.templates.items()

    def goes_on(self, earlier: "Manifest") -> bool:
        """Whether it takes up a run that did not get to its end, with its settings and inputs."""
        return (
            earlier.status != "complete"
            and earlier.settings == self.settings
            and earlier.digests == self.digests
        )

    @property
    def digests(self) -> dict[str, str | None]:
        """SHA-256 of the inputs, by name."""
        return {name: file.sha256 for name, file in self.inputs.items()}

    def tally(self, name: str, kind: type[Figure]) -> Figure | None:
        """One of the tallies; None where the run has none of that name and kind."""
        try:
            return TypeAdapter(kind).validate_python(self.tallies.get(name))
        except ValidationError:
            return None


def manifest_path(artifact: Path) -> Path:
    """Path of an artifact's manifest: `run.json` in a model directory, else `X.run.json`."""
    if not is_data_file(artifact):
        return artifact / "run.json"
    return artifact.with_name(artifact.name.removesuffix(".gz").rsplit(".", 1)[0] + ".run.json")


def journal_path(artifact: Path) -> Path:
    """Path of an artifact's journal."""
    stem = artifact.name.removesuffix(".jsonl").removesuffix(".json")
    return artifact.with_name(f"{stem}.journal.jsonl")


def batches_path(artifact: Path) -> Path:
    """Path of the notes on an artifact's batches."""
    journal = journal_path(artifact)
    return journal.with_name(f"{journal.name.removesuffix('.journal.jsonl')}.batches.jsonl")


def read_manifest(artifact: Path) -> Manifest | None:
    """The manifest beside an artifact; None when there is none.

    Raises `SrtError` for a file that is no manifest.
    """
    if is_stream(artifact):
        return None
    path = manifest_path(artifact)
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise SrtError(
            f"{path}: not a manifest of srt, and stands where one would. Rename it."
        ) from None


def why_not_whole(artifact: Path) -> str | None:
    """A warning when the run that wrote a file did not get to its end; None when it did."""
    manifest = read_manifest(artifact)
    if manifest is None or manifest.status != "interrupted":
        return None
    reached = f" at {manifest.progress}" if manifest.progress else ""
    return (
        f"{artifact}: is of a run that was interrupted{reached}; what it lacks is not in here. Run "
        f"the same srt {manifest.command} line again to finish it."
    )


def inherited(artifact: Path, name: str) -> str | None:
    """A setting of the run that made an artifact, such as the model that wrote its drafts."""
    manifest = read_manifest(artifact)
    value = manifest.settings.get(name) if manifest else None
    return value if isinstance(value, str) else None


def system_of_training(artifact: Path) -> str | None:
    """The `--system` under which the rows were made that a model was trained on; None without one."""
    manifest = read_manifest(artifact)
    for name, file in manifest.inputs.items() if manifest is not None else ():
        if name.startswith(("data", "prefs")):
            rows = Path(file.path)
            if system := inherited(rows, "system") or system_of_training(rows):
                return system
    return None


def first_day(artifact: Path) -> datetime | None:
    """When a run first asked a model whose chat template writes the date; None where none does."""
    manifest = read_manifest(artifact)
    day = manifest.tally(TEMPLATE_DAY, str) if manifest is not None else None
    return datetime.fromisoformat(day) if day is not None else None


class Run:
    """One command's run: opens the manifest, holds the journal, and closes both truthfully.

    Leaving the `with` block normally means complete; by `KeyboardInterrupt`, interrupted; by an
    error, failed. What the run finds goes into the manifest as it is known.
    """

    def __init__(
        self, manifest: Manifest, out: Path, earlier: Manifest | None, *, overwrite: bool = False
    ) -> None:
        self.manifest = manifest
        self.out = out
        self.earlier = None if overwrite else earlier
        """The manifest of the run that this one continues."""
        self._found = _state(earlier)
        self._overwrite = overwrite
        self._written: dict[str, list[str]] = {}
        self._placed: dict[str, str] = {}
        if self.earlier is not None:
            self._written |= self.earlier.written or {}
            if self.earlier.output_sha256 is not None:
                self._written.setdefault(self._name(out), [self.earlier.output_sha256])
        self._whole = True
        self._lock: IO[bytes] | None = None
        """The manifest as it stands on disk: who has it open runs."""
        self._cleanup = contextlib.ExitStack()
        self._keeping = contextlib.ExitStack()
        self._at_end: list[Callable[[], None]] = []

    def __enter__(self) -> "Run":
        self.save()
        self._keeping.enter_context(kept_by(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()
        with contextlib.suppress(OSError):
            if self.out.is_file():
                placed = self._placed.get(self._name(self.out))
                self.manifest.output_sha256 = placed or sha256_of(self.out)
        if error is None:
            self.manifest.status = "complete" if self._whole else "interrupted"
        elif isinstance(error, KeyboardInterrupt | BudgetReached | QuotaError):
            self.manifest.status = "interrupted"
            self.manifest.error = str(error) or None
        else:
            self.manifest.status = "failed"
            self.manifest.error = f"{kind.__name__ if kind else ''}: {error}"
        self.manifest.finished = _now()
        known = (OSError, SrtError) if error is not None else ()
        with self._keeping, contextlib.suppress(*known):
            self.save()
            for act in self._at_end:
                act()

    @property
    def complete(self) -> bool:
        """Whether an earlier run under these settings has finished."""
        return self.earlier is not None and self.earlier.status == "complete"

    @property
    def up_to_date(self) -> bool:
        """Whether the output is complete, untouched, and of these very inputs and templates."""
        if self.earlier is None or not self.complete or not self.out.is_file():
            return False
        now, then = self.manifest, self.earlier
        return (
            bool(now.digests)
            and None not in now.digests.values()
            and now.digests == then.digests
            and now.settings == then.settings
            and now.says_the_same(then)
            and now.versions["srt"] == then.versions.get("srt")
            and then.output_sha256 == sha256_of(self.out)
        )

    @property
    def journal_path(self) -> Path:
        """Path of the journal beside the output."""
        return journal_path(self.out)

    def journal(self) -> Journal:
        """The journal beside the output, open for this run alone."""
        journal = Journal(self.journal_path, before=self.manifest.journal_bytes)
        self._cleanup.enter_context(journal)
        if journal.unreadable:
            self.warn(f"{journal.path}: {journal.unreadable} torn lines; their calls are repeated.")
        return journal

    def warn(self, message: str) -> None:
        """Warn the user, once, on the terminal and in the manifest."""
        if message not in self.manifest.warnings:
            self.manifest.warnings.append(message)
            console.warn(message)

    def tell_of_system(self, model: str, system: str | None) -> None:
        """Warn when a model is asked without the system turn that it was trained under."""
        trained = system_of_training(Path(model)) if Path(model).is_dir() else None
        if trained is not None and system is None:
            self.warn(
                f"{model} was trained under a system turn, and is asked without it. Pass --system "
                f"{trained[:60]!r} to ask it as it was trained."
            )

    def keep_day(self, model: str, day: str | None) -> None:
        """Keep the date that a model's chat template writes, if it does, for when the run goes on."""
        if day is None:
            return
        if TEMPLATE_DAY not in self.manifest.tallies:
            self.tally({TEMPLATE_DAY: day})
            self.save()
        self.warn(
            f"{model}: its chat template writes the date, so what it says depends on the day. A run "
            f"that is continued keeps its first day's, here {day[:10]}."
        )

    def reached(self, progress: str, *, whole: bool = True) -> None:
        """Note how far the run got; one that is not `whole` still owes rows, though nothing failed."""
        self.manifest.progress = progress
        self._whole = whole

    def tally(self, figures: Mapping[str, Any]) -> None:
        """Add figures to the manifest's; the newest of a name stands."""
        self.manifest.tallies |= figures

    def describe_models(self, models: Mapping[str, dict[str, Any]]) -> None:
        """Add what models say of themselves, by spec."""
        self.manifest.models |= models

    def bill(self, cost: dict[str, Any], usage: Usage | None = None) -> None:
        """Note what the calls cost, and the tokens of the rows."""
        self.manifest.cost = cost
        if usage is not None:
            self.manifest.usage = {"total": usage}

    def wrote(self, name: str, path: Path) -> None:
        """Note another output."""
        self.manifest.outputs[name] = str(path)

    def at_end(self, act: Callable[[], None]) -> None:
        """Call `act` once the manifest says how the run ended."""
        self._at_end.append(act)

    def save(self) -> None:
        """Write the manifest."""
        self.manifest.written = self._written
        file = NewFile(manifest_path(self.out))
        try:
            if self._lock is None:
                self.refuse_another()
                self._keeping.callback(self._unlock)
            file.write(as_json(self.manifest.model_dump(mode="json")))
            placed = file.place()
        finally:
            file.discard()
        self._unlock()
        self._lock = placed

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def refuse_another(self) -> None:
        """Raise `SrtError` when another run writes this output, or did since this one was begun."""
        if is_held(manifest_path(self.out)):
            raise SrtError(
                f"{self.out}: another srt run is writing here. Wait for it, or choose another --out."
            )
        if _state(read_manifest(self.out)) != self._found and not self._overwrite:
            raise SrtError(
                f"{self.out}: another srt run has just written here. Run the same line again."
            )

    def claim(self, path: Path) -> None:
        """Raise `SrtError` for a file that is there, and not as a run of this output left it."""
        if self._is_private(path) or not path.is_file():
            return
        name, digest = self._name(path), sha256_of(path)
        known = self._written.get(name)
        if self._lock is None and digest not in (known or []):
            self.refuse_another()  # which may have written it since its manifest was read
        if known is None and not self._overwrite:
            if self.earlier is None or self.earlier.written is not None:
                raise SrtError(
                    f"{path}: exists, and no run of {self.out} wrote it. Rename it to keep it, or "
                    "replace it with --overwrite."
                )
        elif known is not None and digest not in known and not self._overwrite:
            raise SrtError(
                f"{path}: was changed after srt wrote it. Rename it to keep the changes, or replace it "
                "with --overwrite."
            )
        self._written[name] = [digest]

    def placing(self, path: Path, content: Path) -> None:
        """Note what is about to stand at a path, beside what stands there: either is ours, whenever
        the run is killed."""
        if not self._is_private(path):
            name = self._name(path)
            digest = self._placed[name] = sha256_of(content)
            self._written[name] = [*self._written.get(name, []), digest]
            self.save()

    def _is_private(self, path: Path) -> bool:
        """Whether a file is the manifest, or lies deep in a model's directory."""
        return path == manifest_path(self.out) or (
            path.parent != self.out and self.out in path.parents
        )

    def _name(self, path: Path) -> str:
        """A path as the manifest names it: from its own folder."""
        here = manifest_path(self.out).resolve().parent
        return os.path.relpath(path.resolve(), here)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a read-only run, for the other processes of this one."""
        return _SilentRun, (self.manifest, self.out, self.earlier)


def _state(manifest: Manifest | None) -> tuple[object, ...] | None:
    """By what a run is told from any other, and from itself at another time."""
    if manifest is None:
        return None
    return manifest.id, manifest.status, manifest.finished, manifest.written


class _SilentRun(Run):
    """A run as its other processes see it: they read it, and neither print nor write."""

    def save(self) -> None:
        pass

    def warn(self, message: str) -> None:
        pass


class OutputOptions(Protocol):
    """The options of every command that say where its output goes."""

    @property
    def out(self) -> Path:
        """A data file or a model directory."""
        ...

    @property
    def overwrite(self) -> bool:
        """Whether an output of other settings is replaced."""
        ...


def open_run(
    command: str,
    options: OutputOptions,
    *,
    inputs: Mapping[str, Path],
    resolved: Mapping[str, Any] | None = None,
    directory: bool = False,
) -> Run:
    """Begin a run that writes `options.out`, or continue the one that did.

    The same settings continue it; others raise `SrtError`, naming what differs; with `overwrite`
    the run starts over (the journal stays: its replies were paid for, and other settings have
    other keys). `resolved` holds settings that the command line left open and that were found
    elsewhere. `directory` says that the command writes a model.
    """
    out = options.out
    if directory == is_data_file(out):
        kind = "a directory" if directory else "a file ending in .jsonl (eval: .json)"
        raise UsageError(f"--out {out}: srt {command} writes {kind}.")
    for name, path in inputs.items():
        _refuse_reading_output(out, name, path)
    settings = values_of(options, "setting") | dict(resolved or {})
    earlier = read_manifest(out)
    # It goes with the journal, which stays whatever becomes of the output.
    day = earlier.tally(TEMPLATE_DAY, str) if earlier is not None else None
    if earlier is not None:
        # An option that an older srt did not have stood at its default.
        defaults = values_of(type(options)(), "setting")
        then = defaults | as_declared(options, under_todays_names(options, earlier.settings))
        earlier = earlier.model_copy(update={"settings": then})
    if not options.overwrite:
        _refuse_other_run(command, options, settings, earlier)
    manifest = Manifest(
        command=command,
        settings=settings,
        runtime=values_of(options, "runtime"),
        inputs={name: describe_input(path) for name, path in inputs.items()},
        outputs={"out": str(out)},
        versions=_versions(),
        git=_git_state(),
        hardware=Hardware.here(),
        tallies={} if day is None else {TEMPLATE_DAY: day},
    )
    if earlier is not None and manifest.goes_on(earlier):
        manifest.journal_bytes = earlier.journal_bytes
    else:
        with contextlib.suppress(OSError):
            manifest.journal_bytes = journal_path(out).stat().st_size
    run = Run(manifest, out, earlier, overwrite=options.overwrite)
    if earlier is not None:
        run.claim(out)
    return run


def _refuse_reading_output(out: Path, name: str, path: Path) -> None:
    """Raise `UsageError` for an input that the run would overwrite or delete."""
    if is_stream(path):
        return
    read, written = path.resolve(), out.resolve()
    beside = (manifest_path(out), journal_path(out), batches_path(out), dropped_path(out))
    files = [out, *beside]
    if read in (file.resolve() for file in files) or written in read.parents:
        flag = flag_named(name.rstrip(" _0123456789").replace(" ", "_"))
        raise UsageError(
            f"--out {out}: would replace {path}, the input of {flag}. Choose another --out."
        )


def _refuse_other_run(
    command: str, options: OutputOptions, settings: Mapping[str, Any], earlier: Manifest | None
) -> None:
    """Raise `SrtError` when the output belongs to something else than this run."""
    out = options.out
    if earlier is None:
        if out.is_dir() and any(out.iterdir()):
            raise SrtError(f"{out}: a directory with other content. Choose another --out.")
        if out.exists() and not out.is_dir():
            raise SrtError(
                f"{out}: exists, and no run of srt is known to have written it. "
                "Choose another --out, or replace it with --overwrite."
            )
        return
    if not out.exists() or _holds_nothing(out):
        return
    if earlier.command != command:
        raise SrtError(
            f"{out}: belongs to a run of srt {earlier.command}. "
            "Choose another --out, or replace it with --overwrite."
        )
    differing = differing_settings(options, earlier.settings, settings)
    if differing:
        named = "; ".join(
            f"{flag} was {was!r}, now {now!r}" for flag, (was, now) in differing.items()
        )
        journal = journal_path(out)
        kept = f"; {journal.name} stays, and calls that ask the same are not made again"
        raise SrtError(
            f"{out}: belongs to a run with other settings ({named}). "
            f"Choose another --out, or replace it with --overwrite{kept if journal.exists() else ''}."
        )


def _holds_nothing(out: Path) -> bool:
    """Whether a run stopped before a reply came, or before it wrote weights or a checkpoint."""
    if not out.is_dir():
        journal = journal_path(out)
        return not out.stat().st_size and not (journal.exists() and journal.stat().st_size)
    notes = ("run.json", ".dropped.jsonl")
    return all(path.name.endswith(notes) for path in out.iterdir())


def clear_directory(path: Path) -> None:
    """Delete a model directory for `--overwrite`; raises `SrtError` unless srt made it."""
    if not path.exists():
        return
    if not (path / "run.json").is_file() and any(path.iterdir()):
        raise SrtError(
            f"{path}: not a directory that srt made; it is left alone. Choose another --out."
        )
    # The manifest last, so that a run that is killed here still knows the directory for its own; which
    # may itself be a link to where there is room.
    for content in sorted(path.iterdir(), key=lambda content: content.name == "run.json"):
        if content.is_dir() and not content.is_symlink():
            shutil.rmtree(content)
        else:
            content.unlink()


def describe_input(path: Path) -> InputFile:
    """A file's path, digest, rows and maker, for the manifest."""
    manifest = read_manifest(path)
    digest = rows = None
    if path.is_file():
        # Hashing leaves the other core to the rows.
        with ThreadPoolExecutor(max_workers=1) as beside:
            hashed = beside.submit(sha256_of, path)
            rows = _rows_of(path) if path.suffix == ".jsonl" else None
            digest = hashed.result()
    run = manifest.id if manifest else None
    return InputFile(path=str(path), sha256=digest, rows=rows, run=run)


def _rows_of(path: Path) -> int:
    with open(path, "rb", buffering=BUFFER_BYTES) as lines:
        return sum(not line.isspace() for line in lines)


def template_input(template: Path | str | None, name: str = "chat_template") -> dict[str, Path]:
    """A template file as an input of the run: a changed template is another run.

    A template that is named, and no file, is none.
    """
    return {name: Path(template)} if template is not None and Path(template).is_file() else {}


def _versions() -> dict[str, str]:
    versions = {"srt": srt_cli.__version__, "python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _git_state() -> GitState | None:
    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout

    try:
        return GitState(
            commit=git("rev-parse", "HEAD").strip(), dirty=bool(git("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

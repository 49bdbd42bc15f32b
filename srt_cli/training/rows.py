"""What a training is asked for, and which rows it sees: by weight, held out, other chats mixed in."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar

from pydantic import ValidationError

from srt_cli import console
from srt_cli.errors import SrtError, UsageError
from srt_cli.forms import read_row
from srt_cli.models import names_program, parse_spec
from srt_cli.reading import part_thoughts
from srt_cli.records import FeedbackRecord, Message, Prompt, Record, as_messages, content_id
from srt_cli.runs.jsonl import DroppedRows, is_stream, read_lines, read_records, read_rows
from srt_cli.runs.run import Run, inherited, read_manifest
from srt_cli.templates import FEEDBACK_FIELDS, FeedbackField
from srt_cli.training.options import PackingChoice

Part = Literal["response", "feedback", "refinement", "mix", "comparison"]
PARTS: Final[tuple[Part, ...]] = ("response", "feedback", "refinement", "mix", "comparison")
"""What may carry loss: the three parts of a feedback record, the answers of mixed-in chats, and the
letter of a comparison."""
FEEDBACK_PARTS: Final = PARTS[:3]
Thoughts = Literal["drop", "keep"]
"""What becomes of recorded thoughts: none is trained, or those of a turn with the turn."""

AnyRow = TypeVar("AnyRow")
Example = TypeVar("Example")
Name = TypeVar("Name", bound=str)


class Fallen(NamedTuple):
    """A row that was dropped, and why."""

    id: str
    reason: str
    row: Record


@dataclass
class FileFigures:
    """What one of several files brings to a training, for the plan and the manifest."""

    file: str
    weight: float
    rows: int
    kept: int
    held_out: int = 0
    trained: int = 0
    """Rows that are trained on, by their weight."""
    tokens: int = 0


@dataclass
class Prepared(Generic[Example]):
    """What a training will see, what is held out, and what was dropped on the way."""

    train: list[Example]
    held_out: list[Example] = field(default_factory=list)
    prompts: list[list[Message]] = field(default_factory=list)
    """Of the rows held out, or of those trained if none is: what samples may be drawn from."""
    fallen: list[Fallen] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tallies: dict[str, Any] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    """For the terminal: what became of the rows."""
    too_long: str | None = None
    """What a training does about rows over the limit, if there are any; for a plan."""
    files: list[FileFigures] = field(default_factory=list)
    """Of each file, where there are several."""
    split: str | None = None
    """That the template rewrites earlier turns, if it does; for a plan."""

    @property
    def reasons(self) -> Counter[str]:
        """How many rows were dropped, per reason."""
        return Counter(row.reason for row in self.fallen)

    def record(self, run: Run, dropped_beside: Path) -> None:
        """Record in the run what was dropped, and say the rest."""
        write_dropped(dropped_beside, self.fallen)
        run.tally(self.tallies | {"dropped": dict(self.reasons)})
        for sentence in self.sentences:
            console.say(sentence)
        for warning in self.warnings:
            run.warn(warning)


def write_dropped(beside: Path, fallen: Sequence[Fallen]) -> Path:
    """Write the dropped rows, with their reasons, into a file beside the output."""
    dropped = DroppedRows(beside)
    for row in fallen:
        dropped.add(*row)
    dropped.commit()
    return dropped.path


# --- Rows that teach ---------------------------------------------------------------------------


def why_not_trained(record: FeedbackRecord) -> str | None:
    """Which of the paper's two rules (section 4.1) a row breaks; None when it passes both."""
    if record.status != "ok":
        return record.status
    for part, text in (("response", record.response), ("refinement", record.refinement)):
        if text is not None and not text.strip():
            return f"empty {part}"
        if text is not None and part_thoughts(text)[0]:
            return f"thoughts within the {part}"
    if record.gain is None:
        return "incomplete"
    if record.gain < 0:
        return "refinement scored lower"
    return None


def keep_teaching_rows(
    records: Iterable[FeedbackRecord],
) -> tuple[list[FeedbackRecord], list[Fallen]]:
    """Rows that pass the paper's rules, and the others."""
    kept, fallen = [], []
    for record in records:
        reason = why_not_trained(record)
        if reason is None:
            kept.append(record)
        else:
            fallen.append(Fallen(record.id, reason, record))
    return kept, fallen


def parse_names(text: str, known: Sequence[Name], flag: str) -> tuple[Name, ...]:
    """Names joined by commas, in the order of `known`; raises `UsageError` for another name."""
    named = [name.strip() for name in text.split(",") if name.strip()]
    if not named or set(named) - set(known):
        raise UsageError(f"{flag} {text!r}: name some of {', '.join(known)}, joined by commas.")
    return tuple(name for name in known if name in named)


@dataclass(frozen=True)
class Targets:
    """What of a feedback record is trained (paper, Eq. 1; Table 6 for what may be left out)."""

    loss_on: tuple[Part, ...]
    drop: tuple[FeedbackField, ...] = ()
    refinement_only: bool = False
    refinement_feedback: bool = False
    balance: bool = False

    @property
    def scores(self) -> bool:
        """Whether the model learns to score."""
        return "score" not in self.drop and not self.refinement_only


def parse_targets(
    loss_on: str,
    drop: str | None,
    refinement_only: bool,
    refinement_feedback: bool,
    balance: bool = False,
) -> Targets:
    """The options as targets; raises `UsageError` where one of them would do nothing."""
    parts = parse_names(loss_on, FEEDBACK_PARTS, "--loss-on")
    dropped = parse_names(drop, FEEDBACK_FIELDS, "--drop") if drop else ()
    idle = {
        "--drop": bool(dropped), "--refinement-feedback": refinement_feedback, "--balance": balance
    }  # fmt: skip
    if refinement_only and any(idle.values()):
        other = next(flag for flag, given in idle.items() if given)
        raise UsageError(
            f"--refinement-only trains no feedback, so {other} would do nothing. Pass one of them."
        )
    if refinement_only and "refinement" not in parts:
        raise UsageError(f"--refinement-only trains no {loss_on}. Leave --loss-on away.")
    if parts == ("feedback",) and dropped == FEEDBACK_FIELDS:
        raise UsageError("--drop leaves nothing of the feedback that --loss-on names.")
    return Targets(parts, dropped, refinement_only, refinement_feedback, balance)


# --- The held-out share ------------------------------------------------------------------------


def is_held_out(prompt: str | list[Message], share: float) -> bool:
    """Whether a prompt's rows are held out from training: about `share` of all prompts are.

    It depends on the prompt's words alone (not their case or spacing). So added rows move no
    other row, and no prompt is on both sides.
    """
    words = [
        turn.model_copy(update={"content": " ".join(turn.content.casefold().split())})
        for turn in as_messages(prompt)
    ]
    digest = hashlib.blake2b(content_id(words).encode(), digest_size=8, person=b"srt eval split")
    return int.from_bytes(digest.digest()) < share * 2**64


def split_rows(
    rows: Sequence[AnyRow], prompt_of: Callable[[AnyRow], str | list[Message]], share: float
) -> tuple[list[AnyRow], list[AnyRow]]:
    """Rows to train on, and rows held out."""
    if not 0 <= share < 1:
        raise UsageError(f"--eval-split {share:g}: give a share of the prompts, from 0 to below 1.")
    held_out = [is_held_out(prompt_of(row), share) for row in rows]
    train = [row for row, held in zip(rows, held_out, strict=True) if not held]
    return train, [row for row, held in zip(rows, held_out, strict=True) if held]


def require_both_sides(train: Sequence[AnyRow], held_out: Sequence[AnyRow], share: float) -> None:
    """Raise `SrtError` when a share should be held out, but one side is empty."""
    rows = len(train) + len(held_out)
    if share and rows and not (train and held_out):
        side, turn = ("hold out", "Raise") if train else ("train on", "Lower")
        raise SrtError(
            f"--eval-split {share:g} of {rows} rows leaves none to {side}. "
            f"{turn} it, or leave it away."
        )


# --- Files, each with its weight ---------------------------------------------------------------


@dataclass(frozen=True)
class WeightedFile:
    """`FILE:WEIGHT`: so many times its rows for `--data`; so many for each feedback row for `--mix`."""

    path: Path
    weight: float


def parse_data(text: str) -> WeightedFile:
    """`FILE` or `FILE:WEIGHT`; raises `UsageError` for a weight that is not above 0."""
    path, weight = _part_weight(text)
    if weight is not None and not 0 < weight < float("inf"):
        raise UsageError(
            f"--data {text}: a weight is a number above 0, e.g. {path}:0.5 for half of its rows."
        )
    return WeightedFile(path, 1.0 if weight is None else weight)


def _part_weight(text: str) -> tuple[Path, float | None]:
    """A file and the weight behind it; a file whose own name ends so is taken at its word."""
    path, _, weight = text.rpartition(":")
    if not path or Path(text).exists():
        return Path(text), None
    try:
        return Path(path), float(weight)
    except ValueError:
        return Path(text), None


@dataclass(frozen=True)
class FeedbackFile:
    """One file of feedback: which of its rows teach, and which fell out."""

    file: WeightedFile
    kept: list[FeedbackRecord]
    fallen: list[Fallen]

    @property
    def read(self) -> int:
        """Rows that were read."""
        return len(self.kept) + len(self.fallen)


def read_feedback(files: Iterable[WeightedFile], limit: int | None) -> list[FeedbackFile]:
    """The rows of every file, in order; `limit` counts over all of them."""
    found: list[FeedbackFile] = []
    for file in files:
        left = None if limit is None else limit - sum(each.read for each in found)
        rows = read_records(file.path, FeedbackRecord.model_validate, limit=left)
        found.append(FeedbackFile(file, *keep_teaching_rows(rows)))
    return found


def data_inputs(files: Sequence[WeightedFile]) -> dict[str, Path]:
    """The files as a manifest names them."""
    return {f"data {n}" if n > 1 else "data": file.path for n, file in enumerate(files, 1)}


def draw_rows(rows: Sequence[AnyRow], count: int, seed: int) -> list[AnyRow]:
    """`count` rows in the order of a seeded shuffle, which starts over when there are fewer."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    return [order[position % len(order)] for position in range(count)]


def by_weight(rows: Sequence[AnyRow], weight: float, seed: int) -> list[AnyRow]:
    """So many times the rows; with weight 1 each once, in its order."""
    if weight == 1 or not rows:
        return list(rows)
    return draw_rows(rows, max(1, round(weight * len(rows))), seed)


# --- Other chats, mixed in ---------------------------------------------------------------------


class Chat(Record):
    """A conversation whose assistant turns are trained."""

    id: str
    messages: list[Message]


def parse_mix(text: str) -> WeightedFile:
    """`FILE:WEIGHT`; raises `UsageError` for another form or a weight that is not above 0."""
    path, weight = _part_weight(text)
    if weight is None or not 0 < weight < float("inf"):
        raise UsageError(
            f"--mix {text}: write FILE:WEIGHT, e.g. chats.jsonl:0.5 for one of its chats to two "
            "feedback rows."
        )
    return WeightedFile(path, weight)


def read_chats(path: Path) -> list[Chat]:
    """Rows with `messages`, or with a prompt and a response, as chats that end with an answer.

    Raises `SrtError` naming file and line of a row without an answer.
    """
    chats = []
    for number, row in read_rows(path):
        try:
            chats.append(_chat(path, number, row))
        except (ValueError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise SrtError(f"{path}:{number}: {reason}. --mix takes chats with answers.") from None
    return chats


def _chat(path: Path, number: int, row: Mapping[str, Any]) -> Chat:
    read = read_row(row)
    prompt = Prompt.of(read)
    if "turns of tools" in read.left_out:
        raise ValueError("turns of tools, which srt does not train")
    turns = row["messages"] if isinstance(row.get("messages"), list) else []
    weights = [turn.get("weight") for turn in turns]
    if "weight" in read.left_out and (not weights or 0 in weights):
        raise ValueError("a turn of weight 0, and every answer would be trained")
    if not prompt.response or not prompt.response.strip():
        raise ValueError("no response, and no assistant's turn at the end")
    answer = Message(role="assistant", content=prompt.response)
    return Chat(id=f"{path.name}:{number}", messages=[*prompt.messages, answer])


# --- What is asked for, beside the options that both stages share ------------------------------


@dataclass(frozen=True)
class SftTask:
    """Stage 1 as its own options describe it, read and checked."""

    data: Sequence[WeightedFile]
    model: str
    targets: Targets
    mixes: Sequence[WeightedFile]
    packing: PackingChoice
    good_score: float
    """From this score on, an answer counts as good."""
    critic_check: int
    """Answers that the tuned model scores at the end."""
    thoughts: Thoughts = "drop"
    compare: bool = False
    """Whether the model also learns to name the better of draft and refinement."""
    verdict_weight: float = 1.0
    """How many times a token that judges weighs in the loss."""


@dataclass(frozen=True)
class DpoTask:
    """Stage 2 as its own options describe it."""

    prefs: Sequence[str]
    model: str
    model_given: bool
    """Whether --model named the model, and not the manifest of the preferences."""
    label_smoothing: str | None
    nll_weight: float
    ld_alpha: float | None
    adapter: Literal["merge", "continue"]


def model_that_wrote(prefs: Sequence[str]) -> str | None:
    """The policy behind preference files; raises `UsageError` where several wrote them."""
    writers = writers_of(prefs)
    if len(set(writers.values())) > 1:
        each = ", ".join(f"{name} of {model}" for name, model in writers.items())
        raise UsageError(f"Several models wrote the preferences ({each}). Pass --model.")
    return next(iter(writers.values()), None)


def refuse_without_weights(model: str, *, given: bool) -> None:
    """Raise `UsageError` for a model that cannot be trained: a program, or one that a server runs.

    A bare name that is `given` is one of the hub's.
    """
    if names_program(model):
        raise UsageError(f"{model}: a program has no weights to train. Pass --model, one that has.")
    if (":" in model or not model.strip() or not given) and parse_spec(model).is_remote:
        raise UsageError(
            f"{model} answers on a server. Pass --model with its weights: a directory, ORG/NAME or "
            "FILE.gguf."
        )


def require_files(paths: Iterable[Path]) -> None:
    """Raise `SrtError` for a file that is not there, before anything slow is loaded."""
    for path in paths:
        if not path.exists() and not is_stream(path):
            next(read_lines(path), None)


def writers_of(prefs: Sequence[str]) -> dict[str, str]:
    """The policy behind each file, where the manifests of the file and of its input tell it."""
    found = {}
    for name in prefs:
        manifest = read_manifest(Path(name))
        if manifest is None or "data" not in manifest.inputs:
            continue
        data = Path(manifest.inputs["data"].path)
        if not data.exists():
            data = Path(name).parent / data.name
        if (model := inherited(data, "model")) is not None:
            found[name] = model
    return found

"""Where prompts come from: files in many formats, stdin, or a dataset on the hub."""

import codecs
import csv
import glob
import hashlib
import io
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import orjson

from srt_cli import console
from srt_cli.errors import SrtError, UsageError
from srt_cli.forms import ANSWERS, FieldNames, RowAsRead, read_row
from srt_cli.options import SIDE_FILES
from srt_cli.records import Message, Prompt
from srt_cli.runs.jsonl import (
    is_stream,
    lines_of,
    naming_row,
    not_utf8,
    open_bytes,
    parse_lines,
    read_rows,
    refuse_deep,
)
from srt_cli.stats.hygiene import plain_form
from srt_cli.tables import many

HUB_PREFIX: Final = "hf:"
FORMATS: Final = {
    ".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSON", ".csv": "CSV", ".tsv": "CSV",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
DELIMITERS: Final = {",": "commas", ";": "semicolons", "\t": "tabs"}
COMPRESSED: Final = (".gz", ".zst")
NOTES: Final = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
"""What `datasets` keeps beside its shards."""
ROWS_AT_ONCE: Final = 1000
MAX_CELL: Final = 2**30
MOST_BEFORE: Final = 20
"""Lines in which a table's header is looked for."""
LINE_END: Final = re.compile(r"\r\n|\r|\n")

NumberedRow = tuple[str, int, Mapping[str, Any]]
"""The name of a file, the number of a row in it, and the row."""


@dataclass(frozen=True)
class Selection:
    """What is asked of the rows of a `--prompts`."""

    names: FieldNames = FieldNames()
    limit: int | None = None
    unique: bool = False
    """Whether a prompt that was there before is left out."""


@dataclass(frozen=True)
class PromptSource:
    """Prompts that were read once already, so that bad input is reported before any work."""

    count: int
    without_response: int
    inputs: Mapping[str, Path]
    """The files, for the manifest; empty when the prompts are not files."""
    read: Callable[[], Iterator[Prompt]]
    recognised: str | None
    """What the rows were taken for; None for a JSONL file of ours, in which nothing stands out."""
    answers: str | None = None
    """A field that may hold the responses, where rows have none by that name."""

    def tell(self) -> None:
        """Say what was recognised, if anything is to be said."""
        if self.recognised is not None:
            console.say(self.recognised)


def prompts_from(location: str, selection: Selection) -> PromptSource:
    """Open a `--prompts`: a file, a folder, a glob, `-` for stdin, or `hf:NAME[:SPLIT]`.

    Files are read again for the run itself; what comes through a pipe is held in memory.
    """
    rows, files = rows_at(location)
    survey = _Survey()
    for position, (name, number, row) in enumerate(rows()):
        if survey.is_full(selection.limit):
            break
        read, prompt = _prompt_of(name, number, row, selection.names)
        if not survey.take(position, read, prompt, unique=selection.unique):
            first = _first_with(rows(), prompt.id, selection.names)
            raise _repeated_id(first, (name, number, row), read, prompt)

    def again() -> Iterator[Prompt]:
        taken = 0
        for position, (name, number, row) in enumerate(rows()):
            if selection.limit is not None and taken >= selection.limit:
                return
            if position not in survey.dropped:
                taken += 1
                yield _prompt_of(name, number, row, selection.names)[1]

    inputs = {"prompts": files[0]} if len(files) == 1 else {}
    if len(files) > 1:
        inputs = {f"prompts {number}": file for number, file in enumerate(files, start=1)}
    survey.empty = len(rows.empty)
    said = survey.sentence(location, files, unique=selection.unique)
    return PromptSource(survey.count, survey.without_response, inputs, again, said, survey.answers)


@dataclass(frozen=True)
class System:
    """A system turn that stands before every prompt which has none of its own."""

    turn: Message | None
    file: Path | None

    def before(self, prompt: Prompt) -> Prompt:
        """The prompt as a model is asked it."""
        turns = prompt.messages
        if self.turn is None or any(each.role == "system" for each in turns):
            return prompt
        return prompt.model_copy(update={"prompt": [self.turn, *turns]})

    @property
    def inputs(self) -> dict[str, Path]:
        """The file that holds it, as an input of the run."""
        return {} if self.file is None else {"system": self.file}


def read_system(system: str | None) -> System:
    """A `--system`: a text, or a file of one; raises `SrtError` for one that is empty or no UTF-8."""
    if system is None:
        return System(None, None)
    # A name has one line and at most 255 characters, so longer texts are no file's.
    file = Path(system) if len(system) < 256 and "\n" not in system else None
    file = file if file is not None and file.is_file() else None
    try:
        text = (file.read_text(encoding="utf-8-sig") if file is not None else system).strip()
    except UnicodeDecodeError as error:
        raise SrtError(f"--system {system}: {not_utf8(error)}") from None
    if not text:
        raise SrtError(f"--system {system}: is empty. Leave it out, or give a text or a file.")
    return System(Message(role="system", content=text), file)


def with_system(source: PromptSource, system: str | None) -> PromptSource:
    """Prompts behind the system turn of `--system`."""
    told = read_system(system)
    read = source.read
    inputs = {**source.inputs, **told.inputs}
    return replace(source, inputs=inputs, read=lambda: map(told.before, read()))


def read_prompts(location: str) -> Iterator[Prompt]:
    """Prompts of a file, folder or glob; raises `SrtError` for a repeated id."""
    yield from prompts_from(location, Selection()).read()


@dataclass
class RowSource:
    """What reads the rows of a location from the beginning, as often as it is called."""

    read: Callable[[list[int]], Iterable[NumberedRow]]
    empty: list[int] = field(default_factory=list)
    """The numbers of empty rows, which spreadsheets leave behind, in the last reading so far."""

    def __call__(self) -> Iterable[NumberedRow]:
        self.empty.clear()
        return self.read(self.empty)


def rows_at(location: str) -> tuple[RowSource, list[Path]]:
    """What reads the rows from the beginning, and the files that they are in."""
    if location.startswith(HUB_PREFIX):
        from srt_cli.models.hub import open_hub_rows

        name, _, split = location.removeprefix(HUB_PREFIX).partition(":")
        if not name:
            raise UsageError(f"{location}: which dataset? Write hf:NAME or hf:NAME:SPLIT.")
        shared = open_hub_rows(name, split or "train")
        return RowSource(
            lambda _: ((location, n, row) for n, row in enumerate(shared, start=1))
        ), []
    path = Path(location)
    if is_stream(path):
        # Stdin, or what a shell makes of <(COMMAND): it can be read only once.
        held = [(location, number, row) for number, row in _read_stream(path)]
        return RowSource(lambda _: held), []
    files = find_files(location)
    return (
        RowSource(
            lambda empty: ((str(f), n, row) for f in files for n, row in read_file(f, empty))
        ),
        files,
    )


def _read_stream(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSONL, or one JSON array, through a pipe."""
    with open_bytes(path) as file:
        lines = lines_of(file)
        begins: list[bytes] = []
        for line in lines:
            begins.append(line)
            if line.strip():
                break
        if _is_array(b"".join(begins)):
            yield from _parse_array(path, b"".join([*begins, file.read()]))
        else:
            yield from parse_lines(path, chain(begins, lines))


def _prompt_of(
    name: str, number: int, row: Mapping[str, Any], names: FieldNames
) -> tuple[RowAsRead, Prompt]:
    with naming_row(name, number):
        read = read_row(row, names)
        return read, Prompt.of(read)


def names_of(prompts: Iterable[Prompt]) -> Callable[[Prompt], list[str]]:
    """What tells the plain texts by which others may name one of these prompts.

    That without a system turn is one of them where no other prompt has the same.
    """
    counts = Counter(hash(plain_form(prompt.texts[-1])) for prompt in prompts)

    def names(prompt: Prompt) -> list[str]:
        texts = [plain_form(text) for text in prompt.texts]
        return texts if counts[hash(texts[-1])] == 1 else texts[:1]

    return names


class _Survey:
    """What the rows are, counted in the first reading; eight bytes of each are kept to compare."""

    def __init__(self) -> None:
        self.count = 0
        self.without_response = 0
        self.repeated = 0
        self.empty = 0
        self.answers: str | None = None
        self.dropped: set[int] = set()
        """Positions of the rows that repeat a prompt, where each is wanted once."""
        self._forms: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._ids: set[bytes] = set()
        self._texts: set[bytes] = set()

    def is_full(self, limit: int | None) -> bool:
        return limit is not None and self.count >= limit

    def take(self, position: int, read: RowAsRead, prompt: Prompt, *, unique: bool) -> bool:
        """Count one row; False when its id was there before."""
        text = _short("\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in prompt.messages))
        known, size = _short(prompt.id), len(self._texts)
        self._texts.add(text)
        if len(self._texts) == size:
            self.repeated += 1
            if unique:
                self.dropped.add(position)
                return True
        if known in self._ids:
            return False
        self._ids.add(known)
        self.count += 1
        self.without_response += prompt.response is None
        if prompt.response is None and self.answers is None:
            self.answers = next((name for name in ANSWERS if read.rest.get(name)), None)
        self._forms[read.form] += 1
        self._left_out.update(read.left_out)
        return True

    def sentence(self, location: str, files: list[Path], *, unique: bool) -> str | None:
        """What was recognised, in one line."""
        where = files_in_words(files)
        if (
            not where
            and self._forms.keys() <= {"prompt"}
            and not self._left_out
            and not self.repeated
            and not self.empty
        ):
            return None
        forms = " and ".join(
            f"{form} ({count:,})" if len(self._forms) > 1 else form
            for form, count in self._forms.most_common()
        )
        said = f"{location}: {many(self.count, 'prompt')}{where}, read as {forms}"
        if self._left_out:
            left_out = ", ".join(
                f"{name} ({many(n, 'row')})" for name, n in self._left_out.most_common()
            )
            said += f"; left out of the chats: {left_out}"
        if self.repeated:
            done = ", left out" if unique else " (--unique leaves them out)"
            said += f"; {many(self.repeated, 'row')} with an earlier prompt{done}"
        if self.empty:
            said += f"; {many(self.empty, 'empty row')} left out"
        return said + "."


def _short(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _first_with(
    rows: Iterable[NumberedRow], identifier: str, names: FieldNames
) -> tuple[str, int, Prompt]:
    """Where an id stood first, and its prompt."""
    return next(
        (name, number, prompt)
        for name, number, row in rows
        if (prompt := _prompt_of(name, number, row, names)[1]).id == identifier
    )


def _repeated_id(
    first: tuple[str, int, Prompt], place: NumberedRow, read: RowAsRead, prompt: Prompt
) -> SrtError:
    """The error for an id that stands twice, or a prompt without an id that does."""
    (first_name, line, before), (name, number, _) = first, place
    where = f"on line {line}" if first_name == name else f"in {first_name}, line {line}"
    if read.id is not None or before.messages != prompt.messages:
        told = f"id {prompt.id!r} is already {where}. Give each row its own id, or pass "
        told += "--unique where the same prompt stands several times."
    else:
        other = ", with another response" if before.response != prompt.response else ""
        told = (
            f"this prompt is already {where}{other}. Give each row an id of its own to keep both, "
        )
        told += "or pass --unique to keep the first."
    return SrtError(f"{name}:{number}: {told}")


# --- Files as others write them ----------------------------------------------------------------


def format_of(path: Path) -> str | None:
    """The format that a file's name tells, without `.gz` or `.zst`; None for another name."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return FORMATS.get(Path(name).suffix)


def find_files(location: str) -> list[Path]:
    """The files that a path, a folder of shards or a glob stands for, sorted.

    Raises `SrtError` for a folder without data or with several formats, and a glob without a match.
    """
    path = Path(location)
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if _is_shard(file, path)]
        if not found:
            raise SrtError(
                f"{location}: is a directory, where a JSONL file is expected, or a folder of data "
                f"files ({', '.join(FORMATS)})."
            )
        _refuse_splits(path, found)
        formats = {format_of(file): file.name for file in found}
        if len(formats) > 1:
            raise SrtError(
                f"{location}: holds several formats ({', '.join(formats.values())}). Pass a glob of "
                f"those that you mean: '{location}/*{found[0].suffix}'."
            )
        return found
    if path.exists() or not glob.has_magic(location):
        return [path]
    matched = sorted(Path(name) for name in glob.glob(location, recursive=True))
    files = [file for file in matched if not file.is_dir() and not file.name.endswith(SIDE_FILES)]
    if not files:
        raise SrtError(f"{location}: no file has such a name. Check the path.")
    return files


_SPLIT: Final = re.compile(
    r"(?:^|[^a-z])(train|training|validation|valid|val|dev|test|testing|eval|evaluation)(?![a-z])",
    re.IGNORECASE,
)
_SHARD: Final = re.compile(r"(.+?)-\d{5}-of-\d{5}")


def _refuse_splits(folder: Path, files: Sequence[Path]) -> None:
    """Raise `SrtError` where a folder holds several splits: what is held out must not be trained on."""
    is_dict = (folder / "dataset_dict.json").is_file()
    places: dict[str, str] = {}
    for file in files:
        inside = file.relative_to(folder).parts
        split, depth = (inside[0], 0) if is_dict else _split_of(inside)
        beside = file.parent / f"*{split}*{file.suffix}"
        alone = folder.joinpath(*inside[: depth + 1]) if depth < len(inside) - 1 else beside
        places.setdefault(split, str(alone))
    named = sorted(filter(None, places), key=lambda split: not split.lower().startswith("train"))
    held_out = [split for split in named if not split.lower().startswith("train")]
    if len(named) > 1 or (held_out and "" in places):
        shown = ", ".join(named) + (" and others" if "" in places else "")
        raise SrtError(
            f"{folder}: holds several splits ({shown}). Pass one, such as "
            f"{shlex.quote(places[named[0]])}, or a glob of all that you mean."
        )


def _split_of(inside: Sequence[str]) -> tuple[str, int]:
    """The split that a part of a file's path tells, as `datasets` reads names, and which part.

    An empty split where none does.
    """
    for depth, part in enumerate(inside):
        if found := _SPLIT.search(part):
            shard = _SHARD.match(part)
            return (shard or found)[1], depth
    return "", 0


def files_in_words(files: Sequence[Path]) -> str:
    """How many files of which format, e.g. " in 3 parquet files"; nothing for one of JSONL."""
    formats = sorted({format_of(file) or "JSONL" for file in files})
    if len(files) <= 1 and formats in ([], ["JSONL"]):
        return ""
    details = sorted({detail for file in files for detail in _details_of(file)})
    named = " and ".join(formats)
    article = "an" if named == "arrow" else "a"
    told = f" in {article} {named} file" if len(files) == 1 else f" in {len(files)} {named} files"
    return f"{told} ({', '.join(details)})" if details else told


def _details_of(file: Path) -> Iterator[str]:
    """What is not as the name of a file has it."""
    if format_of(file) == "CSV" and (found := _header_of(file)[0]) != _named_delimiter(file):
        yield f"its columns parted by {DELIMITERS[found]}"


def _is_shard(file: Path, folder: Path) -> bool:
    inside = file.relative_to(folder).parts
    hidden = any(part.startswith(".") for part in inside)
    noted = file.name in NOTES or file.name.endswith(SIDE_FILES)
    return file.is_file() and format_of(file) is not None and not hidden and not noted


def read_file(path: Path, empty: list[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or row number, row) from one file in any of the formats, a stretch at a time.

    Only a JSON array is read whole. The numbers of empty rows are added to `empty`. Raises
    `SrtError` naming the file and the place.
    """
    kind = format_of(path)
    if not path.is_file() or kind in (None, "JSONL"):
        yield from read_rows(path)
    elif kind == "JSON":
        yield from _read_json(path)
    elif kind == "CSV":
        yield from _read_csv(path, [] if empty is None else empty)
    else:
        yield from _read_table(path, kind)


def _is_array(begins: bytes) -> bool:
    return begins.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_bytes(path) as file:
        begins = file.read(64)
    if not _is_array(begins):
        yield from read_rows(path)
        return
    with open_bytes(path) as file:
        content = file.read()
    yield from _parse_array(path, content)


def _parse_array(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = orjson.loads(content.removeprefix(codecs.BOM_UTF8))
    except orjson.JSONDecodeError as error:
        _refuse_not_utf8(path, content.split(b"\n"))
        raise SrtError(f"{path}: not valid JSON ({error.msg}, line {error.lineno}).") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise SrtError(f"{path}:{number}: not a JSON object.")
        refuse_deep(row, f"{path}:{number}")
        yield number, row
    if not rows:
        raise SrtError(f"{path}: the file is empty.")


def _named_delimiter(path: Path) -> str:
    return "\t" if ".tsv" in path.suffixes else ","


def _header_of(path: Path) -> tuple[str, int]:
    """What parts the columns, and how many lines stand before the header.

    It is as the name has it, unless the header has only another of them, or Excel's `sep=;` names it.
    """
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
        lines = [line.strip("\r\n") for line in islice(text, MOST_BEFORE)]
    before = next((n for n, line in enumerate(lines) if line.strip()), 0)
    header = lines[before] if lines else ""
    if header[:4].lower() == "sep=" and header[4:] in DELIMITERS:
        return header[4:], before + 1
    counts = {each: len(next(csv.reader([header], delimiter=each), [])) for each in DELIMITERS}
    named = _named_delimiter(path)
    best = max(counts, key=lambda each: (counts[each], each == named))
    return (named if counts[named] > 1 else best), before


def _read_csv(path: Path, empty: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by the names in the header; an empty cell is None."""
    csv.field_size_limit(MAX_CELL)
    delimiter, before = _header_of(path)
    number, end = 0, before
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        try:
            for _ in range(before):
                text.readline()
            reader = csv.DictReader(text, delimiter=delimiter, strict=True)
            if reader.fieldnames:
                end = before + reader.line_num
            for row in reader:
                end = before + reader.line_num
                surplus = row.pop(None, [])
                cells = [*filter(None, row.values()), *surplus]
                number = end - sum(len(LINE_END.findall(cell)) for cell in cells)
                if any(surplus):
                    raise SrtError(
                        f"{path}:{number}: has more cells than the header. Quote texts that hold "
                        f"{delimiter!r}."
                    )
                if any(value and value.strip() for value in row.values()):
                    yield number, {name: value or None for name, value in row.items()}
                else:
                    empty.append(number)
        except UnicodeDecodeError:  # some lines ahead
            with open_bytes(path) as again:
                _refuse_not_utf8(path, lines_of(again))
            raise
        except csv.Error as error:
            raise SrtError(
                f"{path}:{end + 1}: not valid CSV in the row that begins here ({error})."
            ) from None
    if not number:
        raise SrtError(f"{path}: the file is empty. It needs a header and rows.")


def _refuse_not_utf8(path: Path, lines: Iterable[bytes]) -> None:
    """Raise `SrtError` that names the first line which is not UTF-8."""
    for number, line in enumerate(lines, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SrtError(f"{path}:{number}: {not_utf8(error)}") from None


def _read_table(path: Path, kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    from pyarrow import ipc, parquet

    number = 0
    try:
        with pyarrow.memory_map(str(path)) as file:
            if kind == "parquet":
                batches = parquet.ParquetFile(file).iter_batches(batch_size=ROWS_AT_ONCE)
            else:
                try:
                    opened = ipc.open_file(file)
                    batches = (opened.get_batch(n) for n in range(opened.num_record_batches))
                except pyarrow.ArrowInvalid:  # the other layout, which `datasets` writes
                    file.seek(0)
                    batches = iter(ipc.open_stream(file))
            for batch in batches:
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                    for row in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                        number += 1
                        yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise SrtError(f"{path}: not a readable {kind} file ({reason}).") from error

"""Where prompts come from: a JSONL file, stdin, or a dataset on the hub."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from srt_cli.errors import SrtError, UsageError
from srt_cli.records import Message, Prompt
from srt_cli.runs.jsonl import describe_invalid, read_rows

HUB_PREFIX: Final = "hf:"


@dataclass(frozen=True)
class PromptSource:
    """Prompts that were read once already, so that bad input is reported before any work."""

    count: int
    without_response: int
    inputs: Mapping[str, Path]
    """The file, for the manifest; empty when the prompts are not a file."""
    read: Callable[[], Iterator[Prompt]]


def prompts_from(location: str, prompt_field: str | None, limit: int | None) -> PromptSource:
    """Open a `--prompts`: a path, `-` for stdin, or `hf:NAME[:SPLIT]`.

    A file is read again for the run itself; the others are held in memory.
    """
    if location == "-" or location.startswith(HUB_PREFIX):
        rows = list(_numbered_rows(location))
        inputs: dict[str, Path] = {}

        def read() -> Iterator[Prompt]:
            return read_prompts(location, rows, prompt_field, limit)
    else:
        path = Path(location)
        inputs = {"prompts": path}

        def read() -> Iterator[Prompt]:
            return read_prompts(location, read_rows(path), prompt_field, limit)

    count = without_response = 0
    for prompt in read():
        count += 1
        without_response += prompt.response is None
    return PromptSource(count, without_response, inputs, read)


def with_system(source: PromptSource, system: str | None) -> PromptSource:
    """Put a system turn before every prompt that has none of its own: a text, or a file of one.

    Raises `SrtError` for an empty one.
    """
    if system is None:
        return source
    # A name has one line and at most 255 characters, so longer texts are no file's.
    file = Path(system) if len(system) < 256 and "\n" not in system else None
    is_file = file is not None and file.is_file()
    text = (file.read_text(encoding="utf-8-sig") if file and is_file else system).strip()
    if not text:
        raise SrtError(f"--system {system}: is empty. Leave it out, or give a text or a file.")
    turn = Message(role="system", content=text)

    def read() -> Iterator[Prompt]:
        for prompt in source.read():
            turns = prompt.messages
            own = any(each.role == "system" for each in turns)
            yield prompt if own else prompt.model_copy(update={"prompt": [turn, *turns]})

    inputs = {**source.inputs, "system": file} if file and is_file else source.inputs
    return replace(source, inputs=inputs, read=read)


def _numbered_rows(location: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if location == "-":
        yield from read_rows(Path("-"))
        return
    from srt_cli.models.hub import read_hub_rows

    name, _, split = location.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise UsageError(f"{location}: which dataset? Write hf:NAME or hf:NAME:SPLIT.")
    for number, row in enumerate(read_hub_rows(name, split or "train"), start=1):
        yield number, dict(row)


def read_prompts(
    name: str,
    rows: Iterable[tuple[int, dict[str, Any]]],
    prompt_field: str | None = None,
    limit: int | None = None,
) -> Iterator[Prompt]:
    """Read numbered rows as prompts; `SrtError` for a repeated id, since later files go by it."""
    first_line: dict[str, int] = {}
    for number, row in rows:
        if limit is not None and len(first_line) >= limit:
            return
        try:
            prompt = Prompt.from_row(row, prompt_field)
        except ValidationError as error:
            raise SrtError(f"{name}:{number}: {describe_invalid(error)}") from None
        except ValueError as error:
            raise SrtError(f"{name}:{number}: {error}.") from None
        if prompt.id in first_line:
            raise SrtError(
                f"{name}:{number}: id {prompt.id!r} is already on line {first_line[prompt.id]}. "
                "Give each row its own id, or delete the duplicate."
            )
        first_line[prompt.id] = number
        yield prompt

"""The help pages: a command's common options under headings, and on request all of them.

They are laid out here, in plain text: Typer's panels alone take longer than all of `srt --help` may,
they wrap the examples, and an option of one line takes them three.
"""

import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args, get_origin

from srt_cli.options import (
    GROUPS,
    choices_of,
    flag_of,
    group_of,
    is_common,
    is_own,
    knob_of,
    without_none,
)

WIDEST: Final = 100
NAMES: Final = 30
"""Columns for an option's name; the text of a longer name begins on the next line."""
LONGEST_CHOICES: Final = 36
"""Choices that take more characters stand in the text, not behind the name."""
COMMANDS: Final = 24
INDENT: Final = 4
"""Of a text that stands below its name, in a terminal too narrow for both."""
NARROWEST: Final = 16
"""Of a column of text."""
EXAMPLES: Final = 2
"""So many stand on the short page, all on the long one."""


class Entry(NamedTuple):
    """An option or a command, and what is said of it."""

    name: str
    text: str


CONFIG: Final = Entry(
    "--config FILE", "Presets: a TOML file, or the run.json of an earlier run. Flags win."
)
HELP: Final = (
    Entry("-h, --help", "Show the common options."),
    Entry("--help-all", "Show every option."),
)


def command_page(command: str, options_class: type[Any], *, everything: bool) -> str:
    """The help of one command, as wide as the terminal, at most `WIDEST` columns."""
    width = _width()
    story, examples = _story_and_examples(options_class)
    groups: dict[str, list[Entry]] = {group: [] for group in GROUPS}
    # What a person needs first; among equals, a stage's own options before those that it shares.
    listed = {
        field: (not is_common(options_class, field), not is_own(options_class, field))
        for field in fields(options_class)
    }
    for field in sorted(listed, key=lambda field: listed[field]):
        if everything or is_common(options_class, field):
            groups[group_of(options_class, field)].append(_entry(field))
    groups["Run"].append(CONFIG)
    lines = [*_wrapped(story if everything else story[:1], width)]
    lines += [_heading("Examples"), *_indented(examples[: None if everything else EXAMPLES])]
    for group, entries in groups.items():
        if entries:
            lines += [_heading(group), *_listed(entries, width), ""]
    if everything:
        lines += [_heading("Help"), *_listed(HELP, width)]
    else:
        count = len(fields(options_class)) + 1
        lines.append(f"All {count} options: srt {command} --help-all")
    return "\n".join(lines)


def app_page(story: str, parts: Iterable[tuple[str, Sequence[Entry]]]) -> str:
    """The help of `srt` itself: what it does, and its commands and options under their headings."""
    width = _width()
    lines = [*_wrapped(story.split("\n\n"), width)]
    for heading, entries in parts:
        lines += [_heading(heading), *_listed(entries, width, COMMANDS), ""]
    return "\n".join([*lines, "A command's examples and options: srt COMMAND --help"])


def _story_and_examples(options_class: type[Any]) -> tuple[list[str], list[str]]:
    """The paragraphs of the class's docstring, and the examples that close it."""
    story, _, examples = (inspect.getdoc(options_class) or "").partition("\nExamples:\n")
    return story.strip().split("\n\n"), textwrap.dedent(examples).strip().split("\n\n")


def _entry(field: Field[Any]) -> Entry:
    """An option as it is listed: its name with what it takes, its text with its default."""
    knob, flag, taken = knob_of(field), flag_of(field), without_none(field.type)
    text, value = knob.help, knob.metavar
    if taken is bool:
        return Entry(f"--[no-]{flag[2:]}" if field.default else flag, text)
    if value is None and (choices := choices_of(field.type)):
        value = "|".join(choices)
        if len(value) > LONGEST_CHOICES:
            value, text = "NAME", f"{text} One of {', '.join(choices)}."
    if value is None:
        item = get_args(taken)[0] if get_origin(taken) is tuple else taken
        value = {int: "N", float: "X", Path: "FILE"}.get(item, "TEXT")
    default = knob.otherwise or _shown(field.default)
    return Entry(f"{flag} {value}", f"{text} [default: {default}]" if default else text)


def _shown(default: Any) -> str:
    if default is None:
        return ""
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _listed(entries: Iterable[Entry], width: int, names: int = NAMES) -> Iterator[str]:
    """Names on the left, texts on the right; or below, where there is no room."""
    if width < names + NARROWEST:
        names = INDENT
    for name, text in entries:
        left = f"  {name}"
        lines = _fill(text, width - names)
        if len(left) > names - 2:
            yield left
            left = ""
        yield left.ljust(names) + lines[0]
        yield from (" " * names + line for line in lines[1:])


def _wrapped(paragraphs: Iterable[str], width: int) -> Iterator[str]:
    for paragraph in paragraphs:
        yield from _fill(" ".join(paragraph.split()), width)
        yield ""


def _fill(text: str, width: int) -> list[str]:
    """Lines of at most `width`; a default in brackets stays whole where a line can hold it."""
    glued = re.sub(r"\[default: [^\]]{,40}\]", lambda found: found[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(glued, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def _indented(examples: Iterable[str]) -> Iterator[str]:
    for example in examples:
        yield from (f"  {line}" for line in example.splitlines())
    yield ""


def _heading(text: str) -> str:
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return text if plain else f"\033[1m{text}\033[0m"


def _width() -> int:
    columns = shutil.get_terminal_size((80, 24)).columns
    return max(INDENT + NARROWEST, min(WIDEST, columns))

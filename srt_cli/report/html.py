"""What every page has: one self-contained file from a template, every text escaped, nothing loaded.

The templates lie in `templates/`: `page.html` is the shell of all pages, `parts.html` holds what several
of them show (warnings, tables, histograms).
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import srt_cli
from srt_cli.runs.jsonl import write_atomically

if TYPE_CHECKING:
    from jinja2 import Environment


def write_page(path: Path, template: str, values: Mapping[str, object]) -> None:
    """Write a page from a template of this package."""
    page = _environment().get_template(template).render(values, version=srt_cli.__version__)
    write_atomically(path, page.encode("utf-8", errors="replace"))


def part(template: str, macro: str, *arguments: object) -> str:
    """What a macro makes of its arguments: markup, which templates take as it is."""
    made: str = getattr(_environment().get_template(template).module, macro)(*arguments)
    return made


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("srt_cli.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

"""What every page has: one self-contained file, its style inside, nothing loaded from anywhere."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from srt_cli.artifacts import write_atomically


def write_page(path: Path, title: str, body: str, program: str = "") -> None:
    """Write a page around `body`, whose texts are escaped already."""
    style = files("srt_cli.report").joinpath("page.css").read_text(encoding="utf-8")
    script = f"<script>{program}</script>" if program else ""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing may be loaded, whatever a model wrote.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">"
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{body}</main>{script}</body></html>\n"
    )
    write_atomically(path, page.encode("utf-8", errors="replace"))


def html_table(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table with its title; every cell is escaped."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells
    )
    return (
        f'<h3>{escape(title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )

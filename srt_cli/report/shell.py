"""What every page has: one self-contained file, its style inside, nothing loaded from anywhere."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from srt_cli.runs.jsonl import write_atomically
from srt_cli.tables import Table


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
    # Columns without a head hold names, the others figures.
    names = sum(not column for column in columns) or 1

    def cells_of(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=name' if place < names else ''}>{escape(cell)}</{tag}>"
            for place, cell in enumerate(row)
        )

    head = cells_of("th", columns)
    lines = "".join(f"<tr>{cells_of('td', row)}</tr>" for row in cells)
    return (
        f'<h3>{escape(title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def write_markdown(path: Path, tables: Sequence[Table], notes: Sequence[str]) -> None:
    """The tables as Markdown, for a pull request or a model card."""
    parts = []
    for table in tables:
        lines = [table.columns, ["---"] * len(table.columns), *table.cells]
        rows = (
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
        parts.append(f"### {table.title}\n\n" + "\n".join(rows))
    text = "\n\n".join([*parts, *notes]) + "\n"
    write_atomically(path, text.encode("utf-8", errors="replace"))

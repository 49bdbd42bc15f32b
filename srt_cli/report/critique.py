"""A page on which a person writes critiques: weaknesses, suggestions, a score, an improved response."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from srt_cli.records import MAX_SCORE, MIN_SCORE, Prompt
from srt_cli.report.html import write_page


class PageRow(NamedTuple):
    """A prompt and the response that is criticised, and who wrote that."""

    prompt: Prompt
    response: str
    policy: str


def write_critique_page(path: Path, rows: Sequence[PageRow]) -> str:
    """Write the page for these rows, in their order; the name of the file that it saves.

    What it saves is one critique a line, with the prompt and the response that it is about.
    """
    shown = [
        {
            "row": {**row.prompt.model_dump(mode="json", include={"id", "prompt"}),
                    "response": row.response, "policy": row.policy},
            "prompt": row.prompt.text,
        }
        for row in rows
    ]  # fmt: skip
    whole = json.dumps(shown, ensure_ascii=False, sort_keys=True)
    file = f"{path.stem}.critiques.jsonl"
    data = {
        # Other rows are another page: its critiques are kept apart.
        "page": hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest(),
        "file": file,
        "rows": shown,
    }
    scores = list(range(MIN_SCORE, MAX_SCORE + 1))
    write_page(
        path, "critique.html", {"title": "srt: write critiques", "data": data, "scores": scores}
    )
    return file

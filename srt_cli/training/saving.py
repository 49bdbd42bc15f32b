"""A trained model as a directory that stands alone, and is never there by half."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srt_cli.models.chat import end_of_turn_id
from srt_cli.models.weights import generation_config_for

HALF: Final = "half-saved"
LAST: Final = "config.json"


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, card: str
) -> None:
    """Write weights, tokenizer, chat template, generation config and model card into `out`.

    Files are written aside and renamed in, `config.json` last: without it a directory is no model.
    """
    half = out / HALF
    shutil.rmtree(half, ignore_errors=True)
    model.generation_config = generation_config_for(
        tokenizer, end_of_turn_id(tokenizer), model.generation_config
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(half)
    tokenizer.save_pretrained(half)
    (half / "README.md").write_text(card, encoding="utf-8")
    for file in sorted(half.iterdir(), key=lambda path: path.name == LAST):
        os.replace(file, out / file.name)
    half.rmdir()


def model_card(title: str, facts: dict[str, Any]) -> str:
    """A short model card: what this is, from what, by which settings."""
    lines = [f"# {title}", "", "Made by `srt` (Self-Refinement Tuning, arXiv 2406.07168).", ""]
    lines += [f"- {name}: {json.dumps(value) if not isinstance(value, str) else value}"
              for name, value in facts.items()]  # fmt: skip
    return "\n".join([*lines, "", "Settings, data digests and figures: `run.json`.", ""])

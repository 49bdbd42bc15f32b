"""A trained model as a directory that stands alone, and is never there by half."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srt_cli.models.chat import end_of_turn_id
from srt_cli.models.weights import ADAPTER_CONFIG, generation_config_for
from srt_cli.runs.run import Run
from srt_cli.training.loop import Trained
from srt_cli.training.options import TrainingOptions

HALF: Final = "half-saved"
LAST: Final = ("config.json", ADAPTER_CONFIG)


def save_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, out: Path, card: str
) -> None:
    """Write weights, tokenizer, chat template, generation config and model card into `out`.

    Of a model with an adapter, the adapter alone. Files are written aside and renamed in,
    `config.json` (`adapter_config.json`) last: without it a directory is no model.
    """
    half = out / HALF
    shutil.rmtree(half, ignore_errors=True)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.generation_config = generation_config_for(
        tokenizer, end_of_turn_id(tokenizer), base.generation_config
    )
    base.config.pad_token_id = tokenizer.pad_token_id
    try:
        model.save_pretrained(str(half))
        if isinstance(model, PeftModel):
            base.generation_config.save_pretrained(half)
        tokenizer.save_pretrained(half)
        (half / "README.md").write_text(card, encoding="utf-8")
        for file in sorted(half.iterdir(), key=lambda path: path.name in LAST):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def model_card(
    title: str,
    model_name: str,
    run: Run,
    options: TrainingOptions,
    trained: Trained,
    facts: dict[str, Any],
) -> str:
    """A model card: what this is, made from what, by which settings, with which figures."""
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if not Path(model_name).exists():
        front["base_model"] = model_name.removeprefix("hf:")
    if options.method != "full" and not options.merge:
        front["library_name"] = "peft"
    data = {
        name: f"{file.path} (sha256 {(file.sha256 or '')[:16]}, {file.rows} rows)"
        for name, file in run.manifest.inputs.items()
    }
    figures: dict[str, Any] = {
        "steps": trained.steps,
        "loss, first to final step": f"{_figure(trained.first_loss)} to {_figure(trained.final_loss)}",
        "tokens": f"{trained.tokens} ({trained.trained_tokens} trained)",
    }
    if trained.best_step is not None:
        figures["weights kept"] = (
            f"those of step {trained.best_step}, validation loss {_figure(trained.best_eval_loss)}"
        )
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in front.items())]
    lines += ["tags:", "- srt", "- self-refinement-tuning", f"- {run.manifest.command}", "---", ""]
    lines += [f"# {title}", "", "Made by `srt` (Self-Refinement Tuning, arXiv 2406.07168).", ""]
    lines += [
        f"- {name}: {_in_one_line(value)}" for name, value in (facts | data | figures).items()
    ]
    return "\n".join([*lines, "", "Settings, data digests and figures: `run.json`.", ""])


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _in_one_line(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split())

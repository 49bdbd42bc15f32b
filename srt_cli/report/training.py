"""A page about a training: curves, warnings, and what the model answered on the way."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from srt_cli.report.html import Curve, line_plot, write_page
from srt_cli.runs.run import Manifest
from srt_cli.tables import Table

PAGE: Final = "training.html"
Records = Sequence[Mapping[str, Any]]
Plot = tuple[str, str, str]
"""Title, note, and the plot, "" where there is nothing to show."""

# Title, what to read off, the metrics with their names, whether they are shares.
PLOTS: Final = (
    ("Loss", "Of each step's rows, before the step.", {"loss": "training"}, False),
    ("Rewards", "Beta times the log-prob gained over the reference; the margin should grow.",
     {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"}, False),
    ("Reward accuracy", "Share of pairs whose chosen answer gained more; half is chance.",
     {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"}, True),
    ("Log-prob of the answers", "If both fall, the model is unlearning what it was shown.",
     {"logps/chosen": "chosen", "logps/rejected": "rejected"}, False),
    ("Learning rate", "", {"learning_rate": "learning rate"}, False),
    ("Gradient norm", "Before clipping.", {"grad_norm": "gradient norm"}, False),
    ("Tokens a second", "Training alone: evaluations, samples and checkpoints are left out.",
     {"tokens_per_second": "all tokens"}, False),
)  # fmt: skip


def write_training_page(directory: Path, manifest: Manifest) -> None:
    """Write `training.html` from `metrics.jsonl`, `samples.jsonl` and the manifest."""
    metrics = _read(directory / "metrics.jsonl")
    samples = _read(directory / "samples.jsonl")
    if not metrics:
        return
    curves = [_plot(*plot, metrics) for plot in PLOTS]
    facts = [str(manifest.settings.get("model")), str(manifest.settings.get("method"))]
    facts += [f"{name} {file.path}" for name, file in manifest.inputs.items()]
    facts += [manifest.progress or ""]
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        prompt = "\n\n".join(turn["content"] for turn in sample["prompt"])
        by_prompt.setdefault(prompt, []).append(sample)
    settings = [[k, _shown(value)] for k, value in manifest.settings.items() if value is not None]
    values = {
        "title": f"srt {manifest.command}: {directory.name}",
        "headline": _headline(metrics),
        "facts": [fact for fact in facts if fact],
        "doubts": [*manifest.warnings, *([manifest.error] if manifest.error else [])],
        "plots": [curves[0], _evaluations(metrics), *curves[1:], _lengths(samples)],
        "samples": by_prompt,
        "settings": Table("as asked for", ["", ""], settings),
    }
    write_page(directory / PAGE, "training.html", values)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def _headline(metrics: Records) -> str:
    losses = [row["loss"] for row in metrics if row.get("loss") is not None]
    steps = sum("loss" in row for row in metrics)
    if not losses:
        return f"No loss was finite in {steps} steps."
    return f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {steps} steps."


def _plot(title: str, note: str, named: Mapping[str, str], percent: bool, metrics: Records) -> Plot:
    curves = [Curve(name, _points(metrics, metric)) for metric, name in named.items()]
    return _drawn(title, note, curves, percent=percent)


def _evaluations(metrics: Records) -> Plot:
    """Validation loss, whole and by part: every `eval_loss_PART` that there is."""
    found = {name for row in metrics for name in row}
    names = sorted(n for n in found if n.startswith("eval_loss"))
    curves = [Curve(_part_of(name), _points(metrics, name)) for name in names]
    return _drawn("Validation loss", "Rows that are not trained on.", curves)


def _part_of(name: str) -> str:
    return name.removeprefix("eval_loss").strip("_").replace("_", " ") or "all"


def _lengths(samples: Records) -> Plot:
    steps = sorted({sample["step"] for sample in samples})
    points = []
    for step in steps:
        lengths = [sample["tokens"] for sample in samples if sample["step"] == step]
        points.append((float(step), sum(lengths) / len(lengths)))
    note = "Mean tokens of the samples below, cut at their limit."
    return _drawn("Length of the samples", note, [Curve("tokens", points)])


def _points(rows: Records, name: str) -> list[tuple[float, float]]:
    # JSON has no NaN: a loss that was none stands there as null.
    found = ((row["step"], row[name]) for row in rows if name in row)
    return [(float(step), math.nan if value is None else float(value)) for step, value in found]


def _drawn(title: str, note: str, curves: Sequence[Curve], *, percent: bool = False) -> Plot:
    known = [curve for curve in curves if curve.points]
    return title, note, line_plot(known, caption=title, percent=percent)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)

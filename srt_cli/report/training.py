"""A page about a training: curves, warnings, and what the model answered on the way."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

import orjson

import srt_cli
from srt_cli.report.curves import Curve, line_plot
from srt_cli.report.shell import html_table, write_page
from srt_cli.runs.run import Manifest

PAGE: Final = "training.html"
Rows = Sequence[Mapping[str, Any]]

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
    title = f"srt {manifest.command}: {directory.name}"
    body = "".join(
        [
            _header(manifest, metrics),
            _warnings(manifest),
            *(_plot(*plot, metrics) for plot in PLOTS[:1]),
            _evaluations(metrics),
            *(_plot(*plot, metrics) for plot in PLOTS[1:]),
            _lengths(samples),
            _samples(samples),
            _settings(manifest),
            f"<footer>Made by srt {escape(srt_cli.__version__)}. Every figure is in metrics.jsonl, "
            "every setting in run.json.</footer>",
        ]
    )
    write_page(directory / PAGE, title, body)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def _header(manifest: Manifest, metrics: Rows) -> str:
    losses = [row["loss"] for row in metrics if row.get("loss") is not None]
    steps = [row["step"] for row in metrics if "loss" in row]
    sentence = f"No loss was finite in {len(steps)} steps."
    if losses:
        sentence = f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {len(steps)} steps."
    facts = [str(manifest.settings.get("model")), str(manifest.settings.get("method"))]
    facts += [f"{name} {file.path}" for name, file in manifest.inputs.items()]
    facts += [manifest.progress or ""]
    shown = " · ".join(escape(fact) for fact in facts if fact)
    return f"<header><h1>{escape(sentence)}</h1><p class=facts>{shown}</p></header>"


def _warnings(manifest: Manifest) -> str:
    sentences = [*manifest.warnings, *([manifest.error] if manifest.error else [])]
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return (
        f'<section class="warnings"><h2>Read with care</h2><ul>{items}</ul></section>'
        if items
        else ""
    )


def _plot(title: str, note: str, named: Mapping[str, str], percent: bool, metrics: Rows) -> str:
    return _figure(title, note, [Curve(n, _points(metrics, m)) for m, n in named.items()], percent)


def _evaluations(metrics: Rows) -> str:
    """Validation loss, whole and by part: every `eval_loss_PART` that there is."""
    found = {name for row in metrics for name in row}
    names = sorted(n for n in found if n.startswith("eval_loss"))
    curves = [Curve(_part_of(name), _points(metrics, name)) for name in names]
    return _figure("Validation loss", "Rows that are not trained on.", curves, False)


def _part_of(name: str) -> str:
    return name.removeprefix("eval_loss").strip("_").replace("_", " ") or "all"


def _lengths(samples: Rows) -> str:
    steps = sorted({sample["step"] for sample in samples})
    points = []
    for step in steps:
        lengths = [sample["tokens"] for sample in samples if sample["step"] == step]
        points.append((float(step), sum(lengths) / len(lengths)))
    note = "Mean tokens of the samples below, cut at their limit."
    return _figure("Length of the samples", note, [Curve("tokens", points)], False)


def _points(rows: Rows, name: str) -> list[tuple[float, float]]:
    # JSON has no NaN: a loss that was none stands there as null.
    found = ((row["step"], row[name]) for row in rows if name in row)
    return [(float(step), math.nan if value is None else float(value)) for step, value in found]


def _figure(title: str, note: str, curves: Sequence[Curve], percent: bool) -> str:
    curves = [curve for curve in curves if curve.points]
    plot = line_plot(curves, caption=title, percent=percent)
    if not plot:
        return ""
    said = f"<p>{escape(note)}</p>" if note else ""
    return f'<section><h2>{escape(title)}</h2>{said}<div class="plot">{plot}</div></section>'


def _samples(samples: Rows) -> str:
    if not samples:
        return ""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        prompt = "\n\n".join(turn["content"] for turn in sample["prompt"])
        by_prompt.setdefault(prompt, []).append(sample)
    articles = "".join(_article(prompt, answers) for prompt, answers in by_prompt.items())
    return f"<section><h2>What it answered on the way</h2>{articles}</section>"


def _article(prompt: str, answers: Rows) -> str:
    # Start and end side by side; what lies between is a click away.
    ends = [answers[0], answers[-1]] if len(answers) > 1 else list(answers)
    between = answers[1:-1]
    more = (
        f"<details><summary>{len(between)} more in between</summary>"
        f'<div class="answers">{"".join(map(_answer, between))}</div></details>'
        if between
        else ""
    )
    return (
        f'<article><p class="prompt">{escape(prompt)}</p>'
        f'<div class="answers">{"".join(map(_answer, ends))}</div>{more}</article>'
    )


def _answer(sample: Mapping[str, Any]) -> str:
    end = "ended by itself" if sample["stopped"] else "cut off"
    return (
        f'<div class="answer"><h3>step {sample["step"]} · {sample["tokens"]} tokens · {end}</h3>'
        f"<pre>{escape(sample['text'])}</pre></div>"
    )


def _settings(manifest: Manifest) -> str:
    cells = [
        [name, _shown(value)] for name, value in manifest.settings.items() if value is not None
    ]
    return f"<section><h2>Settings</h2>{html_table('as trained', ['', ''], cells)}</section>"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)

"""Stage 2, second half: DPO teaches the model to prefer its refinements over its drafts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from srt_cli import console
from srt_cli.errors import UsageError
from srt_cli.options import runtime, setting
from srt_cli.prompts import HUB_PREFIX
from srt_cli.training.options import LossType, TrainingOptions, refuse_alone
from srt_cli.training.processes import run_in_processes
from srt_cli.training.rows import DpoTask, model_that_wrote, refuse_without_weights, require_files


@dataclass(frozen=True)
class Dpo(TrainingOptions):
    """Teach the tuned model to prefer its refinements over its drafts.

    The reference is the model that training starts from. Its log-probabilities are computed
    beforehand, and the loss of the first batch must be what policy = reference gives (ln 2 for the
    paper's). Without --model, the model that wrote the preferences is trained, as their manifest
    tells.

    Examples:
      srt dpo --prefs prefs.jsonl

      srt dpo --prefs prefs.jsonl --model models/sft --beta 0.1 --method lora
    """

    prefs: tuple[str, ...] = setting(
        ("prefs.jsonl",), "Preferences, also of TRL, UltraFeedback and others; hf:NAME. Repeatable.",
        group="Data", common=True, metavar="FILE",
    )  # fmt: skip
    model: str | None = setting(
        None, "The tuned model.", otherwise="the one that wrote the preferences",
        group="Model", common=True, metavar="SPEC",
    )  # fmt: skip
    out: Path = runtime(
        Path("models/dpo"), "Where to write the trained model.",
        group="Output", common=True, metavar="DIRECTORY",
    )  # fmt: skip
    beta: float | None = setting(
        None, "How strongly the reference holds the model back.",
        otherwise="the recipe's (paper: 0.01)", group="Loss", common=True,
    )  # fmt: skip
    loss_type: LossType | None = setting(
        None, "The loss, as TRL names it. sigmoid_norm divides by length, robust allows for wrong "
        "labels, apo_zero raises the chosen answer.", otherwise="the recipe's (paper: sigmoid)",
        group="Loss", common=True,
    )  # fmt: skip
    label_smoothing: str | None = setting(
        None, "Share of wrong labels, below 0.5, for --loss-type robust, exo_pair, aot or aot_unpaired. "
        "auto: what the audit of the preferences found.", group="Loss", metavar="SHARE|auto",
    )  # fmt: skip
    nll_weight: float = setting(
        0.0, "Weight of the chosen answer's own negative log-likelihood in the loss (paper: 0).",
        group="Loss",
    )  # fmt: skip
    ld_alpha: float | None = setting(
        None, "Weight, 0 to 1, of the tokens beyond the shorter answer's length (LD-DPO: 0.5).",
        group="Loss",
    )  # fmt: skip
    adapter: Literal["merge", "continue"] = setting(
        "merge", "What to do with a --model that is an adapter: merge it into its base and train a "
        "new one, or train it further. Either way the reference is the model as it was.",
        group="Adapters",
    )  # fmt: skip


def run(options: Dpo) -> None:
    """Train in this process, or in as many as --num-processes says."""
    refuse_alone(options)
    run_in_processes(options, lambda: _prefer(options))


def _prefer(options: Dpo) -> None:
    require_files(Path(name) for name in options.prefs if not name.startswith(HUB_PREFIX))
    model = model_that_wrote(options.prefs) if options.model is None else options.model
    if model is None:
        raise UsageError(
            f"{', '.join(options.prefs)} does not tell which model wrote its drafts. Pass --model."
        )
    refuse_without_weights(model, given=options.model is not None)
    if options.model is None:
        console.say(f"model: {model}, by the manifests of {', '.join(options.prefs)}")
    with console.waiting("loading torch and trl"):
        from srt_cli.training.dpo import prefer

    task = DpoTask(
        prefs=options.prefs,
        model=model,
        model_given=options.model is not None,
        label_smoothing=options.label_smoothing,
        nll_weight=options.nll_weight,
        ld_alpha=options.ld_alpha,
        adapter=options.adapter,
    )
    prefer(options, task)

"""Stage 1, second half: fine-tune the policy on response, feedback and refinement."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from srt_cli import console
from srt_cli.errors import UsageError
from srt_cli.models import names_program
from srt_cli.options import runtime, setting
from srt_cli.runs.run import inherited
from srt_cli.training.options import TrainingOptions
from srt_cli.training.processes import run_in_processes
from srt_cli.training.rows import SftTask, Thoughts, parse_data, parse_mix, parse_targets


@dataclass(frozen=True)
class Sft(TrainingOptions):
    """Fine-tune the policy on response, feedback and refinement.

    It keeps the rows that pass the paper's two rules: feedback in the complete format, and a
    refinement scored no lower than its draft. The loss covers response, feedback and refinement
    (paper, Eq. 1), or the parts that --loss-on names; prompt and critique request carry none.

    Examples:
      srt sft --data feedback.jsonl --model models/base

      srt sft --data r1.jsonl --data r2.jsonl:0.5 --eval-split 0.05

      srt sft --method lora --learning-rate 1e-4 --loss-on feedback,refinement
    """

    data: tuple[str, ...] = setting(
        ("feedback.jsonl",), "Feedback to learn from; WEIGHT times the rows of a file. Repeatable.",
        group="Data", common=True, metavar="FILE[:WEIGHT]",
    )  # fmt: skip
    model: str | None = setting(
        None, "The policy.", otherwise="the one that wrote the drafts",
        group="Model", common=True, metavar="SPEC",
    )  # fmt: skip
    out: Path = runtime(
        Path("models/sft"), "Where to write the tuned model.",
        group="Output", common=True, metavar="DIRECTORY",
    )  # fmt: skip
    loss_on: str = setting(
        "response,feedback,refinement", "Parts that carry loss (paper: all three).",
        group="Loss", common=True, metavar="PARTS",
    )  # fmt: skip
    drop: str | None = setting(
        None, "Parts of the feedback to leave out of the targets: any of weaknesses, suggestions, "
        "score (paper, Table 6).", group="Loss", metavar="PARTS",
    )  # fmt: skip
    refinement_only: bool = setting(
        False, "Train on prompt and refinement alone, without response and feedback (paper, "
        "Table 6).", group="Loss",
    )  # fmt: skip
    refinement_feedback: bool = setting(
        False, "Also train on good refinements with their own blind feedback (paper: no).",
        group="Loss",
    )  # fmt: skip
    balance: bool = setting(
        False, "Repeat critiques of good answers, or of bad ones, until there are as many of both "
        "(paper: no).", group="Loss",
    )  # fmt: skip
    thoughts: Thoughts = setting(
        "drop",
        "Leave recorded thoughts out, or train those of a turn with it (keep).",
        group="Loss",
    )
    mix: tuple[str, ...] = setting(
        (), "Mix in other chats (messages, or prompt and response): WEIGHT chats per row of "
        "feedback. Repeatable.", group="Data", metavar="FILE:WEIGHT",
    )  # fmt: skip
    packing: Literal["auto", "bfd", "off"] = setting(
        "auto", "Pack several rows into one pass without padding (bfd), each seeing only itself. "
        "auto: where it pays.", group="Training",
    )  # fmt: skip
    good_score: float = setting(8.0, "Count an answer as good from this score up.", group="Loss")
    critic_check: int = runtime(
        32, "Let the tuned model score N of the answers (those of --eval-split, if there are some), to "
        "show whether it knows good from bad.",
        group="Output",
    )  # fmt: skip


def run(options: Sft) -> None:
    """Fine-tune in this process, or in as many as --num-processes says."""
    run_in_processes(options, lambda: _fine_tune(options))


def _fine_tune(options: Sft) -> None:
    targets = parse_targets(
        options.loss_on, options.drop, options.refinement_only, options.refinement_feedback,
        options.balance,
    )  # fmt: skip
    mixes = [parse_mix(text) for text in options.mix]
    data = [parse_data(text) for text in options.data]
    model = options.model or policy_behind([file.path for file in data])
    if names_program(model):
        raise UsageError(f"--model {model}: a program has no weights to train. Name a model.")
    if options.model is None:
        console.say(f"model: {model}, by the manifest of {data[0].path}")
    from srt_cli.training.sft import fine_tune

    task = SftTask(
        data=data,
        model=model,
        targets=targets,
        mixes=mixes,
        packing=options.packing,
        good_score=options.good_score,
        critic_check=options.critic_check,
        thoughts=options.thoughts,
    )
    fine_tune(options, task)


def policy_behind(data: Sequence[Path]) -> str:
    """The policy that wrote the drafts, by the manifests of their files.

    Raises `UsageError` where they name none, or several.
    """
    named = {model: path for path in data if (model := inherited(path, "model")) is not None}
    policies = {model: path for model, path in named.items() if not names_program(model)}
    if not policies:
        raise UsageError(f"{', '.join(map(str, data))} names no policy to train. Pass --model.")
    if len(policies) > 1:
        told = ", ".join(f"{path} of {model}" for model, path in policies.items())
        raise UsageError(
            f"Several policies wrote the drafts ({told}). Pass --model, the one to train."
        )
    return next(iter(policies))

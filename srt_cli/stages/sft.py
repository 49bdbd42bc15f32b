"""Stage 1, second half: fine-tune the policy on response, feedback and refinement."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from srt_cli import console
from srt_cli.errors import TooManyFailures, UsageError
from srt_cli.exports import (
    TrainingFormat,
    answered_chat,
    feedback_chat,
    how,
    whole_chat,
    write_chats,
)
from srt_cli.models import names_program
from srt_cli.options import runtime, setting, typed_flags
from srt_cli.records import GIVEN, PLANTED
from srt_cli.runs.jsonl import is_stream, read_rows
from srt_cli.runs.run import inherited
from srt_cli.training.options import TrainingOptions, refuse_alone
from srt_cli.training.processes import run_in_processes
from srt_cli.training.rows import (
    SftTask,
    Targets,
    Thoughts,
    by_weight,
    draw_rows,
    parse_data,
    parse_mix,
    parse_targets,
    read_chats,
    read_feedback,
    refuse_without_weights,
    require_files,
    split_rows,
)


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
    compare: bool = setting(
        False, "Also train to name the better of draft and refinement by a letter, in both orders; "
        "self-critique --compare asks for it (paper: no).", group="Loss",
    )  # fmt: skip
    verdict_weight: float = setting(
        1.0, "Let the tokens in which feedback judges (yes and no of a checklist, the score) weigh X "
        "times in the loss (paper: 1).", positive=True, group="Loss", metavar="X",
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
    export: tuple[TrainingFormat, ...] = runtime(
        (), "Write the rows that would be trained as chats for another trainer (OUT.FORMAT.jsonl), and "
        "train nothing. Repeatable.", group="Output",
    )  # fmt: skip
    good_score: float = setting(8.0, "Count an answer as good from this score up.", group="Loss")
    critic_check: int = runtime(
        32, "Let the tuned model score N answers (of the rows that --eval-split holds out, if any), to "
        "show whether it knows good from bad.",
        group="Output",
    )  # fmt: skip


def run(options: Sft) -> None:
    """Fine-tune in this process, or in as many as --num-processes says; or export."""
    refuse_alone(options)
    targets = parse_targets(
        options.loss_on, options.drop, options.refinement_only, options.refinement_feedback,
        options.balance,
    )  # fmt: skip
    if options.export:
        export_rows(options, targets)
    else:
        run_in_processes(options, lambda: _fine_tune(options, targets))


def _fine_tune(options: Sft, targets: Targets) -> None:
    judges = "feedback" in targets.loss_on and not targets.refinement_only
    if not judges and options.verdict_weight != 1 and "--verdict-weight" in typed_flags(options):
        raise UsageError(
            "--verdict-weight weighs feedback, which would not be trained. Leave it out."
        )
    mixes = [parse_mix(text) for text in options.mix]
    data = [parse_data(text) for text in options.data]
    require_files(file.path for file in [*data, *mixes])
    paths = [file.path for file in data]
    model, by = (options.model, "") if options.model is not None else policy_behind(paths)
    refuse_without_weights(model, given=options.model is not None)
    if by:
        console.say(f"model: {model}, by {by}")
    with console.waiting("loading torch and trl"):
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
        compare=options.compare,
        verdict_weight=options.verdict_weight if judges else 1.0,
    )
    fine_tune(options, task)


def policy_behind(data: Sequence[Path]) -> tuple[str, str]:
    """The policy that wrote the drafts, and where that is told: a file's manifest, or its first row.

    Raises `UsageError` where the files name none, or several.
    """
    policies: dict[str, str] = {}
    for path in data:
        model, by = inherited(path, "model"), f"the manifest of {path}"
        if model is None:
            model, by = _policy_of_first_row(path), f"the first row of {path}"
        if model is not None and not names_program(model):
            policies.setdefault(model, by)
    if not policies:
        raise UsageError(f"{', '.join(map(str, data))} names no policy to train. Pass --model.")
    if len(policies) > 1:
        told = ", ".join(f"{model} by {how}" for model, how in policies.items())
        raise UsageError(
            f"Several policies wrote the drafts ({told}). Pass --model, the one to train."
        )
    return next(iter(policies.items()))


def _policy_of_first_row(path: Path) -> str | None:
    """The policy of a file's first row; None without one, and for stdin, which is read only once."""
    if is_stream(path):
        return None
    _, row = next(read_rows(path), (0, {}))
    policy = row.get("policy")
    return policy if isinstance(policy, str) and policy not in (GIVEN, PLANTED) else None


def export_rows(options: Sft, targets: Targets) -> None:
    """Write what would be trained as chats with loss flags for other trainers; no model is loaded.

    Raises `UsageError` for options that flags on whole turns cannot express, or that need a training.
    """
    data = [parse_data(text) for text in options.data]
    mixes = [parse_mix(text) for text in options.mix]
    critique = {"feedback", "refinement"} & set(targets.loss_on)
    if len(critique) == 1 and not targets.refinement_only:
        raise UsageError(
            "--export flags whole turns, and feedback and refinement are one turn. Name both in "
            "--loss-on, or neither."
        )
    untold = {
        "--refinement-feedback": targets.refinement_feedback,
        "--balance": targets.balance,
        "--compare": options.compare,
        "--unfit drop": options.unfit == "drop",
        "--truncation drop": options.truncation == "drop",
        "--verdict-weight": options.verdict_weight != 1,
        "--thoughts keep": options.thoughts == "keep",
    }
    for flag, given in untold.items():
        if not given:
            continue
        told = f"{flag} is nothing that --export can tell other trainers"
        if flag.split()[0] in typed_flags(options):
            raise UsageError(f"{told}. Leave it out.")
        console.warn(f"{told}: what was preset is left out.")
    for flag, needs in {
        "--dry-run": options.dry_run, "--push-to-hub": options.push_to_hub is not None
    }.items():  # fmt: skip
        if needs:
            raise UsageError(
                f"--export trains nothing, so {flag} goes without it. Pass one of them."
            )
    trained = "response" in targets.loss_on, bool(critique)
    chats = []
    for file in read_feedback(data, options.limit):
        rows, _ = split_rows(file.kept, lambda record: record.prompt, options.eval_split)
        for record in by_weight(rows, file.file.weight, options.seed):
            own = record.policy != PLANTED  # a planted fault is criticised, and never an answer
            if targets.refinement_only and own:
                chats.append(answered_chat(record.prompt, record.refinement or ""))
            elif not targets.refinement_only and (own or trained[1]):
                flags = (trained[0] and own, trained[1])
                chats.append(feedback_chat(record, flags, targets.drop))
    if not chats:
        raise TooManyFailures(
            f"{', '.join(options.data)}: no row is left to export. Try srt sft --dry-run."
        )
    count = len(chats)
    for mix in mixes:
        others, _ = split_rows(
            read_chats(mix.path), lambda chat: chat.messages[:-1], options.eval_split
        )
        drawn = draw_rows(others, max(1, round(mix.weight * count)), options.seed) if others else []
        chats += [whole_chat(chat.messages) for chat in drawn]
    for name in options.export:
        path = write_chats(options.out, name, chats, anew=options.overwrite)
        console.finish(f"{path}: {len(chats)} chats for {name}; {how(name, pairs=False)}")

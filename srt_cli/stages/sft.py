"""Stage 1, second half: fine-tune the policy on response, feedback and refinement."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from srt_cli import console
from srt_cli.artifacts import (
    DroppedRows,
    Run,
    clear_directory,
    inherited,
    open_run,
    read_records,
    template_input,
)
from srt_cli.critic_check import check_critic
from srt_cli.errors import SrtError, UsageError
from srt_cli.options import RUNS_CODE_PREFIX, runtime, setting
from srt_cli.recipes import advise_on_size, choose_hyperparameters
from srt_cli.records import FeedbackRecord, as_messages
from srt_cli.training_options import TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from srt_cli.training.loop import Trained
    from srt_cli.training.sequences import Part, Sequence
    from srt_cli.training.setup import Setup

COMMAND: Final = "sft"


@dataclass(frozen=True)
class Sft(TrainingOptions):
    """Fine-tune the policy on response, feedback and refinement.

    Kept are rows that pass the paper's two rules: feedback in the complete format, and a
    refinement scored not lower than its draft. The loss covers response, feedback and refinement
    (paper, Eq. 1) or those that --loss-on names; prompt and critique request carry none.

    Examples:

      srt sft --data feedback.jsonl --model models/base

      srt sft --method lora --learning-rate 1e-4 --loss-on feedback,refinement
    """

    data: Path = setting(Path("feedback.jsonl"), "Feedback to learn from.", metavar="FILE")
    model: str | None = setting(
        None, "The policy; default: the one that wrote the drafts.", metavar="SPEC"
    )
    out: Path = runtime(Path("models/sft"), "Where the tuned model goes.", metavar="DIRECTORY")
    loss_on: str = setting(
        "response,feedback,refinement", "Parts that carry loss (paper: all three).", metavar="PARTS"
    )
    refinement_feedback: bool = setting(
        False, "Train also on good refinements with their own blind feedback (paper: no)."
    )
    good_score: float = setting(8.0, "From this score on, an answer counts as good.")
    critic_check: int = runtime(
        16, "Let the tuned model score N of the answers, and show whether it knows good from bad."
    )


def run(options: Sft) -> None:
    """Fine-tune in this process, or in as many as --num-processes says."""
    from srt_cli.training.launch import run_in_processes

    run_in_processes(fine_tune, options)


def fine_tune(options: Sft) -> None:
    """Read feedback, keep what teaches, train, save."""
    parts = parse_parts(options.loss_on)
    model_name = options.model or inherited(options.data, "model")
    if model_name is None or model_name.startswith(RUNS_CODE_PREFIX):
        raise UsageError(f"{options.data} names no policy to train. Pass --model.")
    from srt_cli.training.checkpoints import clear_checkpoints, refuse_changed_inputs
    from srt_cli.training.policy import count_parameters
    from srt_cli.training.setup import set_up

    parameters = count_parameters(model_name)
    chosen = choose_hyperparameters(options, COMMAND, parameters)
    setup = set_up(options, chosen.values, COMMAND)
    if options.overwrite:
        clear_directory(options.out)
    run = open_run(
        COMMAND,
        options,
        options.out,
        inputs={"data": options.data} | template_input(options.chat_template),
        overwrite=options.overwrite,
        directory=True,
        resolved={"model": model_name} | chosen.settings(COMMAND),
    )
    records = list(read_records(options.data, FeedbackRecord.model_validate, limit=options.limit))
    refuse_changed_inputs(run)
    if run.complete:
        console.say("trained already under these settings; nothing to do")
        console.finish(f"{options.out}: a model", f"srt self-critique --model {options.out}")
        return
    with run:
        if advice := advise_on_size(options, COMMAND, parameters):
            run.warn(advice)
        kept = keep_teaching_rows(records, run)
        trained = _trained_before(run) or _train(options, setup, parts, model_name, kept, run)
        if options.critic_check:
            check_critic(run, kept, options.critic_check, options.good_score, options.seed)
        if not options.keep_checkpoints:
            clear_checkpoints(options.out)
    console.say(f"{trained.sentence()}; loss {trained.first_loss:.3f} to {trained.final_loss:.3f}")
    console.finish(f"{options.out}: a model", f"srt self-critique --model {options.out}")


def _trained_before(run: Run) -> "Trained | None":
    """The figures of a training whose model is saved, but whose critic check was cut off."""
    earlier = run.earlier.tallies.get("training") if run.earlier else None
    if earlier is None or not (run.out / "config.json").is_file():
        return None
    from srt_cli.training.loop import Trained

    run.manifest.tallies |= {"training": earlier}
    console.say("trained and saved already; only the critic check is left")
    return Trained(**earlier)


def parse_parts(text: str) -> "tuple[Part, ...]":
    """`--loss-on` as parts; raises `UsageError` for an unknown or empty one."""
    known: tuple[Part, ...] = ("response", "feedback", "refinement")
    named = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in named if part not in known]
    if unknown or not named:
        raise UsageError(
            f"--loss-on {text!r}: name some of response, feedback, refinement, joined by commas."
        )
    return tuple(part for part in known if part in named)


def why_not_trained(record: FeedbackRecord) -> str | None:
    """The paper's two rules (section 4.1); null when a row passes both."""
    if record.status != "ok":
        return record.status
    if record.gain is None:
        return "incomplete"
    if record.gain < 0:
        return "refinement scored lower"
    return None


def keep_teaching_rows(records: Iterable[FeedbackRecord], run: Run) -> list[FeedbackRecord]:
    """Rows that pass the rules; the others go to `sft.dropped.jsonl` in the model directory."""
    dropped = DroppedRows(run.out / "sft.jsonl")
    kept = []
    for record in records:
        reason = why_not_trained(record)
        if reason is None:
            kept.append(record)
        else:
            dropped.add(record.id, reason, record)
    dropped.commit()
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.reasons.most_common())
    rows = len(kept) + dropped.reasons.total()
    console.say(f"{rows} rows: {len(kept)} kept" + (f"; dropped: {reasons}" if reasons else ""))
    run.manifest.tallies = {"rows": rows, "kept": len(kept), "dropped": dict(dropped.reasons)}
    if not kept:
        raise SrtError(f"no row is left to train on ({reasons}). Look at {dropped.path}.")
    return kept


def _train(
    options: Sft,
    setup: "Setup",
    parts: "tuple[Part, ...]",
    model_name: str,
    records: list[FeedbackRecord],
    run: Run,
) -> "Trained":
    from srt_cli.models.weights import load_tokenizer
    from srt_cli.training.policy import load_policy
    from srt_cli.training.samples import Sampler
    from srt_cli.training.saving import model_card, save_model
    from srt_cli.training.sft import train_sft

    tokenizer = load_tokenizer(model_name, chat_template=options.chat_template)
    sequences = build_sequences(tokenizer, records, parts, options, setup.values.max_length, run)
    run.manifest.models = {model_name: setup.place.describe()}
    console.say(setup.place.sentence())
    policy = partial(load_policy, model_name, setup.place, options)
    prompts = [as_messages(record.prompt) for record in records[: options.samples]]
    sampler = Sampler(tokenizer, prompts)
    model, trained = train_sft(policy, tokenizer, sequences, setup, run, sampler)
    run.manifest.tallies["training"] = vars(trained)
    facts: dict[str, Any] = {
        "base": model_name,
        "data": f"{options.data}, {len(records)} rows",
        "method": f"supervised fine-tuning ({options.method}), loss on {', '.join(parts)}",
        "epochs": setup.values.epochs,
        "learning rate": setup.values.learning_rate,
        "final loss": trained.final_loss,
    }
    save_model(model, tokenizer, options.out, model_card("A model tuned by stage 1 of SRT", facts))
    run.save()
    return trained


def build_sequences(
    tokenizer: "PreTrainedTokenizerBase",
    records: list[FeedbackRecord],
    parts: "tuple[Part, ...]",
    options: Sft,
    max_length: int,
    run: Run,
) -> "list[Sequence]":
    """Token ids and masks of every kept row; refuses, or drops, what does not fit."""
    from srt_cli.training.sequences import feedback_sequence, refinement_feedback_sequence

    sequences = [feedback_sequence(tokenizer, record, parts) for record in records]
    if options.refinement_feedback:
        sequences += [
            refinement_feedback_sequence(tokenizer, record, parts)
            for record in records
            if record.refinement_feedback is not None
            and record.refinement_feedback.score >= options.good_score
        ]
    long = [s for s in sequences if len(s.input_ids) > max_length]
    if long and options.truncation == "refuse":
        worst = max(long, key=lambda s: len(s.input_ids))
        raise SrtError(
            f"{len(long)} of {len(sequences)} sequences exceed --max-length {max_length} "
            f"(the longest, {worst.id}: {len(worst.input_ids)} tokens). "
            "Raise --max-length, or leave them out with --truncation drop."
        )
    sequences = [s for s in sequences if len(s.input_ids) <= max_length]
    untrained = [s.id for s in sequences if not sum(s.trained.values())]
    if untrained or not sequences:
        raise SrtError(f"no token would be trained in {', '.join(untrained[:3]) or 'any row'}.")
    tokens = {part: sum(s.trained[part] for s in sequences) for part in sequences[0].trained}
    total = sum(len(s.input_ids) for s in sequences)
    run.manifest.tallies |= {
        "sequences": len(sequences),
        "sequences_too_long": len(long),
        "tokens": total,
        "trained_tokens": tokens,
    }
    named = ", ".join(f"{count} of {part}" for part, count in tokens.items() if count)
    console.say(f"{len(sequences)} sequences, {total} tokens, trained: {named}")
    if long:
        run.warn(f"{len(long)} sequences over --max-length {max_length} were left out.")
    return sequences

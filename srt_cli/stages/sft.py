"""Stage 1, second half: fine-tune the policy on response, feedback and refinement."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from srt_cli import console
from srt_cli.errors import SrtError, UsageError
from srt_cli.feedback.critic_check import check_critic
from srt_cli.models import names_program
from srt_cli.options import runtime, setting
from srt_cli.records import FeedbackRecord, as_messages
from srt_cli.runs.jsonl import read_records
from srt_cli.runs.run import Run, clear_directory, inherited, open_run, template_input
from srt_cli.training.options import TrainingOptions
from srt_cli.training.recipes import Chosen, advise_on_size, choose_hyperparameters
from srt_cli.training.rows import (
    Fallen,
    Mix,
    Targets,
    keep_teaching_rows,
    parse_mix,
    parse_targets,
    split_rows,
    write_dropped,
)

if TYPE_CHECKING:
    from srt_cli.training.loop import Trained
    from srt_cli.training.planning import Work
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

    data: Path = setting(
        Path("feedback.jsonl"), "Feedback to learn from.",
        group="Data", common=True, metavar="FILE",
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
        "response,feedback,refinement", "The parts that carry loss (paper: all three).",
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
    mix: tuple[str, ...] = setting(
        (), "Mix in other chats (messages, or prompt and response): WEIGHT of them for each row of "
        "feedback. Repeatable.", group="Data", metavar="FILE:WEIGHT",
    )  # fmt: skip
    packing: Literal["auto", "bfd", "off"] = setting(
        "auto", "Pack several rows into one pass without padding (bfd), each seeing only itself. "
        "auto: where it pays.", group="Training",
    )  # fmt: skip
    good_score: float = setting(8.0, "An answer counts as good from this score on.", group="Loss")
    critic_check: int = runtime(
        16, "Let the tuned model score N of the answers, to show whether it knows good from bad.",
        group="Output",
    )  # fmt: skip


def run(options: Sft) -> None:
    """Fine-tune in this process, or in as many as --num-processes says."""
    from srt_cli.training.launch import run_in_processes

    run_in_processes(fine_tune, options)


def fine_tune(options: Sft) -> None:
    """Read feedback, keep what teaches, train, save."""
    targets = parse_targets(
        options.loss_on, options.drop, options.refinement_only, options.refinement_feedback
    )
    mixes = [parse_mix(text) for text in options.mix]
    model_name = options.model or inherited(options.data, "model")
    if model_name is None or names_program(model_name):
        raise UsageError(f"{options.data} names no policy to train. Pass --model.")
    from srt_cli.training.checkpoints import clear_checkpoints, refuse_changed_inputs
    from srt_cli.training.policy import count_parameters
    from srt_cli.training.setup import set_up

    parameters = count_parameters(model_name)
    chosen = choose_hyperparameters(options, COMMAND, parameters)
    setup = set_up(options, chosen.values, COMMAND)
    if options.dry_run:
        advice = advise_on_size(options, COMMAND, parameters)
        _show_plan(options, chosen, setup, targets, mixes, model_name, advice)
        return
    if options.overwrite:
        clear_directory(options.out)
    run = open_run(
        COMMAND,
        options,
        inputs={"data": options.data}
        | {f"mix_{number}": mix.path for number, mix in enumerate(mixes, start=1)}
        | template_input(options.chat_template),
        directory=True,
        resolved={"model": model_name} | chosen.settings(COMMAND),
    )
    records = list(read_records(options.data, FeedbackRecord.model_validate, limit=options.limit))
    refuse_changed_inputs(run)
    if run.complete:
        console.say("trained already under these settings; nothing to do")
        _finish(options)
        return
    with run:
        if advice := advise_on_size(options, COMMAND, parameters):
            run.warn(advice)
        kept, fallen = keep_teaching_rows(records)
        _tell_of_rows(run, len(kept), fallen)
        trained = _trained_before(run) or _train(
            options, setup, targets, mixes, model_name, kept, fallen, run
        )
        if options.critic_check:
            if targets.scores:
                check_critic(run, kept, options.critic_check, options.good_score, options.seed)
            else:
                console.say("no critic check: this model is not trained to score")
        if not options.keep_checkpoints:
            clear_checkpoints(options.out)
    console.say(f"{trained.sentence()}; loss {trained.first_loss:.3f} to {trained.final_loss:.3f}")
    _finish(options)


def _finish(options: Sft) -> None:
    from srt_cli.training.keeping import finish_training

    finish_training(options, options.out, f"srt self-critique --model {options.out}")


def _trained_before(run: Run) -> "Trained | None":
    """The figures of a training whose model is saved, but whose critic check was cut off."""
    earlier = run.earlier.tallies.get("training") if run.earlier else None
    saved = any((run.out / name).is_file() for name in ("config.json", "adapter_config.json"))
    if earlier is None or not saved:
        return None
    from srt_cli.training.loop import Trained

    run.manifest.tallies |= {"training": earlier}
    console.say("trained and saved already; only the critic check is left")
    return Trained(**earlier)


def _tell_of_rows(run: Run, kept: int, fallen: list[Fallen]) -> None:
    counts = Counter(row.reason for row in fallen)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    rows = kept + len(fallen)
    console.say(f"{rows} rows: {kept} kept" + (f"; dropped: {reasons}" if reasons else ""))
    run.manifest.tallies |= {"rows": rows, "kept": kept}
    if not kept:
        dropped = write_dropped(run.out / "sft.jsonl", fallen)
        raise SrtError(f"no row is left to train on ({reasons}). Look at {dropped}.")


def _prepare(
    options: Sft,
    setup: "Setup",
    targets: Targets,
    mixes: list[Mix],
    model_name: str,
    records: list[FeedbackRecord],
) -> "Work":
    """Everything that a training needs to know before its weights are loaded."""
    from srt_cli.models.weights import load_tokenizer
    from srt_cli.training.examples import length_limit, prepare_sft
    from srt_cli.training.fitting import fit
    from srt_cli.training.packing import decide_packing, sft_passes
    from srt_cli.training.planning import Work
    from srt_cli.training.policy import positions_of

    tokenizer = load_tokenizer(model_name, chat_template=options.chat_template)
    limit = length_limit(setup.values.max_length, positions_of(model_name), options.truncation)
    prepared = prepare_sft(
        tokenizer, records, targets, mixes, limit, good_score=options.good_score,
        eval_split=options.eval_split, seed=options.seed, refuse=not options.dry_run,
    )  # fmt: skip
    lengths = [len(sequence.input_ids) for sequence in prepared.train]
    packing = decide_packing(options.packing, lengths, setup)
    batch, passes = sft_passes(lengths, packing, setup)
    fitted = fit(setup, model_name, batch, passes, four_bit=options.method == "qlora")
    return Work(tokenizer, prepared, limit, packing, fitted)


def _show_plan(
    options: Sft,
    chosen: Chosen,
    setup: "Setup",
    targets: Targets,
    mixes: list[Mix],
    model_name: str,
    advice: str | None,
) -> None:
    from srt_cli.training.plan import show_plan
    from srt_cli.training.planning import plan_sft
    from srt_cli.training.policy import load_policy
    from srt_cli.training.probe import probe, probe_setup, rows_of_probe
    from srt_cli.training.samples import Sampler
    from srt_cli.training.sft import train_sft

    records = list(read_records(options.data, FeedbackRecord.model_validate, limit=options.limit))
    kept, fallen = keep_teaching_rows(records)
    if not kept:
        raise SrtError(f"{options.data}: no row is left to train on.")
    work = _prepare(options, setup, targets, mixes, model_name, kept)
    setup = work.fit.setup
    measured = None
    if options.probe:
        train = work.prepared.train
        rows = rows_of_probe(train, [len(sequence.input_ids) for sequence in train], setup)
        policy = partial(load_policy, model_name, setup.place, options)
        measured = probe(
            COMMAND,
            lambda run: train_sft(
                policy, work.tokenizer, rows, [], work.packing, probe_setup(setup), run,
                Sampler(work.tokenizer, []),
            ),
        )  # fmt: skip
    work.prepared.fallen = fallen + work.prepared.fallen
    show_plan(plan_sft(work, len(records), chosen, options.show_masks, measured, advice))


def _train(
    options: Sft,
    setup: "Setup",
    targets: Targets,
    mixes: list[Mix],
    model_name: str,
    records: list[FeedbackRecord],
    fallen: list[Fallen],
    run: Run,
) -> "Trained":
    from srt_cli.training.keeping import keep_model
    from srt_cli.training.policy import load_policy
    from srt_cli.training.samples import Sampler
    from srt_cli.training.saving import model_card
    from srt_cli.training.sft import train_sft

    work = _prepare(options, setup, targets, mixes, model_name, records)
    tokenizer, prepared, packing, setup = (
        work.tokenizer, work.prepared, work.packing, work.fit.setup
    )  # fmt: skip
    prepared.fallen = fallen + prepared.fallen
    prepared.record(run, run.out / "sft.jsonl")
    run.manifest.tallies["packing"] = vars(packing)
    console.say(f"rows are {'' if packing.on else 'not '}packed: {packing.reason}")
    run.manifest.models = {model_name: setup.place.describe()}
    console.say(setup.place.sentence())
    policy = partial(load_policy, model_name, setup.place, options)
    _, held_out = split_rows(records, lambda record: record.prompt, options.eval_split)
    shown = (held_out or records)[: options.samples]
    prompts = [as_messages(record.prompt) for record in shown]
    sampler = Sampler(tokenizer, prompts)
    model, trained = train_sft(
        policy, tokenizer, prepared.train, prepared.held_out, packing, setup, run, sampler
    )
    run.manifest.tallies["training"] = vars(trained)
    facts: dict[str, Any] = {
        "base": model_name,
        "method": f"supervised fine-tuning ({options.method}), loss on {', '.join(targets.loss_on)}",
        "sequences trained on": len(prepared.train),
        "epochs": setup.values.epochs,
        "learning rate": setup.values.learning_rate,
    }
    title = "A model tuned by stage 1 of SRT"
    card = model_card(title, model_name, run, options, trained, facts)
    rows = [sequence.input_ids for sequence in prepared.train]
    keep_model(model, tokenizer, card, rows, model_name, options, setup, run)
    run.save()
    return trained

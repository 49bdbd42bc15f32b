"""Stage 2, second half: DPO teaches the model to prefer its refinements over its drafts."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from srt_cli import console
from srt_cli.errors import SrtError, UsageError
from srt_cli.models import names_program
from srt_cli.options import runtime, setting
from srt_cli.records import Preference
from srt_cli.runs.jsonl import read_records
from srt_cli.runs.run import (
    Run,
    clear_directory,
    inherited,
    open_run,
    read_manifest,
    template_input,
)
from srt_cli.training.options import LossType, TrainingOptions
from srt_cli.training.recipes import Chosen, advise_on_size, choose_hyperparameters
from srt_cli.training.rows import split_rows

if TYPE_CHECKING:
    from srt_cli.training.loop import Trained
    from srt_cli.training.objective import Objective
    from srt_cli.training.planning import PairWork
    from srt_cli.training.setup import Setup

COMMAND: Final = "dpo"


@dataclass(frozen=True)
class Dpo(TrainingOptions):
    """Teach the tuned model to prefer its refinements over its drafts.

    The reference is the model that training starts from. Its log-probabilities are computed
    beforehand, and the loss of the first batch must be ln 2. Without --model, the model that
    wrote the preferences is trained, as their manifest tells.

    Examples:
      srt dpo --prefs prefs.jsonl

      srt dpo --prefs prefs.jsonl --model models/sft --beta 0.1 --method lora
    """

    prefs: Path = setting(
        Path("prefs.jsonl"), "Preferences to learn from.",
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
        None, "Share of wrong labels, below 0.5, for --loss-type robust, exo_pair or aot. auto: "
        "what the audit of the preferences found.", group="Loss", metavar="SHARE|auto",
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
    from srt_cli.training.launch import run_in_processes

    run_in_processes(prefer, options)


def prefer(options: Dpo) -> None:
    """Read preferences, train against the starting model, save."""
    model_name = options.model or model_that_wrote(options.prefs)
    if model_name is None or names_program(model_name):
        raise UsageError(
            f"{options.prefs} does not tell which model wrote its drafts. Pass --model."
        )
    from srt_cli.training.checkpoints import clear_checkpoints, refuse_changed_inputs
    from srt_cli.training.objective import refuse_idle_smoothing
    from srt_cli.training.policy import count_parameters
    from srt_cli.training.setup import set_up

    parameters = count_parameters(model_name)
    chosen = choose_hyperparameters(options, COMMAND, parameters)
    smoothing = label_smoothing_of(options)
    refuse_idle_smoothing(chosen.loss_type, options.label_smoothing is not None, smoothing)
    refuse_odd_weights(options)
    setup = set_up(options, chosen.values, COMMAND)
    objective = objective_of(options, chosen, smoothing)
    if options.dry_run:
        advice = advise_on_size(options, COMMAND, parameters)
        _show_plan(options, chosen, setup, model_name, objective, advice)
        return
    if options.overwrite:
        clear_directory(options.out)
    run = open_run(
        COMMAND,
        options,
        inputs={"prefs": options.prefs} | template_input(options.chat_template),
        directory=True,
        resolved={"model": model_name}
        | chosen.settings(COMMAND)
        | ({"label_smoothing": repr(smoothing)} if smoothing else {}),
    )
    pairs = list(read_records(options.prefs, Preference.model_validate, limit=options.limit))
    refuse_changed_inputs(run)
    if run.complete:
        console.say("trained already under these settings; nothing to do")
    else:
        with run:
            if advice := advise_on_size(options, COMMAND, parameters):
                run.warn(advice)
            trained = _train(options, chosen, setup, model_name, pairs, objective, run)
            if not options.keep_checkpoints:
                clear_checkpoints(options.out)
        console.say(
            f"{trained.sentence()}; loss {trained.first_loss:.4f} to {trained.final_loss:.4f}; "
            f"reference: {model_name}"
        )
    _finish(options)


def _finish(options: Dpo) -> None:
    from srt_cli.training.keeping import finish_training

    finish_training(options, options.out, f"srt eval --model {options.out}")


def what_the_reference_is(options: Dpo, model_name: str, base: str) -> str:
    """In words, for the manifest; refuses to go on with an adapter that is not there.

    `base` is what the adapter in `model_name` belongs to, or `model_name` itself.
    """
    if options.adapter == "continue":
        if base == model_name or options.method == "full":
            raise UsageError(
                f"--adapter continue trains the adapter in {model_name} further: it needs an adapter "
                "directory as --model (srt sft --no-merge), and --method lora or qlora."
            )
        return f"{base} with a frozen copy of the adapter of {model_name}"
    if base != model_name:
        return f"{base} with the adapter of {model_name} merged into it"
    return "the model that training starts from"


def model_that_wrote(prefs: Path) -> str | None:
    """The policy behind a preference file, by the manifests of the file and of its input."""
    manifest = read_manifest(prefs)
    if manifest is None or "data" not in manifest.inputs:
        return None
    data = Path(manifest.inputs["data"].path)
    if not data.exists():
        data = prefs.parent / data.name
    return inherited(data, "model")


def label_smoothing_of(options: Dpo) -> float:
    """The share of wrong labels that the loss allows for."""
    given = options.label_smoothing
    if given is None:
        return 0.0
    if given == "auto":
        manifest = read_manifest(options.prefs)
        audit = manifest.tallies.get("audit") if manifest is not None else None
        if not audit or audit.get("noise") is None:
            raise SrtError(
                f"{options.prefs}: was never audited, so --label-smoothing auto knows nothing. Run srt "
                "build-prefs with --audit N --audit-judge SPEC, or give a share."
            )
        share = float(audit["noise"])
    else:
        try:
            share = float(given)
        except ValueError:
            raise UsageError(f"--label-smoothing {given!r}: give a share, or auto.") from None
    if not 0 <= share < 0.5:
        raise UsageError(
            f"--label-smoothing {share:g}: with half of the labels wrong nothing can be learnt. "
            "It lies between 0 and 0.5."
        )
    return share


def refuse_odd_weights(options: Dpo) -> None:
    """Raise `UsageError` for weights outside their range."""
    if options.nll_weight < 0:
        raise UsageError("--nll-weight: is a weight, 0 or more.")
    if options.ld_alpha is not None and not 0 <= options.ld_alpha <= 1:
        raise UsageError(
            "--ld-alpha: lies between 0 (cut at the shorter length) and 1 (plain DPO)."
        )


def objective_of(options: Dpo, chosen: Chosen, smoothing: float) -> "Objective":
    """What is optimised, from options and recipe."""
    from srt_cli.training.objective import Objective

    return Objective(chosen.loss_type, chosen.beta, smoothing, options.nll_weight, options.ld_alpha)


def why_not_of_this_model(options: Dpo) -> str | None:
    """A warning when the preferences hold another model's answers; null when they do not."""
    writer = model_that_wrote(options.prefs)
    if writer is None or options.model is None:
        return None
    one, other = Path(writer).expanduser(), Path(options.model).expanduser()
    if one == other or (one.exists() and other.exists() and one.samefile(other)):
        return None
    return (
        f"{options.prefs} holds answers of {writer}, and {options.model} is trained on them: it learns "
        "to tell apart what it would not have written. Leave --model away to train their writer, or go "
        "on if that is meant."
    )


def _prepare(
    options: Dpo, chosen: Chosen, setup: "Setup", model_name: str, pairs: list[Preference]
) -> "PairWork":
    """Everything that a training needs to know before its weights are loaded."""
    from srt_cli.models.weights import load_tokenizer
    from srt_cli.training.examples import length_limit, longest_side, prepare_dpo
    from srt_cli.training.fitting import fit
    from srt_cli.training.memory import Batch
    from srt_cli.training.planning import PairWork
    from srt_cli.training.policy import positions_of

    tokenizer = load_tokenizer(model_name, chat_template=options.chat_template)
    limit = length_limit(chosen.values.max_length, positions_of(model_name), options.truncation)
    prepared = prepare_dpo(
        tokenizer, pairs, limit, eval_split=options.eval_split, loss_type=chosen.loss_type,
        refuse=not options.dry_run,
    )  # fmt: skip
    batch = Batch(2 * setup.micro_batch, max(map(longest_side, prepared.train)))
    four_bit = options.method == "qlora"
    fitted = fit(setup, model_name, batch, setup.accumulation, four_bit=four_bit)
    return PairWork(tokenizer, prepared, limit, fitted)


def _show_plan(
    options: Dpo,
    chosen: Chosen,
    setup: "Setup",
    model_name: str,
    objective: "Objective",
    advice: str | None,
) -> None:
    from srt_cli.training.dpo import train_dpo
    from srt_cli.training.examples import longest_side
    from srt_cli.training.plan import show_plan
    from srt_cli.training.planning import plan_dpo
    from srt_cli.training.policy import load_policy
    from srt_cli.training.probe import probe, probe_setup, rows_of_probe
    from srt_cli.training.samples import Sampler

    pairs = list(read_records(options.prefs, Preference.model_validate, limit=options.limit))
    work = _prepare(options, chosen, setup, model_name, pairs)
    setup = work.fit.setup
    measured = None
    if options.probe:
        train = work.prepared.train
        rows = rows_of_probe(train, [longest_side(pair) for pair in train], setup)
        policy = partial(load_policy, model_name, setup.place, options)
        measured = probe(
            COMMAND,
            lambda run: train_dpo(
                policy, work.tokenizer, rows, [], objective, probe_setup(setup), run,
                Sampler(work.tokenizer, []),
            ),
        )  # fmt: skip
    warnings = [text for text in (advice, why_not_of_this_model(options)) if text]
    show_plan(plan_dpo(work, len(pairs), chosen, options.show_masks, measured, warnings))


def _train(
    options: Dpo,
    chosen: Chosen,
    setup: "Setup",
    model_name: str,
    pairs: list[Preference],
    objective: "Objective",
    run: Run,
) -> "Trained":
    from srt_cli.models.weights import base_of, fingerprint_of
    from srt_cli.training.dpo import train_dpo
    from srt_cli.training.keeping import keep_model
    from srt_cli.training.policy import load_policy
    from srt_cli.training.samples import Sampler
    from srt_cli.training.saving import model_card

    work = _prepare(options, chosen, setup, model_name, pairs)
    tokenizer, prepared, setup = work.tokenizer, work.prepared, work.fit.setup
    prepared.record(run, run.out / "dpo.jsonl")
    if warning := why_not_of_this_model(options):
        run.warn(warning)
    run.manifest.models = {
        "policy": {"spec": model_name, **setup.place.describe()},
        "reference": {
            "spec": model_name,
            "weights": fingerprint_of(model_name),
            "is": what_the_reference_is(options, model_name, base_of(model_name)),
        },
    }
    console.say(setup.place.sentence())
    goes_on = options.adapter == "continue"
    base = base_of(model_name) if goes_on else model_name
    policy = partial(load_policy, base, setup.place, options, model_name if goes_on else None)
    _, held_out = split_rows(pairs, lambda pair: pair.prompt, options.eval_split)
    shown = (held_out or pairs)[: options.samples]
    sampler = Sampler(tokenizer, [pair.prompt for pair in shown])
    model, trained = train_dpo(
        policy, tokenizer, prepared.train, prepared.held_out, objective, setup, run, sampler
    )
    run.manifest.tallies["training"] = vars(trained)
    facts: dict[str, Any] = {
        "base and reference": model_name,
        "reference": run.manifest.models["reference"]["is"],
        "method": f"DPO ({options.method}), loss {chosen.loss_type}, beta {chosen.beta:g}",
        "pairs trained on": len(prepared.train),
        "epochs": chosen.values.epochs,
        "learning rate": chosen.values.learning_rate,
    }
    title = "A model tuned by stage 2 of SRT"
    card = model_card(title, model_name, run, options, trained, facts)
    rows = [pair.prompt_ids + pair.chosen_ids for pair in prepared.train]
    keep_model(model, tokenizer, card, rows, base, options, setup, run)
    return trained

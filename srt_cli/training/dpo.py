"""Stage 2: DPO teaches the model to prefer its refinements over its drafts (paper, section 3.2).

Read preferences, prepare token ids, fit the machine, train by TRL's DPOTrainer against the model that
training starts from, save.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from srt_cli import console
from srt_cli.errors import SrtError, UsageError
from srt_cli.models.weights import base_of, fingerprint_of
from srt_cli.pairs.worth import FEWEST_PAIRS
from srt_cli.preferences import read_preferences
from srt_cli.records import Preference
from srt_cli.runs.run import Run, read_manifest
from srt_cli.training.batches import Columns, LengthGroupedOrder, keep_rows
from srt_cli.training.checkpoints import clear_checkpoints, open_training
from srt_cli.training.examples import longest_side, prepare_dpo
from srt_cli.training.head import reads_pairs_once, score_on_cpu
from srt_cli.training.health import DpoStart
from srt_cli.training.loop import Trained, Tuned, WatchedTrainer, train, trainer_arguments
from srt_cli.training.memory import LargestPass, fit
from srt_cli.training.options import LossType, TrainingOptions
from srt_cli.training.plan import Ready, plan_dpo, show_plan
from srt_cli.training.probe import probe
from srt_cli.training.processes import in_every_process
from srt_cli.training.rows import DpoTask, writers_of
from srt_cli.training.samples import Sampler
from srt_cli.training.saving import finish_training, keep_model, model_card, whole_model
from srt_cli.training.sequences import PairIds
from srt_cli.training.setup import (
    Setup,
    Training,
    chat_of,
    config_of,
    load_policy,
    lora_config,
    set_up,
    sharding,
)

# Relative, of a log-prob: another batch may change it by rounding alone.
TOLERANCE_FP32: Final = 1e-4
TOLERANCE_BF16: Final = 1e-2
SMOOTHED: Final[tuple[LossType, ...]] = ("robust", "exo_pair", "aot", "aot_unpaired")
"""The losses in which TRL uses `label_smoothing`; in the others it does nothing."""


def prefer(options: TrainingOptions, task: DpoTask) -> None:
    """Read preferences, prepare, fit, train against the starting model, save."""
    setup = set_up(options, "dpo", task.model, continues=task.adapter == "continue")
    objective = objective_of(task, setup)
    source = read_preferences(task.prefs, options.limit)
    pairs = source.pairs
    for said in source.recognised:
        console.say(said)
    if options.dry_run:
        _show_plan(setup, task, pairs, objective)
    smoothing = objective.label_smoothing
    resolved = {"label_smoothing": repr(smoothing)} if smoothing else {}
    run = open_training(setup, source.inputs, resolved)
    if options.dry_run:  # all that would be refused has been
        return
    if not run.complete:
        with run:
            for advice in setup.advice:
                run.warn(advice)
            trained = _train(setup, task, pairs, objective, run)
            if not options.keep_checkpoints:
                clear_checkpoints(run.out)
        seen = run.manifest.tallies.get("pairs", FEWEST_PAIRS)
        on_few = f" on {seen} pairs, which is no sign of progress" if seen < FEWEST_PAIRS else ""
        console.say(
            f"{trained.sentence()}; loss {trained.first_loss:.4f} to {trained.final_loss:.4f}{on_few}; "
            f"reference: {task.model}"
        )
    finish_training(options, f"srt eval --model {options.out}")


def why_not_of_this_model(task: DpoTask) -> str | None:
    """A warning when the preferences hold another model's answers; None when they do not."""
    if not task.model_given:
        return None
    trained = Path(task.model).expanduser()
    for prefs, writer in writers_of(task.prefs).items():
        wrote = Path(writer).expanduser()
        if wrote == trained or (wrote.exists() and trained.exists() and wrote.samefile(trained)):
            continue
        return (
            f"{prefs} holds answers of {writer}, and {task.model} is trained on them: it learns to tell "
            "apart what it would not have written. Leave --model away to train their writer, or go on "
            "if that is meant."
        )
    return None


def _prepare(
    setup: Setup, task: DpoTask, pairs: list[Preference], run: Run | None = None
) -> Ready[PairIds]:
    """Everything that a training needs to know before its weights are loaded."""
    chat = chat_of(setup, run)
    prepared = prepare_dpo(setup, chat, ", ".join(task.prefs), pairs)
    longest = max(map(longest_side, prepared.train))
    largest = LargestPass(2 * setup.micro_batch, longest, setup.accumulation)
    config = config_of(setup.model) if setup.place.placement.device == "cpu" else None
    if config is not None and reads_pairs_once(config):
        longest = max(
            len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
            for pair in prepared.train
        )
        largest = LargestPass(setup.micro_batch, longest, setup.accumulation)
    return Ready(chat, prepared, fit(setup, largest))


def _show_plan(
    setup: Setup, task: DpoTask, pairs: list[Preference], objective: "Objective"
) -> None:
    ready = _prepare(setup, task, pairs)
    prepared = ready.prepared
    prepared.warnings += [text for text in (*setup.advice, why_not_of_this_model(task)) if text]
    measured = None
    if setup.options.probe:
        lengths = [longest_side(pair) for pair in prepared.train]
        measured = probe(
            ready, lengths, lambda training, rows: train_dpo(training, rows, [], objective)
        )
    show_plan(ready, plan_dpo(ready, len(pairs)), measured)


def _train(
    setup: Setup, task: DpoTask, pairs: list[Preference], objective: "Objective", run: Run
) -> Trained:
    ready = _prepare(setup, task, pairs, run)
    setup, prepared = ready.fit.setup, ready.prepared
    prepared.record(run, run.out / "dpo.jsonl")
    if warning := why_not_of_this_model(task):
        run.warn(warning)
    reference = what_the_reference_is(setup)
    weights = fingerprint_of(task.model)
    run.describe_models(
        {
            "policy": {"spec": task.model, **setup.place.describe()},
            "reference": {"spec": task.model, "weights": weights, "is": reference},
        }
    )
    run.save()
    console.say(setup.place.sentence())
    sampler = Sampler(ready.chat, prepared.prompts[: setup.options.samples])
    training = Training(setup, ready.chat, run, sampler)
    tuned = train_dpo(training, prepared.train, prepared.held_out, objective)
    run.tally({"reference_seconds": tuned.reference_seconds, "training": vars(tuned.trained)})
    values = setup.values
    facts = {
        "base and reference": task.model,
        "reference": reference,
        "method": f"DPO ({setup.options.method}), loss {values.loss_type}, beta {values.beta:g}",
        "pairs trained on": len(prepared.train),
        "epochs": tuned.trained.passes(values.epochs),
        "learning rate": values.learning_rate,
    }
    card = model_card(training, tuned.trained, "A model tuned by stage 2 of SRT", facts)
    rows = [pair.prompt_ids + pair.chosen_ids for pair in prepared.train]
    keep_model(tuned.model, training, card, rows)
    return tuned.trained


def what_the_reference_is(setup: Setup) -> str:
    """In words, for the manifest."""
    model, base = setup.model, base_of(setup.model)
    if setup.continues:
        return f"{base} with a frozen copy of the adapter of {model}"
    if base != model:
        return f"{base} with the adapter of {model} merged into it"
    return "the model that training starts from"


# --- The objective -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """A preference loss and what is added to it; names as in TRL's `DPOConfig`."""

    loss_type: LossType
    beta: float
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    """Weight of the mean negative log-likelihood of the chosen answers (RPO)."""
    ld_alpha: float | None = None
    """Weight of the tokens beyond the shorter answer's length (LD-DPO, arXiv 2409.06411)."""

    def arguments(self) -> dict[str, Any]:
        """For `DPOConfig`."""
        with_nll = self.nll_weight > 0
        return {
            "beta": self.beta,
            "loss_type": [self.loss_type, *(["sft"] if with_nll else [])],
            "loss_weights": [1.0, *([self.nll_weight] if with_nll else [])],
            "label_smoothing": self.label_smoothing,
            "ld_alpha": self.ld_alpha,
        }

    def first_loss(self) -> float | None:
        """The loss where policy and reference agree; None where it also depends on the answers."""
        if self.nll_weight > 0:
            return None
        ln_2, beta, smoothing = math.log(2), self.beta, self.label_smoothing
        match self.loss_type:
            case "sigmoid" | "sigmoid_norm" | "robust" | "aot" | "aot_unpaired":
                return ln_2
            case "hinge" | "apo_zero" | "apo_down":
                return 1.0
            case "ipo":
                return (1 / (2 * beta)) ** 2
            case "exo_pair":
                return -ln_2 - 0.5 * math.log(smoothing * (1 - smoothing))
            case "nca_pair" | "bco_pair":
                return 2 * ln_2
            case "sppo_hard":
                return 2 * (0.5 / beta) ** 2
            case "discopop":
                return 0.5 * ln_2 + 0.5


def objective_of(task: DpoTask, setup: Setup) -> Objective:
    """What is optimised, from options and recipe.

    Raises `UsageError` for weights outside their range, and where label smoothing would do nothing,
    or would be needed and is not given.
    """
    loss_type, share = setup.values.loss_type, label_smoothing_of(task)
    if task.label_smoothing is not None and loss_type not in SMOOTHED:
        raise UsageError(
            f"--label-smoothing does nothing under --loss-type {loss_type}. "
            "Pass --loss-type robust."
        )
    if loss_type == "exo_pair" and not share:
        raise UsageError("--loss-type exo_pair needs a --label-smoothing above 0, such as 0.001.")
    if task.ld_alpha is not None and not 0 <= task.ld_alpha <= 1:
        raise UsageError(
            "--ld-alpha: lies between 0 (cut at the shorter length) and 1 (plain DPO)."
        )
    return Objective(loss_type, setup.values.beta, share, task.nll_weight, task.ld_alpha)


def label_smoothing_of(task: DpoTask) -> float:
    """The share of wrong labels that the loss allows for."""
    given = task.label_smoothing
    if given is None:
        return 0.0
    if given == "auto":
        if len(task.prefs) > 1:
            raise UsageError("--label-smoothing auto reads the audit of one --prefs. Give a share.")
        prefs = task.prefs[0]
        manifest = read_manifest(Path(prefs))
        audit = manifest.tally("audit", dict[str, Any]) if manifest is not None else None
        if not audit or audit.get("noise") is None:
            raise SrtError(
                f"{prefs}: was never audited, so --label-smoothing auto knows nothing. Run srt "
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


# --- The training itself -----------------------------------------------------------------------


class _TokenisedDPOTrainer(WatchedTrainer, DPOTrainer):
    """A DPOTrainer whose rows are already token ids: the same ids that generation uses."""

    reference_seconds: float = 0.0
    """How long the reference's log-probs took, before the first step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._score_on_cpu()

    def _score_on_cpu(self) -> None:
        if not self.use_weighting:  # WPO wants figures that only TRL's own head gives
            for model in filter(None, (self.model, self.ref_model)):
                score_on_cpu(model, bf16=self.args.bf16, pairs=True)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        self._score_on_cpu()  # TRL calls this while it is being made
        started = time.monotonic()
        found: Dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds += time.monotonic() - started
        return found

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def train_dpo(
    training: Training, pairs: list[PairIds], held_out: list[PairIds], objective: Objective
) -> Tuned:
    """Prefer chosen over rejected: TRL's DPOTrainer on our own token ids.

    The reference is the model that training starts from: its log-probs are computed before the first
    step. Raises `SrtError` when the first loss says otherwise.
    """
    rows = keep_rows(_columns_of(pairs), training.out)
    held_rows = keep_rows(_columns_of(held_out), training.out) if held_out else None
    lengths = [longest_side(pair) for pair in pairs]
    tuned = _train_everywhere(training, rows, lengths, held_rows, objective)
    assert tuned is not None
    return tuned


def _columns_of(pairs: list[PairIds]) -> Columns:
    """Prompts and answers, as TRL names them."""
    return {
        "prompt_ids": [pair.prompt_ids for pair in pairs],
        "chosen_ids": [pair.chosen_ids for pair in pairs],
        "rejected_ids": [pair.rejected_ids for pair in pairs],
    }


@in_every_process
def _train_everywhere(
    training: Training,
    rows: Dataset,
    lengths: list[int],
    held_out: Dataset | None,
    objective: Objective,
) -> Tuned | None:
    setup = training.setup
    arguments = trainer_arguments(training, evaluates=held_out is not None) | {
        **objective.arguments(),
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": setup.micro_batch,
        # TRL's switch would take the adapters' dropout too, and the option would do nothing.
        "disable_dropout": False,
    }
    # Before the model: ZeRO-3 splits weights while they are loaded, if it knows of the training.
    config = DPOConfig(**arguments | dict(setup.fields))
    policy = _without_dropout(load_policy(setup))
    own_reference = _needs_reference_model(config, setup)
    trainer = _TokenisedDPOTrainer(
        order=LengthGroupedOrder(lengths, config.per_device_train_batch_size, setup.options.seed),
        model=policy,
        ref_model=_without_dropout(load_policy(setup)) if own_reference else None,
        args=config,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=training.chat.tokenizer,
        # An adapter that is trained further brings its own.
        peft_config=None if isinstance(policy, PeftModel) else lora_config(setup.adapters),
    )
    start = DpoStart(
        beta=objective.beta,
        loss=objective.first_loss(),
        tolerance=TOLERANCE_BF16 if setup.place.bf16 else TOLERANCE_FP32,
    )
    trained = train(trainer, training, start)
    model = whole_model(trainer, setup.adapters)
    return None if model is None else Tuned(model, trained, trainer.reference_seconds)


def _without_dropout(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    disable_dropout_in_model(model)
    if isinstance(model, PeftModel):
        for adapter in model.peft_config.values():
            # TRL copies an adapter that is trained further, with the dropout that it finds here.
            adapter.lora_dropout = 0.0
    return model


def _needs_reference_model(config: DPOConfig, setup: Setup) -> bool:
    """Whether TRL would load the reference itself, perhaps from a path that holds other weights.

    With adapters, the reference is the policy without them; log-probs are computed beforehand with
    the policy itself, except under FSDP, which has not split it by then.
    """
    if setup.adapters is not None:
        return False
    return not config.precompute_ref_log_probs or sharding() == "fsdp"

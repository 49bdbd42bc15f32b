"""Stage 1: fine-tune the policy on response, feedback and refinement (paper, section 3.1.2).

Read feedback, keep what teaches, prepare token ids and masks, fit the machine, train by TRL's
SFTTrainer, save, check the critic that came of it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from srt_cli import console
from srt_cli.errors import SrtError, TooManyFailures, UsageError
from srt_cli.feedback.critic_check import FEWEST_SCORES, MOSTLY, check_critic
from srt_cli.models.chat import ChatFormat
from srt_cli.records import FeedbackRecord
from srt_cli.runs.run import Run, read_manifest, why_not_whole
from srt_cli.stats.hygiene import is_same_text
from srt_cli.tables import many
from srt_cli.training.batches import (
    LengthGroupedOrder,
    decide_packing,
    keep_rows,
    largest_pass,
    pack,
    pack_length,
    packs_a_step,
)
from srt_cli.training.checkpoints import clear_checkpoints, open_training
from srt_cli.training.examples import prepare_sft
from srt_cli.training.head import score_on_cpu
from srt_cli.training.loop import Trained, Tuned, WatchedTrainer, train, trainer_arguments
from srt_cli.training.memory import fit
from srt_cli.training.options import TrainingOptions
from srt_cli.training.plan import Ready, plan_sft, show_plan
from srt_cli.training.probe import probe
from srt_cli.training.processes import in_every_process
from srt_cli.training.rows import (
    FEEDBACK_PARTS,
    PARTS,
    Fallen,
    FeedbackFile,
    SftTask,
    data_inputs,
    read_feedback,
    split_rows,
    write_dropped,
)
from srt_cli.training.samples import Sampler
from srt_cli.training.saving import finish_training, keep_model, model_card, whole_model
from srt_cli.training.sequences import IGNORED, TokenSequence, judging_tokens
from srt_cli.training.setup import (
    CONFIG_CLASSES,
    Setup,
    Training,
    chat_of,
    load_policy,
    lora_config,
    set_up,
)

DROPPED: Final = "sft.jsonl"
"""The file of dropped rows stands beside it."""
JUDGES: Final = "judges"
"""A column of ones where feedback judges, beside ids and labels."""


def fine_tune(options: TrainingOptions, task: SftTask) -> None:
    """Read feedback, keep what teaches, prepare, fit, train, check, save."""
    setup = set_up(options, "sft", task.model)
    if task.verdict_weight != 1 and setup.fields.get("label_smoothing_factor"):
        raise UsageError(
            "--verdict-weight weighs log-probabilities, of which --set label_smoothing_factor makes no "
            "use. Leave one of them out."
        )
    files = read_feedback(task.data, options.limit)
    _say_where_it_starts(task.model)
    if options.dry_run:
        _show_plan(setup, task, files)
    inputs = data_inputs(task.data)
    inputs |= {f"mix_{number}": mix.path for number, mix in enumerate(task.mixes, start=1)}
    run = open_training(setup, inputs, {})
    if options.dry_run:  # all that would be refused has been
        return
    if not run.complete:
        with run:
            for advice in setup.advice:
                run.warn(advice)
            _tell_of_rows(run, files)
            kept = [record for each in files for record in each.kept]
            _tell_of_feedback(run, task, kept)
            trained = _trained_before(run) or _train(setup, task, files, run)
            if task.critic_check and not task.targets.scores:
                console.say("no critic check: this model is not trained to score")
            elif task.critic_check:
                unseen = split_rows(kept, lambda record: record.prompt, options.eval_split)[1]
                check_critic(
                    run, unseen or kept, task.critic_check, task.good_score,
                    held_out=bool(unseen),
                )  # fmt: skip
            if not options.keep_checkpoints:
                clear_checkpoints(run.out)
        console.say(
            f"{trained.sentence()}; loss {trained.first_loss:.3f} to {trained.final_loss:.3f}"
        )
    finish_training(options, f"srt self-critique --model {options.out}")


def _say_where_it_starts(model: str) -> None:
    """Say that a model was tuned before, where its directory tells so."""
    directory = Path(model)
    maker = read_manifest(directory) if directory.is_dir() else None
    if maker is not None and maker.command in CONFIG_CLASSES:
        console.say(
            f"{model}: srt {maker.command} made it from {maker.settings.get('model')}; training goes on "
            "from there"
        )


def _tell_of_rows(run: Run, files: Sequence[FeedbackFile]) -> None:
    for each in files if len(files) > 1 else ():
        weight = f", weight {each.file.weight:g}" if each.file.weight != 1 else ""
        console.say(f"{each.file.path}: {many(each.read, 'row')}: {len(each.kept)} kept{weight}")
    fallen = _all_fallen(files)
    counts = Counter(row.reason for row in fallen)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    rows, kept = sum(each.read for each in files), sum(len(each.kept) for each in files)
    console.say(f"{many(rows, 'row')}: {kept} kept" + (f"; dropped: {reasons}" if reasons else ""))
    run.tally({"rows": rows, "kept": kept})
    if not kept:
        dropped = write_dropped(run.out / DROPPED, fallen)
        raise TooManyFailures(f"no row is left to train on ({reasons}). Look at {dropped}.")


def _all_fallen(files: Sequence[FeedbackFile]) -> list[Fallen]:
    return [row for each in files for row in each.fallen]


def _tell_of_feedback(run: Run, task: SftTask, kept: list[FeedbackRecord]) -> None:
    """Warn of feedback that is not whole, or teaches to copy; say how many drafts were cut."""
    for each in task.data:
        if not_whole := why_not_whole(each.path):
            run.warn(not_whole)
    poor = [row for row in kept if row.feedback and row.feedback.score < task.good_score]
    copies = sum(is_same_text(row.refinement or "", row.response or "") for row in poor)
    cut = sum(row.response_cut for row in kept)
    run.tally({"copies_of_poor_drafts": copies, "drafts_cut": cut})
    if cut:
        console.say(f"cut at the token limit: {cut} of {len(kept)} drafts ({cut / len(kept):.0%})")
    if len(poor) >= FEWEST_SCORES and copies > MOSTLY * len(poor):
        run.warn(
            f"{copies} of {len(poor)} refinements of drafts that score below {task.good_score:g} copy "
            "them, and a model trained on that learns to copy what it has just criticised. Likely "
            "cause: the critic does not refine. Take another, or leave the refinements out: srt sft "
            "--loss-on response,feedback."
        )
    shows = "response" in task.targets.loss_on and not task.targets.refinement_only
    if shows and cut >= FEWEST_SCORES and cut > MOSTLY * len(kept):
        run.warn(
            f"{cut} of {len(kept)} drafts were cut at the token limit, and a model trained on them "
            "learns to end in the middle of a sentence. Collect them with a larger --max-new-tokens, "
            "or leave them out of the loss: srt sft --loss-on feedback,refinement."
        )


def _trained_before(run: Run) -> Trained | None:
    """The figures of a training whose model is saved, but whose critic check was interrupted."""
    if run.earlier is None:
        return None
    earlier = run.earlier.tally("training", Trained)
    saved = any((run.out / name).is_file() for name in ("config.json", "adapter_config.json"))
    if earlier is None or not saved or "saved" not in run.earlier.tallies:
        return None  # a model that was not read back has still to be trusted
    run.tally(run.earlier.tallies)
    run.describe_models(run.earlier.models)
    run.manifest.warnings += run.earlier.warnings
    console.say("trained and saved already; only the critic check is left")
    return earlier


def _prepare(
    setup: Setup,
    task: SftTask,
    files: Sequence[FeedbackFile],
    run: Run | None = None,
) -> Ready[TokenSequence]:
    """Everything that a training needs to know before its weights are loaded."""
    chat = chat_of(setup, run)
    prepared = prepare_sft(setup, chat, files, task)
    prepared.fallen = _all_fallen(files) + prepared.fallen
    lengths = _lengths(prepared.train)
    packing = decide_packing(task.packing, lengths, setup)
    return Ready(chat, prepared, fit(setup, largest_pass(lengths, packing, setup)), packing)


def _lengths(sequences: list[TokenSequence]) -> list[int]:
    return [len(sequence.input_ids) for sequence in sequences]


def _show_plan(setup: Setup, task: SftTask, files: Sequence[FeedbackFile]) -> None:
    if not any(each.kept for each in files):
        named = ", ".join(str(file.path) for file in task.data)
        raise TooManyFailures(f"{named}: no row is left to train on.")
    ready = _prepare(setup, task, files)
    prepared = ready.prepared
    prepared.warnings += setup.advice
    _verdict_weight(ready.chat, prepared.train, task.verdict_weight)
    measured = None
    if setup.options.probe:
        measured = probe(ready, _lengths(prepared.train), train_sft)
    show_plan(ready, plan_sft(ready, sum(each.read for each in files)), measured)


def _train(setup: Setup, task: SftTask, files: Sequence[FeedbackFile], run: Run) -> Trained:
    ready = _prepare(setup, task, files, run)
    setup, prepared, packing = ready.fit.setup, ready.prepared, ready.packing
    assert packing is not None
    prepared.record(run, run.out / DROPPED)
    run.tally({"packing": vars(packing)})
    console.say(packing.sentence())
    run.describe_models({task.model: setup.place.describe()})
    run.save()
    console.say(setup.place.sentence())
    sampler = Sampler(ready.chat, prepared.prompts[: setup.options.samples])
    training = Training(setup, ready.chat, run, sampler, packing.on)
    weight = _verdict_weight(ready.chat, prepared.train, task.verdict_weight)
    tuned = train_sft(training, prepared.train, prepared.held_out, weight)
    run.tally({"training": vars(tuned.trained)})
    loss_on = ", ".join(task.targets.loss_on)
    facts = {
        "base": task.model,
        "method": f"supervised fine-tuning ({setup.options.method}), loss on {loss_on}",
        "sequences trained on": len(prepared.train),
        "epochs": tuned.trained.passes(setup.values.epochs),
        "learning rate": setup.values.learning_rate,
    }
    card = model_card(training, tuned.trained, "A model tuned by stage 1 of SRT", facts)
    rows = [sequence.input_ids for sequence in prepared.train]
    keep_model(tuned.model, training, card, rows)
    run.save()
    return tuned.trained


def _verdict_weight(
    chat: ChatFormat, sequences: list[TokenSequence], times: float
) -> "VerdictWeight | None":
    """What a token that judges weighs, and any other; None where all weigh the same.

    The mean weight of a trained token is 1, so the loss keeps its size. Raises `SrtError` where no
    feedback judges.
    """
    if times == 1:
        return None
    places = [judging_tokens(chat, sequence) for sequence in sequences]
    judging = sum(map(len, places))
    if not judging:
        raise SrtError(
            "--verdict-weight: no feedback here holds a score, or an item that ends in yes or no. "
            "Leave it out."
        )
    trained = sum(sum(sequence.trained.values()) for sequence in sequences)
    whole = trained + (times - 1) * judging
    console.say(
        f"{judging} trained tokens are verdicts or scores; weighing {times:g} times, they make up "
        f"{times * judging / whole:.0%} of the loss instead of {judging / trained:.0%}"
    )
    return VerdictWeight(places, times * trained / whole, trained / whole)


# --- The training itself -----------------------------------------------------------------------


@dataclass(frozen=True)
class VerdictWeight:
    """Where each sequence judges, and what its trained tokens weigh there and elsewhere."""

    places: list[list[int]]
    judging: float
    other: float


def train_sft(
    training: Training,
    sequences: list[TokenSequence],
    held_out: list[TokenSequence] | None = None,
    weight: VerdictWeight | None = None,
) -> Tuned:
    """Fine-tune on the sequences' labels: TRL's SFTTrainer on our own token ids and masks."""
    columns, setup = _columns_of(sequences), training.setup
    if weight is not None:
        columns[JUDGES] = [
            [int(place in judging) for place in range(len(sequence.input_ids))]
            for sequence, judging in zip(sequences, map(set, weight.places), strict=True)
        ]
    batches = {}
    if training.packed:
        columns = pack(columns, pack_length(_lengths(sequences), setup.micro_batch))
        packs = len(columns["input_ids"])
        batches = {
            "padding_free": True,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": packs_a_step(
                len(sequences), packs, setup.values.global_batch, setup.processes
            ),
        }
    lengths = [len(ids) for ids in columns["input_ids"]]
    weights = None if weight is None else (weight.other, weight.judging)
    passes = _Passes(keep_rows(columns, training.out), lengths, batches, weights)
    tuned = _train_everywhere(training, passes, held_out or [])
    assert tuned is not None
    return tuned


def _columns_of(sequences: list[TokenSequence]) -> dict[str, list[list[int]]]:
    """Ids and labels, as TRL names them."""
    return {
        "input_ids": [sequence.input_ids for sequence in sequences],
        "labels": [sequence.labels for sequence in sequences],
    }


@dataclass(frozen=True)
class _Passes:
    """Rows on disk, their lengths, and how they become forward passes, as TRL names it."""

    rows: Dataset
    lengths: list[int]
    batches: dict[str, Any]
    weights: tuple[float, float] | None
    """Of a token, and of one that judges; None where all weigh 1."""


@in_every_process
def _train_everywhere(
    training: Training, passes: _Passes, held_out: list[TokenSequence]
) -> Tuned | None:
    setup = training.setup
    arguments = trainer_arguments(training, evaluates=bool(held_out)) | {
        # Our labels say what is trained; TRL is to change neither ids nor masks.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "packing": False,
    }
    # Before the model: ZeRO-3 splits weights while they are loaded, if it knows of the training.
    config = SFTConfig(**arguments | passes.batches | dict(setup.fields))
    trainer = _PartwiseTrainer(
        held_out=held_out,
        weights=passes.weights,
        order=LengthGroupedOrder(
            passes.lengths, config.per_device_train_batch_size, setup.options.seed
        ),
        model=load_policy(setup),
        args=config,
        train_dataset=passes.rows,
        eval_dataset=Dataset.from_dict(dict(_columns_of(held_out))) if held_out else None,
        processing_class=training.chat.tokenizer,
        peft_config=lora_config(setup.adapters),
    )
    trained = train(trainer, training)
    model = whole_model(trainer, setup.adapters)
    return None if model is None else Tuned(model, trained)


# --- The loss on rows that are held out --------------------------------------------------------


class _PartwiseTrainer(WatchedTrainer, SFTTrainer):
    """An SFTTrainer that evaluates each part separately, and may let verdicts weigh more."""

    def __init__(
        self,
        *,
        held_out: list[TokenSequence],
        weights: tuple[float, float] | None = None,
        **arguments: Any,
    ) -> None:
        self._held_out = held_out
        self._weights = weights
        super().__init__(**arguments)
        score_on_cpu(self.model, bf16=self.args.bf16, pairs=False)
        if weights is not None:
            self.data_collator = _collating_judges(self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: Any = self._signature_columns
        if self._weights is not None and JUDGES not in known:
            known.append(JUDGES)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        judges = inputs.pop(JUDGES, None)
        if judges is None or self._weights is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        assert self.model is not None
        other, judging = self._weights
        weights = torch.where(judges[:, 1:] == 1, judging, other)  # (batch, tokens - 1)
        with _weighing(self.model, weights):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluation_loop(
        self, dataloader: DataLoader[Any], *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        micro_batch = self.args.per_device_eval_batch_size
        return loss_by_part(self, self._held_out, micro_batch, metric_key_prefix)


def _collating_judges(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """A collator that lays the column of judging tokens out as it lays out labels."""

    def collate_both(rows: list[Any]) -> Any:
        inputs = collate(rows)
        if JUDGES in rows[0]:
            inputs[JUDGES] = collate([{**row, "labels": row[JUDGES]} for row in rows])["labels"]
        return inputs

    return collate_both


@contextmanager
def _weighing(model: nn.Module, weights: Tensor) -> Iterator[None]:
    """Let a model answer with weighted log-probs, from which TRL makes its loss."""

    def weigh(_: nn.Module, __: Any, outputs: Any) -> Any:
        outputs.log_probs = outputs.log_probs * weights
        return outputs

    hook = model.register_forward_hook(weigh)
    try:
        yield
    finally:
        hook.remove()


def loss_by_part(
    trainer: Trainer, sequences: list[TokenSequence], micro_batch: int, prefix: str
) -> EvalLoopOutput:
    """Mean loss over the trained tokens of all sequences: `loss`, and `loss_PART` for each part.

    `loss` is that of the feedback records' parts; chats mixed in have their own. Each token weighs
    the same, whichever batch and process it is in.
    """
    model: Any = trainer.model_wrapped
    model.eval()
    sums = torch.zeros(len(PARTS), 2, dtype=torch.float64)
    accelerator = trainer.accelerator
    own = _share_of_process(sequences, accelerator.process_index, accelerator.num_processes)
    for start in range(0, len(own), micro_batch):
        batch = own[start : start + micro_batch]
        codes = [_part_codes(sequence) for sequence in batch]
        inputs = _collate(trainer, batch, [sequence.labels for sequence in batch])
        parts = _collate(trainer, batch, codes)["labels"][:, 1:]
        with torch.no_grad(), trainer.compute_loss_context_manager():
            losses = -model(**inputs, use_cache=False, fused_lm_head=True).log_probs
        for number in range(len(PARTS)):
            places = parts == number
            sums[number, 0] += losses[places].double().sum().cpu()
            sums[number, 1] += places.sum().cpu()
    # Summed in float32: it rounds the mean at 1e-7, far below what matters in a loss.
    summed = accelerator.reduce(sums.float().to(accelerator.device), reduction="sum").cpu()
    metrics = {
        f"{prefix}_loss_{part}": float(total / count)
        for part, (total, count) in zip(PARTS, summed, strict=True)
        if count
    }
    total, count = summed[[PARTS.index(part) for part in FEEDBACK_PARTS]].sum(0)
    metrics = {f"{prefix}_loss": float(total / count)} | metrics
    return EvalLoopOutput(None, None, metrics, len(sequences))  # type: ignore[arg-type]


def _share_of_process(
    sequences: list[TokenSequence], process: int, processes: int
) -> list[TokenSequence]:
    """This process's sequences, by length; as many as each other process has, so that none waits."""
    ordered = sorted(sequences, key=lambda sequence: len(sequence.input_ids))
    silent = TokenSequence("", ordered[0].input_ids, [IGNORED] * len(ordered[0].input_ids), ())
    own = ordered[process::processes]
    return own + [silent] * (-(-len(ordered) // processes) - len(own))


def _part_codes(sequence: TokenSequence) -> list[int]:
    codes = [IGNORED] * len(sequence.input_ids)
    for part, places in sequence.parts:
        for place in places:
            if sequence.labels[place] != IGNORED:
                codes[place] = PARTS.index(part)
    return codes


def _collate(
    trainer: Trainer, batch: list[TokenSequence], labels: list[list[int]]
) -> dict[str, Any]:
    rows = [
        {"input_ids": sequence.input_ids, "labels": marks}
        for sequence, marks in zip(batch, labels, strict=True)
    ]
    inputs: Any = trainer.data_collator(rows)
    return dict(trainer._prepare_inputs(inputs))

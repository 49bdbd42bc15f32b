"""Stage 2's training: TRL's DPOTrainer on our own token ids."""

import time
from collections.abc import Callable
from typing import Any, Final

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from srt_cli.runs.run import Run
from srt_cli.training.arguments import training_arguments
from srt_cli.training.batches import keep_rows
from srt_cli.training.evaluation import evaluation_arguments
from srt_cli.training.examples import longest_side
from srt_cli.training.gathering import whole_model
from srt_cli.training.health import DpoStart
from srt_cli.training.loop import Trained, train
from srt_cli.training.lora import lora_config
from srt_cli.training.objective import Objective
from srt_cli.training.order import LengthGroupedOrder, OrderedTrainer
from srt_cli.training.place import sharding
from srt_cli.training.processes import in_every_process
from srt_cli.training.samples import Sampler
from srt_cli.training.sequences import PairIds
from srt_cli.training.setup import Setup

# Of a log-prob, which other company in a batch may change by rounding alone.
TOLERANCE_FP32: Final = 1e-4
TOLERANCE_BF16: Final = 1e-2


class _TokenisedDPOTrainer(OrderedTrainer, DPOTrainer):
    """A DPOTrainer whose rows are token ids already: the very ids that generation uses."""

    reference_seconds: float = 0.0
    """How long the reference's log-probs took, before the first step."""

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        started = time.monotonic()
        found: Dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds += time.monotonic() - started
        return found

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def train_dpo(
    load_policy: Callable[[], PreTrainedModel | PeftModel],
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[PairIds],
    held_out: list[PairIds],
    objective: Objective,
    setup: Setup,
    run: Run,
    sampler: Sampler,
) -> tuple[PreTrainedModel | PeftModel, Trained]:
    """Prefer chosen over rejected; returns the model, its adapter apart, and the figures.

    The reference is the model as `load_policy` gives it: its log-probs are computed before the first
    step. Raises `SrtError` when the first loss says otherwise.
    """
    rows = keep_rows(columns_of(pairs), run.out)
    held_rows = keep_rows(columns_of(held_out), run.out) if held_out else None
    lengths = [longest_side(pair) for pair in pairs]
    model, trained = _train_everywhere(
        load_policy, tokenizer, rows, lengths, held_rows, objective, setup, run, sampler
    )
    assert model is not None
    return model, trained


def columns_of(pairs: list[PairIds]) -> dict[str, list[list[int]]]:
    """Prompts and answers, as TRL names them."""
    return {
        "prompt_ids": [pair.prompt_ids for pair in pairs],
        "chosen_ids": [pair.chosen_ids for pair in pairs],
        "rejected_ids": [pair.rejected_ids for pair in pairs],
    }


@in_every_process
def _train_everywhere(
    load_policy: Callable[[], PreTrainedModel | PeftModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    lengths: list[int],
    held_out: Dataset | None,
    objective: Objective,
    setup: Setup,
    run: Run,
    sampler: Sampler,
) -> tuple[PreTrainedModel | PeftModel | None, Trained]:
    arguments = training_arguments(setup, run.out) | {
        **objective.arguments(),
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": setup.micro_batch,
        # TRL's switch would take the adapters' dropout too, and the option would do nothing.
        "disable_dropout": False,
    }
    if held_out is not None:
        arguments |= evaluation_arguments(setup, run.out)
    # Before the model: ZeRO-3 splits weights while they are loaded, if it knows of the training.
    config = DPOConfig(**arguments | setup.fields)
    policy = _without_dropout(load_policy())
    trainer = _TokenisedDPOTrainer(
        order=LengthGroupedOrder(lengths, config.per_device_train_batch_size, setup.seed),
        model=policy,
        ref_model=_without_dropout(load_policy())
        if _needs_reference_model(config, setup)
        else None,
        args=config,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        # An adapter that is gone on with brings its own.
        peft_config=None if isinstance(policy, PeftModel) else lora_config(setup.adapters),
    )
    run.manifest.tallies["reference_seconds"] = trainer.reference_seconds
    start = DpoStart(
        beta=objective.beta,
        loss=objective.first_loss(),
        tolerance=TOLERANCE_BF16 if setup.place.bf16 else TOLERANCE_FP32,
    )
    trained = train(trainer, run, setup, sampler, start)
    return whole_model(trainer, setup.adapters), trained


def _without_dropout(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    disable_dropout_in_model(model)
    if isinstance(model, PeftModel):
        for adapter in model.peft_config.values():
            # Of an adapter that is gone on with TRL makes a frozen copy, with the dropout it finds here.
            adapter.lora_dropout = 0.0
    return model


def _needs_reference_model(config: DPOConfig, setup: Setup) -> bool:
    """Whether TRL would load the reference itself, from a path that may hold other weights.

    With adapters, the reference is the policy without them; log-probs are computed beforehand with
    the policy itself, except under FSDP, which has not split it by then.
    """
    if setup.adapters is not None:
        return False
    return not config.precompute_ref_log_probs or sharding() == "fsdp"

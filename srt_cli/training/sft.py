"""Stage 1's training: TRL's SFTTrainer on our own token ids and masks."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from srt_cli.artifacts import Run
from srt_cli.training.arguments import training_arguments
from srt_cli.training.gathering import whole_model
from srt_cli.training.loop import Trained, train
from srt_cli.training.lora import lora_config
from srt_cli.training.meter import MeteredTrainer
from srt_cli.training.order import LengthGroupedOrder
from srt_cli.training.processes import in_every_process
from srt_cli.training.rows import keep_rows
from srt_cli.training.samples import Sampler
from srt_cli.training.sequences import Sequence
from srt_cli.training.setup import Setup


class _OrderedSFTTrainer(MeteredTrainer, SFTTrainer):
    """An SFTTrainer that takes rows in the order it is given."""

    def __init__(self, *, order: LengthGroupedOrder, **arguments: Any) -> None:
        self._order = order
        super().__init__(**arguments)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthGroupedOrder:
        return self._order


def train_sft(
    load_policy: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    sequences: list[Sequence],
    setup: Setup,
    run: Run,
    sampler: Sampler,
) -> tuple[PreTrainedModel, Trained]:
    """Fine-tune on the sequences' labels; returns the model (adapters merged) and the figures."""
    columns = {
        "input_ids": [sequence.input_ids for sequence in sequences],
        "labels": [sequence.labels for sequence in sequences],
    }
    lengths = [len(sequence.input_ids) for sequence in sequences]
    rows = keep_rows(columns, run.out)
    model, trained = _train_everywhere(load_policy, tokenizer, rows, lengths, setup, run, sampler)
    assert model is not None
    return model, trained


@in_every_process
def _train_everywhere(
    load_policy: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    lengths: list[int],
    setup: Setup,
    run: Run,
    sampler: Sampler,
) -> tuple[PreTrainedModel | None, Trained]:
    arguments = training_arguments(setup, run.out) | {
        # Our labels say what is trained; TRL is to change neither ids nor masks.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "packing": False,
    }
    # Before the model: ZeRO-3 splits weights while they are loaded, if it knows of the training.
    config = SFTConfig(**arguments | setup.fields)
    trainer = _OrderedSFTTrainer(
        order=LengthGroupedOrder(lengths, setup.micro_batch, setup.seed),
        model=load_policy(),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(setup.adapters),
    )
    trained = train(trainer, run, setup, sampler)
    return whole_model(trainer, run.out, setup.adapters), trained

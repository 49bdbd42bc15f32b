"""Stage 1's training: TRL's SFTTrainer on our own token ids and masks."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer

from srt_cli.artifacts import Run
from srt_cli.training.arguments import training_arguments
from srt_cli.training.loop import Trained, train
from srt_cli.training.lora import lora_config, merge_and_keep_adapter
from srt_cli.training.order import LengthGroupedOrder
from srt_cli.training.sequences import Sequence
from srt_cli.training.setup import Setup


class _OrderedSFTTrainer(SFTTrainer):
    """An SFTTrainer that takes rows in the order it is given."""

    def __init__(self, *, order: LengthGroupedOrder, **arguments: Any) -> None:
        self._order = order
        super().__init__(**arguments)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthGroupedOrder:
        return self._order


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: list[Sequence],
    setup: Setup,
    run: Run,
) -> tuple[PreTrainedModel, Trained]:
    """Fine-tune on the sequences' labels; returns the model (adapters merged) and the figures."""
    arguments = training_arguments(setup, run.out) | {
        # Our labels say what is trained; TRL is to change neither ids nor masks.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "packing": False,
    }
    rows = [{"input_ids": s.input_ids, "labels": s.labels} for s in sequences]
    order = LengthGroupedOrder(
        [len(sequence.input_ids) for sequence in sequences], setup.micro_batch, setup.seed
    )
    trainer: Trainer = _OrderedSFTTrainer(
        order=order,
        model=model,
        args=SFTConfig(**arguments | setup.fields),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(setup.adapters),
    )
    tokens = sum(len(sequence.input_ids) for sequence in sequences)
    trained = train(trainer, run, save_every=setup.save_every, tokens_an_epoch=tokens)
    return merge_and_keep_adapter(trainer, run.out, setup.adapters), trained

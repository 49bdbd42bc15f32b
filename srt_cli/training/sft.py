"""Stage 1's training: TRL's SFTTrainer on our own token ids and masks."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from srt_cli.runs.run import Run
from srt_cli.training.arguments import training_arguments
from srt_cli.training.batches import keep_rows
from srt_cli.training.evaluation import evaluation_arguments, loss_by_part
from srt_cli.training.gathering import whole_model
from srt_cli.training.loop import Trained, train
from srt_cli.training.lora import lora_config
from srt_cli.training.order import LengthGroupedOrder, OrderedTrainer
from srt_cli.training.packing import Packing, pack, pack_length, packs_a_step
from srt_cli.training.processes import in_every_process
from srt_cli.training.samples import Sampler
from srt_cli.training.sequences import Sequence
from srt_cli.training.setup import Setup


class _OwnSFTTrainer(OrderedTrainer, SFTTrainer):
    """An SFTTrainer that evaluates by part."""

    def __init__(self, *, held_out: list[Sequence], **arguments: Any) -> None:
        self._held_out = held_out
        super().__init__(**arguments)

    def evaluation_loop(
        self, dataloader: DataLoader[Any], *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        micro_batch = self.args.per_device_eval_batch_size
        return loss_by_part(self, self._held_out, micro_batch, metric_key_prefix)


def train_sft(
    load_policy: Callable[[], PreTrainedModel | PeftModel],
    tokenizer: PreTrainedTokenizerBase,
    sequences: list[Sequence],
    held_out: list[Sequence],
    packing: Packing,
    setup: Setup,
    run: Run,
    sampler: Sampler,
) -> tuple[PreTrainedModel | PeftModel, Trained]:
    """Fine-tune on the sequences' labels; returns the model, its adapter apart, and the figures."""
    columns = columns_of(sequences)
    if packing.on:
        columns = packed(columns, setup)
    rows = keep_rows(columns, run.out)
    lengths = [len(ids) for ids in columns["input_ids"]]
    batches = batch_arguments(len(sequences), len(rows), packing, setup)
    model, trained = _train_everywhere(
        load_policy, tokenizer, rows, lengths, batches, held_out, setup, run, sampler
    )
    assert model is not None
    return model, trained


def columns_of(sequences: list[Sequence]) -> dict[str, list[list[int]]]:
    """Ids and labels, as TRL names them."""
    return {
        "input_ids": [sequence.input_ids for sequence in sequences],
        "labels": [sequence.labels for sequence in sequences],
    }


def packed(columns: dict[str, list[list[int]]], setup: Setup) -> dict[str, list[list[int]]]:
    """The same rows in packs that cost about as much memory as `--micro-batch` of them."""
    lengths = [len(ids) for ids in columns["input_ids"]]
    return pack(columns, pack_length(lengths, setup.micro_batch))


def batch_arguments(rows: int, passes: int, packing: Packing, setup: Setup) -> dict[str, Any]:
    """For `SFTConfig`: how much of the data is a forward pass, and how many passes are a step."""
    if not packing.on:
        return {}
    share = packs_a_step(rows, passes, setup.values.global_batch, setup.processes)
    return {
        "padding_free": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": share,
    }


@in_every_process
def _train_everywhere(
    load_policy: Callable[[], PreTrainedModel | PeftModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    lengths: list[int],
    batches: dict[str, Any],
    held_out: list[Sequence],
    setup: Setup,
    run: Run,
    sampler: Sampler,
) -> tuple[PreTrainedModel | PeftModel | None, Trained]:
    arguments = training_arguments(setup, run.out) | {
        # Our labels say what is trained; TRL is to change neither ids nor masks.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "packing": False,
    }
    arguments |= batches
    if held_out:
        arguments |= evaluation_arguments(setup, run.out)
    # Before the model: ZeRO-3 splits weights while they are loaded, if it knows of the training.
    config = SFTConfig(**arguments | setup.fields)
    trainer = _OwnSFTTrainer(
        held_out=held_out,
        order=LengthGroupedOrder(lengths, config.per_device_train_batch_size, setup.seed),
        model=load_policy(),
        args=config,
        train_dataset=rows,
        eval_dataset=Dataset.from_dict(columns_of(held_out)) if held_out else None,
        processing_class=tokenizer,
        peft_config=lora_config(setup.adapters),
    )
    trained = train(trainer, run, setup, sampler)
    return whole_model(trainer, setup.adapters), trained

"""Stage 2's training: TRL's DPOTrainer on our own token ids."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from srt_cli.artifacts import Run
from srt_cli.training.arguments import training_arguments
from srt_cli.training.loop import Trained, train
from srt_cli.training.lora import lora_config, merge_and_keep_adapter
from srt_cli.training.objective import Objective
from srt_cli.training.sequences import PairIds
from srt_cli.training.setup import Setup


class _TokenisedDPOTrainer(DPOTrainer):
    """A DPOTrainer whose rows are token ids already: the very ids that generation uses."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def train_dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[PairIds],
    objective: Objective,
    setup: Setup,
    run: Run,
) -> tuple[PreTrainedModel, Trained]:
    """Prefer chosen over rejected; returns the model (adapters merged) and the figures.

    The reference is the model as it comes in: its log-probs are computed before the first step.
    Raises `SrtError` when the first loss says otherwise.
    """
    arguments = training_arguments(setup, run.out) | {
        **objective.arguments(),
        # Computed from the very weights that training starts from; TRL would reload them from disk.
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": setup.micro_batch,
        # TRL's switch would take the adapters' dropout too, and the option would do nothing.
        "disable_dropout": False,
    }
    disable_dropout_in_model(model)
    rows = [
        {"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids}
        for p in pairs
    ]
    trainer: Trainer = _TokenisedDPOTrainer(
        model=model,
        args=DPOConfig(**arguments | setup.fields),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(setup.adapters),
    )
    tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    trained = train(
        trainer,
        run,
        save_every=setup.save_every,
        tokens_an_epoch=tokens,
        first_loss=objective.first_loss(),
    )
    return merge_and_keep_adapter(trainer, run.out, setup.adapters), trained

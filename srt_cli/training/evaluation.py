"""The loss on rows that are held out, for each part apart."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from srt_cli.training.checkpoints import newest_checkpoint
from srt_cli.training.processes import team
from srt_cli.training.rows import FEEDBACK_PARTS, PARTS
from srt_cli.training.sequences import IGNORED, Sequence
from srt_cli.training.setup import Setup

EVALUATIONS_A_RUN: Final = 10


def evaluation_arguments(setup: Setup, out: Path) -> dict[str, Any]:
    """For TRL's configs: evaluate before the first step, every so many steps, and at the end."""
    return {
        "eval_strategy": "steps",
        # A float below 1 is a share of the steps.
        "eval_steps": setup.eval_every or 1 / EVALUATIONS_A_RUN,
        "eval_on_start": team().share(newest_checkpoint(out)[0] is None),
        "per_device_eval_batch_size": setup.micro_batch,
    }


def loss_by_part(
    trainer: Trainer, sequences: list[Sequence], micro_batch: int, prefix: str
) -> EvalLoopOutput:
    """Mean loss over the trained tokens of all sequences: `loss`, and `loss_PART` for each part.

    `loss` is that of the feedback records' parts; chats mixed in have their own. Each token weighs
    the same, whichever batch and process it is in.
    """
    model: Any = trainer.model_wrapped
    model.eval()
    sums = torch.zeros(len(PARTS), 2, dtype=torch.float64)
    accelerator = trainer.accelerator
    share = _share_of_process(
        sequences, micro_batch, accelerator.process_index, accelerator.num_processes
    )
    for batch in share:
        codes = [_part_codes(sequence) for sequence in batch]
        inputs = _collate(trainer, batch, [sequence.labels for sequence in batch])
        parts = _collate(trainer, batch, codes)["labels"][:, 1:]
        with torch.no_grad(), trainer.compute_loss_context_manager():
            losses = -model(**inputs, use_cache=False, fused_lm_head=True).log_probs
        for number in range(len(PARTS)):
            places = parts == number
            sums[number, 0] += losses[places].double().sum().cpu()
            sums[number, 1] += places.sum().cpu()
    # A device that sums in float32 rounds the mean at 1e-7, far below what a loss can tell.
    summed = accelerator.reduce(sums.float().to(accelerator.device), reduction="sum").cpu()
    metrics = {
        f"{prefix}_loss_{part}": float(total / count)
        for part, (total, count) in zip(PARTS, summed, strict=True)
        if count
    }
    own = summed[[PARTS.index(part) for part in FEEDBACK_PARTS]].sum(0)
    metrics = {f"{prefix}_loss": float(own[0] / own[1])} | metrics
    return EvalLoopOutput(None, None, metrics, len(sequences))  # type: ignore[arg-type]


def _share_of_process(
    sequences: list[Sequence], micro_batch: int, process: int, processes: int
) -> Iterator[list[Sequence]]:
    """This process's batches, of like lengths; as many as every other's, so that none waits."""
    ordered = sorted(sequences, key=lambda sequence: len(sequence.input_ids))
    silent = Sequence("", ordered[0].input_ids, [IGNORED] * len(ordered[0].input_ids), ())
    own = ordered[process::processes]
    longest = -(-len(ordered) // processes)
    own += [silent] * (longest - len(own))
    for start in range(0, longest, micro_batch):
        yield own[start : start + micro_batch]


def _part_codes(sequence: Sequence) -> list[int]:
    codes = [IGNORED] * len(sequence.input_ids)
    for part, places in sequence.parts:
        for place in places:
            if sequence.labels[place] != IGNORED:
                codes[place] = PARTS.index(part)
    return codes


def _collate(trainer: Trainer, batch: list[Sequence], labels: list[list[int]]) -> dict[str, Any]:
    rows = [
        {"input_ids": sequence.input_ids, "labels": marks}
        for sequence, marks in zip(batch, labels, strict=True)
    ]
    inputs: Any = trainer.data_collator(rows)
    return dict(trainer._prepare_inputs(inputs))

"""What becomes of a trained model: merged or not, saved, read back from disk, and compared."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srt_cli import console
from srt_cli.errors import SrtError
from srt_cli.models.hub import push_model
from srt_cli.models.weights import Placement, load_weights
from srt_cli.runs.run import Run
from srt_cli.training.checkpoints import full_disk_in_one_sentence
from srt_cli.training.merging import merge, name_base
from srt_cli.training.options import TrainingOptions
from srt_cli.training.saving import LAST, save_model
from srt_cli.training.setup import Setup

PROBED_ROWS: Final = 4
PROBED_TOKENS: Final = 64
# Of the largest logit, which the order of sums may change.
TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def keep_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    rows: Sequence[Sequence[int]],
    base: str,
    options: TrainingOptions,
    setup: Setup,
    run: Run,
) -> None:
    """Merge the adapter if asked to, save into `run.out`, and read the model back from there.

    `rows` are token ids on whose beginnings models are compared; `base` is what was trained from.
    Raises `SrtError` when what stands on disk does not answer as what was trained.
    """
    if isinstance(model, PeftModel):
        name_base(model, base)
    probe = [list(row[:PROBED_TOKENS]) for row in rows[:PROBED_ROWS]]
    trained = logits_of(model, probe)
    found: dict[str, Any] = {}
    quantized = options.method == "qlora"
    with full_disk_in_one_sentence(run):
        if isinstance(model, PeftModel) and options.merge:
            model = merge(model, base, options, setup, run.out)
            merged = logits_of(model, probe)
            found |= _say_what_merging_changed(trained, merged, probe)
            trained, quantized = merged, False
        save_model(model, tokenizer, run.out, card)
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    placement = Placement(setup.place.placement.device, dtype, "as it was saved")
    del model
    gc.collect()
    found |= _read_back(run, placement, trained, probe, quantized, options)
    run.manifest.tallies["saved"] = found


def logits_of(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of each row alone, (tokens, vocabulary), float32 on the CPU."""
    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = [
            model(input_ids=torch.tensor([row], device=device)).logits[0].float().cpu()
            for row in rows
        ]
    model.train(was_training)
    return found


def largest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Between two models' logits on the same rows."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def mean_loss(logits: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> float:
    """Mean negative log-likelihood of each token but the first."""
    losses = [
        torch.nn.functional.cross_entropy(scores[:-1], torch.tensor(row[1:]), reduction="none")
        for scores, row in zip(logits, rows, strict=True)
    ]
    return float(torch.cat(losses).mean())


def _say_what_merging_changed(
    before: Sequence[Tensor], after: Sequence[Tensor], rows: Sequence[Sequence[int]]
) -> dict[str, Any]:
    found = {
        "loss_before_merge": mean_loss(before, rows),
        "loss_after_merge": mean_loss(after, rows),
        "merge_largest_logit_difference": largest_difference(before, after),
    }
    console.say(
        f"merged the adapter: the loss of {len(rows)} rows was {found['loss_before_merge']:.4f}, "
        f"is {found['loss_after_merge']:.4f}; largest difference of a logit "
        f"{found['merge_largest_logit_difference']:.2g}"
    )
    return found


def _read_back(
    run: Run,
    placement: Placement,
    trained: Sequence[Tensor],
    rows: Sequence[Sequence[int]],
    quantized: bool,
    options: TrainingOptions,
) -> dict[str, Any]:
    """Load what was saved and compare; an adapter trained on 4 bits comes back on the full base."""
    model = load_weights(
        str(run.out), placement=placement, trust_remote_code=options.trust_remote_code
    )
    read = logits_of(model, rows)
    difference = largest_difference(trained, read)
    scale = max(1.0, *(float(scores.abs().max()) for scores in trained))
    allowed = TOLERANCE.get(placement.dtype, 5e-2) * scale
    # `not <=` also catches a difference that is no number.
    if not quantized and not difference <= allowed:
        _take_back(run.out)
        raise SrtError(
            f"{run.out}: read back from disk, the model does not answer as the one that was trained "
            f"(a logit differs by {difference:.3g}). It is not kept; run the same line again, and "
            "report this."
        )
    console.say(
        f"read back from {run.out}: largest difference of a logit {difference:.2g}"
        + (" (trained on 4 bits, read on all)" if quantized else "")
    )
    return {"largest_logit_difference": difference, "rows_compared": len(rows)}


def _take_back(out: Path) -> None:
    """A directory without its last file is no model."""
    for name in LAST:
        (out / name).unlink(missing_ok=True)


def finish_training(options: TrainingOptions, out: Path, then: str) -> None:
    """Upload the model if that was asked for, and say where it is and which command is next."""
    if options.push_to_hub is not None:
        address = push_model(out, options.push_to_hub, public=options.hub_public)
        console.say(f"uploaded to {address}")
    console.finish(f"{out}: a model", then)

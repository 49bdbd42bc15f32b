"""What becomes of a trained model: gathered, merged, saved whole or not at all, read back, uploaded."""

import gc
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from srt_cli import console
from srt_cli.errors import SrtError
from srt_cli.models.chat import ChatFormat
from srt_cli.models.hub import push_model
from srt_cli.models.weights import (
    ADAPTER_CONFIG,
    Placement,
    base_of,
    generation_config_for,
    load_weights,
)
from srt_cli.training.checkpoints import full_disk_in_one_sentence
from srt_cli.training.loop import Trained
from srt_cli.training.options import TrainingOptions
from srt_cli.training.processes import is_main
from srt_cli.training.setup import Adapters, Setup, Training, lora_config

HALF: Final = "half-saved"
LAST: Final = ("config.json", ADAPTER_CONFIG)
ADAPTER: Final = "adapter"
REFERENCE: Final = "ref"
"""The frozen copy that TRL adds when DPO trains an adapter further."""
PROBED_ROWS: Final = 4
PROBED_TOKENS: Final = 64
# Of the largest logit, which the order of sums may change.
TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def keep_model(
    model: PreTrainedModel | PeftModel,
    training: Training,
    card: str,
    rows: Sequence[Sequence[int]],
) -> None:
    """Merge the adapter if asked to, save into `training.out`, and read the model back from there.

    Models are compared on the beginnings of `rows` (token ids). Raises `SrtError` when the model on
    disk does not answer as the trained one did.
    """
    setup, out = training.setup, training.out
    if isinstance(model, PeftModel):
        name_base(model, setup.base)
    probe = [list(row[:PROBED_TOKENS]) for row in rows[:PROBED_ROWS]]
    trained = logits_of(model, probe)
    found: dict[str, Any] = {}
    exact = not setup.four_bit
    with full_disk_in_one_sentence(training.run):
        if isinstance(model, PeftModel) and setup.options.merge:
            model = merge(model, setup, out)
            merged = logits_of(model, probe)
            found |= _say_what_merging_changed(trained, merged, probe)
            trained, exact = merged, True
        elif isinstance(model, PeftModel) and is_on_another(setup):
            training.run.warn(
                f"this adapter was trained on {setup.base}, itself an adapter. srt loads both, but peft "
                "and servers leave that one out: for them, train without --no-merge."
            )
        save_model(model, training.chat, out, card)
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    del model
    gc.collect()
    placement = Placement(setup.place.placement.device, dtype, "as it was saved")
    saved = load_weights(
        str(out), placement=placement, trust_remote_code=setup.options.trust_remote_code
    )
    difference = largest_difference(trained, logits_of(saved, probe))
    scale = max(1.0, *(float(scores.abs().max()) for scores in trained))
    # An adapter trained on 4 bits comes back on the full base. `not <=` also catches NaN.
    if exact and not difference <= TOLERANCE.get(dtype, 5e-2) * scale:
        for name in LAST:  # a directory without its last file is no model
            (out / name).unlink(missing_ok=True)
        raise SrtError(
            f"{out}: read back from disk, the model does not answer as the one that was trained "
            f"(a logit differs by {difference:.3g}). It is not kept; run the same line again, and "
            "report this."
        )
    console.say(
        f"read back from {out}: largest difference of a logit {difference:.2g}"
        + ("" if exact else " (trained on 4 bits, read on all)")
    )
    found |= {"largest_logit_difference": difference, "rows_compared": len(probe)}
    training.run.tally({"saved": found})


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
    """The largest difference between two models' logits on the same rows."""
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
        "merged the adapter: largest difference of a logit "
        f"{found['merge_largest_logit_difference']:.2g}; over the first tokens of {len(rows)} rows, "
        f"prompts included, the loss was {found['loss_before_merge']:.4f}, is "
        f"{found['loss_after_merge']:.4f}"
    )
    return found


def finish_training(options: TrainingOptions, then: str) -> None:
    """Upload the model if asked to, and say where it is and which command comes next."""
    if options.push_to_hub is not None:
        address = push_model(options.out, options.push_to_hub, public=options.hub_public)
        console.say(f"uploaded to {address}")
    console.finish(f"{options.out}: a model", then)


# --- Adapter and base become one model, never in 4 bits ----------------------------------------


def merge(model: PeftModel, setup: Setup, out: Path) -> PreTrainedModel:
    """The model with its adapter added to the weights; the adapter itself is kept in `adapter/`.

    Not where it was trained on top of another adapter: no directory holds the base that it fits.
    An adapter trained on 4 bits is merged into the un-quantised base, loaded again: as it is
    (`--merge-base original`), or rounded as the adapter knew it (`dequantised`).
    """
    directory = out / ADAPTER
    if is_on_another(setup):
        shutil.rmtree(directory, ignore_errors=True)
        console.say(f"no {directory}: it was trained on {setup.base}, itself an adapter, merged")
    else:
        model.save_pretrained(str(directory))
    if not setup.four_bit:
        merged: Any = model.merge_and_unload()
    else:
        held = setup.place.placement
        placement = Placement(held.device, held.dtype, "merged un-quantised")
        whole = load_weights(
            setup.base,
            placement=placement,
            trust_remote_code=setup.options.trust_remote_code,
        )
        if setup.options.merge_base == "dequantised":
            copy_dequantised(model.get_base_model(), whole)
        merged = PeftModel.from_pretrained(whole, str(directory)).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged


def is_on_another(setup: Setup) -> bool:
    """Whether the adapter is trained on top of another one, which peft would leave out."""
    return base_of(setup.base) != setup.base


def copy_dequantised(quantized: Any, whole: Any) -> None:
    """Give `whole` the weights that the 4 bits of `quantized` stand for."""
    from bitsandbytes.functional import dequantize_4bit

    modules = dict(whole.named_modules())
    for name, module in quantized.named_modules():
        weight: Any = getattr(module, "weight", None)
        if getattr(weight, "quant_state", None) is None:
            continue
        # peft wraps a layer and keeps it one level below.
        target = modules[name.removesuffix(".base_layer")]
        full = dequantize_4bit(weight.data, weight.quant_state)
        with torch.no_grad():
            target.weight.copy_(full.to(target.weight.dtype))


def name_base(model: PeftModel, base: str) -> None:
    """Name the base in the adapter's configuration so that it is found from any folder."""
    path = Path(base.removeprefix("hf:")).expanduser()
    found = str(path.resolve()) if path.exists() else base
    for config in model.peft_config.values():
        config.base_model_name_or_path = found


def drop_reference(model: PeftModel) -> None:
    """Delete TRL's frozen copy, which would be saved beside the adapter."""
    if REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)


# --- From GPUs that share the weights ----------------------------------------------------------


def whole_model(trainer: Trainer, adapters: Adapters | None) -> PreTrainedModel | PeftModel | None:
    """The trained model, its adapter apart, in the main process; None in the others.

    Every process must call this: under FSDP and ZeRO-3 each holds a part of the weights.
    """
    # Without accelerate's rounding to bfloat16: the model is to answer as it will from disk.
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
        weights = trainer.accelerator.get_state_dict(engine)
        if is_main():
            model = rebuild(model, weights, adapters)
    if isinstance(model, PeftModel):
        drop_reference(model)
    return model if is_main() else None


def rebuild(model: Any, weights: dict[str, Tensor], adapters: Adapters | None) -> Any:
    """An ordinary model on the CPU, of the same kind as `model`, that holds `weights`.

    Raises `SrtError` when `weights` lacks some of the model's.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # Built empty: from_pretrained would shard it again under ZeRO-3.
    with init_empty_weights(include_buffers=False):
        fresh: Any = type(base)(base.config)
        if (config := lora_config(adapters)) is not None:
            fresh = get_peft_model(fresh, config)
    fresh.load_state_dict(weights, strict=False, assign=True)
    fresh.tie_weights()
    lacking = [name for name, weight in fresh.named_parameters() if weight.device.type == "meta"]
    if lacking:
        raise SrtError(
            f"the gathered weights lack {len(lacking)} of the model's tensors ({lacking[0]}). The "
            "checkpoints hold them: keep them with --keep-checkpoints, and report this."
        )
    return fresh


# --- The directory -----------------------------------------------------------------------------


def save_model(model: PreTrainedModel | PeftModel, chat: ChatFormat, out: Path, card: str) -> None:
    """Write weights, tokenizer, chat template, generation config and model card into `out`.

    Of a model with an adapter, the adapter alone. Files are written aside and renamed in,
    `config.json` (`adapter_config.json`) last: without it a directory is no model.
    """
    half, tokenizer = out / HALF, chat.tokenizer
    shutil.rmtree(half, ignore_errors=True)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.generation_config = generation_config_for(tokenizer, chat.end_id, base.generation_config)
    base.config.pad_token_id = tokenizer.pad_token_id
    try:
        model.save_pretrained(str(half))
        if isinstance(model, PeftModel):
            base.generation_config.save_pretrained(half)
        tokenizer.save_pretrained(half)
        (half / "README.md").write_text(card, encoding="utf-8")
        for file in sorted(half.iterdir(), key=lambda path: path.name in LAST):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def model_card(
    training: Training, trained: Trained, title: str, facts: Mapping[str, object]
) -> str:
    """A model card: what this is, made from what, by which settings, with which figures."""
    model, options, run = training.setup.model, training.setup.options, training.run
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if not Path(model).exists():
        front["base_model"] = model.removeprefix("hf:")
    if options.method != "full" and not options.merge:
        front["library_name"] = "peft"
    data = {
        name: f"{file.path} (sha256 {(file.sha256 or '')[:16]}, {file.rows} rows)"
        for name, file in run.manifest.inputs.items()
    }
    figures: dict[str, Any] = {
        "steps": (
            f"{trained.steps} of {trained.planned_steps}"
            if trained.planned_steps not in (None, trained.steps)
            else trained.steps
        ),
        "loss, first to final step": f"{_figure(trained.first_loss)} to {_figure(trained.final_loss)}",
        "tokens": f"{trained.tokens} ({trained.trained_tokens} trained)",
    }
    if trained.best_step is not None:
        figures["weights kept"] = (
            f"those of step {trained.best_step}, validation loss {_figure(trained.best_eval_loss)}"
        )
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in front.items())]
    lines += ["tags:", "- srt", "- self-refinement-tuning", f"- {run.manifest.command}", "---", ""]
    lines += [f"# {title}", "", "Made by `srt` (Self-Refinement Tuning, arXiv 2406.07168).", ""]
    lines += [
        f"- {name}: {_in_one_line(value)}" for name, value in (dict(facts) | data | figures).items()
    ]
    return "\n".join([*lines, "", "Settings, data digests and figures: `run.json`.", ""])


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _in_one_line(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split())

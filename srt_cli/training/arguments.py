"""What both of TRL's trainers are told alike."""

from pathlib import Path
from typing import Any, Final

from srt_cli.training.place import accelerate_checkpoints
from srt_cli.training.setup import Setup
from srt_cli.training.trackers import tracker_arguments

CHECKPOINTS: Final = "checkpoints"


def training_arguments(setup: Setup, out: Path) -> dict[str, Any]:
    """Arguments for `SFTConfig` and `DPOConfig` that leave none of their traps open.

    TRL's own defaults would take bf16 on a CPU, checkpoint activations and cut at 1024 tokens.
    """
    values, place = setup.values, setup.place
    on_gpu = place.placement.device == "cuda"
    return {
        "output_dir": str(out / CHECKPOINTS),
        "num_train_epochs": values.epochs,
        "learning_rate": values.learning_rate,
        "lr_scheduler_type": values.lr_schedule,
        # A float below 1 is a share of the steps.
        "warmup_steps": values.warmup,
        "weight_decay": values.weight_decay,
        "max_grad_norm": values.max_grad_norm,
        "per_device_train_batch_size": setup.micro_batch,
        "gradient_accumulation_steps": setup.accumulation,
        "seed": setup.seed,
        "data_seed": setup.seed,
        "use_cpu": place.placement.device == "cpu",
        "bf16": place.bf16,
        "fp16": False,
        "activation_checkpointing": place.checkpointing and not accelerate_checkpoints(),
        "max_length": None,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "save_total_limit": 2,
        "full_determinism": setup.deterministic,
        **tracker_arguments(setup.report_to, out),
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        "remove_unused_columns": True,
        # Every weight has a part in every loss; looking for others costs time in each step.
        "ddp_find_unused_parameters": False,
    }

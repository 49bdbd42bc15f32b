"""The model that is trained: its size beforehand, and its weights where they are trained."""

from accelerate import init_empty_weights
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from srt_cli.models.weights import Loading, base_of, load_weights, resolve_source
from srt_cli.training.lora import quantization
from srt_cli.training.options import TrainingOptions
from srt_cli.training.place import TrainingPlace, sharding


def count_parameters(name: str) -> int | None:
    """How many parameters a model has, from its configuration alone; null when that is not local."""
    try:
        source = str(resolve_source(base_of(name)))
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()  # building without data has untied what the configuration ties
        return int(model.num_parameters())
    except (OSError, ValueError, KeyError):
        return None


def positions_of(name: str) -> int | None:
    """How many positions a model has; null when its configuration does not say, or is not local."""
    try:
        config = AutoConfig.from_pretrained(
            str(resolve_source(base_of(name))), local_files_only=True
        )
    except (OSError, ValueError, KeyError):
        return None
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def load_policy(
    name: str, place: TrainingPlace, options: TrainingOptions, adapter: str | None = None
) -> PreTrainedModel | PeftModel:
    """The weights on their device, in train mode; of 4 bits for qlora.

    Weights that GPUs share stay where transformers puts them, and accelerate places the parts.
    `adapter` is a directory whose adapter is trained further, on the base `name`.
    """
    model: PreTrainedModel | PeftModel = load_weights(
        name,
        placement=place.placement,
        trust_remote_code=options.trust_remote_code,
        loading=Loading(
            attention=place.attention,
            quantization=quantization() if options.method == "qlora" else None,
            move=sharding() is None,
        ),
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(resolve_source(adapter)), is_trainable=True)
    if options.method == "full":
        model.requires_grad_(True)  # peft leaves weights that carried an adapter frozen
    model.train()
    return model

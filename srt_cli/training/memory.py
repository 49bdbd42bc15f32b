"""How much memory a training takes, part by part, before any of it is allocated.

Weights, gradients and optimizer are counted. What a forward and backward pass holds besides is found
by making one without data: tensors of the right shapes that hold no numbers, every allocation of
theirs noted (torch's fake tensors). So any architecture, and adapters, checkpointing and TRL's own
loss are accounted for as they are.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from srt_cli.models.weights import resolve_source
from srt_cli.training.lora import Adapters, lora_config
from srt_cli.training.place import TrainingPlace

FOUR_BIT_BYTES: Final = 0.56
"""A parameter of QLoRA's base: 4 bits, and the scales of its blocks."""
OPTIMIZER_BYTES: Final = {"adamw": 8.0, "adam": 8.0, "8bit": 2.0, "sgd": 0.0, "adafactor": 0.1}
"""A trained parameter, by what the optimizer's name holds; the last that fits counts."""
HEAD_TOKENS, HEAD_WIDTH = 4096, 32768
"""TRL computes the head in tiles of so many logits."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What forward and backward pass hold besides."""
    reference: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Batch:
    """The largest forward pass: rows (a pair is two), and tokens a row, padding included."""

    rows: int
    tokens: int


def estimate_memory(
    name: str,
    place: TrainingPlace,
    adapters: Adapters | None,
    batch: Batch,
    *,
    four_bit: bool,
    accumulates: bool,
    live_reference: bool,
    optimizer: str,
    checkpointing: bool,
) -> Memory | None:
    """The peak of one step; null when the model's configuration is not local.

    `accumulates` tells whether a step has several passes: gradients are there from the second on.
    """
    made = _make_without_data(name, place, adapters, checkpointing)
    if made is None:
        return None
    model, fake = made
    trained = [p for p in model.parameters() if p.requires_grad]
    base = [p for p in model.parameters() if not p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    frozen = sum(p.numel() * FOUR_BIT_BYTES if four_bit else p.nbytes for p in base)
    weights = int(frozen) + gradients
    try:
        with fake:
            peak = _peak_of_pass(model, place, batch, passes=2 if accumulates else 1)
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # an operation that cannot be run without data
    moments = next(
        bytes_ for named, bytes_ in reversed(OPTIMIZER_BYTES.items()) if named in optimizer
    )
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=int(sum(p.numel() for p in trained) * moments),
        activations=max(0, peak - gradients),
        reference=weights if live_reference else 0,
    )


def _make_without_data(
    name: str, place: TrainingPlace, adapters: Adapters | None, checkpointing: bool
) -> tuple[Any, FakeTensorMode] | None:
    try:
        config = AutoConfig.from_pretrained(str(resolve_source(name)), local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=place.placement.dtype, attn_implementation="sdpa"
        )
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if (wanted := lora_config(adapters)) is not None:
            model = get_peft_model(model, wanted, low_cpu_mem_usage=True)
    model.tie_weights()  # building without data has untied what the configuration ties
    if checkpointing:
        if adapters is not None:
            model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _put_on_device(model, fake)
    return model, fake


def _put_on_device(model: Any, fake: FakeTensorMode) -> None:
    """Parameters of no device become fake ones of the CPU; shared ones stay shared."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                with fake:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = torch.nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]


def _peak_of_pass(model: Any, place: TrainingPlace, batch: Batch, passes: int) -> int:
    inputs: dict[str, Any] = {
        name: torch.ones((batch.rows, batch.tokens), dtype=torch.long)
        for name in ("input_ids", "attention_mask", "labels")
    }
    head = 0
    forward: Callable[..., Any] = model
    if place.placement.device == "cuda":
        # There the head's tiles are folded in place, by kernels that need data: counted instead.
        whole = model.get_base_model() if isinstance(model, PeftModel) else model
        forward, head = whole.base_model, _head_bytes(whole.config.get_text_config(), batch)
        del inputs["labels"]
    else:
        inputs["fused_lm_head"] = True
    with _LiveBytes() as live:
        for _ in range(passes):
            with torch.autocast("cpu", torch.bfloat16, enabled=place.bf16):
                output = forward(**inputs, use_cache=False)
            loss = output.last_hidden_state.sum() if head else -output.log_probs.sum()
            del output
            loss.backward()
            del loss
    return int(live.peak) + head


def _head_bytes(config: Any, batch: Batch) -> int:
    tokens = batch.rows * batch.tokens
    tile = 2 * min(tokens, HEAD_TOKENS) * min(int(config.vocab_size), HEAD_WIDTH)
    return tile + 4 * tokens * int(config.hidden_size)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, result)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

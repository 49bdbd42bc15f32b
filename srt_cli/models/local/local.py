"""Models in this process: transformers, behind one of two engines.

On a CPU, static batches of like length that shrink as rows end (`static.py`). On a GPU,
transformers' continuous batching, where a new request enters as an old one leaves
(`continuous.py`), so that a row's critique starts when its draft ends.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from srt_cli import console
from srt_cli.errors import SrtError
from srt_cli.models import ModelOptions, Reply, Request, warn_if_deaf
from srt_cli.models.local.meter import Throughput
from srt_cli.records import Message
from srt_cli.runs.run import TEMPLATE_DAY

if TYPE_CHECKING:
    from srt_cli.models.chat import ChatFormat

WAVE: Final = 256
IN_FLIGHT_CONTINUOUS: Final = 1024


class _Engine(Protocol):
    @property
    def batched(self) -> bool: ...
    def add(self, wave: "list[Any]") -> None: ...
    def close(self) -> None: ...


@dataclass
class LocalModel:
    """A directory, hub name or GGUF file behind the door; loaded when the first reply is owed."""

    spec: str
    name: str
    options: ModelOptions
    is_program: bool = False
    continues: bool = True
    gives_logprobs: bool = True
    waiting: int = 0
    identity: str = field(init=False)
    in_flight: int = field(init=False)
    _continuous: bool = field(init=False)
    _meter: Throughput = field(default_factory=Throughput)
    _placement: dict[str, str] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)
    _deaf: bool = False
    """It was said that the model cannot be told whether to think."""
    _chat: "ChatFormat | None" = field(init=False)
    _loaded: Any = None
    _engine: _Engine | None = None

    def __post_init__(self) -> None:
        directory = Path(self.name).expanduser()
        if directory.is_dir() and not (directory / "config.json").exists():
            self._refuse_directory(directory)
        from srt_cli.models.weights import decide_placement, digest_of_template, fingerprint_of

        self.identity = f"local:{fingerprint_of(self.name)}"
        if self.options.chat_template is not None:
            self.identity += f"+{digest_of_template(self.options.chat_template)}"
        self._chat = chat_of(self.name, self.options)
        if self.options.effort is not None:
            self._tell_effort()
        device = decide_placement().device
        if self.options.int8:
            if device != "cpu" or self.options.engine == "continuous":
                raise SrtError("--cpu-int8: is for static batches on a CPU. Leave it away.")
            self.identity += "+int8"
        self._continuous = self.options.engine == "continuous" or (
            self.options.engine == "auto" and device == "cuda"
        )
        self.in_flight = IN_FLIGHT_CONTINUOUS if self._continuous else WAVE

    @property
    def batched(self) -> bool:
        """As the engine is; one that falls back to static batches says so from then on."""
        return self._engine.batched if self._engine is not None else not self._continuous

    def submit(
        self, requests: Sequence[Request], answered: Sequence[bool] = ()
    ) -> list[Future[Reply]]:
        answered = answered or [False] * len(requests)
        self._deaf = self._deaf or warn_if_deaf(self, requests)
        self._told.update(each.thinks.told for each in requests if each.thinks.told)
        futures: list[Future[Reply]] = [Future() for _ in requests]
        if not all(answered):
            engine = self._start()
            known = zip(requests, futures, answered, strict=True)
            rows = [row for each in known if (row := self._row(*each)) is not None]
            engine.add(rows)
        return futures

    def _tell_effort(self) -> None:
        """Journal keys of a model that is told how hard to think are its own."""
        if self._chat is None or self._chat.takes_effort:
            self.identity += f"?{self.options.effort}"
        else:
            console.warn(
                f"{self.spec} cannot be told how hard to think: its chat template has no "
                "reasoning_effort."
            )

    @cached_property
    def can_be_told(self) -> bool:
        """Whether its chat template has a switch; false too while the template cannot be had."""
        return self._chat is not None and self._chat.can_be_told

    def finish(self, seconds: float) -> bool:
        return True  # What is computed here costs no money.

    def describe(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "identity": self.identity,
            **self._placement,
            **({"thinking": sorted(self._told)} if self._told and self.can_be_told else {}),
            **self._dated(),
            **self._meter.describe(),
        }

    def _dated(self) -> dict[str, str]:
        chat = self._chat
        if chat is None or chat.day is None or not chat.writes_date:
            return {}
        return {TEMPLATE_DAY: chat.day.isoformat(timespec="seconds")}

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._loaded = None

    def _refuse_directory(self, directory: Path) -> None:
        if (directory / "adapter_config.json").exists():
            return
        held = ", ".join(sorted(path.name for path in directory.iterdir())[:6]) or "nothing"
        half = (
            " Its training has not finished: run the same srt line again."
            if (directory / "run.json").exists()
            else ""
        )
        raise SrtError(f"{self.name}: not a model directory (it holds {held}).{half}")

    def _start(self) -> _Engine:
        if self._engine is None:
            # Loaded here and not in the engine's thread, so that a bad model is the caller's error.
            self._chat = self._chat or chat_of(self.name, self.options, anyhow=True)
            assert self._chat is not None
            with _single_threaded():
                self._loaded = _load(self.name, self._chat, self.options)
                self._engine = _open_engine(
                    self._loaded, self._meter, self.options, self._continuous
                )
            self._placement = self._loaded.placement
        return self._engine

    def _row(self, request: Request, future: Future[Reply], answered: bool) -> Any:
        """A request for the engine; one that cannot fit the model is answered at once."""
        from srt_cli.models.chat import UnfitChat
        from srt_cli.models.local.rows import Generation

        try:
            prompt_ids = _encode(self._loaded, request)
        except UnfitChat as error:
            reason = str(error)
        else:
            if len(prompt_ids) < self._loaded.max_positions:
                return Generation(request, future, answered, prompt_ids, self._loaded)
            reason = (
                f"the prompt has {len(prompt_ids)} tokens, and the model has "
                f"{self._loaded.max_positions} positions"
            )
        if not answered:
            future.set_result(Reply(text="", finish_reason="failed", error=reason))
        return None


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Let torch's operations start no OpenMP threads here, which would stay.

    Once a process has more of them than cores, GNU's OpenMP puts those that wait to sleep, and to wake
    them takes a tenth of the engine's time on two cores.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _encode(loaded: Any, request: Request) -> list[int]:
    begun: Message | None = request.messages[-1] if request.continues else None
    messages = request.messages[:-1] if begun is not None else request.messages
    ids: list[int] = loaded.chat_for(request.thinks.told or "auto").prompt_ids(messages)
    if begun is not None:
        plain = loaded.tokenizer(begun.content, add_special_tokens=False, split_special_tokens=True)
        ids += plain["input_ids"]
    return ids


def _open_engine(
    loaded: Any, meter: Throughput, options: ModelOptions, continuous: bool
) -> _Engine:
    from srt_cli.models.local.static import StaticEngine

    if not continuous:
        return StaticEngine(loaded, meter, options.batch_size, options.int8)
    try:
        from srt_cli.models.local.continuous import ContinuousEngine, why_not_continuous

        reason = why_not_continuous(loaded)
    except ImportError as error:  # it is a young part of transformers, and moves
        reason = f"this version of transformers lacks a part: {error}"
    if reason is not None:
        loaded.placement |= {"engine": f"static batches ({reason})"}
        return StaticEngine(loaded, meter, options.batch_size)
    expected = frozenset({"tops"} if options.logprobs else set())
    return ContinuousEngine(loaded, meter, options.batch_size, expected)


def chat_of(name: str, options: ModelOptions, *, anyhow: bool = False) -> "ChatFormat | None":
    """How a model writes chats; None while its tokenizer cannot be had, unless it is owed `anyhow`.

    Raises `SrtError` for a chat template that is of no use, naming the option that gives another.
    """
    from srt_cli.models.chat import ChatFormat
    from srt_cli.models.weights import NotAtHand, load_tokenizer

    try:
        chat = ChatFormat(
            load_tokenizer(name, chat_template=options.chat_template),
            day=options.day or datetime.now().astimezone(),
            effort=options.effort,
        )
        chat.check()
    except NotAtHand:
        if anyhow:
            raise
        return None
    except SrtError as error:
        raise SrtError(str(error).replace("--chat-template", options.template_flag)) from None
    return chat


def _load(name: str, chat: "ChatFormat", options: ModelOptions) -> Any:
    from srt_cli.models.local.rows import Loaded
    from srt_cli.models.weights import decide_placement, load_weights

    placement = decide_placement()
    model = load_weights(name, placement=placement, trust_remote_code=options.trust_remote_code)
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ends = {chat.end_id}
    ends |= set(configured if isinstance(configured, list) else [configured]) - {None}
    max_positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    return Loaded(model, chat, frozenset(ends), max_positions, placement.describe())

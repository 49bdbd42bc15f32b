"""Models in this process: transformers, in static batches of like length.

A wave of requests is cut into the same batches whatever part of it is answered already, so that a
resumed run repeats the floating point of an uninterrupted one. Each row draws from its own
generator, so that its sample does not depend on its company.
"""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from srt_cli.errors import SrtError
from srt_cli.models import ModelOptions, Reply, Request, TokenLogprobs
from srt_cli.records import Usage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WAVE: Final = 256
DEFAULT_BATCH_SIZE: Final = {"cpu": 24, "mps": 16, "cuda": 64}
# A batch's prompt tokens times rows; bounds the prefill, whose logits and keys are the peak.
TOKENS_A_BATCH: Final = {"cpu": 16_384, "mps": 16_384, "cuda": 131_072}


@dataclass
class _Item:
    """A request on its way through a batch."""

    request: Request
    future: Future[Reply]
    answered: bool
    prompt_ids: list[int]


@dataclass
class _Loaded:
    """What the first owed request brings into memory."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    end_ids: list[int]
    max_positions: int
    placement: dict[str, str]


@dataclass
class _Meter:
    """What generation came to, for the manifest."""

    tokens: int = 0
    seconds: float = 0.0
    batches: int = 0
    largest_batch: int = 0
    halvings: int = 0

    def describe(self) -> dict[str, float | int]:
        per_second = round(self.tokens / self.seconds, 1) if self.seconds else 0.0
        return {
            "completion_tokens": self.tokens,
            "tokens_per_second": per_second,
            "batches": self.batches,
            "largest_batch": self.largest_batch,
            "halved_for_memory": self.halvings,
        }


@dataclass
class LocalModel:
    """A directory, hub name or GGUF file behind the door; loaded when the first reply is owed."""

    spec: str
    name: str
    options: ModelOptions
    batched: bool = True
    in_flight: int = WAVE
    identity: str = field(init=False)
    _waves: "queue.SimpleQueue[list[_Item] | None]" = field(default_factory=queue.SimpleQueue)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _meter: _Meter = field(default_factory=_Meter)
    _loaded: _Loaded | None = None
    _worker: threading.Thread | None = None

    def __post_init__(self) -> None:
        if Path(self.name).expanduser().is_dir() and not (Path(self.name) / "config.json").exists():
            self._refuse_directory()
        from srt_cli.models.weights import fingerprint_of

        self.identity = f"local:{fingerprint_of(self.name)}"

    def submit(
        self, requests: Sequence[Request], answered: Sequence[bool] = ()
    ) -> list[Future[Reply]]:
        answered = answered or [False] * len(requests)
        items = [
            _Item(request, Future(), known, [])
            for request, known in zip(requests, answered, strict=True)
        ]
        if not all(answered):
            self._waves.put(items)
            self._start()
        return [item.future for item in items]

    def finish(self, seconds: float) -> bool:
        return True  # What is computed here costs no money.

    def describe(self) -> dict[str, Any]:
        placement = self._loaded.placement if self._loaded else {}
        return {"spec": self.spec, "identity": self.identity, **placement, **self._meter.describe()}

    def close(self) -> None:
        self._cancelled.set()
        self._waves.put(None)
        if self._worker is not None:
            self._worker.join(timeout=30)
        self._loaded = None

    def _refuse_directory(self) -> None:
        directory = Path(self.name)
        if (directory / "adapter_config.json").exists():
            return
        held = ", ".join(sorted(path.name for path in directory.iterdir())[:6]) or "nothing"
        half = (
            " Its training has not finished: run the same srt line again."
            if (directory / "run.json").exists()
            else ""
        )
        raise SrtError(f"{self.name}: not a model directory (it holds {held}).{half}")

    def _start(self) -> None:
        if self._worker is None:
            # Loaded here and not in the thread, so that a bad model is an error of the caller.
            self._loaded = _load(self.name, self.options)
            self._worker = threading.Thread(target=self._work, name="local-model", daemon=True)
            self._worker.start()

    def _work(self) -> None:
        while (wave := self._waves.get()) is not None:
            try:
                assert self._loaded is not None
                for batch in _plan(wave, self._loaded, self.options.batch_size):
                    if self._cancelled.is_set():
                        break
                    if not all(item.answered for item in batch):
                        self._run(batch)
            except BaseException as error:  # a thread has no caller: the futures carry it
                for item in wave:
                    if not item.future.done():
                        item.future.set_exception(error)
            if self._cancelled.is_set():
                for item in wave:
                    item.future.cancel()

    def _run(self, batch: list[_Item]) -> None:
        """Generate a batch; when memory runs out, halve it and lose nothing."""
        import torch

        assert self._loaded is not None
        started = time.perf_counter()
        try:
            replies = generate(self._loaded, batch, self._cancelled)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise SrtError(
                    f"{self.spec}: out of memory with a single row of "
                    f"{len(batch[0].prompt_ids)} tokens. Lower --max-new-tokens."
                ) from None
            torch.cuda.empty_cache()
            self._meter.halvings += 1
            self._run(batch[: len(batch) // 2])
            self._run(batch[len(batch) // 2 :])
            return
        if self._cancelled.is_set():
            return
        self._meter.seconds += time.perf_counter() - started
        self._meter.batches += 1
        self._meter.largest_batch = max(self._meter.largest_batch, len(batch))
        for item, reply in zip(batch, replies, strict=True):
            self._meter.tokens += reply.usage.completion_tokens
            if not item.answered:
                item.future.set_result(reply)


def _load(name: str, options: ModelOptions) -> _Loaded:
    from srt_cli.models.chat import check_template, end_of_turn_id
    from srt_cli.models.weights import decide_placement, load_tokenizer, load_weights

    tokenizer = load_tokenizer(name)
    check_template(tokenizer)
    placement = decide_placement()
    model = load_weights(name, placement=placement, trust_remote_code=options.trust_remote_code)
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ends = {end_of_turn_id(tokenizer)}
    ends |= set(configured if isinstance(configured, list) else [configured]) - {None}
    max_positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    return _Loaded(model, tokenizer, sorted(ends), max_positions, placement.describe())


def _plan(wave: list[_Item], loaded: _Loaded, batch_size: int | None) -> list[list[_Item]]:
    """Cut a wave into batches of like length; what cannot fit the model is answered at once."""
    from srt_cli.models.chat import encode_chat

    device = loaded.placement["device"]
    most_rows = batch_size or DEFAULT_BATCH_SIZE[device]
    fitting = []
    for item in wave:
        item.prompt_ids = encode_chat(
            loaded.tokenizer, item.request.messages, add_generation_prompt=True
        )
        room = loaded.max_positions - len(item.prompt_ids)
        if room >= 1:
            fitting.append(item)
        elif not item.answered:
            reason = (
                f"the prompt has {len(item.prompt_ids)} tokens, and the model has "
                f"{loaded.max_positions} positions"
            )
            item.future.set_result(Reply(text="", finish_reason="failed", error=reason))
    # Like prompts together, like limits together; the digest makes the order of input irrelevant.
    fitting.sort(
        key=lambda item: (item.request.max_tokens, len(item.prompt_ids), _draw_seed(item.request))
    )
    batches: list[list[_Item]] = []
    for item in reversed(fitting):
        current = batches[-1] if batches else []
        widest = len(current[0].prompt_ids) if current else 0
        same_limit = bool(current) and current[0].request.max_tokens == item.request.max_tokens
        fits = widest * (len(current) + 1) <= TOKENS_A_BATCH[device]
        if current and same_limit and len(current) < most_rows and fits:
            current.append(item)
        else:
            batches.append([item])
    return batches


def _draw_seed(request: Request) -> int:
    """The seed of a request's own generator: of its content and sample, never of its place."""
    content = "\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in request.messages)
    text = f"{request.seed}|{request.sample}|{content}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def generate(loaded: _Loaded, batch: Sequence[_Item], cancelled: threading.Event) -> list[Reply]:
    """Continue every prompt of a batch; greedy where the temperature is 0.

    Returns one reply a row. A cancelled batch returns what it has so far; nobody may keep it.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    from srt_cli.models.sampling import Cancelled, GumbelDraw, StopTexts

    width = max(len(item.prompt_ids) for item in batch)
    pad = int(loaded.tokenizer.pad_token_id or 0)
    device = loaded.placement["device"]
    ids = torch.tensor(
        [[pad] * (width - len(item.prompt_ids)) + item.prompt_ids for item in batch], device=device
    )  # (rows, width), padded on the left
    mask = torch.tensor(
        [[0] * (width - len(item.prompt_ids)) + [1] * len(item.prompt_ids) for item in batch],
        device=device,
    )  # (rows, width)
    requests = [item.request for item in batch]
    limit = min(max(r.max_tokens for r in requests), loaded.max_positions - width)
    wants_logprobs = any(request.top_logprobs for request in requests)
    stop_texts = StopTexts(loaded.tokenizer, [request.stop for request in requests], width)
    draw = GumbelDraw(
        [request.temperature for request in requests],
        [request.top_p for request in requests],
        [_draw_seed(request) for request in requests],
    )
    with torch.inference_mode():
        run: Any = loaded.model.generate
        output = run(
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=limit,
                do_sample=False,
                eos_token_id=loaded.end_ids,
                pad_token_id=pad,
                return_dict_in_generate=True,
                output_logits=wants_logprobs,
            ),
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([stop_texts, Cancelled(cancelled)]),
        )
    written = output.sequences[:, width:].tolist()
    return [
        _reply(loaded, item, tokens, _top(loaded, item.request, tokens, output.logits, row))
        for row, (item, tokens) in enumerate(zip(batch, written, strict=True))
    ]


def _reply(
    loaded: _Loaded,
    item: _Item,
    tokens: list[int],
    logprobs: Callable[[int], tuple[TokenLogprobs, ...]],
) -> Reply:
    """Cut a row at its end token, then at its first stop text."""
    end = next((place for place, token in enumerate(tokens) if token in loaded.end_ids), None)
    kept = tokens if end is None else tokens[:end]
    text = str(loaded.tokenizer.decode(kept, skip_special_tokens=True))
    stops = [place for stop in item.request.stop if (place := text.find(stop)) >= 0]
    if stops:
        text = text[: min(stops)]
    elif end is None and loaded.tokenizer.pad_token_id in kept:
        kept = kept[: kept.index(loaded.tokenizer.pad_token_id)]
    finished = end is not None or bool(stops)
    return Reply(
        text=text,
        finish_reason="stop" if finished else "length",
        usage=Usage(
            prompt_tokens=len(item.prompt_ids), completion_tokens=len(kept) + (end is not None)
        ),
        logprobs=logprobs(len(kept)),
    )


def _top(
    loaded: _Loaded,
    request: Request,
    tokens: list[int],
    logits: "tuple[torch.Tensor, ...] | None",
    row: int,
) -> Callable[[int], tuple[TokenLogprobs, ...]]:
    """The most likely tokens at each place of a row, when they were asked for."""

    def places(count: int) -> tuple[TokenLogprobs, ...]:
        if not request.top_logprobs or logits is None:
            return ()
        decode = loaded.tokenizer.decode
        found = []
        for token, step in zip(tokens[:count], logits, strict=False):
            values, indices = step[row].float().log_softmax(-1).topk(request.top_logprobs)
            top = {
                str(decode([i])): v for i, v in zip(indices.tolist(), values.tolist(), strict=True)
            }
            found.append(TokenLogprobs(str(decode([token])), top))
        return tuple(found)

    return places

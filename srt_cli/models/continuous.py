"""The engine for GPUs: transformers' continuous batching, where a request enters as another leaves.

transformers owns the paged cache, sizes it by the memory there is, shares the blocks of equal
prefixes (a critique begins as its draft does), and runs the loop. Here its logits processors draw
each row's tokens, and its outputs become our rows' tokens.
"""

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from srt_cli.errors import SrtError
from srt_cli.models import Reply
from srt_cli.models.meter import Meter
from srt_cli.models.rows import Loaded, Row
from srt_cli.models.sampling import gumbel_noise, keep_top_p

POLL_S: Final = 0.05
GREEDY: Final = 0
"""The key of a row that draws nothing."""
HALVINGS: Final = 5
CPU_BLOCKS: Final = 64
CPU_BATCH_TOKENS: Final = 512


def why_not_continuous(loaded: Loaded) -> str | None:
    """Why a model cannot be batched continuously; null when it can."""
    if not hasattr(loaded.model, "init_continuous_batching"):
        return "transformers cannot batch this model continuously"
    kinds = set(getattr(loaded.model.config.get_text_config(), "layer_types", None) or [])
    odd = kinds - {"full_attention", "sliding_attention"}
    return f"layers of type {', '.join(sorted(odd))}" if odd else None


class _PerRow(ContinuousBatchingLogitsProcessor):
    """A processor with one 32-bit argument a row, read from the rows under way."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012  as transformers declares it
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, rows: dict[str, Row]) -> None:
        self.rows = rows

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """What stands where no row is: the bits of 1.0."""
        int32_tensor.copy_(torch.ones_like(int32_tensor, dtype=torch.float32).view(torch.int32))

    def rows_of(self, requests: Sequence[Any]) -> list[tuple[Row | None, int]]:
        """Each request's row, and the position that its next token will have."""
        return [
            (self.rows.get(request.state.request_id), request.state.position_offset)
            for request in requests
        ]


class _Record(_PerRow):
    """Keeps the likeliest tokens before any draw; needs a loop without graphs and look-ahead."""

    def __init__(self, rows: dict[str, Row]) -> None:
        super().__init__(rows)
        self.tops: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._wanting: list[tuple[int, str, int]] = []
        self._most = 1

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        self._wanting = []
        for place, (row, position) in enumerate(self.rows_of(requests_with_new_token)):
            if row is not None and row.request.top_logprobs:
                name = requests_with_new_token[place].state.request_id
                self._wanting.append((place, name, position - len(row.prompt_ids)))
                self._most = max(self._most, row.request.top_logprobs)
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        if self._wanting:
            places = [place for place, _, _ in self._wanting]
            values, ids = scores[places].float().log_softmax(-1).topk(self._most)
            kept = zip(self._wanting, values.cpu(), ids.cpu(), strict=True)
            for (_, name, token), value, chosen in kept:
                self.tops[name, token] = value, chosen
        return scores

    def take(self, name: str, row: Row, token: int) -> tuple[list[float], list[int]] | None:
        """What was kept for a row's next token, if the row wants it."""
        kept = self.tops.pop((name, len(row.tokens)), None)
        if kept is None or not row.wants_top(token):
            return None
        count = row.request.top_logprobs
        return kept[0][:count].tolist(), kept[1][:count].tolist()


class _Temperature(_PerRow):
    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        asked = [
            row and row.request.temperature for row, _ in self.rows_of(requests_with_new_token)
        ]
        return torch.tensor([value or 1.0 for value in asked]).view(torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        return scores / tensor_arg[: scores.shape[0]].view(torch.float32)[:, None]


class _TopP(_PerRow):
    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        asked = [
            row.request.top_p if row else 1.0 for row, _ in self.rows_of(requests_with_new_token)
        ]
        return torch.tensor(asked).view(torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        return keep_top_p(scores, tensor_arg[: scores.shape[0]].view(torch.float32)[:, None])


class _Noise(_PerRow):
    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        keys = []
        for row, position in self.rows_of(requests_with_new_token):
            draws = row is not None and row.request.temperature > 0
            keys.append(row.key_at(position) if row is not None and draws else GREEDY)
        return torch.tensor(keys, dtype=torch.int64).to(torch.int32)  # the low 32 bits

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        keys = tensor_arg[: scores.shape[0]].to(torch.int64)
        noise = gumbel_noise(keys, scores.shape[-1])
        return torch.where((keys != GREEDY)[:, None], scores + noise, scores)


@dataclass
class ContinuousEngine:
    """Hands rows to transformers' manager as they come, and takes their tokens as they are made."""

    loaded: Loaded
    meter: Meter
    batch_size: int | None = None
    _inbox: "queue.SimpleQueue[list[Row] | None]" = field(default_factory=queue.SimpleQueue)
    _waiting: list[Row] = field(default_factory=list)
    _under_way: dict[str, Row] = field(default_factory=dict)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _features: frozenset[str] = frozenset()
    _manager: Any = None
    _record: _Record | None = None
    _count: int = 0
    _memory_share: float = 1.0

    def __post_init__(self) -> None:
        self._worker = threading.Thread(target=self._work, name="continuous-engine", daemon=True)
        self._worker.start()

    def add(self, wave: list[Row]) -> None:
        """Take rows; their futures resolve as they end, in any order."""
        self._inbox.put([row for row in wave if not row.answered])

    def close(self) -> None:
        """Stop at the next token; what has not ended is cancelled."""
        self._cancelled.set()
        self._inbox.put(None)
        self._worker.join(timeout=30)

    def _work(self) -> None:
        try:
            with torch.inference_mode():
                while not self._cancelled.is_set():
                    self._receive()
                    self._admit()
                    if self._under_way:
                        with self.meter.timing(len(self._under_way)):
                            self._listen()
        except BaseException as error:  # a thread has no caller: the futures carry it
            for row in self._rows_left():
                row.future.set_exception(error)
        finally:
            for row in self._rows_left():
                row.future.cancel()
            self._stop_manager()

    def _rows_left(self) -> list[Row]:
        rows = [*self._waiting, *self._under_way.values()]
        return [row for row in rows if not row.future.done()]

    def _receive(self) -> None:
        """Take in what was submitted; waits only while there is nothing else to do."""
        idle = not self._waiting and not self._under_way
        while idle or not self._inbox.empty():
            self._waiting += self._inbox.get() or []
            idle = False

    def _admit(self) -> None:
        """Hand waiting rows to the manager; one that lacks a feature is reopened once it is empty."""
        needed = self._features.union(*map(_features_of, self._waiting))
        if self._manager is None or needed != self._features:
            if self._under_way:
                return
            self._open_manager(needed)
        for row in self._waiting:
            name = f"row-{self._count}"
            self._count += 1
            self._under_way[name] = row
            self._manager.add_request(
                row.prompt_ids,
                request_id=name,
                max_new_tokens=row.limit,
                streaming=True,
                eos_token_id=sorted(self.loaded.end_ids),
            )
        self._waiting = []

    def _listen(self) -> None:
        """Take outputs for a moment; new rows are looked for in between."""
        output = self._manager.get_result(timeout=POLL_S)
        while output is not None:
            if output.error is not None:
                self._recover(str(output.error))
                return
            self._hear(output)
            output = None
            if not self._manager.output_router.output_queue.empty():
                output = self._manager.get_result(timeout=POLL_S)
        if not self._manager.is_running():
            self._recover("the generation loop ended")

    def _hear(self, output: Any) -> None:
        row = self._under_way.get(output.request_id)
        if row is None:
            return
        for token in output.generated_tokens[len(row.tokens) :]:
            record = self._record
            top = record.take(output.request_id, row, token) if record is not None else None
            if row.take(token, top):
                break
        if row.finish is None:
            return
        del self._under_way[output.request_id]
        if not output.is_finished():
            self._manager.cancel_request(output.request_id)
        self.meter.tokens += len(row.tokens)
        row.future.set_result(row.reply())

    def _recover(self, error: str) -> None:
        """Start what is under way again, with half the memory where it ran out."""
        rows, self._under_way = list(self._under_way.values()), {}
        self._stop_manager()
        short = "memory" in error.lower() or "No requests can be scheduled" in error
        if not short or self.meter.halvings >= HALVINGS:
            for row in rows:
                row.future.set_result(Reply(text="", finish_reason="failed", error=error))
            if short:
                raise SrtError("out of memory also with small batches. Lower --max-new-tokens.")
            return
        self.meter.halvings += 1
        self._memory_share /= 2
        for row in rows:
            row.start_again()
        self._waiting = rows + self._waiting

    def _open_manager(self, features: frozenset[str]) -> None:
        self._stop_manager()
        self._features = features
        self._record = _Record(self._under_way) if "tops" in features else None
        config = ContinuousBatchingConfig(
            max_requests_per_batch=self.batch_size,
            # What is recorded in Python must not be left to a graph, nor run ahead.
            use_cuda_graph=False if self._record is not None else None,
            use_async_batching=False if self._record is not None else None,
        )
        if self.loaded.device == "cpu":
            # transformers would take the whole memory of the machine for its cache.
            config.num_blocks = max(1, int(CPU_BLOCKS * self._memory_share))
            config.max_batch_tokens = CPU_BATCH_TOKENS
        elif self._memory_share < 1:
            config.max_memory_percent = 0.8 * self._memory_share
        model: Any = self.loaded.model
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False,
                eos_token_id=sorted(self.loaded.end_ids),
                pad_token_id=self.loaded.tokenizer.pad_token_id,
            ),
            continuous_batching_config=config,
        )
        self._manager.logit_processor = self._processors(features)
        self._manager.start()

    def _processors(self, features: frozenset[str]) -> ContinuousBatchingLogitsProcessorList:
        rows = self._under_way
        chain: list[_PerRow] = [self._record] if self._record is not None else []
        if "draws" in features:
            chain.append(_Temperature(rows))
            chain += [_TopP(rows)] if "top_p" in features else []
            chain.append(_Noise(rows))
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList(chain))
        processors.tensors_required = len(chain)
        return processors

    def _stop_manager(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=30, hard_stop=True)
            self._manager = None


def _features_of(row: Row) -> frozenset[str]:
    """What the manager must be able to do for a row."""
    asked = row.request
    draws = {"draws"} if asked.temperature > 0 else set()
    draws |= {"top_p"} if draws and asked.top_p < 1 else set()
    return frozenset(draws | ({"tops"} if asked.top_logprobs else set()))

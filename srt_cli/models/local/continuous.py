"""The engine for GPUs: transformers' continuous batching, where a request enters as another leaves.

transformers owns the paged cache, sizes it by the memory there is, shares the blocks of equal
prefixes (a critique begins as its draft does), and runs the loop. Here its logits processors draw
each row's tokens, and its outputs become our rows' tokens. What cannot be batched so, be it a model
or another version of transformers, is answered in static batches.
"""

import gc
import queue
import threading
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from srt_cli import console
from srt_cli.errors import SrtError
from srt_cli.models.local.meter import Throughput
from srt_cli.models.local.processors import Processors, features_of
from srt_cli.models.local.rows import Generation, Loaded
from srt_cli.models.local.static import StaticEngine, is_out_of_memory

POLL_S: Final = 0.05
HALVINGS: Final = 5
TOO_SMALL: Final = "No requests can be scheduled"
"""What transformers says when a single row does not fit its cache."""
CPU_CACHE_TOKENS: Final = 16_384
CPU_BATCH_TOKENS: Final = 512
BLOCK_TOKENS: Final = 16
"""Only whole blocks are shared, so they are small where no kernel asks for larger ones."""


def why_not_continuous(loaded: Loaded) -> str | None:
    """Why a model cannot be batched continuously; None if nothing speaks against it."""
    if not hasattr(loaded.model, "init_continuous_batching"):
        return "transformers cannot batch this model continuously"
    kinds = set(getattr(loaded.model.config.get_text_config(), "layer_types", None) or [])
    odd = kinds - {"full_attention", "sliding_attention"}
    return f"layers of type {', '.join(sorted(odd))}" if odd else None


@dataclass
class ContinuousEngine:
    """Hands rows to transformers' manager as they come, and takes their tokens as they are made."""

    loaded: Loaded
    meter: Throughput
    batch_size: int | None = None
    features: frozenset[str] = frozenset()
    """What rows need of a manager, as far as is known; another need costs its cache."""
    _inbox: "queue.SimpleQueue[list[Generation] | None]" = field(default_factory=queue.SimpleQueue)
    _waiting: list[Generation] = field(default_factory=list)
    _under_way: dict[str, Generation] = field(default_factory=dict)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _ended: threading.Event = field(default_factory=threading.Event)
    _error: BaseException | None = None
    """Why it ended, if nobody closed it."""
    _static: StaticEngine | None = None
    """Takes over where continuous batching is not possible."""
    _manager: Any = None
    _outputs: Any = None
    """The manager's queue of results; read only to see whether more wait."""
    _processors: Processors | None = None
    _attention: str | None = None
    """The model's own; a manager may change it."""
    _count: int = 0
    _memory_share: float = 1.0
    _has_spoken: bool = False
    """Whether any manager has made a token, so that this model can be batched."""

    def __post_init__(self) -> None:
        self._worker = threading.Thread(target=self._work, name="continuous-engine", daemon=True)
        self._worker.start()

    @property
    def batched(self) -> bool:
        """Whether rows had better come in whole waves."""
        return self._static is not None

    def add(self, wave: list[Generation]) -> None:
        """Take rows; their futures resolve as they end, in any order."""
        self._inbox.put([row for row in wave if not row.answered])
        if self._ended.is_set():
            self._give_up([])

    def close(self) -> None:
        """Stop at the next token; what has not ended is cancelled."""
        self._cancelled.set()
        self._inbox.put(None)
        if self._static is not None:
            self._static.close()
        self._worker.join(timeout=30)

    def _work(self) -> None:
        try:
            with torch.inference_mode():
                while not self._cancelled.is_set():
                    self._receive()
                    self._admit()
                    if self._under_way:
                        with self.meter.timing(len(self._under_way), batches=0):
                            self._listen()
        except BaseException as error:  # a thread has no caller: the futures carry it
            self._error = error
        finally:
            self._ended.set()
            self._give_up([*self._waiting, *self._under_way.values()])
            self._stop_manager()

    def _give_up(self, rows: list[Generation]) -> None:
        """Nobody will answer these rows, nor those that still arrive."""
        while not self._inbox.empty():
            try:
                rows += self._inbox.get_nowait() or []
            except queue.Empty:  # another thread was quicker
                break
        for row in rows:
            if row.future.done():
                continue
            if self._error is not None:
                row.future.set_exception(self._error)
            else:
                row.future.cancel()

    def _receive(self) -> None:
        """Take in what was submitted; waits only while there is nothing else to do."""
        idle = not self._waiting and not self._under_way
        while idle or not self._inbox.empty():
            self._waiting += self._inbox.get() or []
            idle = False

    def _admit(self) -> None:
        """Hand waiting rows to the manager; one that lacks a feature is reopened once it is empty."""
        if self._static is not None:
            self._static.add(self._waiting)
            self._waiting = []
            return
        needed = self.features.union(*map(features_of, self._waiting))
        if self._manager is None or needed != self.features:
            if self._under_way or not self._waiting:
                return
            try:
                self._open_manager(needed)
            except Exception as error:  # whatever a model or another transformers objects to
                self._recover(str(error) or type(error).__name__)
                return
        try:
            for row in self._waiting:
                self._hand_over(row)
        except TypeError as error:  # another transformers takes requests in another way
            self._waiting = [row for row in self._waiting if row not in self._under_way.values()]
            self._recover(str(error))
        else:
            self._waiting = []

    def _hand_over(self, row: Generation) -> None:
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

    def _listen(self) -> None:
        """Take outputs for a moment; new rows are looked for in between."""
        output = self._manager.get_result(timeout=POLL_S)
        while output is not None:
            if output.error is not None:
                self._recover(str(output.error))
                return
            if self._processors is not None and not self._processors.were_asked:
                self._fall_back("this version of transformers would draw replies in its own way")
                return
            self._hear(output)
            output = None
            if not self._outputs.empty():
                output = self._manager.get_result(timeout=POLL_S)
        if not self._manager.is_running():
            self._recover("the generation loop ended")

    def _hear(self, output: Any) -> None:
        row = self._under_way.get(output.request_id)
        if row is None:
            return
        self._has_spoken = True
        record = self._processors.record if self._processors is not None else None
        for token in output.generated_tokens[len(row.tokens) :]:
            top = record.take(output.request_id, row, token) if record is not None else None
            if row.take(token, top):
                break
        if row.finish is None:
            return
        row.future.set_result(row.reply())
        self.meter.tokens += len(row.tokens)
        del self._under_way[output.request_id]
        if not output.is_finished():
            self._manager.cancel_request(output.request_id)

    def _recover(self, error: str) -> None:
        """Start again what is under way: with half the memory, or in static batches.

        Raises `SrtError` when neither can help.
        """
        reason = error.strip().splitlines()[0] if error.strip() else "no reason given"
        if is_out_of_memory(error):
            if self.meter.halvings >= HALVINGS:
                raise SrtError("out of memory also with small batches. Lower --max-new-tokens.")
            self.meter.halvings += 1
            self._memory_share /= 2
            self._take_back()
        elif TOO_SMALL in error or not self._has_spoken:
            self._fall_back(f"continuous batching failed: {reason}")
        else:
            raise SrtError(
                f"continuous batching stopped ({reason}). Run the same line with --engine static."
            )

    def _take_back(self) -> None:
        """Stop the manager; its rows wait again, as they began."""
        rows, self._under_way = list(self._under_way.values()), {}
        self._stop_manager()
        for row in rows:
            row.start_again()
        self._waiting = rows + self._waiting

    def _fall_back(self, reason: str) -> None:
        """From here on in static batches."""
        self._take_back()
        if self._attention is not None:
            self.loaded.model.set_attn_implementation(self._attention)
        self.loaded.placement |= {"engine": f"static batches ({reason})"}
        console.warn(f"{reason}; rows are answered in static batches instead.")
        self._static = StaticEngine(self.loaded, self.meter, self.batch_size)

    def _open_manager(self, features: frozenset[str]) -> None:
        self._stop_manager()
        self.features = features
        self._processors = Processors(features, self._under_way)
        records = "tops" in features
        config = ContinuousBatchingConfig(
            max_requests_per_batch=self.batch_size,
            # What is recorded in Python must not be left to a graph, nor run ahead.
            use_cuda_graph=False if records else None,
            use_async_batching=False if records else None,
        )
        if self.loaded.device == "cpu":
            # transformers would take the whole memory of the machine for its cache.
            config.num_blocks = max(1, int(CPU_CACHE_TOKENS * self._memory_share / BLOCK_TOKENS))
            config.max_batch_tokens = CPU_BATCH_TOKENS
        elif self._memory_share < 1:
            config.max_memory_percent = 0.8 * self._memory_share
        model: Any = self.loaded.model
        self._attention = self._attention or model.config._attn_implementation
        manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False,
                eos_token_id=sorted(self.loaded.end_ids),
                pad_token_id=self.loaded.tokenizer.pad_token_id,
            ),
            continuous_batching_config=config,
        )
        resolved = manager.continuous_batching_config
        if not resolved.max_blocks_per_request:  # no kernel that reads blocks by itself
            resolved.page_size = BLOCK_TOKENS
        manager.logit_processor = self._processors.for_manager()
        self._outputs = manager.output_router.output_queue
        self._manager = manager
        manager.start()

    def _stop_manager(self) -> None:
        if self._manager is None:
            return
        self._manager.stop(block=True, timeout=30, hard_stop=True)
        self._manager = None
        # Its error, if it met one, has held the cache until now.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

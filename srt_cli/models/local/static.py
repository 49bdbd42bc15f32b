"""The engine for CPUs: batches of like length that shrink as their rows end.

A wave is cut into the same batches whatever part of it is answered already, so that a resumed run
repeats the floating point of an uninterrupted one.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Final, Protocol

import torch

from srt_cli.errors import SrtError
from srt_cli.models.local.decoder import UnpaddedBatch, decoder_of
from srt_cli.models.local.meter import Throughput
from srt_cli.models.local.padded import PaddedBatch, tokens_read_at_once
from srt_cli.models.local.products import in_int8, in_turn, packed, packs, use_in
from srt_cli.models.local.rows import Generation, Loaded, keep_tops
from srt_cli.models.local.sampling import choose_tokens
from srt_cli.models.weights import own_memory_bytes

MOST_ROWS: Final = {"cpu": 256, "mps": 16, "cuda": 64}
MEMORY_SHARE: Final = 0.4
# What is stopped loses the rows that have not ended, so a batch should end soon.
LONGEST_BATCH_S: Final = 120
USUAL_REPLY: Final = 256
"""Tokens after which most replies have ended, whatever their limit."""
OPERATIONS_A_SECOND: Final = 5e10
"""Of one core that decodes in float32: SmolLM2-135M at 185 tokens/s."""
FEWEST_ROWS: Final = 8
MOST_STEP_TOKENS: Final = 256
"""Of rows and what is guessed of them; beyond that a guess costs as much time as it saves."""
OUT_OF_MEMORY: Final = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "more than available memory",
)


@dataclass
class StaticEngine:
    """Takes waves of rows and continues them batch by batch, in a thread of its own."""

    loaded: Loaded
    meter: Throughput
    batch_size: int | None = None
    int8: bool = False
    """Whether linear layers multiply in 8 bits; on a CPU alone."""
    _waves: "queue.SimpleQueue[list[Generation] | None]" = field(default_factory=queue.SimpleQueue)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _worker: threading.Thread | None = None
    batched: bool = True
    _most_rows: int = 1 << 30
    """What memory was found to hold; falls when a batch runs out of it."""

    def __post_init__(self) -> None:
        model = self.loaded.model
        make = in_turn
        if self.int8:
            make = in_int8
            self.loaded.placement |= {"weights": "int8 in linear layers (--cpu-int8)"}
        elif packs(model):
            make = packed
            self.loaded.placement |= {"weights": "packed for oneDNN"}
        self.loaded.decoder = decoder_of(model, make)
        if self.loaded.decoder is None:
            use_in(model, make)

    def add(self, wave: list[Generation]) -> None:
        """Take a wave; the rows' futures resolve as they end."""
        if self._worker is None:
            self._worker = threading.Thread(
                target=self._work,
                args=(torch.get_num_threads(),),
                name="static-engine",
                daemon=True,
            )
            self._worker.start()
        self._waves.put(wave)

    def close(self) -> None:
        """Stop at the next token; what has not ended is cancelled."""
        self._cancelled.set()
        self._waves.put(None)
        if self._worker is not None:
            self._worker.join(timeout=30)

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)  # while another model is loaded, new threads would get one
        while (wave := self._waves.get()) is not None:
            try:
                self._run_wave(wave)
            except BaseException as error:  # a thread has no caller: the futures carry it
                for row in wave:
                    if not row.future.done():
                        row.future.set_exception(error)
            if self._cancelled.is_set():
                for row in wave:
                    row.future.cancel()

    def _run_wave(self, wave: list[Generation]) -> None:
        batches = deque(plan_batches(wave, self.loaded, self.batch_size))
        while batches and not self._cancelled.is_set():
            batch = batches.popleft()
            if all(row.answered for row in batch):
                continue
            if len(batch) > self._most_rows:
                batches.extendleft(reversed(_halves(batch)))
                continue
            if not self._run(batch):
                batches.extendleft(reversed(_halves([row for row in batch if not row.finish])))

    def _run(self, batch: list[Generation]) -> bool:
        """Continue a batch to its end; false when memory ran out, with unended rows as they began."""
        left = {id(row): row for row in batch}
        try:
            with self.meter.timing(len(batch)):
                for row in generate(self.loaded, batch, self._cancelled.is_set):
                    del left[id(row)]
                    self.meter.tokens += len(row.tokens)
                    if not row.answered:
                        row.future.set_result(row.reply())
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and (
                not is_out_of_memory(str(error))
            ):
                raise
            if len(left) == 1:
                [alone] = left.values()
                raise SrtError(
                    f"out of memory with a single row of {len(alone.prompt_ids)} tokens. "
                    "Lower --max-new-tokens."
                ) from None
            for row in left.values():  # some may have ended in the very step
                row.start_again()
            self._most_rows = max(1, len(left) // 2)
            self.meter.halvings += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return False
        return True


def _halves(batch: list[Generation]) -> list[list[Generation]]:
    middle = (len(batch) + 1) // 2
    return [half for half in (batch[:middle], batch[middle:]) if half]


def is_out_of_memory(message: str) -> bool:
    """Whether an error's text says so: an accelerator's, the CPU allocator's, or transformers'."""
    said = message.lower()
    return any(words in said for words in OUT_OF_MEMORY)


def plan_batches(
    wave: list[Generation], loaded: Loaded, batch_size: int | None
) -> list[list[Generation]]:
    """Cut a wave into batches of like length, the longest first, within the memory's budget."""
    most_rows = batch_size or MOST_ROWS[loaded.device]
    in_time = _tokens_in_time(loaded) if batch_size is None else 1 << 60
    most_tokens = _tokens_that_fit(loaded)
    most_read = tokens_read_at_once(loaded)
    # Rows of one length are in the order of their seeds: the order of the input is irrelevant.
    ordered = sorted(wave, key=lambda row: (len(row.prompt_ids), row.seed), reverse=True)
    batches: list[list[Generation]] = []
    for row in ordered:
        current = batches[-1] if batches else []
        rows = len(current) + 1
        width = len(current[0].prompt_ids) if current else 0
        longest = max((other.limit for other in (*current, row)), default=0)
        fits = (
            rows <= most_rows
            and width * rows <= most_read
            and (width + longest) * rows <= most_tokens
            and (rows <= FEWEST_ROWS or min(longest, USUAL_REPLY) * rows <= in_time)
        )
        if current and fits:
            current.append(row)
        else:
            batches.append([row])
    return batches


def _tokens_in_time(loaded: Loaded) -> int:
    """How many tokens a CPU writes within two minutes, by the size of the model; never measured.

    A resumed run should cut the same batches.
    """
    if loaded.device != "cpu":
        return 1 << 60
    cost = 2 * loaded.model.num_parameters()
    return int(LONGEST_BATCH_S * OPERATIONS_A_SECOND * torch.get_num_threads() / cost)


def _tokens_that_fit(loaded: Loaded) -> int:
    """How many tokens' keys and values fit: of what the machine has, not of what is free now.

    What is free changes from run to run, and a resumed run should cut the same batches.
    """
    config: Any = loaded.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = loaded.model.dtype.itemsize
    bytes_a_token = 2 * config.num_hidden_layers * heads * size * width
    if loaded.device == "cuda":
        memory = torch.cuda.get_device_properties(loaded.model.device).total_memory
    else:
        memory = own_memory_bytes()
    return int(MEMORY_SHARE * memory / bytes_a_token)


class RowBatch(Protocol):
    """How the rows of a batch are computed; the batch is on the device of its model."""

    takes_several: bool
    """Whether a step takes several tokens of a row."""

    def read(
        self, prompts: Sequence[list[int]], cancelled: Callable[[], bool]
    ) -> torch.Tensor | None:
        """Logits behind each prompt, the longest first, (rows, vocabulary); None if cancelled."""

    def step(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits behind each of some more tokens of each row, (all tokens, vocabulary)."""

    def keep(self, ended: Sequence[int], wrong: Sequence[int]) -> list[int]:
        """Let ended rows go, and so many of each row's last tokens; gives the old row of each place."""


@torch.inference_mode()
def generate(
    loaded: Loaded, batch: Sequence[Generation], cancelled: Callable[[], bool]
) -> Iterator[Generation]:
    """Continue every row of a batch; yields each as it ends, and computes on with the others.

    A cancelled batch stops at the next token.
    """
    live = list(batch)
    guesses: list[list[int]] = [[] for _ in live]
    decoder = loaded.decoder
    together: RowBatch = UnpaddedBatch(decoder) if decoder is not None else PaddedBatch(loaded)
    logits = together.read([row.prompt_ids for row in live], cancelled)
    while logits is not None and not cancelled():
        wrong = _take(live, guesses, logits)
        ended = [place for place, row in enumerate(live) if row.finish is not None]
        for place in ended:
            yield live[place]
        if len(ended) == len(live):
            return
        if ended or any(wrong):
            live = [live[place] for place in together.keep(ended, wrong)]
        most = MOST_STEP_TOKENS // len(live) - 1 if together.takes_several else 0
        guesses = [row.guess(most) for row in live]
        known = zip(live, guesses, strict=True)
        logits = together.step([[row.tokens[-1], *guess] for row, guess in known])


def _take(
    live: Sequence[Generation], guesses: Sequence[list[int]], logits: torch.Tensor
) -> list[int]:
    """Give each row its next token, and more where it was guessed; how many guessed ones fell away.

    Of logits (tokens, vocabulary): behind each row's last token, and each of its guess.
    """
    known = list(zip(live, guesses, strict=True))
    draws = [row.draw(ahead) for row, guess in known for ahead in range(len(guess) + 1)]
    drawn = choose_tokens(logits, draws).tolist()
    wanting, wrong = [], []
    begin = 0
    for row, guess in known:
        end, right = begin + len(guess) + 1, 0
        for place, (token, guessed) in enumerate(zip_longest(drawn[begin:end], guess), begin):
            if row.wants_top(token):
                wanting.append((place, row, len(row.tokens)))
            if row.take(token) or token != guessed:
                break
            right += 1
        row.learn(len(guess), right)
        wrong.append(len(guess) - right)
        begin = end
    keep_tops(logits, wanting)
    return wrong

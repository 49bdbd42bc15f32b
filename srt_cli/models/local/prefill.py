"""Reading the prompts of a batch: what they begin with in common once, the rest in groups.

Reading is bound by arithmetic, so a large batch reads no faster than a small one and wastes its
padding. Prompts are therefore read in small groups of like length, and their keys and values set side
by side in one cache, which the whole batch then continues.

transformers' own cache is copied whole at every token (`torch.cat`). Ours writes into spare room, and a
row leaves by one copy of the batch's last row into its place, whatever the size of the batch.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from srt_cli.models.local.rows import Loaded

GROUP_TOKENS: Final = {"cpu": 768, "mps": 4096, "cuda": 32_768}
"""Tokens of a group, padding and all: enough to keep the arithmetic busy."""
FEWEST_SHARED: Final = 8
"""A shorter beginning is not worth a pass of its own."""
WHOLE_BATCH_TOKENS: Final = {"cpu": 16_384, "mps": 16_384, "cuda": 131_072}
"""Where a batch cannot be read in groups: its activations are the peak of memory."""
SPARE_TOKENS: Final = 64
GROWTH: Final = 1.25


@dataclass(frozen=True)
class Prefill:
    """Prompts that were read: (rows, heads, tokens, dim) a layer, padded on the left."""

    cache: DynamicCache
    logits: torch.Tensor
    """Of the token that follows each prompt, (rows, vocabulary)."""


def read_prompts(
    loaded: Loaded, prompts: Sequence[list[int]], cancelled: Callable[[], bool]
) -> Prefill | None:
    """Read token ids of prompts, the longest first; None if cancelled meanwhile."""
    cache = roomy_cache(loaded.model.config)
    if not _reads_in_groups(cache):
        return Prefill(cache, _read(loaded, prompts, cache))
    shared = shared_beginning(prompts)
    beginning = DynamicCache(config=loaded.model.config)
    if shared:
        _read(loaded, [prompts[0][:shared]], beginning)
    found: list[torch.Tensor] = []
    for first, last in groups_of_like_length(prompts, shared, GROUP_TOKENS[loaded.device]):
        if cancelled():
            return None
        group = _repeated(beginning, last - first, loaded)
        found.append(_read(loaded, [ids[shared:] for ids in prompts[first:last]], group, shared))
        _set_beside(cache, group, shared, first, prompts)
    return Prefill(cache, torch.cat(found))


def tokens_read_at_once(loaded: Loaded) -> int:
    """The most prompt tokens of a batch, padding and all; groups bound themselves."""
    if _reads_in_groups(roomy_cache(loaded.model.config)):
        return sys.maxsize
    return WHOLE_BATCH_TOKENS[loaded.device]


def _reads_in_groups(cache: Cache) -> bool:
    """Whether every layer keeps plain keys and values, which groups can be joined from."""
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)


def shared_beginning(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; every prompt keeps one of its own, to be continued."""
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)  # what these two share, all share
    most = min(map(len, prompts)) - 1
    differ = (place for place in range(most) if low[place] != high[place])
    shared = next(differ, most)
    return shared if shared >= FEWEST_SHARED else 0


def groups_of_like_length(
    prompts: Sequence[list[int]], shared: int, most_tokens: int
) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) of each group; a group's first prompt is its longest."""
    first = 0
    while first < len(prompts):
        width = len(prompts[first]) - shared
        last = min(len(prompts), first + max(1, most_tokens // width))
        yield first, last
        first = last


def forward(loaded: Loaded, cache: Cache, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits of the last token of each row, (rows, vocabulary); the cache takes the states."""
    model: Any = loaded.model
    held = {loaded.cache_name: cache}
    logits: torch.Tensor = model(use_cache=True, logits_to_keep=1, **held, **inputs).logits
    return logits[:, -1]


def _read(
    loaded: Loaded, prompts: Sequence[list[int]], cache: Cache, behind: int = 0
) -> torch.Tensor:
    """Read prompts behind so many tokens that the cache holds already."""
    device = loaded.model.device
    width = max(map(len, prompts))
    pad = int(loaded.tokenizer.pad_token_id or 0)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=device)
    pads = torch.tensor([width - len(row) for row in prompts], device=device)  # (rows,)
    places = torch.arange(width, device=device) - pads[:, None]  # (rows, width)
    seen = torch.cat([places.new_ones(len(prompts), behind), places >= 0], dim=1).bool()
    positions = places.clamp_min(0) + behind
    return forward(loaded, cache, input_ids=ids, attention_mask=seen, position_ids=positions)


def _repeated(cache: DynamicCache, rows: int, loaded: Loaded) -> DynamicCache:
    """A cache of one row for several rows."""
    several = DynamicCache(config=loaded.model.config)
    for number, keys, values in _states(cache):
        several.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
    return several


def _states(cache: DynamicCache) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Number, keys and values of each layer that has some of its own."""
    for number, layer in enumerate(cache.layers):
        plain: Any = layer
        if plain.is_initialized:
            yield number, plain.keys, plain.values


def _set_beside(
    cache: DynamicCache,
    group: DynamicCache,
    shared: int,
    first: int,
    prompts: Sequence[list[int]],
) -> None:
    """Put a group's states into the batch's cache, each row's beginning next to its rest."""
    width = max(map(len, prompts))
    for number, *states in _states(group):
        layer = cache.layers[number]
        assert isinstance(layer, RoomyLayer)
        room = layer.room_for(len(prompts), width, states[0])
        for whole, part in zip(room, states, strict=True):
            for row in range(part.shape[0]):
                length = len(prompts[first + row])
                kept = whole[first + row, :, width - length :]
                kept[:, :shared] = part[row, :, :shared]
                kept[:, shared:] = part[row, :, part.shape[-2] - (length - shared) :]


# --- The cache: grows in place, and lets finished rows go cheaply --------------------------------


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, (rows, heads, tokens, dim), as views into larger tensors."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Start empty; called by transformers at the first update."""
        super().lazy_initialization(key_states, value_states)
        self._room = key_states.new_empty(0), value_states.new_empty(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens; gives all states so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._room[0].numel() == 0 or end > self._room[0].shape[-2]:
            capacity = int(GROWTH * end) + SPARE_TOKENS
            self._room = (
                _grown(self.keys, key_states, capacity),
                _grown(self.values, value_states, capacity),
            )
        rows = key_states.shape[0]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:rows, :, start:end] = states
        self.keys, self.values = (room[:rows, :, :end] for room in self._room)
        return self.keys, self.values

    def room_for(
        self, rows: int, tokens: int, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of so many rows and tokens, to be written in place; empty at first."""
        if not self.is_initialized:
            self.lazy_initialization(like, like)
            _, heads, _, size = like.shape
            capacity = int(GROWTH * tokens) + SPARE_TOKENS
            shape = (rows, heads, capacity, size)
            # Zeros, for what masks leave out is multiplied by nought, and memory may hold NaN.
            self._room = like.new_zeros(shape), like.new_zeros(shape)
        keys, values = (room[:rows, :, :tokens] for room in self._room)
        self.keys, self.values = keys, values
        return keys, values

    def keep(self, order: Sequence[int]) -> None:
        """Keep these rows, in this order; a row that stays in its place costs nothing."""
        tokens = self.get_seq_length()
        for room in self._room:
            for place, row in enumerate(order):
                if place != row:
                    room[place, :, :tokens] = room[row, :, :tokens]
        self.keys, self.values = (room[: len(order), :, :tokens] for room in self._room)


def _grown(earlier: torch.Tensor | None, states: torch.Tensor, capacity: int) -> torch.Tensor:
    rows, heads, _, size = states.shape
    room = states.new_empty((rows, heads, capacity, size))
    if earlier is not None and earlier.numel():
        room[:, :, : earlier.shape[-2]] = earlier
    return room


def roomy_cache(config: PretrainedConfig) -> DynamicCache:
    """A cache for a model; layers that are no plain attention stay as transformers makes them."""
    cache = DynamicCache(config=config)
    cache.layers = [_roomy(layer) for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RoomyLayer
    return cache


def _roomy(layer: Any) -> Any:
    make: Any = RoomyLayer
    return make() if type(layer) is DynamicLayer else layer


def keep_rows(cache: DynamicCache, finished: Sequence[int], rows: int) -> list[int]:
    """Let finished rows go; gives which old row stands in each place now.

    Holes are filled from the end, so that as few rows as possible move.
    """
    left = sorted(set(range(rows)) - set(finished))
    count = len(left)
    movers = [row for row in left if row >= count]
    stay = set(left) - set(movers)
    order = [place if place in stay else movers.pop() for place in range(count)]
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(order)
        else:
            other: Any = layer
            other.batch_select_indices(torch.tensor(order, device=other.device))
    return order

"""A batch of any model: prompts are read in groups, what they begin with in common once.

Reading is bound by arithmetic, so a large batch reads no faster than a small one and wastes its
padding. Prompts are therefore read in small groups of like length, and their keys and values set side
by side in one cache, which the whole batch then continues.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from transformers import Cache, DynamicCache

from srt_cli.models.local.cache import RoomyLayer, keep_rows, roomy_cache, shared_beginning
from srt_cli.models.local.rows import Loaded

GROUP_TOKENS: Final = {"cpu": 768, "mps": 4096, "cuda": 32_768}
"""Tokens of a group, padding and all: enough to keep the arithmetic busy."""
WHOLE_BATCH_TOKENS: Final = {"cpu": 16_384, "mps": 16_384, "cuda": 131_072}
"""Where a batch cannot be read in groups: its activations are the peak of memory."""
FEWEST_SHARED: Final = 8
"""A shorter beginning is not worth a pass of its own."""


class PaddedBatch:
    """Rows of one batch, continued together by transformers' own forward, whatever the model.

    In the cache, (rows, heads, columns, size) a layer, they are padded on the left.
    """

    takes_several = False

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    def read(
        self, prompts: Sequence[list[int]], cancelled: Callable[[], bool]
    ) -> torch.Tensor | None:
        """Logits behind each prompt, the longest first, (rows, vocabulary); None if cancelled."""
        loaded = self._loaded
        self._cache = cache = roomy_cache(loaded.model.config)
        self._width = len(prompts[0])
        self._lengths = torch.tensor([len(ids) for ids in prompts], device=loaded.model.device)
        if not _reads_in_groups(cache):
            return _read(loaded, prompts, cache)
        shared = shared_beginning(prompts)
        shared = shared if shared >= FEWEST_SHARED else 0
        beginning = DynamicCache(config=loaded.model.config)
        if shared:
            _read(loaded, [prompts[0][:shared]], beginning)
        found: list[torch.Tensor] = []
        for first, last in groups_of_like_length(prompts, shared, GROUP_TOKENS[loaded.device]):
            if cancelled():
                return None
            group = _repeated(beginning, last - first, loaded)
            rests = [ids[shared:] for ids in prompts[first:last]]
            found.append(_read(loaded, rests, group, shared))
            _set_beside(cache, group, shared, first, prompts)
        return torch.cat(found)

    def step(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits behind one more token of each row, (rows, vocabulary)."""
        ids = torch.tensor(tokens, device=self._lengths.device)  # (rows, 1)
        self._width += 1
        self._lengths = self._lengths + 1
        columns = torch.arange(self._width, device=ids.device)
        return _forward(
            self._loaded,
            self._cache,
            input_ids=ids,
            attention_mask=columns >= self._width - self._lengths[:, None],
            position_ids=self._lengths[:, None] - 1,
        )

    def keep(self, ended: Sequence[int], wrong: Sequence[int]) -> list[int]:
        """Let ended rows go; gives the old row of each place."""
        assert not any(wrong)  # rows stay as long as each other
        left = [row for row in range(len(self._lengths)) if row not in ended]
        order = keep_rows(self._cache, left)
        self._lengths = self._lengths[order]
        return order


def tokens_read_at_once(loaded: Loaded) -> int:
    """The most prompt tokens of a batch, padding and all; groups bound themselves."""
    if _reads_in_groups(roomy_cache(loaded.model.config)):
        return sys.maxsize
    return WHOLE_BATCH_TOKENS[loaded.device]


def _reads_in_groups(cache: Cache) -> bool:
    """Whether every layer keeps plain keys and values, which groups can be joined from."""
    return all(isinstance(layer, RoomyLayer) for layer in cache.layers)


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


def _forward(loaded: Loaded, cache: Cache, **inputs: torch.Tensor) -> torch.Tensor:
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
    return _forward(loaded, cache, input_ids=ids, attention_mask=seen, position_ids=positions)


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
                # Zeros, for what a mask leaves out is multiplied by nought, and memory may hold NaN.
                whole[first + row, :, : width - length] = 0
                kept = whole[first + row, :, width - length :]
                kept[:, :shared] = part[row, :, :shared]
                kept[:, shared:] = part[row, :, part.shape[-2] - (length - shared) :]

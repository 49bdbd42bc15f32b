"""A batch's keys and values: they grow in place, and rows that have ended leave cheaply.

transformers' own cache is copied whole at every token (`torch.cat`). Ours writes into spare room, and a
row leaves by one copy of another into its place, whatever the size of the batch.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS: Final = 64
GROWTH: Final = 1.25
SPARE_COLUMNS: Final = 128
"""Room for new tokens; what is there is copied once in so many steps."""


class RowStates:
    """Keys and values of a batch's rows, layer by layer, each row's from the first column on.

    Columns that no row has written are nought: a mask leaves them out, but they are multiplied.
    """

    def __init__(self, layers: int, rows: int, heads: int, columns: int, size: int) -> None:
        self.columns = columns + SPARE_COLUMNS
        shape = rows, heads, self.columns, size
        made = [torch.zeros(shape, dtype=torch.float32) for _ in range(2 * layers)]
        self._rooms = list(zip(made[::2], made[1::2], strict=True))

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, (rows, heads, columns, size), to be written in place."""
        return self._rooms[layer]

    def reserve(self, columns: int) -> None:
        """Make room for so many columns."""
        if columns <= self.columns:
            return
        self.columns = columns + SPARE_COLUMNS
        for layer, (keys, values) in enumerate(self._rooms):  # one by one, so that each is freed
            self._rooms[layer] = self._larger(keys), self._larger(values)

    def keep(self, order: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep these rows of such lengths, in this order; one that stays in its place costs nothing."""
        moves = [(place, row) for place, row in enumerate(order) if place != row]
        for place, row in moves:
            for room in chain.from_iterable(self._rooms):
                room[place, :, : lengths[row]] = room[row, :, : lengths[row]]
        self._rooms = [(keys[: len(order)], values[: len(order)]) for keys, values in self._rooms]

    def _larger(self, room: torch.Tensor) -> torch.Tensor:
        rows, heads, columns, size = room.shape
        larger = room.new_zeros(rows, heads, self.columns, size)
        larger[:, :, :columns] = room
        return larger


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
        """Keys and values of so many rows and tokens, to be written in place, padding and all."""
        if not self.is_initialized:
            self.lazy_initialization(like, like)
            _, heads, _, size = like.shape
            capacity = int(GROWTH * tokens) + SPARE_TOKENS
            shape = (rows, heads, capacity, size)
            self._room = like.new_empty(shape), like.new_empty(shape)
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


def keep_rows(cache: DynamicCache, rows: Sequence[int]) -> list[int]:
    """Keep these rows, given in the order in which they stand; gives the old row of each place."""
    order = filled_from_the_end([rows])
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(order)
        else:
            other: Any = layer
            other.batch_select_indices(torch.tensor(order, device=other.device))
    return order


def filled_from_the_end(groups: Sequence[Sequence[int]]) -> list[int]:
    """The old row of each place, when only these rows stay, one group behind the other.

    A group's holes are filled from its own end, so that few rows move and groups stay together.
    Groups and their rows are in the order in which they stand.
    """
    order: list[int] = []
    for rows in groups:
        places = range(len(order), len(order) + len(rows))
        movers = [row for row in rows if row not in places]
        stay = set(rows).intersection(places)
        order += [place if place in stay else movers.pop() for place in places]
    return order


def shared_beginning(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; every prompt keeps one of its own, to be continued."""
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)  # what these two share, all share
    most = max(0, min(map(len, prompts)) - 1)
    return next((place for place in range(most) if low[place] != high[place]), most)

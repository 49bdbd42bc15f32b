"""A decoder of Llama's shape on a CPU, computed with less around its products than transformers'.

The arithmetic is the model's own; what is saved is everything beside it. Prompts are read end to end,
without padding, what several begin with only once, and of the last layer what the next token needs.
Projections of the same states are one product. A step reads the keys of each group of like length, not
the padding of the longest row.

A model is taken over where its class is known, and only after a probe has come out as its own forward
does. Shapes below name a batch's rows; `tokens` are those of all rows, one after the other.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from srt_cli.models.local.cache import RoomyLayer, keep_rows, roomy_cache, shared_beginning
from srt_cli.models.local.products import MakeProduct, in_turn

KNOWN: Final = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
STATIC_ROPES: Final = frozenset({"default", "linear", "llama3", "yarn"})
"""Ways to turn positions into rotations that depend on the position alone."""
MOST_TOKENS: Final = 768
"""Of a pass over prompts: enough to keep the arithmetic busy."""
PADDING_WORTH_A_GROUP: Final = 128
"""Padded keys of a step that take as long as attention over one more group."""
PROBE: Final = ([*range(1, 14)], [*range(1, 9), 20, 21])
"""Two prompts that share a beginning."""
PROBE_TOLERANCE: Final = 1e-3
"""Of the largest logit; rounding alone gives some 1e-6."""


def decoder_of(model: PreTrainedModel, make: MakeProduct) -> "Decoder | None":
    """The decoder of a model, with products made by `make`; None where its shape is not known."""
    if type(model) not in KNOWN or model.device.type != "cpu" or model.dtype != torch.float32:
        return None
    rope: Any = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in STATIC_ROPES:
        return None
    if not all(isinstance(layer, RoomyLayer) for layer in roomy_cache(model.config).layers):
        return None  # some layers see a window only
    try:
        if any(type(layer) is not nn.Linear for layer in _projections(model)):
            return None
        alike = _computes_as(model, Decoder(model, in_turn))
    except (AttributeError, TypeError, RuntimeError):  # parts of transformers may move
        return None
    return Decoder(model, make) if alike else None


def _projections(model: Any) -> Iterator[nn.Module]:
    """Everything that is multiplied by, so that an adapter's or quantized layer is noticed."""
    yield model.lm_head
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        yield from (mlp.gate_proj, mlp.up_proj, mlp.down_proj)


@torch.inference_mode()
def _computes_as(model: Any, decoder: "Decoder") -> bool:
    """Whether a decoder reads and continues two prompts as the model's own forward does."""
    most = model.config.vocab_size
    prompts = [[token % most for token in ids] for ids in PROBE]
    batch = UnpaddedBatch(decoder)
    found = [batch.read(prompts, lambda: False), batch.step(torch.tensor([3, 4]))]
    for row, (ids, token) in enumerate(zip(prompts, (3, 4), strict=True)):
        whole = torch.tensor([[*ids, token]])
        wanted = model(input_ids=whole, logits_to_keep=2).logits[0]  # (2, vocabulary)
        tolerance = PROBE_TOLERANCE * float(wanted.abs().max())
        for logits, expected in zip(found, wanted, strict=True):
            if logits is None or not torch.allclose(logits[row], expected, 0, tolerance):
                return False
    return True


class Decoder:
    """A model's layers, in as few operations as its arithmetic needs."""

    def __init__(self, model: Any, make: MakeProduct) -> None:
        inner = model.model
        self.config = model.config
        self._embed, self._rotary, self._norm = inner.embed_tokens, inner.rotary_emb, inner.norm
        self._layers = [_Layer(layer, make) for layer in inner.layers]
        self._head = make([model.lm_head])

    def new_cache(self, rows: int, width: int) -> DynamicCache:
        """A cache with room for so many rows of so many tokens, which nothing is in yet."""
        cache = roomy_cache(self.config)
        for layer, known in zip(cache.layers, self._layers, strict=True):
            assert isinstance(layer, RoomyLayer)
            layer.room_for(rows, width, torch.empty(1, known.key_heads, 0, known.size))
        return cache

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        attend: "_Attend",
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of tokens, (tokens, vocabulary), or only of those at `kept`."""
        states = self._embed(ids)  # (tokens, hidden)
        cos, sin = self._rotary(states, positions[None])  # (1, tokens, size)
        low, high = sin[0].chunk(2, dim=-1)
        rotation = cos[0][:, None], torch.cat([-low, high], dim=-1)[:, None]
        for number, layer in enumerate(self._layers):
            last = number + 1 == len(self._layers)
            mixed = attend(number, layer.project(states, rotation), last)
            states = states[kept] if last and kept is not None else states
            states = layer.finish(states, mixed)
        return self._head(self._norm(states))


class _Heads(NamedTuple):
    """Queries (tokens, heads, size), keys and values (tokens, key heads, size) of new tokens."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class _Layer:
    """One layer's products and norms."""

    def __init__(self, layer: Any, make: MakeProduct) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.size = int(attention.head_dim)
        self.heads = attention.q_proj.out_features // self.size
        self.key_heads = attention.k_proj.out_features // self.size
        self._into = layer.input_layernorm, layer.post_attention_layernorm
        self._head_norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._qkv = make([attention.q_proj, attention.k_proj, attention.v_proj])
        self._output = make([attention.o_proj])
        self._gate_and_up = make([mlp.gate_proj, mlp.up_proj])
        self._down = make([mlp.down_proj])
        self._activate = mlp.act_fn

    def project(self, states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> _Heads:
        """What new tokens ask, and what they are found by and give; queries and keys are rotated."""
        every = self._qkv(self._into[0](states)).unflatten(-1, (-1, self.size))
        turning = every[:, : self.heads + self.key_heads]
        queries_norm, keys_norm = self._head_norms
        if queries_norm is not None and keys_norm is not None:
            queries, keys = turning[:, : self.heads], turning[:, self.heads :]
            turning = torch.cat([queries_norm(queries), keys_norm(keys)], dim=1)
        low, high = turning.chunk(2, dim=-1)
        cos, sin = rotation
        turned = torch.addcmul(turning * cos, torch.cat([high, low], dim=-1), sin)
        return _Heads(
            turned[:, : self.heads],
            turned[:, self.heads :],
            every[:, self.heads + self.key_heads :],
        )

    def finish(self, states: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The layer's output, (tokens, hidden), from what its attention mixed."""
        states = states + self._output(mixed)
        gate, up = self._gate_and_up(self._into[1](states)).chunk(2, dim=-1)
        return states + self._down(self._activate(gate).mul_(up))


class _Attend(Protocol):
    """Attention of one layer: (tokens, heads * size); of each row's last token alone if `last`."""

    def __call__(self, layer: int, new: _Heads, last: bool) -> torch.Tensor: ...


class _Beginning(NamedTuple):
    """The first columns of a row, which another one begins with as well."""

    row: int
    start: int
    tokens: int


@dataclass(frozen=True)
class _Span:
    """Tokens of a row that are read in one pass, behind those that the cache holds already."""

    row: int
    ids: Sequence[int]
    start: int
    """The cache's column where the row begins."""
    behind: int
    taken: _Beginning | None = None
    """What is copied from a row that has been read, up to here, instead of being read again."""

    @property
    def end(self) -> int:
        """The column behind the last of the tokens."""
        return self.start + self.behind + len(self.ids)


class UnpaddedBatch:
    """Rows of one batch: their prompts are read end to end, then they are continued together.

    In the cache they end in the same column, so those of shorter prompts begin further right.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def read(
        self, prompts: Sequence[list[int]], cancelled: Callable[[], bool]
    ) -> torch.Tensor | None:
        """Logits behind each prompt, the longest first, (rows, vocabulary); None if cancelled."""
        self._width = len(prompts[0])
        self._starts = torch.tensor([self._width - len(ids) for ids in prompts])
        self._cache = self._decoder.new_cache(len(prompts), self._width)
        starts = self._starts.tolist()
        self._clear_padding(starts)
        rows: list[int] = []
        found: list[torch.Tensor] = []
        for part in _passes(_spans(prompts, starts)):
            if cancelled():
                return None
            ends = [place for place, span in enumerate(part) if span.end == self._width]
            found.append(self._read(part)[ends])
            rows += [part[place].row for place in ends]
        return torch.cat(found)[torch.tensor(rows).argsort()]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits behind one more token of each row, (rows, vocabulary)."""
        positions = self._width - self._starts
        self._width += 1
        attend = _Stepping(self._cache, self._width, self._starts)
        return self._decoder(tokens, positions, attend)

    def keep(self, ended: Sequence[int]) -> list[int]:
        """Let ended rows go; gives which old row stands in each place now."""
        gone = set(ended)
        groups = [
            [row for row in range(first, last) if row not in gone]
            for first, last, _ in groups_of_like_start(self._starts.tolist())
        ]
        order = keep_rows(self._cache, groups)
        self._starts = self._starts[order]
        return order

    def _read(self, spans: Sequence[_Span]) -> torch.Tensor:
        ids = torch.tensor([token for span in spans for token in span.ids])
        positions = torch.cat(
            [torch.arange(span.behind, span.behind + len(span.ids)) for span in spans]
        )
        lasts = torch.tensor([len(span.ids) for span in spans]).cumsum(0) - 1
        return self._decoder(ids, positions, _Reading(self._cache, spans), lasts)

    def _clear_padding(self, starts: Sequence[int]) -> None:
        for layer in self._cache.layers:
            for room in _room_of(layer):
                for row, start in enumerate(starts):
                    # Zeros: what a mask leaves out is multiplied by nought, and memory may hold NaN.
                    room[row, :, :start] = 0


def _spans(prompts: Sequence[list[int]], starts: Sequence[int]) -> Iterator[_Span]:
    """All prompts in spans that a pass can hold, so that long ones need no more memory.

    They come in the order of their tokens: what a prompt begins with as any one before it does, the last
    one does too.
    """
    last: int | None = None
    for row in sorted(range(len(prompts)), key=prompts.__getitem__):
        ids, shared, taken = prompts[row], 0, None
        if last is not None:
            shared = shared_beginning([prompts[last], ids])
            taken = _Beginning(last, starts[last], shared)
        for first in range(shared, len(ids), MOST_TOKENS):
            yield _Span(row, ids[first : first + MOST_TOKENS], starts[row], first, taken)
            taken = None
        last = row


def _passes(spans: Iterable[_Span]) -> Iterator[list[_Span]]:
    """Spans that are read together."""
    part: list[_Span] = []
    for span in spans:
        if part and sum(len(each.ids) for each in (*part, span)) > MOST_TOKENS:
            yield part
            part = []
        part.append(span)
    yield part


def _room_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's keys and values so far, (rows, key heads, columns, size), to be written in place."""
    return layer.keys, layer.values


class _Reading:
    """Attention of prompts: each row sees its own tokens, up to each one's place."""

    def __init__(self, cache: DynamicCache, spans: Sequence[_Span]) -> None:
        ends = [0]
        for span in spans:
            ends.append(ends[-1] + len(span.ids))
        self._cache = cache
        self._parts = [
            (span, first, last, _seen_behind(span))
            for span, (first, last) in zip(spans, pairwise(ends), strict=True)
        ]

    def __call__(self, layer: int, new: _Heads, last: bool) -> torch.Tensor:
        room = _room_of(self._cache.layers[layer])
        mixed = []
        for span, first, end, mask in self._parts:
            for whole, states in zip(room, (new.keys, new.values), strict=True):
                if span.taken is not None:
                    row, start, tokens = span.taken
                    beginning = whole[span.row, :, span.start : span.start + tokens]
                    beginning.copy_(whole[row, :, start : start + tokens])
                place = whole[span.row, :, span.start + span.behind : span.end]
                place.copy_(states[first:end].transpose(0, 1))
            seen_keys, seen_values = (
                whole[span.row, None, :, span.start : span.end] for whole in room
            )
            found = scaled_dot_product_attention(
                new.queries[end - 1 if last else first : end].transpose(0, 1)[None],
                seen_keys,
                seen_values,
                attn_mask=None if last else mask,
                is_causal=mask is None and not last,
                enable_gqa=True,
            )  # (1, heads, asking tokens, size)
            mixed.append(found[0].transpose(0, 1).flatten(1))
        return torch.cat(mixed)


def _seen_behind(span: _Span) -> torch.Tensor | None:
    """What is added to scores of a span behind others, (its tokens, all tokens of its row)."""
    if not span.behind:
        return None
    count = len(span.ids)
    unseen = torch.ones(count, span.behind + count).triu(span.behind + 1).bool()
    return _added(unseen)


def _added(unseen: torch.Tensor) -> torch.Tensor:
    """What is added to scores, so that nothing unseen counts."""
    return torch.zeros(unseen.shape).masked_fill(unseen, -torch.inf)


class _Stepping:
    """Attention of one new token a row: each group sees the columns from its first row's start."""

    def __init__(self, cache: DynamicCache, width: int, starts: torch.Tensor) -> None:
        self._cache = cache
        self._groups = []
        for first, last, start in groups_of_like_start(starts.tolist()):
            padding = torch.arange(start, width) < starts[first:last, None]  # (group, columns)
            self._groups.append((slice(first, last), start, _added(padding)[:, None, None]))

    def __call__(self, layer: int, new: _Heads, last: bool) -> torch.Tensor:
        room: Any = self._cache.layers[layer]
        seen_keys, seen_values = room.update(new.keys[:, :, None], new.values[:, :, None])
        # Queries that share keys are as several tokens of one head: (rows, key heads, queries, size).
        asking = new.queries.unflatten(1, (new.keys.shape[1], -1))
        mixed = [
            scaled_dot_product_attention(
                asking[rows], seen_keys[rows, :, start:], seen_values[rows, :, start:], mask
            )
            for rows, start, mask in self._groups
        ]
        return torch.cat(mixed).flatten(1)


def groups_of_like_start(starts: Sequence[int]) -> list[tuple[int, int, int]]:
    """First and last (exclusive) row, and first column, of groups with little padding."""
    groups = []
    first, begin, padding = 0, starts[0], 0
    for row, start in enumerate(starts):
        wider = min(begin, start)
        padded = padding + start - wider + (begin - wider) * (row - first)
        if padded > PADDING_WORTH_A_GROUP:
            groups.append((first, row, begin))
            first, wider, padded = row, start, 0
        begin, padding = wider, padded
    return [*groups, (first, len(starts), begin)]

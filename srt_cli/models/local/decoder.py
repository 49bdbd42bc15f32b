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
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from srt_cli.models.local.cache import (
    RoomyLayer,
    RowStates,
    filled_from_the_end,
    roomy_cache,
    shared_beginning,
)
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
    read, stepped = batch.read(prompts, lambda: False), batch.step([[3, 5], [4]])
    if read is None:
        return False
    wholes = [[*prompts[0], 3, 5], [*prompts[1], 4]]
    found = [torch.stack([read[0], *stepped[:2]]), torch.stack([read[1], stepped[2]])]
    for whole, logits in zip(wholes, found, strict=True):
        wanted = model(input_ids=torch.tensor([whole]), logits_to_keep=len(logits)).logits[0]
        tolerance = PROBE_TOLERANCE * float(wanted.abs().max())
        if not torch.allclose(logits, wanted, 0, tolerance):
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

    @property
    def queries_a_key(self) -> int:
        """How many heads ask the same keys."""
        one = self._layers[0]
        return one.heads // one.key_heads

    def room_for(self, rows: int, columns: int) -> RowStates:
        """Room for the keys and values of so many rows of so many tokens."""
        one = self._layers[0]
        return RowStates(len(self._layers), rows, one.key_heads, columns, one.size)

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
        self.heads = int(attention.q_proj.out_features) // self.size
        self.key_heads = int(attention.k_proj.out_features) // self.size
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


@dataclass(frozen=True)
class _Span:
    """Tokens of a row that are read in one pass."""

    row: int
    ids: Sequence[int]
    behind: int
    """How many of the row's tokens are before them."""
    copied_from: int | None = None
    """A row that begins as this one does up to here, and has been read."""

    @property
    def end(self) -> int:
        """How many of the row's tokens there are up to the last of these."""
        return self.behind + len(self.ids)


class UnpaddedBatch:
    """Rows of one batch: their prompts are read end to end, then they are continued together."""

    takes_several = True

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def read(
        self, prompts: Sequence[list[int]], cancelled: Callable[[], bool]
    ) -> torch.Tensor | None:
        """Logits behind each prompt, (rows, vocabulary); None if cancelled."""
        self._lengths = [len(ids) for ids in prompts]
        self._states = self._decoder.room_for(len(prompts), max(self._lengths))
        rows: list[int] = []
        found: list[torch.Tensor] = []
        for part in _passes(_spans(prompts)):
            if cancelled():
                return None
            ends = [place for place, span in enumerate(part) if span.end == len(prompts[span.row])]
            found.append(self._read(part)[ends])
            rows += [part[place].row for place in ends]
        return torch.cat(found)[torch.tensor(rows).argsort()]

    def step(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits behind each of some more tokens of each row, (all tokens, vocabulary)."""
        counts = [len(ids) for ids in tokens]
        self._lengths = [
            length + count for length, count in zip(self._lengths, counts, strict=True)
        ]
        self._states.reserve(max(self._lengths))
        attend = _Stepping(self._states, counts, self._lengths, self._decoder.queries_a_key)
        ids = torch.tensor([token for row in tokens for token in row])
        return self._decoder(ids, attend.columns, attend)

    def keep(self, ended: Sequence[int], wrong: Sequence[int]) -> list[int]:
        """Let ended rows go, and so many of each row's last tokens; gives the old row of each place."""
        gone = set(ended)
        groups = [
            [row for row in range(first, last) if row not in gone]
            for first, last, _ in groups_of_like_length(self._lengths)
        ]
        order = filled_from_the_end(groups)
        lengths = [length - count for length, count in zip(self._lengths, wrong, strict=True)]
        self._states.keep(order, lengths)
        self._lengths = [lengths[row] for row in order]
        return order

    def _read(self, spans: Sequence[_Span]) -> torch.Tensor:
        ids = torch.tensor([token for span in spans for token in span.ids])
        positions = torch.cat([torch.arange(span.behind, span.end) for span in spans])
        lasts = torch.tensor([len(span.ids) for span in spans]).cumsum(0) - 1
        return self._decoder(ids, positions, _Reading(self._states, spans), lasts)


def _spans(prompts: Sequence[list[int]]) -> Iterator[_Span]:
    """All prompts in spans that a pass can hold, so that long ones need no more memory.

    They come in the order of their tokens: what a prompt begins with as any one before it does, the last
    one does too.
    """
    last: int | None = None
    for row in sorted(range(len(prompts)), key=prompts.__getitem__):
        ids = prompts[row]
        shared = shared_beginning([prompts[last], ids]) if last is not None else 0
        for first in range(shared, len(ids), MOST_TOKENS):
            part = ids[first : first + MOST_TOKENS]
            yield _Span(row, part, first, last if first == shared else None)
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


class _Reading:
    """Attention of prompts: each row sees its own tokens, up to each one's place."""

    def __init__(self, states: RowStates, spans: Sequence[_Span]) -> None:
        ends = [0]
        for span in spans:
            ends.append(ends[-1] + len(span.ids))
        self._states = states
        self._parts = [
            (span, first, last, _seen_behind(span))
            for span, (first, last) in zip(spans, pairwise(ends), strict=True)
        ]

    def __call__(self, layer: int, new: _Heads, last: bool) -> torch.Tensor:
        mixed = []
        for span, first, end, mask in self._parts:
            seen = []
            for room, states in zip(self._states[layer], (new.keys, new.values), strict=True):
                row = room[span.row]  # (key heads, columns, size)
                if span.copied_from is not None:
                    row[:, : span.behind] = room[span.copied_from, :, : span.behind]
                row[:, span.behind : span.end] = states[first:end].transpose(0, 1)
                seen.append(row[None, :, : span.end])
            seen_keys, seen_values = seen
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
    return _added(torch.ones(count, span.end).triu(span.behind + 1).bool())


def _added(unseen: torch.Tensor) -> torch.Tensor:
    """What is added to scores, so that nothing unseen counts."""
    return torch.zeros(unseen.shape).masked_fill(unseen, -torch.inf)


class _Group(NamedTuple):
    """Rows of one new token each, or one row of several: they attend together."""

    rows: slice
    tokens: slice
    mask: torch.Tensor
    """What is added to scores, (rows, 1, queries of a key head or 1, columns)."""


class _Stepping:
    """Attention of new tokens of each row: rows of like length see the columns of the longest."""

    def __init__(
        self, states: RowStates, counts: Sequence[int], lengths: Sequence[int], queries_a_key: int
    ) -> None:
        """With the number of new tokens of each row, and the length that each row has with them."""
        self._states = states
        ends = torch.tensor(lengths)
        new = torch.tensor(counts)
        self._rows = torch.arange(len(counts)).repeat_interleave(new)
        firsts = new.cumsum(0) - new  # of the tokens of each row
        within = torch.arange(len(self._rows)) - firsts[self._rows]
        self.columns = (ends - new)[self._rows] + within
        self._groups = []
        done = 0
        for first, last, width in _groups_that_attend(counts, lengths):
            tokens = slice(done, done := done + sum(counts[first:last]))
            mask = _added(torch.arange(width) > self.columns[tokens, None])  # (tokens, columns)
            if counts[first] > 1:
                mask = mask.repeat_interleave(queries_a_key, 0)[None, None]
            else:
                mask = mask[:, None, None]
            self._groups.append(_Group(slice(first, last), tokens, mask))

    def __call__(self, layer: int, new: _Heads, last: bool) -> torch.Tensor:
        keys, values = self._states[layer]
        keys[self._rows, :, self.columns] = new.keys
        values[self._rows, :, self.columns] = new.values
        # Queries that share keys are as several tokens of one head.
        asking = new.queries.unflatten(1, (keys.shape[1], -1))  # (tokens, key heads, queries, size)
        mixed = []
        for rows, tokens, mask in self._groups:
            queries, width = asking[tokens], mask.shape[-1]
            several = len(queries) > mask.shape[0]
            if several:  # of one row
                queries = queries.transpose(0, 1).flatten(1, 2)[None]
            found = scaled_dot_product_attention(
                queries, keys[rows, :, :width], values[rows, :, :width], mask
            )  # (rows, key heads, queries, size)
            if several:
                found = found[0].unflatten(1, (-1, asking.shape[2])).transpose(0, 1)
            mixed.append(found)
        return torch.cat(mixed).flatten(1)


def _groups_that_attend(
    counts: Sequence[int], lengths: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Groups of rows of one new token each, and rows of several alone.

    Padding all rows of a group to the tokens of one would cost more than it saves.
    """
    first = 0
    for row, count in enumerate([*counts, 2]):
        if count > 1:
            if first < row:
                for begin, end, width in groups_of_like_length(lengths[first:row]):
                    yield first + begin, first + end, width
            if row < len(counts):
                yield row, row + 1, lengths[row]
            first = row + 1


def groups_of_like_length(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """First and last (exclusive) row, and greatest length, of groups with little padding."""
    groups = []
    first, width, padding = 0, lengths[0], 0
    for row, length in enumerate(lengths):
        wider = max(width, length)
        padded = padding + wider - length + (wider - width) * (row - first)
        if padded > PADDING_WORTH_A_GROUP:
            groups.append((first, row, width))
            first, wider, padded = row, length, 0
        width, padding = wider, padded
    return [*groups, (first, len(lengths), width)]

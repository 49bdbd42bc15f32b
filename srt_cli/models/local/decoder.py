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
    found = [batch.read(prompts, lambda: False), batch.step([[3], [4]])]
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
        places = [
            (row, column)
            for row, (behind, ids) in enumerate(zip(self._lengths, tokens, strict=True))
            for column in range(behind, behind + len(ids))
        ]
        self._lengths = [
            behind + len(ids) for behind, ids in zip(self._lengths, tokens, strict=True)
        ]
        self._states.reserve(max(self._lengths))
        attend = _Stepping(self._states, places, self._lengths, self._decoder.queries_a_key)
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
    """Rows of like length: their new tokens attend together."""

    rows: slice
    width: int
    tokens: slice
    within: tuple[torch.Tensor, torch.Tensor]
    """Of each token, its row in the group and its number in the row."""
    most: int
    """New tokens of a row."""
    mask: torch.Tensor


class _Stepping:
    """Attention of some new tokens a row: each sees its own row up to its place."""

    def __init__(
        self,
        states: RowStates,
        places: Sequence[tuple[int, int]],
        lengths: Sequence[int],
        queries_a_key: int,
    ) -> None:
        """With the row and column of each new token, and the lengths that rows have with them."""
        self._states = states
        self._rows, self.columns = torch.tensor(places).unbind(1)
        counts = torch.bincount(self._rows)
        ends = torch.tensor(lengths)
        begins = ends - counts
        self._groups = []
        done = 0
        for first, last, width in groups_of_like_length(lengths):
            tokens = slice(done, done := done + int(counts[first:last].sum()))
            rows, columns = self._rows[tokens], self.columns[tokens]
            most = int(counts[first:last].max())
            seen = begins[first:last, None] + torch.arange(1, most + 1)  # (rows, most)
            mask = _added(torch.arange(width) >= seen[..., None])
            if most > 1:
                mask = mask.repeat_interleave(queries_a_key, 1)
            within = rows - first, columns - begins[rows]
            self._groups.append(
                _Group(slice(first, last), width, tokens, within, most, mask[:, None])
            )

    def __call__(self, layer: int, new: _Heads, last: bool) -> torch.Tensor:
        keys, values = self._states[layer]
        keys[self._rows, :, self.columns] = new.keys
        values[self._rows, :, self.columns] = new.values
        # Queries that share keys are as several tokens of one head.
        asking = new.queries.unflatten(1, (keys.shape[1], -1))  # (tokens, key heads, queries, size)
        mixed = []
        for rows, width, tokens, within, most, mask in self._groups:
            queries = asking[tokens]
            if most > 1:
                several = queries.new_zeros(mask.shape[0], most, *queries.shape[1:])
                several[within] = queries
                queries = several.movedim(1, 2).flatten(2, 3)
            found = scaled_dot_product_attention(
                queries, keys[rows, :, :width], values[rows, :, :width], mask
            )  # (rows, key heads, most * queries, size)
            if most > 1:
                found = found.unflatten(2, (most, -1)).movedim(2, 1)[within]
            mixed.append(found)
        return torch.cat(mixed).flatten(1)


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

"""How continuous batching draws each row's tokens: logits processors that transformers' manager asks.

A row's temperature, top-p and noise are its own, by its seed and the token's position; the likeliest
tokens are kept on the way. transformers has no public place for processors of one's own, so
`Processors` knows whether it was really asked.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from srt_cli.models.local.rows import Generation
from srt_cli.models.local.sampling import gumbel_noise, keep_top_p

GREEDY: Final = 0
"""The key of a row that draws nothing."""


def features_of(row: Generation) -> frozenset[str]:
    """What the processors must be able to do for a row."""
    asked = row.request
    draws = {"draws"} if asked.temperature > 0 else set()
    draws |= {"top_p"} if draws and asked.top_p < 1 else set()
    return frozenset(draws | ({"tops"} if asked.top_logprobs else set()))


class Processors:
    """The processors that certain features need, in their order."""

    def __init__(self, features: frozenset[str], rows: dict[str, Generation]) -> None:
        """`rows` are those under way, by the name that the manager knows them by."""
        self.record = _Record(rows) if "tops" in features else None
        self._chain: list[_PerRow] = [self.record] if self.record is not None else []
        if "draws" in features:
            self._chain.append(_Temperature(rows))
            self._chain += [_TopP(rows)] if "top_p" in features else []
            self._chain.append(_Noise(rows))

    def for_manager(self) -> ContinuousBatchingLogitsProcessorList:
        """In the form that a manager takes."""
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList(self._chain))
        processors.tensors_required = len(self._chain)
        return processors

    @property
    def were_asked(self) -> bool:
        """Whether tokens so far went through all of them; else they were drawn in another way."""
        return all(part.prepared and part.applied for part in self._chain)


class _PerRow(ContinuousBatchingLogitsProcessor):
    """A processor with one 32-bit argument a row, read from the rows under way."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012  as transformers declares it
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, rows: dict[str, Generation]) -> None:
        self.rows = rows
        self.prepared = self.applied = False
        """Whether transformers has asked it; if not, replies would silently be drawn otherwise."""

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        self.prepared = True
        return self.arguments(requests_with_new_token)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        self.applied = True
        return self.change(scores, tensor_arg[: scores.shape[0]])

    def arguments(self, requests: Sequence[Any]) -> torch.Tensor:
        """Each request's argument, as 32 bits."""
        raise NotImplementedError

    def change(self, scores: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
        """The scores (rows, vocabulary) as they should be."""
        raise NotImplementedError

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """What stands where no row is: the bits of 1.0."""
        int32_tensor.copy_(torch.ones_like(int32_tensor, dtype=torch.float32).view(torch.int32))

    def rows_of(self, requests: Sequence[Any]) -> list[tuple[Generation | None, int]]:
        """Each request's row, and the position that its next token will have."""
        return [
            (self.rows.get(request.state.request_id), request.state.position_offset)
            for request in requests
        ]


class _Record(_PerRow):
    """Keeps the likeliest tokens before any draw; needs a loop without graphs and look-ahead."""

    def __init__(self, rows: dict[str, Generation]) -> None:
        super().__init__(rows)
        self.tops: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._wanting: list[tuple[int, str, int]] = []
        self._most = 1

    def arguments(self, requests: Sequence[Any]) -> torch.Tensor:
        self._wanting = []
        for place, (row, position) in enumerate(self.rows_of(requests)):
            if row is not None and row.request.top_logprobs:
                name = requests[place].state.request_id
                self._wanting.append((place, name, position - len(row.prompt_ids)))
                self._most = max(self._most, row.request.top_logprobs)
        return torch.zeros(len(requests), dtype=torch.int32)

    def change(self, scores: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
        if self._wanting:
            places = [place for place, _, _ in self._wanting]
            values, ids = scores[places].float().log_softmax(-1).topk(self._most)
            kept = zip(self._wanting, values.cpu(), ids.cpu(), strict=True)
            for (_, name, token), value, likely in kept:
                self.tops[name, token] = value, likely
        return scores

    def take(self, name: str, row: Generation, token: int) -> tuple[list[float], list[int]] | None:
        """What was kept for a row's next token, if the row wants it."""
        kept = self.tops.pop((name, len(row.tokens)), None)
        if kept is None or not row.wants_top(token):
            return None
        count = row.request.top_logprobs
        return kept[0][:count].tolist(), kept[1][:count].tolist()


class _Temperature(_PerRow):
    def arguments(self, requests: Sequence[Any]) -> torch.Tensor:
        asked = [row and row.request.temperature for row, _ in self.rows_of(requests)]
        return torch.tensor([value or 1.0 for value in asked]).view(torch.int32)

    def change(self, scores: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
        return scores / arguments.view(torch.float32)[:, None]


class _TopP(_PerRow):
    def arguments(self, requests: Sequence[Any]) -> torch.Tensor:
        asked = [row.request.top_p if row else 1.0 for row, _ in self.rows_of(requests)]
        return torch.tensor(asked).view(torch.int32)

    def change(self, scores: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
        return keep_top_p(scores, arguments.view(torch.float32)[:, None])


class _Noise(_PerRow):
    def arguments(self, requests: Sequence[Any]) -> torch.Tensor:
        keys = []
        for row, position in self.rows_of(requests):
            draws = row is not None and row.request.temperature > 0
            keys.append(row.key_at(position) if row is not None and draws else GREEDY)
        return torch.tensor(keys, dtype=torch.int64).to(torch.int32)  # the low 32 bits

    def change(self, scores: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
        keys = arguments.to(torch.int64)
        noise = gumbel_noise(keys, scores.shape[-1])
        return torch.where((keys != GREEDY)[:, None], scores + noise, scores)

"""Per-row sampling and stopping for transformers' `generate`: no row depends on its company."""

import threading
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

TAIL_TOKENS = 24


class GumbelDraw(LogitsProcessor):
    """Sample by arg-max: argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T).

    Each row has its own generator, so its noise is the same in any batch. Rows with temperature 0
    stay greedy. `top_p` keeps the smallest set of tokens whose probability reaches it.
    """

    def __init__(
        self, temperatures: Sequence[float], top_ps: Sequence[float], seeds: Sequence[int]
    ) -> None:
        self._temperatures = temperatures
        self._top_ps = top_ps
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits to noisy logits; (rows, vocabulary) both."""
        if not any(self._temperatures):
            return scores
        scores = scores.float().clone()
        for row, temperature in enumerate(self._temperatures):
            if temperature > 0:
                logits = scores[row] / temperature  # (vocabulary,)
                if self._top_ps[row] < 1:
                    logits = _keep_top_p(logits, self._top_ps[row])
                uniform = torch.rand(logits.shape, generator=self._generators[row])
                noise = -torch.log(-torch.log(uniform.clamp_min(1e-20)))
                scores[row] = logits + noise.to(logits.device)
        return scores


def _keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, order = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter(0, order, ordered)


class StopTexts(StoppingCriteria):
    """Ends a row once one of its stop texts stands at the end of what it wrote."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[tuple[str, ...]],
        prompt_width: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._prompt_width = prompt_width
        self._done = torch.zeros(len(stops), dtype=torch.bool)

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """Which rows are done; (rows,)."""
        start = max(self._prompt_width, input_ids.shape[1] - TAIL_TOKENS)
        tails = input_ids[:, start:].tolist()
        for row, stops in enumerate(self._stops):
            if stops and not self._done[row]:
                text = str(self._tokenizer.decode(tails[row]))
                self._done[row] = any(stop in text for stop in stops)
        return self._done.to(input_ids.device)


class Cancelled(StoppingCriteria):
    """Ends every row at the next token once the run is stopped."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        """Which rows are done: all or none; (rows,)."""
        rows = input_ids.shape[0]
        return torch.full((rows,), self._event.is_set(), device=input_ids.device)

"""One request on its way through an engine: its tokens so far, and why it ends.

Both engines, static and continuous, hand each new token to `Generation.take`, so that stop texts,
limits, loops and log-probabilities are the same in both.
"""

import hashlib
import inspect
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

from srt_cli.models import (
    VERDICTS,
    FinishReason,
    Reply,
    Request,
    Thinking,
    TokenLogprobs,
    is_loop,
    part_reply,
)
from srt_cli.models.local.lookup import Lookup
from srt_cli.models.local.sampling import Draw, draw_key
from srt_cli.reading import marks_of_thoughts, opened_by
from srt_cli.records import Usage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from srt_cli.models.chat import ChatFormat
    from srt_cli.models.local.decoder import Decoder

CHECK_LOOP_EVERY: Final = 16
PROMPT_END: Final = 16
"""Tokens in which a tag that opens thoughts stands at a prompt's end."""


@dataclass
class Loaded:
    """A model in memory, and what an engine must know of it."""

    model: "PreTrainedModel"
    chat: "ChatFormat"
    end_ids: frozenset[int]
    max_positions: int
    placement: dict[str, str]
    decoder: "Decoder | None" = None
    """What computes it in place of its own forward."""
    _chats: dict[Thinking, "ChatFormat"] = field(default_factory=dict)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The one that the chats are written with."""
        return self.chat.tokenizer

    @property
    def device(self) -> str:
        """Where it computes: cpu, cuda, mps."""
        return self.placement["device"]

    def chat_for(self, thinking: Thinking) -> "ChatFormat":
        """How it writes chats when it is told to think, or not to."""
        if thinking not in self._chats:
            self._chats[thinking] = replace(self.chat, thinking=thinking)
        return self._chats[thinking]

    def text_of(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without control tokens but those that tell thoughts and answer apart."""
        if self.marks.keys().isdisjoint(tokens):
            return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        special = self.tokenizer.added_tokens_decoder
        kept = [
            token
            for token in tokens
            if token in self.marks or token not in special or not special[token].special
        ]
        return str(self.tokenizer.decode(kept))

    @cached_property
    def marks(self) -> dict[int, str]:
        """Control tokens that stand around thoughts, and their texts."""
        added = self.tokenizer.added_tokens_decoder
        marks = marks_of_thoughts(str(token) for token in added.values())
        return {
            place: str(token)
            for place, token in added.items()
            if token.special and str(token) in marks
        }

    def without_marks(self, text: str) -> str:
        """What a model wrote, when marks that tell nothing apart are taken out."""
        for mark in self.marks.values():
            text = text.replace(mark, "")
        return text

    @cached_property
    def cache_name(self) -> str:
        """What the model's forward calls its cache: `cache` from transformers 5.24 on."""
        names = inspect.signature(self.model.forward).parameters
        return "cache" if "cache" in names else "past_key_values"

    @cached_property
    def digits(self) -> frozenset[int]:
        """Tokens that hold a digit: where a score may stand."""
        pieces = self.tokenizer.get_vocab()
        return frozenset(
            token
            for piece, token in pieces.items()
            if any("0" <= character <= "9" for character in piece)
        )

    @cached_property
    def verdicts(self) -> frozenset[int]:
        """Tokens that say yes or no: where an item of a checklist ends."""
        words = (":" + sign + word for sign in (" ", "") for word in VERDICTS)
        spelled = (self.tokenizer.encode(word, add_special_tokens=False) for word in words)
        return frozenset(tokens[-1] for tokens in spelled)


@dataclass
class Generation:
    """A request, its future, and what has been written for it."""

    request: Request
    future: Future[Reply]
    answered: bool
    prompt_ids: list[int]
    loaded: Loaded
    tokens: list[int] = field(default_factory=list)
    tops: dict[int, tuple[list[float], list[int]]] = field(default_factory=dict)
    """Log-probabilities and ids of the likeliest tokens, by place in `tokens`."""
    finish: FinishReason | None = None
    _lookup: Lookup | None = None

    @cached_property
    def seed(self) -> int:
        """The row's own: of its content and sample, never of its place or company."""
        content = "\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in self.request.messages)
        text = f"{self.request.seed}|{self.request.sample}|{content}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())

    @property
    def limit(self) -> int:
        """The most tokens it may write: as asked, within the model's positions."""
        room = self.loaded.max_positions - len(self.prompt_ids)
        return min(self.request.max_tokens, room)

    @cached_property
    def _tail_tokens(self) -> int:
        # A token is at least a byte, so a stop text never stands in more tokens than it has bytes.
        return max((len(stop.encode()) for stop in self.request.stop), default=0) + 1

    def draw(self, ahead: int = 0) -> Draw:
        """How the token is drawn that is so many places behind its next one."""
        asked = self.request
        position = len(self.prompt_ids) + len(self.tokens) + ahead
        key = self.key_at(position) if asked.temperature > 0 else 0
        return Draw(asked.temperature, asked.top_p, key)

    def guess(self, most: int) -> list[int]:
        """How it may go on, so many tokens at most; behind them it may write one more."""
        most = min(most, self.limit - len(self.tokens) - 1)
        if most < 1:
            return []
        if self._lookup is None:
            self._lookup = Lookup([*self.prompt_ids, *self.tokens])
        return self._lookup.guess(most)

    def learn(self, guessed: int, right: int) -> None:
        """Take note how many tokens of its last guess were right."""
        if self._lookup is not None and guessed:
            self._lookup.learn(guessed, right)

    def key_at(self, position: int) -> int:
        """The draw's key for the token at a position of prompt and reply; never 0."""
        return draw_key(self.seed, position) or 1

    def wants_top(self, token: int) -> bool:
        """Whether the likeliest tokens beside this next one are to be kept."""
        if not self.request.top_logprobs:
            return False
        if self.request.logprobs_at == "all":
            return True
        if self.request.logprobs_at == "verdicts":
            return token in self.loaded.verdicts
        # Also the place behind a digit: the 1 of a 10 is a token of its own in many tokenizers.
        digits = self.loaded.digits
        return token in digits or bool(self.tokens and self.tokens[-1] in digits)

    def take(self, token: int, top: tuple[list[float], list[int]] | None = None) -> bool:
        """Append the next token; true when the row ends with it."""
        if top is not None:
            self.tops[len(self.tokens)] = top
        self.tokens.append(token)
        if self._lookup is not None:
            self._lookup.add(token)
        if token in self.loaded.end_ids or (self.request.stop and self._stops()):
            self.finish = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish = "length"
        elif len(self.tokens) % CHECK_LOOP_EVERY == 0 and is_loop(self.tokens):
            self.finish = "loop"
        return self.finish is not None

    def start_again(self) -> None:
        """Forget what was written: the batch did not fit."""
        self.tokens.clear()
        self.tops.clear()
        self.finish = None
        self._lookup = None

    def _stops(self) -> bool:
        tail = str(self.loaded.tokenizer.decode(self.tokens[-self._tail_tokens :]))
        if not any(stop in tail for stop in self.request.stop):
            return False
        answer = self._parted(Reply(self.loaded.text_of(self.tokens), "stop")).text
        return any(stop in answer for stop in self.request.stop)

    @cached_property
    def _opening(self) -> str:
        """The tag with which the prompt has opened the model's thoughts."""
        end = self.loaded.tokenizer.decode(self.prompt_ids[-PROMPT_END:])
        return "" if self.request.continues else opened_by(str(end))

    def _parted(self, reply: Reply) -> Reply:
        return reply if self.request.continues else part_reply(reply, self._opening)

    def reply(self) -> Reply:
        """What the row came to; a stop text is cut off."""
        assert self.finish is not None
        kept = self.tokens
        if kept and kept[-1] in self.loaded.end_ids:
            kept = kept[:-1]
        reply = self._parted(
            Reply(
                text=self.loaded.text_of(kept),
                finish_reason=self.finish,
                usage=Usage(prompt_tokens=len(self.prompt_ids), completion_tokens=len(self.tokens)),
                logprobs=self._logprobs(len(kept)),
            )
        )
        text = self.loaded.without_marks(reply.text)
        stops = [place for stop in self.request.stop if (place := text.find(stop)) >= 0]
        return replace(
            reply,
            text=text[: min(stops)] if stops else text,
            finish_reason="stop" if stops else self.finish,
        )

    def _logprobs(self, count: int) -> tuple[TokenLogprobs, ...]:
        decode = self.loaded.tokenizer.decode
        found = []
        for place, (values, ids) in sorted(self.tops.items()):
            if place >= count:
                continue
            top: dict[str, float] = {}
            for token, value in zip(ids, values, strict=True):
                top.setdefault(str(decode([token])), value)
            offset = len(self.loaded.text_of(self.tokens[:place]))
            found.append(TokenLogprobs(str(decode([self.tokens[place]])), top, offset))
        return tuple(found)


def keep_tops(logits: "torch.Tensor", wanting: Sequence[tuple[int, Generation, int]]) -> None:
    """Note the likeliest tokens, before any draw, where rows want them.

    Of logits (tokens, vocabulary): the place there, the row, and the place in the row's reply.
    """
    if not wanting:
        return
    most = max(row.request.top_logprobs for _, row, _ in wanting)
    likely = logits[[place for place, _, _ in wanting]].float().log_softmax(-1)
    values, ids = likely.topk(min(most, logits.shape[-1]))
    for (_, row, place), some, tokens in zip(wanting, values.tolist(), ids.tolist(), strict=True):
        count = row.request.top_logprobs
        row.tops[place] = some[:count], tokens[:count]

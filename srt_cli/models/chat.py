"""Chats as token ids, one way for all: what a model is fed, and what it would have to say.

A turn is what the template's generation prompt feeds, the text, and the end of the turn. Drafting,
self-critique, sft, dpo and eval take their ids from here. No text becomes a control token.
"""

import ctypes
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import count, pairwise
from typing import Any, Final, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from srt_cli.errors import SrtError
from srt_cli.models import Thinking
from srt_cli.reading import ANALYSIS, THOUGHT_TAGS
from srt_cli.records import Message

# Private-use characters stand in for control-token text while the template is rendered.
FIRST_STAND_IN: Final = 0xF0000
MARKER: Final = "the last word"
QUESTION: Final = Message(role="user", content="What is 2 + 2?")
PROBE: Final = (
    Message(role="user", content="What is 2 + 2?\n"),
    Message(role="assistant", content=" It is 4."),
    Message(role="user", content="Why?"),
)
SECONDS: Final = 10.0
"""A template that takes longer over one chat will not come to an end."""
LOOK_EVERY: Final = 0.1
LONGEST_FRAME: Final = 1_000_000
"""Characters that a template may write around the texts."""
SWITCHES: Final = ("enable_thinking", "thinking")
"""The variables by which templates are told whether to think."""
EFFORT: Final = "reasoning_effort"
"""The variable by which templates are told how hard to think."""
EFFORTS: Final[tuple[Mapping[str, str], ...]] = ({}, {EFFORT: "low"}, {EFFORT: "medium"})
_SWITCH: Final = re.compile(rf"(?<![\w.'\"])({'|'.join(SWITCHES)})\b(?!['\"])")
_DATE: Final = re.compile(r"\bstrftime_now\((['\"])(.*?)\1\)")
_COMMENT: Final = re.compile(r"\{#.*?#\}", re.DOTALL)

THOUGHTS: Final = (*THOUGHT_TAGS.items(), ANALYSIS)
"""What thoughts stand between, by model family."""
_MARKUP: Final = re.compile(r"[<\[|].*[>\]|]", re.DOTALL)


class UnfitChat(SrtError):
    """A chat that the model's template does not take; the message says why, in its own words."""


@dataclass(frozen=True)
class Turn:
    """A turn of the model's as it is generated, in token ids."""

    prompt: list[int]
    """What stands before it: the chat so far, the turn's header, an empty thought if there is one."""
    said: list[int]
    """What it has to say: the text, what its template writes around it, and the end of the turn."""
    after: list[int]
    """What the template writes behind a last turn."""

    @property
    def ids(self) -> list[int]:
        """What the model has read and written when the turn is over."""
        return self.prompt + self.said

    @property
    def place(self) -> range:
        """Where in `ids` the turn's own tokens stand."""
        return range(len(self.prompt), len(self.prompt) + len(self.said))


@dataclass(frozen=True)
class _Form:
    """What a template writes around the words of an assistant's last turn."""

    header: str
    """What its generation prompt leaves out, where it writes none."""
    no_thought: str
    """What makes an empty thought of the generation prompt's end; often the prompt holds it itself."""
    lead: str
    """What the model itself says before the words."""
    close: str
    """From behind the words to the end-of-turn token."""
    after: str
    end_id: int
    trims: bool
    """Whether it takes away white space around the words."""


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """How one model writes chats: its tokenizer, its template, and whether it is told to think.

    Raises `SrtError` where the template is of no use, `UnfitChat` for a chat that it does not take.
    """

    tokenizer: PreTrainedTokenizerBase
    thinking: Thinking = "off"
    day: datetime | None = None
    """The date that the template writes, if it writes one; None for today's."""
    effort: str | None = None
    """How hard the model is told to think, where the template has a variable for it."""

    def prompt_ids(self, history: Sequence[Message]) -> list[int]:
        """What the model is fed to answer `history`.

        Equals `apply_chat_template(tokenize=True, add_generation_prompt=True)` wherever no content
        holds a control token's text, the template writes a header, and no thought is left open that
        should not be.
        """
        form = self._form
        no_thought = form.no_thought if self.thinking == "off" else ""
        return self._encode(history, form.header + no_thought)

    def turn(self, history: Sequence[Message], text: str, thoughts: str = "") -> Turn:
        """The turn that answers `history` with `text`, behind an empty thought or behind `thoughts`."""
        if thoughts:
            return self._thinker._thinking_turn(history, text, thoughts)
        form = self._form
        words = text.strip() if form.trims else text
        fed = form.header + form.no_thought
        prompt = self._encode(history, fed)
        whole = self._encode(history, fed + form.lead, words, form.close + form.after)
        if whole[: len(prompt)] != prompt:
            # The border falls into a token; what is generated begins with a token of its own.
            whole = prompt + self._encode(None, form.lead, words, form.close + form.after)
        end = whole.index(form.end_id, len(prompt)) + 1
        return Turn(prompt, whole[len(prompt) : end], whole[end:])

    @cached_property
    def _thinker(self) -> "ChatFormat":
        return replace(self, thinking="on")

    def _thinking_turn(self, history: Sequence[Message], text: str, thoughts: str) -> Turn:
        form, tags = self._form, self._thought_tags
        if tags is None:
            raise UnfitChat("the chat template has no place for thoughts")
        opening, closing = tags
        if tags != ANALYSIS:
            opening = f"{opening}\n"
            closing = closing if "channel" in closing else f"\n{closing}\n\n"
        if self._prompt_text(history).rstrip().endswith(opening.strip()):
            opening = ""  # the prompt has opened them
        words = text.strip() if form.trims else text
        prompt = self._encode(history, form.header)
        said = (thoughts.strip(), closing + form.lead, words, form.close + form.after)
        whole = self._encode(history, form.header + opening, *said)
        if whole[: len(prompt)] != prompt:
            whole = prompt + self._encode(None, opening, *said)
        end = whole.index(form.end_id, len(prompt)) + 1
        return Turn(prompt, whole[len(prompt) : end], whole[end:])

    @cached_property
    def _thought_tags(self) -> tuple[str, str] | None:
        """What the template puts around thoughts; None where it knows none."""
        known = (pair for pair in THOUGHTS if pair[1].split("<|start|>")[0] in self.template)
        return next((pair for pair in known if pair[0] in self.template), None)

    @property
    def holds_thoughts(self) -> bool:
        """Whether a turn can hold what its model thought."""
        return self._thought_tags is not None

    def check(self) -> None:
        """Raise `SrtError` where the template is of no use for training and generation."""
        assert self._form

    @property
    def end_id(self) -> int:
        """The token that ends a turn of the model's."""
        return self._form.end_id

    @cached_property
    def template(self) -> str:
        """The chat template; raises `SrtError` when there is none, or several without a default."""
        given: str | Mapping[str, str] | None = self.tokenizer.chat_template
        if isinstance(given, Mapping):
            if "default" not in given:
                raise SrtError(
                    f"{self._name}: the model has the chat templates {', '.join(sorted(given))} and "
                    "no default. Pass one of these names with --chat-template."
                )
            return given["default"]
        if not given:
            raise SrtError(
                f"{self._name}: the model has no chat template. Pass --chat-template with a .jinja "
                "file or the name of a template that TRL ships, such as qwen2_5, or use an instruct "
                "model."
            )
        return str(given)

    @cached_property
    def switch(self) -> str | None:
        """The template's variable that turns thinking on and off; None where it has none."""
        named = _SWITCH.search(_COMMENT.sub("", self.template))
        if named is None:
            return None
        told = {self._try([QUESTION], True, switched={named[1]: on}) for on in (True, False)}
        return named[1] if len(told) == 2 else None

    @cached_property
    def takes_effort(self) -> bool:
        """Whether the template has a variable for how hard to think, and writes what it holds."""
        if EFFORT not in _COMMENT.sub("", self.template):
            return False
        try:
            told = {self._try([QUESTION], True, switched=each) for each in EFFORTS}
        except UnfitChat:
            return True  # it knows other words
        return len(told) > 1

    @property
    def writes_date(self) -> bool:
        """Whether the ids depend on the day."""
        return "strftime_now" in _COMMENT.sub("", self.template)

    @property
    def can_be_told(self) -> bool:
        """Whether `thinking` has an effect: by the template's variable, or by an empty thought."""
        return self.switch is not None or bool(self._form.no_thought)

    # --- What the template writes ----------------------------------------------------------------

    @property
    def _name(self) -> str:
        return str(self.tokenizer.name_or_path)

    @cached_property
    def _dated_template(self) -> str:
        if self.day is None:
            return self.template
        written = {each[0]: self.day.strftime(each[2]) for each in _DATE.finditer(self.template)}
        return _DATE.sub(lambda each: json.dumps(written[each[0]]), self.template)

    @cached_property
    def _variables(self) -> dict[str, Any]:
        variables: dict[str, Any] = {}
        if self.thinking != "auto" and self.switch is not None:
            variables[self.switch] = self.thinking == "on"
        if self.effort is not None and self.takes_effort:
            variables[EFFORT] = self.effort
        return variables

    def _render(
        self,
        messages: Sequence[Message],
        ask: bool,
        parts: bool,
        variables: Mapping[str, Any],
    ) -> str:
        plain: list[dict[str, Any]] = [
            {
                "role": turn.role,
                "content": [{"type": "text", "text": turn.content}] if parts else turn.content,
            }
            for turn in messages
        ]
        # As `apply_chat_template` does it, piece by piece, so that an endless one is given up.
        pieces = _compile_jinja_template(self._dated_template).generate(
            messages=plain, tools=None, documents=None, add_generation_prompt=ask,
            **self.tokenizer.special_tokens_map, **variables,
        )  # fmt: skip
        most = LONGEST_FRAME + 2 * sum(len(turn.content) for turn in messages)
        written: list[str] = []
        for piece in pieces:
            written.append(piece)
            most -= len(piece)
            if most < 0:
                raise UnfitChat(f"the chat template writes more than {LONGEST_FRAME} characters")
        return "".join(written)

    def _try(
        self,
        messages: Sequence[Message],
        ask: bool,
        parts: bool | None = None,
        switched: Mapping[str, Any] | None = None,
    ) -> str:
        """Render; whatever a template may raise is an `UnfitChat` with its words."""
        parts = self._takes_parts if parts is None else parts
        variables = self._variables if switched is None else switched
        try:
            with _WATCH.over(SECONDS):
                return self._render(messages, ask, parts, variables)
        except jinja2.TemplateSyntaxError as error:
            raise SrtError(
                f"{self._name}: its chat template is broken, line {error.lineno}: "
                f"{(error.message or '').rstrip('.')}. Pass another with --chat-template."
            ) from error
        except SrtError:
            raise
        except _TooSlow:
            raise UnfitChat(
                f"the chat template does not come to an end in {SECONDS:g} seconds"
            ) from None
        except Exception as error:  # a template is a program of somebody else's
            words = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UnfitChat(f"the chat template says: {words.rstrip('.')}") from error

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether contents must be lists of parts, as templates of models that see pictures want."""
        asked = Message(role="user", content=MARKER)
        failures = []
        for parts in (False, True):
            try:
                rendered = self._try([asked], True, parts, {})
            except UnfitChat as error:
                failures.append(str(error))
                continue
            if MARKER in rendered:
                return parts
        why = f"({failures[0]})" if failures else "(it leaves the question out)"
        raise SrtError(
            f"{self._name}: its chat template takes not even a plain question {why}. Pass another with "
            "--chat-template."
        )

    @cached_property
    def _form(self) -> _Form:
        asked = [QUESTION]
        answered = [*asked, Message(role="assistant", content=MARKER)]
        spaced = [*asked, Message(role="assistant", content=f" {MARKER} ")]
        try:
            prompt = self._try(asked, True)
            silent = self._try(asked, False)
            whole = self._try(answered, False)
            trims = f" {MARKER} " not in self._try(spaced, False)
        except UnfitChat as error:
            raise SrtError(
                f"{self._name}: {error}, of a plain question and answer. Pass another with "
                "--chat-template."
            ) from error
        before, found, behind = whole.rpartition(MARKER)
        if not found:
            raise SrtError(
                f"{self._name}: its chat template leaves an assistant's answer out. Pass another "
                "with --chat-template."
            )
        header, no_thought, lead = _before_the_words(prompt, before, headless=prompt == silent)
        earlier = self._behind_an_earlier_turn(answered)
        token = self._first_control(behind)
        if token is None:
            # The next role's token may end it, which the last turn of a chat lacks.
            token = self._first_control(earlier)
            behind = earlier.partition(token)[0] + token if token is not None else behind
        if token is None:
            raise SrtError(
                f"{self._name}: its chat template ends an assistant's turn with no token of the "
                f"model's own ({behind.strip()[:40]!r}), so the model would not learn to stop. Pass "
                "a --chat-template that does."
            )
        close = behind.partition(token)[0] + token
        eos = str(self.tokenizer.eos_token)
        if behind.startswith(close + eos) and earlier.startswith(close + eos):
            token, close = eos, close + eos  # a text is closed, and then the turn
        end_id = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(end_id, int)
        after = behind.removeprefix(close)
        return _Form(header, no_thought, lead, close, after, end_id, trims)

    def _behind_an_earlier_turn(self, answered: list[Message]) -> str:
        """What follows an answer when the chat goes on: it may end by the next role's token."""
        try:
            going_on = self._try([*answered, Message(role="user", content="Why?")], False)
        except UnfitChat:
            return ""
        return going_on.rpartition(MARKER)[2].partition("Why?")[0]

    def _first_control(self, text: str) -> str | None:
        found = re.search(_any_of(self._tokens), text) if self._tokens else None
        return found[0] if found else None

    # --- From text to ids, without forged control tokens -----------------------------------------

    def _encode(self, history: Sequence[Message] | None, before: str, *framed: str) -> list[int]:
        """Ids of the generation prompt for `history` (None: of nothing), and of what follows it.

        `framed` holds words and what the template writes behind them, by turns.
        """
        texts = [*(turn.content for turn in history or ()), *framed[::2]]
        stand_ins: dict[str, str] = {}
        if self._writes_control(texts):
            self._refuse_if_forged()
            stand_ins = _stand_ins(self._hidden, texts)
        prompt = "" if history is None else self._prompt_text(_in_disguise(history, stand_ins))
        rendered = prompt + before
        for place, piece in enumerate(framed):
            rendered += piece if place % 2 else _replace(piece, stand_ins)
        if stand_ins:
            return self._in_pieces(rendered, stand_ins)
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _writes_control(self, texts: Sequence[str]) -> bool:
        hidden, normalise = self._hidden, self._normalise
        if normalise is not None:
            texts = [*texts, *map(normalise, texts)]
            hidden = _longest_first({*hidden, *map(normalise, hidden)})
        return any(each in text for text in texts for each in hidden)

    @cached_property
    def _normalise(self) -> Callable[[str], str] | None:
        """What becomes of a text before tokens are found in it; None where they are found as written."""
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        added = self.tokenizer.added_tokens_decoder.values()
        if normalizer is None or not any(each.normalized for each in added):
            return None
        return cast(Callable[[str], str], normalizer.normalize_str)

    def _prompt_text(self, history: Sequence[Message]) -> str:
        rendered = self._try(history, True)
        for turn in history:
            if turn.role != "assistant" and turn.content.strip() not in rendered:
                raise UnfitChat(f"the chat template leaves the {turn.role} turn out")
        return rendered

    def _refuse_if_forged(self) -> None:
        if not self._pieces_equal_whole:
            raise SrtError(
                "a text holds a control token of the model, and this tokenizer cannot encode it as "
                "plain text. Remove such texts, or use a model with a fast tokenizer."
            )

    def _in_pieces(self, rendered: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Split the chat at the template's own control tokens; tokenise the rest as plain text."""
        shown = {stand_in: hidden for hidden, stand_in in stand_ins.items()}
        ids: list[int] = []
        pieces = re.split(f"({_any_of(self._tokens)})", rendered)
        for place, piece in enumerate(pieces):
            if place % 2:
                token = self.tokenizer.convert_tokens_to_ids(piece)
                assert isinstance(token, int)
                ids.append(token)
                continue
            if place > 0 and self._strips(pieces[place - 1], "rstrip"):
                piece = piece.lstrip()
            if place + 1 < len(pieces) and self._strips(pieces[place + 1], "lstrip"):
                piece = piece.rstrip()
            ids += self._as_plain_text(piece, shown)
        return ids

    def _as_plain_text(self, piece: str, shown: Mapping[str, str]) -> list[int]:
        """A token that is added but not special is cut in two, so that no tokenizer finds it."""
        text = _replace(piece, shown)
        # Where each begins, also within another: every one is cut behind its first character.
        begins = re.finditer(f"(?={_any_of(self._not_special)})", text) if self._not_special else ()
        cuts = [0, *(found.start() + 1 for found in begins), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        return [token for part in parts if part for token in self._uncontrolled(part)]

    def _uncontrolled(self, part: str) -> list[int]:
        """Halved until no token that is found in normalised text alone (`＜a＞` is `<a>`) is left."""
        ids: list[int] = self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        middle = len(part) // 2
        if self._normalise is None or not middle or self._added_ids.isdisjoint(ids):
            return ids
        return self._uncontrolled(part[:middle]) + self._uncontrolled(part[middle:])

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(number for number, each in added if str(each) in self._not_special)

    def _strips(self, token: str, side: str) -> bool:
        added = next(
            (each for each in self.tokenizer.added_tokens_decoder.values() if str(each) == token),
            None,
        )
        return bool(getattr(added, side, False))

    @cached_property
    def _pieces_equal_whole(self) -> bool:
        text = self._prompt_text(PROBE)
        whole = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        forged = any(
            self.tokenizer.convert_tokens_to_ids(token) in self._as_plain_text(token, {})
            for token in self._tokens[:16]
        )
        return not forged and whole == self._in_pieces(text, {})

    @cached_property
    def _tokens(self) -> tuple[str, ...]:
        """Every text that the tokenizer reads as one control token, the longest first.

        That is every special token, and each added one that the template writes or that looks like
        markup (but no run of spaces).
        """
        texts = set(self.tokenizer.all_special_tokens)
        texts |= {
            str(each) for each in self.tokenizer.added_tokens_decoder.values() if each.special
        }
        return _longest_first(texts | set(self._not_special))

    @cached_property
    def _not_special(self) -> tuple[str, ...]:
        added = {
            str(each) for each in self.tokenizer.added_tokens_decoder.values() if not each.special
        }
        named, template = set(self.tokenizer.all_special_tokens), self.template
        return _longest_first(
            text
            for text in added
            if len(text) > 1
            and text.strip()
            and (text in named or text in template or _MARKUP.fullmatch(text))
        )

    @cached_property
    def _hidden(self) -> tuple[str, ...]:
        """What the template must not see in a text: control tokens, and the tags of its thoughts."""
        tags = {tag for pair in THOUGHTS for tag in pair if tag in self.template}
        return _longest_first(tags | set(self._tokens))


def _before_the_words(prompt: str, before: str, *, headless: bool) -> tuple[str, str, str]:
    """What stands between the generation prompt and the words: header, end of an empty thought, lead.

    `before` is the template's text before the words of a last turn. The header is there where the
    template writes none for a generation (`headless`); the lead is said by the model itself.
    """
    pairs = zip(prompt, before, strict=False)
    length = next(
        (place for place, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(before))
    )
    shared = prompt[:length]
    if len(shared) < len(prompt) and shared.rfind("<") > shared.rfind(">"):
        shared = shared[: shared.rfind("<")]  # a whole tag differs
    opened, rest = prompt[len(shared) :], before[len(shared) :]
    if headless:
        return (rest, "", "") if rest.strip() else ("", "", rest)
    for tag, end in THOUGHTS:
        if end in rest:
            head, _, tail = rest.rpartition(end)
            words = tail.lstrip()
            gap = tail[: len(tail) - len(words)] if words or "\n\n" in tail else ""
            return "", head + end + gap, tail[len(gap) :]
        if tag in opened and end not in opened:
            return "", f"\n{end}\n\n", rest
    return "", "", rest


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the template puts right behind an assistant's words.

    Raises `SrtError` when there is none: a model trained so would never stop.
    """
    return ChatFormat(tokenizer).end_id


class _TooSlow(Exception):
    pass


class _Watch:
    """Ends what takes too long, in whatever thread it runs, by raising `_TooSlow` there.

    One thread looks at all of them, and ends when there is none: a render takes less time than it
    takes to start one.
    """

    def __init__(self) -> None:
        self._until: dict[int, float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, seconds: float) -> Iterator[None]:
        me = threading.get_ident()
        with self._lock:
            self._until[me] = time.monotonic() + seconds
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                if self._until.pop(me, None) is None:
                    _raise_in(me, None)  # it has ended by itself meanwhile

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_EVERY)
            with self._lock:
                now = time.monotonic()
                for thread in [each for each, until in self._until.items() if until < now]:
                    del self._until[thread]
                    _raise_in(thread, _TooSlow)
                if not self._until:
                    self._thread = None
                    return


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(error) if error is not None else None
    )


_WATCH: Final = _Watch()


def _stand_ins(hidden: Sequence[str], texts: Sequence[str]) -> dict[str, str]:
    written = {character for text in texts for character in text}
    free = (chr(code) for code in count(FIRST_STAND_IN) if chr(code) not in written)
    return dict(zip(hidden, free, strict=False))


def _in_disguise(messages: Sequence[Message], stand_ins: Mapping[str, str]) -> list[Message]:
    return [Message(role=turn.role, content=_replace(turn.content, stand_ins)) for turn in messages]


def _replace(text: str, replacements: Mapping[str, str]) -> str:
    if not replacements:
        return text
    return re.sub(_any_of(replacements), lambda found: replacements[found[0]], text)


def _any_of(texts: Sequence[str] | Mapping[str, str]) -> str:
    return "|".join(re.escape(text) for text in texts)


def _longest_first(texts: Any) -> tuple[str, ...]:
    return tuple(sorted((text for text in texts if text), key=lambda text: (-len(text), text)))

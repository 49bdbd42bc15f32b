"""Chats as token ids: the same ids for training and for generation, and no forged control tokens."""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from srt_cli.errors import SrtError
from srt_cli.records import Message

# Private-use characters stand in for control-token text while the template is rendered.
FIRST_STAND_IN: Final = 0xF0000
MARKER: Final = "the last word"
PROBE: Final = (
    Message(role="user", content="What is 2 + 2?\n"),
    Message(role="assistant", content=" It is 4."),
    Message(role="user", content="Why?"),
)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[int]:
    """Token ids of a chat under the model's own template.

    Equals `apply_chat_template(tokenize=True)` wherever no content holds a control token's text.
    Where one does (`<|im_end|>` in a prompt), that text is tokenised as plain text.
    Raises `SrtError` for a tokenizer without a chat template, or one that cannot tell the two apart.
    """
    check_template(tokenizer)
    controls = _control_tokens(tokenizer)
    if not any(control in turn.content for turn in messages for control in controls):
        return _encode_whole(tokenizer, messages, add_generation_prompt)
    if not _pieces_equal_whole(tokenizer):
        raise SrtError(
            "a text holds a control token of the model, and this tokenizer cannot encode it as "
            "plain text. Remove such texts, or use a model with a fast tokenizer."
        )
    return _encode_in_pieces(tokenizer, messages, add_generation_prompt)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `SrtError` when the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise SrtError(
            f"{tokenizer.name_or_path}: the model has no chat template. "
            "Pass --chat-template FILE (a .jinja file), or use an instruct model."
        )


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the template puts right behind an assistant's words.

    Raises `SrtError` when there is none: a model trained so would never stop.
    """
    check_template(tokenizer)
    turns = [Message(role="user", content="a"), Message(role="assistant", content=MARKER)]
    rendered = tokenizer.apply_chat_template(_plain(turns), tokenize=False)
    assert isinstance(rendered, str)
    behind = tokenizer(rendered.rpartition(MARKER)[2], add_special_tokens=False)["input_ids"]
    for token in behind:
        if token in tokenizer.added_tokens_decoder or token in tokenizer.all_special_ids:
            return int(token)
    raise SrtError(
        f"{tokenizer.name_or_path}: its chat template ends an assistant's turn with no special "
        "token, so the model would not learn to stop. Pass a --chat-template that does."
    )


def _encode_whole(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool
) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(
        _plain(messages), add_generation_prompt=add_generation_prompt, tokenize=True
    )
    return list(encoded["input_ids"])


def _encode_in_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool
) -> list[int]:
    """Split the rendered chat at the template's own control tokens; tokenise the rest as plain text."""
    controls = _control_tokens(tokenizer)
    written = {character for turn in messages for character in turn.content}
    free = (chr(code) for code in count(FIRST_STAND_IN) if chr(code) not in written)
    stand_ins = dict(zip(controls, free, strict=False))
    hidden = [
        Message(role=turn.role, content=_replace(turn.content, stand_ins)) for turn in messages
    ]
    rendered = tokenizer.apply_chat_template(
        _plain(hidden), add_generation_prompt=add_generation_prompt, tokenize=False
    )
    assert isinstance(rendered, str)
    shown = {stand_in: control for control, stand_in in stand_ins.items()}
    ids: list[int] = []
    for piece in re.split(f"({_any_of(controls)})", rendered):
        if piece in stand_ins:
            token = tokenizer.convert_tokens_to_ids(piece)
            assert isinstance(token, int)
            ids.append(token)
        elif piece:
            plain = _replace(piece, shown)
            ids += tokenizer(plain, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
    return ids


@lru_cache(maxsize=8)
def _pieces_equal_whole(tokenizer: PreTrainedTokenizerBase) -> bool:
    whole = _encode_whole(tokenizer, PROBE, True)
    plain = tokenizer(
        _control_tokens(tokenizer)[0], add_special_tokens=False, split_special_tokens=True
    )
    forged = len(plain["input_ids"]) == 1
    return not forged and whole == _encode_in_pieces(tokenizer, PROBE, True)


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Every text that the tokenizer would read as one special token, the longest first."""
    texts = set(tokenizer.all_special_tokens)
    texts |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted((text for text in texts if text), key=lambda text: (-len(text), text)))


def _replace(text: str, replacements: dict[str, str]) -> str:
    return re.sub(_any_of(replacements), lambda found: replacements[found[0]], text)


def _any_of(texts: Sequence[str] | dict[str, str]) -> str:
    return "|".join(re.escape(text) for text in texts)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in messages]

"""The forms in which people keep prompts: one text, an instruction, or a chat in several spellings."""

import difflib
import json
import re
import shlex
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

SHAREGPT: Final = "ShareGPT conversations"
ROLES: Final = {
    "human": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant",
    "developer": "system",
}  # fmt: skip
"""What others call the three roles."""
TOOL_ROLES: Final = (
    "tool", "function", "function_call", "function_response",
    "observation", "tool_call", "tool_response",
)  # fmt: skip
ALL_ROLES: Final = frozenset({"system", "user", "assistant", *ROLES, *TOOL_ROLES})
TEXT_PARTS: Final = frozenset({"text", "input_text", "output_text"})
NEAREST: Final = {
    "prompt": '{"prompt": TEXT}',
    "instruction": '{"instruction": TEXT, "input": TEXT}',
    "messages": '{"messages": [{"role": "user", "content": TEXT}]}',
    "conversations": '{"conversations": [{"from": "human", "value": TEXT}]}',
    "question": '{"question": TEXT}',
}
"""Each form by the field that shows it; of several the first counts."""
SYSTEMS: Final = ("system", "system_prompt")
PROMPT_FIELDS: Final = (*NEAREST, "input", "context", *SYSTEMS, "history")
"""Fields that a prompt is made of."""
KNOWN: Final = frozenset({*PROMPT_FIELDS, "response", "id"})
LIKELY: Final = (*NEAREST, "query", "input", "text", "user", "request", "task", "problem")
"""What people call a field that holds a prompt."""
ANSWERS: Final = ("output", "answer", "completion")
"""What people call an answer, which may be one to learn from or one to compare with."""


@dataclass(frozen=True)
class FieldNames:
    """Which fields of a row hold what; dots lead into nested fields. None: as the forms have it."""

    prompt: str | None = None
    response: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class RowAsRead:
    """One row, brought from its form to ours."""

    form: str
    prompt: str | list[dict[str, str]]
    """A text, or turns of `role` and `content` that end with the user's."""
    response: str | None
    id: str | None
    rest: dict[str, Any]
    """Every other field, untouched."""
    left_out: tuple[str, ...] = ()
    """What the turns held beside role and text, by name."""


def read_row(row: Mapping[str, Any], names: FieldNames | None = None) -> RowAsRead:
    """Read a row in any of the forms; `ValueError`, with a sentence for the user, for any other."""
    names = names or FieldNames()
    given = [name for name in (names.prompt, names.response, names.id) if name is not None]
    rest = plainly_named(row, KNOWN, {*given, *(name.partition(".")[0] for name in given)})
    form, where, asked = _take_prompt(rest, names.prompt)
    response = _take(rest, names.response or "response", required=names.response is not None)
    own_id = _take(rest, names.id or "id", required=names.id is not None)
    for name in ("prompt", "response", "id"):  # fields of these names, where others were named
        rest.pop(name, None)
    if asked is None or (isinstance(asked, str) and not asked.strip()):
        raise ValueError("the prompt is empty")
    left_out: dict[str, None] = {}
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else []
    if isinstance(asked, list):
        turns = [each for each in map_turns(where, asked, left_out) if each is not None]
        if turns and turns[-1]["role"] == "assistant":
            closing = turns.pop()
            response = closing["content"] if response is None else response
        if not turns or turns[-1]["role"] != "user":
            raise ValueError("the conversation has no user turn to answer")
        if form == "messages" and (left_out or rest.get("tools") or rest.get("functions")):
            form = "OpenAI fine-tuning messages"
        left_out |= {name: None for name in ("tools", "functions") if rest.get(name)}
    elif not isinstance(asked, str):
        raise ValueError(f"the prompt is {type(asked).__name__}, not text or messages")
    before, beside = _turns_before(rest, turns, left_out)
    if beside and (form, beside) != (SHAREGPT, ["system"]):
        form += f" with {' and '.join(beside)}"
    if response is not None:
        response = text_of(response, names.response or "response")
    identifier = None if own_id is None else str(own_id)
    prompt = asked if isinstance(asked, str) and not before else [*before, *turns]
    return RowAsRead(form, prompt, response, identifier, rest, tuple(left_out))


def plainly_named(
    row: Mapping[str, Any], known: Container[str], kept: Container[str] = ()
) -> dict[str, Any]:
    """A row whose `Prompt ` is called `prompt`, where it has no field of the very name that is known.

    Spaces within a name are underscores. Names in `kept` stay as they are.
    """
    named: dict[str, Any] = {}
    for name, value in row.items():
        plain = name
        if name not in known and name not in kept:
            plain = _plain(name)
        taken = plain not in known or plain in named or (plain != name and plain in row)
        named[name if taken else plain] = value
    return named


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def _turns_before(
    rest: dict[str, Any], turns: list[dict[str, str]], left_out: dict[str, None]
) -> tuple[list[dict[str, str]], list[str]]:
    """The turns that stand in fields of their own, and the fields, which are taken out of the row.

    A system turn of the chat itself stands; another one beside it is left out.
    """
    before = _history(rest.get("history"), left_out)
    beside = ["history"] if before else []
    name = next((name for name in SYSTEMS if has_text(rest.get(name))), None)
    if name is not None:
        own = [turn["content"] for turn in [*before, *turns] if turn["role"] == "system"]
        if own and rest[name] not in own:
            left_out[name] = None
        if not own:
            before.insert(0, {"role": "system", "content": rest[name]})
            beside.insert(0, name)
    for each in beside:
        del rest[each]
    return before, beside


def has_text(value: Any) -> bool:
    """Whether a field holds a text that says anything."""
    return isinstance(value, str) and bool(value.strip())


def _history(value: Any, left_out: dict[str, None]) -> list[dict[str, str]]:
    """Earlier turns: pairs of a question and its answer, or turns; left out where it is neither."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            left_out["history"] = None
            return []
    if not value:
        return []
    turns: list[dict[str, str]] = []
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        beside: dict[str, None] = {}
        try:
            turns = [each for each in map_turns("history", value, beside) if each is not None]
        except ValueError:
            turns, beside = [], {"history": None}
        left_out |= beside
        return turns
    for pair in value if isinstance(value, list) else [value]:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            left_out["history"] = None
            return []
        roles = ("user", "assistant")
        turns += [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]
    return turns


def _take_prompt(rest: dict[str, Any], prompt_field: str | None) -> tuple[str, str, Any]:
    """The name of the row's form, the field that holds the prompt, and what it holds."""
    if prompt_field is not None:
        value = _take(rest, prompt_field, required=True, option="--prompt-field")
        chat = chat_in(value) if isinstance(value, str) else None
        return f'field "{prompt_field}"', prompt_field, value if chat is None else chat
    present = [name for name in NEAREST if rest.get(name) is not None]
    named = present or [name for name in NEAREST if name in rest]
    if not named:
        raise ValueError(_not_recognised(rest))
    field = named[0]
    value = rest.pop(field)
    if field == "prompt":
        return ("prompt" if isinstance(value, str) else "prompt turns"), field, value
    if field in ("instruction", "question"):
        further = rest.pop("input", None) if field == "instruction" else None
        name = "input" if further else "context"
        if not further and has_text(rest.get("context")):
            further = rest.pop("context")
        if not further or not isinstance(value, str):
            return field, field, value
        return f"{field} and {name}", field, f"{value}\n\n{further}"
    form = "messages" if field == "messages" else SHAREGPT
    if isinstance(value, str):
        chat = chat_in(value)
        if chat is None:
            raise ValueError(
                f"{field} is a text, and not the JSON of a list of turns (pandas writes lists so). "
                "Write it with json.dumps"
            )
        return f"{form} as JSON text", field, chat
    return form, field, value


def _take(
    rest: dict[str, Any], name: str, *, required: bool, option: str | None = None
) -> Any | None:
    """Take a field out of a row; one that dots lead to is read and stays where it is."""
    if name in rest:
        return rest.pop(name)
    alike = [field for field in rest if required and _plain(field) == _plain(name)]
    if len(alike) == 1:
        return rest.pop(alike[0])
    value: Any = rest
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif required:
            found = ", ".join(_paths_of(rest, name)) or "nothing"
            another = f"Pass another {option}" if option else "Name another field"
            raise ValueError(f'no "{name}" (found: {found}). {another}')
        else:
            return None
    return value


def _paths_of(rest: Mapping[str, Any], name: str) -> Iterator[str]:
    """The fields of a row; those within the one that a dotted name begins with, one by one."""
    for field, value in rest.items():
        if isinstance(value, Mapping) and field == name.split(".")[0]:
            yield from (f"{field}.{inner}" for inner in value)
        else:
            yield field


def chat_in(text: str) -> list[Any] | None:
    """The turns that a text holds as JSON; None where it holds anything else."""
    if not text.lstrip().startswith("["):
        return None
    try:
        turns = json.loads(text)
    except ValueError:
        return None
    shapes = ({"role", "content"}, {"from", "value"})
    is_chat = turns and all(
        isinstance(turn, dict) and any(shape <= turn.keys() for shape in shapes) for turn in turns
    )
    return list(turns) if is_chat else None


def map_turns(
    where: str, turns: list[Any], left_out: dict[str, None]
) -> Iterator[dict[str, str] | None]:
    """Each turn as `role` and `content`, None for one of tools; what is left out is noted by name.

    Raises `ValueError` naming the place, e.g. `messages.1.content`.
    """
    for number, turn in enumerate(turns):
        place = f"{where}.{number}"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{place} is {type(turn).__name__}, not a turn with role and content")
        said = {name: value for name, value in turn.items() if value is not None}
        role_field = "role" if "role" in said else "from"
        text_field = "content" if "content" in said or "value" not in said else "value"
        role = said.pop(role_field, None)
        if not isinstance(role, str):
            raise ValueError(f"{place} has no role (found: {', '.join(said) or 'nothing'})")
        role = role if role.strip().lower() not in ALL_ROLES else role.strip().lower()
        if role not in ALL_ROLES:
            raise ValueError(
                f"role: input {role!r} ({place}.{role_field}) is no role that srt knows: system, user, "
                f"assistant, {', '.join(ROLES)}, or of tools"
            )
        calls = any(said.get(name) for name in ("tool_calls", "function_call"))
        if role in TOOL_ROLES or calls:
            left_out["turns of tools"] = None
            yield None
            continue
        if text_field not in said:
            raise ValueError(f"{place}.{text_field} is missing (found: {', '.join(said) or role})")
        content = _content_of(said.pop(text_field), f"{place}.{text_field}")
        for name in ("audio", "images", "image"):
            if said.get(name):
                raise ValueError(f"{place}.{name}: srt reads text alone")
        left_out |= {name: None for name, value in said.items() if value not in ("", [], {})}
        yield {"role": ROLES.get(role, role), "content": content}


def _content_of(content: Any, place: str) -> str:
    """A turn's text: as it is, or the text of its parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{place} is {type(content).__name__}, not text")
    texts = []
    for number, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise ValueError(f"{place}.{number} is of type {kind!r}: srt reads text alone")
        texts.append(part["text"])
    return "".join(texts)


def text_of(value: Any, place: str) -> str:
    """An answer's text: as it is, alone in a list, or in a turn, a part or a list that ends in one.

    Raises `ValueError` for anything else, and for a list of several answers.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        for name in ("content", "text", "value", "output", "response", "message"):
            if value.get(name) is not None:
                return text_of(value[name], f"{place}.{name}")
        raise ValueError(f"{place} holds no text (found: {', '.join(value) or 'nothing'})")
    if isinstance(value, list):
        if len(value) == 1:
            return text_of(value[0], f"{place}.0")
        if value and all(isinstance(part, Mapping) and "type" in part for part in value):
            return _content_of(value, place)
        last = value[-1] if value else None
        if isinstance(last, Mapping) and ROLES.get(role := _role(last), role) == "assistant":
            return text_of(last, f"{place}.{len(value) - 1}")
        raise ValueError(f"{place} is a list of {len(value)}, not one text")
    raise ValueError(f"{place} is {'None' if value is None else type(value).__name__}, not text")


def _role(turn: Mapping[str, Any]) -> str:
    return str(turn.get("role", turn.get("from")))


def _not_recognised(rest: Mapping[str, Any]) -> str:
    """Which fields there are, which of them may hold the prompt, and which form comes nearest."""
    near = {
        name: kind
        for name, value in rest.items()
        if isinstance(value, str | list) and (kind := _likely(name)) is not None
    }
    lists = {
        name: value[0]
        for name, value in rest.items()
        if isinstance(value, list) and value and isinstance(value[0], Mapping)
    }
    chats = [name for name, turn in lists.items() if {"role", "from"} & turn.keys()]
    found = f'no "prompt", "instruction" or "messages" (found: {", ".join(rest) or "nothing"}). '
    within = next((name for name, inner in lists.items() if inner.keys() & NEAREST.keys()), None)
    if within is not None:
        take_out = shlex.quote(f".{json.dumps(within)}[]")
        return f"{found}The rows seem to stand within {within}: jq -c {take_out} FILE > ROWS.jsonl"
    guess = next((name for name in (*near, *chats) if name not in lists or name in chats), None)
    texts = [name for name, value in rest.items() if has_text(value) and name.lower() != "id"]
    if guess is None and len(texts) == 1:
        guess = texts[0]
    kind = near.get(guess or "", "messages" if lists else "prompt")
    form = NEAREST.get(kind, NEAREST["prompt"])
    option = f" or pass --prompt-field {shlex.quote(guess)}" if guess is not None else ""
    return f"{found}Rename the field{option}. The nearest known form is {form}"


def _likely(name: str) -> str | None:
    """What people call a prompt that a field's name comes near to; None where it is another thing's."""
    words = re.findall("[a-z]+", name.lower())
    if "id" in words or "system" in words:
        return None
    close = difflib.get_close_matches(name.strip().lower(), LIKELY, n=1, cutoff=0.7)
    return next((word for word in (*close, *words) if word in LIKELY), None)

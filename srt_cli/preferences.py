"""Preferences in the forms in which people keep them: TRL's, UltraFeedback's, HH-RLHF's and others."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from srt_cli.forms import (
    PROMPT_FIELDS,
    SYSTEMS,
    chat_in,
    has_text,
    map_turns,
    plainly_named,
    read_row,
)
from srt_cli.prompts import files_in_words, rows_at
from srt_cli.records import Preference
from srt_cli.runs.jsonl import naming_row
from srt_cli.tables import many
from srt_cli.templates import number_in

OURS: Final = "TRL's conversational preferences"
IMPLICIT: Final = ", implicit prompt"
SCORES: Final = {
    side: (f"{side}_score", f"score_{side}", f"{side}_rating") for side in ("chosen", "rejected")
}
"""What others call the scores of the two answers."""
PROMPTS: Final = ("prompt", "instruction", "question", "conversations", "messages")
FIELDS: Final = frozenset({*PROMPT_FIELDS, *SCORES, "id"})
_SPEAKER: Final = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")
_SPEAKERS: Final = {"Human": "user", "Assistant": "assistant"}

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class PairAsRead:
    """One row, brought from its form to ours."""

    form: str
    pair: Preference
    left_out: tuple[str, ...]
    """What the turns held beside role and text, by name."""


@dataclass(frozen=True)
class PreferenceSource:
    """The pairs of some files, in their order."""

    pairs: list[Preference]
    inputs: Mapping[str, Path]
    """The files, for the manifest; empty when the pairs are not files."""
    recognised: Sequence[str]
    """What the rows were taken for, in one line a location; nothing for a file of srt itself."""


def read_preferences(locations: Sequence[str], limit: int | None = None) -> PreferenceSource:
    """The first `limit` pairs of files, folders, globs, pipes and data sets of the hub, together.

    Raises `SrtError` naming file and line of a row in no form that is known.
    """
    pairs: list[Preference] = []
    inputs: dict[str, Path] = {}
    recognised = []
    for location in locations:
        rows, files = rows_at(location)
        for file in files:
            inputs[f"prefs {len(inputs) + 1}" if inputs else "prefs"] = file
        forms: Counter[str] = Counter()
        left_out: Counter[str] = Counter()
        for name, number, row in rows():
            if limit is not None and len(pairs) >= limit:
                break
            with naming_row(name, number):
                read = read_pair(row, f"{Path(name).name}:{number}")
            pairs.append(read.pair)
            forms[read.form] += 1
            left_out.update(read.left_out)
        said = _in_words(location, files, forms, left_out, len(rows.empty))
        recognised += [said] if said else []
    return PreferenceSource(pairs, inputs, recognised)


def _in_words(
    location: str,
    files: Sequence[Path],
    forms: Counter[str],
    left_out: Counter[str],
    empty: int,
) -> str | None:
    where = files_in_words(files)
    if not where and not left_out and not empty and forms.keys() <= {OURS}:
        return None
    read_as = " and ".join(
        f"{form} ({count:,})" if len(forms) > 1 else form for form, count in forms.most_common()
    )
    said = f"{location}: {forms.total():,} pairs{where}, read as {read_as}"
    if left_out:
        said += "; left out of the chats: "
        said += ", ".join(f"{name} ({count:,} rows)" for name, count in left_out.most_common())
    if empty:
        said += f"; {many(empty, 'empty row')} left out"
    return said + "."


# --- One row -----------------------------------------------------------------------------------


def read_pair(row: Mapping[str, Any], identifier: str) -> PairAsRead:
    """Read a row in any of the forms; `identifier` is the pair's id where the row gives none.

    Raises `ValueError` with a sentence for the user, or pydantic's error, for any other.
    """
    named = plainly_named(row, FIELDS)
    # pandas and parquet have NaN where nothing is.
    rest = {name: each for name, each in named.items() if each is not None and each == each}
    for name in ("images", "videos", "audios", "image"):
        if rest.get(name):
            raise ValueError(f"{name}: srt reads text alone")
    notes: dict[str, None] = {}
    form, prompt, chosen, rejected = _three_parts(rest, notes)
    system = next((rest[name] for name in SYSTEMS if has_text(rest.get(name))), None)
    if system is not None and prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    if prompt and prompt[-1]["role"] != "user":
        raise ValueError("the conversation has no user turn to answer")
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns and turns[-1]["role"] != "assistant":
            raise ValueError(f"{side} ends with the {turns[-1]['role']}'s turn, not an answer")
    pair = Preference.model_validate(
        {
            "id": str(rest.get("id", rest.get("prompt_id", identifier))),
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_score": _score_of(rest, "chosen"),
            "rejected_score": _score_of(rest, "rejected"),
            "source": source if isinstance(source := rest.get("source"), str) else None,
        }
    )
    return PairAsRead(form, pair, tuple(notes))


def _three_parts(
    rest: Mapping[str, Any], notes: dict[str, None]
) -> tuple[str, Turns, Turns, Turns]:
    """The row's form, its prompt and its two answers."""
    if "messages" in rest and {"rejected_response", "rejected_messages"} & rest.keys():
        return _swift(rest, notes)
    if not {"chosen", "rejected"} <= rest.keys():
        raise ValueError(_not_recognised(rest))
    chosen, rejected = rest["chosen"], rest["rejected"]
    given = [name for name in PROMPTS if rest.get(name)]
    if isinstance(chosen, str) and isinstance(rejected, str) and not chat_in(chosen):
        told = _transcript(chosen), _transcript(rejected)
        if told[0] and told[1] and not given:
            return "HH-RLHF transcripts", *_apart(told[0], told[1])
        if given:
            prompt = _prompt_of(rest, given[0], notes)
            standard = "TRL's standard preferences"
            form = standard if given[0] == "prompt" else f"{given[0]}, chosen and rejected"
            return form, prompt, _answer(chosen), _answer(rejected)
        return f"TRL's standard preferences{IMPLICIT}", *_common_beginning(chosen, rejected)
    better, worse = _turns("chosen", chosen, notes), _turns("rejected", rejected, notes)
    if better and worse and better[0]["role"] != "assistant" != worse[0]["role"]:
        binarised = given and ("score_chosen" in rest or isinstance(rest[given[0]], str))
        form = "UltraFeedback, binarised" if binarised else f"{OURS}{IMPLICIT}"
        return form, *_apart(better, worse)
    if not given:
        raise ValueError(
            "chosen and rejected hold no prompt, and there is no field of one. Add a field prompt"
        )
    forms = {"conversations": "LLaMA-Factory's ranking", "messages": "axolotl's preferences"}
    form = forms.get(given[0], OURS)
    return form, _prompt_of(rest, given[0], notes), better, worse


def _swift(rest: Mapping[str, Any], notes: dict[str, None]) -> tuple[str, Turns, Turns, Turns]:
    """ms-swift's rows: a chat that ends with the better answer, and the worse one beside it."""
    better = _turns("messages", rest["messages"], notes)
    other = rest.get("rejected_messages")
    if other is not None:
        return "ms-swift's preferences", *_apart(better, _turns("rejected_messages", other, notes))
    worse = _turns("rejected_response", rest["rejected_response"], notes)
    return "ms-swift's preferences", better[:-1], better[-1:], worse


def _prompt_of(rest: Mapping[str, Any], field: str, notes: dict[str, None]) -> Turns:
    """The turns before the answers, from the field that holds them."""
    value = rest[field]
    told = _transcript(value) if isinstance(value, str) else None
    if told:
        return told
    beside = ("input", "context", "history")
    read = read_row({field: value} | {name: rest[name] for name in beside if name in rest})
    notes |= dict.fromkeys(read.left_out)
    if isinstance(read.prompt, str):
        return [{"role": "user", "content": read.prompt}]
    if read.response is not None:
        raise ValueError("the conversation has no user turn to answer")
    return read.prompt


def _turns(name: str, value: Any, notes: dict[str, None]) -> Turns:
    """A side's turns: a text is one answer, a turn by itself a list of it."""
    if isinstance(value, str):
        chat = chat_in(value)
        if chat is None:
            return _answer(value)
        value = chat
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{name} is {type(value).__name__}, not text or turns")
    return [turn for turn in map_turns(name, value, notes) if turn is not None]


def _answer(text: str) -> Turns:
    """An answer; the blank that TRL's standard form joins it with is not part of it."""
    return [{"role": "assistant", "content": text.removeprefix(" ")}]


def _apart(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """The turns that two conversations share, up to a user's, and how each goes on."""
    most = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(most) if chosen[n] != rejected[n]), max(0, most))
    while shared and chosen[shared - 1]["role"] != "user":
        shared -= 1
    if not shared:
        raise ValueError("chosen and rejected do not begin with the same prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _common_beginning(chosen: str, rejected: str) -> tuple[Turns, Turns, Turns]:
    """What two texts share is the prompt, as TRL's `extract_prompt` has it."""
    most = min(len(chosen), len(rejected))
    shared = next((n for n in range(most) if chosen[n] != rejected[n]), most)
    prompt = chosen[:shared].removesuffix(" ")
    if not prompt.strip():
        raise ValueError(
            "chosen and rejected have no common beginning, and there is no field of a prompt. Add a "
            "field prompt"
        )
    better, worse = (_answer(text[len(prompt) :]) for text in (chosen, rejected))
    return [{"role": "user", "content": prompt}], better, worse


def _transcript(text: str) -> Turns | None:
    """The turns of a text as HH-RLHF writes them; None for any other text."""
    found = list(_SPEAKER.finditer(text))
    if not found or text[: found[0].start()].strip() or found[0][1] != "Human":
        return None
    ends = [each.start() for each in found[1:]] + [len(text)]
    turns = [
        {"role": _SPEAKERS[each[1]], "content": text[each.end() : end].strip()}
        for each, end in zip(found, ends, strict=True)
    ]
    begun = turns[-1]["role"] == "assistant" and text.rstrip().endswith("\n\nAssistant:")
    return turns[:-1] if begun and len(turns) > 1 else turns


def _score_of(rest: Mapping[str, Any], side: str) -> float | None:
    for name in SCORES[side]:
        if name in rest:
            if (score := number_in(rest[name])) is None:
                raise ValueError(f"{name} is {rest[name]!r}, not a number")
            return score
    return None


def _not_recognised(rest: Mapping[str, Any]) -> str:
    """Which fields there are, and what comes nearest."""
    found = f'no "chosen" and "rejected" (found: {", ".join(rest) or "nothing"}). '
    if {"feedback", "refinement"} <= rest.keys():
        return found + "This is feedback. Make pairs of it first: srt build-prefs --data FILE"
    if {"completion", "label"} <= rest.keys():
        return found + "These are KTO's unpaired rows, and srt trains on pairs"
    if any(isinstance(rest.get(n), list) for n in ("completions", "responses", "answers")):
        return found + (
            "Make pairs of scored answers first: srt build-prefs --data FILE --strategy best-worst"
        )
    as_turns = any(isinstance(each, list) for each in rest.values())
    answer = '[{"role": "assistant", "content": TEXT}]' if as_turns else "TEXT"
    asked = '[{"role": "user", "content": TEXT}]' if as_turns else "TEXT"
    return found + (
        f'The nearest known form is {{"prompt": {asked}, "chosen": {answer}, "rejected": {answer}}}'
    )

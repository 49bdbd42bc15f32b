"""Contestants and what is asked of them: answers, refinements, their own critiques, blind scores."""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import orjson
from pydantic import ValidationError

from srt_cli import console
from srt_cli.calls.conduct import Call
from srt_cli.errors import SrtError
from srt_cli.feedback.critic import Critic, blind_score
from srt_cli.feedback.story import Policy, Roles, check_call, refine, write_draft
from srt_cli.forms import PROMPT_FIELDS, plainly_named, text_of
from srt_cli.models import Model, Reply
from srt_cli.prompts import format_of, names_of, read_file
from srt_cli.reading import part_thoughts
from srt_cli.records import FeedbackRecord, Output, Prompt, Scored, Status
from srt_cli.runs.jsonl import describe_invalid, open_bytes
from srt_cli.stats.hygiene import is_same_text, plain_form
from srt_cli.templates import parse_parts, parse_preference

Use = Literal["response", "refinement"]
ANSWERS: Final = ("response", "output")
"""The fields that may hold a saved answer."""
FIELDS: Final = frozenset({*PROMPT_FIELDS, "id", "refinement", *ANSWERS})
FEEDBACK_FIELDS: Final = frozenset(
    name for name, field in FeedbackRecord.model_fields.items() if field.exclude_if is None
)
"""What every line of a feedback file has; thoughts, say, stand only where there were some."""


@dataclass(frozen=True)
class Contestant:
    """A model in the contest: how it answers, and how it criticises and refines its own answers."""

    policy: Policy
    critic: Critic
    uses: Sequence[Use]
    rounds: int = 1


@dataclass(frozen=True)
class Attempt:
    """What a contestant made of one prompt."""

    outputs: list[Output]
    critique: FeedbackRecord | None = None
    """Its own critique of its direct answer, unscored, when it was asked to refine it."""


def answer(contestant: Contestant, prompt: Prompt) -> Generator[Call, Reply, Attempt]:
    """One prompt: the direct response and, if asked for, its refinements by the model itself.

    Each round refines what the round before left; where a critique cannot be read, that stands.
    """
    name = contestant.policy.model.spec
    draft = yield from write_draft(contestant.policy, prompt)
    assert draft.reply is not None
    outputs = []
    if "response" in contestant.uses:
        outputs.append(
            Output(
                id=prompt.id, contestant=name, use="response", response=draft.text,
                status=draft.reply.status, thoughts=draft.reply.thoughts,
            )
        )  # fmt: skip
    if "refinement" not in contestant.uses:
        return Attempt(outputs)
    roles = Roles(contestant.critic, scores=False, rounds=contestant.rounds)
    records: list[FeedbackRecord] = []
    if draft.is_usable:
        # As of a given text: what the draft said and cost stands with the output.
        records = yield from refine(roles, replace(draft, reply=None))
    text, status = draft.text, draft.reply.status
    for number, use in enumerate(refinement_uses(contestant.rounds)):
        whole = number < len(records) and records[number].status == "ok"
        if number < len(records):
            text, status = records[number].refinement or text, records[number].status
        outputs.append(
            Output(
                id=prompt.id, contestant=name, use=use, response=text, parsed=whole, status=status
            )
        )
    return Attempt(outputs, records[0] if records else None)


def refinement_uses(rounds: int) -> list[str]:
    """The names of each round's answer: refinement, refinement-2, refinement-3 ..."""
    return ["refinement", *(f"refinement-{number}" for number in range(2, rounds + 1))]


def is_outputs_file(spec: str) -> bool:
    """Whether a contestant is a file of outputs, such as JSONL or AlpacaEval's model_outputs.json."""
    return format_of(Path(spec)) is not None


def read_outputs(path: Path, prompts: Sequence[Prompt], uses: Sequence[Use]) -> list[Output]:
    """Saved outputs: `response` or `output` (AlpacaEval), or a feedback file with its refinement.

    Joined to the prompts by id, else by the prompt's text, whose spacing and Unicode form do not
    matter. Raises `SrtError` when one is missing, is no text, or stands beside another prompt than
    that of its id.
    """
    by_id: dict[str, list[Mapping[str, Any]]] = {}
    by_text: dict[str, list[Mapping[str, Any]]] = {}
    for each in _rows_of(path, {prompt.id for prompt in prompts}):
        row = plainly_named(each, FIELDS)
        if "id" in row:
            by_id.setdefault(str(row["id"]), []).append(row)
        for text in {plain_form(text) for text in _texts_asked(row)}:
            by_text.setdefault(text, []).append(row)
    names = names_of(prompts)
    found = {
        prompt.id: by_id.get(prompt.id)
        or next((by_text[text] for text in names(prompt) if text in by_text), [])
        for prompt in prompts
    }
    missing = [name for name, rows in found.items() if not rows]
    if missing:
        raise SrtError(
            f"{path}: has no output for prompt {missing[0]!r}, nor for {len(missing) - 1} more of "
            f"{len(prompts)}. Outputs are joined by id, or by the text of prompt or instruction."
        )
    several = [len(rows) for rows in found.values() if len(rows) > 1]
    if several:
        console.warn(
            f"{path}: has several rows (samples, rounds) for {len(several)} of {len(prompts)} prompts; "
            f"the first of each counts, and {sum(several) - len(several)} are left out."
        )
    first = {name: rows[0] for name, rows in found.items()}
    differing = sum(_differs_in_form(path, prompt, first[prompt.id]) for prompt in prompts)
    if differing:
        console.say(
            f"{path}: {differing} of {len(prompts)} outputs stand beside an instruction that differs "
            "from the prompt in white space or Unicode form; they are joined."
        )
    return [
        _saved_output(path, prompt, first[prompt.id], use) for prompt in prompts for use in uses
    ]


def _texts_asked(row: Mapping[str, Any]) -> list[str]:
    """The prompt that a row says it answers, in each reading of it; none where it does not say."""
    texts = [row[name] for name in ("prompt", "instruction") if isinstance(row.get(name), str)]
    with contextlib.suppress(ValueError):
        texts.append(Prompt.from_row(row).text)
    return texts


def _differs_in_form(path: Path, prompt: Prompt, row: Mapping[str, Any]) -> bool:
    """Whether an output's own prompt differs in form alone; raises `SrtError` for another prompt."""
    answered = _texts_asked(row)
    if not answered or any(text in answered for text in prompt.texts):
        return False
    if not any(is_same_text(text, asked) for text in answered for asked in prompt.texts):
        raise SrtError(
            f"{path}: the output with id {prompt.id!r} answers {answered[0][:60]!r}, but the prompt "
            f"with that id is {prompt.text[:60]!r}. Give both files the same ids, or take the ids out "
            "of one: then they are joined by the prompt's text."
        )
    return True


def _rows_of(path: Path, ids: Set[str]) -> Iterator[Mapping[str, Any]]:
    """The rows of a file of outputs; of one JSON object, its answers by id or instruction."""
    whole = _whole_object(path)
    if whole is None:
        yield from (row for _, row in read_file(path))
    elif not whole.keys() & set(ANSWERS):
        if not any(isinstance(answer, str | list | dict) for answer in whole.values()):
            raise SrtError(
                f"{path}: not a list of outputs. Expected AlpacaEval's model_outputs.json (a list with "
                "instruction, output), or one object of outputs by id or instruction."
            )
        for name, answer in whole.items():
            yield {"id" if name in ids else "instruction": name, "output": answer}
    elif columns := {name: cells for name, cells in whole.items() if isinstance(cells, list)}:
        for cells in zip(*columns.values(), strict=False):
            yield dict(zip(columns, cells, strict=True))
    else:
        yield whole


def _whole_object(path: Path) -> dict[str, Any] | None:
    """The one object that a JSON file holds; None for a list, for lines, and for other formats."""
    if format_of(path) != "JSON" or not path.is_file():
        return None
    with open_bytes(path) as file:
        content = file.read()
    try:
        whole = orjson.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError:  # lines, or an error that is told with its place
        return None
    return whole if isinstance(whole, dict) else None


def _saved_output(path: Path, prompt: Prompt, row: Mapping[str, Any], use: Use) -> Output:
    """One output from its row; where a refinement is missing, the draft stands for it."""
    drafts = [name for name in ANSWERS if name in row]
    if not drafts:
        found = ", ".join(row)
        raise SrtError(
            f'{path}: no "response" or "output" for prompt {prompt.id!r} (found: {found}).'
        )
    if use == "refinement" and "refinement" not in row:
        raise SrtError(f"{path}: has no refinements. Leave out --use refinement for it.")
    refined = row["refinement"] if use == "refinement" else None
    text = row[drafts[0]] if refined is None else refined
    if text is None and row.get("status", "ok") != "ok":
        text = ""  # a row of ours that came to nothing
    try:
        text = text_of(text, drafts[0] if refined is None else "refinement")
    except ValueError as error:
        raise SrtError(f"{path}: prompt {prompt.id!r}: {error}.") from None
    parsed = None if use == "response" else refined is not None
    thoughts, answer = part_thoughts(text)
    return Output(
        id=prompt.id, contestant=str(path), use=use, parsed=parsed, response=answer,
        thoughts=thoughts, status=_saved_status(row, is_draft=refined is None),
    )  # fmt: skip


def _saved_status(row: Mapping[str, Any], *, is_draft: bool) -> Status:
    """How a saved answer ended, where a file of ours says it; elsewhere `status` may mean anything."""
    if row.keys() >= {"contestant", "use"} and row.get("status") in get_args(Status):
        status: Status = row["status"]
        return status
    return "truncated" if is_draft and row.get("response_cut") is True else "ok"


def check_output(
    model: Model, prompt: Prompt, output: Output, name: str = ""
) -> Generator[Call, Reply, Output]:
    """Let a program say whether an output passes; raises `SrtError` when it fails to.

    `name` is that of a further check, whose word stands among the parts.
    """
    reply = yield check_call(model, prompt, output.response)
    if reply.status == "failed":
        raise SrtError(f"{reply.error} (prompt {prompt.id}). A check must decide every answer.")
    passes, parts = parse_preference(reply.text), parse_parts(reply.text)
    assert passes is not None
    if name:
        named = {f"{name} {part}": value for part, value in parts.items()}
        return output.model_copy(update={"parts": output.parts | {name: passes} | named})
    whole = passes == 1 if passes in (0, 1) else passes
    return output.model_copy(update={"passed": whole, "parts": parts})


def score_output(critic: Critic, prompt: Prompt, output: Output) -> Generator[Call, Reply, Scored]:
    """A blind score of one output: by its own writer in conversation, or by an outside critic."""
    what = output.contestant if output.use == "response" else f"{output.contestant}, {output.use}"
    said = yield from blind_score(critic, prompt, output.response, f"{prompt.id} score of {what}")
    raw = str(said.reason) if said.status == "failed" else said.replies.raw[""]
    return Scored(
        id=prompt.id, contestant=output.contestant, use=output.use, by=critic.model.spec,
        score=said.score, status=said.status, raw=raw, thoughts=said.replies.thoughts.get("", ""),
    )  # fmt: skip


def read_critiques(path: Path, prompts: Sequence[Prompt]) -> list[FeedbackRecord]:
    """The first rounds of a feedback file that answer these prompts; none where it is no such file."""
    wanted = {prompt.id for prompt in prompts}
    found: dict[str, FeedbackRecord] = {}
    for row in _rows_of(path, wanted):
        if row.get("id") not in wanted or row["id"] in found or not row.keys() >= FEEDBACK_FIELDS:
            continue
        try:
            found[row["id"]] = FeedbackRecord.model_validate(row)
        except ValidationError as error:
            raise SrtError(f"{path}: row {row['id']!r}: {describe_invalid(error)}") from None
    return list(found.values())

"""Contestants and what is asked of them: answers, refinements, their own critiques, blind scores."""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import orjson

from srt_cli.calls.conduct import Call
from srt_cli.errors import SrtError
from srt_cli.feedback.critic import Critic, blind_score
from srt_cli.feedback.story import Policy, Roles, check_call, refine, write_draft
from srt_cli.models import Model, Reply
from srt_cli.records import FeedbackRecord, Output, Prompt, Scored
from srt_cli.runs.jsonl import read_rows
from srt_cli.stats.hygiene import is_same_text
from srt_cli.templates import parse_preference

Use = Literal["response", "refinement"]
FEEDBACK_FIELDS: Final = frozenset(FeedbackRecord.model_fields)


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
    """Whether a contestant is a file of outputs: JSONL, or AlpacaEval's model_outputs.json."""
    return spec.endswith((".jsonl", ".jsonl.gz", ".json"))


def read_outputs(path: Path, prompts: Sequence[Prompt], uses: Sequence[Use]) -> list[Output]:
    """Saved outputs: `response` or `output` (AlpacaEval), or a feedback file with its refinement.

    Joined to the prompts by id, else by the prompt's text. Raises `SrtError` when one is missing, or
    stands beside another prompt than that of its id.
    """
    by_id: dict[str, dict[str, Any]] = {}
    by_text: dict[str, dict[str, Any]] = {}
    for row in _rows_of(path):
        if "id" in row:
            by_id.setdefault(str(row["id"]), row)
        for name in ("prompt", "instruction"):
            if isinstance(row.get(name), str):
                by_text.setdefault(row[name], row)
    rows = {prompt.id: by_id.get(prompt.id) or by_text.get(prompt.text) for prompt in prompts}
    missing = [name for name, row in rows.items() if row is None]
    if missing:
        raise SrtError(
            f"{path}: has no output for prompt {missing[0]!r}, nor for {len(missing) - 1} more of "
            f"{len(prompts)}. Outputs are joined by id, or by the text of prompt or instruction."
        )
    for prompt in prompts:
        if prompt.id in by_id:
            _require_own_prompt(path, prompt, by_id[prompt.id])
    return [
        _saved_output(path, prompt, rows[prompt.id] or {}, use)
        for prompt in prompts
        for use in uses
    ]


def _require_own_prompt(path: Path, prompt: Prompt, row: Mapping[str, Any]) -> None:
    """Refuse an output that has the id of a prompt, but says itself that it answers another one."""
    answered = [row[name] for name in ("prompt", "instruction") if isinstance(row.get(name), str)]
    with contextlib.suppress(ValueError):  # it does not say what it answers
        answered.append(Prompt.from_row(row).text)
    if answered and not any(is_same_text(text, prompt.text) for text in answered):
        raise SrtError(
            f"{path}: the output with id {prompt.id!r} answers {answered[0][:60]!r}, but the prompt "
            f"with that id is {prompt.text[:60]!r}. Give both files the same ids, or take the ids out "
            "of one: then they are joined by the prompt's text."
        )


def _rows_of(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix != ".json":
        yield from (row for _, row in read_rows(path))
        return
    try:
        rows = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise SrtError(f"{path}: no such file. Check the path.") from None
    except orjson.JSONDecodeError as error:
        raise SrtError(f"{path}: not valid JSON ({error.msg}).") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SrtError(
            f"{path}: not a list of outputs. Expected AlpacaEval's model_outputs.json (a list with "
            "instruction, output)."
        )
    yield from rows


def _saved_output(path: Path, prompt: Prompt, row: Mapping[str, Any], use: Use) -> Output:
    """One output from its row; where a refinement is missing, the draft stands for it."""
    drafts = [name for name in ("response", "output") if name in row]
    if not drafts:
        found = ", ".join(row)
        raise SrtError(
            f'{path}: no "response" or "output" for prompt {prompt.id!r} (found: {found}).'
        )
    if use == "refinement" and "refinement" not in row:
        raise SrtError(f"{path}: has no refinements. Leave out --use refinement for it.")
    refined = row["refinement"] if use == "refinement" else None
    draft = row[drafts[0]]
    text = refined if isinstance(refined, str) else draft
    parsed = None if use == "response" else isinstance(refined, str)
    return Output(
        id=prompt.id, contestant=str(path), use=use, parsed=parsed,
        response=text if isinstance(text, str) else "",
    )  # fmt: skip


def check_output(model: Model, prompt: Prompt, output: Output) -> Generator[Call, Reply, Output]:
    """Let a program say whether an output passes; raises `SrtError` when it fails to."""
    reply = yield check_call(model, prompt, output.response)
    if reply.status == "failed":
        raise SrtError(f"{reply.error} (prompt {prompt.id}). A check must decide every answer.")
    return output.model_copy(update={"passed": parse_preference(reply.text) == 1})


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
    for row in _rows_of(path):
        if row.get("id") not in wanted or row["id"] in found or not row.keys() >= FEEDBACK_FIELDS:
            continue
        found[row["id"]] = FeedbackRecord.model_validate(row)
    return list(found.values())

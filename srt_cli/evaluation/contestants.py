"""Contestants and what is asked of them: answers, refinements, their own critiques, blind scores."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import orjson

from srt_cli.calls.conduct import Call
from srt_cli.errors import SrtError
from srt_cli.evaluation.judging import output_of, status_of
from srt_cli.feedback.story import Critic, Sampling, respond_call
from srt_cli.models import Model, Reply, Request, Task
from srt_cli.records import FeedbackRecord, Output, Prompt, Scored
from srt_cli.runs.jsonl import read_rows
from srt_cli.templates import ParsedCritique, parse_critique, parse_preference

Use = Literal["response", "refinement"]
FEEDBACK_FIELDS: Final = frozenset(FeedbackRecord.model_fields)


@dataclass(frozen=True)
class Contestant:
    """A model in the contest: how it answers, and how it refines its own answers."""

    name: str
    model: Model
    drafts: Sampling
    critiques: Sampling


@dataclass(frozen=True)
class Answered:
    """What a contestant made of one prompt."""

    outputs: list[Output]
    critique: FeedbackRecord | None = None
    """Its own critique of its direct answer, when it was asked to refine it."""


def answer(
    contestant: Contestant, prompt: Prompt, uses: Sequence[Use], rounds: int = 1
) -> Generator[Call, Reply, Answered]:
    """One prompt: the direct response and, if asked for, its refinements by the model itself.

    Each round refines what the round before left; where a critique cannot be read, that stands.
    """
    reply = yield respond_call(contestant.model, contestant.drafts, prompt, sample=0)
    status = status_of(reply)
    text = reply.text.strip()
    outputs = []
    if "response" in uses:
        outputs.append(output_of(prompt.id, contestant.name, "response", text, None, status))
    critic = Critic(contestant.model, contestant.critiques, in_conversation=True)
    first: FeedbackRecord | None = None
    for use in refinement_uses(rounds) if "refinement" in uses else ():
        parsed = False
        if text:
            reply = yield critic.call("critique", prompt, text, f"{prompt.id} critique, {use}")
            critique = parse_critique(reply.text)
            first = first or _critique_record(prompt, contestant.name, text, reply, critique)
            if critique.refinement is not None and not critique.problems:
                text, parsed = critique.refinement, True
        outputs.append(output_of(prompt.id, contestant.name, use, text, parsed, status))
    return Answered(outputs, first)


def _critique_record(
    prompt: Prompt, contestant: str, draft: str, reply: Reply, critique: ParsedCritique
) -> FeedbackRecord:
    """A contestant's critique of its own answer as `srt self-critique` would write it, unscored."""
    status, reason = status_of(reply), None
    if status != "ok":
        reason = str(reply.error) if status == "failed" else f"critique: {status}"
    elif critique.problems:
        status, reason = "unparsed", "critique: " + ", ".join(critique.problems)
    return FeedbackRecord(
        id=prompt.id, prompt=prompt.prompt, response=draft, feedback=critique.feedback,
        refinement=critique.refinement if status == "ok" else None, refinement_score=None,
        refinement_feedback=None, status=status, reason=reason, raw={"critique": reply.text},
        policy=contestant, critic=contestant, sample=0, round=1, usage=reply.usage,
    )  # fmt: skip


def refinement_uses(rounds: int) -> list[str]:
    """The names of each round's answer: refinement, refinement-2, refinement-3 ..."""
    return ["refinement", *(f"refinement-{number}" for number in range(2, rounds + 1))]


def is_outputs_file(spec: str) -> bool:
    """Whether a contestant is a file of outputs: JSONL, or AlpacaEval's model_outputs.json."""
    return spec.endswith((".jsonl", ".jsonl.gz", ".json"))


def read_outputs(path: Path, prompts: Sequence[Prompt], uses: Sequence[Use]) -> list[Output]:
    """Saved outputs: `response` or `output` (AlpacaEval), or a feedback file with its refinement.

    Joined to the prompts by id, else by the prompt's text. Raises `SrtError` when one is missing.
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
    return [
        _saved_output(path, prompt, rows[prompt.id] or {}, use)
        for prompt in prompts
        for use in uses
    ]


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
    return output_of(prompt.id, str(path), use, text if isinstance(text, str) else "", parsed)


def check_output(model: Model, prompt: Prompt, output: Output) -> Generator[Call, Reply, Output]:
    """Let a program say whether an output passes; what it cannot decide stays null."""
    task = Task("check", prompt, (output.response,))
    reply = yield Call(model, Request((), 0, task=task), f"{prompt.id} check")
    verdict = parse_preference(reply.text)
    if reply.finish_reason == "failed":
        raise SrtError(f"{reply.error} (prompt {prompt.id}). A check must decide every answer.")
    return output.model_copy(update={"passed": verdict == 1})


def score_output(
    critic: Critic, by: str, prompt: Prompt, output: Output
) -> Generator[Call, Reply, Scored]:
    """A blind score of one output: by its own writer in conversation, or by an outside critic."""
    what = output.contestant if output.use == "response" else f"{output.contestant}, {output.use}"
    name = f"{prompt.id} score of {what}"
    reply = yield critic.call("score", prompt, output.response, name)
    status = status_of(reply)
    score = parse_critique(reply.text, expect_refinement=False).score if status == "ok" else None
    if status == "ok" and score is None:
        status = "unparsed"
    raw = reply.text if reply.finish_reason != "failed" else str(reply.error)
    return Scored(
        id=prompt.id, contestant=output.contestant, use=output.use, by=by, score=score,
        status=status, raw=raw,
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

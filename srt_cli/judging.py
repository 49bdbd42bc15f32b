"""Contestants' outputs and judges' verdicts: what `srt eval` pays for."""

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from srt_cli.artifacts import read_rows
from srt_cli.calls import Call
from srt_cli.critique import Critic, Sampling, respond_call
from srt_cli.errors import SrtError
from srt_cli.models import Model, Reply, Request, Task
from srt_cli.options import RUNS_CODE_PREFIX
from srt_cli.records import Judgment, Output, Prompt, Status, Usage
from srt_cli.templates import judge_messages, parse_critique, parse_preference, parse_verdict

Use = Literal["response", "refinement"]
Order = Literal["ab", "ba"]
Orders = Literal["both", "one"]
JUDGE_TOKENS = 1024


@dataclass(frozen=True)
class Contestant:
    """A model in the contest: how it answers, and how it refines its own answers."""

    name: str
    model: Model
    drafts: Sampling
    critiques: Sampling


def answer(
    contestant: Contestant, prompt: Prompt, uses: Sequence[Use]
) -> Generator[Call, Reply, list[Output]]:
    """One prompt: the direct response and, if asked for, its refinement by the model itself."""
    reply = yield respond_call(contestant.model, contestant.drafts, prompt, sample=0)
    status = _status_of(reply)
    draft = reply.text.strip()
    outputs = []
    if "response" in uses:
        outputs.append(_output(prompt, contestant.name, "response", draft, None, status))
    if "refinement" in uses:
        refined, parsed = draft, False
        if draft:
            critic = Critic(contestant.model, contestant.critiques, in_conversation=True)
            reply = yield critic.call("critique", prompt, draft, f"{prompt.id} critique")
            critique = parse_critique(reply.text)
            if critique.refinement is not None and not critique.problems:
                refined, parsed = critique.refinement, True
        outputs.append(_output(prompt, contestant.name, "refinement", refined, parsed, status))
    return outputs


def _status_of(reply: Reply) -> Status:
    if reply.finish_reason == "length":
        return "truncated"
    if reply.finish_reason in ("refused", "failed"):
        return reply.finish_reason
    return "ok"


def _output(
    prompt: Prompt, name: str, use: Use, text: str, parsed: bool | None, status: Status
) -> Output:
    return Output(
        id=prompt.id,
        contestant=name,
        use=use,
        response=text,
        parsed=parsed,
        status=status,
        passed=None,
    )


def read_outputs(path: Path, prompts: Sequence[Prompt], uses: Sequence[Use]) -> Iterator[Output]:
    """Saved outputs: `response` or `output` (AlpacaEval), or a feedback file with its refinement.

    Joined to the prompts by id, else by the prompt's text. Raises `SrtError` when one is missing.
    """
    by_id: dict[str, dict[str, object]] = {}
    by_text: dict[str, dict[str, object]] = {}
    for _, row in read_rows(path):
        if "id" in row:
            by_id.setdefault(str(row["id"]), row)
        for name in ("prompt", "instruction"):
            if isinstance(row.get(name), str):
                by_text.setdefault(row[name], row)
    for prompt in prompts:
        found = by_id.get(prompt.id) or by_text.get(prompt.text)
        if found is None:
            raise SrtError(
                f"{path}: has no output for prompt {prompt.id!r}. "
                "Outputs are joined by id, or by the text of prompt or instruction."
            )
        for use in uses:
            names = ("response", "output") if use == "response" else ("refinement",)
            text = next((found[name] for name in names if isinstance(found.get(name), str)), None)
            if text is None and use == "refinement" and "refinement" not in found:
                raise SrtError(f"{path}: has no refinements. Leave out --use refinement for it.")
            parsed = None if use == "response" else text is not None
            fallback = found.get("response") or ""
            yield _output(
                prompt, str(path), use, str(text if text is not None else fallback), parsed, "ok"
            )


def check_output(model: Model, prompt: Prompt, output: Output) -> Generator[Call, Reply, Output]:
    """Let a program say whether an output passes; what it cannot decide stays null."""
    task = Task("check", prompt, (output.response,))
    reply = yield Call(model, Request((), 0, task=task), f"{prompt.id} check")
    verdict = parse_preference(reply.text)
    if reply.finish_reason == "failed":
        raise SrtError(f"{reply.error} (prompt {prompt.id}). A check must decide every answer.")
    return output.model_copy(update={"passed": verdict == 1})


def orders_of(prompt: Prompt, orders: Orders) -> tuple[Order, ...]:
    """In which orders a pair is shown: both, or the one that a digest of the prompt picks."""
    if orders == "both":
        return ("ab", "ba")
    coin = hashlib.sha256(prompt.text.encode()).digest()[0] % 2
    return ("ba",) if coin else ("ab",)


def judge_pair(
    judge: Model, prompt: Prompt, a: Output, b: Output, order: Order
) -> Generator[Call, Reply, Judgment]:
    """One verdict on two outputs in one order of presentation; a bad one is kept with its status."""
    first, second = (a, b) if order == "ab" else (b, a)
    request = Request(
        messages=tuple(judge_messages(prompt, first.response, second.response)),
        max_tokens=JUDGE_TOKENS,
        task=Task("judge", prompt, (first.response, second.response)),
    )
    reply = yield Call(judge, request, f"{prompt.id} verdict {order}")
    status = _status_of(reply)
    verdict, for_first = "none", None
    if status == "ok" and judge.spec.startswith(RUNS_CODE_PREFIX):
        for_first = parse_preference(reply.text)
        verdict = reply.text
    elif status == "ok":
        named = parse_verdict(reply.text)
        verdict = named or "none"
        for_first = {"first": 1.0, "second": 0.0, "tie": 0.5}[named] if named else None
    if status == "ok" and for_first is None:
        status = "unparsed"
    preference = for_first if for_first is None or order == "ab" else 1 - for_first
    return Judgment(
        id=prompt.id,
        a=f"{a.contestant} {a.use}",
        b=f"{b.contestant} {b.use}",
        order=order,
        preference=preference,
        verdict=verdict,
        status=status,
        raw=reply.text if reply.finish_reason != "failed" else str(reply.error),
        judge=judge.spec,
        usage=reply.usage if reply.usage else Usage(),
    )

"""Contestants' outputs and judges' verdicts: what `srt eval` pays for."""

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from srt_cli.artifacts import read_rows
from srt_cli.asking import Asking
from srt_cli.calls import Call
from srt_cli.critique import Critic, Sampling, respond_call
from srt_cli.errors import SrtError
from srt_cli.models import Model, Reply, Request, Task
from srt_cli.options import RUNS_CODE_PREFIX
from srt_cli.records import Judgment, Output, Prompt, Scored, Status
from srt_cli.templates import (
    LETTER_REQUIREMENTS,
    fill_judge_template,
    judge_messages,
    parse_critique,
    parse_letter_odds,
    parse_preference,
    parse_verdict,
)

Use = Literal["response", "refinement"]
Order = Literal["ab", "ba"]
Orders = Literal["both", "one"]
Verdicts = Literal["auto", "weighted", "reasoned"]
TOP_LOGPROBS: Final = 5


@dataclass(frozen=True)
class Contestant:
    """A model in the contest: how it answers, and how it refines its own answers."""

    name: str
    model: Model
    drafts: Sampling
    critiques: Sampling


def answer(
    contestant: Contestant, prompt: Prompt, uses: Sequence[Use], rounds: int = 1
) -> Generator[Call, Reply, list[Output]]:
    """One prompt: the direct response and, if asked for, its refinements by the model itself.

    Each round refines what the round before left; where a critique cannot be read, that stands.
    """
    reply = yield respond_call(contestant.model, contestant.drafts, prompt, sample=0)
    status = _status_of(reply)
    text = reply.text.strip()
    outputs = []
    if "response" in uses:
        outputs.append(output_of(prompt.id, contestant.name, "response", text, None, status))
    critic = Critic(contestant.model, contestant.critiques, in_conversation=True)
    for use in refinement_uses(rounds) if "refinement" in uses else ():
        parsed = False
        if text:
            reply = yield critic.call("critique", prompt, text, f"{prompt.id} critique, {use}")
            critique = parse_critique(reply.text)
            if critique.refinement is not None and not critique.problems:
                text, parsed = critique.refinement, True
        outputs.append(output_of(prompt.id, contestant.name, use, text, parsed, status))
    return outputs


def refinement_uses(rounds: int) -> list[str]:
    """The names of each round's answer: refinement, refinement-2, refinement-3 ..."""
    return ["refinement", *(f"refinement-{number}" for number in range(2, rounds + 1))]


def _status_of(reply: Reply) -> Status:
    if reply.finish_reason == "length":
        return "truncated"
    if reply.finish_reason in ("refused", "failed"):
        return reply.finish_reason
    return "ok"


def output_of(
    identifier: str,
    contestant: str,
    use: str,
    text: str,
    parsed: bool | None = None,
    status: Status = "ok",
) -> Output:
    """An output that nobody has checked yet; by default one that came from a file, whole."""
    return Output(
        id=identifier,
        contestant=contestant,
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
            answered = str(text if text is not None else fallback)
            yield output_of(prompt.id, str(path), use, answered, parsed)


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
    name = f"{prompt.id} score of {output.contestant}"
    reply = yield critic.call("score", prompt, output.response, name)
    status = _status_of(reply)
    score = parse_critique(reply.text, expect_refinement=False).score if status == "ok" else None
    if status == "ok" and score is None:
        status = "unparsed"
    raw = reply.text if reply.finish_reason != "failed" else str(reply.error)
    return Scored(
        id=prompt.id, contestant=output.contestant, by=by, score=score, status=status, raw=raw
    )


def orders_of(prompt: Prompt, orders: Orders) -> tuple[Order, ...]:
    """In which orders a pair is shown: both, or the one that a digest of the prompt picks."""
    if orders == "both":
        return ("ab", "ba")
    coin = hashlib.sha256(prompt.text.encode()).digest()[0] % 2
    return ("ba",) if coin else ("ab",)


@dataclass
class Judge:
    """A judge and its way of being asked."""

    model: Model
    verdicts: Verdicts = "auto"
    template: str | None = None
    max_tokens: int = 1024
    without_logprobs: bool = False
    """Found out by asking: this judge's replies come without log-probabilities."""

    @property
    def is_program(self) -> bool:
        """Whether the judge is code of the user's, which is handed the texts themselves."""
        return self.model.spec.startswith(RUNS_CODE_PREFIX)

    @property
    def asks_for_letter(self) -> bool:
        """Whether the next pair is judged by the odds of one letter."""
        if self.is_program or self.template is not None or self.verdicts == "reasoned":
            return False
        return self.verdicts == "weighted" or not self.without_logprobs


def judge_pair(
    judge: Judge, prompt: Prompt, a: Output, b: Output, order: Order
) -> Generator[Call, Reply, Judgment]:
    """One verdict on two outputs in one order of presentation; a bad one is kept with its status.

    The verdict is the odds of one letter where the judge gives log-probabilities, else a line behind
    its reasons.
    """
    first, second = (a, b) if order == "ab" else (b, a)
    task = Task("judge", prompt, (first.response, second.response))
    name = f"{prompt.id} verdict {order}"
    if judge.asks_for_letter:
        messages = judge_messages(prompt, first.response, second.response, LETTER_REQUIREMENTS)
        request = Request(tuple(messages), max_tokens=1, top_logprobs=TOP_LOGPROBS, task=task)
        reply = yield Call(judge.model, request, f"{name}, by a letter")
        odds = parse_letter_odds(reply.logprobs[0].top) if reply.logprobs else None
        judge.without_logprobs |= not reply.logprobs and reply.finish_reason != "failed"
        if odds is not None or judge.verdicts == "weighted" or reply.finish_reason == "failed":
            # One token is all there is to be: its end at the limit is no truncation.
            status = _status_of(reply) if reply.finish_reason != "length" else "ok"
            if status == "ok" and odds is None:
                status = "unparsed"
            verdict = "none" if odds is None else f"P(first) = {odds:.4f}"
            return _judgment(judge, prompt, a, b, order, odds, verdict, status, reply)
    if judge.template is not None:
        messages = fill_judge_template(judge.template, prompt, first.response, second.response)
    else:
        messages = judge_messages(prompt, first.response, second.response)
    reply = yield Call(
        judge.model, Request(tuple(messages), max_tokens=judge.max_tokens, task=task), name
    )
    status = _status_of(reply)
    verdict, for_first = "none", None
    if status == "ok" and judge.is_program:
        for_first = parse_preference(reply.text)
        verdict = reply.text
    elif status == "ok":
        named = parse_verdict(reply.text)
        verdict = named or "none"
        for_first = {"first": 1.0, "second": 0.0, "tie": 0.5}[named] if named else None
    if status == "ok" and for_first is None:
        status = "unparsed"
    return _judgment(judge, prompt, a, b, order, for_first, verdict, status, reply)


def _judgment(
    judge: Judge,
    prompt: Prompt,
    a: Output,
    b: Output,
    order: Order,
    for_first: float | None,
    verdict: str,
    status: Status,
    reply: Reply,
) -> Judgment:
    """The record of a verdict, un-swapped."""
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
        judge=judge.model.spec,
        usage=reply.usage,
    )


def judge_pairs(
    asking: Asking, label: str, judge: Judge, shown: Sequence[tuple[Prompt, Output, Output, Order]]
) -> list[Judgment]:
    """Have pairs judged, in the order given; the first alone tells whether the judge gives odds."""

    def ask(part: Sequence[tuple[Prompt, Output, Output, Order]]) -> list[Judgment]:
        return asking.ask(label, (judge_pair(judge, *pair) for pair in part), len(part))

    alone = 1 if judge.asks_for_letter and judge.verdicts == "auto" else 0
    return [*ask(shown[:alone]), *ask(shown[alone:])] if alone else ask(shown)

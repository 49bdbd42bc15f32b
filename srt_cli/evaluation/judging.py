"""How a judge is asked which of two outputs is better, and what becomes of its verdict."""

import hashlib
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from srt_cli import console
from srt_cli.calls.asking import Asking
from srt_cli.calls.conduct import Call
from srt_cli.models import Model, Reply, Request, Task
from srt_cli.records import Judgment, Output, Prompt, Status
from srt_cli.templates import (
    LETTER_REQUIREMENTS,
    fill_judge_template,
    judge_messages,
    parse_letter_odds,
    parse_preference,
    parse_verdict,
)

Order = Literal["ab", "ba"]
Orders = Literal["both", "one"]
Verdicts = Literal["auto", "weighted", "reasoned"]
TOP_LOGPROBS: Final = 5


def status_of(reply: Reply) -> Status:
    """How a reply ended, as the status of what is made of it."""
    if reply.finish_reason in ("length", "loop"):
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
    known: bool = False
    """Whether it was asked for a letter before, so that the above is known."""

    @property
    def asks_for_letter(self) -> bool:
        """Whether the next pair is judged by the odds of one letter."""
        if (
            not self.model.gives_logprobs
            or self.template is not None
            or self.verdicts == "reasoned"
        ):
            return False
        return self.verdicts == "weighted" or not self.without_logprobs


def judge_pair(
    judge: Judge, prompt: Prompt, a: Output, b: Output, order: Order, sample: int = 0
) -> Generator[Call, Reply, Judgment]:
    """One verdict on two outputs in one order of presentation; a bad one is kept with its status.

    The verdict is the odds of one letter where the judge gives log-probabilities, else a line behind
    its reasons. `sample` 1 asks the same a second time, whatever the journal holds.
    """
    first, second = (a, b) if order == "ab" else (b, a)
    task = Task("judge", prompt, (first.response, second.response))
    name = f"{prompt.id} verdict {order}" + (", once more" if sample else "")
    if judge.asks_for_letter:
        messages = judge_messages(prompt, first.response, second.response, LETTER_REQUIREMENTS)
        request = Request(
            tuple(messages), max_tokens=1, sample=sample, top_logprobs=TOP_LOGPROBS, task=task
        )
        reply = yield Call(judge.model, request, f"{name}, by a letter")
        odds = parse_letter_odds(reply.logprobs[0].top) if reply.logprobs else None
        judge.known = True
        judge.without_logprobs |= not reply.logprobs and reply.finish_reason != "failed"
        if odds is not None or judge.verdicts == "weighted" or reply.finish_reason == "failed":
            # One token is all there is to be: its end at the limit is no truncation.
            status = status_of(reply) if reply.finish_reason != "length" else "ok"
            if status == "ok" and odds is None:
                status = "unparsed"
            verdict = "none" if odds is None else f"P(first) = {odds:.4f}"
            return _judgment(judge, prompt, a, b, order, odds, verdict, status, reply)
    if judge.template is not None:
        messages = fill_judge_template(judge.template, prompt, first.response, second.response)
    else:
        messages = judge_messages(prompt, first.response, second.response)
    request = Request(tuple(messages), max_tokens=judge.max_tokens, sample=sample, task=task)
    reply = yield Call(judge.model, request, name)
    status = status_of(reply)
    verdict, for_first = "none", None
    if status == "ok" and judge.model.is_program:
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


Shown = tuple[Prompt, Output, Output, Order]


def judge_pairs(
    asking: Asking, label: str, judge: Judge, shown: Sequence[Shown], sample: int = 0
) -> list[Judgment]:
    """Have pairs judged, in the order given; the first alone tells whether the judge gives odds."""

    def ask(part: Sequence[Shown]) -> list[Judgment]:
        scripts = (judge_pair(judge, *pair, sample) for pair in part)
        return asking.ask(label, scripts, len(part)) if part else []

    alone = 1 if judge.asks_for_letter and not judge.known else 0
    first = ask(shown[:alone])
    if alone and judge.without_logprobs:
        _say_that_odds_are_missing(judge)
    return [*first, *ask(shown[alone:])]


def _say_that_odds_are_missing(judge: Judge) -> None:
    """Some servers take the wish for log-probabilities and leave it unheard."""
    if judge.verdicts == "weighted":
        console.warn(
            f"{judge.model.spec} gives no log-probabilities, which --verdicts weighted needs: no "
            "verdict can be read. Pass --verdicts reasoned, or auto."
        )
    else:
        console.say(
            f"{judge.model.spec} gives no log-probabilities: it is asked for reasons and a verdict "
            "line instead."
        )


Twice = tuple[Judgment, Judgment]
"""The first and the second answer to one question."""


def ask_again(
    asking: Asking,
    judge: Judge,
    shown: Sequence[Shown],
    judgments: Sequence[Judgment],
    count: int,
    seed: int,
) -> list[Twice]:
    """Put `count` of the questions, drawn with a seed, a second time, past the journal's first answers.

    `judgments` are those first answers, in the order of `shown`.
    """
    places = sorted(random.Random(seed).sample(range(len(shown)), min(count, len(shown))))
    label = f"once more by {judge.model.spec}"
    again = judge_pairs(asking, label, judge, [shown[place] for place in places], sample=1)
    return [(judgments[place], second) for place, second in zip(places, again, strict=True)]

"""How a judge is asked which of two outputs is better, and what becomes of its verdict."""

import hashlib
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

from srt_cli import console
from srt_cli.calls.asking import Asking
from srt_cli.calls.conduct import Call
from srt_cli.errors import UsageError
from srt_cli.feedback.critic import LEAST_SHARE, LETTER_LOGPROBS
from srt_cli.models import EVERYTHING, Model, Reply, Request, Task, Thinks
from srt_cli.records import Judgment, Output, Prompt, Status
from srt_cli.templates import (
    LETTER_REQUIREMENTS,
    fill_judge_template,
    judge_messages,
    parse_preference,
    parse_verdict,
    read_letter,
)

Order = Literal["ab", "ba"]
Orders = Literal["both", "one"]
Verdicts = Literal["auto", "weighted", "reasoned"]


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
    thinks: Thinks = Thinks()
    without_logprobs: bool = False
    """Found out by asking: this judge's replies come without log-probabilities."""
    known: bool = False
    """Whether it was asked for a letter before, so that the above is known."""
    shares: list[float] = field(default_factory=list)
    """What the letters held of the probability, in each verdict that was asked for by a letter."""

    def __post_init__(self) -> None:
        plain = not self.model.gives_logprobs and not self.model.is_program
        if self.verdicts == "weighted" and plain:
            raise UsageError(
                f"--verdicts weighted: {self.model.spec} gives no log-probabilities. Leave it out, or "
                "take another judge."
            )

    @property
    def asks_for_letter(self) -> bool:
        """Whether the next pair is judged by the odds of one letter."""
        if (
            not self.model.gives_logprobs
            or self.thinks.told == "on"
            or self.template is not None
            or self.verdicts == "reasoned"
        ):
            return False
        return self.verdicts == "weighted" or not self.without_logprobs


@dataclass(frozen=True)
class Shown:
    """Two outputs as a judge sees them: `a` first in the order "ab"."""

    prompt: Prompt
    a: Output
    b: Output
    order: Order

    @property
    def texts(self) -> tuple[str, str]:
        """What is shown first, and second."""
        first, second = (self.a, self.b) if self.order == "ab" else (self.b, self.a)
        return first.response, second.response


def judge_pair(judge: Judge, shown: Shown, sample: int = 0) -> Generator[Call, Reply, Judgment]:
    """One verdict on two outputs in one order of presentation; a bad one is kept with its status.

    The verdict is the odds of one letter where the judge gives log-probabilities, else a line behind
    its reasons. `sample` 1 asks the same a second time, whatever the journal holds.
    """
    prompt, texts = shown.prompt, shown.texts
    task = Task("judge", prompt, texts)
    name = f"{prompt.id} verdict {shown.order}" + (", once more" if sample else "")
    if judge.asks_for_letter:
        messages = judge_messages(prompt, *texts, LETTER_REQUIREMENTS)
        request = Request(
            tuple(messages), max_tokens=1, sample=sample, top_logprobs=LETTER_LOGPROBS,
            thinks=replace(judge.thinks, tokens=0), task=task,
        )  # fmt: skip
        reply = yield Call(judge.model, request, f"{name}, by a letter")
        share, odds = read_letter(reply.logprobs[0].top) if reply.logprobs else (0.0, None)
        if reply.logprobs:
            judge.shares.append(share)
        if share < LEAST_SHARE:
            odds = None
        judge.known = True
        judge.without_logprobs |= not reply.logprobs and reply.status != "failed"
        if odds is not None or judge.verdicts == "weighted" or reply.status == "failed":
            # One token is all there is to be: its end at the limit is no truncation.
            whole = reply.status == "truncated" and reply.text != ""
            status = "ok" if whole else reply.status
            words = "none" if odds is None else f"P(first) = {odds:.4f}"
            return _judgment(judge, shown, reply, _Heard(status, odds, words))
    if judge.template is not None:
        messages = fill_judge_template(judge.template, prompt, *texts)
    else:
        messages = judge_messages(prompt, *texts)
    room = judge.max_tokens + judge.thinks.tokens
    request = Request(
        tuple(messages), max_tokens=room, sample=sample, thinks=judge.thinks, task=task
    )
    reply = yield Call(judge.model, request, name)
    if judge.model.is_program:
        heard = _Heard(reply.status, parse_preference(reply.text), reply.text or "none")
    else:
        named = parse_verdict(reply.text)
        for_first = {"first": 1.0, "second": 0.0, "tie": 0.5}[named] if named else None
        heard = _Heard(reply.status, for_first, named or "none")
    return _judgment(judge, shown, reply, heard)


@dataclass(frozen=True)
class _Heard:
    """What a judge's reply says of the output that was shown first, if it is whole."""

    status: Status
    for_first: float | None
    words: str


def _judgment(judge: Judge, shown: Shown, reply: Reply, heard: _Heard) -> Judgment:
    """The record of a verdict, un-swapped."""
    preference = heard.for_first if heard.status == "ok" else None
    if preference is not None and shown.order == "ba":
        preference = 1 - preference
    unread = heard.status == "ok" and preference is None
    return Judgment(
        id=shown.prompt.id,
        a=str(shown.a.entrant),
        b=str(shown.b.entrant),
        order=shown.order,
        preference=preference,
        verdict=heard.words if heard.status == "ok" else "none",
        status="unparsed" if unread else heard.status,
        raw=reply.text if reply.status != "failed" else str(reply.error),
        thoughts=reply.thoughts,
        judge=judge.model.spec,
        usage=reply.usage,
    )


def judge_pairs(
    asking: Asking, label: str, judge: Judge, shown: Sequence[Shown], sample: int = 0
) -> list[Judgment]:
    """Have pairs judged, in the order given; the first alone tells whether the judge gives odds."""

    def ask(part: Sequence[Shown]) -> list[Judgment]:
        scripts = (judge_pair(judge, each, sample) for each in part)
        return asking.ask(label, scripts, len(part)) if part else []

    # What takes everything at once is not asked for one reply first: that may take a day.
    waits = judge.model.in_flight == EVERYTHING
    judge.shares.clear()
    alone = 1 if judge.asks_for_letter and not judge.known and not waits else 0
    judgments: list[Judgment] = []
    for part in (shown[:alone], shown[alone:]):
        knew = judge.without_logprobs
        judgments += ask(part)
        if judge.without_logprobs and not knew:
            _say_that_odds_are_missing(judge)
    _tell_shares(asking, label, judge)
    return judgments


def _tell_shares(asking: Asking, label: str, judge: Judge) -> None:
    """What the letters held goes into the manifest; where it is too little, the user hears of it."""
    if not judge.shares:
        return
    count, mean = len(judge.shares), fmean(judge.shares)
    weak = sum(share < LEAST_SHARE for share in judge.shares)
    if asking.run is not None:
        told = asking.run.manifest.tally("letter_shares", dict[str, dict[str, float]]) or {}
        shares = {"verdicts": count, "mean": round(mean, 4), "below_half": weak}
        asking.run.tally({"letter_shares": told | {label: shares}})
    if weak:
        then = (
            "no preference is read there. Pass --verdicts auto to have reasons asked for instead."
            if judge.verdicts == "weighted"
            else "there it is asked for reasons and a verdict line instead."
        )
        warn = asking.run.warn if asking.run is not None else console.warn
        warn(
            f"{label}: in {weak} of {count} verdicts the letters M and m hold less than half of the "
            f"probability (on average {mean:.0%}): {then}"
        )


def _say_that_odds_are_missing(judge: Judge) -> None:
    """Some servers accept `logprobs` but ignore it."""
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
    judged: Sequence[tuple[Shown, Judgment]],
    count: int,
    seed: int,
) -> list[Twice]:
    """Put `count` of a judge's questions, drawn with a seed, to it a second time."""
    places = sorted(random.Random(seed).sample(range(len(judged)), min(count, len(judged))))
    drawn = [judged[place] for place in places]
    label = f"once more by {judge.model.spec}"
    again = judge_pairs(asking, label, judge, [shown for shown, _ in drawn], sample=1)
    return [(first, second) for (_, first), second in zip(drawn, again, strict=True)]

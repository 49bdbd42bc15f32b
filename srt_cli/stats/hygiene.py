"""Outputs that look like answers and are none: empty, constant, copied, repeating."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from srt_cli.stats.rates import Estimate

NGRAM: Final = 4
MOST_REPEATED: Final = 0.5
MOST_COPIED: Final = 0.8
CONSTANT_SHARE: Final = 0.01
FEWEST_FOR_CONSTANT: Final = 20
RED_FLAG: Final = 0.05
# Parts of a critique, or a judge's or template's own marks, have no place in a final answer.
LEAKED: Final = (
    "overall score: [[", "### improved response", "<|im_start|>", "<|im_end|>", "model_identifier",
    "verdict: [[",
)  # fmt: skip
_REFUSAL: Final = re.compile(
    r"(?:i'?m sorry,? but|i am sorry,? but|i cannot|i can'?t|as an ai(?: language model)?,? i"
    r"|i'?m unable to|i am unable to)\b.{0,40}\b(?:assist|help|provide|fulfil|comply|answer|do that)"
)


@dataclass(frozen=True)
class Degenerate:
    """Share of outputs that are no answers, and how many for which reason (one may have several)."""

    rate: "Estimate | None"
    reasons: dict[str, int]

    @property
    def share(self) -> float:
        """The rate alone; 0 without outputs."""
        return self.rate.value if self.rate else 0.0

    @property
    def red_flag(self) -> bool:
        """Whether the share is large enough to doubt every other figure."""
        return self.share > RED_FLAG


def degenerate_outputs(prompts: Sequence[str], outputs: Sequence[str]) -> Degenerate:
    """Count empty, constant, copied, repeating, leaking and refusing outputs.

    Constant: the same normalised text in more than 1 % of the outputs (and at least twice, of 20 or
    more). Copied: over 80 % of the output's 4-grams stand in the prompt. Repeating: fewer than half
    of its 4-grams are different ones. Leaking: marks of a critique, a verdict or a chat template.
    Refusing: it begins by saying that it cannot help.
    """
    from srt_cli.stats.rates import pass_rate  # here, so that the faults of one text need no numpy

    normalised = [" ".join(output.lower().split()) for output in outputs]
    counts = Counter(normalised)
    limit = max(1.0, CONSTANT_SHARE * len(outputs))
    reasons: Counter[str] = Counter()
    bad: list[bool] = []
    for prompt, text in zip(prompts, normalised, strict=True):
        found = []
        if not text:
            found.append("empty")
        elif len(outputs) >= FEWEST_FOR_CONSTANT and counts[text] > limit:
            found.append("constant")
        grams = ngrams(text, NGRAM)
        found += _faults(text, grams)
        asked = set(ngrams(prompt.lower(), NGRAM))
        if grams and sum(gram in asked for gram in grams) / len(grams) > MOST_COPIED:
            found.append("copy of the prompt")
        reasons.update(found)
        bad.append(bool(found))
    return Degenerate(pass_rate(bad), dict(reasons))


def faults_of(text: str) -> list[str]:
    """What makes one text no answer by itself: repeating, leaking a template, refusing."""
    plain = " ".join(text.lower().split())
    return _faults(plain, ngrams(plain, NGRAM))


def _faults(plain: str, grams: Sequence[tuple[str, ...]]) -> list[str]:
    found = []
    if grams and len(set(grams)) / len(grams) < MOST_REPEATED:
        found.append("repeating")
    if any(mark in plain for mark in LEAKED):
        found.append("template leakage")
    if _REFUSAL.match(plain):
        found.append("refusal")
    return found


def ngrams(text: str, size: int) -> list[tuple[str, ...]]:
    """Runs of so many words, in their order."""
    words = re.findall(r"\w+", text)
    return [tuple(words[place : place + size]) for place in range(len(words) - size + 1)]

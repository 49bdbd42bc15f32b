"""How often is the chosen answer really the better one? An outside judge looks at a sample of pairs.

Preferences that a model writes about itself carry its errors. The audit estimates their share, which
a robust loss can then take into account (`srt dpo --loss-type robust --label-smoothing auto`).
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from srt_cli.calls.asking import Asking
from srt_cli.calls.options import ApiOptions
from srt_cli.errors import SrtError
from srt_cli.evaluation.judging import Judge, Order, Shown, judge_pairs
from srt_cli.models import Thinks
from srt_cli.pairs.pairing import Picker, Sample, Wanted, fingerprint_of, pair_key, text_key
from srt_cli.records import HandLabel, Judgment, Output, Preference, Prompt
from srt_cli.runs.jsonl import read_records
from srt_cli.runs.run import Run
from srt_cli.stats.rates import Estimate, pass_rate
from srt_cli.tables import Table, one_line, share_with_interval

FEWEST_FOR_A_BAND = 10
BAND_WIDTH = 0.25
"""Expected scores have gains of any size; whole ones are bands of their own."""
BothOrders = tuple[float | None, float | None]
"""Preferences for the chosen answer of a pair, shown first and shown second."""


@dataclass(frozen=True)
class GainBand:
    """Pairs of at least this gain: how often the judge agrees that the chosen one is better."""

    gain: float
    precision: Estimate
    decided_here: int
    """Pairs of this gain itself, up to the next band, of which the judge preferred one answer."""
    wrong_here: int
    """False accepts: those of them whose rejected answer is the better one."""


@dataclass(frozen=True)
class Audit:
    """What the judge said of the sample."""

    judge: str
    right: int
    wrong: int
    ties: int
    invalid: int
    """Pairs without a valid verdict in both orders."""
    precision: Estimate | None
    """Right among those where the judge preferred one, with Wilson's interval."""
    noise: float | None
    """1 - precision: the share of pairs whose labels should be the other way round."""
    from_gain: tuple[GainBand, ...]
    min_precision: float
    gain_to_ask_for: float | None
    """The smallest gain from which precision reaches `min_precision`; None when none does."""

    def table(self) -> Table:
        """Precision by the gain that is asked for, and false accepts at each gain."""
        cells = [
            [
                f"{band.gain:g}",
                share_with_interval(band.precision),
                str(band.precision.n),
                f"{band.wrong_here} of {band.decided_here}",
            ]
            for band in self.from_gain
        ]
        columns = ["gain", "right from here", "n", "wrong at this gain"]
        return Table("chosen is better, says the audit", columns, cells)

    def sentence(self) -> str:
        """The finding in one sentence."""
        counted = f"{self.right} right, {self.wrong} wrong, {self.ties} ties, {self.invalid} unread"
        if self.precision is None:
            return f"audit by {self.judge}: {counted}; nothing can be said of the labels"
        found = share_with_interval(self.precision)
        return f"audit by {self.judge}: {found} of the labels are right ({counted})"

    def warnings(self) -> list[str]:
        """What to do where labels are wrong, or pairs were left without a verdict."""
        warnings = []
        if not self.right + self.wrong + self.ties + self.invalid:
            warnings.append(f"{self.judge}: none of its pairs is among the kept ones.")
        if self.invalid:
            warnings.append(
                f"{self.invalid} audited pairs have no verdict; where a call failed, the same line asks "
                "for them again."
            )
        if self.precision is None or self.precision.value >= self.min_precision:
            return warnings
        advice = (
            f"--min-gain {self.gain_to_ask_for:g} reaches {self.min_precision:.0%}"
            if self.gain_to_ask_for is not None
            else f"no --min-gain reaches {self.min_precision:.0%}"
        )
        found = f"only {self.precision.value:.0%} of the labels are right; {advice}"
        if self.precision.value > 0.5:
            found += ". Or train with srt dpo --loss-type robust --label-smoothing auto"
        warnings.append(f"{found}.")
        return warnings


class Auditor:
    """Who looks at pairs from outside; what was said of a pair is not asked again."""

    def __init__(
        self,
        name: str,
        min_precision: float,
        ask: Callable[[Sequence[Preference]], list[BothOrders]],
        wanted: Collection[bytes] = (),
    ) -> None:
        self._name = name
        self._min_precision = min_precision
        self._ask = ask
        self._wanted = wanted
        self._verdicts: dict[bytes, BothOrders] = {}

    def picker(self, size: int, seed: int) -> Picker:
        """Picks the pairs that are known already; while none is, `size` of them at random."""
        known = self._wanted or self._verdicts
        return Wanted(known) if known else Sample(size, seed)

    def audit(self, pairs: Sequence[Preference]) -> Audit:
        """Have pairs looked at, and count what comes of it."""
        new = [pair for pair in pairs if fingerprint_of(pair) not in self._verdicts]
        if new:
            asked = zip(new, self._ask(new), strict=True)
            self._verdicts |= {fingerprint_of(pair): verdict for pair, verdict in asked}
        found = [verdict for pair in pairs for verdict in self._verdicts[fingerprint_of(pair)]]
        return count_audit(self._name, pairs, found, self._min_precision)


def outside_judge(spec: str, min_precision: float, run: Run, options: ApiOptions) -> Auditor:
    """A model that sees each pair in both orders, without a word of which one was chosen."""

    def ask(pairs: Sequence[Preference]) -> list[BothOrders]:
        if any(pair.source == spec for pair in pairs):
            run.warn(f"{spec} judges pairs that it scored itself: that it agrees says little.")
        with Asking.begin(run, options) as asking:
            judgments = _ask_judge(asking, spec, options.critic_thinks(), pairs)
        if without := why_without_verdict(judgments):
            run.warn(without)
        found = [judgment.preference for judgment in judgments]
        return list(zip(found[::2], found[1::2], strict=True))

    return Auditor(spec, min_precision, ask)


class HandLabels:
    """What people answered on the page of `--label-page`; the mean, where a pair was judged twice.

    A label names its pair and the better text by digests, so that neither the page nor its answers
    tell which text is the refinement, and nothing depends on which side a text was shown.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._better: dict[bytes, list[str | None]] = {}
        for label in read_records(path, HandLabel.model_validate):
            self._better.setdefault(bytes.fromhex(label.pair), []).append(label.better)

    @property
    def fingerprints(self) -> frozenset[bytes]:
        """The pairs that were judged."""
        return frozenset(self._better)

    def preference(self, pair: Preference) -> float | None:
        """1 where the chosen answer was called better, 0 where the other was, 0.5 for neither."""
        values = {
            text_key(pair.chosen[0].content): 1.0,
            text_key(pair.rejected[0].content): 0.0,
            None: 0.5,
        }
        given = self._better.get(fingerprint_of(pair), [])
        if any(better not in values for better in given):
            raise SrtError(
                f"{self.path}: the label of pair {pair_key(pair)} names neither of its texts. "
                "Was this file saved by the page that --label-page wrote?"
            )
        return sum(values[better] for better in given) / len(given) if given else None


def people(path: Path, min_precision: float) -> Auditor:
    """People who judged pairs on the page that `--label-page` writes."""
    labels = HandLabels(path)

    def ask(pairs: Sequence[Preference]) -> list[BothOrders]:
        found = [labels.preference(pair) for pair in pairs]
        return [(preference, preference) for preference in found]

    return Auditor(str(path), min_precision, ask, labels.fingerprints)


def _ask_judge(
    asking: Asking, spec: str, thinks: Thinks, pairs: Sequence[Preference]
) -> list[Judgment]:
    """The verdicts on each pair, in one order and then in the other."""
    orders: tuple[Order, ...] = ("ab", "ba")
    shown = [
        Shown(_prompt_of(pair), _output(pair, "chosen"), _output(pair, "rejected"), order)
        for pair in pairs
        for order in orders
    ]
    with asking.open(spec, as_critic=True) as model:
        return judge_pairs(asking, "auditing", Judge(model, thinks=thinks), shown)


def why_without_verdict(judgments: Sequence[Judgment]) -> str | None:
    """How many replies hold no verdict, and what the first of them says; None where all hold one."""
    without = [judgment for judgment in judgments if judgment.preference is None]
    if not without:
        return None
    counts = Counter(judgment.status for judgment in without)
    by_status = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return (
        f"{without[0].judge}: {len(without)} of {len(judgments)} replies hold no verdict ({by_status}); "
        f"the first one says: {one_line(without[0].raw)!r}"
    )


def count_audit(
    judge: str,
    pairs: Sequence[Preference],
    preferences: Sequence[float | None],
    min_precision: float,
) -> Audit:
    """Count preferences for the chosen answer, two a pair (both orders), in the order of the pairs."""
    decided: list[tuple[float, bool]] = []
    ties = invalid = 0
    for number, pair in enumerate(pairs):
        first, second = preferences[2 * number : 2 * number + 2]
        if first is None or second is None:
            invalid += 1
        elif first + second == 1:
            ties += 1
        else:
            decided.append((pair.gain or 0.0, first + second > 1))
    precision = pass_rate([right for _, right in decided])
    bands = []
    starts = sorted({math.floor(gain / BAND_WIDTH) * BAND_WIDTH for gain, _ in decided})
    for start, end in pairwise([*starts, math.inf]):
        band = pass_rate([right for gain, right in decided if gain >= start])
        here = [right for gain, right in decided if start <= gain < end]
        if band is not None and band.n >= FEWEST_FOR_A_BAND:
            bands.append(GainBand(start, band, len(here), here.count(False)))
    enough = (band.gain for band in bands if band.precision.value >= min_precision)
    right = sum(is_right for _, is_right in decided)
    return Audit(
        judge=judge,
        right=right,
        wrong=len(decided) - right,
        ties=ties,
        invalid=invalid,
        precision=precision,
        noise=None if precision is None else 1 - precision.value,
        from_gain=tuple(bands),
        min_precision=min_precision,
        gain_to_ask_for=next(enough, None),
    )


def _prompt_of(pair: Preference) -> Prompt:
    only = len(pair.prompt) == 1
    return Prompt(id=pair.id, prompt=pair.prompt[0].content if only else pair.prompt)


def _output(pair: Preference, side: str) -> Output:
    text = (pair.chosen if side == "chosen" else pair.rejected)[-1].content
    return Output(id=pair.id, contestant=side, use="response", response=text)

"""Everyone against the reference: the figures of each entrant, counted from outputs and judgments."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from srt_cli.evaluation.evidence import Evidence
from srt_cli.evaluation.verdicts import Comparison, Ruling, compare_all, count_verdicts
from srt_cli.records import Entrant, Judgment, Output
from srt_cli.stats.hygiene import Degenerate, degenerate_outputs
from srt_cli.stats.rates import (
    Estimate,
    PairedDifference,
    mean_with_error,
    paired_difference,
    pass_rate,
    rate_of,
    ratio_of_means,
)
from srt_cli.tables import short_names


@dataclass(frozen=True)
class Standing:
    """One entrant: every figure with its n."""

    contestant: str
    name: str
    """The contestant, short, and different from every other's."""
    use: str
    prompts: int
    pass_rate: Estimate | None
    parts: dict[str, Estimate]
    """Passes by named part of a check, over the prompts that have it, and by further checks."""
    difference: PairedDifference | None
    judged: tuple[Ruling, ...]
    """One a judge, in the order in which they were named; empty for the reference."""
    characters: Estimate | None
    """Mean length of an answer."""
    words: Estimate | None
    length_ratio: Estimate | None
    """To the reference, in characters."""
    parsed: Estimate | None
    degenerate: Degenerate
    cut: Estimate | None
    """Share of answers that the token limit cut off."""
    statuses: dict[str, int]

    @property
    def entrant(self) -> Entrant:
        """Whose figures these are."""
        return Entrant(self.contestant, self.use)

    @property
    def is_direct(self) -> bool:
        """Whether these are its first answers."""
        return self.use == "response"

    @property
    def label(self) -> str:
        """Contestant and kind of answer in one text."""
        return f"{self.name}, {self.entrant.kind}"


@dataclass(frozen=True)
class Contest:
    """All standings, the reference first."""

    reference: str
    judges: tuple[str, ...]
    check: str | None
    prompts: int
    rows: list[Standing]
    comparisons: list[Comparison]

    @property
    def coverage(self) -> float | None:
        """Share of judged pairs with valid verdicts; None without a judge."""
        rulings = [ruling for row in self.rows for ruling in row.judged]
        pairs = sum(ruling.pairs for ruling in rulings)
        return sum(ruling.valid_pairs for ruling in rulings) / pairs if pairs else None

    @property
    def labels(self) -> dict[Entrant, str]:
        """Each entrant's name, with its kind of answer where there are several kinds."""
        return labels_of(self.rows)

    def name_of_judge(self, judge: str) -> str:
        """A judge's name, short, and different from every other's."""
        return short_names(self.judges).get(judge, judge)


def labels_of(rows: Sequence[Standing]) -> dict[Entrant, str]:
    """Names of entrants for people: without the kind where all answer directly."""
    plain = all(row.use == "response" for row in rows)
    return {row.entrant: row.name if plain else row.label for row in rows}


def count_contest(evidence: Evidence) -> Contest:
    """Count everything; a standing covers the prompts that its entrant answered, in their order."""
    names = short_names([entrant.contestant for entrant in evidence.answers])
    verdicts: dict[tuple[Entrant, str], list[Judgment]] = {}
    for judgment in evidence.judgments:
        verdicts.setdefault((judgment.entrant, judgment.judge), []).append(judgment)
    rows = []
    for entrant, mine in evidence.answers.items():
        base = evidence.answers[evidence.base]
        opponents = [(p, mine[p.id], base[p.id]) for p in evidence.prompts if p.id in mine]
        rulings = tuple(
            count_verdicts(judge, evidence.orders, opponents, verdicts.get((entrant, judge), []))
            for judge in evidence.judges
            if entrant != evidence.base
        )
        rows.append(_standing(evidence, entrant, names[entrant.contestant], rulings))
    return Contest(
        evidence.reference,
        tuple(evidence.judges),
        evidence.check,
        len(evidence.prompts),
        rows,
        _compare(evidence, labels_of(rows)),
    )


def _compare(evidence: Evidence, labels: Mapping[Entrant, str]) -> list[Comparison]:
    """Every two entrants by the check and by each judge; the reference wins half against itself."""
    passed: dict[str, dict[str, float]] = {}
    for output in evidence.outputs:
        if output.passed is not None:
            passed.setdefault(labels[output.entrant], {})[output.id] = float(output.passed)
    found = compare_all("check", passed)
    for judge in dict.fromkeys(judge for _, judge in evidence.preferences):
        judged = {
            labels[entrant]: by_prompt
            for (entrant, by), by_prompt in evidence.preferences.items()
            if by == judge and entrant in labels
        }
        found += compare_all(judge, judged)
    return found


def _standing(
    evidence: Evidence, entrant: Entrant, name: str, rulings: tuple[Ruling, ...]
) -> Standing:
    answers = evidence.answers[entrant]
    prompts = [prompt for prompt in evidence.prompts if prompt.id in answers]
    mine = [answers[prompt.id] for prompt in prompts]
    base = evidence.answers[evidence.base] if entrant != evidence.base else {}
    theirs = [base[prompt.id] for prompt in prompts] if base else []
    passed = [float(output.passed) for output in mine if output.passed is not None]
    names = dict.fromkeys(name for output in mine for name in output.parts)
    difference = None
    if theirs and len(passed) == len(mine):
        difference = paired_difference(
            [float(output.passed or 0) for output in mine],
            [float(output.passed or 0) for output in theirs],
        )
    direct = evidence.answers.get(Entrant(entrant.contestant, "response"), {})
    characters = [float(len(output.response)) for output in mine]
    reference_characters = [float(len(output.response)) for output in theirs]
    any_length = (0.0, math.inf)
    return Standing(
        contestant=entrant.contestant,
        name=name,
        use=entrant.use,
        prompts=len(mine),
        pass_rate=rate_of(passed),
        parts={
            name: rate
            for name in names
            if (rate := rate_of([o.parts[name] for o in mine if name in o.parts])) is not None
        },
        difference=difference,
        judged=rulings,
        characters=mean_with_error(characters, any_length),
        words=mean_with_error([float(len(o.response.split())) for o in mine], any_length),
        length_ratio=ratio_of_means(characters, reference_characters) if theirs else None,
        parsed=pass_rate([o.parsed for o in mine if o.parsed is not None]),
        degenerate=degenerate_outputs(
            [prompt.text for prompt in prompts], [output.response for output in mine]
        ),
        cut=pass_rate([_is_cut(output, direct.get(output.id)) for output in mine]),
        statuses=dict(Counter(output.status for output in mine)),
    )


def _is_cut(output: Output, direct: Output | None) -> bool:
    """Whether the token limit cut this text off.

    Where a contestant's direct answer stands for a refinement that came to nothing, whatever the
    reason, the text is cut if that answer is.
    """
    if direct is not None and output.response == direct.response:
        return direct.status == "truncated"
    return output.status == "truncated"

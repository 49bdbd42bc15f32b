"""The figures of an evaluation, counted from outputs and judgments alone."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from srt_cli.evaluation.drift import Stage
from srt_cli.evaluation.judge_quality import (
    JudgesAgree,
    RepeatsItself,
    SelfPreference,
    judges_agree,
    self_preferences,
)
from srt_cli.evaluation.judging import Orders
from srt_cli.evaluation.labels import AgreesWithPeople
from srt_cli.evaluation.verdicts import (
    Comparison,
    Judged,
    compare_all,
    count_verdicts,
    preferences_by_pair,
)
from srt_cli.records import Judgment, Output, Prompt
from srt_cli.stats.hygiene import Degenerate, degenerate_outputs
from srt_cli.stats.rates import (
    Estimate,
    PairedDifference,
    mean_with_error,
    paired_difference,
    pass_rate,
    ratio_of_means,
)
from srt_cli.tables import short_names


@dataclass(frozen=True)
class Row:
    """One contestant and use: every figure with its n."""

    contestant: str
    name: str
    """The contestant, short, and different from every other's."""
    use: str
    prompts: int
    pass_rate: Estimate | None
    difference: PairedDifference | None
    judged: tuple[Judged, ...]
    """One a judge, in the order in which they were named; empty for the reference."""
    characters: Estimate | None
    """Mean length of an answer."""
    words: Estimate | None
    length_ratio: Estimate | None
    """To the reference, in characters."""
    parsed: Estimate | None
    degenerate: Degenerate
    statuses: dict[str, int]

    @property
    def kind(self) -> str:
        """`direct` for the first answer, `refined` behind the model's own critique, or more often."""
        if self.use == "response":
            return "direct"
        return "refined" + self.use.removeprefix("refinement").replace("-", " x")

    @property
    def label(self) -> str:
        """Contestant and kind in one text."""
        return f"{self.name}, {self.kind}"


@dataclass(frozen=True)
class Contest:
    """All rows, the reference first."""

    reference: str
    judges: tuple[str, ...]
    check: str | None
    prompts: int
    rows: list[Row]
    comparisons: list[Comparison]
    agreements: list[JudgesAgree]
    self_preferences: list[SelfPreference]
    """Contestants that judge, against judges that do not compete."""
    repeats: list[RepeatsItself] = field(default_factory=list)
    """The same questions asked twice, when that was asked for."""
    people: list[AgreesWithPeople] = field(default_factory=list)
    """How far judges and cheap rules agree with human labels, when there are labels."""
    stages: list[Stage] = field(default_factory=list)
    """The drift table, when scores, labelled pairs or objective results were given."""

    @property
    def coverage(self) -> float | None:
        """Share of judged pairs with valid verdicts; null without a judge."""
        judged = [each for row in self.rows for each in row.judged]
        pairs = sum(each.pairs for each in judged)
        return sum(each.valid_pairs for each in judged) / pairs if pairs else None

    @property
    def direct_only(self) -> bool:
        """Whether everyone answers directly, so that saying so of each tells nothing."""
        return all(row.use == "response" for row in self.rows)

    def name_of_judge(self, judge: str) -> str:
        """A judge's name, short, and different from every other's."""
        return short_names(self.judges).get(judge, judge)

    def label_of(self, row: Row) -> str:
        """A row's name, with what kind of answer it is where there are several kinds."""
        return row.name if self.direct_only else row.label

    def as_plain(self) -> dict[str, Any]:
        """For `eval.json`."""
        return dataclasses.asdict(self) | {"coverage": self.coverage}


def count_contest(
    prompts: Sequence[Prompt],
    outputs: Sequence[Output],
    judgments: Sequence[Judgment],
    reference: str,
    judges: Sequence[str],
    check: str | None,
    orders: Orders = "both",
) -> Contest:
    """Count everything; a row covers the prompts that its contestant answered, in their order."""
    groups: dict[tuple[str, str], dict[str, Output]] = {}
    for output in outputs:
        groups.setdefault((output.contestant, output.use), {})[output.id] = output
    base = groups[reference, "response"]
    names = short_names([contestant for contestant, _ in groups])
    verdicts: dict[tuple[str, str], list[Judgment]] = {}
    for judgment in judgments:
        verdicts.setdefault((judgment.a, judgment.judge), []).append(judgment)
    preferences = preferences_by_pair(judgments, orders)
    rows = []
    for (contestant, use), mine in groups.items():
        answered = [prompt for prompt in prompts if prompt.id in mine]
        judged = [
            count_verdicts(
                judge,
                orders,
                answered,
                mine,
                base,
                verdicts.get((f"{contestant} {use}", judge), []),
            )
            for judge in judges
            if mine is not base
        ]
        theirs = None if mine is base else base
        rows.append(_row(answered, names[contestant], mine, theirs, tuple(judged)))
    plain = all(row.use == "response" for row in rows)
    labels = {f"{row.contestant} {row.use}": row.name if plain else row.label for row in rows}
    return Contest(
        reference,
        tuple(judges),
        check,
        len(prompts),
        rows,
        _compare(labels, outputs, preferences),
        judges_agree(judges, preferences),
        self_preferences(judges, preferences, labels),
    )


def _compare(
    labels: Mapping[str, str],
    outputs: Sequence[Output],
    preferences: Mapping[tuple[str, str], Mapping[str, float]],
) -> list[Comparison]:
    """Every two contestants by the check and by each judge; the reference wins half against itself."""
    found = []
    passed: dict[str, dict[str, float]] = {}
    for output in outputs:
        if output.passed is not None:
            label = f"{output.contestant} {output.use}"
            passed.setdefault(label, {})[output.id] = float(output.passed)
    named = {labels[key]: values for key, values in passed.items()}
    found += compare_all("check", named)
    for judge in dict.fromkeys(judge for _, judge in preferences):
        judged = {
            labels[label]: by_prompt
            for (label, by), by_prompt in preferences.items()
            if by == judge and label in labels
        }
        found += compare_all(judge, judged)
    return found


def _row(
    prompts: Sequence[Prompt],
    name: str,
    by_id: Mapping[str, Output],
    base: Mapping[str, Output] | None,
    judged: tuple[Judged, ...],
) -> Row:
    mine = [by_id[prompt.id] for prompt in prompts]
    theirs = None if base is None else [base[prompt.id] for prompt in prompts]
    passed = [output.passed for output in mine if output.passed is not None]
    difference = None
    if theirs is not None and len(passed) == len(mine):
        difference = paired_difference(
            [float(bool(output.passed)) for output in mine],
            [float(bool(output.passed)) for output in theirs],
        )
    characters = [float(len(output.response)) for output in mine]
    reference_characters = [float(len(output.response)) for output in theirs or []]
    any_length = (0.0, math.inf)
    return Row(
        contestant=mine[0].contestant,
        name=name,
        use=mine[0].use,
        prompts=len(mine),
        pass_rate=pass_rate(passed),
        difference=difference,
        judged=judged,
        characters=mean_with_error(characters, any_length),
        words=mean_with_error([float(len(o.response.split())) for o in mine], any_length),
        length_ratio=ratio_of_means(characters, reference_characters) if theirs else None,
        parsed=pass_rate([o.parsed for o in mine if o.parsed is not None]),
        degenerate=degenerate_outputs(
            [prompt.text for prompt in prompts], [output.response for output in mine]
        ),
        statuses=dict(Counter(output.status for output in mine)),
    )

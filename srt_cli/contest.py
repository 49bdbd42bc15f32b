"""The figures of an evaluation, counted from outputs and judgments alone."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from srt_cli.drift import Stage, drift_table
from srt_cli.judging import Orders
from srt_cli.labels import AgreesWithPeople, kappa_with_interval, people_table
from srt_cli.records import Judgment, Output, Prompt
from srt_cli.stats.agreement import Agreement, agreement
from srt_cli.stats.hygiene import Degenerate, degenerate_outputs
from srt_cli.stats.rates import Estimate, PairedDifference, paired_difference, pass_rate
from srt_cli.tables import Table, share_with_interval, shorten
from srt_cli.verdicts import (
    Comparison,
    Judged,
    compare_all,
    count_verdicts,
    preferences_by_pair,
)


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
    mean_characters: float
    mean_words: float
    length_ratio: float | None
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
class JudgesAgree:
    """How often two judges said the same of the same pair."""

    first: str
    second: str
    agreement: Agreement


LC_NOTES: Final = {
    "alpaca_eval": "Equal length: the length-controlled win rate of AlpacaEval 2.",
    "generic": "Equal length: length-controlled with a generic prior; not comparable with AlpacaEval's.",
}


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
    people: list[AgreesWithPeople] = field(default_factory=list)
    """How far judges and cheap rules agree with human labels, when there are labels."""
    stages: list[Stage] = field(default_factory=list)
    """The drift table, when scores were asked for or objective results given."""

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

    def label_of(self, row: Row) -> str:
        """A row's name, with what kind of answer it is where there are several kinds."""
        return row.name if self.direct_only else row.label

    def as_plain(self) -> dict[str, Any]:
        """For `eval.json`."""
        return dataclasses.asdict(self) | {"coverage": self.coverage}

    def tables(self, *, brief: bool = False) -> list[Table]:
        """What the check found, and what the judges found; each when there was one.

        `brief` leaves out comparisons with the reference, which other columns show, and those of
        refined answers.
        """
        found = []
        if self.check:
            columns = ["", "", "passes [95 %]", "vs reference", "chars", "parses"]
            found.append(Table("passes the check", columns, [_check_cells(r) for r in self.rows]))
        for place, judge in enumerate(self.judges):
            cells = [
                [
                    shorten(row.name) if self.direct_only else f"{shorten(row.name)} {row.kind}",
                    *_judge_cells(row, row.judged[place]),
                ]
                for row in self.rows
                if row.judged
            ]
            columns = ["", "wins, %", "equal length", "W/T/L", "same twice", "degenerate"]
            title = "wins against the reference"
            found.append(Table(f"{title}, says {shorten(judge, 40)}", columns, cells))
        if len(self.rows) > 2 and self.comparisons:
            columns = ["", "difference [95 %]", "p (Holm)", "detectable"]
            shown = [each for each in self.comparisons if not brief or self._is_brief(each)]
            for by in dict.fromkeys(each.by for each in shown):
                cells = [_comparison_cells(each) for each in shown if each.by == by]
                found.append(Table(f"every two, paired, by {shorten(by, 40)}", columns, cells))
        if self.people:
            found.append(people_table(self.people))
        if self.stages:
            found.append(drift_table(self.stages))
        if self.agreements:
            columns = ["", "", "same verdict [95 %]", "without ties", "kappa [95 %]"]
            cells = [_agreement_cells(each) for each in self.agreements]
            found.append(Table("judges against each other", columns, cells))
        return found

    def _is_brief(self, comparison: Comparison) -> bool:
        rows = [row for row in self.rows[1:] if row.use == "response"]
        labels = {label for row in rows for label in (row.name, row.label)}
        return {comparison.a, comparison.b} <= labels

    def footnotes(self) -> list[str]:
        """What a reader needs to know to read the table rightly."""
        notes = [
            f"n = {self.prompts} prompts; reference: {self.rows[0].name}, direct; differences in "
            "points, paired over the same prompts."
        ]
        first = next((row.judged[0] for row in self.rows if row.judged), None)
        if first is not None:
            if first.length_controlled is not None:
                notes.append(LC_NOTES[first.length_controlled.mode])
            if first.orders == "one":
                notes.append("Each pair was judged in one order only: position bias is not seen.")
        if any(row.parsed and row.parsed.value < 1 for row in self.rows):
            notes.append("Where a critique does not parse, the draft stands for the refinement.")
        return notes

    def warnings(self) -> list[str]:
        """What should make a reader doubt a figure."""
        found = []
        for row in self.rows:
            if row.degenerate.red_flag:
                reasons = ", ".join(f"{n} {why}" for why, n in row.degenerate.reasons.items())
                found.append(
                    f"{self.label_of(row)}: {row.degenerate.share:.0%} of its outputs are degenerate "
                    f"({reasons}); its other figures mean little."
                )
            for judged in row.judged:
                found += [f"{self.label_of(row)}: {warning}." for warning in judged.warnings()]
            failed = row.statuses.get("failed", 0) + row.statuses.get("refused", 0)
            if failed:
                found.append(f"{self.label_of(row)}: {failed} answers failed or were refused.")
        found += [
            f"{stage.name}: {stage.echo.colour} alarm: {stage.echo.reason}."
            for stage in self.stages
            if stage.echo is not None and stage.echo.colour in ("red", "amber")
        ]
        return found


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
    names = _short_names([contestant for contestant, _ in groups])
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
    return Contest(
        reference,
        tuple(judges),
        check,
        len(prompts),
        rows,
        _compare(rows, outputs, preferences),
        _agreements(judges, preferences),
    )


def _short_names(contestants: Sequence[str]) -> dict[str, str]:
    """A file's stem, a directory's last two parts, a server's model; whole where two would agree."""

    def short(contestant: str) -> str:
        if contestant.startswith(("http://", "https://")):
            return contestant.rpartition("#")[2]
        path = Path(contestant)
        if not path.exists():
            return contestant
        return path.stem if path.suffix else "/".join(path.parts[-2:])

    names = {contestant: short(contestant) for contestant in contestants}
    often = Counter(names.values())
    return {full: name if often[name] == 1 else full for full, name in names.items()}


def _compare(
    rows: Sequence[Row],
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
    plain = all(row.use == "response" for row in rows)
    labels = {f"{row.contestant} {row.use}": row.name if plain else row.label for row in rows}
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


def _agreements(
    judges: Sequence[str], preferences: Mapping[tuple[str, str], Mapping[str, float]]
) -> list[JudgesAgree]:
    """The first judge against each other, over all pairs that both judged."""
    values: dict[str, dict[tuple[str, str], float]] = {judge: {} for judge in judges}
    for (label, judge), by_prompt in preferences.items():
        values[judge] |= {(label, name): value for name, value in by_prompt.items()}
    found = []
    for other in judges[1:]:
        common = [pair for pair in values[judges[0]] if pair in values[other]]
        agreed = agreement(
            [values[judges[0]][pair] for pair in common], [values[other][pair] for pair in common]
        )
        if agreed is not None:
            found.append(JudgesAgree(judges[0], other, agreed))
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
    characters = [len(output.response) for output in mine]
    reference_characters = sum(len(output.response) for output in theirs or [])
    return Row(
        contestant=mine[0].contestant,
        name=name,
        use=mine[0].use,
        prompts=len(mine),
        pass_rate=pass_rate(passed),
        difference=difference,
        judged=judged,
        mean_characters=sum(characters) / len(mine),
        mean_words=sum(len(output.response.split()) for output in mine) / len(mine),
        length_ratio=sum(characters) / reference_characters if reference_characters else None,
        parsed=pass_rate([o.parsed for o in mine if o.parsed is not None]),
        degenerate=degenerate_outputs(
            [prompt.text for prompt in prompts], [output.response for output in mine]
        ),
        statuses=dict(Counter(output.status for output in mine)),
    )


def _check_cells(row: Row) -> list[str]:
    parsed = f"{row.parsed.value:.0%}" if row.parsed else "-"
    return [
        shorten(row.name),
        row.kind,
        share_with_interval(row.pass_rate),
        _difference(row.difference),
        f"{row.mean_characters:.0f}",
        parsed,
    ]


def _judge_cells(row: Row, judged: Judged) -> list[str]:
    position, controlled = judged.position, judged.length_controlled
    return [
        _with_error(judged.win_rate),
        _with_error(controlled.rate if controlled else None),
        f"{judged.wins}/{judged.ties}/{judged.losses}",
        f"{position.consistency:.0%}" if position else "-",
        f"{row.degenerate.share:.0%}",
    ]


def _comparison_cells(comparison: Comparison) -> list[str]:
    paired = comparison.paired
    return [
        f"{shorten(comparison.a)} against {shorten(comparison.b)}",
        _difference(paired),
        f"{comparison.p_adjusted:.3f}" if comparison.p_adjusted >= 0.001 else "< 0.001",
        f"{100 * paired.smallest_detectable:.0f}",
    ]


def _agreement_cells(judges: JudgesAgree) -> list[str]:
    found = judges.agreement
    return [
        shorten(judges.first),
        f"and {shorten(judges.second)}",
        share_with_interval(found.accuracy),
        share_with_interval(found.without_ties),
        kappa_with_interval(found),
    ]


def _difference(paired: PairedDifference | None) -> str:
    if paired is None:
        return "-"
    found = paired.difference
    return f"{100 * found.value:+.0f} [{100 * found.low:+.0f}, {100 * found.high:+.0f}]"


def _with_error(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    error = f" ± {100 * estimate.standard_error:.1f}" if estimate.standard_error is not None else ""
    return f"{100 * estimate.value:.1f}{error}"

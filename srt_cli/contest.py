"""The figures of an evaluation, counted from outputs and judgments alone."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srt_cli.records import Judgment, Output, Prompt
from srt_cli.stats.hygiene import Degenerate, degenerate_outputs
from srt_cli.stats.rates import (
    Estimate,
    PairedDifference,
    Position,
    discrete_win_rate,
    paired_difference,
    pass_rate,
    position_bias,
    win_rate,
)

SHAKY_CONSISTENCY = 0.75


@dataclass(frozen=True)
class Judged:
    """What the judge said of one contestant against the reference."""

    win_rate: Estimate | None
    discrete_win_rate: float | None
    ties: int
    position: Position | None
    statuses: dict[str, int]
    pairs: int
    valid_pairs: int


@dataclass(frozen=True)
class Row:
    """One contestant and use: every figure with its n."""

    contestant: str
    use: str
    prompts: int
    pass_rate: Estimate | None
    difference: PairedDifference | None
    judged: Judged | None
    mean_characters: float
    mean_words: float
    length_ratio: float | None
    parsed: Estimate | None
    degenerate: Degenerate
    statuses: dict[str, int]

    @property
    def name(self) -> str:
        """The contestant, short enough for a table."""
        path = Path(self.contestant)
        if not path.exists():
            return self.contestant
        return path.stem if path.suffix else "/".join(path.parts[-2:])

    @property
    def kind(self) -> str:
        """`direct` for the first answer, `refined` for the one behind the model's own critique."""
        return "direct" if self.use == "response" else "refined"

    @property
    def label(self) -> str:
        """Contestant and kind in one text."""
        return f"{self.name}, {self.kind}"


@dataclass(frozen=True)
class Table:
    """A table for the terminal and the report."""

    title: str
    columns: list[str]
    cells: list[list[str]]


@dataclass(frozen=True)
class Contest:
    """All rows, the reference first."""

    reference: str
    judge: str | None
    check: str | None
    prompts: int
    rows: list[Row]

    @property
    def coverage(self) -> float | None:
        """Share of judged pairs with valid verdicts in both orders; null without a judge."""
        judged = [row.judged for row in self.rows if row.judged is not None]
        pairs = sum(each.pairs for each in judged)
        return sum(each.valid_pairs for each in judged) / pairs if pairs else None

    def as_plain(self) -> dict[str, Any]:
        """For `eval.json`."""
        return dataclasses.asdict(self) | {"coverage": self.coverage}

    def tables(self) -> list[Table]:
        """What the check found, and what the judge found; each when there was one."""
        found = []
        if self.check:
            columns = ["", "", "passes [95 %]", "vs reference", "chars", "parses"]
            found.append(Table("passes the check", columns, [_check_cells(r) for r in self.rows]))
        if self.judge:
            columns = ["", "", "wins ± SE", "ties", "same in both orders", "degenerate"]
            judged = [_judge_cells(row, row.judged) for row in self.rows if row.judged]
            found.append(Table("wins against the reference", columns, judged))
        return found

    def footnotes(self) -> list[str]:
        """What a reader needs to know to read the table rightly."""
        notes = [
            f"n = {self.prompts} prompts; reference: {self.rows[0].name}, direct; differences in "
            "points, paired over the same prompts."
        ]
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
                    f"{row.label}: {row.degenerate.share:.0%} of its outputs are degenerate "
                    f"({reasons}); its other figures mean little."
                )
            judged = row.judged
            if judged and judged.position and judged.position.consistency < SHAKY_CONSISTENCY:
                found.append(
                    f"{row.label}: the judge says the same in both orders in only "
                    f"{judged.position.consistency:.0%} of the pairs; its verdicts are shaky."
                )
            if judged and judged.valid_pairs < judged.pairs:
                bad = ", ".join(f"{n} {s}" for s, n in judged.statuses.items() if s != "ok")
                found.append(
                    f"{row.label}: {judged.pairs - judged.valid_pairs} of {judged.pairs} pairs have no "
                    f"valid verdict in both orders ({bad}) and are not scored."
                )
            failed = row.statuses.get("failed", 0) + row.statuses.get("refused", 0)
            if failed:
                found.append(f"{row.label}: {failed} answers failed or were refused.")
        return found


def count_contest(
    prompts: Sequence[Prompt],
    outputs: Sequence[Output],
    judgments: Sequence[Judgment],
    reference: str,
    judge: str | None,
    check: str | None,
) -> Contest:
    """Count everything; rows are aligned over the prompts, in their order."""
    groups: dict[tuple[str, str], dict[str, Output]] = {}
    for output in outputs:
        groups.setdefault((output.contestant, output.use), {})[output.id] = output
    base = groups[reference, "response"]
    rows = []
    for (contestant, use), by_id in groups.items():
        mine = [by_id[prompt.id] for prompt in prompts]
        theirs = None if by_id is base else [base[prompt.id] for prompt in prompts]
        verdicts = [j for j in judgments if j.a == f"{contestant} {use}"]
        rows.append(_row(prompts, mine, theirs, verdicts if judge and theirs else None))
    return Contest(reference, judge, check, len(prompts), rows)


def _row(
    prompts: Sequence[Prompt],
    mine: list[Output],
    theirs: list[Output] | None,
    verdicts: list[Judgment] | None,
) -> Row:
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
        use=mine[0].use,
        prompts=len(mine),
        pass_rate=pass_rate(passed),
        difference=difference,
        judged=_judged(prompts, verdicts) if verdicts is not None else None,
        mean_characters=sum(characters) / len(mine),
        mean_words=sum(len(output.response.split()) for output in mine) / len(mine),
        length_ratio=sum(characters) / reference_characters if reference_characters else None,
        parsed=pass_rate([o.parsed for o in mine if o.parsed is not None]),
        degenerate=degenerate_outputs(
            [prompt.text for prompt in prompts], [output.response for output in mine]
        ),
        statuses=dict(Counter(output.status for output in mine)),
    )


def _judged(prompts: Sequence[Prompt], verdicts: Sequence[Judgment]) -> Judged:
    """A pair counts only with a valid verdict in both orders; its value is the mean of the two."""
    by_order: dict[str, dict[str, float]] = {"ab": {}, "ba": {}}
    for verdict in verdicts:
        if verdict.preference is not None:
            by_order[verdict.order][verdict.id] = verdict.preference
    valid = [p.id for p in prompts if p.id in by_order["ab"] and p.id in by_order["ba"]]
    first = [by_order["ab"][identifier] for identifier in valid]
    second = [by_order["ba"][identifier] for identifier in valid]
    means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    return Judged(
        win_rate=win_rate(means),
        discrete_win_rate=discrete_win_rate(means),
        ties=sum(mean == 0.5 for mean in means),
        position=position_bias(first, second),
        statuses=dict(Counter(verdict.status for verdict in verdicts)),
        pairs=len(prompts),
        valid_pairs=len(valid),
    )


def _check_cells(row: Row) -> list[str]:
    parsed = f"{row.parsed.value:.0%}" if row.parsed else "-"
    return [
        shorten(row.name),
        row.kind,
        _interval(row.pass_rate),
        _difference(row.difference),
        f"{row.mean_characters:.0f}",
        parsed,
    ]


def _judge_cells(row: Row, judged: Judged) -> list[str]:
    position = judged.position
    return [
        shorten(row.name),
        row.kind,
        _with_error(judged.win_rate),
        f"{judged.ties}/{judged.valid_pairs}",
        f"{position.consistency:.0%}" if position else "-",
        f"{row.degenerate.share:.0%}",
    ]


def shorten(name: str, longest: int = 22) -> str:
    """A name cut in its middle, where the least is told."""
    if len(name) <= longest:
        return name
    kept = longest - 1
    return name[: kept - kept // 3] + "…" + name[-(kept // 3) :]


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.0%} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _difference(paired: PairedDifference | None) -> str:
    if paired is None:
        return "-"
    found = paired.difference
    return f"{100 * found.value:+.0f} [{100 * found.low:+.0f}, {100 * found.high:+.0f}]"


def _with_error(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    error = f" ± {100 * estimate.standard_error:.0f}" if estimate.standard_error is not None else ""
    return f"{100 * estimate.value:.0f}{error} %"

"""What people said of the same pairs: how often each judge, and each cheap rule, agrees with them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from srt_cli.errors import SrtError
from srt_cli.records import Output
from srt_cli.runs.jsonl import read_rows
from srt_cli.stats.agreement import Agreement, agreement
from srt_cli.stats.rates import Estimate
from srt_cli.tables import Table, score_with_error, share, share_with_interval, shorten

WORDS: Final = {"model": 1.0, "a": 1.0, "reference": 0.0, "b": 0.0, "tie": 0.5}
Labels = Mapping[tuple[str, str], float]
"""By contestant and use, and prompt: 1 for the contestant, 0 for the reference, 1/2 for a tie."""


@dataclass(frozen=True)
class AgreesWithPeople:
    """A judge, or a rule that needs no judge, against the labels."""

    who: str
    agreement: Agreement


def read_labels(path: Path, contestants: Sequence[str]) -> dict[tuple[str, str], float]:
    """Rows with `id`, `label` (model, reference, tie, or 0 to 1) and, with several contestants, `a`.

    `a` is a contestant's name, alone or with its use. Raises `SrtError` naming file and line.
    """
    labels = {}
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        if "id" not in row or "label" not in row:
            found = ", ".join(row) or "nothing"
            raise SrtError(f'{where}: needs "id" and "label" (found: {found}).')
        label = row["label"]
        value = WORDS.get(label.lower()) if isinstance(label, str) else label
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise SrtError(f"{where}: label {label!r} is none of {', '.join(WORDS)}, or 0 to 1.")
        name = str(row.get("a", contestants[0] if len(contestants) == 1 else ""))
        named = [each for each in contestants if name in (each, each.rpartition(" ")[0])]
        if not named:
            raise SrtError(
                f'{where}: which contestant? Give "a", one of: {", ".join(contestants)}.'
            )
        labels[named[0], str(row["id"])] = float(value)
    return labels


def agree_with_people(
    labels: Labels,
    preferences: Mapping[tuple[str, str], Mapping[str, float]],
    outputs: Sequence[Output],
    reference: str,
) -> list[AgreesWithPeople]:
    """Each judge, then the rules: the longer answer wins, the first shown wins, the usual label."""
    judges = list(dict.fromkeys(judge for _, judge in preferences))
    found = []
    for judge in judges:
        pairs = [
            (preferences[name, judge][item], label)
            for (name, item), label in labels.items()
            if item in preferences.get((name, judge), {})
        ]
        found.append((judge, pairs))
    texts = {(f"{o.contestant} {o.use}", o.id): o.response for o in outputs}
    base = f"{reference} response"
    known = {
        key: label for key, label in labels.items() if key in texts and (base, key[1]) in texts
    }
    longer = [
        (_longer(len(texts[name, item]), len(texts[base, item])), label)
        for (name, item), label in known.items()
    ]
    usual = Counter(known.values()).most_common(1)
    found.append(("the longer answer", longer))
    found.append(("the answer shown first", [(1.0, label) for label in known.values()]))
    found.append(("the usual label", [(usual[0][0], label) for label in known.values()]))
    return [
        AgreesWithPeople(who, agreed)
        for who, pairs in found
        if (agreed := agreement([p for p, _ in pairs], [label for _, label in pairs])) is not None
    ]


def _longer(mine: int, theirs: int) -> float:
    return 1.0 if mine > theirs else 0.0 if mine < theirs else 0.5


def people_table(found: Sequence[AgreesWithPeople], name: Callable[[str], str]) -> Table:
    """One row a judge or rule; `name` makes a judge's spec short."""
    columns = ["", "agrees [95 %]", "ties out", "kappa", "tau-b", "n"]
    cells = []
    for each in found:
        cells.append(
            [
                shorten(name(each.who), 24),
                share_with_interval(each.agreement.accuracy),
                share(each.agreement.without_ties),
                score_with_error(each.agreement.kappa),
                _figure(each.agreement.kendall),
                str(each.agreement.n),
            ]
        )
    return Table("agreement with people", columns, cells)


def _figure(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.2f}"

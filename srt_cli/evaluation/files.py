"""The files of an evaluation: what is written beside its figures, and what others judged or measured.

Judgments made elsewhere or earlier (AlpacaEval's, or ours) are read back without any model, human
labels and results of lm-evaluation-harness too; outputs and judgments are exported for AlpacaEval.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import orjson
from pydantic import ValidationError

from srt_cli.errors import SrtError, UsageError
from srt_cli.evaluation.evidence import Evidence, with_blind_scores
from srt_cli.evaluation.judging import Orders
from srt_cli.records import Entrant, Judgment, Output, Prompt, Record, Usage, content_id
from srt_cli.runs.jsonl import (
    OrderedWriter,
    describe_invalid,
    read_records,
    read_rows,
    write_json,
)
from srt_cli.stats.rates import Estimate
from srt_cli.tables import short_names

NEEDED: Final = ("instruction", "output_1", "output_2", "preference")
TEXTS: Final = ("instruction", "output_1", "output_2")
ANNOTATOR: Final = "annotations"
EXPORTED: Final = "srt"
LABELS: Final = {"model": 1.0, "a": 1.0, "reference": 0.0, "b": 0.0, "tie": 0.5}


def beside(out: Path, name: str) -> Path:
    """Where a further file of an evaluation goes: two in one folder do not overwrite each other."""
    return out.with_name(name if out.stem == "eval" else f"{out.stem}.{name}")


def write_evidence(out: Path, evidence: Evidence) -> None:
    """Write it as files beside the figures: outputs, judgments and, where there are any, the rest."""
    _write(out.with_name(out.stem + ".outputs.jsonl"), evidence.outputs)
    _write(beside(out, "judgments.jsonl"), evidence.judgments)
    again = [second for twice in evidence.repeats.values() for _, second in twice]
    if again:
        _write(out.with_name(out.stem + ".repeats.jsonl"), again)
    if evidence.scores:
        _write(out.with_name(out.stem + ".scores.jsonl"), evidence.scores)
    own = [record for records in evidence.critiques.values() for record in records]
    if own:
        scored = with_blind_scores(own, evidence.scores)
        _write(out.with_name(out.stem + ".feedback.jsonl"), scored)


def _write(path: Path, records: Iterable[Record]) -> None:
    writer = OrderedWriter(path)
    try:
        writer.add(0, records)
        writer.commit()
    finally:
        writer.discard()


@dataclass
class Annotations:
    """Saved judgments as a contest counts them: prompts, outputs and verdicts, each once."""

    prompts: dict[str, Prompt] = field(default_factory=dict)
    outputs: dict[tuple[Entrant, str], Output] = field(default_factory=dict)
    judgments: list[Judgment] = field(default_factory=list)
    reference: str | None = None
    repeated: int = 0
    """Rows that judge a pair which an earlier row judged; the last one counts."""
    orders: Orders = "one"

    @property
    def judges(self) -> list[str]:
        """Who judged, in the order in which they appear."""
        return list(dict.fromkeys(judgment.judge for judgment in self.judgments))


def read_annotations(paths: Sequence[Path]) -> Annotations:
    """Read files of AlpacaEval (`annotations.json`) or of ours (`judgments.jsonl`).

    Raises `SrtError` for another format, and for files that compare with different references.
    """
    found = Annotations()
    for path in paths:
        if path.suffix == ".jsonl" or path.name.endswith(".jsonl.gz"):
            _read_ours(path, found)
        else:
            _read_alpaca_eval(path, found)
    if not found.judgments:
        raise SrtError(f"{', '.join(map(str, paths))}: no judgment in there.")
    judged = {(each.id, each.a, each.judge, each.order) for each in found.judgments}
    found.repeated = len(found.judgments) - len(judged)
    return found


def _read_alpaca_eval(path: Path, found: Annotations) -> None:
    """AlpacaEval's list: `preference` from 1 (output_1, the reference) to 2; 0 is a draw."""
    try:
        rows = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise SrtError(f"{path}: no such file. Check the path.") from None
    except orjson.JSONDecodeError as error:
        raise SrtError(f"{path}: not valid JSON ({error.msg}). {_EXPECTED}") from None
    if not isinstance(rows, list) or not rows:
        raise SrtError(f"{path}: not a list of annotations. {_EXPECTED}")
    for number, row in enumerate(rows, start=1):
        missing = [name for name in NEEDED if not isinstance(row, dict) or name not in row]
        if missing:
            raise SrtError(f"{path}, row {number}: no {', '.join(missing)}. {_EXPECTED}")
        for name in TEXTS:
            if not isinstance(row[name], str):
                raise SrtError(
                    f"{path}, row {number}: {name} is {row[name]!r}, not a text. {_EXPECTED}"
                )
        reference = str(row.get("generator_1", "reference"))
        _set_reference(found, reference, path)
        model = str(row.get("generator_2", path.stem))
        if model == reference:
            model = f"{model} (itself)"
        text = str(row["instruction"])
        name = content_id(text)
        found.prompts.setdefault(name, Prompt(id=name, prompt=text))
        for contestant, output in ((reference, row["output_1"]), (model, row["output_2"])):
            answer = Output(id=name, contestant=contestant, use="response", response=output)
            _add_output(found, answer)
        value = row["preference"]
        preference = _preference_of(value, f"{path}, row {number}")
        found.judgments.append(
            Judgment(
                id=name, a=str(Entrant(model, "response")), b=str(Entrant(reference, "response")),
                order=_order_of(text, row.get("dataset")),
                preference=None if preference is None else (preference - 1 if preference else 0.5),
                verdict=str(value), status="unparsed" if preference is None else "ok",
                raw="", judge=str(row.get("annotator") or ANNOTATOR), usage=Usage(),
            )
        )  # fmt: skip


def _order_of(instruction: str, dataset: object) -> Literal["ab", "ba"]:
    """Whether the model was shown first, by AlpacaEval's coin: seeded by the instruction, seed 0.

    The file does not say it, but every annotator of AlpacaEval draws it so. What `srt eval` exports
    is of both orders, and all of it counts as one.
    """
    if dataset == EXPORTED:
        return "ab"
    coin = random.Random(f"is_switched_outputs{instruction}0")
    return "ab" if coin.choices([False, True])[0] else "ba"


def _preference_of(value: object, where: str) -> float | None:
    """A number from 1 to 2, or 0 for a draw; None where the judge said nothing that could be read."""
    if value is None or value != value or value == "":
        return None
    try:
        number = float(value) if isinstance(value, int | float | str) else -1.0
    except ValueError:
        number = -1.0
    if number != 0 and not 1 <= number <= 2:
        raise SrtError(f"{where}: preference {value!r} is not from 1 to 2. {_EXPECTED}")
    return number


_EXPECTED: Final = (
    "Expected AlpacaEval's annotations.json (a list with instruction, output_1, output_2, "
    "preference) or the judgments.jsonl of srt eval."
)


def _read_ours(path: Path, found: Annotations) -> None:
    """Our own judgments, with the outputs of their evaluation, which lie beside them."""
    own = _own_outputs(path)
    files = [own] if own.is_file() else sorted(path.parent.glob("*.outputs.jsonl"))
    texts = _texts_in(files)
    for number, row in read_rows(path):
        try:
            judgment = Judgment.model_validate(row)
        except ValidationError as error:
            reason = describe_invalid(error)
            raise SrtError(f"{path}:{number}: {reason} {_EXPECTED}") from None
        base = Entrant.read(judgment.b)
        _set_reference(found, base.contestant, path)
        found.prompts.setdefault(judgment.id, Prompt(id=judgment.id, prompt=judgment.id))
        for entrant in (base, judgment.entrant):
            known = list(texts.get((entrant, judgment.id), {}).values())
            if not known:
                where = own.name if files == [own] else f"{own.name} or any other *.outputs.jsonl"
                raise SrtError(
                    f"{path}: the output of {entrant} for {judgment.id!r} is not in {where} beside it. "
                    "Keep the files of srt eval together."
                )
            if len(known) > 1:
                raise SrtError(
                    f"{path}: {known[0][1].name} and {known[1][1].name} differ in the output of "
                    f"{entrant} for {judgment.id!r}, and {own.name}, which belongs to these judgments, "
                    "is not there. Put it back, or take the wrong one away."
                )
            _add_output(found, known[0][0])
        found.judgments.append(judgment)
    seen = {(judgment.id, judgment.a, judgment.judge) for judgment in found.judgments}
    if len(seen) < len(found.judgments):
        found.orders = "both"


def _own_outputs(judgments: Path) -> Path:
    """The outputs of the evaluation that wrote these judgments; `write_evidence` names both."""
    stem = judgments.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix("judgments")
    return judgments.with_name(f"{stem.removesuffix('.') or 'eval'}.outputs.jsonl")


def _texts_in(
    files: Sequence[Path],
) -> Mapping[tuple[Entrant, str], Mapping[str, tuple[Output, Path]]]:
    """By entrant and prompt: each different text in these files, with one that holds it."""
    found: dict[tuple[Entrant, str], dict[str, tuple[Output, Path]]] = {}
    for file in files:
        for output in read_records(file, Output.model_validate):
            known = found.setdefault((output.entrant, output.id), {})
            known.setdefault(output.response, (output, file))
    return found


def _add_output(found: Annotations, output: Output) -> None:
    known = found.outputs.setdefault((output.entrant, output.id), output)
    if known.response != output.response:
        raise SrtError(
            f"{output.contestant} has two different outputs for one prompt ({output.response[:40]!r}"
            "...). Are these files of different runs under one name?"
        )


def _set_reference(found: Annotations, reference: str, path: Path) -> None:
    if found.reference is not None and found.reference != reference:
        raise SrtError(
            f"{path}: compares with {reference}, the files before it with {found.reference}. "
            "Give files with one reference."
        )
    found.reference = reference


def export_alpaca_eval(folder: Path, evidence: Evidence) -> list[Path]:
    """Write each entrant's `model_outputs.json` and, where judged, `annotations.json`.

    AlpacaEval's preferences run from 1 to 2.
    """
    texts = {prompt.id: prompt.text for prompt in evidence.prompts}
    base = evidence.answers[evidence.base]
    written = []
    for entrant, mine in evidence.answers.items():
        name = str(entrant)
        own = folder / re.sub(r"[^\w.-]+", "-", name).strip("-")
        answers = [
            {
                "dataset": EXPORTED,
                "instruction": texts[key],
                "output": o.response,
                "generator": name,
            }
            for key, o in mine.items()
        ]
        write_json(own / "model_outputs.json", answers)
        written.append(own / "model_outputs.json")
        rows = [
            {
                "dataset": EXPORTED,
                "instruction": texts[key],
                "output_1": base[key].response,
                "generator_1": evidence.reference,
                "output_2": mine[key].response,
                "generator_2": name,
                "annotator": judge,
                "preference": 1 + value,
            }
            for (judged, judge), by_prompt in evidence.preferences.items()
            if judged == entrant
            for key, value in by_prompt.items()
        ]
        if rows:
            write_json(own / "annotations.json", rows)
            written.append(own / "annotations.json")
    return written


def read_labels(path: Path, entrants: Sequence[Entrant]) -> dict[tuple[Entrant, str], float]:
    """Rows with `id`, `label` (model, reference, tie, or 0 to 1) and, with several entrants, `a`.

    `a` is a contestant's name, alone or with its use. Raises `SrtError` naming file and line.
    """
    labels = {}
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        if "id" not in row or "label" not in row:
            found = ", ".join(row) or "nothing"
            raise SrtError(f'{where}: needs "id" and "label" (found: {found}).')
        label = row["label"]
        value = LABELS.get(label.lower()) if isinstance(label, str) else label
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise SrtError(f"{where}: label {label!r} is none of {', '.join(LABELS)}, or 0 to 1.")
        name = str(row.get("a", entrants[0] if len(entrants) == 1 else ""))
        named = [each for each in entrants if name in (str(each), each.contestant)]
        if not named:
            known = ", ".join(map(str, entrants))
            raise SrtError(f'{where}: which contestant? Give "a", one of: {known}.')
        labels[named[0], str(row["id"])] = float(value)
    return labels


def read_objective(
    given: Sequence[str], contestants: Sequence[str]
) -> dict[str, dict[str, Estimate]]:
    """`--objective MODEL=results.json`: results of lm-evaluation-harness, by contestant.

    MODEL is a contestant as it was named, or its short name in the tables.

    Raises `UsageError` for a wrong form and `SrtError` for a file that is no such result.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for text in given:
        name, equals, file = text.rpartition("=")
        if not equals:
            raise UsageError(f"--objective {text}: write MODEL=results.json.")
        short = short_names(contestants)
        named = [each for each in contestants if name in (each, short[each])]
        if not named:
            raise UsageError(
                f"--objective {text}: {name} is no contestant. Name one of: {', '.join(contestants)}."
            )
        path = Path(file)
        try:
            document = orjson.loads(path.read_bytes())
            samples = document.get("n-samples") or {}
            found.setdefault(named[0], {}).update(_tasks_of(document["results"], samples))
        except FileNotFoundError:
            raise SrtError(f"{path}: no such file. Check the path.") from None
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise SrtError(
                f"{path}: not a result of lm-evaluation-harness (no results by task). Give the JSON "
                "file that lm_eval writes under --output_path."
            ) from None
    return found


def _tasks_of(
    results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Mapping[str, Any]]
) -> dict[str, Estimate]:
    """Each task's first metric, with its standard error, a normal interval, and the samples if told."""
    found = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, float | int) or isinstance(value, bool):
                continue
            if "_stderr" in metric or not kind:  # without a filter's name it is no metric
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            known = float(error) if isinstance(error, float | int) else None
            reach = 1.96 * (known or 0.0)
            n = metrics.get("sample_len") or samples.get(task, {}).get("effective") or 0
            name = f"{task} {metric}"
            found[name] = Estimate(float(value), value - reach, value + reach, int(n), known)
            break
    return found

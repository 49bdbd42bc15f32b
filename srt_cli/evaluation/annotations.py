"""Judgments made elsewhere or earlier, read back so that they can be counted without any model."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import orjson
from pydantic import ValidationError

from srt_cli.errors import SrtError
from srt_cli.evaluation.judging import Orders, output_of
from srt_cli.records import Judgment, Output, Prompt, Usage, content_id
from srt_cli.runs.jsonl import describe_invalid, read_records, read_rows, write_json

NEEDED: Final = ("instruction", "output_1", "output_2", "preference")
TEXTS: Final = ("instruction", "output_1", "output_2")
ANNOTATOR: Final = "annotations"
EXPORTED: Final = "srt"


@dataclass
class Annotations:
    """Saved judgments as a contest counts them: prompts, outputs and verdicts, each once."""

    prompts: dict[str, Prompt] = field(default_factory=dict)
    outputs: dict[tuple[str, str, str], Output] = field(default_factory=dict)
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
        _add_output(found, name, reference, str(row["output_1"]))
        _add_output(found, name, model, str(row["output_2"]))
        value = row["preference"]
        preference = _preference_of(value, f"{path}, row {number}")
        found.judgments.append(
            Judgment(
                id=name, a=f"{model} response", b=f"{reference} response",
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
    """A number from 1 to 2, or 0 for a draw; null where the judge said nothing that could be read."""
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
    """Our own judgments, with the outputs that lie beside them."""
    texts = _outputs_beside(path)
    for number, row in read_rows(path):
        try:
            judgment = Judgment.model_validate(row)
        except ValidationError as error:
            reason = describe_invalid(error)
            raise SrtError(f"{path}:{number}: {reason} {_EXPECTED}") from None
        reference, _, _ = judgment.b.rpartition(" ")
        _set_reference(found, reference, path)
        found.prompts.setdefault(judgment.id, Prompt(id=judgment.id, prompt=judgment.id))
        for side in (judgment.b, judgment.a):
            contestant, _, use = side.rpartition(" ")
            output = texts.get((contestant, use, judgment.id))
            if output is None:
                raise SrtError(
                    f"{path}: the output of {side} for {judgment.id!r} is in no *.outputs.jsonl "
                    "beside it. Keep the files of srt eval together."
                )
            found.outputs.setdefault((contestant, use, judgment.id), output)
        found.judgments.append(judgment)
    seen = {(judgment.id, judgment.a, judgment.judge) for judgment in found.judgments}
    if len(seen) < len(found.judgments):
        found.orders = "both"


def _outputs_beside(path: Path) -> Mapping[tuple[str, str, str], Output]:
    beside: dict[tuple[str, str, str], Output] = {}
    for file in sorted(path.parent.glob("*.outputs.jsonl")):
        for output in read_records(file, Output.model_validate):
            beside[output.contestant, output.use, output.id] = output
    return beside


def _add_output(found: Annotations, name: str, contestant: str, text: str) -> None:
    key = (contestant, "response", name)
    known = found.outputs.get(key)
    if known is not None and known.response != text:
        raise SrtError(
            f"{contestant} has two different outputs for one instruction ({text[:40]!r}...). Are "
            "these files of different runs under one name?"
        )
    found.outputs[key] = output_of(name, contestant, "response", text)


def _set_reference(found: Annotations, reference: str, path: Path) -> None:
    if found.reference is not None and found.reference != reference:
        raise SrtError(
            f"{path}: compares with {reference}, the files before it with {found.reference}. "
            "Give files with one reference."
        )
    found.reference = reference


def export_alpaca_eval(
    folder: Path,
    prompts: Sequence[Prompt],
    outputs: Sequence[Output],
    preferences: Mapping[tuple[str, str], Mapping[str, float]],
    reference: str,
) -> list[Path]:
    """Write each contestant's `model_outputs.json` and, where judged, `annotations.json`.

    `preferences` are per (contestant and use, judge) and prompt, 0 to 1; AlpacaEval's run 1 to 2.
    """
    texts = {prompt.id: prompt.text for prompt in prompts}
    groups: dict[str, dict[str, Output]] = {}
    for output in outputs:
        groups.setdefault(f"{output.contestant} {output.use}", {})[output.id] = output
    base = groups[f"{reference} response"]
    written = []
    for name, mine in groups.items():
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
                "generator_1": reference,
                "output_2": mine[key].response,
                "generator_2": name,
                "annotator": judge,
                "preference": 1 + value,
            }
            for (label, judge), by_prompt in preferences.items()
            if label == name
            for key, value in by_prompt.items()
        ]
        if rows:
            write_json(own / "annotations.json", rows)
            written.append(own / "annotations.json")
    return written

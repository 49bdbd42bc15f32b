"""Results of lm-evaluation-harness, for the columns of the drift table that no judge decides."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from srt_cli.errors import SrtError, UsageError
from srt_cli.stats.rates import Estimate
from srt_cli.tables import short_names


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

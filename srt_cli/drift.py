"""The drift table: one row a stage, and whether its critic still tells what an outside judge sees."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from srt_cli.errors import SrtError, UsageError
from srt_cli.records import MAX_SCORE, MIN_SCORE, Output, Scored
from srt_cli.stats.drift import Echo, SelfBias, distinct_pairs, echo_alarm, self_bias
from srt_cli.stats.rates import Estimate, mean_with_error
from srt_cli.tables import Table, shorten

if TYPE_CHECKING:
    from srt_cli.contest import Contest, Row


@dataclass(frozen=True)
class Stage:
    """One stage: what it wins, how long it writes, what it says of itself, what others say of it."""

    name: str
    win_rate: Estimate | None
    equal_length: Estimate | None
    length_to_previous: float | None
    own_score: Estimate | None
    outside_score: Estimate | None
    bias: SelfBias | None
    own_histogram: dict[str, int]
    """How many answers got each score from their own model."""
    outside_histogram: dict[str, int]
    top_share: float | None
    """Share of its own scores that are the highest possible."""
    distinct_pairs: float | None
    degenerate: float
    objective: dict[str, Estimate]
    """Results of lm-evaluation-harness, by task and metric."""
    echo: Echo | None
    """Against the stage before; null for the first."""


def drift_of(
    contest: "Contest",
    outputs: Sequence[Output],
    scores: Sequence[Scored],
    objective: Mapping[str, Mapping[str, Estimate]],
) -> list[Stage]:
    """One row for each contestant's direct answers, in the order in which they were named."""
    texts: dict[str, list[str]] = {}
    for output in outputs:
        if output.use == "response":
            texts.setdefault(output.contestant, []).append(output.response)
    own: dict[str, dict[str, float]] = {}
    outside: dict[str, dict[str, float]] = {}
    for scored in scores:
        if scored.score is not None:
            kind = own if scored.by == scored.contestant else outside
            kind.setdefault(scored.contestant, {})[scored.id] = scored.score
    stages: list[Stage] = []
    previous: Row | None = None
    for row in (row for row in contest.rows if row.use == "response"):
        mine, theirs = own.get(row.contestant, {}), outside.get(row.contestant, {})
        both = [name for name in mine if name in theirs]
        diversity = distinct_pairs(texts.get(row.contestant, []))
        growth = None
        if previous is not None and previous.mean_characters > 0:
            growth = row.mean_characters / previous.mean_characters
        echo = None
        if previous is not None and scores:
            before = own.get(previous.contestant, {}), outside.get(previous.contestant, {})
            items = [name for name in both if name in before[0] and name in before[1]]
            last = stages[-1].distinct_pairs
            echo = echo_alarm(
                [before[0][name] for name in items],
                [mine[name] for name in items],
                [before[1][name] for name in items],
                [theirs[name] for name in items],
                length_growth=growth,
                equal_length_gain=_equal_length(row) - _equal_length(previous),
                diversity_change=diversity / last if diversity and last else None,
            )
        judged = row.judged[0] if row.judged else None
        controlled = judged.length_controlled if judged else None
        stages.append(
            Stage(
                name=row.name,
                win_rate=judged.win_rate if judged else None,
                equal_length=controlled.rate if controlled else None,
                length_to_previous=growth,
                own_score=mean_with_error(list(mine.values())),
                outside_score=mean_with_error(list(theirs.values())),
                bias=self_bias([mine[name] for name in both], [theirs[name] for name in both]),
                own_histogram=_histogram(mine.values()),
                outside_histogram=_histogram(theirs.values()),
                top_share=_share_at_top(list(mine.values())),
                distinct_pairs=diversity,
                degenerate=row.degenerate.share,
                objective=dict(objective.get(row.contestant, {})),
                echo=echo,
            )
        )
        previous = row
    return stages


def _equal_length(row: "Row") -> float:
    """Wins at equal length; the reference itself stands at one half."""
    controlled = row.judged[0].length_controlled if row.judged else None
    return controlled.rate.value if controlled else 0.5


def _share_at_top(scores: Sequence[float]) -> float | None:
    return sum(score == MAX_SCORE for score in scores) / len(scores) if scores else None


def _histogram(scores: Iterable[float]) -> dict[str, int]:
    """Counts by score, every whole score from 1 to 10 among them."""
    counts = Counter({f"{score:g}": 0 for score in range(MIN_SCORE, MAX_SCORE + 1)})
    counts.update(f"{score:g}" for score in scores)
    return dict(counts) if counts.total() else {}


def drift_table(stages: Sequence[Stage]) -> Table:
    """The table for the terminal and the page."""
    columns = ["", "wins, %", "equal length", "chars", "own score", "outside", "bias", "alarm"]
    tasks = list(dict.fromkeys(task for stage in stages for task in stage.objective))
    cells = [
        [
            shorten(stage.name),
            _percent(stage.win_rate),
            _percent(stage.equal_length),
            "-" if stage.length_to_previous is None else f"x{stage.length_to_previous:.2f}",
            _score(stage.own_score),
            _score(stage.outside_score),
            _score(stage.bias.bias, "+") if stage.bias else "-",
            stage.echo.colour if stage.echo else "-",
            *(_percent(stage.objective.get(task)) for task in tasks),
        ]
        for stage in stages
    ]
    return Table("drift, stage by stage", columns + tasks, cells)


def _percent(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{100 * estimate.value:.1f}"


def _score(estimate: Estimate | None, sign: str = "") -> str:
    return "-" if estimate is None else f"{estimate.value:{sign}.2f}"


def read_objective(given: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """`--objective MODEL=results.json`: results of lm-evaluation-harness, by contestant.

    Raises `UsageError` for a wrong form and `SrtError` for a file that is no such result.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for text in given:
        name, equals, file = text.rpartition("=")
        if not equals:
            raise UsageError(f"--objective {text}: write MODEL=results.json.")
        path = Path(file)
        try:
            results = orjson.loads(path.read_bytes())["results"]
            found.setdefault(name, {}).update(_tasks_of(results))
        except FileNotFoundError:
            raise SrtError(f"{path}: no such file. Check the path.") from None
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise SrtError(
                f"{path}: not a result of lm-evaluation-harness (no results by task). Give the JSON "
                "file that lm_eval writes under --output_path."
            ) from None
    return found


def _tasks_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    """Each task's first metric, with its standard error and a normal interval."""
    found = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, float | int) or isinstance(value, bool) or "_stderr" in metric:
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            known = float(error) if isinstance(error, float | int) else None
            reach = 1.96 * (known or 0.0)
            name = f"{task} {metric}"
            found[name] = Estimate(float(value), value - reach, value + reach, 0, known)
            break
    return found

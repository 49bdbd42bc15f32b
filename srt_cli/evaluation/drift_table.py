"""The drift table: figures as rows, stages as columns, so that it fits a terminal."""

from collections.abc import Callable, Sequence
from itertools import chain

from srt_cli.evaluation.critic_quality import AgainstOutside
from srt_cli.evaluation.drift import Stage
from srt_cli.stats.rates import Estimate
from srt_cli.tables import (
    Table,
    p_value,
    score_with_error,
    share_with_error,
    share_with_interval,
    shorten,
)

MOST_STAGES = 4
"""Columns beside each other on the terminal; further stages go into a further table."""

Figure = Callable[[Stage], Estimate | None]
Form = Callable[[Estimate | None], str]


def drift_tables(stages: Sequence[Stage]) -> list[Table]:
    """Tables of at most four stages each; rows that no stage has a figure for are left out."""
    parts = [stages[at : at + MOST_STAGES] for at in range(0, len(stages), MOST_STAGES)]
    return [_table(part) for part in parts]


def alarm_notes(stages: Sequence[Stage]) -> list[str]:
    """Each stage's alarm with its reason, a sentence each."""
    return [
        f"{stage.name}, {stage.echo.colour}: {stage.echo.reason}."
        for stage in stages
        if stage.echo is not None
    ]


def _table(stages: Sequence[Stage]) -> Table:
    rows = []
    for label, figure, form in _rows(stages):
        found = [figure(stage) for stage in stages]
        if any(found):
            rows.append([label, *map(form, found), _counts(found)])
        if figure is _step:
            steps = [stage.to_previous for stage in stages]
            if any(steps):
                ps = [p_value(step.p_adjusted) if step else "-" for step in steps]
                rows.append(["  p, McNemar (Holm)", *ps, ""])
        if figure is _pairs_right:
            falls = [stage.pairs_to_previous for stage in stages]
            if any(falls):
                ps = [p_value(fall.p_value) if fall else "-" for fall in falls]
                rows.append(["  p, McNemar", *ps, ""])
    alarms = [stage.echo.colour if stage.echo else "-" for stage in stages]
    columns = ["", *(shorten(stage.name, 18) for stage in stages), "n"]
    return Table("drift, stage by stage", columns, [*rows, ["alarm", *alarms, ""]])


def _rows(stages: Sequence[Stage]) -> list[tuple[str, Figure, Form]]:
    """Label, figure, and how it is written; lm-evaluation-harness's tasks at the end."""
    tasks = dict.fromkeys(chain.from_iterable(stage.objective for stage in stages))
    return [
        ("wins, %", lambda s: s.win_rate, share_with_error),
        ("  at equal length", lambda s: s.equal_length, share_with_error),
        ("passes the check", lambda s: s.pass_rate, share_with_interval),
        ("gain on stage before", _step, lambda e: share_with_error(e, "+")),
        ("length, reference = 1", lambda s: s.length_ratio, score_with_error),
        ("  stage before = 1", lambda s: s.length_to_previous, score_with_error),
        ("own score, 1 to 10", lambda s: s.own_score, score_with_error),
        ("outside score", lambda s: s.outside_score, score_with_error),
        ("bias, own - outside", lambda s: s.bias.bias if s.bias else None, _signed),
        ("  one-sided (dskew)", _skewness, score_with_error),
        ("  rank correlation", _rank_correlation, score_with_error),
        ("top score to itself", lambda s: s.top_share, share_with_interval),
        ("right on people's pairs", _pairs_right, share_with_interval),
        ("refining gains, own", _of_outside(lambda o: o.own_gain), _signed),
        ("refining gains, outside", _of_outside(lambda o: o.outside_gain), _signed),
        ("false accepts", _of_outside(lambda o: o.false_accepts), share_with_interval),
        ("whole critiques", lambda s: s.critiques and s.critiques.valid, share_with_interval),
        ("generic critiques", lambda s: s.critiques and s.critiques.generic, share_with_interval),
        ("different word pairs", lambda s: s.distinct_pairs, score_with_error),
        ("self-BLEU", lambda s: s.self_bleu, score_with_error),
        ("degenerate answers", lambda s: s.degenerate, share_with_interval),
        *((task, _of_task(task), share_with_error) for task in tasks),
    ]  # fmt: skip


def _step(stage: Stage) -> Estimate | None:
    return stage.to_previous.paired.difference if stage.to_previous else None


def _pairs_right(stage: Stage) -> Estimate | None:
    return stage.pair_accuracy.accuracy if stage.pair_accuracy else None


def _rank_correlation(stage: Stage) -> Estimate | None:
    return stage.scores_agree.spearman if stage.scores_agree else None


def _skewness(stage: Stage) -> Estimate | None:
    return stage.bias.skewness if stage.bias else None


def _of_outside(figure: Callable[[AgainstOutside], Estimate | None]) -> Figure:
    def found(stage: Stage) -> Estimate | None:
        outside = stage.critiques.outside if stage.critiques else None
        return figure(outside) if outside else None

    return found


def _of_task(task: str) -> Figure:
    return lambda stage: stage.objective.get(task)


def _signed(estimate: Estimate | None) -> str:
    return score_with_error(estimate, "+")


def _counts(found: Sequence[Estimate | None]) -> str:
    """On how many items the figures rest: one number, or the least and the most."""
    counts = sorted({each.n for each in found if each is not None and each.n})
    return "" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"

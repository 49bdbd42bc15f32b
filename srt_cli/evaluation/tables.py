"""The figures of an evaluation as tables, for the terminal, the page and Markdown.

Every column is declared once, in the tuples below. A new figure is a field of its dataclass
(`Standing`, `Ruling`, `StageFigures` ...), which brings it to `eval.json`, and a line here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

from srt_cli.evaluation.contest import Contest, Standing
from srt_cli.evaluation.critic_quality import AgainstOutside, CriticQuality, OwnCritic, PairAccuracy
from srt_cli.evaluation.drift import StageFigures
from srt_cli.evaluation.findings import Findings
from srt_cli.evaluation.judge_quality import RepeatsItself, SelfPreference
from srt_cli.evaluation.verdicts import Comparison, Ruling
from srt_cli.records import STATUSES
from srt_cli.stats.agreement import Agreement
from srt_cli.stats.rates import Estimate, PairedDifference
from srt_cli.tables import (
    Table,
    interval_of,
    p_value,
    score_with_error,
    share,
    share_with_error,
    share_with_interval,
    short_names,
    shorten,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Column(Generic[T]):
    """A figure of some things: its heading, how it reads of one of them, and on how many items."""

    heading: str
    cell: Callable[[T], str]
    n: Callable[[T], int] = lambda _: 0
    wide: bool = False
    """Whether it stands on the page and in Markdown alone: a terminal has no room for it."""


def _figure(
    heading: str,
    of: Callable[[T], Estimate | None],
    form: Callable[[Estimate | None], str] = share_with_error,
    *,
    wide: bool = False,
) -> Column[T]:
    def n(thing: T) -> int:
        estimate = of(thing)
        return 0 if estimate is None else estimate.n

    return Column(heading, lambda thing: form(of(thing)), n, wide)


def _signed(estimate: Estimate | None) -> str:
    return score_with_error(estimate, "+")


def _signed_share(estimate: Estimate | None) -> str:
    return share_with_error(estimate, "+")


def _whole(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.0f}"


def _coefficient(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.2f}"


def _difference(paired: PairedDifference | None) -> str:
    if paired is None:
        return "-"
    found = paired.difference
    low, high = interval_of(found, (-1.0, 1.0))
    return f"{100 * found.value:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"


def _detectable(paired: PairedDifference) -> str:
    """A dash where all items are alike, and so nothing tells how far they spread."""
    return f"{100 * paired.smallest_detectable:.0f}" if paired.smallest_detectable else "-"


def _outside(stage: StageFigures) -> AgainstOutside | None:
    return stage.critiques.outside if stage.critiques else None


CHECK: tuple[Column[Standing], ...] = (
    _figure("passes [95 %]", lambda row: row.pass_rate, share_with_interval),
    Column("vs reference", lambda row: _difference(row.difference)),
    _figure("chars", lambda row: row.characters, _whole),
    _figure("parses", lambda row: row.parsed, share),
)
CUT: Column[Standing] = _figure("cut", lambda row: row.cut, share)
OWN_CRITIC: tuple[Column[OwnCritic], ...] = (
    _figure("knows good from bad [95 %]", lambda it: it.balanced, share_with_interval),
    _figure("good kept", lambda it: it.good_kept, share),
    _figure("bad found", lambda it: it.bad_found, share),
    _figure("copies", lambda it: it.copies, share),
    Column("n", lambda it: str(it.confusion.n)),
)
WINS: tuple[Column[Ruling], ...] = (
    _figure("wins, %", lambda it: it.win_rate),
    _figure("equal length", lambda it: it.length_controlled.rate if it.length_controlled else None),
    Column("W/T/L", lambda it: f"{it.wins}/{it.ties}/{it.losses}"),
    _figure("same both orders", lambda it: it.position.consistency if it.position else None, share),
)
OTHER_WINS: tuple[Column[Ruling], ...] = (
    _figure("discrete [95 %]", lambda it: it.discrete_win_rate, share_with_interval),
    _figure("in both orders [95 %]", lambda it: it.strict_win_rate, share_with_interval),
    _figure("gap of the slots", lambda it: it.position.gap if it.position else None, _signed_share),
    _figure("first slot wins", lambda it: it.position.first_slot_rate if it.position else None,
            share_with_interval),
    _figure("longer wins", lambda it: it.prefers_longer, share_with_interval),
    Column("n", lambda it: str(it.valid_pairs)),
)  # fmt: skip
ANSWERS: tuple[Column[Standing], ...] = (
    _figure("mean characters", lambda row: row.characters, _whole),
    _figure("mean words", lambda row: row.words, _whole),
    _figure("length, reference = 1", lambda row: row.length_ratio, score_with_error),
    _figure("degenerate", lambda row: row.degenerate.rate, share),
    _figure("cut at the token limit", lambda row: row.cut, share),
)
COMPARISON: tuple[Column[Comparison], ...] = (
    Column("difference [95 %]", lambda each: _difference(each.paired)),
    Column("p (Holm)", lambda each: p_value(each.p_adjusted)),
    Column("detectable", lambda each: _detectable(each.paired)),
)
AGREEMENT: tuple[Column[Agreement], ...] = (
    _figure("agrees [95 %]", lambda found: found.accuracy, share_with_interval),
    _figure("ties out", lambda found: found.without_ties, share),
    _figure("kappa", lambda found: found.kappa, score_with_error),
    _figure("alpha", lambda found: found.alpha, score_with_error, wide=True),
    _figure("tau-b", lambda found: found.kendall, _coefficient),
    Column("n", lambda found: str(found.n)),
)
REPEATS: tuple[Column[RepeatsItself], ...] = (
    _figure("same [95 %]", lambda each: each.same, share_with_interval),
    _figure("moved, points", lambda each: each.moved),
    Column("asked twice", lambda each: str(each.asked)),
    Column("unread", lambda each: str(each.unread)),
)
SELF_PREFERENCE: tuple[Column[SelfPreference], ...] = (
    _figure("favours itself by, points", lambda each: each.gap, _signed_share),
    Column("n", lambda each: str(each.gap.n)),
)
STAGES: tuple[Column[StageFigures], ...] = (
    _figure("wins, %", lambda s: s.win_rate),
    _figure("  at equal length", lambda s: s.equal_length),
    _figure("passes the check", lambda s: s.pass_rate, share_with_interval),
    _figure("gain over previous", lambda s: s.to_previous.paired.difference if s.to_previous else None,
            _signed_share),
    Column("  p, McNemar (Holm)",
           lambda s: p_value(s.to_previous.p_adjusted) if s.to_previous else "-"),
    _figure("length / reference", lambda s: s.length_ratio, score_with_error),
    _figure("  length / previous", lambda s: s.length_to_previous, score_with_error),
    _figure("own score, 1 to 10", lambda s: s.own_score, score_with_error),
    _figure("outside score", lambda s: s.outside_score, score_with_error),
    _figure("bias, own - outside", lambda s: s.bias.bias if s.bias else None, _signed),
    _figure("  one-sided (dskew)", lambda s: s.bias.skewness if s.bias else None, score_with_error),
    _figure("  rank correlation", lambda s: s.scores_agree.spearman if s.scores_agree else None,
            score_with_error),
    _figure("top score to itself", lambda s: s.top_share, share_with_interval),
    _figure("human pairs right", lambda s: s.pair_accuracy.accuracy if s.pair_accuracy else None,
            share_with_interval),
    Column("  p, McNemar",
           lambda s: p_value(s.pairs_to_previous.p_value) if s.pairs_to_previous else "-"),
    _figure("refining gains, own", lambda s: it.own_gain if (it := _outside(s)) else None, _signed),
    _figure("  by outside score", lambda s: it.outside_gain if (it := _outside(s)) else None, _signed),
    _figure("false accepts", lambda s: it.false_accepts if (it := _outside(s)) else None,
            share_with_interval),
    _figure("whole critiques", lambda s: s.critiques.valid if s.critiques else None,
            share_with_interval),
    _figure("generic critiques", lambda s: s.critiques.generic if s.critiques else None,
            share_with_interval),
    _figure("distinct word pairs", lambda s: s.distinct_pairs, score_with_error),
    _figure("self-BLEU", lambda s: s.self_bleu, score_with_error),
    _figure("degenerate answers", lambda s: s.degenerate, share_with_interval),
    _figure("answers cut at the limit", lambda s: s.standing.cut, share_with_interval),
)  # fmt: skip
PAIRS: tuple[Column[PairAccuracy], ...] = (
    _figure("right", lambda each: each.accuracy, share_with_interval),
    _figure("  ties out", lambda each: each.without_ties, share_with_interval),
    Column("ties", lambda each: str(each.ties)),
    Column("unread", lambda each: str(each.unread)),
    _figure("score gap", lambda each: each.gap, _signed),
    _figure("the longer is chosen", lambda each: each.longer_wins, share_with_interval),
)
CRITIQUES: tuple[Column[CriticQuality], ...] = (
    Column("rows", lambda each: str(each.rows)),
    _figure("whole", lambda each: each.valid, share_with_interval),
    _figure("about the answer", lambda each: each.grounded, share_with_interval),
    _figure("in its language", lambda each: each.same_language, share_with_interval),
    _figure("generic", lambda each: each.generic, share_with_interval),
    _figure("words", lambda each: each.words, _whole),
)
THEIR_SCORES: tuple[Column[AgainstOutside], ...] = (
    _figure("bias, own - outside", lambda it: it.bias.bias if it.bias else None, _signed),
    _figure("  one-sided (dskew)", lambda it: it.bias.skewness if it.bias else None, score_with_error),
    _figure("  rank correlation", lambda it: it.agreement.spearman if it.agreement else None,
            score_with_error),
    _figure("  tau-b", lambda it: it.agreement.kendall if it.agreement else None, score_with_error),
    _figure("  kappa, quadratic", lambda it: it.agreement.weighted_kappa if it.agreement else None,
            score_with_error),
    _figure("  alpha, ordinal", lambda it: it.agreement.alpha_ordinal if it.agreement else None,
            score_with_error),
    _figure("refining gains, own", lambda it: it.own_gain, _signed),
    _figure("  by outside score", lambda it: it.outside_gain, _signed),
    _figure("inflation", lambda it: it.inflation, _signed),
    _figure("false accepts", lambda it: it.false_accepts, share_with_interval),
)  # fmt: skip


def _rows(
    title: str,
    names: Sequence[Sequence[str]],
    things: Sequence[T],
    columns: Sequence[Column[T]],
    *,
    brief: bool = False,
) -> list[Table]:
    """A row a thing, behind its names; no table of nothing."""
    shown = [column for column in columns if not (brief and column.wide)]
    cells = [
        [*name, *(column.cell(thing) for column in shown)]
        for name, thing in zip(names, things, strict=True)
    ]
    heads = [""] * len(names[0]) if names else []
    return [Table(title, heads + [column.heading for column in shown], cells)] if cells else []


def _columns(
    title: str, names: Sequence[str], things: Sequence[T], columns: Sequence[Column[T]]
) -> Table:
    """A column a thing, for few things with many figures; figures that none has are left out."""
    cells, counts = [], []
    for column in columns:
        found = [column.cell(thing) for thing in things]
        n = sorted({column.n(thing) for thing in things} - {0})
        if any(cell != "-" for cell in found):
            cells.append([column.heading, *found])
            counts.append("" if not n else str(n[0]) if len(n) == 1 else f"{n[0]}-{n[-1]}")
    short = short_names(names)
    heads = ["", *(short[name] for name in names)]
    rows = [[*row, count] for row, count in zip(cells, counts, strict=True)]
    return Table(title, [*heads, "n"], rows, len(names))


def tables_of(findings: Findings, *, brief: bool = False, drift: bool = True) -> list[Table]:
    """What the check found, what the judges found, the drift, and what the judges are worth.

    `brief` is for the terminal: without comparisons with the reference, which other columns show,
    those of refined answers, and wide columns. `drift` tells whether the drift table is among them.
    """
    contest = findings.contest
    name = contest.name_of_judge
    found: list[Table] = []
    if contest.check:
        rows = contest.rows
        any_cut = any(row.cut and row.cut.value for row in rows)
        found += _rows(
            "passes the check", _names(contest, rows), rows, (*CHECK, CUT) if any_cut else CHECK,
            brief=brief,
        )  # fmt: skip
        if parts := list(dict.fromkeys(part for row in rows for part in row.parts)):
            names = [row.label if row.use != "response" else row.name for row in rows]
            figures = [_figure(part, _of_part(part), share_with_interval) for part in parts]
            found.append(_columns("passes, part by part", names, rows, figures))
    judged = [row for row in contest.rows if row.judged]
    for place, judge in enumerate(contest.judges):
        title = f"wins against the reference, says {shorten(name(judge), 40)}"
        rulings = [row.judged[place] for row in judged]
        found += _rows(title, _names(contest, judged), rulings, WINS, brief=brief)
    refined = _refined_minus_direct(contest)
    found += _rows(
        "refined minus direct, paired", [[_direct(each.b), name(each.by)] for each in refined],
        refined, COMPARISON, brief=brief,
    )  # fmt: skip
    critics = findings.own_critics
    found += _rows(
        "critics of their own answers", [[each.name] for each in critics], critics, OWN_CRITIC
    )
    if len(contest.rows) > 2 and contest.comparisons:
        shown = [each for each in contest.comparisons if not brief or _is_brief(contest, each)]
        for by in dict.fromkeys(each.by for each in shown):
            title = f"every two, paired, first minus second, by {shorten(name(by), 40)}"
            mine = [each for each in shown if each.by == by]
            pairs = [[_direct(each.a), _direct(each.b)] for each in mine]
            found += _rows(title, pairs, mine, COMPARISON, brief=brief)
    found += drift_table(findings.stages) if drift else []
    people = findings.people
    found += _rows(
        "agreement with people", [[name(each.who)] for each in people],
        [each.agreement for each in people], AGREEMENT, brief=brief,
    )  # fmt: skip
    agreements = findings.agreements
    found += _rows(
        f"judges against each other: {shorten(name(contest.judges[0]), 40)} with" if agreements else "",
        [[name(each.second)] for each in agreements], [each.agreement for each in agreements],
        AGREEMENT, brief=brief,
    )  # fmt: skip
    repeats = findings.repeats
    found += _rows("the same question twice", [[name(r.judge)] for r in repeats], repeats, REPEATS)
    own = findings.self_preferences
    pairs = [[each.contestant, f"against {name(each.outside)}"] for each in own]
    return found + _rows("judges of their own answers", pairs, own, SELF_PREFERENCE)


def _names(contest: Contest, rows: Sequence[Standing]) -> list[list[str]]:
    """One name a row; a contestant's refinements stand below its direct answers."""
    named: set[str] = set()
    found = []
    for row in rows:
        below = row.use != "response" and row.contestant in named
        label = f"  {row.entrant.kind}" if below else _direct(contest.labels[row.entrant])
        found.append([label])
        named.add(row.contestant)
    return found


def _direct(label: str) -> str:
    """An entrant's label; that an answer is direct goes without saying."""
    return label.removesuffix(", direct")


def _of_part(part: str) -> Callable[[Standing], Estimate | None]:
    return lambda row: row.parts.get(part)


def _refined_minus_direct(contest: Contest) -> list[Comparison]:
    """Of one contestant, its first refinements against its direct answers, by check and judges."""
    direct = {row.contestant: contest.labels[row.entrant] for row in contest.rows if row.is_direct}
    refined = {
        (contest.labels[row.entrant], direct.get(row.contestant))
        for row in contest.rows
        if row.use == "refinement"
    }
    return [each for each in contest.comparisons if (each.a, each.b) in refined]


def _is_brief(contest: Contest, comparison: Comparison) -> bool:
    rows = [row for row in contest.rows[1:] if row.use == "response"]
    return {comparison.a, comparison.b} <= {contest.labels[row.entrant] for row in rows}


def drift_table(stages: Sequence[StageFigures]) -> list[Table]:
    """Figures as rows, stages as columns; none without stages."""
    if not stages:
        return []
    tasks = dict.fromkeys(chain.from_iterable(stage.objective for stage in stages))
    objective = [_figure(task, _of_task(task)) for task in tasks]
    alarm = Column[StageFigures]("alarm", lambda stage: stage.echo.colour if stage.echo else "-")
    names = [stage.name for stage in stages]
    return [_columns("drift, stage by stage", names, stages, [*STAGES, *objective, alarm])]


def _of_task(task: str) -> Callable[[StageFigures], Estimate | None]:
    return lambda stage: stage.objective.get(task)


def further_tables(contest: Contest) -> list[Table]:
    """For the page: other ways of counting wins, verdicts that fail, and what the answers are like."""
    found: list[Table] = []
    judged = [row for row in contest.rows if row.judged]
    for place, judge in enumerate(contest.judges):
        name = contest.name_of_judge(judge)
        rulings = [row.judged[place] for row in judged]
        title = f"other ways of counting, says {name}"
        found += _rows(title, _names(contest, judged), rulings, OTHER_WINS)
        failing = [
            [contest.labels[row.entrant], "shown first" if order == "ab" else "shown second",
             *(str(counts.get(status, 0)) for status in STATUSES)]
            for row in judged
            for order, counts in row.judged[place].statuses_by_order.items()
            if counts.keys() - {"ok"}
        ]  # fmt: skip
        if failing:
            found.append(Table(f"verdicts that fail, by {name}", ["", "", *STATUSES], failing))
    return found + _rows("answers", _names(contest, contest.rows), contest.rows, ANSWERS)


def pairs_table(found: Sequence[PairAccuracy]) -> Table:
    """How often each critic scored the chosen answer higher; a column a critic."""
    names = [each.critic for each in found]
    return _columns("scores chosen above rejected", names, found, PAIRS)


def quality_tables(found: Sequence[CriticQuality]) -> list[Table]:
    """What the critiques are like, and, with a scorer, what their scores are worth; a column a file."""
    tables = [_columns("critiques", [each.file for each in found], found, CRITIQUES)]
    scored = [(each.file, each.outside) for each in found if each.outside is not None]
    if scored:
        scorer = short_names([scored[0][1].scorer])[scored[0][1].scorer]
        title = f"their scores, against {shorten(scorer, 40)}"
        outside = [each for _, each in scored]
        tables.append(_columns(title, [file for file, _ in scored], outside, THEIR_SCORES))
    return tables

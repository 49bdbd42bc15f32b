"""Stage 2, middle: refinement chosen, draft rejected, where blind scores say that it is better."""

import contextlib
import copy
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Literal, NamedTuple

import orjson

from srt_cli import console
from srt_cli.calls.options import ApiOptions
from srt_cli.errors import SrtError, TooManyFailures, UsageError
from srt_cli.exports import EXPORTS, LLAMAFACTORY, RANKING, Format, export_path, how, register
from srt_cli.feedback.critic_check import CriticFigures, checked_before, doubts_of
from srt_cli.options import Former, Group, runtime, setting
from srt_cli.pairs.answers import FirstAnswers
from srt_cli.pairs.building import PairPlan, decide, decide_on, shape_of
from srt_cli.pairs.external_sort import ExternalSort
from srt_cli.pairs.length_balance import Balance, balance_lengths
from srt_cli.pairs.pairing import Picker, Sample, ScoreKind, Strategy, group_key, line_of
from srt_cli.pairs.rows import PLACE_BYTES, Alone, GroupedRows, Helpers, RowShare, Several
from srt_cli.pairs.rules import (
    ExcludedPrompts,
    NearDuplicates,
    PairRules,
    advice_for,
    near_duplicates_of,
)
from srt_cli.pairs.summary import PairSummary
from srt_cli.pairs.worth import Labels, Worth, labels_of_audit, labels_of_stage_1
from srt_cli.records import Preference
from srt_cli.runs.jsonl import DroppedRows, OrderedWriter, dropped_path
from srt_cli.runs.run import Run, inherited, open_run, read_manifest, why_not_whole

if TYPE_CHECKING:
    from srt_cli.pairs.audit import Audit, Auditor

COMMAND = "build-prefs"
KEPT: Final = b"+"
DROPPED: Final = b"-"
"""Before lines that are sorted by their places."""


@dataclass(frozen=True)
class BuildPrefs(ApiOptions):
    """Turn feedback into preference pairs: the refinement is chosen, the draft rejected.

    A pair is kept only where the blind score of the refinement exceeds that of the draft by
    --min-gain. Every other row is dropped with a reason; used and dropped rows add up to the input.
    Models are called only for --audit-judge, so every option of calls belongs to the audit.

    Examples:
      srt build-prefs --data self-feedback.jsonl --out prefs.jsonl

      srt build-prefs --length-balance margin --report prefs.html

      srt build-prefs --data r1.jsonl --data r2.jsonl.gz --strategy best-worst

      srt build-prefs --audit 100 --audit-judge gpt-4 --max-cost 5
    """

    inherited_group: ClassVar[Group] = "Audit"

    data: tuple[Path, ...] = setting(
        (Path("self-feedback.jsonl"),), "Feedback, or rows of scored answers (UltraFeedback): a file, "
        "- for stdin. Repeatable.",
        group="Data", common=True, metavar="FILE",
    )  # fmt: skip
    out: Path = runtime(
        Path("prefs.jsonl"), "Where to write the preferences.",
        group="Output", common=True, metavar="FILE",
    )  # fmt: skip
    strategy: Strategy = setting(
        "refine", "refine: a refinement against its draft (paper). Over all answers to a prompt: "
        "best-worst; refine-best, the best draft's refinement against the worst draft; tiers, the "
        "shortest good answer against the longest bad one.", group="Pairs", common=True,
    )  # fmt: skip
    rejected: Path | None = setting(
        None, "Reject the first model's answers: its outputs or feedback, joined by prompt or id.",
        group="Pairs", metavar="FILE",
    )  # fmt: skip
    rho: float = setting(
        0.1, "Width of a tier, as a share of the range of scores (tiers).", group="Pairs"
    )
    score: ScoreKind = setting(
        "integer", "Compare the scores as written (paper), as expected under the critic's "
        "log-probabilities, which seldom tie, by its comparisons (self-critique --compare), or by "
        "the share of yes in feedback that is a checklist.", group="Pairs",
    )  # fmt: skip
    min_gain: float | Literal["auto"] = setting(
        1.0, "Minimum blind gain of a refinement (paper: any). auto: the smallest gain at which "
        "the audit finds --min-precision.", group="Pairs", common=True, metavar="GAIN|auto",
    )  # fmt: skip
    max_length_ratio: float = setting(
        3.0, "Maximum length of a refinement, as a multiple of its draft (paper: no limit).",
        group="Pairs",
    )  # fmt: skip
    length_balance: Balance = setting(
        "none", "Drop pairs until chosen and rejected are equally long on average, first those with the "
        "least gain per character (margin) or the largest gap (subset); or until as many are longer as "
        "shorter at each gap (matched).", group="Pairs", common=True,
    )  # fmt: skip
    hygiene: bool = setting(
        True, "Drop chosen answers that repeat, refuse, leak a template or switch script.",
        group="Pairs",
    )  # fmt: skip
    near_duplicates: float | None = setting(
        None, "Drop prompts at least this similar to another or to an excluded one, e.g. 0.8.",
        group="Pairs", metavar="SHARE",
    )  # fmt: skip
    exclude: tuple[Path, ...] = setting(
        (), "Prompts never to train on, e.g. those of an evaluation. Repeatable.",
        group="Data", common=True, metavar="FILE",
    )  # fmt: skip
    export: tuple[Format, ...] = setting(
        (), "Also write the pairs in another tool's format. Repeatable.",
        group="Output", common=True, formerly=Former("format"),
    )  # fmt: skip
    report: Path | None = runtime(
        None, "Write the summary as a page.", group="Output", common=True, metavar="FILE.html"
    )
    audit: int = runtime(
        0, "Have a judge or a person check N randomly drawn pairs.", group="Audit", common=True
    )
    audit_judge: str | None = runtime(
        None, "The judge of the audit: any model but the one that wrote the pairs.",
        group="Audit", common=True, metavar="SPEC",
    )  # fmt: skip
    label_page: Path | None = runtime(
        None, "Write a page on which a person judges the drawn pairs.",
        group="Audit", metavar="FILE.html",
    )  # fmt: skip
    audit_labels: Path | None = runtime(
        None, "The answers a person gave on such a page.", group="Audit", metavar="FILE"
    )
    min_precision: float = runtime(
        0.8, "Share of right labels that --min-gain auto looks for.", group="Audit"
    )
    seed: int = setting(
        42, "Seed of the audit's sample. Building pairs draws nothing.", group="Run", common=True
    )
    limit: int | None = setting(
        None, "Use only the first N rows.", positive=True, group="Data", common=True, extends=True
    )
    overwrite: bool = runtime(
        False, "Replace an output made with other settings.", group="Run", common=True
    )


def run(options: BuildPrefs) -> None:
    """Read feedback, keep the pairs that teach, write `prefs.jsonl`, have a sample audited."""
    check_options(options)
    data = {f"data {n}" if n > 1 else "data": path for n, path in enumerate(options.data, 1)}
    inputs = data | {f"exclude {n}": path for n, path in enumerate(options.exclude, 1)}
    if options.audit_labels is not None:
        inputs["audit labels"] = options.audit_labels
    if options.rejected is not None:
        inputs["rejected"] = options.rejected
    run = open_run(COMMAND, options, inputs=inputs)
    # Near duplicates are looked for in the order of the keys, which must not change.
    seed = secrets.randbits(64) if options.near_duplicates is None else None
    key_of = partial(group_key, strategy=options.strategy, seed=seed)
    with run, GroupedRows(options.out.parent, key_of) as rows:
        plan = plan_of(options)
        counts = [run.manifest.inputs[name].rows for name in data]
        total = sum(filter(None, counts)) if None not in counts else None
        rows.read(options.data, options.limit, total)
        auditor = auditor_of(options, run)
        if options.min_gain == "auto" and auditor is not None:
            plan = with_audited_gain(plan, rows, options, auditor, run)
        if options.length_balance != "none":
            plan = with_length_balance(plan, rows, options)
        size, seed = options.audit, options.seed
        picked = Sample(size, seed) if auditor is None else auditor.picker(size, seed)
        summary = write_pairs(rows, plan, options, picked)
        run.reached(f"{summary.rows} of {summary.rows}")
        run.tally(summary.describe())
        known = tell_of_critic(run, options, rows)
        if not summary.kept:
            raise TooManyFailures(all_dropped(summary, options.data))
        show(summary, options)
        for warning in summary.warnings():
            run.warn(warning)
        audit = None if auditor is None else report_audit(auditor.audit(picked.pairs()), run)
        worth = Worth(summary.kept, labels_of_audit(audit) or summary.checked.labels or known)
        run.tally({"labels": worth.labels.describe() if worth.labels else None})
        for line in worth.lines():
            console.say(line)
        for warning in worth.warnings():
            run.warn(warning)
        write_pages(summary, audit, picked.pairs(), options)
    if LLAMAFACTORY in options.export:  # a list that is not this run's alone
        register(export_path(options.out, LLAMAFACTORY), RANKING)
    console.finish(f"{options.out}: {summary.kept} pairs", f"srt dpo --prefs {options.out}")


def tell_of_critic(run: Run, options: BuildPrefs, rows: GroupedRows) -> Labels | None:
    """Warn of rows that are missing and of a critic that is doubtful.

    Returns what stage 1 found of its labels, where it looked.
    """
    for path in options.data:
        if not_whole := why_not_whole(path):
            run.warn(not_whole)
    data = options.data[0]
    manifest, model = read_manifest(data), inherited(data, "model") or "models/sft"
    stage_1 = read_manifest(Path(model)) if Path(model).is_dir() else None
    table = checked_before(manifest.tallies) if manifest is not None else None
    elsewhere = table is None
    if elsewhere and stage_1 is not None:
        table = checked_before(stage_1.tallies)
    who = f"the critic of {', '.join(map(str, options.data))}"
    seen = rows.seen
    figures = CriticFigures(who, table, seen.scores, *seen.copied.counts, elsewhere=elsewhere)
    for doubt in doubts_of(figures, model):
        run.warn(doubt)
    return labels_of_stage_1(stage_1.tallies) if stage_1 is not None else None


def check_options(options: BuildPrefs) -> None:
    """Raise `UsageError` for options that contradict each other or mean nothing."""
    if not 0 <= options.rho < 0.5:
        raise UsageError("--rho lies between 0 and 0.5: half the range is no longer a tier.")
    if options.near_duplicates is not None:
        if not 0 < options.near_duplicates <= 1:
            raise UsageError("--near-duplicates is a share above 0, at most 1, e.g. 0.8.")
        NearDuplicates(options.near_duplicates)  # names the missing package before any row is read
    looks = options.audit_judge is not None or options.label_page is not None
    if bool(options.audit) != looks or options.audit < 0:
        raise UsageError(
            "--audit goes with --audit-judge or --label-page: how many pairs, and who looks at them."
        )
    if options.audit_labels is not None and options.audit_judge is not None:
        raise UsageError("--audit-labels stands in for --audit-judge: give one of them.")
    if options.audit_labels is not None and options.audit:
        raise UsageError("--audit-labels names its pairs itself: leave out --audit.")
    if not 0 < options.min_precision <= 1:
        raise UsageError("--min-precision is a share above 0, at most 1, e.g. 0.8.")
    unaudited = options.audit_judge is None and options.audit_labels is None
    if options.min_gain != "auto" and options.min_gain < 0:
        raise UsageError("--min-gain starts at 0: the chosen answer is the one that scores higher.")
    if options.min_gain == "auto" and unaudited:
        raise UsageError("--min-gain auto needs --audit N --audit-judge SPEC, or --audit-labels.")


def plan_of(options: BuildPrefs) -> PairPlan:
    """The options as a plan; with `--min-gain auto` any gain will do at first."""
    gain = 0.0 if options.min_gain == "auto" else options.min_gain
    rules = PairRules(
        min_gain=gain,
        max_length_ratio=options.max_length_ratio,
        hygiene=options.hygiene,
        excluded=ExcludedPrompts(options.exclude),
    )
    first = None if options.rejected is None else FirstAnswers(options.rejected)
    return PairPlan(
        options.strategy, options.rho, options.score, rules, options.near_duplicates, first=first
    )


def auditor_of(options: BuildPrefs, run: Run) -> "Auditor | None":
    """Who checks pairs from outside: people, by their saved answers, a model, or nobody."""
    if options.audit_labels is None and options.audit_judge is None:
        return None
    from srt_cli.pairs.audit import outside_judge, people

    if options.audit_labels is not None:
        return people(options.audit_labels, options.min_precision)
    return outside_judge(str(options.audit_judge), options.min_precision, run, options)


def with_audited_gain(
    plan: PairPlan, rows: GroupedRows, options: BuildPrefs, auditor: "Auditor", run: Run
) -> PairPlan:
    """Set the smallest gain from which the auditor finds enough labels right."""
    earlier = run.earlier
    if earlier is not None:
        run.tally(earlier.tallies)  # of the pairs that stand there until others do
    picked = auditor.picker(options.audit, options.seed)
    for decision in decide(rows, plan, "pairing for the audit"):
        if decision.kept is not None:
            picked.offer(decision.kept)
    audit = auditor.audit(picked.pairs())
    gain = audit.gain_to_ask_for
    if gain is None:
        raise SrtError(
            f"--min-gain auto: {audit.sentence()}. Lower --min-precision, have more pairs judged, or "
            "give a gain."
        )
    before = earlier.tally("min_gain", float) if earlier is not None else None
    if before not in (None, gain) and options.out.exists():
        raise SrtError(
            f"{options.out}: was built with a gain of {before:g}, and the audit now asks for {gain:g}. "
            "Choose another --out, or replace it with --overwrite."
        )
    console.say(f"{audit.sentence()}; --min-gain auto: {gain:g}")
    return replace(plan, rules=replace(plan.rules, min_gain=gain))


def with_length_balance(plan: PairPlan, rows: GroupedRows, options: BuildPrefs) -> PairPlan:
    """Decide which pairs to drop so that chosen answers are no longer than rejected ones."""
    shapes = (
        shape_of(decision.kept)
        for decision in decide(rows, plan, "balancing lengths")
        if decision.kept is not None
    )
    cut = balance_lengths(options.length_balance, shapes, options.out.parent)
    if cut.before and not cut.after:
        raise SrtError(
            f"--length-balance {cut.method}: the same side is longer in every pair, so nothing is left "
            "to balance. Lower --max-length-ratio, or train with srt dpo --loss-type sigmoid_norm."
        )
    return replace(plan, length_cut=cut)


class Piece(NamedTuple):
    """Lines that nothing comes between, and the place of the first."""

    place: int
    kept: bytes
    """Pairs."""
    dropped: bytes


class Outcome(NamedTuple):
    """What became of a share of the rows."""

    summary: PairSummary
    picked: Picker
    pieces: list[Piece]
    is_late: bool
    """Whether rows of other shares stand between these."""


@dataclass(frozen=True)
class Deciding:
    """Decides on shares of the rows, in whatever process."""

    plan: PairPlan
    summary: PairSummary
    """Still empty; each share fills a copy."""
    picker: Picker
    """Still empty; each share fills a copy."""
    near: NearDuplicates | None = None
    """Of the prompts so far, which only one process knows."""

    def __call__(self, share: RowShare) -> Outcome:
        """Decide on the groups of a share."""
        summary, picked = copy.deepcopy(self.summary), copy.deepcopy(self.picker)
        kept: list[tuple[int, bytes]] = []
        dropped: list[tuple[int, bytes]] = []
        for group in share.groups():
            decision = decide_on(group, self.plan, self.near)
            summary.add(decision)
            if (pairing := decision.kept) is not None:
                kept.append((decision.place, line_of(pairing)))
                picked.offer(pairing)
            for place, _, line in decision.dropped:
                dropped.append((place, line))
        if isinstance(share, Alone) and not share.without:
            lines = (b"".join([line for _, line in some]) for some in (kept, dropped))
            return Outcome(summary, picked, [Piece(share.place, *lines)], False)
        pieces = [Piece(place, line, b"") for place, line in kept]
        pieces += [Piece(place, b"", line) for place, line in dropped]
        return Outcome(summary, picked, pieces, isinstance(share, Several))


def write_pairs(
    rows: GroupedRows, plan: PairPlan, options: BuildPrefs, picked: Picker
) -> PairSummary:
    """Decide on all rows; write pairs and dropped rows in the order of the input."""
    summary = PairSummary(options.seed, min_gain=plan.rules.min_gain, length_cut=plan.length_cut)
    near = near_duplicates_of(plan.near_duplicates, plan.rules.excluded)
    work = Deciding(plan, copy.deepcopy(summary), copy.deepcopy(picked), near)
    shares = rows.shares(in_order_of_keys=near is not None)
    # What is held in memory is not sent to another process.
    helpers = rows.helpers if near is None and plan.first is None else Helpers(0)
    with (
        console.progress("pairing", rows.count) as progress,
        ExternalSort(options.out.parent) as late,
        contextlib.closing(helpers.map(work, shares)) as outcomes,
    ):

        def counted() -> Iterator[Outcome]:
            for outcome in outcomes:
                summary.merge(outcome.summary)
                picked.merge(outcome.picked)
                progress.advance(outcome.summary.rows)
                yield outcome

        _write_pieces(_in_order(counted(), late), options, summary)
    return summary


def _in_order(outcomes: Iterator[Outcome], late: ExternalSort) -> Iterator[Piece]:
    """All pieces in the order of their places; late shares, which arrive first, come between others."""
    between: Iterator[Piece] | None = None
    next_late: Piece | None = None
    for outcome in outcomes:
        if outcome.is_late:
            late.add(*map(_to_entry, outcome.pieces))
            continue
        if between is None:
            between = map(_of_entry, late)
            next_late = next(between, None)
        for piece in sorted(outcome.pieces):
            while next_late is not None and next_late.place < piece.place:
                yield next_late
                next_late = next(between, None)
            yield piece
    if next_late is not None:
        yield next_late
    yield from map(_of_entry, late) if between is None else between


def _to_entry(piece: Piece) -> bytes:
    kept, dropped = piece.kept, piece.dropped
    return piece.place.to_bytes(PLACE_BYTES) + (KEPT + kept if kept else DROPPED + dropped)


def _of_entry(entry: bytes) -> Piece:
    place, lines = int.from_bytes(entry[:PLACE_BYTES]), entry[PLACE_BYTES + 1 :]
    is_kept = entry[PLACE_BYTES : PLACE_BYTES + 1] == KEPT
    return Piece(place, lines, b"") if is_kept else Piece(place, b"", lines)


def _write_pieces(pieces: Iterator[Piece], options: BuildPrefs, summary: PairSummary) -> None:
    """Write pairs to the output and the exports, dropped rows beside them: all files or none."""
    dropped = DroppedRows(options.out)
    pairs = OrderedWriter(options.out)
    exports = {name: OrderedWriter(export_path(options.out, name)) for name in options.export}
    count = 0
    try:
        for piece in pieces:
            dropped.append(piece.dropped)
            pairs.append(piece.kept)
            for line in piece.kept.splitlines() if exports else ():
                pair = orjson.loads(line)
                for name, export in exports.items():
                    export.add_plain(count, EXPORTS[name](pair))
                count += 1
        dropped.reasons.update(summary.reasons)
        dropped.commit()
        for writer in (pairs, *exports.values()):
            if summary.kept:
                writer.commit()
            else:  # an earlier run's pairs are not those of these settings
                writer.path.unlink(missing_ok=True)
    finally:
        dropped.discard()
        for writer in (pairs, *exports.values()):
            writer.discard()


def report_audit(audit: "Audit", run: Run) -> "Audit":
    """Report what the auditor found; the pairs are already written and stay as they are."""
    run.tally({"audit": asdict(audit)})
    table = audit.table()
    if table.cells:
        console.talk_table(table.title, table.columns, table.cells)
    console.say(audit.sentence())
    for warning in audit.warnings():
        run.warn(warning)
    return audit


def write_pages(
    summary: PairSummary,
    audit: "Audit | None",
    looked_at: Sequence[Preference],
    options: BuildPrefs,
) -> None:
    """Write the summary as a page, and the page to judge pairs by hand, if they were asked for."""
    if options.report is not None:
        from srt_cli.report.prefs import write_prefs_report

        write_prefs_report(options.report, options.out.name, summary, audit)
        console.say(f"the same as a page: {options.report}")
    if options.label_page is not None:
        from srt_cli.report.label import write_label_page

        write_label_page(options.label_page, looked_at, options.seed)
        console.say(
            f"{len(looked_at)} pairs to judge by hand: open {options.label_page} in a browser, save the "
            "answers, then: srt build-prefs ... --audit-labels FILE"
        )


def show(summary: PairSummary, options: BuildPrefs) -> None:
    """Report what was kept, what was dropped and why, and whether chosen answers are merely longer."""
    for line in summary.lines():
        console.say(line)
    if summary.reasons:
        console.say(f"dropped rows with their reasons: {dropped_path(options.out)}")
    for name in options.export:
        console.say(
            f"the same pairs for {name}: {export_path(options.out, name)}; {how(name, pairs=True)}"
        )


def all_dropped(summary: PairSummary, data: Sequence[Path]) -> str:
    """Why no pair is left, and which filter to relax."""
    worst = next(iter(summary.counted_reasons()), ("", 0))[0]
    return (
        f"{', '.join(map(str, data))}: no pair is left ({summary.reasons_in_words()}). "
        f"{advice_for(worst)}"
    )

"""Stage 2, middle: refinement chosen, draft rejected, where the blind score says it is better."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from srt_cli import console
from srt_cli.artifacts import (
    DroppedRows,
    OrderedWriter,
    Run,
    open_run,
    read_records,
    read_rows,
)
from srt_cli.call_options import ApiOptions
from srt_cli.errors import SrtError, UsageError
from srt_cli.options import runtime, setting
from srt_cli.pairing import GROUPING, Candidate, Sample, Strategy, grouped
from srt_cli.prompts import read_prompts
from srt_cli.records import FeedbackRecord, Message, Preference, as_messages
from srt_cli.stats.hygiene import faults_of

COMMAND = "build-prefs"
Format = Literal["axolotl", "llamafactory", "kto"]


@dataclass(frozen=True)
class BuildPrefs(ApiOptions):
    """Turn feedback into preference pairs: the refinement is chosen, the draft rejected.

    A pair is kept only where the blind score of the refinement exceeds the score of the draft by
    the gain. Rows without a usable pair fall out with a reason; kept and dropped add up to the
    input. Needs no torch.

    Examples:

      srt build-prefs --data self-feedback.jsonl --out prefs.jsonl

      srt build-prefs --data round-1.jsonl --data round-2.jsonl.gz --strategy best-worst
    """

    data: tuple[Path, ...] = setting(
        (Path("self-feedback.jsonl"),), "Feedback to pair: .jsonl, .jsonl.gz, - for stdin. Several "
        "times.", metavar="FILE",
    )  # fmt: skip
    out: Path = runtime(Path("prefs.jsonl"), "Where the preferences go.", metavar="FILE")
    strategy: Strategy = setting(
        "refine", "refine: refinement against draft (paper). Over all answers to a prompt: "
        "best-worst; refine-best, the best draft's refinement against the worst draft; tiers, the "
        "shortest good against the longest bad.",
    )  # fmt: skip
    rho: float = setting(0.1, "Width of a tier, as a share of the range of scores (tiers).")
    min_gain: float = setting(
        1.0, "Smallest blind gain of the refinement (paper: it must exceed the draft's score)."
    )
    max_length_ratio: float = setting(
        3.0, "Longest refinement, as a multiple of its draft's characters (paper: no limit)."
    )
    hygiene: bool = setting(
        True, "Leave out chosen answers that repeat, refuse or leak a template."
    )
    exclude: tuple[Path, ...] = setting(
        (), "Prompts that must not be trained on, e.g. those of an evaluation. Several times.",
        metavar="FILE",
    )  # fmt: skip
    format: tuple[Format, ...] = setting(
        (), "Write the pairs in another tool's form too. Several times.",
        metavar="axolotl|llamafactory|kto",
    )  # fmt: skip
    audit: int = runtime(0, "Have so many kept pairs, drawn at random, judged from outside.")
    audit_judge: str | None = runtime(
        None, "The judge of the audit: any model but the one that wrote the pairs.", metavar="SPEC"
    )
    min_precision: float = runtime(0.8, "Share of right labels that the audit looks for.")
    seed: int = setting(42, "Seed of the audit's sample; building pairs draws nothing.")
    limit: int | None = setting(None, "Use only the first N rows.", extends=True)
    overwrite: bool = runtime(False, "Replace an output of other settings.")


@dataclass
class PairTally:
    """Length and gain of the kept pairs, summed as they stream by."""

    rows: int = 0
    kept: int = 0
    gain: float = 0.0
    chosen_characters: int = 0
    rejected_characters: int = 0
    chosen_longer: int = 0
    used: int = 0
    """Rows that are part of a kept pair."""
    excluded: frozenset[bytes] = frozenset()
    seen: set[bytes] = field(default_factory=set)


def run(options: BuildPrefs) -> None:
    """Read feedback, keep the pairs that teach, write `prefs.jsonl`."""
    if not 0 <= options.rho < 0.5:
        raise UsageError("--rho lies between 0 and 0.5: half the range is no tier any more.")
    if bool(options.audit) != (options.audit_judge is not None):
        raise UsageError("--audit and --audit-judge go together: how many pairs, and who judges.")
    inputs = {f"data {n}" if n > 1 else "data": path for n, path in enumerate(options.data, 1)}
    inputs |= {f"exclude {n}": path for n, path in enumerate(options.exclude, 1)}
    run = open_run(COMMAND, options, options.out, inputs=inputs, overwrite=options.overwrite)
    tally = PairTally(excluded=frozenset(_digests_in(options.exclude)))
    sample = Sample(options.audit, options.seed)
    with run:
        records = _records_in(options.data, options.limit)
        dropped = DroppedRows(options.out)
        writer = OrderedWriter(options.out)
        exports = {name: OrderedWriter(_export_path(options.out, name)) for name in options.format}
        try:
            for number, pair in enumerate(keep_pairs(records, options, dropped, tally)):
                writer.add(number, [pair])
                if options.audit:
                    sample.offer(_fingerprint(pair), pair)
                for name, export in exports.items():
                    export.add_plain(number, EXPORTS[name](pair))
            dropped.commit()
            if tally.kept:
                for each in (writer, *exports.values()):
                    each.commit()
        finally:
            for each in (writer, *exports.values()):
                each.discard()
            dropped.discard()
        run.manifest.progress = f"{tally.rows} of {tally.rows}"
        run.manifest.tallies = tallies_of(tally, dropped)
        if not tally.kept:
            raise SrtError(_all_dropped(options.data, dropped))
        if options.audit_judge is not None:
            _audit(options, options.audit_judge, sample.pairs(), run)
    show(tally, dropped)
    for name in exports:
        console.say(f"the same pairs for {name}: {_export_path(options.out, name)}")
    console.finish(f"{options.out}: {tally.kept} pairs", f"srt dpo --prefs {options.out}")


def _audit(options: BuildPrefs, judge: str, pairs: list[Preference], run: Run) -> None:
    """Have a sample judged from outside; the pairs are written already and stay as they are."""
    from srt_cli.asking import Asking
    from srt_cli.audit import audit_pairs, audit_table, sentence_of

    asking = Asking.begin(run, options, offline=False)
    try:
        audit = audit_pairs(asking, judge, pairs, options.min_precision)
    finally:
        run.manifest.cost = asking.cost.describe()
    run.manifest.tallies["audit"] = asdict(audit)
    table = audit_table(audit)
    if table.cells:
        console.talk_table(table.title, table.columns, table.cells)
    console.say(sentence_of(audit))
    if audit.precision is not None and audit.precision.value < options.min_precision:
        run.warn(
            f"only {audit.precision.value:.0%} of the labels are right: raise --min-gain, or train "
            "with srt dpo --loss-type robust --label-smoothing auto."
        )


def _records_in(paths: Sequence[Path], limit: int | None) -> Iterator[FeedbackRecord]:
    for path in paths:
        yield from read_records(path, FeedbackRecord.model_validate, limit=limit)


def keep_pairs(
    records: Iterator[FeedbackRecord], options: BuildPrefs, dropped: DroppedRows, tally: PairTally
) -> Iterator[Preference]:
    """Yield the pairs that pass every rule; note every row that is in none with its reason."""
    if options.strategy == "refine":
        for record in records:
            reason = why_no_pair(record, options)
            pair = pair_of(record) if reason is None else None
            yield from _keep([record], [record], pair, reason, options, dropped, tally)
        return
    choose = GROUPING[options.strategy]
    for group in grouped(records):
        pairing = choose(group, options.rho)
        if pairing is None:
            reason = f"no pair by {options.strategy}"
            yield from _keep(group, [], None, reason, options, dropped, tally)
            continue
        chosen, rejected = pairing
        gain = chosen.score - rejected.score
        fault = _fault_between(chosen.text, rejected.text, gain, options)
        used = [chosen.record, rejected.record]
        pair = preference_of(chosen, rejected)
        yield from _keep(group, used, pair, fault, options, dropped, tally)


def _keep(
    group: list[FeedbackRecord],
    used: list[FeedbackRecord],
    pair: Preference | None,
    reason: str | None,
    options: BuildPrefs,
    dropped: DroppedRows,
    tally: PairTally,
) -> Iterator[Preference]:
    """The pair if nothing speaks against it; every row of the group is counted once."""
    tally.rows += len(group)
    if pair is not None and reason is None:
        if _digest_of(as_messages(group[0].prompt)) in tally.excluded:
            reason = "prompt is excluded"
        elif options.hygiene and (faults := faults_of(pair.chosen[0].content)):
            reason = faults[0]
        elif (fingerprint := _fingerprint(pair)) in tally.seen:
            reason = "duplicate"
        else:
            tally.seen.add(fingerprint)
    for record in group:
        is_used = any(record is each for each in used)
        if pair is None or reason is not None or not is_used:
            own = record.status if record.status != "ok" else None
            other = reason if is_used or pair is None else f"not chosen by {options.strategy}"
            dropped.add(record.id, own or other or "unused", record)
        else:
            tally.used += 1
    if pair is None or reason is not None:
        return
    tally.kept += 1
    tally.gain += pair.chosen_score - pair.rejected_score
    chosen, rejected = len(pair.chosen[0].content), len(pair.rejected[0].content)
    tally.chosen_characters += chosen
    tally.rejected_characters += rejected
    tally.chosen_longer += chosen > rejected
    yield pair


def why_no_pair(record: FeedbackRecord, options: BuildPrefs) -> str | None:
    """The first reason for which a row gives no pair of its own; null when it gives one."""
    if record.status != "ok":
        return record.status
    if record.gain is None or record.response is None or record.refinement is None:
        return "incomplete"
    return _fault_between(record.refinement, record.response, record.gain, options)


def _fault_between(chosen: str, rejected: str, gain: float, options: BuildPrefs) -> str | None:
    """The first rule that a pair of texts breaks."""
    better, worse = chosen.strip(), rejected.strip()
    if not better or not worse:
        return "empty"
    if better == worse:
        return "copy"
    if gain < options.min_gain or gain <= 0:
        return f"gain below {options.min_gain:g}"
    if len(better) > options.max_length_ratio * len(worse):
        return f"refinement over {options.max_length_ratio:g} times as long"
    return None


def preference_of(chosen: Candidate, rejected: Candidate) -> Preference:
    """Two answers to one prompt as a pair in TRL's conversational form."""
    return Preference(
        id=chosen.record.id,
        prompt=as_messages(chosen.record.prompt),
        chosen=[Message(role="assistant", content=chosen.text)],
        rejected=[Message(role="assistant", content=rejected.text)],
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        source=chosen.record.critic,
    )


def pair_of(record: FeedbackRecord) -> Preference:
    """Refinement chosen, draft rejected (paper, section 3.2), in TRL's conversational form."""
    assert record.response is not None
    assert record.refinement is not None
    assert record.feedback is not None
    assert record.refinement_score is not None
    first = record.sample == 0 and record.round == 1
    return Preference(
        id=record.id if first else f"{record.id}/{record.sample}/{record.round}",
        prompt=as_messages(record.prompt),
        chosen=[Message(role="assistant", content=record.refinement.strip())],
        rejected=[Message(role="assistant", content=record.response.strip())],
        chosen_score=record.refinement_score,
        rejected_score=record.feedback.score,
        source=record.critic,
    )


def _fingerprint(pair: Preference) -> bytes:
    turns = [*pair.prompt, *pair.chosen, *pair.rejected]
    text = "\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in turns)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _digest_of(turns: Sequence[Message]) -> bytes:
    """A prompt without regard to case and spaces."""
    text = "\x1e".join(" ".join(turn.content.lower().split()) for turn in turns)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _digests_in(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        for prompt in read_prompts(str(path), read_rows(path)):
            yield _digest_of(prompt.messages)


def _export_path(out: Path, name: str) -> Path:
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.{name}.jsonl")


def _to_axolotl(pair: Preference) -> list[dict[str, Any]]:
    """Axolotl's chat_template.default of DPO."""
    turns = [turn.model_dump() for turn in pair.prompt]
    chosen, rejected = pair.chosen[0].model_dump(), pair.rejected[0].model_dump()
    return [{"messages": turns, "chosen": chosen, "rejected": rejected}]


def _to_llamafactory(pair: Preference) -> list[dict[str, Any]]:
    """LLaMA-Factory's sharegpt form with ranking."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn.role], "value": turn.content} for turn in pair.prompt]
    chosen = {"from": "gpt", "value": pair.chosen[0].content}
    rejected = {"from": "gpt", "value": pair.rejected[0].content}
    return [{"conversations": turns, "chosen": chosen, "rejected": rejected}]


def _to_kto(pair: Preference) -> list[dict[str, Any]]:
    """TRL's unpaired preferences: two rows a pair."""
    turns = [turn.model_dump() for turn in pair.prompt]
    return [
        {"prompt": turns, "completion": [turn.model_dump() for turn in answer], "label": label}
        for answer, label in ((pair.chosen, True), (pair.rejected, False))
    ]


EXPORTS: Final[Mapping[Format, Callable[[Preference], list[dict[str, Any]]]]] = {
    "axolotl": _to_axolotl,
    "llamafactory": _to_llamafactory,
    "kto": _to_kto,
}


def tallies_of(tally: PairTally, dropped: DroppedRows) -> dict[str, object]:
    """The manifest's form; kept and dropped add up to the rows read."""
    assert tally.used + dropped.reasons.total() == tally.rows
    kept = max(1, tally.kept)
    return {
        "rows": tally.rows,
        "kept": tally.kept,
        "rows_used": tally.used,
        "dropped": dict(dropped.reasons.most_common()),
        "mean_gain": tally.gain / kept,
        "mean_chosen_characters": tally.chosen_characters / kept,
        "mean_rejected_characters": tally.rejected_characters / kept,
        "chosen_longer_share": tally.chosen_longer / kept,
    }


def show(tally: PairTally, dropped: DroppedRows) -> None:
    """Tell what was kept, what fell out and why, and whether the chosen are merely longer."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.reasons.most_common())
    console.say(
        f"{tally.rows} rows: {tally.kept} kept" + (f"; dropped: {reasons}" if reasons else "")
    )
    if dropped.reasons:
        console.say(f"dropped rows with their reasons: {dropped.path}")
    ratio = tally.chosen_characters / max(1, tally.rejected_characters)
    console.say(
        f"mean gain {tally.gain / tally.kept:+.2f}; chosen {ratio:.2f} times as long as rejected, "
        f"longer in {tally.chosen_longer / tally.kept:.0%} of pairs"
    )


def _all_dropped(data: Sequence[Path], dropped: DroppedRows) -> str:
    reasons = dropped.reasons.most_common()
    worst = reasons[0][0] if reasons else ""
    advice = {
        "copy": "The critic repeats the draft: it was trained on too many good drafts.",
        "unparsed": "The critic does not keep the format: train it longer.",
        "truncated": "Replies are cut off: raise --critic-max-tokens.",
    }.get(worst, "Relax --min-gain, or look at the scores in the data.")
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons)
    return f"{', '.join(map(str, data))}: no pair is left ({counted}). {advice}"

"""Stage 2, middle: refinement chosen, draft rejected, where the blind score says it is better."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from srt_cli import console
from srt_cli.artifacts import DroppedRows, OrderedWriter, open_run, read_records
from srt_cli.errors import SrtError
from srt_cli.options import runtime, setting
from srt_cli.records import FeedbackRecord, Message, Preference, as_messages

COMMAND = "build-prefs"


@dataclass(frozen=True)
class BuildPrefs:
    """Turn feedback into preference pairs: the refinement is chosen, the draft rejected.

    A pair is kept only where the blind score of the refinement exceeds the score of the draft by
    the gain. Rows without a usable pair fall out with a reason; kept and dropped add up to the
    input. Needs no torch.

    Examples:

      srt build-prefs --data self-feedback.jsonl --out prefs.jsonl

      srt build-prefs --data self-feedback.jsonl --min-gain 2 --max-length-ratio 1.5
    """

    data: Path = setting(Path("self-feedback.jsonl"), "Feedback to pair.", metavar="FILE")
    out: Path = runtime(Path("prefs.jsonl"), "Where the preferences go.", metavar="FILE")
    min_gain: float = setting(
        1.0, "Smallest blind gain of the refinement (paper: it must exceed the draft's score)."
    )
    max_length_ratio: float = setting(
        3.0, "Longest refinement, as a multiple of its draft's characters (paper: no limit)."
    )
    seed: int = setting(42, "Recorded for the chain; building pairs draws nothing.")
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
    seen: set[bytes] = field(default_factory=set)


def run(options: BuildPrefs) -> None:
    """Read feedback, keep the pairs that teach, write `prefs.jsonl`."""
    run = open_run(
        COMMAND, options, options.out, inputs={"data": options.data}, overwrite=options.overwrite
    )
    tally = PairTally()
    with run:
        records = read_records(options.data, FeedbackRecord.model_validate, limit=options.limit)
        dropped = DroppedRows(options.out)
        writer = OrderedWriter(options.out)
        try:
            for pair in keep_pairs(records, options, dropped, tally):
                writer.add(tally.kept - 1, [pair])
            dropped.commit()
            if tally.kept:
                writer.commit()
        finally:
            writer.discard()
            dropped.discard()
        run.manifest.progress = f"{tally.rows} of {tally.rows}"
        run.manifest.tallies = tallies_of(tally, dropped)
        if not tally.kept:
            raise SrtError(_all_dropped(options.data, dropped))
    show(tally, dropped)
    console.finish(f"{options.out}: {tally.kept} pairs", f"srt dpo --prefs {options.out}")


def keep_pairs(
    records: Iterable[FeedbackRecord], options: BuildPrefs, dropped: DroppedRows, tally: PairTally
) -> Iterator[Preference]:
    """Yield a pair for each row that gives one; note every other row with its reason."""
    for record in records:
        tally.rows += 1
        reason = why_no_pair(record, options)
        pair = pair_of(record) if reason is None else None
        if pair is not None:
            fingerprint = _fingerprint(pair)
            if fingerprint in tally.seen:
                reason = "duplicate"
            tally.seen.add(fingerprint)
        if pair is None or reason is not None:
            assert reason is not None
            dropped.add(record.id, reason, record)
            continue
        tally.kept += 1
        tally.gain += pair.chosen_score - pair.rejected_score
        chosen, rejected = len(pair.chosen[0].content), len(pair.rejected[0].content)
        tally.chosen_characters += chosen
        tally.rejected_characters += rejected
        tally.chosen_longer += chosen > rejected
        yield pair


def why_no_pair(record: FeedbackRecord, options: BuildPrefs) -> str | None:
    """The first reason for which a row gives no pair; null when it gives one."""
    if record.status != "ok":
        return record.status
    if record.gain is None or record.response is None or record.refinement is None:
        return "incomplete"
    draft, refinement = record.response.strip(), record.refinement.strip()
    if not draft or not refinement:
        return "empty"
    if draft == refinement:
        return "copy"
    if record.gain < options.min_gain or record.gain <= 0:
        return f"gain below {options.min_gain:g}"
    if len(refinement) > options.max_length_ratio * len(draft):
        return f"refinement over {options.max_length_ratio:g} times as long"
    return None


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


def tallies_of(tally: PairTally, dropped: DroppedRows) -> dict[str, object]:
    """The manifest's form; kept and dropped add up to the rows read."""
    assert tally.kept + dropped.reasons.total() == tally.rows
    kept = max(1, tally.kept)
    return {
        "rows": tally.rows,
        "kept": tally.kept,
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


def _all_dropped(data: Path, dropped: DroppedRows) -> str:
    reasons = dropped.reasons.most_common()
    worst = reasons[0][0] if reasons else ""
    advice = {
        "copy": "The critic repeats the draft: it was trained on too many good drafts.",
        "unparsed": "The critic does not keep the format: train it longer.",
        "truncated": "Replies are cut off: raise --critic-max-tokens.",
    }.get(worst, "Relax --min-gain, or look at the scores in the data.")
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons)
    return f"{data}: no pair is left ({counted}). {advice}"

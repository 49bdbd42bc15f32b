"""What holds of preferences whatever the feedback: nothing lost, nothing below the gain, no order."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import msgspec
import orjson
import pytest
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import wait_until_gone
from test_build_prefs import record

from srt_cli.pairs.building import PairPlan, decide, shape_of
from srt_cli.pairs.external_sort import ExternalSort
from srt_cli.pairs.length_balance import Shape, balance_lengths
from srt_cli.pairs.pairing import group_key, line_of, preference_of
from srt_cli.pairs.rows import FeedbackPart, FeedbackRow, GroupedRows, UsagePart, read_row
from srt_cli.pairs.rules import ExcludedPrompts, PairRules
from srt_cli.pairs.summary import PairSummary
from srt_cli.records import Feedback, FeedbackRecord, Message, Usage
from srt_cli.runs.jsonl import to_line

scores = st.one_of(st.integers(1, 10).map(float), st.floats(1, 10))
texts = st.text("ab c.", max_size=12)
prompts = st.one_of(
    st.sampled_from(["p", "q", "P "]),
    st.just([Message(role="system", content="s"), Message(role="user", content="p")]),
)


@st.composite
def rows(draw):
    before, after = draw(scores), draw(st.none() | scores)
    feedback = Feedback(
        weaknesses="w", suggestions="s", score=before, score_mean=draw(st.none() | scores)
    )
    return record(
        id=draw(st.sampled_from("123")), prompt=draw(prompts), response=draw(st.none() | texts),
        feedback=draw(st.none() | st.just(feedback)), refinement=draw(st.none() | texts),
        refinement_score=after, refinement_score_mean=draw(st.none() | scores),
        status=draw(st.sampled_from(["ok", "ok", "ok", "unparsed", "truncated"])),
        sample=draw(st.integers(0, 2)), critic=draw(st.sampled_from("cd")),
    )  # fmt: skip


plans = st.builds(
    PairPlan,
    strategy=st.sampled_from(["refine", "best-worst", "refine-best", "tiers"]),
    rho=st.floats(0, 0.49),
    score=st.sampled_from(["integer", "expected"]),
    rules=st.builds(
        PairRules,
        min_gain=st.floats(-1, 4),
        max_length_ratio=st.floats(0.5, 4),
        hygiene=st.booleans(),
        excluded=st.just(ExcludedPrompts([])),
    ),
    near_duplicates=st.sampled_from([None, None, 0.8]),
)


def decisions_of(files, plan):
    """Every decision on the rows of some files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{number}.jsonl" for number in range(len(files))]
        for path, held in zip(paths, files, strict=True):
            write_jsonl(path, [row.model_dump() for row in held])
        with GroupedRows(folder, lambda record: group_key(record, plan.strategy)) as grouped:
            grouped.read([path for path in paths if path.stat().st_size], None, None)
            return list(decide(grouped, plan, "pairing"))


def kept_lines(decisions):
    return sorted(line_of(decision.kept) for decision in decisions if decision.kept is not None)


def test_the_fast_form_of_a_row_holds_the_fields_of_the_record_and_no_others():
    def fields_of(record, row):
        needed = {name: field.is_required() for name, field in record.model_fields.items()}
        assert {field.name: field.required for field in msgspec.structs.fields(row)} == needed

    fields_of(FeedbackRecord, FeedbackRow)
    fields_of(Feedback, FeedbackPart)
    fields_of(Usage, UsagePart)


@pytest.mark.parametrize(
    "changes",
    [
        {"refinement_score": "7", "sample": "1"}, {"response_cut": 1, "round": 2.0},
        {"prompt": [{"role": "user", "content": "p"}], "odds": {"refinement": [0.25, "0.5"]}},
    ],
)  # fmt: skip
def test_what_only_the_record_accepts_is_read_as_the_record_reads_it(changes):
    line = orjson.dumps(record().model_dump(mode="json") | changes)
    read = FeedbackRecord.model_validate_json(line)
    row = read_row(line)
    for name in FeedbackRecord.model_fields.keys() - {"feedback", "usage"}:
        assert getattr(row, name) == getattr(read, name), name
    assert row.feedback is not None
    assert row.feedback.score == read.feedback.score


@pytest.mark.parametrize(
    "line",
    [
        b'{"a": 1}', b"7", b"[]", b"nonsense", b'{"id": "\xff"}',
        to_line(record()).replace(b'"ok"', b'"fine"'),
        to_line(record()).replace(b'{"id"', b'{"answers":[],"id"'),
        to_line(record()).replace(b'"score":', b'"score":1', 1),
        to_line(record(prompt=[Message(role="user", content="p")])).replace(b'"user"', b'"me"'),
    ],
)  # fmt: skip
def test_a_row_that_is_no_record_is_refused_with_its_line(srt, tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(to_line(record()) + line.rstrip() + b"\n")
    finished = srt("build-prefs", "--data", "a.jsonl")
    assert finished.code == 1
    assert "a.jsonl:2: " in finished.stderr


@settings(max_examples=200)
@given(st.lists(rows(), max_size=8), plans)
def test_every_row_is_used_or_dropped_and_every_pair_keeps_the_rules(held, plan):
    summary = PairSummary(seed=1)
    positions = []
    for decision in decisions_of([held], plan):
        summary.add(decision)
        positions += [place for place, *_ in decision.dropped]
        if decision.kept is None:
            continue
        chosen, rejected = decision.kept
        shape = shape_of(decision.kept)
        assert chosen.text != rejected.text
        assert chosen.text == chosen.text.strip() != ""
        assert rejected.text
        assert chosen.score > rejected.score
        assert shape.gain >= plan.rules.min_gain
        assert shape.gap == len(chosen.text) - len(rejected.text)
        assert len(chosen.text) <= plan.rules.max_length_ratio * len(rejected.text)
        positions.append(decision.place)
        assert line_of(decision.kept) == to_line(preference_of(decision.kept))
    figures = summary.describe()
    assert figures["rows"] == len(held)
    assert figures["rows_used"] + sum(figures["dropped"].values()) == len(held)
    assert len(set(positions)) == len(positions)


@settings(max_examples=100)
@given(st.lists(rows(), max_size=8), plans, st.randoms(use_true_random=False))
def test_order_and_repetition_of_rows_and_files_change_no_pair(held, plan, chance):
    straight = kept_lines(decisions_of([held], plan))
    shuffled = list(held)
    chance.shuffle(shuffled)
    cut = chance.randint(0, len(held))
    assert kept_lines(decisions_of([shuffled], plan)) == straight
    assert kept_lines(decisions_of([shuffled[cut:], held, shuffled[:cut]], plan)) == straight


def test_the_command_gives_the_same_pairs_in_any_order_also_when_it_spills(
    srt, tmp_path, monkeypatch
):
    chance = random.Random(0)
    held = [
        record(id=str(n % 70), prompt=f"p{n % 70}", sample=n // 70, response=f"{n} " * 9,
               refinement=f"{n} " * 5 + f"and {n % 3}", score=chance.randint(1, 9),
               refinement_score=chance.randint(1, 9)).model_dump()
        for n in range(280)
    ]  # fmt: skip
    write_jsonl(tmp_path / "a.jsonl", held)
    chance.shuffle(held)
    write_jsonl(tmp_path / "b.jsonl", held)
    for strategy in ("refine", "best-worst", "refine-best", "tiers"):
        line = ("build-prefs", "--strategy", strategy, "--no-hygiene", "--data")
        assert srt(*line, "a.jsonl", "--out", f"{strategy}.jsonl").code == 0
        first = (tmp_path / f"{strategy}.jsonl").read_bytes()
        assert first.count(b"\n") > 30
        with monkeypatch.context() as patch:
            patch.setattr(ExternalSort.__init__, "__defaults__", (20_000,))
            assert srt(*line, "b.jsonl", "--out", "shuffled.jsonl", "--overwrite").code == 0
            twice = srt(
                *line, "a.jsonl", "--data", "a.jsonl", "--out", "twice.jsonl", "--overwrite"
            )
            assert twice.code == 0
        shuffled = (tmp_path / "shuffled.jsonl").read_bytes()
        assert sorted(shuffled.splitlines()) == sorted(first.splitlines())
        assert (tmp_path / "twice.jsonl").read_bytes() == first


shapes = st.builds(
    Shape, st.integers(-500, 500), st.floats(0.1, 9), st.binary(min_size=16, max_size=16)
)


different = st.lists(shapes, min_size=1, max_size=60, unique_by=lambda pair: pair.fingerprint)


@given(different, st.sampled_from(["margin", "subset"]))
def test_thinning_out_brings_the_sum_as_near_to_zero_as_the_next_pair_allows(pairs, method):
    cut = balance_lengths(method, pairs, Path(tempfile.gettempdir()))
    kept = [pair for pair in pairs if cut.keeps(pair)]
    total, left = sum(pair.gap for pair in pairs), sum(pair.gap for pair in kept)
    assert abs(left) <= abs(total)
    assert abs(left) <= max(abs(pair.gap) for pair in pairs)
    # Only pairs of the side that outweighs fall out.
    assert all(pair.gap * total > 0 for pair in pairs if not cut.keeps(pair))
    assert cut.after == len(kept)
    fallen = [pair for pair in pairs if not cut.keeps(pair)]
    same_side = [pair for pair in kept if pair.gap * total > 0]
    if fallen and same_side and method == "subset":
        assert min(abs(p.gap) for p in fallen) >= max(abs(p.gap) for p in same_side)
    if fallen and same_side and method == "margin":
        price = [p.gain / abs(p.gap) for p in same_side]
        assert max(p.gain / abs(p.gap) for p in fallen) <= min(price)


@given(different)
def test_matching_leaves_as_many_longer_as_shorter_pairs_of_each_size(pairs):
    cut = balance_lengths("matched", pairs, Path(tempfile.gettempdir()))
    kept = [pair for pair in pairs if cut.keeps(pair)]
    assert cut.after == len(kept)
    sides = Counter(pair.gap > 0 for pair in kept if pair.gap)
    assert sides[True] == sides[False]
    assert {pair.fingerprint for pair in pairs if not pair.gap} <= {p.fingerprint for p in kept}


@pytest.mark.parametrize("method", ["margin", "subset", "matched"])
def test_which_pairs_stay_does_not_depend_on_their_order(method, tmp_path):
    chance = random.Random(1)
    pairs = [Shape(chance.randint(-20, 60), chance.randint(1, 5), chance.randbytes(16))
             for _ in range(300)]  # fmt: skip
    first = balance_lengths(method, pairs, tmp_path)
    chance.shuffle(pairs)
    assert balance_lengths(method, pairs, tmp_path).cuts == first.cuts


def test_two_processes_and_one_make_the_same_files(srt, tmp_path, monkeypatch):
    chance = random.Random(1)
    held = [
        record(id=str(n), prompt=f"p{n % 90}", response=f"{n % 110} " * 9, sample=n // 90,
               refinement=f"{n % 110} {n % 90} and" * 5, score=chance.randint(1, 9)).model_dump()
        for n in range(270)
    ]  # fmt: skip
    chance.shuffle(held)
    write_jsonl(tmp_path / "a.jsonl", held)
    monkeypatch.setattr("srt_cli.pairs.rows.STRETCH_BYTES", 20_000)
    made = []
    for size, strategy in ((2**40, "refine"), (0, "refine"), (2**40, "tiers"), (0, "tiers")):
        monkeypatch.setattr("srt_cli.pairs.rows.BYTES_FOR_PROCESSES", size)
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
        line = ("build-prefs", "--data", "a.jsonl", "--strategy", strategy, "--no-hygiene")
        finished = srt(*line, "--out", "prefs.jsonl", "--overwrite")
        assert finished.code == 0, finished.stderr
        names = ("prefs.jsonl", "prefs.dropped.jsonl")
        made.append([(tmp_path / name).read_bytes() for name in names])
    assert made[0] == made[1] != made[2] == made[3]
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"id": 7}\n')
    finished = srt(*line, "--out", "other.jsonl")
    assert finished.code == 1
    assert "a.jsonl:271: id: input should be a valid string" in finished.stderr


WAITS = """\
import time
from srt_cli.pairs.rows import Helpers

if __name__ == "__main__":
    print("on", flush=True)
    for _ in Helpers(2).map(time.sleep, [0] * 6 + [9] * 9):
        pass
"""


def test_ctrl_c_ends_the_helpers_without_a_word_of_theirs(tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    process = subprocess.Popen(
        [sys.executable, "waits.py"], cwd=tmp_path, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)  # while the helpers import what they need
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said.count("Traceback") == said.count("KeyboardInterrupt") == 1
    wait_until_gone(process.pid)

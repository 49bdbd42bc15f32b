"""Many rows side by side: every reply is kept, asked for once, and order changes nothing."""

import json
import os
import signal
import time
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srt_cli.calls.conduct import Call, Tally, conduct
from srt_cli.errors import QuotaError
from srt_cli.models import EVERYTHING, Reply, Request
from srt_cli.records import Message
from srt_cli.runs.journal import Journal


class Echo:
    """A model that answers when told to, in an order of the test's choosing."""

    def __init__(self, *, batched=False, in_flight=2, fail_at=None, reverse=False):
        self.spec = self.identity = "echo"
        self.batched, self.in_flight = batched, in_flight
        self.fail_at, self.reverse = fail_at, reverse
        self.asked = []
        self.waves = []

    def submit(self, requests, answered=()):
        futures = [Future() for _ in requests]
        self.waves.append([request.messages[0].content for request in requests])
        order = list(enumerate(requests))
        for position, request in reversed(order) if self.reverse else order:
            if answered and answered[position]:
                continue
            text = request.messages[0].content
            self.asked.append(text)
            if self.fail_at is not None and len(self.asked) >= self.fail_at:
                futures[position].set_exception(QuotaError("no credit"))
            else:
                futures[position].set_result(Reply(text=text.upper(), finish_reason="stop"))
        return futures

    def finish(self, seconds):
        return True


def ask(model, text):
    return Call(model, Request((Message(role="user", content=text),), max_tokens=5), text)


def row(model, name, steps=2):
    said = []
    for step in range(steps):
        reply = yield ask(model, f"{name}-{step}")
        said.append(reply.text)
    return said


def run(tmp_path, model, rows=6, tally=None):
    scripts = (row(model, f"r{n}") for n in range(rows))
    with Journal(tmp_path / "x.journal.jsonl") as journal:
        return dict(conduct(scripts, journal, [model], tally))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_every_row_gets_its_own_replies(tmp_path, batched, reverse):
    results = run(tmp_path, Echo(batched=batched, reverse=reverse))
    assert results == {n: [f"R{n}-0", f"R{n}-1"] for n in range(6)}


@pytest.mark.parametrize("batched", [True, False])
def test_a_second_run_asks_nothing(tmp_path, batched):
    first = run(tmp_path, Echo(batched=batched))
    again, tally = Echo(batched=batched), Tally()
    assert run(tmp_path, again, tally=tally) == first
    assert again.asked == []
    assert (tally.paid, tally.from_journal) == (0, 12)


def test_a_batched_model_sees_the_same_waves_whatever_is_answered_already(tmp_path):
    straight = Echo(batched=True)
    run(tmp_path / "straight", straight)
    resumed = Echo(batched=True)
    with pytest.raises(QuotaError):
        run(tmp_path / "broken", Echo(batched=True, fail_at=5))
    run(tmp_path / "broken", resumed)
    assert resumed.waves == straight.waves
    assert 0 < len(resumed.asked) < len(straight.asked)


def run_before(path, rows):
    """A journal that holds rows called old, and its size."""
    model = Echo()
    with Journal(path) as journal:
        list(conduct((row(model, f"old{n}") for n in range(rows)), journal, [model]))
    return path.stat().st_size


def test_rows_of_earlier_runs_take_no_place_in_a_wave(tmp_path):
    """Nor in the waves of the same run when it was interrupted and goes on."""

    def go_on(path, **how):
        model = Echo(batched=True, in_flight=4, **how)
        with Journal(path, before=before) as journal:
            results = dict(conduct((row(model, name) for name in names), journal, [model]))
        assert [results[n][0] for n in range(len(names))] == [f"{n.upper()}-0" for n in names]
        return model

    names = [name for n in range(12) for name in (f"old{n}", f"new{n}")]
    before = run_before(tmp_path / "straight.jsonl", 12)
    run_before(tmp_path / "broken.jsonl", 12)
    straight = go_on(tmp_path / "straight.jsonl")
    assert [len(wave) for wave in straight.waves] == [8, 8, 4, 4]
    assert all(text.startswith("new") for wave in straight.waves for text in wave)
    with pytest.raises(QuotaError):
        go_on(tmp_path / "broken.jsonl", fail_at=11)
    resumed = go_on(tmp_path / "broken.jsonl")
    assert resumed.waves == straight.waves
    assert 0 < len(resumed.asked) < len(straight.asked)


def test_no_model_waits_while_rows_are_read_that_the_journal_holds(tmp_path):
    class Noting(Echo):
        def submit(self, requests, answered=()):
            self.read.append(len(results))
            return super().submit(requests, answered)

    model, results = Noting(in_flight=64), {}
    model.read = []
    run_before(tmp_path / "x.jsonl", 500)
    names = ["new0", *(f"old{n}" for n in range(500)), "new1"]
    with Journal(tmp_path / "x.jsonl") as journal:
        for index, result in conduct((row(model, name) for name in names), journal, [model]):
            results[index] = result
    # The first call goes out, is answered and followed by the second while the old rows are read.
    assert [asked for wave in model.waves[:2] for asked in wave] == ["new0-0", "new0-1"]
    assert model.read[0] <= 16
    assert model.read[1] <= 32
    assert len(results) == len(names)


def test_replies_that_came_in_before_a_fatal_error_are_kept(tmp_path):
    with pytest.raises(QuotaError):
        run(tmp_path, Echo(in_flight=64, fail_at=4))
    again = Echo()
    run(tmp_path, again)
    assert len(again.asked) == 12 - 3


def test_ctrl_c_while_a_reply_is_being_kept_loses_nothing(tmp_path, monkeypatch):
    append, interrupted = Journal.append, []

    def interrupted_once(journal, *reply):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        append(journal, *reply)

    monkeypatch.setattr(Journal, "append", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Echo(in_flight=64))
    again = Echo()
    run(tmp_path, again)
    assert len(again.asked) == 12 - 6


@pytest.mark.parametrize("step", ["_write", "_take_in", "append"])
def test_ctrl_c_behind_the_write_of_a_reply_keeps_it_once(tmp_path, monkeypatch, step):
    done, interrupted = getattr(Journal, step), []

    def interrupted_once(journal, *arguments):
        done(journal, *arguments)
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, step, interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Echo(in_flight=64))
    again = Echo()
    run(tmp_path, again)
    assert len(again.asked) == 12 - 6
    (journal,) = tmp_path.glob("*.jsonl")
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 12


def test_ctrl_c_while_calls_are_handed_over_loses_none(tmp_path):
    class Interrupted(Echo):
        def submit(self, requests, answered=()):
            futures = super().submit(requests, answered)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            return futures

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted())
    again = Echo()
    run(tmp_path, again)
    assert len(again.asked) == 12 - 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_so_does_a_signal_that_ends_the_run(tmp_path, number):
    class Ended(Echo):
        def submit(self, requests, answered=()):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            return super().submit(requests, answered)

    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, Ended())
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    again = Echo()
    run(tmp_path, again)
    assert len(again.asked) == 12 - 2


@pytest.mark.parametrize("in_flight", [1, 8])
def test_rows_that_ask_the_same_at_once_get_one_reply_that_is_paid_for_once(tmp_path, in_flight):
    model, tally = Echo(in_flight=in_flight, reverse=True), Tally()
    with Journal(tmp_path / "x.journal.jsonl") as journal:
        scripts = (row(model, "same") for _ in range(5))
        results = dict(conduct(scripts, journal, [model], tally))
    assert results == {n: ["SAME-0", "SAME-1"] for n in range(5)}
    assert model.asked == ["same-0", "same-1"]
    assert (tally.paid, tally.from_journal) == (2, 8)


def test_a_failed_call_is_owed_again(tmp_path):
    class Flaky(Echo):
        def submit(self, requests, answered=()):
            futures = super().submit(requests, answered)
            bad = Reply(text="", finish_reason="failed", error="connection reset")
            for position, request in enumerate(requests):
                if request.messages[0].content == "r1-0":
                    futures[position] = Future()
                    futures[position].set_result(bad)
            return futures

    assert run(tmp_path, Flaky())[1] == ["", "R1-1"]
    again = Echo()
    assert run(tmp_path, again)[1] == ["R1-0", "R1-1"]
    assert again.asked == ["r1-0"]


def test_rows_nearest_to_their_end_go_first(tmp_path):
    model = Echo(in_flight=1)
    run(tmp_path, model, rows=3)
    assert model.asked == ["r0-0", "r0-1", "r1-0", "r1-1", "r2-0", "r2-1"]


def test_a_model_has_twice_as_many_rows_as_it_holds_requests(tmp_path):
    started = []

    def counted(name):
        started.append(name)
        return (yield from row(model, name))

    model = Echo()
    scripts = (counted(f"r{n}") for n in range(50))
    with Journal(tmp_path / "x.journal.jsonl") as journal:
        results = conduct(scripts, journal, [model])
        next(results)
        assert len(started) == 4
        results.close()


def test_replies_that_came_in_together_are_handed_on_together(tmp_path):
    model = Echo(in_flight=8)
    run(tmp_path, model, rows=8)
    assert [len(wave) for wave in model.waves] == [8, 8]


def test_a_model_that_takes_everything_gets_all_rows_in_one_wave(tmp_path):
    model = Echo(batched=True, in_flight=EVERYTHING)
    run(tmp_path, model, rows=1200)
    assert [len(wave) for wave in model.waves] == [1200, 1200]


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(1, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_mix_of_row_lengths_comes_out_whole(tmp_path_factory, lengths, in_flight, batched):
    model = Echo(batched=batched, in_flight=in_flight)
    path = tmp_path_factory.mktemp("calls") / "x.journal.jsonl"
    scripts = (row(model, f"r{n}", steps) for n, steps in enumerate(lengths))
    with Journal(path) as journal:
        results = dict(conduct(scripts, journal, [model]))
    assert {n: len(said) for n, said in results.items()} == dict(enumerate(lengths))


@pytest.mark.parametrize(
    ("reply", "status", "reason", "is_beginning"),
    [
        (Reply("A whole answer.", "stop"), "ok", None, False),
        (Reply(" \n", "stop"), "unparsed", "empty reply", False),
        (Reply("Half an ans", "length"), "truncated", "cut off at the token limit", True),
        (
            Reply("", "length"),
            "truncated",
            "the token limit was reached before any text",
            False,
        ),
        (Reply("so " * 300, "length"), "truncated", "repeats itself without end; cut", False),
        (Reply("so so so", "loop"), "truncated", "repeats itself without end; cut", False),
        (
            Reply("I cannot", "refused"),
            "refused",
            "refused by the model or a content filter",
            False,
        ),
        (Reply("", "failed", error="timed out"), "failed", "timed out", False),
    ],
)
def test_a_reply_says_itself_what_became_of_it(reply, status, reason, is_beginning):
    assert (reply.status, reply.reason, reply.is_beginning) == (status, reason, is_beginning)

"""The figures of `make bench` at a small scale: what must hold on any machine, however slow."""

import signal
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import collect  # noqa: E402

FEW_RUNS = 1


def test_requests_go_out_side_by_side():
    alone = collect.throughput(40, 1)
    together = collect.throughput(400, 64)
    assert together["requests/s"] > 5 * alone["requests/s"]


def test_it_is_faster_than_a_loop_written_by_hand():
    ours = collect.throughput(1200, 128)
    plain = collect.plain_throughput("openai", 600, 128)
    assert ours["requests/s"] > 1.3 * plain["requests/s"]


def test_the_slots_are_kept_full():
    assert collect.share_of_ideal(160, 16, 0.3)["share"] > 0.85


def test_first_sight_refusals_cost_one_wait_and_no_row():
    clean = collect.throughput(400, 64)
    refused = collect.throughput(400, 64, "--fault", "429:0.05", "--retry-after", 0.3)
    assert refused["wall_s"] < clean["wall_s"] + 4


@pytest.mark.parametrize("flags", [(), ("--retry-after", -1)], ids=["retry-after", "no header"])
def test_a_server_that_admits_so_many_a_second_is_neither_stormed_nor_left_idle(flags):
    found = collect.under_a_limit(800, 100, *flags)
    assert found["goodput"] > 0.5
    assert found["wasted"] < 0.15


@pytest.mark.parametrize("answered", [20, 90, 170])
def test_a_kill_repeats_no_more_than_what_was_in_flight(answered):
    found = collect.killed(100, 16, answered)
    assert found["rows missing"] == 0
    assert found["journaled calls made twice"] == 0
    assert found["calls repeated"] <= 16
    assert found["kept at the kill"] >= answered


def test_memory_does_not_grow_with_the_rows_and_a_full_journal_asks_nothing():
    few, many = collect.many_rows(500), collect.many_rows(5000)
    assert many["calls again"] == few["calls again"] == 0
    # The rows and their replies would take 13 MB.
    assert many["peak_mb"] - few["peak_mb"] < 10
    # A file for each of 256 requests, and a few more.
    assert many["handles"] < 300
    assert many["threads"] <= few["threads"] + 1
    assert many["again_s"] < 10
    assert many["journal bytes a row"] < 1500


def test_an_empty_account_stops_all_but_what_is_in_flight():
    found = collect.quota_stop(200, 16, 50)
    assert found["answered"] == 50
    assert found["answers lost"] == 0
    assert 1 <= found["further calls"] <= 16


def test_ctrl_c_waits_for_the_calls_that_are_paid_for_already():
    with collect.folder_of(100) as folder, collect.ChatServer("--latency", 1.5) as server:
        process = collect.start(folder, collect.srt_line(server, "--concurrency", 16))
        while server.stats()["requests"] < 40:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 130, output
        assert "waiting for the calls under way; Ctrl-C again leaves them" in output
        stats = server.stats()
        assert collect.count_lines(folder / collect.JOURNAL) == stats["200"] == stats["requests"]


def test_a_second_ctrl_c_leaves_at_once_and_still_writes_what_is_complete():
    with collect.folder_of(100) as folder, collect.ChatServer("--latency", 1.5) as server:
        process = collect.start(folder, collect.srt_line(server, "--concurrency", 16))
        while server.stats()["requests"] < 40:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 130, output
        assert "Traceback" not in output
        assert (folder / collect.FEEDBACK).exists()
        assert '"status": "interrupted"' in (folder / "feedback.run.json").read_text()


@pytest.mark.parametrize("dollars", [20.0, 70.0])
def test_a_cost_cap_is_never_exceeded_whatever_the_length_of_replies(dollars):
    found = collect.spent_under_a_cap(200, 32, dollars)
    assert 0.5 * dollars < found["spent"] <= dollars


def test_the_journal_keeps_up_with_any_server():
    assert collect.cost_of_syncing(2000)["synced lines/s"] > 2000


def test_every_benchmark_prints_its_line(capsys):
    table = collect.Table()
    collect.bench_sync(table, FEW_RUNS)
    table.line("a bar", "missed", "bar", met=False)
    shown = capsys.readouterr().out
    assert "8 journal, synced against not" in shown
    assert table.failed

"""Nothing is paid twice, no cap is passed, and what a run will cost is said before it begins."""

import json
import re

import pytest
from aiohttp import web
from batch_server import BatchServer
from conftest import read_jsonl, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from loopback_server import CRITIQUE, Answer, LoopbackServer, as_policy_and_critic
from provider_servers import AnthropicServer

from srt_cli.errors import BudgetReached
from srt_cli.models import ModelOptions, Reply, Request, Thinks, open_model, parse_spec
from srt_cli.models.api.batch import BatchModel
from srt_cli.models.api.openai_batches import OpenAiBatches
from srt_cli.models.budget import Budget, Price, parse_prices, price_of, priced
from srt_cli.records import Message, Usage
from srt_cli.runs.journal import Journal

PRICE = ("--price", "tester=10/1000")
GOOD = CRITIQUE.format(score=4)


@pytest.fixture
def serve():
    servers = []

    def start(behaviour, kind=LoopbackServer, **options):
        servers.append(kind(behaviour, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def prompts(tmp_path):
    def write(count, response="A short draft."):
        rows = [{"id": str(n), "prompt": f"q{n}", "response": response} for n in range(count)]
        write_jsonl(tmp_path / "prompts.jsonl", rows)

    return write


def collect(srt, server, *extra):
    return srt("collect-feedback", "--critic", server.spec, *extra)


def of_any_length(body, number):
    """Replies whose lengths differ a hundredfold."""
    answer = as_policy_and_critic(body, number)
    answer.completion_tokens = 1 + (number * 7919) % 150
    answer.delay_s = 0.01 * (number % 3)
    return answer


def spent(server, answers):
    return sum(11 * 10 + answer * 1000 for answer in answers) / 1_000_000


def test_a_cost_cap_is_never_passed_and_a_higher_one_goes_on(srt, serve, prompts, tmp_path):
    paid = []

    def behaviour(body, number):
        answer = of_any_length(body, number)
        paid.append(answer.completion_tokens)
        return answer

    server = serve(behaviour)
    prompts(60)
    line = ("--critic-max-tokens", 150, "--concurrency", 64, *PRICE)
    stopped = collect(srt, server, *line, "--max-cost", 4)
    assert stopped.code == 4
    assert "run the same line with a higher cap to go on" in stopped.stderr
    assert 3 < spent(server, paid) <= 4
    manifest = json.loads((tmp_path / "feedback.run.json").read_text())
    assert manifest["status"] == "interrupted"
    assert manifest["cost"]["dollars"] == pytest.approx(spent(server, paid))
    finished = collect(srt, server, *line, "--max-cost", 20)
    assert finished.code == 0
    assert len(server.requests) == 120
    assert len({json.dumps(request) for request in server.requests}) == 120
    assert f"cost: ${spent(server, paid):.4f}" in finished.stderr


@pytest.mark.parametrize(
    ("cap", "most"), [(("--max-requests", 7), 7), (("--max-tokens-total", 2500), 2500 // 18)]
)
def test_other_caps_hold_too(srt, serve, prompts, cap, most):
    server = serve(as_policy_and_critic)
    prompts(100)
    stopped = collect(srt, server, "--critic-max-tokens", 50, *cap)
    assert stopped.code == 4
    assert 0 < len(server.requests) <= most


@pytest.mark.parametrize("batch_poll_s", [None, 0.01])
@pytest.mark.parametrize(
    ("thinks", "extra", "asked"),
    [(Thinks("on", tokens=100), {}, 1536), (Thinks(), {"max_tokens": 3000}, 3000)],
)
def test_what_is_asked_for_beyond_the_answers_own_limit_is_reserved_too(
    serve, monkeypatch, tmp_path, batch_poll_s, thinks, extra, asked
):
    monkeypatch.setenv("SRT_CACHE", str(tmp_path))
    server = serve(lambda body, number: Answer(), AnthropicServer)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.address)
    monkeypatch.setenv("ANTHROPIC_API_KEY", server.key)
    request = Request(
        (Message(role="user", content="Hi"),), 512 + thinks.tokens, thinks=thinks
    )  # fmt: skip

    def ask(cap):
        told = ModelOptions(
            extra_body=extra, budget=Budget(max_tokens=cap), batch_poll_s=batch_poll_s
        )
        model = open_model("anthropic:claude-sonnet-4-5", told)
        (future,) = model.submit([request])
        future.result(20)
        model.close()

    read = 2 + 2 * 16
    with pytest.raises(BudgetReached, match=f"may take up to {read + asked} tokens"):
        ask(read + asked - 1)
    assert not server.requests
    ask(read + asked)
    assert [body["max_tokens"] for body in server.requests] == [asked]


def test_a_cap_on_an_unknown_price_is_refused(srt, serve, prompts):
    server = serve(as_policy_and_critic)
    prompts(1)
    refused = collect(srt, server, "--max-cost", 1)
    assert refused.code == 2
    assert "the price of tester is not known" in refused.stderr
    assert not server.requests


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400), st.floats(0, 1)), max_size=40),
    st.integers(0, 5000),
)
def test_reservations_keep_the_sum_under_the_cap(calls, cap):
    budget = Budget(max_tokens=cap)
    waiting = []
    for read, written, share in calls:
        most = Usage(prompt_tokens=read, completion_tokens=written)
        if budget.reserve(None, most):
            waiting.append((most, Usage(prompt_tokens=round(share * read))))
        if len(waiting) > 3:
            budget.settle(None, *waiting.pop(0))
        assert budget.tokens <= cap
    for most, used in waiting:
        budget.settle(None, most, used)
    assert budget.tokens <= cap
    assert budget.in_flight == 0


def test_prices_are_listed_given_or_unknown_but_never_nothing():
    assert price_of(parse_spec("gpt-4"), {}) == Price(30, 60)
    assert price_of(parse_spec("gpt-4o-2024-08-06"), {}) == Price(2.5, 10, 1.25)
    assert price_of(parse_spec("gpt-99"), {}) is None
    assert price_of(parse_spec("http://h/v1#llama"), {}) is None
    long = Price(6, 22.5, 0.6, 7.5)
    claude = price_of(parse_spec("anthropic:claude-sonnet-4-5"), {})
    assert claude == Price(3, 15, 0.3, 3.75, tiers=((200_000, long),))
    assert claude.of_batch().tiers == ((200_000, Price(3, 11.25, 0.3, 3.75)),)
    assert price_of(parse_spec("openrouter:anthropic/claude-sonnet-4.5"), {}).output == 15
    assert price_of(parse_spec("https://api.openai.com/v1#gpt-4"), {}) == Price(30, 60)
    assert price_of(parse_spec("ollama:llama3.2"), {}) == Price(0, 0)
    given = parse_prices(["llama=0.1/0.2/0.05"])
    price = price_of(parse_spec("http://h/v1#llama"), given)
    usage = Usage(prompt_tokens=1000, cached_tokens=600, completion_tokens=500)
    assert price.cost(usage) == pytest.approx((400 * 0.1 + 600 * 0.05 + 500 * 0.2) / 1e6)


def test_a_long_prompt_costs_its_tier_and_a_cache_costs_when_it_is_filled():
    price = Price(3, 15, 0.3, 3.75, tiers=((200_000, Price(6, 22.5, 0.6, 7.5)),))
    short = Usage(prompt_tokens=200_000, completion_tokens=1000)
    assert price.of_call(short) == pytest.approx(0.6 + 0.015)
    usage = Usage(prompt_tokens=300_000, completion_tokens=1000, cached_tokens=100_000)
    dear = (150_000 * 6 + 100_000 * 0.6 + 50_000 * 7.5 + 1000 * 22.5) / 1e6
    assert price.of_call(usage, cache_written=50_000) == pytest.approx(dear)
    assert priced(Reply("x", "stop", usage, cache_written=50_000), price).cost == pytest.approx(
        dear
    )
    # What the tokens tell by themselves is left to be told by them.
    assert priced(Reply("x", "stop", short), price).cost is None
    assert priced(Reply("x", "stop", usage, cost=0.5), price).cost == 0.5


BAD_PRICES = ["gpt-4", "gpt-4=", "gpt-4=a/b", "gpt-4=1", "=1/2", "x=-1/2", "x=nan/1", "x=1/inf"]


@pytest.mark.parametrize("text", BAD_PRICES)
def test_a_malformed_price_is_refused(srt, prompts, serve, text):
    prompts(1)
    finished = collect(srt, serve(as_policy_and_critic), "--price", text)
    assert finished.code == 2
    assert "write NAME=INPUT/OUTPUT" in finished.stderr


def test_a_dry_run_sends_and_writes_nothing(srt, serve, prompts, tmp_path):
    server = serve(as_policy_and_critic)
    prompts(10)
    planned = collect(srt, server, "--dry-run", *PRICE, "--rpm", 4)
    assert planned.code == 0
    assert "rows: 10, of which 0 are answered in the journal" in planned.stdout
    assert "time: at least 5 min (--rpm 4)" in planned.stdout
    # 10 x (450 + 180) expected tokens at $1000 a million are $6.30, and eight cents to read.
    dollars = [float(found) for found in re.findall(r"\$(\d+\.\d\d)", planned.stdout)]
    low, expected, high, batch = dollars
    assert low < expected < high
    assert expected == pytest.approx(6.38, abs=0.02)
    assert batch == pytest.approx(expected / 2, abs=0.01)
    assert not server.requests
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def of_any_role(body, number):
    """A draft, a critique, a faulty answer or a letter, no two of them alike."""
    asked = body["messages"][-1]["content"]
    if body["max_tokens"] == 1:
        return Answer(text="M")
    if "score" not in asked.lower():
        return Answer(text=f"Answer {number} to {asked}")
    text = CRITIQUE.format(score=9) + f" {number}"
    return Answer(text=text.split((body.get("stop") or ["no stop"])[0])[0])


@pytest.mark.parametrize(
    ("line", "each", "other"),
    [
        (("self-critique",), 3, 0),
        (("self-critique", "--rounds", 3), 7, 0),
        (("self-critique", "--score-samples", 4), 9, 0),
        (("self-critique", "--critic", "judge", "--critic-for", "scores"), 2, 2),
        (("self-critique", "--samples", 2, "--compare"), 12, 0),
        (("collect-feedback", "--critic", "judge", "--contrast", "judge"), 1, 5),
    ],
)
def test_a_dry_run_counts_what_each_model_is_asked(srt, serve, prompts, line, each, other):
    servers = {name: serve(of_any_role, models=(name,)) for name in ("tester", "judge")}
    specs = {name: f"{server.url}#{name}" for name, server in servers.items()}
    prompts(2, None)
    line = [specs.get(word, word) for word in line] + ["--model", specs["tester"]]
    planned = srt(*line, "--dry-run")
    assert planned.code == 0, planned.stderr
    cells = [row.split() for row in planned.stdout.splitlines() if row.strip()]
    calls = {row[0]: int(row[1]) for row in cells if row[0] in servers}
    assert calls == {name: 2 * n for name, n in (("tester", each), ("judge", other)) if n}
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    assert {n: len(server.requests) for n, server in servers.items() if server.requests} == calls
    assert "nothing is owed" in srt(*line, "--dry-run").stdout


def test_a_dry_run_knows_what_the_journal_has(srt, serve, prompts):
    server = serve(as_policy_and_critic)
    prompts(10)
    assert collect(srt, server, "--limit", 4).code == 0
    planned = collect(srt, server, "--dry-run")
    assert "rows: 10, of which 4 are answered in the journal" in planned.stdout
    assert "unknown" in planned.stdout
    assert "$0" not in planned.stdout


def test_reparse_rebuilds_the_output_without_a_call(srt, serve, prompts, tmp_path):
    server = serve(as_policy_and_critic)
    prompts(5)
    assert collect(srt, server).code == 0
    before = (tmp_path / "feedback.jsonl").read_bytes()
    (tmp_path / "feedback.jsonl").unlink()
    server.close()
    rebuilt = collect(srt, server, "--reparse")
    assert rebuilt.code == 0
    assert (tmp_path / "feedback.jsonl").read_bytes() == before
    assert "0 made, 10 taken from the journal" in rebuilt.stderr
    prompts(7)
    partly = collect(srt, server, "--reparse", "--overwrite")
    assert "2 of 7 rows are not in the journal" in partly.stderr
    assert len(read_jsonl(tmp_path / "feedback.jsonl")) == 5


def first_unread(body, number):
    """A critic whose first reply to anything lacks a score."""
    if len(body["messages"]) == 1 and not body.get("stop"):
        return Answer(text="Weaknesses: Dull.\nSuggestions: Spirit.\n\n### Improved Response\nX")
    return Answer(text=GOOD.replace("It is grand!", "It is grand, again!"))


def test_an_unread_reply_is_asked_for_again_with_the_complaint(srt, serve, prompts, tmp_path):
    server = serve(first_unread)
    prompts(2)
    finished = collect(srt, server)
    assert finished.code == 0
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert rows[0]["raw"]["critique unread 1"].startswith("Weaknesses: Dull.")
    asked = next(r for r in server.requests if len(r["messages"]) == 3)
    assert asked["messages"][1]["content"].startswith("Weaknesses: Dull.")
    assert "cannot be used: no overall score" in asked["messages"][2]["content"]
    assert "2 asked again" in finished.stderr
    assert len(server.requests) == 6


def test_without_reasks_the_row_is_kept_as_unparsed(srt, serve, prompts, tmp_path):
    server = serve(first_unread)
    prompts(2)
    assert collect(srt, server, "--max-reasks", 0).code == 3  # no row is usable
    (row, _) = read_jsonl(tmp_path / "feedback.jsonl")
    assert (row["status"], row["reason"]) == ("unparsed", "critique: no overall score")
    assert len(server.requests) == 2


def test_a_reply_cut_off_gets_more_room_once(srt, serve, prompts, tmp_path):
    def behaviour(body, number):
        if body["max_tokens"] == 100 and not body.get("stop"):
            return Answer(text="Weaknesses: Du", finish_reason="length")
        return as_policy_and_critic(body, number)

    server = serve(behaviour)
    prompts(1)
    assert collect(srt, server, "--critic-max-tokens", 100).code == 0
    (row,) = read_jsonl(tmp_path / "feedback.jsonl")
    assert row["status"] == "ok"
    assert [request["max_tokens"] for request in server.requests] == [100, 200, 100]


def test_a_reply_that_stays_cut_off_is_truncated(srt, serve, prompts, tmp_path):
    server = serve(lambda body, number: Answer(text="Weaknesses: Du", finish_reason="length"))
    prompts(1)
    assert collect(srt, server).code == 3  # no row is usable
    (row,) = read_jsonl(tmp_path / "feedback.jsonl")
    assert row["status"] == "truncated"
    assert len(server.requests) == 2


def test_retry_failed_owes_those_rows_alone(srt, serve, prompts, tmp_path):
    mended = []

    def behaviour(body, number):
        if "q1" in body["messages"][0]["content"] and not mended:
            return Answer(text="no critique at all")
        return as_policy_and_critic(body, number)

    server = serve(behaviour)
    prompts(3)
    collect(srt, server, "--max-reasks", 0)
    assert [row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")].count("ok") == 2
    made = len(server.requests)
    mended.append(True)
    assert collect(srt, server, "--max-reasks", 0).code == 0
    assert len(server.requests) == made
    again = collect(srt, server, "--max-reasks", 0, "--retry-failed", "unparsed")
    assert "owed again: 1 row that ended unparsed" in again.stderr
    assert len(server.requests) == made + 2
    assert {row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")} == {"ok"}
    assert collect(srt, server, "--max-reasks", 0).code == 0
    assert len(server.requests) == made + 2


def test_an_unknown_status_to_retry_is_refused(srt, serve, prompts):
    prompts(1)
    finished = collect(srt, serve(as_policy_and_critic), "--retry-failed", "ok")
    assert finished.code == 2
    assert "name some of unparsed, truncated, refused, failed, or all" in finished.stderr


# --- The Batch API -----------------------------------------------------------------------------

BATCH = ("--batch", "--batch-poll", 0.01)


def test_a_batch_gives_what_single_calls_give(srt, serve, prompts, tmp_path):
    prompts(9)
    server = serve(as_policy_and_critic, BatchServer)
    assert collect(srt, server, "--out", "single.jsonl").code == 0
    batched = collect(srt, server, "--out", "batched.jsonl", *BATCH, *PRICE)
    assert batched.code == 0, batched.stderr
    same = [(tmp_path / name).read_bytes() for name in ("single.jsonl", "batched.jsonl")]
    assert same[0] == same[1]
    # All critiques in one batch, all blind scores in the next.
    assert len(server.batches) == 2
    cost = 18 * (11 * 10 + 7 * 1000) / 1_000_000 / 2
    assert f"cost: ${cost:.4f}" in batched.stderr


@pytest.mark.parametrize("verdicts", ["auto", "reasoned"])
def test_a_judge_by_batch_is_asked_everything_in_one_wave(srt, serve, tmp_path, verdicts):
    def judge(body, number):
        odds = {"M": -0.5, "m": -1.0} if body["max_tokens"] == 1 else None
        return Answer(text="M" if odds else "Verdict: [[M]]", top_logprobs=odds)

    (tmp_path / "p.py").write_text("def base(prompt): return 'a'\ndef tuned(prompt): return 'b'\n")
    rows = [{"id": f"q{n}", "prompt": f"question {n}"} for n in range(300)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    server = serve(judge, BatchServer)
    finished = srt(
        "eval", "--model", "python:p.py:tuned", "--reference", "python:p.py:base",
        "--judge", server.spec, "--verdicts", verdicts, *BATCH,
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert [len(content.splitlines()) for content in server.files.values()][:1] == [600]
    assert len(server.batches) == 1


def test_half_of_a_character_in_a_batch_loses_no_reply(srt, serve, prompts, tmp_path):
    def behaviour(body, number):
        answer = as_policy_and_critic(body, number)
        answer.text = answer.text.replace("dull", "dull \ud83d")
        return answer

    prompts(2)
    server = serve(behaviour, BatchServer)
    finished = collect(srt, server, *BATCH)
    assert finished.code == 0, finished.stderr
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert {row["feedback"]["weaknesses"] for row in rows} == {"It is dull \ufffd."}
    assert len(server.batches) == 2


def test_expired_requests_alone_are_asked_again(srt, serve, prompts, tmp_path):
    prompts(6)
    late = set()

    def fate(identifier, times):
        if times == 1 and len(late) < 2:
            late.add(identifier)
            return "expired"
        return "ok"

    server = serve(as_policy_and_critic, BatchServer, fate=fate)
    assert collect(srt, server, *BATCH).code == 0
    assert {row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")} == {"ok"}
    assert len(server.asked) == 12 + 2


def test_a_killed_client_finds_its_own_batch_again(srt, serve, prompts, tmp_path, monkeypatch):
    prompts(4)
    server = serve(as_policy_and_critic, BatchServer, looks=3)

    with monkeypatch.context() as patch:
        kill_before_collecting(patch)
        assert collect(srt, server, *BATCH).code == 130
    assert len(server.batches) == 1
    again = collect(srt, server, *BATCH)
    assert again.code == 0
    assert "batch batch_0: found again" in again.stderr
    assert len(server.batches) == 2
    assert len(server.asked) == 8


def kill_before_collecting(monkeypatch, name="batch_0", collecting=[BatchModel._collect]):  # noqa: B006
    def killed(self, wire, sent):
        if sent.batch.name == name:
            raise KeyboardInterrupt
        return collecting[0](self, wire, sent)

    monkeypatch.setattr(BatchModel, "_collect", killed)


def kill_while_replies_are_kept(monkeypatch, keeping=[Journal.append]):  # noqa: B006
    kept = []

    def append(journal, *reply):
        keeping[0](journal, *reply)
        kept.append(reply)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", append)
    monkeypatch.setattr("srt_cli.calls.conduct._Conductor.keep_finished", lambda self: None)


@pytest.mark.parametrize("kill", [None, kill_before_collecting, kill_while_replies_are_kept])
def test_an_interrupted_run_goes_on_in_batches_and_pays_for_nothing_twice(
    srt, serve, prompts, tmp_path, monkeypatch, kill
):
    prompts(8)
    late = set()

    def fate(identifier, times):
        late.update([identifier] if len(late) < 2 else [])
        return "expired" if identifier in late and times == 1 else "ok"

    server = serve(as_policy_and_critic, BatchServer, fate=fate)
    # Four rows are whole, and a fifth has its critique.
    assert collect(srt, server, "--max-requests", 9, "--concurrency", 2).code == 4
    line = (*BATCH, "--max-requests", 16)
    if kill is not None:
        with monkeypatch.context() as patch:
            kill(patch)
            assert collect(srt, server, *line).code == 130
    finished = collect(srt, server, *line)
    assert finished.code == 0, finished.stderr
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert [row["status"] for row in rows] == ["ok"] * 8
    # Nine one by one; the others in batches, of which two expired and were asked for once more.
    assert len(server.requests) == 9
    assert len(server.asked) == 7 + 2
    assert len(set(server.asked)) == 7
    assert ("found again" in finished.stderr) is (kill is not None)


@pytest.mark.parametrize(("lost", "sizes"), [("a request", [4, 1, 4]), ("its files", [4, 4, 4])])
def test_what_is_lost_in_a_batch_that_ended_meanwhile_is_asked_again(
    srt, serve, prompts, tmp_path, monkeypatch, lost, sizes
):
    prompts(4)
    failed = []

    def fate(identifier, times):
        failed.extend([identifier] if lost == "a request" and not failed else [])
        return "failed" if identifier in failed and times == 1 else "ok"

    server = serve(as_policy_and_critic, BatchServer, fate=fate)
    with monkeypatch.context() as patch:
        kill_before_collecting(patch)
        assert collect(srt, server, *BATCH).code == 130
    server.finish(server.batches["batch_0"])
    if lost == "its files":
        del server.files["batch_0-output"]
    finished = collect(srt, server, *BATCH)
    assert finished.code == 0, finished.stderr
    assert [row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")] == ["ok"] * 4
    asked = [server.files[batch["input_file_id"]] for batch in server.batches.values()]
    assert [len(content.splitlines()) for content in asked] == sizes


@pytest.mark.parametrize("kill", [kill_before_collecting, kill_while_replies_are_kept])
def test_a_batch_that_a_cap_made_smaller_is_found_again(
    srt, serve, prompts, tmp_path, monkeypatch, kill
):
    prompts(8)
    server = serve(as_policy_and_critic, BatchServer)
    with monkeypatch.context() as patch:
        kill(patch)
        assert collect(srt, server, *BATCH, "--max-requests", 5).code == 130
    stopped = collect(srt, server, *BATCH, "--max-requests", 5)
    assert stopped.code == 4
    assert len(server.asked) == len(set(server.asked)) == 5
    finished = collect(srt, server, *BATCH, "--max-requests", 16)
    assert finished.code == 0, finished.stderr
    assert len(server.asked) == len(set(server.asked)) == 16


def sizes(server):
    asked = [server.files[batch["input_file_id"]] for batch in server.batches.values()]
    return [len(content.splitlines()) for content in asked]


@pytest.mark.parametrize("change", ["--retry-failed", "more prompts", "--limit"])
def test_a_batch_under_way_is_waited_for_whatever_else_is_owed_by_then(
    srt, serve, prompts, tmp_path, monkeypatch, change
):
    prompts(6)
    mended = []

    def behaviour(body, number):
        if "q1" in body["messages"][0]["content"] and change == "--retry-failed" and not mended:
            return Answer(text="no critique at all")
        return as_policy_and_critic(body, number)

    server = serve(behaviour, BatchServer, looks=3)
    first, then, whole = {
        "--retry-failed": (["--max-reasks", 0], ["--max-reasks", 0, change, "unparsed"], 6),
        "more prompts": ([], [], 8),
        "--limit": ([change, 3], [change, 6], 6),
    }[change]
    second_wave = change == "--retry-failed"
    with monkeypatch.context() as patch:
        kill_before_collecting(patch, "batch_1" if second_wave else "batch_0")
        assert collect(srt, server, *BATCH, *first).code == 130
    assert sizes(server) == {"--retry-failed": [6, 5], "more prompts": [6], "--limit": [3]}[change]
    mended.append(True)
    prompts(whole)
    finished = collect(srt, server, *BATCH, *then)
    assert finished.code == 0, finished.stderr
    assert "found again, in_progress" in finished.stderr
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert [row["status"] for row in rows] == ["ok"] * whole
    assert sizes(server) == {
        "--retry-failed": [6, 5, 1, 1], "more prompts": [6, 2, 8], "--limit": [3, 3, 6],
    }[change]  # fmt: skip
    assert len(server.asked) == len(set(server.asked))


@pytest.mark.parametrize("at", ["before it is sent", "after it was taken"])
def test_a_run_that_is_killed_while_it_hands_in_a_batch_pays_for_it_once(
    srt, serve, prompts, tmp_path, monkeypatch, at
):
    prompts(4)
    server = serve(as_policy_and_critic, BatchServer)
    submit = OpenAiBatches.submit

    async def killed(self, wire, label, lines):
        if at == "after it was taken":
            await submit(self, wire, label, lines)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OpenAiBatches, "submit", killed)
        assert collect(srt, server, *BATCH).code == 130
    with open(tmp_path / "feedback.batches.jsonl", "a") as notes:
        notes.write('{"label": "torn')
    prompts(5)
    again = collect(srt, server, *BATCH)
    assert again.code == 0, again.stderr
    assert sizes(server) == ([5, 5] if at == "before it is sent" else [4, 1, 5])
    assert collect(srt, server, *BATCH).code == 0
    # Each line is whole, behind the torn one too.
    lines = (tmp_path / "feedback.batches.jsonl").read_bytes().splitlines()
    torn = [line for line in lines if not line.endswith(b"}")]
    assert torn == [b'{"label": "torn']


def test_batches_are_listed_only_after_an_answer_that_was_lost(srt, serve, prompts, monkeypatch):
    monkeypatch.setattr("srt_cli.models.api.batch.FIRST_BACKOFF_S", 0.001)
    listed, every = [], BatchServer._all

    async def all_of_them(self, request):
        listed.append(1)
        return await every(self, request)

    monkeypatch.setattr(BatchServer, "_all", all_of_them)
    prompts(3)
    server = serve(as_policy_and_critic, BatchServer)
    assert collect(srt, server, *BATCH).code == 0
    assert len(listed) == 0
    server.lose_answers = 1
    prompts(4)
    assert collect(srt, server, *BATCH).code == 0
    assert len(listed) == 1


def test_a_refusal_after_an_answer_that_was_lost_does_not_lose_the_batch(
    srt, serve, prompts, monkeypatch
):
    monkeypatch.setattr("srt_cli.models.api.batch.FIRST_BACKOFF_S", 0.001)
    create, every, troubled = BatchServer._create, BatchServer._all, [True]

    async def refuse_the_second(self, request):
        if self.batches and troubled:
            return web.json_response({"error": {"message": "not now"}}, status=400)
        return await create(self, request)

    async def list_none_yet(self, request):
        if troubled:
            return web.json_response({"object": "list", "data": [], "has_more": False})
        return await every(self, request)

    monkeypatch.setattr(BatchServer, "_create", refuse_the_second)
    monkeypatch.setattr(BatchServer, "_all", list_none_yet)
    prompts(3)
    server = serve(as_policy_and_critic, BatchServer)
    server.lose_answers = 1
    refused = collect(srt, server, *BATCH)
    assert refused.code == 1
    assert "its batches answer: not now" in refused.stderr
    troubled.clear()
    finished = collect(srt, server, *BATCH)
    assert finished.code == 0, finished.stderr
    assert "batch batch_0: found again" in finished.stderr
    assert sizes(server) == [3, 3]


def test_batches_that_expire_whole_are_not_taken_for_new_ones(srt, serve, prompts, tmp_path):
    prompts(3)
    server = serve(as_policy_and_critic, BatchServer, fate=lambda name, times: "expired")
    failed = collect(srt, server, *BATCH)
    assert failed.code == 3
    assert len(server.batches) == 5
    assert "asking again, round 5" in failed.stderr
    assert "round 6" not in failed.stderr
    assert "found again" not in failed.stderr
    server.fate = lambda name, times: "ok"
    finished = collect(srt, server, *BATCH)
    assert finished.code == 0, finished.stderr
    assert len(server.batches) == 5 + 2


def test_what_is_asked_again_is_asked_in_a_new_batch_each_time(srt, serve, prompts, tmp_path):
    prompts(3)
    server = serve(as_policy_and_critic, BatchServer)
    server.behaviour = lambda body, number: (
        Answer(text="no critique at all")
        if "q1" in body["messages"][0]["content"]
        else as_policy_and_critic(body, number)
    )
    line = (*BATCH, "--max-reasks", 0)
    collect(srt, server, *line)
    made = len(server.batches)
    again = (*line, "--retry-failed", "unparsed")
    for times in (1, 2):
        collect(srt, server, *again)
        assert len(server.batches) == made + times
    server.behaviour = as_policy_and_critic
    assert collect(srt, server, *again).code == 0
    assert len(server.batches) == made + 4
    assert {row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")} == {"ok"}


def test_a_batch_that_was_taken_though_its_answer_was_lost_is_looked_for(
    srt, serve, prompts, monkeypatch
):
    monkeypatch.setattr("srt_cli.models.api.batch.FIRST_BACKOFF_S", 0.001)
    prompts(3)
    server = serve(as_policy_and_critic, BatchServer)
    server.lose_answers = 1
    finished = collect(srt, server, *BATCH)
    assert finished.code == 0, finished.stderr
    assert len(server.batches) == 2
    assert len(server.asked) == 6


def test_a_cancelled_batch_gives_what_it_has_and_is_asked_anew_by_the_next_run(
    srt, serve, prompts, tmp_path, monkeypatch
):
    prompts(4)
    look = BatchServer._look

    async def cancel(self, request):
        if self.batches["batch_0"]["status"] == "in_progress":
            self.cancel("batch_0", 1)
        return await look(self, request)

    monkeypatch.setattr(BatchServer, "_look", cancel)
    server = serve(as_policy_and_critic, BatchServer)
    cancelled = collect(srt, server, *BATCH)
    assert cancelled.code == 0, cancelled.stderr
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert sorted(row["status"] for row in rows) == ["failed"] * 3 + ["ok"]
    assert {row["reason"] for row in rows if row["status"] == "failed"} == {
        "critique: batch batch_0 was cancelled"
    }
    finished = collect(srt, server, *BATCH)
    assert finished.code == 0, finished.stderr
    assert len(server.asked) == len(set(server.asked)) == 8


def test_only_what_was_in_a_cancelled_batch_is_called_so(
    srt, serve, prompts, tmp_path, monkeypatch
):
    prompts(8)
    look = BatchServer._look

    async def cancel_at_second_look(self, request):
        if self.batches["batch_0"]["looks"] == 1:
            self.cancel("batch_0", 1)
        return await look(self, request)

    monkeypatch.setattr(BatchServer, "_look", cancel_at_second_look)
    server = serve(as_policy_and_critic, BatchServer)
    with monkeypatch.context() as patch:
        kill_before_collecting(patch)
        assert collect(srt, server, *BATCH, "--max-requests", 5).code == 130
    finished = collect(srt, server, *BATCH)
    assert finished.code == 0, finished.stderr
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert sorted(row["status"] for row in rows) == ["failed"] * 4 + ["ok"] * 4


def test_a_batch_that_is_being_cancelled_gives_what_it_has_and_the_rest_is_asked_anew(
    srt, serve, prompts, tmp_path, monkeypatch
):
    prompts(4)
    look = BatchServer._look

    async def cancelling(self, request):
        batch = self.batches["batch_0"]
        if batch["status"] == "cancelling":
            self.cancel("batch_0", 1)
        elif batch["status"] == "in_progress":
            batch["status"] = "cancelling"
        return await look(self, request)

    monkeypatch.setattr(BatchServer, "_look", cancelling)
    server = serve(as_policy_and_critic, BatchServer)
    with monkeypatch.context() as patch:
        kill_before_collecting(patch)
        assert collect(srt, server, *BATCH).code == 130
    finished = collect(srt, server, *BATCH)
    assert finished.code == 0, finished.stderr
    assert "batch batch_0: found again, cancelling" in finished.stderr
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert len(server.asked) == len(set(server.asked)) == 8


def test_prompts_that_are_added_go_into_a_batch_without_those_that_are_paid_for(
    srt, serve, prompts, tmp_path
):
    prompts(4)
    server = serve(as_policy_and_critic, BatchServer)
    assert collect(srt, server, *BATCH).code == 0
    prompts(6)
    assert collect(srt, server, *BATCH).code == 0
    assert len(read_jsonl(tmp_path / "feedback.jsonl")) == 6
    assert len(server.asked) == 2 * 4 + 2 * 2


def test_a_model_served_only_by_responses_says_what_to_do_about_its_batch(
    srt, serve, prompts, tmp_path
):
    prompts(2)
    server = serve(as_policy_and_critic, BatchServer, fate=lambda name, times: "responses")
    batched = collect(srt, server, *BATCH)
    assert batched.code == 1
    said = (
        "only the Responses API serves this model (This model is only supported in v1/responses.): run "
        "again without --batch, --export-batch and --import-batch, and it will be used."
    )
    assert said in batched.stderr
    assert len(server.batches) == 1
    (told,) = (server.files[name] for name in server.files if name.endswith("-error"))
    (tmp_path / "replies.jsonl").write_bytes(told)
    imported = collect(srt, server, "--import-batch", "replies.jsonl")
    assert imported.code == 1
    assert said in imported.stderr


def test_an_exported_batch_is_answered_elsewhere_and_imported(srt, serve, prompts, tmp_path):
    prompts(3)
    server = serve(as_policy_and_critic)
    assert collect(srt, server, "--out", "single.jsonl").code == 0
    for step in (1, 2):
        exported = collect(srt, server, "--export-batch", f"ask{step}.jsonl")
        assert exported.code == 0, exported.stderr
        assert (
            f"3 of 3 rows are owed; their next requests are in ask{step}.jsonl" in exported.stderr
        )
        assert (tmp_path / "feedback.jsonl").read_bytes() == b""
        replies = []
        for line in read_jsonl(tmp_path / f"ask{step}.jsonl"):
            assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
            text = as_policy_and_critic(line["body"], 0).text
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 11, "completion_tokens": 7,
                     "prompt_tokens_details": {"cached_tokens": 5}}  # fmt: skip
            body = {"choices": [choice], "usage": usage}
            replies.append({"custom_id": line["custom_id"],
                            "response": {"status_code": 200, "body": body}})  # fmt: skip
        write_jsonl(tmp_path / f"replies{step}.jsonl", reversed(replies))
        made = len(server.requests)
        imported = collect(srt, server, "--import-batch", f"replies{step}.jsonl")
        assert "3 replies taken into the journal" in imported.stderr
        assert len(server.requests) == made
        assert imported.code == 0, imported.stderr
    nothing = collect(srt, server, "--export-batch", "ask3.jsonl")
    assert nothing.code == 0
    assert "nothing is owed: ask3.jsonl is not written" in nothing.stderr
    assert not (tmp_path / "ask3.jsonl").exists()
    same = [(tmp_path / name).read_bytes() for name in ("single.jsonl", "feedback.jsonl")]
    assert same[0] == same[1]


def batch_reply(line, **response):
    """What `vllm run-batch` writes for a request, or what stands in its place."""
    text = as_policy_and_critic(line["body"], 0).text
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}
    told = {"status_code": 200, "body": body} | response
    return {"custom_id": line["custom_id"], "response": told, "error": None}


NOBODY = "http://127.0.0.1:9/v1#tester"


def test_the_whole_loop_of_batches_needs_no_server(srt, tmp_path):
    rows = [{"id": n, "prompt": f"q{min(n, 2)}"} for n in range(4)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    line = ("collect-feedback", "--model", NOBODY, "--critic", NOBODY)
    for step, asked in enumerate((3, 3, 3)):  # drafts, critiques, blind scores; of q2 once
        exported = srt(*line, "--export-batch", f"ask{step}.jsonl")
        assert exported.code == 0, exported.stderr
        assert "next: have ask" in exported.stdout
        manifest = json.loads((tmp_path / "feedback.run.json").read_text())
        assert (manifest["status"], manifest["progress"]) == ("interrupted", "0 of 4")
        requests = read_jsonl(tmp_path / f"ask{step}.jsonl")
        assert len({request["custom_id"] for request in requests}) == len(requests) == asked
        replies = [batch_reply(request) for request in requests]
        write_jsonl(tmp_path / "told.jsonl", [*replies, {**replies[0], "custom_id": "00" * 16}])
        imported = srt(*line, "--import-batch", "told.jsonl")
        assert imported.code == 0, imported.stderr
        assert "3 replies taken into the journal; 1 answer what is not owed" in imported.stderr
    assert "next: srt sft" in imported.stdout
    assert [row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")] == ["ok"] * 4
    manifest = json.loads((tmp_path / "feedback.run.json").read_text())
    assert (manifest["status"], manifest["progress"]) == ("complete", "4 of 4")
    assert manifest["cost"]["models"][NOBODY]["usage"]["completion_tokens"] == 9 * 7
    again = srt(*line, "--export-batch", "more.jsonl")
    assert "nothing is owed: more.jsonl is not written" in again.stderr
    assert not (tmp_path / "more.jsonl").exists()


def test_what_came_to_nothing_in_a_batch_stays_owed_and_what_is_filtered_is_refused(
    srt, prompts, tmp_path
):
    prompts(4)
    line = ("collect-feedback", "--critic", NOBODY)
    srt(*line, "--export-batch", "ask.jsonl")
    filtered = {"error": {"message": "flagged by our content filter", "code": "content_filter"}}
    crashed = {"error": {"message": "engine died"}}
    first, second, third, _ = read_jsonl(tmp_path / "ask.jsonl")
    replies = [
        batch_reply(first),
        batch_reply(second, status_code=400, body=filtered),
        batch_reply(third, status_code=500, body=crashed),
    ]
    write_jsonl(tmp_path / "told.jsonl", replies)
    imported = srt(*line, "--import-batch", "told.jsonl")
    assert imported.code == 0, imported.stderr
    assert (
        "2 replies taken into the journal; 1 came to nothing (in a batch: engine died) and stay owed"
    ) in imported.stderr
    assert "3 of 4 rows are owed" in imported.stderr
    (row,) = read_jsonl(tmp_path / "feedback.jsonl")
    assert row["status"] == "refused"
    srt(*line, "--export-batch", "more.jsonl")
    assert len(read_jsonl(tmp_path / "more.jsonl")) == 3
    # One line does both: it takes replies in, and writes what is owed next.
    write_jsonl(tmp_path / "all.jsonl", map(batch_reply, read_jsonl(tmp_path / "more.jsonl")))
    both = srt(*line, "--import-batch", "all.jsonl", "--export-batch", "last.jsonl")
    assert both.code == 0, both.stderr
    assert len(read_jsonl(tmp_path / "last.jsonl")) == 2
    write_jsonl(tmp_path / "all.jsonl", map(batch_reply, read_jsonl(tmp_path / "last.jsonl")))
    done = srt(*line, "--import-batch", "all.jsonl")
    assert done.code == 0
    statuses = [row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")]
    assert statuses == ["ok", "refused", "ok", "ok"]


def test_an_import_without_a_usable_row_is_exit_3(srt, prompts, tmp_path):
    prompts(1)
    line = ("collect-feedback", "--critic", NOBODY, "--max-reasks", 0)
    srt(*line, "--export-batch", "ask.jsonl")
    (request,) = read_jsonl(tmp_path / "ask.jsonl")
    reply = batch_reply(request)
    reply["response"]["body"]["choices"][0]["message"]["content"] = "No idea."
    write_jsonl(tmp_path / "told.jsonl", [reply])
    imported = srt(*line, "--import-batch", "told.jsonl")
    assert imported.code == 3
    assert "no row is usable (1 unparsed)" in imported.stderr


def test_a_file_that_is_no_batch_output_is_refused(srt, serve, prompts, tmp_path):
    prompts(1)
    write_jsonl(tmp_path / "other.jsonl", [{"prompt": "x"}])
    finished = collect(srt, serve(as_policy_and_critic), "--import-batch", "other.jsonl")
    assert finished.code == 1
    assert "other.jsonl:1: not a reply to an exported request" in finished.stderr


def test_a_plan_an_export_and_a_reparse_need_no_key(srt, prompts, tmp_path, monkeypatch):
    prompts(3)
    line = ("collect-feedback", "--critic", "gpt-4")
    assert srt(*line).code == 5
    planned = srt(*line, "--dry-run")
    assert planned.code == 0, planned.stderr
    assert "rows: 3" in planned.stdout
    exported = srt(*line, "--export-batch", "batch.jsonl")
    assert exported.code == 0, exported.stderr
    assert len(read_jsonl(tmp_path / "batch.jsonl")) == 3
    assert srt(*line, "--reparse").code == 0


@pytest.mark.parametrize("flags", [("--batch",), ("--export-batch", "ask.jsonl")])
def test_azure_is_refused_as_a_batch(srt, prompts, tmp_path, monkeypatch, flags):
    prompts(1)
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "https://mine.openai.azure.com")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "secret-of-azure")
    finished = srt("collect-feedback", "--critic", "azure:my-deployment", *flags)
    assert finished.code == 2
    assert f"{flags[0]}: srt knows no batches of azure:my-deployment." in finished.stderr
    assert not (tmp_path / "ask.jsonl").exists()


def test_contradicting_options_are_refused(srt, serve, prompts):
    prompts(1)
    finished = collect(srt, serve(as_policy_and_critic), "--batch", "--dry-run")
    assert finished.code == 2
    assert "--dry-run and --batch: choose one of them." in finished.stderr
    finished = collect(srt, serve(as_policy_and_critic), "--import-batch", "x", "--dry-run")
    assert finished.code == 2
    assert "--dry-run and --import-batch: choose one of them." in finished.stderr


def test_the_critics_page_shows_its_scores_and_doubts(srt, serve, prompts, tmp_path):
    prompts(12)
    assert collect(srt, serve(as_policy_and_critic), "--report", "critic.html").code == 0
    page = (tmp_path / "critic.html").read_text()
    assert "Read with care" in page
    assert "gave every one of 12 drafts the score 4" in page
    assert "entropy of the drafts&#39; scores" in page
    tallies = json.loads((tmp_path / "feedback.run.json").read_text())["tallies"]
    assert tallies["score_entropy_bits"] == 0
    assert tallies["repeated_weaknesses"] == 1
    assert tallies["replies"] == {"as asked": 24}

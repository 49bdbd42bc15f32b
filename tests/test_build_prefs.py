"""srt build-prefs: only pairs that teach, everything else with its reason."""

import io
import json
import random
import re
import sys

import pytest
from conftest import read_jsonl, write_jsonl
from hypothesis import strategies as st

from srt_cli.records import Feedback, FeedbackRecord, Usage


def record(**changes) -> FeedbackRecord:
    score = changes.pop("score", 4)
    plain = {
        "id": "1",
        "prompt": "Name a fruit.",
        "response": "A carrot.",
        "feedback": Feedback(weaknesses="w", suggestions="s", score=score),
        "refinement": "An apple.",
        "refinement_score": 8,
        "refinement_feedback": None,
        "status": "ok",
        "reason": None,
        "raw": {},
        "policy": "p",
        "critic": "c",
        "sample": 0,
        "round": 1,
        "usage": Usage(),
    }
    return FeedbackRecord(**(plain | changes))


ROWS = [
    record(id="kept"),
    record(id="same score", score=8, refinement="A pear."),
    record(id="worse", score=9, refinement="A plum."),
    record(id="copy", refinement="A carrot. "),
    record(id="empty", response="  "),
    record(id="cut", status="truncated", refinement=None, refinement_score=None),
    record(id="unread", status="unparsed", refinement=None, refinement_score=None),
    record(id="long", refinement="An apple that is ripe, round and red."),
    record(id="repeated"),
]


@pytest.fixture
def prefs(srt, tmp_path):
    def build(rows=ROWS, *extra):
        write_jsonl(tmp_path / "self-feedback.jsonl", [row.model_dump() for row in rows])
        return srt("build-prefs", *extra)

    return build


def test_a_pair_is_trls_conversational_form(prefs, tmp_path):
    assert prefs().code == 0
    assert read_jsonl(tmp_path / "prefs.jsonl") == [
        {
            "id": "kept",
            "prompt": [{"role": "user", "content": "Name a fruit."}],
            "chosen": [{"role": "assistant", "content": "An apple."}],
            "rejected": [{"role": "assistant", "content": "A carrot."}],
            "chosen_score": 8.0,
            "rejected_score": 4.0,
            "source": "c",
        }
    ]


def test_every_other_row_falls_out_with_its_reason(prefs, tmp_path):
    prefs()
    reasons = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "prefs.dropped.jsonl")}
    assert reasons == {
        "same score": "tie",
        "worse": "gain below 1",
        "copy": "copy",
        "empty": "empty",
        "cut": "truncated",
        "unread": "unparsed",
        "long": "refinement over 3 times as long",
        "repeated": "duplicate",
    }


def test_kept_and_dropped_add_up_to_the_input(prefs, tmp_path):
    prefs()
    tallies = json.loads((tmp_path / "prefs.run.json").read_text())["tallies"]
    assert tallies["rows"] == 9
    assert tallies["kept"] + sum(tallies["dropped"].values()) == 9


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        (
            {"status": "truncated"},
            (),
            "(4 truncated). Replies do not end, and the rows' `reason` says why",
        ),
        ({"score": 9}, (), "(4 gain below 1). Relax --min-gain"),
        ({}, ("--max-length-ratio", 0.5), "(4 refinement over 0.5 times as long). Relax --max-len"),
        ({}, ("--score", "expected"), "(4 no expected score). Leave out --score expected"),
        ({}, ("--exclude", "prompts.jsonl"), "(4 prompt is excluded). The data are the prompts of"),
        (
            {"response": "I am", "refinement": "As an AI, I cannot help."},
            (),
            "(4 refusal). Look at",
        ),
        (
            {"refinement": "A carrot."},
            ("--strategy", "best-worst"),
            "no pair by best-worst). Take sev",
        ),
    ],
)
def test_when_all_is_dropped_the_filter_to_relax_is_named(prefs, tmp_path, changes, flags, message):
    rows = [record(id=str(n), prompt=f"p{n}", **changes) for n in range(4)]
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": row.id, "prompt": row.prompt} for row in rows])
    flags = flags if changes.get("response") is None else (*flags, "--max-length-ratio", 99)
    finished = prefs(rows, *flags)
    assert finished.code == 3
    assert message in finished.stderr
    assert not (tmp_path / "prefs.jsonl").exists()
    assert len(read_jsonl(tmp_path / "prefs.dropped.jsonl")) == 4


def test_pairs_of_other_settings_do_not_stay_where_none_are_left(prefs, tmp_path):
    assert prefs(ROWS, "--export", "kto").code == 0
    assert prefs(ROWS, "--export", "kto", "--min-gain", 9, "--overwrite").code == 3
    assert not (tmp_path / "prefs.jsonl").exists()
    assert not (tmp_path / "prefs.kto.jsonl").exists()


def broken_gzip(plain: bytes) -> bytes:
    import gzip

    packed = bytearray(gzip.compress(plain))
    packed[len(packed) // 2] ^= 255
    return bytes(packed)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", lambda row: {"novel": 1} | row, "d.jsonl:2: novel: extra inputs are not permitted"),
        ("d.jsonl", lambda row: row | {"refinement_score": 42}, "d.jsonl:2: refinement_score: input"),
        ("d.jsonl", lambda row: row | {"feedback": {**row["feedback"], "score": 0}},
         "d.jsonl:2: feedback.score: input should be greater than or equal to 1"),
        ("d.jsonl", lambda row: {"prompt": "p", "chosen": []}, "d.jsonl:2: id: field required"),
    ],
)  # fmt: skip
def test_a_row_of_another_kind_is_named_with_its_line(srt, tmp_path, name, content, message):
    row = record().model_dump()
    write_jsonl(tmp_path / name, [row, content(row)])
    finished = srt("build-prefs", "--data", name)
    assert finished.code == 1
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "prefs.jsonl").exists()


def test_a_damaged_gzip_file_is_said(srt, tmp_path):
    lines = "".join(json.dumps(record(id=str(n)).model_dump()) + "\n" for n in range(500))
    (tmp_path / "d.jsonl.gz").write_bytes(broken_gzip(lines.encode()))
    finished = srt("build-prefs", "--data", "d.jsonl.gz")
    assert finished.code == 1
    assert "d.jsonl.gz" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_records_of_an_older_version_stand_beside_newer_ones(srt, tmp_path):
    older = record(id="old").model_dump(exclude={"refinement_score_mean": True})
    older["feedback"].pop("score_mean")
    write_jsonl(tmp_path / "old.jsonl", [older])
    newer = expected(record(id="new", prompt="q"), 4.5, 7.5)
    write_jsonl(tmp_path / "new.jsonl", [newer.model_dump()])
    assert srt("build-prefs", "--data", "old.jsonl", "--data", "new.jsonl").code == 0
    assert [row["id"] for row in read_jsonl(tmp_path / "prefs.jsonl")] == ["old", "new"]


def test_a_larger_gain_keeps_fewer_pairs(prefs, tmp_path):
    assert prefs(ROWS, "--min-gain", "5").code == 3
    assert not (tmp_path / "prefs.jsonl").exists()


def test_when_no_pair_is_left_the_message_says_which_filter_took_them(prefs):
    rows = [record(id=str(n), score=8, prompt=f"p{n}") for n in range(2)]
    rows += [record(id=row.id, prompt=row.prompt, status="unparsed") for row in rows]
    finished = prefs(rows)
    assert finished.code == 3
    assert "no pair is left (2 tie, 2 unparsed)" in finished.stderr
    assert "--score expected" in finished.stderr


def test_a_negative_gain_never_makes_a_worse_refinement_the_chosen_one(prefs):
    refused = prefs([record(score=9)], "--min-gain", "-5")
    assert (refused.code, "--min-gain starts at 0" in refused.stderr) == (2, True)


def test_pairs_of_several_samples_and_rounds_have_their_own_ids(prefs, tmp_path):
    prefs([record(), record(sample=1, refinement="A fig."), record(round=2, refinement="A kiwi.")])
    assert [row["id"] for row in read_jsonl(tmp_path / "prefs.jsonl")] == ["1", "1/1/1", "1/0/2"]


def test_the_order_of_the_rows_changes_the_order_only(prefs, tmp_path):
    rows = [record(id=str(n), refinement=f"Apple {n}.", score=n % 9 + 1) for n in range(30)]
    prefs(rows)
    straight = read_jsonl(tmp_path / "prefs.jsonl")
    random.Random(0).shuffle(rows)
    prefs(rows, "--overwrite")
    shuffled = read_jsonl(tmp_path / "prefs.jsonl")
    assert [row["id"] for row in shuffled] == [row.id for row in rows if row.gain >= 1]
    assert sorted(map(str, straight)) == sorted(map(str, shuffled))


def test_torch_is_not_needed(tmp_path):
    import subprocess
    import sys

    write_jsonl(tmp_path / "self-feedback.jsonl", [record().model_dump()])
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'trl', 'datasets', 'openai', 'numpy', 'peft'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['srt', 'build-prefs']\n"
        "from srt_cli.cli import main; main()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "prefs.jsonl").is_file()


scores = st.floats(1, 10).map(lambda score: round(score, 1))


def samples(*scored, prompt="Name a fruit.", identifier="1"):
    """One record a sample: (draft, its score, refinement, its score)."""
    return [
        record(id=identifier, prompt=prompt, sample=number, response=draft, score=score,
               refinement=refinement, refinement_score=refined)
        for number, (draft, score, refinement, refined) in enumerate(scored)
    ]  # fmt: skip


GROUP = samples(
    ("A carrot.", 3, "A ripe apple, I think.", 7),
    ("Rock.", 1, "A stone fruit.", 6),
    ("A pear.", 8, "A sweet pear.", 9),
)


@pytest.mark.parametrize(
    ("strategy", "chosen", "rejected"),
    [
        ("best-worst", "A sweet pear.", "Rock."),
        ("refine-best", "A sweet pear.", "Rock."),
        # With rho 0.3 the top tier begins at 6.6 and the bottom tier ends at 3.4.
        ("tiers", "A pear.", "A carrot."),
    ],
)
def test_strategies_choose_among_all_answers_to_a_prompt(
    prefs, tmp_path, strategy, chosen, rejected
):
    finished = prefs(GROUP, "--strategy", strategy, "--rho", "0.3")
    assert finished.code == 0, finished.stderr
    (pair,) = read_jsonl(tmp_path / "prefs.jsonl")
    assert pair["chosen"][0]["content"] == chosen
    assert pair["rejected"][0]["content"] == rejected


@pytest.mark.parametrize("score", [3.25, 7.75, 43 / 7, 9.9])
def test_no_rounding_leaves_a_tier_without_answers(prefs, tmp_path, score):
    alike = samples(("Blue.", score, "Navy blue.", score))
    finished = prefs(GROUP + [row.model_copy(update={"prompt": "Other?"}) for row in alike],
                     "--strategy", "tiers")  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert [row["reason"] for row in read_jsonl(tmp_path / "prefs.dropped.jsonl")] == [
        "not chosen by tiers", "tie",
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", ["refine", "best-worst", "refine-best", "tiers"])
def test_used_and_dropped_rows_add_up_under_every_strategy(prefs, tmp_path, strategy):
    other = samples(("Blue.", 2, "Navy.", 2), ("Red.", 2, "Crimson.", 2), identifier="2")
    assert prefs(GROUP + other, "--strategy", strategy).code == 0
    tallies = json.loads((tmp_path / "prefs.run.json").read_text())["tallies"]
    assert tallies["rows"] == 5
    assert tallies["rows_used"] + sum(tallies["dropped"].values()) == 5
    assert len(read_jsonl(tmp_path / "prefs.dropped.jsonl")) == 5 - tallies["rows_used"]


def test_several_files_gzip_and_stdin_are_read(srt, tmp_path, monkeypatch):
    import gzip

    first, second, third = (
        [record(id=str(n), refinement=f"Apple {n}.").model_dump()] for n in range(3)
    )
    write_jsonl(tmp_path / "a.jsonl", first)
    lines = write_jsonl(tmp_path / "b.jsonl", second).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    piped = write_jsonl(tmp_path / "c.jsonl", third).read_bytes()

    class Stdin:
        buffer = io.BytesIO(piped)

    monkeypatch.setattr("sys.stdin", Stdin())
    finished = srt("build-prefs", "--data", "a.jsonl", "--data", "b.jsonl.gz", "--data", "-")
    assert finished.code == 0, finished.stderr
    assert [row["id"] for row in read_jsonl(tmp_path / "prefs.jsonl")] == ["0", "1", "2"]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines)[:-20])
    broken = srt("build-prefs", "--data", "b.jsonl.gz", "--out", "other.jsonl")
    assert broken.code == 1
    assert "b.jsonl.gz: not a readable gzip file" in broken.stderr


def test_a_configuration_may_give_one_file_where_several_may_be_given(prefs, tmp_path):
    (tmp_path / "srt.toml").write_text('data = "self-feedback.jsonl"\n')
    assert prefs().code == 0
    (tmp_path / "srt.toml").write_text(
        '[build-prefs]\ndata = ["self-feedback.jsonl"]\nmin-gain = 1\n'
    )
    assert prefs().code == 0
    assert prefs(ROWS, "--config", "prefs.run.json").code == 0


def test_prompts_of_an_evaluation_are_left_out(prefs, tmp_path):
    write_jsonl(tmp_path / "heldout.jsonl", [{"prompt": "name  a FRUIT."}])
    rows = [record(), record(id="2", prompt="Name a colour.")]
    assert prefs(rows, "--exclude", "heldout.jsonl").code == 0
    assert [row["id"] for row in read_jsonl(tmp_path / "prefs.jsonl")] == ["2"]
    (dropped,) = read_jsonl(tmp_path / "prefs.dropped.jsonl")
    assert dropped["reason"] == "prompt is excluded"


def test_answers_that_are_none_are_left_out_unless_wanted(prefs, tmp_path):
    rows = [
        record(
            id="refuses", response="x" * 60, refinement="I'm sorry, but I cannot help with that."
        ),
        record(id="leaks", response="x" * 60, refinement="A fig. Overall Score: [[9]]"),
        record(id="repeats", response="x" * 60, refinement="a fig and " * 9),
        record(id="fine"),
    ]
    assert prefs(rows).code == 0
    reasons = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "prefs.dropped.jsonl")}
    assert reasons == {
        "refuses": "refusal", "leaks": "template leakage", "repeats": "repeating",
    }  # fmt: skip
    assert prefs(rows, "--no-hygiene", "--overwrite").code == 0
    assert len(read_jsonl(tmp_path / "prefs.jsonl")) == 4


def test_answers_that_differ_in_form_alone_are_copies(prefs, tmp_path):
    rows = [
        record(id="accent", prompt="A?", response="Caf\u00e9.", refinement="Cafe\u0301."),
        record(id="line ends", prompt="B?", response="One\nTwo", refinement="One\r\nTwo"),
        record(id="spaces", prompt="C?", response="A carrot.", refinement="A  carrot."),
        record(id="fine"),
    ]
    assert prefs(rows).code == 0
    reasons = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "prefs.dropped.jsonl")}
    assert reasons == dict.fromkeys(("accent", "line ends", "spaces"), "copy")


def test_the_pairs_are_written_for_other_trainers_too(prefs, tmp_path):
    finished = prefs(ROWS, "--export", "axolotl", "--export", "llamafactory", "--export", "kto")
    assert finished.code == 0, finished.stderr
    assert read_jsonl(tmp_path / "prefs.axolotl.jsonl") == [
        {
            "messages": [{"role": "user", "content": "Name a fruit."}],
            "chosen": {"role": "assistant", "content": "An apple."},
            "rejected": {"role": "assistant", "content": "A carrot."},
        }
    ]
    assert read_jsonl(tmp_path / "prefs.llamafactory.jsonl") == [
        {
            "conversations": [{"from": "human", "value": "Name a fruit."}],
            "chosen": {"from": "gpt", "value": "An apple."},
            "rejected": {"from": "gpt", "value": "A carrot."},
        }
    ]
    assert [row["label"] for row in read_jsonl(tmp_path / "prefs.kto.jsonl")] == [True, False]


def test_rows_of_one_id_but_other_prompts_are_no_group(prefs, tmp_path):
    rows = samples(("Rock.", 2, "Stone.", 6)) + samples(
        ("Blue.", 3, "Navy.", 9), prompt="Name a colour."
    )
    assert prefs(rows, "--strategy", "best-worst").code == 0
    pairs = read_jsonl(tmp_path / "prefs.jsonl")
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs] == [
        ("Stone.", "Rock."), ("Navy.", "Blue."),
    ]  # fmt: skip


def test_equal_pairs_of_two_critics_are_one_at_their_mean_scores(prefs, tmp_path):
    rows = [record(critic="a", score=4), record(critic="b", score=2, refinement_score=9)]
    for order in (rows, rows[::-1]):
        assert prefs(order, "--overwrite").code == 0
        (pair,) = read_jsonl(tmp_path / "prefs.jsonl")
        assert (pair["rejected_score"], pair["chosen_score"], pair["source"]) == (3, 8.5, "a")


def expected(row, before, after):
    feedback = row.feedback.model_copy(update={"score_mean": before})
    return row.model_copy(update={"feedback": feedback, "refinement_score_mean": after})


def test_the_expected_score_breaks_ties_and_rows_without_one_fall_out(prefs, tmp_path):
    rows = [
        expected(record(id="tied", score=8, refinement_score=8), 7.25, 8.5),
        expected(record(id="less", prompt="q"), 8.0, 7.5),
        record(id="without", prompt="r"),
    ]
    assert prefs(rows, "--score", "expected", "--min-gain", 0.5).code == 0
    (pair,) = read_jsonl(tmp_path / "prefs.jsonl")
    assert (pair["id"], pair["rejected_score"], pair["chosen_score"]) == ("tied", 7.25, 8.5)
    reasons = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "prefs.dropped.jsonl")}
    assert reasons == {"less": "gain below 0.5", "without": "no expected score"}


def test_the_limit_counts_the_rows_of_all_files_together(srt, tmp_path):
    for name in "ab":
        rows = [record(id=f"{name}{n}", prompt=f"{name}{n}").model_dump() for n in range(3)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert srt("build-prefs", "--data", "a.jsonl", "--data", "b.jsonl", "--limit", 4).code == 0
    ids = [row["id"] for row in read_jsonl(tmp_path / "prefs.jsonl")]
    assert ids == ["a0", "a1", "a2", "b0"]


LONG = "Write a short story about a lighthouse keeper who finds a letter in a bottle on the beach"
NEAR = LONG + " today"


def test_near_duplicates_of_a_prompt_fall_out_when_asked_for(prefs, tmp_path):
    rows = [record(id="one", prompt=LONG), record(id="two", prompt=NEAR), record(id="far")]
    assert prefs(rows).code == 0
    assert len(read_jsonl(tmp_path / "prefs.jsonl")) == 3
    left = []
    for order in (rows, rows[::-1]):
        assert prefs(order, "--near-duplicates", 0.7, "--overwrite").code == 0
        left.append({row["id"] for row in read_jsonl(tmp_path / "prefs.jsonl")})
        (dropped,) = read_jsonl(tmp_path / "prefs.dropped.jsonl")
        assert dropped["reason"] == "near duplicate of another prompt"
    assert left[0] == left[1]
    assert "far" in left[0]
    assert len(left[0]) == 2
    assert prefs(rows, "--near-duplicates", 1.5, "--overwrite").code == 2


def test_near_duplicates_name_the_package_that_they_need(prefs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    finished = prefs([record()], "--near-duplicates", 0.7)
    assert finished.code == 1
    assert "pip install 'srt-cli[near-duplicates]'" in finished.stderr


def test_samples_of_one_prompt_are_no_near_duplicates_of_each_other(prefs, tmp_path):
    rows = [record(prompt=LONG, sample=n, refinement=f"Apple {n}.") for n in range(3)]
    assert prefs(rows, "--near-duplicates", 0.7).code == 0
    assert len(read_jsonl(tmp_path / "prefs.jsonl")) == 3


def test_near_duplicates_of_an_excluded_prompt_fall_out_too(prefs, tmp_path):
    write_jsonl(tmp_path / "heldout.jsonl", [{"prompt": LONG}])
    rows = [record(id="near", prompt=NEAR), record(id="far")]
    assert prefs(rows, "--exclude", "heldout.jsonl", "--near-duplicates", 0.7).code == 0
    assert [row["id"] for row in read_jsonl(tmp_path / "prefs.jsonl")] == ["far"]


def test_a_chosen_answer_in_a_script_that_nobody_asked_for_falls_out(prefs, tmp_path):
    russian = "Красное яблоко."
    rows = [
        record(id="switched", refinement=russian),
        record(id="asked", prompt="Name a fruit in Russian.", refinement=russian),
        record(id="same", prompt="Назови фрукт.", response="Груша.", refinement=russian),
    ]
    assert prefs(rows).code == 0
    assert {row["id"] for row in read_jsonl(tmp_path / "prefs.jsonl")} == {"asked", "same"}
    (dropped,) = read_jsonl(tmp_path / "prefs.dropped.jsonl")
    assert dropped["reason"] == "another script"


def test_the_summary_is_told_and_kept(prefs, tmp_path):
    rows = [record(id=str(n), prompt=f"p{n}", score=n % 4 + 3) for n in range(12)]
    finished = prefs([*rows, record(id="long", refinement="An apple that is ripe, round and red.")])
    assert "13 rows: 12 kept; dropped: 1 refinement over 3 times as long" in finished.stderr
    assert "pairs by gain 2: 3 · 3: 3 · 4: 3 · 5: 3" in finished.stderr
    assert "scores: chosen 8: 12; rejected 3: 3 · 4: 3 · 5: 3 · 6: 3" in finished.stderr
    assert "for example" in finished.stderr
    tallies = json.loads((tmp_path / "prefs.run.json").read_text())["tallies"]
    assert tallies["gains"] == {"2": 3, "3": 3, "4": 3, "5": 3}
    assert tallies["lengths_before"]["pairs"] == 13
    assert tallies["lengths"]["mean_gap"] == 0
    assert tallies["lengths"]["correlation_of_gain_and_gap"] is None


@pytest.mark.parametrize("method", ["margin", "subset", "matched"])
def test_length_balance_brings_the_gap_to_zero_and_says_what_it_costs(prefs, tmp_path, method):
    rows = [
        record(id=str(n), prompt=f"p{n}", response="a word or two of it" + "." * (n % 7),
               refinement="a word or two of this" + "!" * (n % 11), score=n % 5 + 1)
        for n in range(200)
    ]  # fmt: skip
    finished = prefs(rows, "--length-balance", method)
    assert finished.code == 0, finished.stderr
    tallies = json.loads((tmp_path / "prefs.run.json").read_text())["tallies"]
    before, after = tallies["lengths_before"], tallies["lengths"]
    assert before["mean_gap"] > 3
    assert abs(after["mean_gap"]) < 0.35
    lost = tallies["dropped"]["length balance"]
    assert lost == before["pairs"] - after["pairs"] > 0
    assert f"length balance ({method}) leaves out {lost} of 200 pairs" in finished.stderr
    assert after["pairs"] == len(read_jsonl(tmp_path / "prefs.jsonl")) > 20


def test_a_balance_of_which_nothing_would_be_left_is_refused(prefs):
    rows = [
        record(id=str(n), prompt=f"p{n}", refinement="An apple!" + "!" * n) for n in range(1, 9)
    ]
    finished = prefs(rows, "--length-balance", "matched")
    assert finished.code == 1
    assert "the same side is longer in every pair" in finished.stderr
    advised = prefs(rows).stderr
    assert "DPO learns length too: consider srt dpo --loss-type sigmoid_norm." in advised


def test_the_report_is_one_page_with_what_was_found(prefs, tmp_path):
    rows = [record(id=str(n), prompt=f"p{n} <script>", score=n % 4 + 3) for n in range(12)]
    assert prefs(rows, "--report", "prefs.html").code == 0
    page = (tmp_path / "prefs.html").read_text()
    assert "prefs.jsonl: 12 pairs of 12 rows" in page
    assert re.search(r"p\d+ &lt;script&gt;", page)
    assert "<script>" not in page


def test_a_full_disk_is_said_and_the_same_line_goes_on(tmp_path):
    import os
    import subprocess
    import sys

    rows = [record(id=str(n), prompt=f"p{n}").model_dump() for n in range(80)]
    write_jsonl(tmp_path / "self-feedback.jsonl", rows)
    limited = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "from srt_cli.cli import main\n"
        "sys.argv = ['srt', 'build-prefs']\n"
        "main()\n"
    )
    for program, code in ((limited, 1), (limited.replace("9000", "10**9"), 0)):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"COLUMNS": "200"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert ("error: prefs.jsonl: file too large" in done.stderr.lower()) == bool(code)
        assert not list(tmp_path.glob("*.tmp"))
    assert len(read_jsonl(tmp_path / "prefs.jsonl")) == 80


def test_a_checklist_is_counted_whatever_score_stands_below_it(prefs, tmp_path):
    def said(weaknesses):
        return Feedback(weaknesses=weaknesses, suggestions="s", score=10)

    good = said('Begin with "Tip:"? Tip:: yes. Small letters only? no capitals: yes.')
    rows = [
        record(
            id="half", feedback=said('Begin with "Tip:"? Tip,: no. Small letters only? a: yes.'),
            refinement_feedback=good, refinement_score=10,
        ),
        record(
            id="as good", feedback=good, refinement_feedback=good, refinement_score=10,
            prompt="Name a tree.",
        ),
        record(id="no list", refinement_feedback=said("Fine: no faults."), prompt="Name a bird."),
    ]  # fmt: skip
    finished = prefs(rows, "--score", "checklist")
    assert finished.code == 0, finished.stderr
    (pair,) = read_jsonl(tmp_path / "prefs.jsonl")
    assert (pair["id"], pair["chosen_score"], pair["rejected_score"]) == ("half", 10, 5.5)
    reasons = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "prefs.dropped.jsonl")}
    assert reasons == {"as good": "tie", "no list": "no checklist"}

"""Names and tables that fit the width of a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srt_cli import console
from srt_cli.stats.rates import Estimate
from srt_cli.tables import Table, interval_of, share_with_interval, tell_apart

MODELS = [
    "SmolLM2-135M-Instruct",
    "SmolLM2-135M-Instruct-srt-sft",
    "SmolLM2-135M-Instruct-srt-dpo-2",
]


@pytest.mark.parametrize(
    ("names", "longest", "shown"),
    [
        (MODELS, 40, MODELS),
        (MODELS, 22, ["SmolLM2-135M-Instruct", "…sft", "…dpo-2"]),
        (MODELS, 14, ["…Instruct", "…srt-sft", "…srt-dpo-2"]),
        (["models/2024-11-02/dpo", "base"], 12, ["…11-02/dpo", "base"]),
        (
            ["small-model-of-one-sort", "large-model-of-one-sort"],
            12,
            ["small-…", "large-…"],
        ),
        (
            ["runs/one-long-name/out.jsonl", "runs/two-long-name/out.jsonl"],
            12,
            ["…one-…", "…two-…"],
        ),
        (["averyveryverylongname"], 10, ["averyv…ame"]),
        (["averyverylongname1of2", "averyverylongname2of2"], 10, ["averyv…of2", "averyv…of2"]),
    ],
)
def test_names_are_cut_to_what_tells_them_apart(names, longest, shown):
    assert tell_apart(names, longest) == shown


@given(st.lists(st.text("ab-/", min_size=1, max_size=30)), st.integers(8, 30))
def test_no_name_is_longer_than_there_is_room_for(names, longest):
    shown = tell_apart(names, longest)
    assert len(shown) == len(names)
    assert all(len(each) <= longest for each in shown)
    assert all(a == b for a, b in zip(names, shown, strict=True) if len(a) <= longest)


def test_a_table_is_as_wide_as_the_terminal_and_no_heading_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(console._result, "width", 60)
    monkeypatch.setattr(type(console._result), "is_terminal", True)
    rows = [[name, "another " + name, "+4 [-21, +29]", "0.012"] for name in MODELS]
    console.table("title", ["", "", "difference [95 %]", "p (Holm)"], rows)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 60
    assert any("difference [95 %]   p (Holm)" in line for line in lines)
    assert len([line for line in lines if "+4 [-21, +29]" in line]) == 3


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_figure_is_cut_and_a_file_has_no_width(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(console._result, "width", 40)
    monkeypatch.setattr(type(console._result), "is_terminal", is_terminal)
    columns = ["", "written: low/expected/high", "Batch API"]
    console.table("cost", columns, [[name, "1.89k/3.71k/12.3k", "$0.39"] for name in MODELS])
    told = capsys.readouterr().out
    assert "..." not in told
    if is_terminal:  # figures fold
        assert max(map(len, told.splitlines())) <= 40
        assert "12.3k" in told
    else:
        assert told.count("1.89k/3.71k/12.3k   ") == len(MODELS)
        assert all(f" {name} " in told for name in MODELS)


def test_an_interval_is_shown_within_what_is_possible():
    assert interval_of(Estimate(0.5, -5.8, 6.8, 2, 0.5), (-1.0, 1.0)) == (-1, 1)
    assert share_with_interval(Estimate(0.9, 0.7, 1.1, 5, 0.1)) == "90% [70, 100]"


def test_more_things_than_fit_stand_in_a_further_table_with_their_names_whole_enough():
    names = [*MODELS, "SmolLM2-135M-Instruct-srt-dpo-3"]
    table = Table("t", ["", *names], [["right", *["100% [87, 100]"] * 4]], things=4)
    first, second = table.fitted(60)
    assert first.columns == ["", "…Instruct", "…srt-sft", "…srt-dpo-2"]
    assert second.columns == ["", "SmolLM2-135M-Instruct-srt-dpo-3"]
    assert second.cells == [["right", "100% [87, 100]"]]


def test_a_table_that_cannot_fit_is_left_to_fold():
    table = Table("t", ["", "value"], [["a name of some length", "v" * 100]])
    assert table.fitted(80) == [table]

"""The report as a person opens it: from a file, in a real browser."""

import io

import pytest
from browser import CHROMIUM, visit
from conftest import write_jsonl
from pypdf import PdfReader
from test_evaluate import PROGRAMS, evaluate

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")


@pytest.fixture
def report(srt, tmp_path):
    (tmp_path / "p.py").write_text(PROGRAMS)
    rows = [{"id": f"q{n}", "prompt": f"question number {n}"} for n in range(24)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    finished = evaluate(srt, "--check", "python:p.py:check", "--examples", 20)
    assert finished.code == 0, finished.stderr
    return tmp_path / "report.html"


def type_into(name, text):
    return (
        f"{name}.value = {text!r}; {name}.dispatchEvent(new Event('input')); "
        "document.querySelectorAll('article:not([hidden])').length"
    )


def test_it_opens_without_network_or_complaint_and_the_filter_works(report):
    page = visit(
        report,
        "document.querySelector('h1').textContent",
        type_into("search", "number 17"),
        "count.textContent",
        type_into("search", ""),
        "document.scripts.length",
        "document.querySelector('article pre').textContent",
    )
    assert page.complaints == []
    asked = [url for url in page.requests if not url.startswith("data:")]
    assert asked == [report.resolve().as_uri()]
    assert "passes 100 points above the reference" in page.values[0]
    assert page.values[1:5] == [1, "1 shown", 20, 1]
    assert page.values[5].startswith("no idea about question number 0")


def test_prompts_whose_verdicts_differ_can_be_singled_out(srt, tmp_path):
    (tmp_path / "p.py").write_text(
        PROGRAMS
        + """
def wavers(prompt, a, b):
    return float("good" in a) if int(prompt.id[1:]) % 4 else 1.0
"""
    )
    rows = [{"id": f"q{n}", "prompt": f"question number {n}"} for n in range(20)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    assert evaluate(srt, judge="python:p.py:wavers").code == 0
    click = "changed.click(); document.querySelectorAll('article:not([hidden])').length"
    page = visit(tmp_path / "report.html", click, "count.textContent", click)
    # Every fourth is won by whatever is shown first: once by each side.
    assert page.values == [5, "5 shown", 20]


def test_what_a_model_wrote_is_text_and_never_runs(report):
    page = visit(
        report,
        "document.body.textContent.includes('<script>alert(1)</script>')",
        "document.querySelectorAll('article script').length",
    )
    assert page.values == [True, 0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_hangs_over_the_edge_and_it_can_be_read(report, width, scheme):
    page = visit(
        report,
        "document.documentElement.scrollWidth <= innerWidth",
        "getComputedStyle(document.body).color != getComputedStyle(document.body).backgroundColor",
        width=width,
        scheme=scheme,
    )
    assert page.values == [True, True]


def test_examples_beyond_the_limit_are_in_a_second_file(report):
    page = visit(report, "document.querySelector('#examples a').getAttribute('href')")
    assert page.values == ["report.more.html"]
    more = visit(
        report.with_name("report.more.html"), "document.querySelectorAll('article').length"
    )
    assert more.values == [4]
    assert more.complaints == []


def words_of(pdf):
    """All text of a PDF without white space, which lies elsewhere on paper."""
    return "".join(
        "".join(page.extract_text().split()) for page in PdfReader(io.BytesIO(pdf)).pages
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_paper_nothing_is_cut_and_every_example_is_there(report, scheme):
    page = visit(report, scheme=scheme, printed=True)
    text = words_of(page.pdf)
    for number in range(20):
        assert f"noideaaboutquestionnumber{number}" in text
        assert f"<script>alert(1)</script>q{number}" in text
    assert "Theother4areinreport.more.html" in text
    # Tables reach beyond no edge: their last columns are there.
    assert text.count("degenerate") >= 1
    assert "length,reference=1" in text
    assert "Filterbytext" not in text
    more = visit(report.with_name("report.more.html"), printed=True)
    assert all(f"noideaaboutquestionnumber{n}" in words_of(more.pdf) for n in range(20, 24))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_is_white_whatever_the_screen_and_holds_every_table_whole(report, scheme):
    page = visit(
        report,
        "getComputedStyle(document.body).color",
        "[...document.querySelectorAll('.scroll, .plot, pre')].filter("
        "box => box.scrollWidth > box.clientWidth + 1).length",
        width=700,
        scheme=scheme,
        media="print",
    )
    assert page.values == ["rgb(0, 0, 0)", 0]


def test_on_a_narrow_screen_every_dot_of_a_plot_is_in_view(report):
    page = visit(
        report,
        "[...document.querySelectorAll('.plot circle')].filter(dot => dot.getClientRects().length)"
        ".every(dot => dot.getBoundingClientRect().right <= innerWidth)",
        "[...document.querySelectorAll('.plot circle')].some(dot => dot.getClientRects().length)",
        width=400,
    )
    assert page.values == [True, True]

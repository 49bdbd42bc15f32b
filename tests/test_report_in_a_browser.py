"""The report as a person opens it: from a file, in a real browser."""

import pytest
from browser import CHROMIUM, visit
from conftest import write_jsonl
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

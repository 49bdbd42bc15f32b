"""The page on which a person judges pairs: in a real browser, and back into the audit."""

import json
import re

import pytest
from browser import ANOTHER_TAB, CHROMIUM, RELOAD, visit
from conftest import read_jsonl, write_jsonl
from test_build_prefs import record

from srt_cli.pairs.pairing import pair_key
from srt_cli.records import Preference

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")

EVIL = "</script><img src=x onerror=alert(1)> <!--"


@pytest.fixture
def page(srt, tmp_path):
    """Six pairs to judge; what is better says so."""
    rows = [
        record(id=str(n), prompt=f"Question {n}? {EVIL}", response=f"bad {n} {EVIL}",
               refinement=f"good {n}\nand more {EVIL}").model_dump()
        for n in range(6)
    ]  # fmt: skip
    write_jsonl(tmp_path / "self-feedback.jsonl", rows)
    finished = srt("build-prefs", "--audit", 6, "--label-page", "label.html")
    assert finished.code == 0, finished.stderr
    assert "6 pairs to judge by hand: open label.html" in finished.stderr
    return tmp_path / "label.html"


def press(key):
    return f"void document.dispatchEvent(new KeyboardEvent('keydown', {{key: {key!r}}}))"


PROGRESS = "document.getElementById('progress').textContent"
# Press the key of the better side.
JUDGE = (
    "void document.dispatchEvent(new KeyboardEvent('keydown', {key: "
    "document.getElementById('left').textContent.startsWith('good') ? '1' : '2'}))"
)
SAVE = "document.getElementById('save').click()"
# Saving begins a moment later: look at the page until then.
WAIT = "(() => { const end = Date.now() + 100; while (Date.now() < end); })()"


def test_keys_judge_undo_and_save_and_the_answers_come_back(page, srt, tmp_path):
    seen = visit(
        page,
        PROGRESS,
        JUDGE, press("0"), press("u"), PROGRESS,
        JUDGE, JUDGE, JUDGE, press("0"), press("x"), JUDGE, PROGRESS,
        "document.getElementById('pair').hidden",
        "document.getElementById('headline').textContent",
        press("1"), PROGRESS,
        "document.getElementById('bar').style.width",
        SAVE, *[WAIT] * 5,
    )  # fmt: skip
    assert seen.complaints == []
    said = [value for value in seen.values if value is not None]
    assert said[:6] == [
        "0 of 6 judged", "1 of 6 judged", "6 of 6 judged", True,
        "All judged. Save your answers.", "6 of 6 judged",
    ]  # fmt: skip
    assert said[6] == "100%"
    (name,) = seen.saved
    assert name == "label.labels.jsonl"
    assert len(read_jsonl(tmp_path / name)) == 6
    finished = srt("build-prefs", "--audit-labels", name)
    assert finished.code == 0, finished.stderr
    assert "(5 right, 0 wrong, 1 ties, 0 unread)" in finished.stderr


def test_answers_are_kept_when_the_page_is_opened_again(page):
    seen = visit(
        page,
        JUDGE, JUDGE, RELOAD, PROGRESS,
        press("u"), RELOAD, PROGRESS, ANOTHER_TAB, "load(place)[1]",
    )  # fmt: skip
    assert seen.complaints == []
    assert [value for value in seen.values if value is not None] == [
        "2 of 6 judged", "1 of 6 judged", "",
    ]  # fmt: skip


def test_nothing_is_loaded_and_texts_are_text(page):
    seen = visit(
        page,
        "document.querySelectorAll('img, article script').length",
        "document.getElementById('prompt').textContent.includes('onerror=alert(1)')",
        "document.querySelectorAll('button').length",
        "document.getElementById('choose-2').click()",
        PROGRESS,
    )
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [
        page.resolve().as_uri()
    ]
    assert seen.values == [0, True, 5, None, "1 of 6 judged"]


def test_the_page_does_not_tell_which_answer_is_the_refinement(page, srt, tmp_path):
    data = json.loads(re.search(r"const DATA = (\{.*?\});\n", page.read_text()).group(1))
    pairs = {
        pair_key(pair): pair
        for row in read_jsonl(tmp_path / "prefs.jsonl")
        for pair in [Preference.model_validate(row)]
    }
    sides = [
        shown["left"]["text"] == pairs[shown["pair"]].chosen[0].content for shown in data["rows"]
    ]
    assert {*sides} == {True, False}
    assert all(set(shown) == {"pair", "prompt", "left", "right"} for shown in data["rows"])
    assert all(set(shown["left"]) == {"text", "key"} for shown in data["rows"])
    before = page.read_bytes()
    assert srt("build-prefs", "--audit", 6, "--label-page", "label.html").code == 0
    assert page.read_bytes() == before
    srt("build-prefs", "--audit", 6, "--label-page", "label.html", "--seed", 7, "--overwrite")
    assert page.read_bytes() != before


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_hangs_over_the_edge_and_it_can_be_read(page, width, scheme):
    seen = visit(
        page,
        "document.documentElement.scrollWidth <= innerWidth",
        "getComputedStyle(document.body).color != getComputedStyle(document.body).backgroundColor",
        width=width,
        scheme=scheme,
    )
    assert seen.values == [True, True]


def test_the_report_opens_without_complaint(srt, page, tmp_path):
    line = ("build-prefs", "--audit", 6, "--label-page", "label.html", "--report", "prefs.html")
    assert srt(*line).code == 0
    seen = visit(
        tmp_path / "prefs.html",
        "document.querySelectorAll('article').length",
        "document.querySelectorAll('svg').length",
        "document.querySelectorAll('img').length",
        "document.documentElement.scrollWidth <= innerWidth",
        width=400,
    )
    assert seen.complaints == []
    assert seen.values == [6, 3, 0, True]

"""The page on which a person writes critiques: in a real browser, and back into feedback."""

import json

import pytest
from browser import ANOTHER_TAB, CHROMIUM, RELOAD, visit
from conftest import read_jsonl, write_jsonl

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")

EVIL = "</script><img src=x onerror=alert(1)> <!--"
SCORER = """\
from srt_cli.records import Feedback

def score(prompt, response):
    return Feedback(weaknesses="none", suggestions="none", score=9), response

def respond(prompt):
    return "Answer to " + prompt.text
"""
PROGRESS = "document.getElementById('progress').textContent"
# Saving begins a moment later: look at the page until then.
WAIT = "(() => { const end = Date.now() + 100; while (Date.now() < end); })()"


@pytest.fixture
def page(srt, tmp_path):
    (tmp_path / "program.py").write_text(SCORER)
    rows = [
        {"id": "a", "prompt": f"One? {EVIL}", "response": f"First {EVIL}", "unit_tests": [1]},
        {"id": "b", "prompt": [{"role": "system", "content": "Be brief."},
                               {"role": "user", "content": "Two?"}]},
        {"id": "c", "prompt": "Three?", "response": "Third"},
    ]  # fmt: skip
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    finished = srt("collect-feedback", "--model", "python:program.py:respond",
                   "--critique-page", "page.html")  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert "page.html: 3 rows to criticise by hand" in finished.stdout
    assert "srt collect-feedback --critic file:page.critiques.jsonl" in finished.stdout
    assert "--critic-for score=SPEC\n" in finished.stdout
    return tmp_path / "page.html"


def press(key, *, ctrl=False, shift=False):
    event = json.dumps({"key": key, "ctrlKey": ctrl, "shiftKey": shift, "bubbles": True})
    return f"void document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {event}))"


def write(name, text):
    return (
        f"(() => {{ const field = document.getElementById('{name}'); field.focus(); "
        f"field.value = {json.dumps(text)}; field.dispatchEvent(new Event('input')); }})()"
    )


def click(name):
    return f"document.getElementById('{name}').click()"


def test_keys_write_critiques_and_what_is_saved_becomes_feedback(page, srt, tmp_path):
    seen = visit(
        page,
        PROGRESS,
        press("7"),
        write("weaknesses", f"Evil. {EVIL}"), press("4"), write("suggestions", "Be good."),
        click("copy"), write("refinement", "Second thoughts."), PROGRESS,
        press("Enter", ctrl=True),
        write("weaknesses", "Echo."), PROGRESS, "document.activeElement.blur()", press("0"),
        press("Enter", ctrl=True), press("Enter", ctrl=True),
        write("suggestions", "Nothing yet."), PROGRESS,
        press("Enter", ctrl=True, shift=True), "document.getElementById('weaknesses').value",
        "document.querySelector('[name=score]:checked').value",
        write("by", "Ann"), click("save"), *[WAIT] * 5,
    )  # fmt: skip
    assert seen.complaints == []
    assert [value for value in seen.values if value is not None] == [
        "response 1 of 3 · 0 criticised",
        "response 1 of 3 · 1 criticised",
        "response 2 of 3 · 1 criticised · 1 begun: weaknesses and a score make a critique",
        "response 3 of 3 · 2 criticised · 1 begun: weaknesses and a score make a critique",
        "Echo.", "10",
    ]  # fmt: skip
    (name,) = seen.saved
    assert name == "page.critiques.jsonl"
    finished = srt("collect-feedback", "--critic", f"file:{name}",
                   "--model", "python:program.py:respond", "--overwrite",
                   "--critic-for", "refinement=python:program.py:refine",
                   "--critic-for", "score=python:program.py:score")  # fmt: skip
    assert finished.code == 2  # this program has no such function
    (tmp_path / "program.py").write_text(
        SCORER + "\n\ndef refine(prompt, response, feedback):\n    return 'Better.'\n"
    )
    # Without the prompts: what the page saved says it all.
    (tmp_path / "prompts.jsonl").unlink()
    finished = srt("collect-feedback", "--critic", f"file:{name}",
                   "--critic-for", "refinement=python:program.py:refine",
                   "--critic-for", "score=python:program.py:score", "--overwrite")  # fmt: skip
    assert finished.code == 0, finished.stderr
    first, second = read_jsonl(tmp_path / "feedback.jsonl")
    assert first["prompt"] == f"One? {EVIL}"
    assert first["feedback"]["weaknesses"] == f"Evil. {EVIL}"
    assert (first["feedback"]["suggestions"], first["feedback"]["score"]) == ("Be good.", 7)
    assert first["refinement"] == "Second thoughts."
    assert (first["policy"], first["critic"]) == ("given", "Ann")
    assert [turn["content"] for turn in second["prompt"]] == ["Be brief.", "Two?"]
    assert second["response"].startswith("Answer to ")
    assert second["policy"] == "python:program.py:respond"
    assert (second["feedback"]["suggestions"], second["refinement"]) == ("", "Better.")
    assert second["status"] == "ok"


def test_what_is_written_is_kept_and_texts_are_text(page):
    seen = visit(
        page,
        "document.querySelectorAll('img, article script').length",
        "document.getElementById('prompt').textContent.includes('onerror=alert(1)')",
        "document.getElementById('response').textContent.includes('</script>')",
        "document.documentElement.scrollWidth <= innerWidth",
        write("weaknesses", "Kept."), press("3"),
        "document.querySelector('[name=score][value=\"3\"]').click()",
        RELOAD,
        PROGRESS, click("back"), "document.getElementById('weaknesses').value",
        ANOTHER_TAB, "load(place)[0].weaknesses",
        width=400,
    )  # fmt: skip
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [
        page.resolve().as_uri()
    ] * 2
    assert [value for value in seen.values if value is not None] == [
        0, True, True, True, "response 2 of 3 · 1 criticised", "Kept.", "Kept.",
    ]  # fmt: skip

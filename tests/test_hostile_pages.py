"""Pages of files that are hostile in every field, in a real browser: no script runs, nothing is asked
for, and what was written is there to be read."""

import pytest
from browser import CHROMIUM, visit
from conftest import write_jsonl

from srt_cli.report.training import write_training_page
from srt_cli.runs.run import InputFile, Manifest

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")

EVIL = (
    "-->]]></script></style></title></textarea><script>window.ran=1</script>"
    "<img src='http://127.0.0.1:9/i' onerror='window.ran=1'><svg/onload=window.ran=1>"
    "<iframe src='http://127.0.0.1:9/f'></iframe><link rel=stylesheet href=http://127.0.0.1:9/c>"
    "<base href='http://127.0.0.1:9/'><meta http-equiv=refresh content='0;url=http://127.0.0.1:9/m'>"
    "\" onmouseover=\"window.ran=1\" ' autofocus onfocus='window.ran=1' `${window.ran=1}` "
    "{{ window.ran }} javascript:window.ran=1 url(http://127.0.0.1:9/u) \u2028\u202e\x1b[31m&lt;b&gt;"
)
NAME = "<img src=x onerror=window.ran=1>.jsonl"
"""As much as the name of a file can hold."""

LOOK = (
    "window.ran === undefined",
    "document.querySelectorAll('img, iframe, object, embed, link[rel=stylesheet], base, "
    "meta[http-equiv=refresh],"
    ' [onerror], [onload], [onmouseover], [onfocus], [href^="javascript:"]\').length',
    "[...document.querySelectorAll('*')].forEach(e => { for (const type of ['mouseover', 'focus', "
    "'click']) if (e.tagName != 'BUTTON' && e.tagName != 'A') e.dispatchEvent(new Event(type)); })",
    "window.ran === undefined",
    "document.documentElement.textContent.split('window.ran=1</script>').length - 1",
)


def assert_harmless(page, times):
    """`times` is how often the whole text stands in the page at least."""
    seen = visit(page, *LOOK)
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [
        page.resolve().as_uri()
    ]
    intact, elements, _, still, shown = seen.values
    assert (intact, elements, still) == (True, 0, True)
    assert shown >= times


def feedback_rows():
    feedback = {"weaknesses": f"w {EVIL}", "suggestions": f"s {EVIL}", "score": 3}
    for n in range(3):
        yield {
            "id": f"{n} {EVIL}", "prompt": f"Ask {n} {EVIL}", "response": f"bad {n} {EVIL}",
            "feedback": feedback, "refinement": f"good {n} {EVIL} and {n * 'more '}",
            "refinement_score": 9, "refinement_feedback": feedback | {"score": 9}, "status": "ok",
            "reason": None, "raw": {EVIL: EVIL}, "policy": EVIL, "critic": EVIL, "sample": 0,
            "round": 1, "usage": {},
        }  # fmt: skip
    yield {
        "id": EVIL, "prompt": EVIL, "response": EVIL, "feedback": None, "refinement": None,
        "refinement_score": None, "refinement_feedback": None, "status": "failed", "reason": EVIL,
        "raw": {}, "policy": EVIL, "critic": EVIL, "sample": 0, "round": 1, "usage": {},
    }  # fmt: skip


def test_the_pages_of_preferences_and_the_page_to_judge_them_by(srt, tmp_path):
    write_jsonl(tmp_path / NAME, feedback_rows())
    finished = srt("build-prefs", "--data", NAME, "--report", "prefs.html", "--audit", 3,
                   "--label-page", "label.html", "--no-hygiene")  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert_harmless(tmp_path / "prefs.html", times=3)
    assert_harmless(tmp_path / "label.html", times=3)


JUDGE = """
def judge(prompt, a, b):
    return float(len(a) > len(b))


def check(prompt, response):
    return True
"""


def test_the_report_of_an_evaluation(srt, tmp_path):
    (tmp_path / "p.py").write_text(JUDGE)
    prompts = [
        {"id": f"{n} {EVIL}", "prompt": f"Ask {n} {EVIL}", "category": EVIL, EVIL: EVIL}
        for n in range(3)
    ]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    for name, more in ((NAME, " and more"), (f"base {NAME}", "")):
        rows = [
            {"id": p["id"], "prompt": p["prompt"], "response": f"It is {EVIL}{more}", "model": EVIL}
            for p in prompts
        ]
        write_jsonl(tmp_path / name, rows)
    finished = srt("eval", "--model", NAME, "--reference", f"base {NAME}", "--judge",
                   "python:p.py:judge", "--check", "python:p.py:check")  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert_harmless(tmp_path / "report.html", times=9)


def test_the_page_of_a_training(tmp_path):
    metrics = [{"step": n, "loss": 1 / n, f"eval_loss_{EVIL}": 1.0} for n in range(1, 4)]
    samples = [
        {"step": n, "prompt": [{"role": EVIL, "content": EVIL}], "text": EVIL, "tokens": n,
         "stopped": False}
        for n in (1, 3)
    ]  # fmt: skip
    for name, rows in (("metrics", metrics), ("samples", samples)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    every = {"model": EVIL, "method": EVIL, EVIL: EVIL, "mix": [EVIL]}
    manifest = Manifest(command=EVIL, settings=every, runtime={}, error=EVIL, progress=EVIL)
    manifest.warnings = [EVIL]
    manifest.inputs = {EVIL: InputFile(path=EVIL)}
    write_training_page(tmp_path, manifest)
    assert_harmless(tmp_path / "training.html", times=12)


CRITIC = f"""
EVIL = {EVIL!r}


def critique(prompt, response):
    return {{"weaknesses": EVIL, "suggestions": EVIL, "score": 3}}, response + EVIL
"""


def test_the_page_about_a_critic(srt, tmp_path):
    name = "<img src=x onerror=window.ran=1>.py"
    (tmp_path / name).write_text(CRITIC)
    rows = [{"id": f"{n} {EVIL}", "prompt": EVIL, "response": f"{n} {EVIL}"} for n in range(3)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    finished = srt(
        "collect-feedback", "--critic", f"python:{name}:critique", "--report", "critic.html"
    )
    assert finished.code == 0, finished.stderr
    assert_harmless(tmp_path / "critic.html", times=0)
    assert "&lt;img src=x onerror" in (tmp_path / "critic.html").read_text()


def test_the_page_to_write_critiques_on(srt, tmp_path):
    rows = [{"id": EVIL, "prompt": EVIL, "response": EVIL, EVIL: EVIL}]
    write_jsonl(tmp_path / NAME, rows)
    finished = srt("collect-feedback", "--prompts", NAME, "--critique-page", "page.html")
    assert finished.code == 0, finished.stderr
    assert_harmless(tmp_path / "page.html", times=2)

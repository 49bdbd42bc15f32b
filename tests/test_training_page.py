"""training.html, looked at by a real browser, and its plots by their literal places."""

import json
import math
import re

import pytest
from browser import CHROMIUM, visit
from hypothesis import given
from hypothesis import strategies as st

from srt_cli.report.html import Curve, histogram, line_plot, nice_ticks, thin
from srt_cli.report.training import write_training_page
from srt_cli.runs.run import Manifest

SCRIPT = "<script>document.title = 'forged'</script>"


@pytest.fixture
def page(tmp_path):
    metrics = [
        {
            "step": n, "loss": None if n == 4 else 0.7 / n, "learning_rate": 1e-4 / n,
            "grad_norm": 1.0, "rewards/chosen": 0.1 * n, "rewards/rejected": -0.1 * n,
            "rewards/margins": 0.2 * n, "rewards/accuracies": 0.5, "logps/chosen": -50.0,
            "logps/rejected": -60.0, "tokens_per_second": 100.0,
        }
        for n in range(1, 9)
    ]  # fmt: skip
    parts = {"eval_loss": 2.0, "eval_loss_feedback": 1.0, "eval_loss_response": 3.0}
    metrics += [{"step": step, **parts} for step in (0, 4, 8)]
    samples = [
        {"step": step, "prompt": [{"role": "user", "content": f"Ask {SCRIPT}"}],
         "text": f"At {step}: {SCRIPT}", "tokens": 9 + step, "stopped": step == 8}
        for step in (0, 4, 8)
    ]  # fmt: skip
    for name, rows in (("metrics", metrics), ("samples", samples)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = Manifest(command="dpo", settings={"model": SCRIPT, "beta": 0.01}, runtime={})
    manifest.warnings = [f"careful {SCRIPT}"]
    write_training_page(tmp_path, manifest)
    return tmp_path / "training.html"


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1200, "light")])
def test_it_opens_by_itself_and_what_a_model_wrote_never_runs(page, width, scheme):
    found = visit(
        page,
        "[...document.querySelectorAll('h2')].map(h => h.textContent).join('|')",
        "[...document.querySelectorAll('.legend')][1].textContent",
        "document.title",
        "document.body.textContent.split('<script>').length - 1",
        "document.scripts.length",
        "document.documentElement.scrollWidth <= innerWidth",
        "[...document.querySelectorAll('path.curve')].every(p => getComputedStyle(p).stroke != 'none'"
        " && getComputedStyle(p).stroke != getComputedStyle(document.body).backgroundColor)",
        "document.querySelectorAll('.answer').length",
        width=width,
        scheme=scheme,
    )
    assert found.complaints == []
    assert [url for url in found.requests if not url.startswith("data:")] == [page.as_uri()]
    assert found.values[0] == (
        "Read with care|Loss|Validation loss|Rewards|Reward accuracy|Log-prob of the answers|"
        "Learning rate|Gradient norm|Tokens a second|Length of the samples|"
        "What it answered on the way|Settings"
    )
    assert found.values[1] == "all 2feedback 1response 3"
    assert found.values[2] == f"srt dpo: {page.parent.name}"
    # Warning, model (head and settings), prompt, three answers; all as text.
    assert found.values[3:] == [7, 0, True, True, 3]


def test_a_plot_puts_points_where_its_axes_say():
    plot = line_plot([Curve("loss", [(0, 0.0), (5, 1.0), (10, 2.0)])], caption="c")
    # 640 wide from 66 on, 200 high from 14 on; ticks from 0 to 2.
    assert 'd="M66.0 214.0 L386.0 114.0 L706.0 14.0"' in plot
    assert "loss <b>2</b>" in plot


def test_a_value_that_is_no_number_leaves_a_gap_and_none_at_all_no_plot():
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 1.0), (5, 2.0)]
    plot = line_plot([Curve("loss", points)], caption="c")
    assert plot.split("</svg>")[0].count("<path") == 2
    assert "nan" not in plot
    assert line_plot([Curve("loss", [(1, math.nan)])], caption="c") == ""
    assert "<circle" in line_plot([Curve("loss", [(1, 1.0)])], caption="c")


@given(
    st.floats(-1e9, 1e9, allow_subnormal=False),
    st.floats(1e-6, 1e9, allow_subnormal=False),
)
def test_ticks_enclose_what_is_shown(low, width):
    high = low + width
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high)
    slack = 1e-6 * (high - low)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)


def test_a_long_curve_is_thinned_to_means():
    points = [(float(n), float(n % 2)) for n in range(10_000)]
    thinned = thin(points, most=100)
    assert len(thinned) == 100
    assert {y for _, y in thinned} == {0.5}
    assert thin(points[:50], most=100) == points[:50]


def test_scores_that_nobody_gave_have_their_place_between_those_that_somebody_gave():
    def bars(counts):
        drawn = histogram(counts, caption="Scores")
        return [re.findall(f'class="{kind}".*>(.*)<', drawn) for kind in ("tick", "value")]

    assert bars({5: 1, 2: 3}) == [["2", "3", "4", "5"], ["3", "0", "0", "1"]]
    assert bars({2.5: 1, 9: 2}) == [["2.5", "9"], ["1", "2"]]
    assert bars({1: 1, 1000: 2}) == [["1", "1000"], ["1", "2"]]

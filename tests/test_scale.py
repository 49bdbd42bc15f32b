"""The arithmetic of docs/scale.md, computed again from its formulas."""

import re
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parents[1] / "docs/scale.md").read_text()
PARAMETERS = {"7B": 7e9, "13B": 13e9, "70B": 70e9}

PEAK = 989e12
TRAINING_SHARE = 0.30
GENERATION_SHARE = 0.20
FORWARD, BACKWARD, AGAIN = 2, 4, 2
BYTES_A_PARAMETER = 16
ROOM = 60e9


def operations(step, parameters):
    """Of one step on the paper's data."""
    training = FORWARD + BACKWARD + AGAIN
    if step == "`srt sft`":
        return training * parameters * 22_000 * 5 * 1_000
    if step == "`srt dpo`":
        return (training + FORWARD) * parameters * 63_000 * 2 * 500
    return FORWARD * parameters * 75_000 * (1_650 + 950)


def gpus_needed(parameters):
    count = 8
    while BYTES_A_PARAMETER * parameters / count > ROOM:
        count *= 2
    return count


def rows_of(head):
    table = DOCUMENT[DOCUMENT.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_table_of_costs_is_what_the_formulas_give():
    rows = rows_of("| model | step |")
    assert len(rows) == 9
    for model, step, total, gpu_hours, gpus, hours in rows:
        share = GENERATION_SHARE if "critique" in step else TRAINING_SHARE
        computed = operations(step, PARAMETERS[model])
        needed = gpus_needed(PARAMETERS[model])
        assert total == f"{computed:.1e}"
        assert gpu_hours == f"{computed / (PEAK * share) / 3600:.1f}"
        assert int(gpus) == needed
        assert hours == f"{computed / (PEAK * share) / 3600 / needed:.2f}"


def test_the_table_of_memory_is_what_the_formulas_give():
    rows = rows_of("| model | weights, gradients, Adam |")
    assert [row[0] for row in rows] == list(PARAMETERS)
    for model, *cells in rows:
        size = PARAMETERS[model]
        count = gpus_needed(size)
        whole, eighth, gpus, part, weights, checkpoint = cells
        assert whole == f"{16 * size / 1e9:.0f} GB"
        assert eighth == f"{16 * size / 8 / 1e9:.0f} GB"
        assert int(gpus) == count
        assert part == f"{16 * size / count / 1e9:.0f} GB"
        assert weights == f"{2 * size / 1e9:.0f} GB"
        # Weights and two Adam states in float32; gradients are not kept.
        assert checkpoint == f"{12 * size / 1e9:.0f} GB"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (r"989e12 operations", PEAK),
        (r"training uses (\d+) %", TRAINING_SHARE * 100),
        (r"generation (\d+) %", GENERATION_SHARE * 100),
        (r"([\d,]+) for a row of sft", 1_000),
        (r"([\d,]+) for a prompt of self-critique", 2_600),
        (r"at most (\d+) GB on each", ROOM / 1e9),
    ],
)
def test_the_text_states_the_assumptions_that_the_table_uses(written, value):
    found = re.search(written, " ".join(DOCUMENT.split()))
    assert found is not None
    if found.groups():
        assert float(found[1].replace(",", "")) == pytest.approx(value)

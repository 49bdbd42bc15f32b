"""Our statistics against published figures, where the verification data lies beside the checkout."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from test_stats import krippendorff_alpha

from srt_cli.stats.agreement import agreement
from srt_cli.stats.echo import distance_skewness
from srt_cli.stats.length_control import difficulties_of, length_controlled_win_rate
from srt_cli.stats.rates import (
    discrete_win_rate,
    holm,
    paired_difference,
    position_bias_apart,
    win_rate,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
ALPACA = DATA / "alpacaeval2"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the verification data")

MODELS = sorted(path.stem for path in (ALPACA / "annotations").glob("*.csv"))
# By field/eval.md 1.6: the sandwich error of the published fit, checked there by bootstrap.
BOOTSTRAP_TOLERANCE = {"gpt4_gamed": 0.25}


def rows_of(path):
    with open(path) as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def golden():
    return json.loads((DATA / "golden_values.json").read_text())


@pytest.fixture(scope="module")
def published():
    manifest = json.loads((ALPACA / "manifest.json").read_text())
    return {name: model["published"] for name, model in manifest.items()}


@pytest.fixture(scope="module")
def difficulties():
    text = [row["instruction"] for row in rows_of(ALPACA / "instruction_text.csv")]
    found = difficulties_of(text)
    assert found is not None
    return found


def annotations(model):
    """Preferences for the model (0 to 1), lengths of model and reference, item numbers."""
    rows = rows_of(ALPACA / "annotations" / f"{model}.csv")
    rows = [row for row in rows if row["preference"] not in ("", "nan", "NaN")]
    raw = [float(row["preference"]) for row in rows]
    return (
        [0.5 if value == 0 else value - 1 for value in raw],
        [int(float(row["len_2"])) for row in rows],
        [int(float(row["len_1"])) for row in rows],
        [int(row["index"]) for row in rows],
    )


@pytest.mark.parametrize("model", MODELS)
def test_raw_figures_are_the_published_ones(model, published):
    preferences, *_ = annotations(model)
    expected = published[model]
    found = win_rate(preferences)
    assert 100 * found.value == pytest.approx(expected["win_rate"], abs=1e-8)
    assert 100 * found.standard_error == pytest.approx(expected["standard_error"], abs=1e-8)
    assert sum(y > 0.5 for y in preferences) == expected["n_wins"]
    assert sum(y == 0.5 for y in preferences) == expected["n_draws"]
    discrete = 100 * discrete_win_rate(preferences).value
    assert discrete == pytest.approx(expected["discrete_win_rate"], abs=1e-8)


@pytest.mark.parametrize("model", MODELS)
def test_length_controlled_rates_are_near_the_published_ones(model, published, difficulties):
    preferences, lengths, reference, places = annotations(model)
    found = length_controlled_win_rate(
        preferences, lengths, reference, [difficulties[place] for place in places]
    )
    assert found.mode == "alpaca_eval"
    expected = published[model]["length_controlled_winrate"]
    assert 100 * found.rate.value == pytest.approx(expected, abs=0.11)


def test_the_sandwich_error_is_the_bootstrap_error(golden, difficulties):
    key = next(name for name in golden if name.startswith("lc_bootstrap"))
    for model, expected in golden[key].items():
        preferences, lengths, reference, places = annotations(model)
        found = length_controlled_win_rate(
            preferences, lengths, reference, [difficulties[place] for place in places]
        )
        tolerance = BOOTSTRAP_TOLERANCE.get(model, 0.1)
        assert 100 * found.rate.standard_error == pytest.approx(expected, abs=tolerance), model


def test_roles_swapped_give_100_minus():
    preferences, *_ = annotations("claude-2")
    mirrored = [1 - y for y in preferences]
    for rate in (win_rate, discrete_win_rate):
        assert rate(mirrored).value == pytest.approx(1 - rate(preferences).value)


def test_kappa_and_alpha_on_pandalm(golden):
    rows = rows_of(DATA / "pandalm" / "labels.csv")
    people = [[row[f"annotator{n}"] for row in rows] for n in (1, 2, 3)]
    as_preferences = [[{"0": 0.5, "1": 1.0, "2": 0.0}[label] for label in each] for each in people]
    for pair, expected in golden["pandalm"]["cohen_kappa"].items():
        left, right = (as_preferences[int(n) - 1] for n in pair.split("-"))
        assert agreement(left, right).kappa.value == pytest.approx(expected, abs=1e-6)
    found = agreement(as_preferences[0], as_preferences[1])
    assert found.accuracy.value == pytest.approx(
        golden["pandalm"]["raw_agreement"]["1-2"], abs=1e-6
    )
    assert found.kappa.low < found.kappa.value < found.kappa.high < found.kappa.low + 0.1
    assert found.alpha.low < found.alpha.value < found.alpha.high < found.alpha.low + 0.1
    expected = golden["pandalm"]["krippendorff_alpha_nominal"]
    assert krippendorff_alpha(people) == pytest.approx(expected, abs=1e-6)


def test_paired_differences(golden):
    for expected in golden["alpacaeval2_paired"]:
        a, _, _, places_a = annotations(expected["a"])
        b, _, _, places_b = annotations(expected["b"])
        by_a, by_b = dict(zip(places_a, a, strict=True)), dict(zip(places_b, b, strict=True))
        both = sorted(by_a.keys() & by_b.keys())
        found = paired_difference([by_a[i] for i in both], [by_b[i] for i in both])
        assert 100 * found.difference.value == pytest.approx(expected["diff_pp"], abs=1e-5)
        assert 100 * found.difference.standard_error == pytest.approx(
            expected["paired_se_pp"], abs=1e-5
        )
        assert (found.only_a, found.only_b) == (expected["mcnemar_n10"], expected["mcnemar_n01"])
        assert found.p_value == pytest.approx(expected["mcnemar_exact_p"], abs=1e-6)


def test_distance_skewness_of_toys():
    assert distance_skewness([1, 2, 3]) == pytest.approx(0.7778, abs=1e-4)
    assert distance_skewness([-1, 0, 1]) == 0
    assert distance_skewness([2, 2]) == 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert np.max(holm([0.9, 0.8])) == 1


def test_the_gap_between_the_slots_of_alpaca_evals_judge(golden):
    for model, expected in golden["alpacaeval2_position_bias"].items():
        rows = rows_of(ALPACA / "annotations" / f"{model}.csv")
        shown = {"1": [], "0": []}
        for row in rows:
            if row["preference"] not in ("", "nan", "NaN") and row["model_shown_first"]:
                value = float(row["preference"])
                place = str(int(float(row["model_shown_first"])))
                shown[place].append(value - 1 if value else 0.5)
        found = position_bias_apart(shown["1"], shown["0"])
        assert (found.shown_first.n, found.shown_second.n) == (
            expected["n_first"], expected["n_second"],
        )  # fmt: skip
        assert 100 * found.gap.value == pytest.approx(expected["gap_second_minus_first"], abs=1e-3)
        assert 100 * found.gap.standard_error == pytest.approx(expected["gap_se"], abs=1e-3)

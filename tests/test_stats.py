"""Statistics against published figures and against their own definitions."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from srt_cli.stats.agreement import agreement, score_agreement
from srt_cli.stats.counting import Moments, confusion
from srt_cli.stats.hygiene import LEAKED, degenerate_outputs, faults_of, is_same_text
from srt_cli.stats.length_control import difficulties_of, length_controlled_win_rate
from srt_cli.stats.rates import (
    clustered_error,
    difference_to_half,
    discrete_win_rate,
    mean_with_error,
    paired_difference,
    pass_rate,
    position_bias,
    ratio_of_means,
    strict_win_rate,
    win_rate,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
LLMBAR_SUBSETS = ("Natural", "Neighbor", "GPTInst", "GPTOut", "Manual")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the verification data is not here")


def test_wilson_at_the_edges_and_in_the_middle():
    # Agresti and Coull's worked figures: 0 of 10, 5 of 10, 10 of 10 at 95 %.
    for hits, low, high in ((0, 0.0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1.0)):
        found = pass_rate([True] * hits + [False] * (10 - hits))
        assert found.value == hits / 10
        assert found.low == pytest.approx(low, abs=1e-4)
        assert found.high == pytest.approx(high, abs=1e-4)


def test_mean_standard_error_and_t_interval():
    found = mean_with_error([1.0, 2.0, 3.0, 4.0])
    assert found.value == 2.5
    assert found.standard_error == pytest.approx(math.sqrt(5 / 3) / 2)
    assert found.high - found.value == pytest.approx(3.182446 * found.standard_error, rel=1e-6)


def test_a_paired_difference_and_mcnemar():
    a = [1, 1, 1, 1, 1, 1, 0, 0]
    b = [0, 0, 0, 0, 0, 1, 1, 0]
    found = paired_difference(a, b)
    assert found.difference.value == 0.5
    assert (found.only_a, found.only_b) == (5, 1)
    # Exact: 2 * P(X >= 5), X ~ Binomial(6, 1/2) = 14/64.
    assert found.p_value == pytest.approx(14 / 64)


def test_without_items_there_is_no_figure():
    assert pass_rate([]) is None
    assert win_rate([]) is None
    assert discrete_win_rate([]) is None
    assert position_bias([], []) is None
    assert paired_difference([1.0], [0.0]) is None


@needs_data
@pytest.mark.parametrize("judge", ["ChatGPT", "GPT-4", "PaLM2"])
def test_position_figures_of_llmbar_are_reproduced(judge):
    golden = json.loads((DATA / "golden_values.json").read_text())
    expected = golden["llmbar_419_items_prompt_Vanilla_NoRules"][judge]
    first, second = [], []
    with open(DATA / "llmbar" / "judgments.csv") as lines:
        for row in csv.DictReader(lines):
            mine = row["judge"] == judge and row["prompt"] == "Vanilla_NoRules"
            if not mine or row["subset"] not in LLMBAR_SUBSETS:
                continue
            verdicts = row["winner_order1"], row["winner_order2_unswapped"]
            if all(verdict in ("1", "2") for verdict in verdicts):
                first.append(float(verdicts[0] == "1"))
                second.append(float(verdicts[1] == "1"))
    found = position_bias(first, second)
    assert found.n == expected["n"] - expected["n_missing"]
    # The published share counts an item with a missing verdict as inconsistent; ours leaves it out.
    published = expected["position_consistency"] * expected["n"] / found.n
    assert found.consistency.value == pytest.approx(published, abs=1e-6)
    # So with the first slot: the published rate also counts calls whose partner is missing.
    tolerance = 1e-6 if expected["n_missing"] == 0 else 2e-4
    assert found.first_slot_rate.value == pytest.approx(expected["first_slot_rate"], abs=tolerance)


@needs_data
def test_raw_win_rates_of_alpaca_eval_are_reproduced():
    manifest = json.loads((DATA / "alpacaeval2" / "manifest.json").read_text())
    checked = 0
    for path in sorted((DATA / "alpacaeval2" / "annotations").glob("*.csv")):
        with open(path) as lines:
            values = [row["preference"] for row in csv.DictReader(lines)]
        numbers = [float(v) for v in values if v and v.lower() != "nan"]
        preferences = [0.5 if number == 0 else number - 1 for number in numbers]
        found = win_rate(preferences)
        published = _published(manifest, path.stem)
        if published is None:
            continue
        checked += 1
        assert 100 * found.value == pytest.approx(published["win_rate"], abs=1e-8)
        assert 100 * found.standard_error == pytest.approx(published["standard_error"], abs=1e-8)
    assert checked >= 15


def _published(manifest, model):
    entries = manifest.get("models", manifest)
    entry = entries.get(model) if isinstance(entries, dict) else None
    if entry is None and isinstance(entries, list):
        entry = next((each for each in entries if each.get("model") == model), None)
    if entry is None:
        return None
    for candidate in (entry, *[v for v in entry.values() if isinstance(v, dict)]):
        if "win_rate" in candidate and "standard_error" in candidate:
            return candidate
    return None


def test_a_constant_output_is_degenerate_and_varied_ones_are_not():
    prompts = [f"question {n}" for n in range(30)]
    constant = degenerate_outputs(prompts, ["Pick me."] * 30)
    assert (constant.share, constant.red_flag) == (1.0, True)
    varied = degenerate_outputs(prompts, [f"Answer number {n} is here." for n in range(30)])
    assert (varied.share, varied.red_flag) == (0.0, False)


@pytest.mark.parametrize(
    ("prompt", "output", "reason"),
    [
        ("p", "   ", "empty"),
        ("p", "on and on and on and on and on and on and on", "repeating"),
        ("Write one line about the old sea.", "write one line about the old sea",
         "copy of the prompt"),
    ],
)  # fmt: skip
def test_other_degenerate_outputs_are_named(prompt, output, reason):
    assert degenerate_outputs([prompt], [output]).reasons == {reason: 1}


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_a_confusion_table_adds_up(pairs):
    table = confusion([says for says, _ in pairs], [truth for _, truth in pairs])
    assert table.n == len(pairs)
    if pairs:
        assert table.accuracy == sum(a == b for a, b in pairs) / len(pairs)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=30))
def test_a_correlation_in_running_sums_is_pearsons(pairs):
    moments = Moments()
    for x, y in pairs:
        moments.add(x / 3, y)
    if len({x for x, _ in pairs}) == 1 or len({y for _, y in pairs}) == 1:
        assert moments.correlation is None
    else:
        assert moments.correlation == pytest.approx(np.corrcoef(np.array(pairs).T)[0, 1])


def test_a_constant_critic_is_seen():
    assert confusion([True] * 9, [True, False, True] * 3).constant
    assert not confusion([True, False], [True, False]).constant


unit = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


@given(st.lists(st.tuples(unit, unit), min_size=2, max_size=40))
def test_swapping_the_two_sides_turns_every_figure_round(pairs):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.difference.value == pytest.approx(-back.difference.value)
    assert there.p_value == pytest.approx(back.p_value)
    assert win_rate(a).value == pytest.approx(1 - win_rate([1 - x for x in a]).value)


def test_clusters_of_one_have_the_ordinary_error_and_copies_add_nothing():
    values = [0.0, 0.5, 1.0, 1.0, 0.25]
    plain = mean_with_error(values).standard_error
    assert clustered_error(values, list("abcde")) == pytest.approx(plain)
    assert clustered_error(values * 2, list("abcde") * 2) == pytest.approx(plain)
    assert clustered_error(values, list("aaaaa")) is None


def test_a_strict_win_needs_both_orders():
    found = strict_win_rate([1.0, 1.0, 0.2, 0.9], [0.9, 0.0, 0.1, 0.5])
    assert found.value == pytest.approx((1 + 0 + 2 / 2) / 4)
    assert found.n == 4


def test_wilson_with_half_successes_is_scipys_for_whole_ones():
    ours = discrete_win_rate([1.0] * 7 + [0.0] * 13)
    theirs = pass_rate([True] * 7 + [False] * 13)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_length_control_takes_away_what_length_alone_wins():
    random = np.random.default_rng(7)
    model = random.integers(50, 2000, 400)
    reference = random.integers(50, 2000, 400)
    by_length = (model > reference).astype(float).tolist()
    found = length_controlled_win_rate(by_length, model.tolist(), reference.tolist())
    assert found.mode == "generic"
    assert found.phi < -1
    assert abs(found.rate.value - 0.5) < 0.06
    longer = length_controlled_win_rate(by_length, (model + 700).tolist(), reference.tolist())
    assert longer.rate.standard_error > 0


@pytest.mark.parametrize(
    ("preferences", "low", "high"),
    [([0.0] * 6, 0, 0.3903), ([1.0] * 40, 0.9124, 1), ([0.5] * 40, 0.5, 0.5)],
)
def test_items_that_are_all_judged_alike_have_the_same_rate_at_equal_length(preferences, low, high):
    n = len(preferences)
    for lengths in (list(range(100, 100 + n)), [100] * n):
        rate = length_controlled_win_rate(preferences, lengths, lengths[::-1]).rate
        assert (rate.low, rate.high) == pytest.approx((low, high), abs=1e-4)
        assert (rate.standard_error, rate.n) == (0, n)
        assert rate.low <= rate.value <= rate.high


def test_equal_lengths_are_a_labelled_raw_rate():
    found = length_controlled_win_rate([1.0, 0.0, 1.0, 1.0], [10] * 4, [10] * 4)
    assert found.rate.value == 0.75
    assert "nothing is controlled" in found.warnings[0].text
    assert length_controlled_win_rate([1.0], [3], [4]) is None


def test_other_prompts_have_no_difficulty():
    assert difficulties_of(["What is it?"] * 805) is None


def test_agreement_counts_ties_apart_and_kappa_knows_chance():
    found = agreement([1.0, 0.0, 0.5, 1.0], [1.0, 0.0, 1.0, 0.5])
    assert found.accuracy.value == 0.5
    assert found.without_ties.value == 1.0
    assert found.without_ties.n == 2
    assert found.kappa.low <= found.kappa.value <= found.kappa.high
    # By hand: 4 wins, 2 losses and 2 ties in 8 words; 4 coincidences disagree.
    assert found.alpha.value == pytest.approx(1 - 7 * 4 / (64 - (16 + 4 + 4)))
    assert agreement([1.0, 0.0], [1.0, 0.0]).kappa.value == 1
    assert agreement([1.0, 1.0], [1.0, 1.0]).kappa is None


def test_leaks_and_refusals_are_no_answers():
    texts = [
        "A fine answer about pears.",
        "Weaknesses: none.\nOverall Score: [[9]]",
        "I'm sorry, but I cannot help with that.",
        "I can't wait to tell you about pears, which are sweet.",
    ]
    found = degenerate_outputs(["q"] * 4, texts)
    assert found.reasons == {"template leakage": 1, "refusal": 1}
    assert found.share == 0.5


def krippendorff_alpha(ratings, level="nominal"):
    """Krippendorff's alpha by its definition, for any number of raters: what ours is held against."""
    items = [[value for value in item if value is not None] for item in zip(*ratings, strict=True)]
    items = [item for item in items if len(item) > 1]
    pooled = [value for item in items for value in item]
    n = len(pooled)
    if level == "nominal":
        codes = {value: place for place, value in enumerate(dict.fromkeys(pooled))}
        features = np.eye(len(codes))[[codes[value] for value in pooled]]  # (n, categories)
    else:
        numbers = np.array(pooled, dtype=np.float64)
        features = (scipy_stats.rankdata(numbers) if level == "ordinal" else numbers)[
            :, None
        ]  # (n, 1)
    if n == 0:
        return None
    spread = float(((features - features.mean(axis=0)) ** 2).sum())
    if spread == 0:
        return None
    within, start = 0.0, 0
    for item in items:
        mine = features[start : start + len(item)]
        start += len(item)
        within += len(item) / (len(item) - 1) * float(((mine - mine.mean(axis=0)) ** 2).sum())
    return 1 - (n - 1) / n * within / spread


def test_krippendorffs_own_example_at_three_levels():
    # Krippendorff, "Computing Krippendorff's alpha-reliability" (2011), section C: .743, .815, .849.
    _ = None
    ratings = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
    for level, expected in (("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)):
        assert krippendorff_alpha(ratings, level) == pytest.approx(expected, abs=5e-4)


scores = st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=3, max_size=40)


@given(scores)
def test_scores_agree_as_the_textbook_formulas_say(pairs):
    a, b = [float(x) for x, _ in pairs], [float(y) for _, y in pairs]
    found = score_agreement(a, b)
    for level in ("ordinal", "interval"):
        alpha = getattr(found, f"alpha_{level}")
        expected = krippendorff_alpha([a, b], level)
        assert (alpha is None) == (expected is None)
        if expected is not None:
            assert alpha.value == pytest.approx(expected)
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert found.spearman.value == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
        assert found.kendall.value == pytest.approx(scipy_stats.kendalltau(a, b).statistic)
        for estimate in (found.spearman, found.kendall, found.weighted_kappa):
            assert -1 <= estimate.low <= estimate.high <= 1 + 1e-9
    else:
        assert found.spearman is None
        assert found.kendall is None
    # The definition: one minus observed over expected squared distances.
    expected = sum((x - y) ** 2 for x in a for y in b) / len(a) ** 2
    observed = sum((x - y) ** 2 for x, y in pairs) / len(a)
    if expected:
        assert found.weighted_kappa.value == pytest.approx(1 - observed / expected)


def test_an_interval_of_agreement_covers_what_it_should():
    # 60 samples of raters whose true Spearman correlation is (6/π)·asin(0.6/2): 95 % cover it.
    truth = 6 / math.pi * math.asin(0.6 / 2)
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(60):
        x, y = random.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 60).T
        found = score_agreement(x.tolist(), y.tolist()).spearman
        covered += found.low <= truth <= found.high
    assert covered >= 52


def test_a_ratio_of_means_has_the_delta_error():
    found = ratio_of_means([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert found.value == 2.5
    # Residuals a - 2.5 b: -0.5, -1, 1.5; sd 1.3229, mean of b 2.
    assert found.standard_error == pytest.approx(1.322876 / (math.sqrt(3) * 2), abs=1e-6)
    assert ratio_of_means([1.0], [0.0]) is None
    assert ratio_of_means([], []) is None


def test_against_the_reference_itself_it_is_a_sign_test():
    found = difference_to_half([1.0, 1.0, 0.75, 0.5, 0.0])
    assert found.difference.value == pytest.approx(0.15)
    plain = mean_with_error([0.5, 0.5, 0.25, 0.0, -0.5], (-1, 1))
    assert found.difference.standard_error == pytest.approx(plain.standard_error)
    assert (found.only_a, found.only_b) == (3, 1)
    assert found.p_value == pytest.approx(10 / 16)


def test_of_one_item_nothing_is_known():
    assert (mean_with_error([7.0], (1, 10)).low, mean_with_error([7.0], (1, 10)).high) == (1, 10)


@needs_data
@pytest.mark.parametrize("judge", ["ChatGPT", "GPT-4", "PaLM2"])
def test_llmbars_published_figures_come_out_when_counted_its_way(judge):
    """LLMBar calls an item inconsistent when a verdict is missing; ours leaves it out (see above)."""
    golden = json.loads((DATA / "golden_values.json").read_text())
    expected = golden["llmbar_419_items_prompt_Vanilla_NoRules"][judge]
    pairs, calls = [], []
    with open(DATA / "llmbar" / "judgments.csv") as lines:
        for row in csv.DictReader(lines):
            mine = row["judge"] == judge and row["prompt"] == "Vanilla_NoRules"
            if mine and row["subset"] in LLMBAR_SUBSETS:
                pairs.append((row["winner_order1"], row["winner_order2_unswapped"]))
                calls += [pairs[-1][0] == "1"] if pairs[-1][0] in ("1", "2") else []
                calls += [pairs[-1][1] == "2"] if pairs[-1][1] in ("1", "2") else []
    same = [a == b and a in ("1", "2") for a, b in pairs]
    assert len(same) == expected["n"]
    assert pass_rate(same).value == pytest.approx(expected["position_consistency"], abs=1e-6)
    assert pass_rate(calls).value == pytest.approx(expected["first_slot_rate"], abs=1e-6)


@pytest.mark.parametrize("mark", LEAKED)
def test_every_mark_of_a_leak_is_found_however_it_is_spaced(mark):
    text = f"An answer.\n\n{mark.upper().replace(' ', chr(10) + '  ')} and more"
    assert faults_of(text) == ["template leakage"]


@pytest.mark.parametrize(
    "text",
    [
        "I’m sorry, but I can’t help with that.",
        "I apologize, but I cannot assist with that.",
        "Sorry, but I can't do that.",
        "I'm sorry for the trouble. I can`t provide this.",
        "Unfortunately, I can't help you with this request.",
        "I'm afraid I cannot answer that.",
        "I must decline to answer.",
        "I won't provide instructions for that.",
        "My apologies, but I'm not able to comply with this.",
        "As an AI language model, I cannot provide opinions.",
        "As a large language model, I'm not able to share that.",
        "I regret that I am unable to help.",
    ],
)
def test_refusals_are_known_by_their_usual_openings(text):
    assert faults_of(text) == ["refusal"]


@pytest.mark.parametrize(
    "text",
    [
        "I can't wait to share these pears with you.",
        "Unfortunately, I can't attend the meeting, but Ann will help.",
        "I'm sorry for your loss. Grief can't be hurried.",
        "Sorry is a game for two to four players.",
        "As an aid to memory, write it down.",
        "Unfortunately, the shop cannot provide refunds.",
        "<s>$9</s>",
        "Write <s>old</s>",
        "x <| y |> z, a <b> c [1]",
    ],
)
def test_what_only_looks_like_a_refusal_or_a_leak_is_an_answer(text):
    assert faults_of(text) == []


@pytest.mark.parametrize(
    ("text", "prompt", "faults"),
    [
        ("Weaknesses: It has a comma.", "Write about cats.", ["template leakage"]),
        ("Cats sleep.\n**Suggestions:** Keep it.", "Write about cats.", ["template leakage"]),
        ("(No, but should: commas.)", "Write about cats.", ["template leakage"]),
        ("Strengths: small.\nWeaknesses: old.", "Do a SWOT analysis of cats.", []),
        ("The weaknesses of steel: rust.", "Write about steel.", []),
        ("yes yes yes yes yes yes yes yes", "Say yes.", ["repeating"]),
        ("yes yes yes yes yes yes yes yes", "Repeat the word yes.", []),
        ("I'm sorry, but I can't help you.", "How do I politely decline?", []),
        ("It begins with <|im_start|>.", "What does <|im_end|> mean?", []),
    ],
)
def test_a_critics_words_are_no_answer_and_what_was_asked_for_is_no_fault(text, prompt, faults):
    assert faults_of(text, prompt) == faults
    assert list(degenerate_outputs([prompt], [text]).reasons) == faults


@pytest.mark.parametrize(
    "token",
    ["</s>", "<|endoftext|>", "<|end_of_text|>", "<|user|>", "<｜end▁of▁sentence｜>", "<eos>"],
)
def test_an_end_token_of_any_family_left_in_an_answer_is_a_leak(token):
    assert faults_of(f"An apple.{token}\n") == ["template leakage"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Caf\u00e9 au lait.", "Cafe\u0301 au lait.", True),
        ("One\r\nTwo", "One\nTwo", True),
        ("A  carrot. ", "A carrot.", True),
        ("word " * 50 + "a", "word " * 50 + "b", False),
        ("word  " * 50 + "a", "word " * 50 + "a", True),
        ("One", "one", False),
        ("x\u00b2", "x2", False),
    ],
)
def test_texts_are_equal_but_for_their_form(one, other, same):
    assert is_same_text(one, other) is same


def test_a_refusal_is_seen_behind_any_space():
    assert faults_of("\n" * 300 + "I  cannot   help with that.") == ["refusal"]
    assert faults_of("I cannot praise it enough.") == []


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (1, 0), (3, 9), (7, 7), (40, 60), (0, 12)])
def test_mcnemars_p_value_is_that_of_scipys_binomial_test(ours, theirs):
    a = [1.0] * ours + [0.0] * theirs + [0.5, 0.5]
    b = [0.0] * ours + [1.0] * theirs + [0.5, 0.5]
    wanted = scipy_stats.binomtest(ours, ours + theirs).pvalue if ours + theirs else 1.0
    assert paired_difference(a, b).p_value == pytest.approx(wanted, rel=1e-12)


def test_figures_need_no_scipy_stats():
    """It takes longer to import than all else that `srt eval --annotations` needs."""
    imported = "import sys, srt_cli.stages.evaluate.saved; print('scipy.stats' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", imported], capture_output=True, text=True, check=True
    )
    assert found.stdout == "False\n"

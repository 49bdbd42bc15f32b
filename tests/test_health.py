"""The rules on a training's metrics, each on a literal series that breaks it and one that does not."""

import math

import pytest

from srt_cli.training import health


def steps(**series):
    """Rows of metrics: one list a metric, steps counted from 1."""
    length = len(next(iter(series.values())))
    return [
        {"step": n + 1, **{name.replace("__", "/"): values[n] for name, values in series.items()}}
        for n in range(length)
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_or_gradient_that_is_no_number_aborts(bad):
    assert "the loss of step 2" in health.diverged(steps(loss=[1.0, bad]))
    assert "the gradient norm of step 1" in health.diverged(steps(loss=[1.0], grad_norm=[bad]))
    assert health.diverged(steps(loss=[bad, 1.0], grad_norm=[1.0, 2.0])) is None


def test_a_step_that_trains_no_token_aborts():
    assert "step 2 trained no token" in health.nothing_trained(
        steps(loss=[1.0, 0.0], trained_tokens=[12, 0])
    )
    assert health.nothing_trained(steps(loss=[1.0], trained_tokens=[1])) is None


def first_step(loss=0.6931, chosen=0.0, rejected=0.0):
    return steps(
        loss=[loss], rewards__chosen=[chosen], rewards__rejected=[rejected],
        logps__chosen=[-50.0], logps__rejected=[-40.0],
    )  # fmt: skip


def test_dpo_must_begin_where_policy_and_reference_agree():
    rule = health.wrong_start(health.DpoStart(beta=0.1, loss=math.log(2), tolerance=1e-4))
    assert rule(first_step()) is None
    assert "loss is 0.6790, not 0.6931" in rule(first_step(loss=0.679))
    assert "chosen rewards are 0.002, not 0" in rule(first_step(chosen=0.002))
    assert "rejected rewards are -0.001, not 0" in rule(first_step(rejected=-0.001))
    assert rule(first_step(chosen=0.0004)) is None  # 0.1 * 1e-4 * 50 is 0.0005
    assert rule([first_step()[0], {"step": 2, "loss": 0.1, "rewards/chosen": 3.0}]) is None


def test_every_loss_of_dpo_must_begin_with_rewards_of_0():
    rule = health.wrong_start(health.DpoStart(beta=0.1, loss=None, tolerance=1e-4))
    assert rule(first_step(loss=3.0)) is None
    assert "rewards are 0.002" in rule(first_step(loss=3.0, chosen=0.002))


def test_rounding_of_bfloat16_is_no_wrong_reference():
    start = health.DpoStart(beta=0.1, loss=math.log(2), tolerance=1e-2)
    assert health.wrong_start(start)(first_step(loss=0.70, chosen=0.03, rejected=-0.03)) is None


def test_a_loss_that_climbs_and_stays_is_told_from_one_that_spikes():
    falling = [3.0 - 0.1 * n for n in range(20)]
    assert health.exploding_loss(steps(loss=falling)) is None
    assert health.exploding_loss(steps(loss=[*falling, 9.0, 1.0, 1.0])) is None
    message = health.exploding_loss(steps(loss=[*falling, *[5.0] * 8]))
    assert "the loss has risen from 1.45 to 5.000" in message.replace("1.450", "1.45")
    assert health.exploding_loss(steps(loss=[1.0, 9.0])) is None


def test_a_gradient_that_explodes():
    assert "of step 13 is 50, where 1 is usual" in health.exploding_gradient(
        steps(grad_norm=[1.0] * 12 + [50.0])
    )
    assert health.exploding_gradient(steps(grad_norm=[1.0] * 12 + [15.0])) is None
    assert health.exploding_gradient(steps(grad_norm=[1.0] * 3 + [50.0])) is None


def test_margins_that_grow_while_the_chosen_answers_become_unlikely():
    margins = [0.01 * n for n in range(40)]
    falling = [-50.0 - n for n in range(40)]
    found = health.chosen_falls(steps(logps__chosen=falling, rewards__margins=margins))
    assert "from -53.5 to -85.5" in found
    assert "--nll-weight" in found
    steady = [-50.0 - 0.1 * n for n in range(40)]
    assert health.chosen_falls(steps(logps__chosen=steady, rewards__margins=margins)) is None
    flat = [0.0] * 40
    assert health.chosen_falls(steps(logps__chosen=falling, rewards__margins=flat)) is None


def test_accuracies_at_chance_or_at_their_end():
    chance = [0.5, 0.4, 0.6, 0.5] * 10
    assert "prefers the chosen answer 50% of the time" in health.accuracy_at_chance(
        steps(rewards__accuracies=chance)
    )
    assert health.accuracy_at_chance(steps(rewards__accuracies=[0.7] * 40)) is None
    assert health.accuracy_at_chance(steps(rewards__accuracies=chance[:20])) is None
    sure = [0.8] * 20 + [1.0] * 15
    assert "for 15 steps every chosen answer" in health.accuracy_saturated(
        steps(rewards__accuracies=sure)
    )
    assert health.accuracy_saturated(steps(rewards__accuracies=[*sure[:-1], 0.9])) is None


def samples(*of_each_step):
    return [
        {"step": step, "tokens": tokens, "stopped": stopped}
        for step, lengths, stopped in of_each_step
        for tokens in lengths
    ]


def test_samples_that_grow_shrink_or_no_longer_end():
    start = (0, [20, 20, 20, 20], True)
    grown = health.length_drift(samples(start, (9, [40, 40, 30, 30], True)))
    assert "have grown from 20 to 35 tokens" in grown
    shrunk = health.length_drift(samples(start, (9, [10, 10, 10, 10], True)))
    assert "have shrunk from 20 to 10 tokens" in shrunk
    endless = health.length_drift(samples(start, (9, [20, 20, 20, 20], False)))
    assert "0% end by themselves, where 100% did" in endless
    assert health.length_drift(samples(start, (9, [25, 25, 25, 25], True))) is None
    one_loop = samples(start, (9, [20, 20, 20, 500], True))
    assert health.length_drift(one_loop) is None  # a mean would say that all have grown
    assert health.length_drift(samples(start)) is None
    assert health.length_drift([]) is None
    assert health.length_drift(samples((0, [20], True), (9, [90], True))) is None


def test_the_whole_run_is_read_ever_more_seldom():
    looked = [step for step in range(1, 10_001) if health.looked_at_now(step)]
    assert looked[:99] == list(range(1, 100))
    assert len(looked) < 500

"""Every loss of `srt dpo` against its formula, written out in float64 beside TRL."""

import json
import math

import pytest
import torch
from conftest import read_jsonl, write_jsonl
from test_dpo import pair_rows
from torch.nn.functional import logsigmoid

from srt_cli.training.dpo import Objective

BETA, RATE = 0.5, 0.02
LN_2 = math.log(2)


def mean(values):
    return values.mean()


def sorted_margin(chosen, rejected, reference):
    return (chosen - rejected).sort().values - (reference[0] - reference[1]).sort().values


# c, r: log-ratios of chosen and rejected (n,); m, n: their lengths in tokens; each loss's own paper.
FORMULAS = {
    "sigmoid": lambda c, r, m, n: -logsigmoid(BETA * (c - r)),
    "sigmoid_norm": lambda c, r, m, n: -logsigmoid(BETA * (c / m - r / n)),
    "hinge": lambda c, r, m, n: torch.relu(1 - BETA * (c - r)),
    "ipo": lambda c, r, m, n: (c / m - r / n - 1 / (2 * BETA)) ** 2,
    "robust": lambda c, r, m, n: (
        (-0.8 * logsigmoid(BETA * (c - r)) + 0.2 * logsigmoid(BETA * (r - c))) / 0.6
    ),
    "exo_pair": lambda c, r, m, n: (
        torch.sigmoid(BETA * (c - r)) * (logsigmoid(BETA * (c - r)) - math.log(0.8))
        + torch.sigmoid(BETA * (r - c)) * (logsigmoid(BETA * (r - c)) - math.log(0.2))
    ),
    "nca_pair": lambda c, r, m, n: (
        -logsigmoid(BETA * c) - 0.5 * logsigmoid(-BETA * c) - 0.5 * logsigmoid(-BETA * r)
    ),
    "bco_pair": lambda c, r, m, n: -logsigmoid(BETA * c) - logsigmoid(-BETA * r),
    "sppo_hard": lambda c, r, m, n: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    "aot_unpaired": lambda c, r, m, n: (
        -0.8 * logsigmoid(BETA * (c.sort().values - r.sort().values))
        - 0.2 * logsigmoid(-BETA * (c.sort().values - r.sort().values))
    ),
    "apo_zero": lambda c, r, m, n: 1 - torch.sigmoid(BETA * c) + torch.sigmoid(BETA * r),
    "apo_down": lambda c, r, m, n: torch.sigmoid(BETA * c) + 1 - torch.sigmoid(BETA * (c - r)),
    "discopop": lambda c, r, m, n: (
        -logsigmoid(BETA * (c - r)) * (1 - torch.sigmoid(BETA * (c - r) / 0.05))
        + torch.exp(-BETA * (c - r)) * torch.sigmoid(BETA * (c - r) / 0.05)
    ),
}
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


class Independent:
    """The same two steps by transformers and autograd alone, in float64."""

    def __init__(self, directory, rows):
        from transformers import AutoModelForCausalLM

        from srt_cli.models.weights import load_tokenizer

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        tokenizer = load_tokenizer(str(directory))
        self.answers = []
        for kind in ("chosen", "rejected"):
            for row in rows:
                prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
                whole = tokenizer.apply_chat_template([*row["prompt"], *row[kind]])
                # Behind the end of the turn the template writes a line break, which nobody trains.
                ids = whole["input_ids"][:-1]
                self.answers.append((ids, len(prompt["input_ids"])))

    def logps(self):
        """One row of token log-probabilities an answer, chosen first."""
        found = []
        for ids, start in self.answers:
            logits = self.model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            found.append(logits.gather(1, torch.tensor(ids[start:])[:, None])[:, 0])
        return found

    def two_steps(self, loss_of):
        """Losses, the second step's log-ratios, and the weights after both steps of SGD."""
        with torch.no_grad():
            reference = self.logps()
        losses = []
        for _ in range(2):
            now = self.logps()
            loss = loss_of(now, reference)
            losses.append(float(loss))
            self.model.zero_grad()
            loss.backward()
            ratios = [float((a - b).sum()) for a, b in zip(now, reference, strict=True)]
            with torch.no_grad():
                for weight in self.model.parameters():
                    weight -= RATE * weight.grad
        return losses, ratios


def loss_by_formula(loss_type, nll_weight=0.0, ld_alpha=None):
    def loss_of(now, reference):
        half = len(now) // 2
        lengths = torch.tensor([len(each) for each in now], dtype=torch.float64)
        shorter = torch.minimum(lengths[:half], lengths[half:]).repeat(2)

        def summed(logps):
            if ld_alpha is None:
                return torch.stack([each.sum() for each in logps])
            return torch.stack(
                [
                    each[: int(cut)].sum() + ld_alpha * each[int(cut) :].sum()
                    for each, cut in zip(logps, shorter, strict=True)
                ]
            )

        policy, base = summed(now), summed(reference)
        ratio = policy - base
        if loss_type == "aot":
            margin = sorted_margin(policy[:half], policy[half:], (base[:half], base[half:]))
            losses = -0.8 * logsigmoid(BETA * margin) - 0.2 * logsigmoid(-BETA * margin)
        else:
            losses = FORMULAS[loss_type](ratio[:half], ratio[half:], lengths[:half], lengths[half:])
        nll = -torch.cat(now[:half]).mean()
        return losses.mean() + nll_weight * nll

    return loss_of


def run_both(srt, tmp_path, tiny_model, loss_type, *extra, **weights):
    rows = pair_rows(4)
    write_jsonl(tmp_path / "prefs.jsonl", rows)
    smoothing = ("--label-smoothing", 0.2) if loss_type in SMOOTHED else ()
    finished = srt(
        "dpo", "--model", tiny_model, "--loss-type", loss_type, *smoothing, "--beta", BETA,
        "--learning-rate", RATE, "--lr-schedule", "constant_with_warmup", "--warmup", 0,
        "--max-grad-norm", 1e9, "--global-batch", 4, "--micro-batch", 4, "--epochs", 2,
        "--samples", 0, "--set", "optim=sgd", *extra,
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    independent = Independent(tiny_model, rows)
    losses, ratios = independent.two_steps(loss_by_formula(loss_type, **weights))
    return read_jsonl(tmp_path / "models/dpo/metrics.jsonl"), losses, ratios, independent.model


def assert_same_weights(directory, model, start):
    """The way from `start` differs by less than a thousandth of its length."""
    from transformers import AutoModelForCausalLM

    def weights(where):
        loaded = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float64)
        return torch.cat([each.flatten() for each in loaded.parameters()])

    expected = torch.cat([each.detach().flatten() for each in model.parameters()])
    way = (expected - weights(start)).norm()
    assert way > 1e-4
    assert (weights(directory) - expected).norm() < 1e-3 * way


@pytest.mark.parametrize("loss_type", [*FORMULAS, "aot"])
def test_loss_rewards_and_gradient_are_the_formulas(srt, tmp_path, tiny_model, loss_type):
    metrics, losses, ratios, model = run_both(srt, tmp_path, tiny_model, loss_type)
    for row, loss in zip(metrics, losses, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    half = len(ratios) // 2
    chosen, rejected = sum(ratios[:half]) / half, sum(ratios[half:]) / half
    assert abs(chosen - rejected) > 1e-3
    assert metrics[1]["rewards/chosen"] == pytest.approx(BETA * chosen, abs=1e-4)
    assert metrics[1]["rewards/rejected"] == pytest.approx(BETA * rejected, abs=1e-4)
    assert metrics[1]["rewards/margins"] == pytest.approx(BETA * (chosen - rejected), abs=1e-4)
    assert_same_weights(tmp_path / "models/dpo", model, tiny_model)


@pytest.mark.parametrize(
    ("extra", "weights"),
    [
        (("--nll-weight", 0.7), {"nll_weight": 0.7}),
        (("--ld-alpha", 0.5), {"ld_alpha": 0.5}),
        (("--ld-alpha", 0.0), {"ld_alpha": 0.0}),
    ],
)
def test_weights_are_in_loss_and_gradient(srt, tmp_path, tiny_model, extra, weights):
    metrics, losses, _, model = run_both(srt, tmp_path, tiny_model, "sigmoid", *extra, **weights)
    for row, loss in zip(metrics, losses, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert_same_weights(tmp_path / "models/dpo", model, tiny_model)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("sigmoid", 0.693147), ("sigmoid_norm", 0.693147), ("robust", 0.693147),
        ("aot", 0.693147), ("aot_unpaired", 0.693147), ("hinge", 1.0), ("apo_zero", 1.0),
        ("apo_down", 1.0), ("ipo", 1.0), ("exo_pair", 0.223144), ("nca_pair", 1.386294),
        ("bco_pair", 1.386294), ("sppo_hard", 2.0), ("discopop", 0.846574),
    ],
)  # fmt: skip
def test_the_loss_where_policy_and_reference_agree(loss_type, expected):
    found = Objective(loss_type, BETA, 0.2).first_loss()
    assert found == pytest.approx(expected, abs=1e-6)


def test_with_a_likelihood_the_first_loss_is_not_known_beforehand():
    assert Objective("sigmoid", 0.1, nll_weight=0.5).first_loss() is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ("--label-smoothing", 0.1),
            "does nothing under --loss-type sigmoid. Pass --loss-type robust",
        ),
        (("--loss-type", "exo_pair"), "exo_pair needs a --label-smoothing above 0"),
        (("--nll-weight", -1), "--nll-weight -1: must be 0 or more"),
        (("--ld-alpha", 1.5), "--ld-alpha: lies between 0"),
    ],
)
def test_what_would_do_nothing_or_cannot_be_is_refused(srt, tmp_path, tiny_model, extra, message):
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows(4))
    finished = srt("dpo", "--model", tiny_model, *extra)
    assert finished.code == 2
    assert message in finished.stderr
    assert not (tmp_path / "models").exists()


def test_the_manifest_holds_what_was_optimised(srt, tmp_path, tiny_model):
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows(4))
    srt("dpo", "--model", tiny_model, "--recipe", "tulu3", "--nll-weight", 0.1)
    settings = json.loads((tmp_path / "models/dpo/run.json").read_text())["settings"]
    assert (settings["loss_type"], settings["beta"]) == ("sigmoid_norm", 5.0)
    assert settings["nll_weight"] == 0.1

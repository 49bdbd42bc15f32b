"""What can go wrong while a model trains, as rules on the history of its metrics.

A history is the lines of `metrics.jsonl` so far. Each rule looks at it and returns a sentence (what is
wrong, what to do) or None.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Final

History = Sequence[Mapping[str, Any]]
Rule = Callable[[History], str | None]

LOSS_TOLERANCE: Final = 5e-3
WINDOW: Final = 8
EXPLODED: Final = 2.0
"""Times the lowest loss so far."""
REMEMBERED: Final = 64
GRADIENT_EXPLODED: Final = 20.0
CHOSEN_FELL: Final = 0.1
ENOUGH_STEPS: Final = 30
NEAR_HALF: Final = 0.05
LONGER: Final = 1.5
ENOUGH_SAMPLES: Final = 4


@dataclass(frozen=True)
class DpoStart:
    """What the first batch must show when the policy is still the reference."""

    beta: float
    loss: float | None
    """What the loss begins at (ln 2 for the paper's); None where that depends on the answers."""
    tolerance: float
    """How far a log-prob may lie from the reference's, as a share of itself."""


# --- Aborts ------------------------------------------------------------------------------------


def diverged(rows: History) -> str | None:
    """A loss or a gradient that is NaN or infinite."""
    row = rows[-1]
    for name, value in (("loss", row["loss"]), ("gradient norm", row.get("grad_norm", 0.0))):
        if not math.isfinite(value):
            return (
                f"the {name} of step {row['step']} is {value}: training has diverged. "
                "Lower --learning-rate, or look at the data of this step."
            )
    return None


def nothing_trained(rows: History) -> str | None:
    """A step without a single token that carries loss."""
    if rows[-1].get("trained_tokens", 1) > 0:
        return None
    return (
        f"step {rows[-1]['step']} trained no token: every label of its rows is masked. "
        "Look at the masks (--show-masks), and at --set fields that cut or pack rows."
    )


def wrong_start(start: DpoStart) -> Rule:
    """The rule that the first batch's rewards are 0, while the policy still is the reference."""

    def rule(rows: History) -> str | None:
        row = rows[-1]
        if row["step"] != 1:
            return None
        noise = {
            answer: start.beta * start.tolerance * max(1.0, abs(row.get(f"logps/{answer}", 0.0)))
            for answer in ("chosen", "rejected")
        }
        expected = row["loss"] if start.loss is None else start.loss
        allowed = (LOSS_TOLERANCE + sum(noise.values())) * max(1.0, abs(expected))
        if abs(row["loss"] - expected) > allowed:
            return (
                f"the first batch's loss is {row['loss']:.4f}, not {expected:.4f}: the reference is "
                "not the model that training starts from. Start over with --overwrite."
            )
        for answer in noise:
            reward = row.get(f"rewards/{answer}", 0.0)
            if abs(reward) > noise[answer]:
                return (
                    f"the first batch's {answer} rewards are {reward:.4g}, not 0: the reference is "
                    "not the model that training starts from. Start over with --overwrite."
                )
        return None

    return rule


# --- Warnings ----------------------------------------------------------------------------------


def exploding_loss(rows: History) -> str | None:
    """The loss has settled far above what it once was."""
    losses = [row["loss"] for row in rows if "loss" in row]
    if len(losses) < 2 * WINDOW:
        return None
    now = median(losses[-WINDOW:])
    lowest = min(median(losses[at : at + WINDOW]) for at in range(len(losses) - 2 * WINDOW + 1))
    if now <= EXPLODED * abs(lowest) + 0.1:
        return None
    return (
        f"the loss has risen from {lowest:.3f} to {now:.3f}. "
        "Lower --learning-rate, or raise --warmup."
    )


def exploding_gradient(rows: History) -> str | None:
    """A gradient norm far above those before it."""
    norms = [row["grad_norm"] for row in rows[-REMEMBERED:] if "grad_norm" in row]
    if len(norms) < WINDOW + 1:
        return None
    usual = median(norms[:-1])
    if norms[-1] <= GRADIENT_EXPLODED * max(usual, 0.05):
        return None
    return (
        f"the gradient norm of step {rows[-1]['step']} is {norms[-1]:.3g}, where {usual:.3g} is usual. "
        "It is clipped at --max-grad-norm; if this recurs, lower --learning-rate, or look at the "
        "data of this step."
    )


def chosen_falls(rows: History) -> str | None:
    """Margins that grow because both answers become unlikely, the rejected faster."""
    steps = [row for row in rows if "logps/chosen" in row]
    if len(steps) < ENOUGH_STEPS:
        return None
    window = max(WINDOW, len(steps) // 10)
    first, last = steps[:window], steps[-window:]
    before, now = (_mean(part, "logps/chosen") for part in (first, last))
    margins_grew = _mean(last, "rewards/margins") > _mean(first, "rewards/margins")
    if not margins_grew or before - now <= CHOSEN_FELL * abs(before):
        return None
    return (
        f"the log-prob of chosen answers has fallen from {before:.1f} to {now:.1f} while the margin "
        "grew: both answers become unlikely. Consider --nll-weight, --loss-type apo_zero, a higher "
        "--beta or a lower --learning-rate."
    )


def accuracy_at_chance(rows: History) -> str | None:
    """Reward accuracies that stay at one half."""
    steps = [row for row in rows if "rewards/accuracies" in row]
    if len(steps) < ENOUGH_STEPS:
        return None
    reached = _mean(steps[len(steps) // 2 :], "rewards/accuracies")
    if abs(reached - 0.5) > NEAR_HALF:
        return None
    return (
        f"after {len(steps)} steps the model prefers the chosen answer {reached:.0%} of the time, as a "
        "coin would. Raise --learning-rate or --epochs, or let build-prefs audit the labels (--audit)."
    )


def accuracy_saturated(rows: History) -> str | None:
    """Every pair is told apart, and nothing is left to learn."""
    steps = [row for row in rows if "rewards/accuracies" in row]
    if len(steps) < ENOUGH_STEPS:
        return None
    if any(row["rewards/accuracies"] < 1.0 for row in steps[-ENOUGH_STEPS // 2 :]):
        return None
    return (
        f"for {ENOUGH_STEPS // 2} steps every chosen answer has been preferred: what is trained now is "
        "only the margin. Fewer --epochs, a higher --beta or harder pairs keep the model closer to "
        "its reference."
    )


def length_drift(samples: History) -> str | None:
    """Samples that have become much longer or shorter, or stop ending by themselves.

    Takes lines of `samples.jsonl`.
    """
    if not samples:
        return None
    first, last = (
        [sample for sample in samples if sample["step"] == step]
        for step in (samples[0]["step"], samples[-1]["step"])
    )
    if samples[0]["step"] == samples[-1]["step"] or len(last) < ENOUGH_SAMPLES:
        return None
    stopped, stops = (fmean(s["stopped"] for s in part) for part in (first, last))
    before, now = (median(s["tokens"] for s in part) for part in (first, last))
    if stops < stopped / 2:
        return (
            f"of the samples {stops:.0%} end by themselves, where {stopped:.0%} did at the start: the "
            "model forgets to stop. Lower --learning-rate, and look at samples.jsonl."
        )
    if before / LONGER <= now <= before * LONGER:
        return None
    return (
        (
            f"the samples have grown from {before:.0f} to {now:.0f} tokens"
            if now > before
            else f"the samples have shrunk from {before:.0f} to {now:.0f} tokens"
        )
        + ". Compare the lengths of your data; for dpo, --loss-type sigmoid_norm does not reward length."
    )


def looked_at_now(step: int) -> bool:
    """Whether the rules that read the whole history run at this step: less often as it grows."""
    return step % max(1, step // 50) == 0


WARNINGS: Final[Mapping[str, Rule]] = {
    "loss": exploding_loss,
    "chosen": chosen_falls,
    "chance": accuracy_at_chance,
    "saturated": accuracy_saturated,
}


def _mean(rows: History, name: str) -> float:
    return fmean(float(row[name]) for row in rows)


# --- At the end --------------------------------------------------------------------------------


def never_left_warm_up(rows: History) -> str | None:
    """A finished training whose every step had a learning rate of 0."""
    if not rows or any(row["learning_rate"] for row in rows):
        return None
    return f"the whole training lay in the warm-up, at learning rate 0, and changed nothing. {LEAVE_IT}"


LEAVE_IT: Final = "Pass --warmup 0, a smaller --global-batch, or more data."


def stays_in_warm_up(steps: int, warmup: float) -> str | None:
    """A planned training that would end so: of a warm-up, however short, the first step is at 0."""
    if steps > 1 or not warmup:
        return None
    return (
        "the whole training would lie in the warm-up, at learning rate 0, and change nothing. "
        f"{LEAVE_IT}"
    )

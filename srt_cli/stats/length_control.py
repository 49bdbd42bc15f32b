"""Length-controlled win rates: what the win rate would be if both sides wrote equally long answers.

AlpacaEval 2's model (`length_controlled_v1`), fitted without its L1 penalty and cross-validation:
P(model wins on i) = σ(φ·tanh(z_i) + ψ·γ_i + θ), where z_i is the reference's length minus the model's
in characters, over the standard deviation of that difference (not centred), and γ_i the difficulty of
the instruction. The controlled rate is the mean of σ(ψ·γ_i + θ): the length term set to 0.

The figures in `alpaca_eval_difficulty.csv` (γ by the first 12 hex digits of the instruction's SHA-1)
and `alpaca_eval_prior.csv` are derived from AlpacaEval's public leaderboard (tatsu-lab/alpaca_eval,
commit cd543a1): the latter condenses its 1,610 "gamed" rows, the reference told to be concise or
verbose, to 64 weighted points.
"""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final, Literal

import numpy as np
from scipy.special import expit

from srt_cli.stats.rates import Doubt, Estimate, Values, bounded, win_rate

Mode = Literal["alpaca_eval", "generic"]

# Sums over the condensed rows of weight x label x (tanh length, difficulty); 1.3 of the derivation.
PRIOR_LABELS: Final = (-18.26780857, 41.30701187)
# The generic prior: the curvature-weighted optimum of the same rows with difficulty left out.
GENERIC_PHI_MEAN: Final = -1.589
GENERIC_PHI_PRECISION: Final = 13.75
THETA_PRECISION: Final = 0.01
GRADIENT_TOLERANCE: Final = 1e-10
MOST_STEPS: Final = 200
FAR_LENGTH: Final = 1.5
MOST_FAR: Final = 0.4


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate, how it was fitted, and what makes it doubtful."""

    rate: Estimate
    mode: Mode
    phi: float
    """The pull of length on the judge: below 0, longer answers win."""
    warnings: tuple[Doubt, ...]


@cache
def alpaca_eval_difficulty() -> dict[str, float]:
    """Difficulty γ of the 805 AlpacaEval instructions, by `instruction_digest`."""
    with (files("srt_cli.stats") / "alpaca_eval_difficulty.csv").open() as lines:
        return {r["instruction_sha1"]: float(r["difficulty"]) for r in csv.DictReader(lines)}


@cache
def _gamed_rows() -> tuple[Values, Values]:
    with (files("srt_cli.stats") / "alpaca_eval_prior.csv").open() as lines:
        rows = np.array([list(map(float, row.values())) for row in csv.DictReader(lines)])
    return rows[:, :2], rows[:, 2]  # (64, 2), (64,)


def instruction_digest(instruction: str) -> str:
    """The first 12 hex digits of an instruction's SHA-1, as the difficulty table is keyed."""
    return hashlib.sha1(instruction.encode(), usedforsecurity=False).hexdigest()[:12]


def difficulties_of(instructions: Sequence[str]) -> list[float] | None:
    """The difficulty of each instruction, when all are AlpacaEval's; None otherwise."""
    table = alpaca_eval_difficulty()
    digests = [instruction_digest(instruction) for instruction in instructions]
    # A handful of them is no AlpacaEval: its difficulties and prior hold for the whole set.
    if len(set(digests)) < 0.9 * len(table) or not all(digest in table for digest in digests):
        return None
    return [table[digest] for digest in digests]


def length_controlled_win_rate(
    preferences: Sequence[float],
    model_lengths: Sequence[int],
    reference_lengths: Sequence[int],
    difficulties: Sequence[float] | None = None,
) -> LengthControlled | None:
    """Fit the model by damped Newton and set the length term to 0; None with fewer than two items.

    `preferences` (0 to 1, 1 = the model wins), lengths in characters, one each an item (n,).
    With `difficulties` AlpacaEval's mode, otherwise a Gaussian prior on φ (generic: not comparable
    with AlpacaEval's figures). The standard error is a sandwich: with H the Hessian, q_i =
    σ(ψγ_i + θ) and g = mean q(1 - q)·(0, γ_i, 1), the influence of item i is
    (q_i - mean q) + n·s_iᵀH⁻¹g, s_i = x_i·(y_i - p_i); SE = sd(influence)/√n. Where all lengths differ
    by as much, or all items were judged alike, it is the raw rate.
    """
    y: Values = np.asarray(preferences, dtype=np.float64)  # (n,)
    n = len(y)
    raw = win_rate(preferences)
    if raw is None or n < 2:
        return None
    longer = np.asarray(reference_lengths, dtype=np.float64) - np.asarray(model_lengths)  # (n,)
    spread = float(longer.std(ddof=1))
    mode: Mode = "generic" if difficulties is None else "alpaca_eval"
    if spread == 0:
        why = "all length differences are equal, so nothing is controlled: this is the raw rate"
        return LengthControlled(raw, mode, 0.0, (Doubt("equal lengths", why),))
    if len(set(preferences)) == 1:
        # Whatever the lengths, the judge said the same; the fit would hold the prior's word alone.
        why = "every item was judged alike, so length decided nothing: this is the raw rate"
        return LengthControlled(raw, mode, 0.0, (Doubt("judged alike", why),))
    z = longer / spread
    gamma = np.zeros(n) if difficulties is None else np.asarray(difficulties, dtype=np.float64)
    x = np.column_stack([np.tanh(z), gamma, np.ones(n)])  # (n, 3)
    free = [0, 2] if difficulties is None else [0, 1, 2]
    beta, hessian = _fit(x, y, mode, free)

    q = expit(x[:, 1] * beta[1] + beta[2])  # (n,)
    slope = (q * (1 - q))[:, None] * np.column_stack([np.zeros(n), gamma, np.ones(n)])  # (n, 3)
    scores = x * (y - expit(x @ beta))[:, None]  # (n, 3)
    lever = np.zeros(3)
    lever[free] = np.linalg.solve(hessian[np.ix_(free, free)], slope.mean(axis=0)[free])
    influence = (q - q.mean()) + n * scores @ lever  # (n,)
    error = float(influence.std(ddof=1) / np.sqrt(n))
    rate = bounded(float(q.mean()), error, n)
    warnings = _doubts(100 * rate.value, 100 * raw.value, z)
    if mode == "generic" and hessian[0, 0] < 2 * GENERIC_PHI_PRECISION:
        why = f"with {n} pairs the pull of length is mostly the prior's, not the judge's own"
        warnings = (*warnings, Doubt("prior", why))
    return LengthControlled(rate, mode, float(beta[0]), warnings)


def _fit(x: Values, y: Values, mode: Mode, free: list[int]) -> tuple[Values, Values]:
    """Newton with step halving; returns (3,) coefficients and the (3, 3) Hessian at them."""
    beta = np.zeros(3)
    loss, gradient, hessian = _penalised(beta, x, y, mode)
    for _ in range(MOST_STEPS):
        if np.abs(gradient[free]).max() < GRADIENT_TOLERANCE:
            break
        step = np.zeros(3)
        step[free] = np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
        size = 1.0
        while True:
            found = _penalised(beta - size * step, x, y, mode)
            if found[0] <= loss or size < 1e-6:
                break
            size /= 2
        beta = beta - size * step
        stalled = loss - found[0] <= 0
        loss, gradient, hessian = found
        if stalled:
            break
    return beta, hessian


def _penalised(beta: Values, x: Values, y: Values, mode: Mode) -> tuple[float, Values, Values]:
    """Loss, gradient and Hessian of the items and the prior on (φ, ψ)."""
    eta = x @ beta  # (n,)
    p = expit(eta)
    loss = float(np.sum(np.logaddexp(0, eta) - y * eta))
    gradient = x.T @ (p - y)
    hessian = (x * (p * (1 - p))[:, None]).T @ x
    # A weak hold on θ keeps a model that wins or loses everything at a finite figure.
    loss += THETA_PRECISION * beta[2] ** 2 / 2
    gradient[2] += THETA_PRECISION * beta[2]
    hessian[2, 2] += THETA_PRECISION
    if mode == "generic":
        off = beta[0] - GENERIC_PHI_MEAN
        loss += GENERIC_PHI_PRECISION * off**2 / 2
        gradient[0] += GENERIC_PHI_PRECISION * off
        hessian[0, 0] += GENERIC_PHI_PRECISION
        return loss, gradient, hessian
    points, weights = _gamed_rows()
    eta = points @ beta[:2]  # (64,)
    p = expit(eta)
    labels = np.array(PRIOR_LABELS)
    loss += float(weights @ np.logaddexp(0, eta) - labels @ beta[:2])
    gradient[:2] += points.T @ (weights * p) - labels
    hessian[:2, :2] += (points * (weights * p * (1 - p))[:, None]).T @ points
    return loss, gradient, hessian


def _doubts(controlled: float, raw: float, z: Values) -> tuple[Doubt, ...]:
    """AlpacaEval's rule for a controlled rate far from the raw one, and extrapolation."""
    found = []
    low, high = min(raw - raw / 4, raw - 10), max(raw + (100 - raw) / 4, raw + 10)
    if not low <= controlled <= high:
        why = f"the length-controlled rate {controlled:.1f} is far from the raw {raw:.1f}"
        found.append(Doubt("far from the raw rate", why))
    far = float((np.abs(z) > FAR_LENGTH).mean())
    if far > MOST_FAR:
        why = f"{far:.0%} of the lengths differ so much that the fit extrapolates"
        found.append(Doubt("extrapolates", why))
    return tuple(found)

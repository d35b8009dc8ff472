"""Samplers that integrate the model's x_0 exactly against the exponential in the log signal-to-noise ratio.

DPM-Solver++ (arXiv:2211.01095) and UniPC (arXiv:2302.04867), of orders 1 to 3. With lambda = log(alpha / sigma) a step
has length h = lambda_next - lambda, and exp(-h) is the ratio of the noise-to-signal levels `run.sigmas`: 0 in a last
step to x_0, whose h is infinite and whose order is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import expm1, factorial, log, sqrt

import numpy as np
from torch import Tensor

from ldm2.samplers.core import Epsilon, Run, Solver, predict_x0


def dpmpp_2m(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """Multistep DPM-Solver++: arXiv:2211.01095, algorithm 2 and equation 4.1; of second order unless the options say
    otherwise, and of lower orders in its first and last steps."""
    history: list[Tensor] = []                                               # of x_0, newest first
    for i, t in run:
        x = yield run.step(i, x)
        history = [predict_x0(eps, run, i, x, t), *history[:2]]
        (_, sigma), (alpha_next, sigma_next) = run.levels(i), run.levels(i + 1)
        shrink = run.sigmas[i + 1] / run.sigmas[i]                           # exp(-h)
        x = sigma_next / sigma * x + alpha_next * (1 - shrink) * direction(run, i, history)
    return x


def dpmpp_2m_sde(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """SDE-DPM-Solver++, the variant of arXiv:2211.01095 with noise, of first or second order."""
    history: list[Tensor] = []                                               # of x_0, newest first
    for i, t in run:
        x = yield run.step(i, x)
        history = [predict_x0(eps, run, i, x, t), *history[:1]]
        (_, sigma), (alpha_next, sigma_next) = run.levels(i), run.levels(i + 1)
        shrink = run.sigmas[i + 1] / run.sigmas[i]                           # exp(-h)
        x = sigma_next / sigma * shrink * x + alpha_next * (1 - shrink**2) * direction(run, i, history, speed=2)
        x = x + sigma_next * sqrt(1 - shrink**2) * run.noise(x)
    return x


def direction(run: Run, i: int, history: Sequence[Tensor], speed: int = 1) -> Tensor:
    """What takes the place of x_0 in step i of DPM-Solver++: x_0 extrapolated along the last predictions.

    speed: how often the exponential counts that x_0 is weighed with, twice in the SDE.
    """
    order = dpmpp_order(run, i, len(history))
    if order == 1:
        return history[0]
    h = log(run.sigmas[i] / run.sigmas[i + 1])
    r_0 = log(run.sigmas[i - 1] / run.sigmas[i]) / h
    first = (history[0] - history[1]) / r_0
    share = -expm1(-speed * h)                                               # the weight of x_0 itself
    linear = (1 - share / (speed * h)) / share
    if order == 2:
        return history[0] + (0.5 if run.options.solver_type == "midpoint" else linear) * first
    r_1 = log(run.sigmas[i - 2] / run.sigmas[i - 1]) / h
    bend = (first - (history[1] - history[2]) / r_1) / (r_0 + r_1)
    return history[0] + linear * (first + r_0 * bend) - ((h - share) / h**2 - 0.5) / share * bend


def dpmpp_order(run: Run, i: int, known: int) -> int:
    """Order of step i of DPM-Solver++ with `known` predictions: 1 in the last step to x_0; lower near the end of a run
    of less than 15 steps."""
    options, total = run.options, len(run.timesteps)
    short = options.lower_order_final and total < 15
    if run.last(i) and (run.sigmas[-1] == 0 or options.euler_at_final or short):
        return 1
    return min(options.solver_order, known, 2 if short and i + 2 == total else 3)


def unipc(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """UniPC on x_0: arXiv:2302.04867, section 3, multistep, of second order unless the options say otherwise.

    The prediction at the end of a step also corrects that step, so the correction costs no model call. It is added to
    x_t as a difference: an x_t that was edited between the steps stays edited.
    """
    history: list[Tensor] = []                                               # of x_0, newest first
    order = 0
    for i, t in run:
        x = yield run.step(i, x)
        x0 = predict_x0(eps, run, i, x, t)
        if order and i - 1 not in run.options.disable_corrector:
            x = x + correction(run, i - 1, x0, history, order)
        history = [x0, *history[:2]]
        left = len(run.timesteps) - i if run.options.lower_order_final else run.options.solver_order
        order = min(run.options.solver_order, left, len(history))
        (_, sigma), (alpha_next, sigma_next) = run.levels(i), run.levels(i + 1)
        shrink = run.sigmas[i + 1] / run.sigmas[i]                           # exp(-h)
        x = sigma_next / sigma * x + alpha_next * (1 - shrink) * x0
        if order > 1:
            lengths, weights = unipc_weights(run, i, order)
            x = x + alpha_next * extrapolation(history, lengths, weights)
    return x


def correction(run: Run, i: int, x0: Tensor, history: Sequence[Tensor], order: int) -> Tensor:
    """What the end of step i gains from x_0 predicted there: the corrected end minus the predicted one.

    UniC of arXiv:2302.04867, section 3.1. history: the predictions of step i and those before it.
    """
    alpha_next, _ = run.levels(i + 1)
    _, corrected = unipc_weights(run, i, order, corrects=True)
    change = corrected[-1] * (x0 - history[0])
    if order > 1:
        lengths, predicted = unipc_weights(run, i, order)
        change = change + extrapolation(history, lengths, corrected[:-1] - predicted)
    return alpha_next * change


def extrapolation(history: Sequence[Tensor], lengths: np.ndarray, weights: np.ndarray) -> Tensor:
    """sum_k weights[k] * (history[k + 1] - history[0]) / lengths[k]"""
    terms = zip(history[1:], lengths.tolist(), weights.tolist())
    return sum(weight / length * (before - history[0]) for before, length, weight in terms)


def unipc_weights(run: Run, i: int, order: int, corrects: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(lengths r, weights B(h) rho) of the differences (x_0 at the other points - x_0 at step i) / r in step i.

    The other points are order - 1 earlier ones, with r < 0 in units of the step, and for the corrector the end, r = 1.
    rho solves R rho = b with R[j, k] = r_k^j: arXiv:2302.04867, equation 3.4. Alone it is 1/2.
    """
    h = log(run.sigmas[i] / run.sigmas[i + 1])
    r = np.array([log(run.sigmas[i] / run.sigmas[i - k]) / h for k in range(1, order)] + [1.0] * corrects)
    scale = -h if run.options.solver_type == "bh1" else expm1(-h)            # B(h)
    phi, b = expm1(-h) / -h - 1, []
    for j in range(1, len(r) + 1):
        b.append(phi * factorial(j) / scale)
        phi = phi / -h - 1 / factorial(j + 1)
    rho = np.full(1, 0.5) if len(r) == 1 else np.linalg.solve(r ** np.arange(len(r))[:, None], b)
    return r, -scale * rho

"""Samplers that integrate the model's x_0 exactly against the exponential in the log signal-to-noise ratio.

DPM-Solver++ (arXiv:2211.01095) and UniPC (arXiv:2302.04867), both of second order. With lambda = log(alpha / sigma) a
step has length h = lambda_next - lambda, and exp(-h) is the ratio of the noise-to-signal levels `run.sigmas`: 0 in the
last step, whose h is infinite.
"""

from __future__ import annotations

from math import expm1, log, sqrt

from torch import Tensor

from ldm2.ops import axpby
from ldm2.samplers.core import Epsilon, Run, Solver


def dpmpp_2m(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """DPM-Solver++(2M): arXiv:2211.01095, algorithm 2; its first and last step are of first order."""
    x0_before = None
    for i, t in run:
        x = yield run.step(i, x)
        x0 = predict_x0(eps, run, i, x, t)
        shrink = run.sigmas[i + 1] / run.sigmas[i]                           # exp(-h)
        (_, sigma), (alpha_next, sigma_next) = run.levels(i), run.levels(i + 1)
        x = axpby(sigma_next / sigma, x, alpha_next * (1 - shrink), midpoint(run, i, x0, x0_before))
        x0_before = x0
    return x


def dpmpp_2m_sde(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """SDE-DPM-Solver++(2M), the variant of arXiv:2211.01095 with noise; its first and last step are of first order."""
    x0_before = None
    for i, t in run:
        x = yield run.step(i, x)
        x0 = predict_x0(eps, run, i, x, t)
        shrink = run.sigmas[i + 1] / run.sigmas[i]                           # exp(-h)
        (_, sigma), (alpha_next, sigma_next) = run.levels(i), run.levels(i + 1)
        x = axpby(sigma_next / sigma * shrink, x, alpha_next * (1 - shrink**2), midpoint(run, i, x0, x0_before))
        x = axpby(1, x, sigma_next * sqrt(1 - shrink**2), run.noise(x))
        x0_before = x0
    return x


def midpoint(run: Run, i: int, x0: Tensor, x0_before: Tensor | None) -> Tensor:
    """x_0 extrapolated along the last two predictions to the middle of step i; the first and last step take x_0 itself.

    D of arXiv:2211.01095, algorithm 2.
    """
    if x0_before is None or run.sigmas[i + 1] == 0:
        return x0
    r = log(run.sigmas[i - 1] / run.sigmas[i]) / log(run.sigmas[i] / run.sigmas[i + 1])
    return x0 + (x0 - x0_before) / (2 * r)


def unipc(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """UniPC-2 with B(h) = exp(h) - 1 on x_0: arXiv:2302.04867, section 3, multistep with p = 2.

    The prediction at the end of a step also corrects that step, so the correction costs no model call. It is added to
    x_t as a difference: an x_t that was edited between the steps stays edited.
    """
    before = older = None
    for i, t in run:
        x = yield run.step(i, x)
        x0 = predict_x0(eps, run, i, x, t)
        if before is not None:
            x = x + correction(run, i, x0, before, older)
        (_, sigma), (alpha_next, sigma_next) = run.levels(i), run.levels(i + 1)
        shrink = run.sigmas[i + 1] / run.sigmas[i]                           # exp(-h)
        x = axpby(sigma_next / sigma, x, alpha_next * (1 - shrink), midpoint(run, i, x0, before))
        before, older = x0, before
    return x


def correction(run: Run, i: int, x0: Tensor, before: Tensor, older: Tensor | None) -> Tensor:
    """What x_t gains before step i from x_0 predicted there: the corrected end of step i - 1 minus the predicted end.

    UniC of arXiv:2302.04867, section 3.1; its weights rho solve R rho = b with R = [[1, 1], [-r, 1]], where r is the
    length of the step before in units of this one. The predictor gave the weight 1/2 to the first difference.
    """
    alpha, _ = run.levels(i)
    weight = alpha * (1 - run.sigmas[i] / run.sigmas[i - 1])
    if older is None:
        return weight / 2 * (x0 - before)
    h = log(run.sigmas[i - 1] / run.sigmas[i])
    r = log(run.sigmas[i - 2] / run.sigmas[i - 1]) / h
    b_1 = -1 / expm1(-h) - 1 / h
    b_2 = 2 / h * (1 / expm1(-h) + 1 / h) - 1 / expm1(-h)
    rho_1 = (b_1 - b_2) / (1 + r)
    rho_2 = b_1 - rho_1
    return weight * ((rho_1 - 1 / 2) * (before - older) / r + rho_2 * (x0 - before))


def predict_x0(eps: Epsilon, run: Run, i: int, x: Tensor, t: float) -> Tensor:
    """The model's x_0 at the state x before step i."""
    alpha, sigma = run.levels(i)
    return eps.step(1 / alpha, x, -sigma / alpha, t)

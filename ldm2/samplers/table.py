"""Samplers that step from one entry of alphas_cumprod to another: DDIM, DDPM, PNDM.

Below, a stands for alphas_cumprod[t] and a_prev for its value at the timestep that is stepped to.
"""

from __future__ import annotations

from math import sqrt

from torch import Tensor

from ldm2.samplers.core import Epsilon, Run, Solver


def ddim(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """Denoising diffusion implicit models, arXiv:2010.02502, equations 12 and 16; eta = 1 is as random as DDPM."""
    for i, t in run:
        x = yield run.step(i, x)
        a, a_prev = run.schedule.alpha_cumprod(t), run.schedule.alpha_cumprod(t - run.stride)
        sigma = run.eta * sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        e = eps.unlimited(eps.predict(x, t), x, t)
        x0 = eps.limit((x - sqrt(1 - a) * e) / sqrt(a))
        x = sqrt(a_prev) * x0 + sqrt(1 - a_prev - sigma**2) * e
        if run.eta > 0:
            x = x + sigma * run.noise(x)
    return x


def ddpm(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """Denoising diffusion probabilistic models, arXiv:2006.11239, equations 7 (or the variance beta_t) and 11.

    The last step returns x_0. It draws its noise all the same, to leave the generator as diffusers leaves it.
    """
    for i, t in run:
        x = yield run.step(i, x)
        a = run.schedule.alpha_cumprod(t)
        a_prev = 1.0 if run.last(i) else run.schedule.alpha_cumprod(run.timesteps[i + 1])
        beta = 1 - a / a_prev
        x = (x - beta / sqrt(1 - a) * eps(x, t)) / sqrt(1 - beta)
        if t > 0:
            share = (1 - a_prev) / (1 - a) if run.options.variance_type == "fixed_small" else 1.0
            x = x + sqrt(share * beta) * run.noise(x)
    return x


def pndm(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """Pseudo linear multistep (PLMS), arXiv:2202.09778, equations 9 and 12: Adams-Bashforth on eps.

    The first step, which has no history, averages eps at both of its ends; it calls the model twice. Or, as in the
    paper, the first three steps are those of Runge-Kutta (equation 13) and call it four times: skip_prk_steps.
    The history holds what the model predicts, so v stays v until it is used, as in diffusers.
    """
    def transfer(prediction: Tensor, t: float, t_prev: float) -> Tensor:
        a, a_prev = run.schedule.alpha_cumprod(t), run.schedule.alpha_cumprod(t_prev)
        e = eps.of(prediction, x, t)
        return sqrt(a_prev) * (x - sqrt(1 - a) * e) / sqrt(a) + sqrt(1 - a_prev) * e

    history: list[Tensor] = []                                               # newest first
    for i, t in run:
        x = yield run.step(i, x)
        history = [eps.predict(x, t), *history[:3]]
        t_prev = t - run.stride
        slope = history[0]
        if len(history) <= 3 and not run.options.skip_prk_steps and not run.last(i):
            half = run.timesteps[i + 1] + run.stride // 2
            t_prev = run.timesteps[i + 1]
            second = eps.predict(transfer(slope, t, t - run.stride // 2), half)
            third = eps.predict(transfer(second, t, half), half)
            fourth = eps.predict(transfer(third, t, t_prev), t_prev)
            slope = (slope + 2 * second + 2 * third + fourth) / 6
        elif len(history) == 1 and not run.last(i):
            trial = transfer(slope, t, t_prev)
            t_prev = run.timesteps[i + 1]
            slope = (slope + eps.predict(trial, t_prev)) / 2
            t = t_prev + run.stride
        elif len(history) == 2:
            slope = (3 * history[0] - history[1]) / 2
        elif len(history) == 3:
            slope = (23 * history[0] - 16 * history[1] + 5 * history[2]) / 12
        elif len(history) == 4:
            slope = (55 * history[0] - 59 * history[1] + 37 * history[2] - 9 * history[3]) / 24
        x = transfer(slope, t, t_prev)
    return x

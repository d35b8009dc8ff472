"""Samplers that integrate dx / dsigma = eps for x = x_0 + sigma * noise: Euler, Heun, LMS and ancestral Euler.

Reference: "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364, section 2.
The model wants x scaled back to variance one: x / sqrt(sigma^2 + 1).
"""

from __future__ import annotations

from math import hypot, prod, sqrt

from torch import Tensor

from ldm2.samplers.core import Epsilon, Run, Solver


def euler(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """Euler's method: arXiv:2206.00364, algorithm 1 without its correction."""
    for i, t in run:
        x = yield run.step(i, x)
        sigma, sigma_next = run.sigmas[i], run.sigmas[i + 1]
        x = x + (sigma_next - sigma) * eps(x / hypot(1, sigma), t)
    return x


def euler_ancestral(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """Euler's method to a lower noise level, then fresh noise up to the level wanted.

    The two levels are the mean and deviation of DDPM's posterior, arXiv:2006.11239, equation 7, in these coordinates.
    """
    for i, t in run:
        x = yield run.step(i, x)
        sigma, sigma_next = run.sigmas[i], run.sigmas[i + 1]
        ratio = sigma_next / sigma
        down, up = sigma_next * ratio, sigma_next * sqrt(1 - ratio**2)
        x = x + (down - sigma) * eps(x / hypot(1, sigma), t) + up * run.noise(x)
    return x


def heun(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """Heun's method: arXiv:2206.00364, algorithm 1. Two model calls a step, one in the last."""
    for i, t in run:
        x = yield run.step(i, x)
        sigma, sigma_next = run.sigmas[i], run.sigmas[i + 1]
        slope = eps(x / hypot(1, sigma), t)
        if sigma_next > 0:
            trial = x + (sigma_next - sigma) * slope
            slope = (slope + eps(trial / hypot(1, sigma_next), run.timesteps[i + 1])) / 2
        x = x + (sigma_next - sigma) * slope
    return x


def lms(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """Linear multistep (Adams-Bashforth of order 4, on uneven levels) for dx / dsigma = eps."""
    slopes: list[Tensor] = []                                                # newest first
    for i, t in run:
        x = yield run.step(i, x)
        sigma, sigma_next = run.sigmas[i], run.sigmas[i + 1]
        if sigma_next == sigma:                   # past the end of the table: two steps at one level say nothing new
            continue
        slopes = [eps(x / hypot(1, sigma), t), *slopes[:3]]
        weights = adams_bashforth([run.sigmas[i - k] for k in range(len(slopes))], sigma_next)
        x = x + sum(weight * slope for weight, slope in zip(weights, slopes))
    return x


def adams_bashforth(nodes: list[float], end: float) -> list[float]:
    """Weights w_k of the values f(nodes[k]) in the integral from nodes[0] to `end` of the polynomial through them.

    Up to four nodes: the polynomials are cubic at most, and two-point Gauss quadrature is exact for cubics.
    """
    half = (end - nodes[0]) / 2
    points = [nodes[0] + half * (1 - 1 / sqrt(3)), nodes[0] + half * (1 + 1 / sqrt(3))]
    return [half * sum(prod((p - other) / (node - other) for other in nodes if other != node) for p in points)
            for node in nodes]

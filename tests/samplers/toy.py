"""A denoiser small enough to be walked through many solvers, and what its trajectories are compared with."""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor

from ldm2.schedules import Schedule
from tests.helpers import PUBLISHED

SCHEDULE = Schedule.from_dict(PUBLISHED)
STOCHASTIC = ("ddpm", "euler-ancestral", "dpmpp-2m-sde", "lcm")
SHAPE = (4, 5, 3)
MIX = 0.5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def model(x: Tensor, t: Tensor | float) -> Tensor:
    """A smooth, bounded denoiser that mixes channels and depends on time."""
    t = float(t) / 1000
    return 0.8 * torch.tanh((1 + t) * torch.einsum("ij,bjtf->bitf", MIX, x)) + 0.3 * t * x + 0.1


def error(got: Tensor, wanted: Tensor) -> float:
    """Distance over the length of what is wanted."""
    return float((got - wanted).norm() / wanted.norm())


def draw_latents(seed: int, rows: int = 1) -> Tensor:
    """Normal numbers (rows, *SHAPE)."""
    return torch.randn((rows, *SHAPE), generator=torch.Generator().manual_seed(seed))


def knowing(x0, schedule=SCHEDULE):
    """A denoiser that knows the answer: eps = (x_t - alpha x_0) / sigma."""
    def denoiser(x, t):
        sigma = schedule.sigma(t)
        return (x * math.hypot(1, sigma) - x0) / sigma
    return denoiser


def diffusers_walk(scheduler, x, timesteps, generator, eta=0.0):
    """[(timestep, state after the model call at it)] of a diffusers pipeline's loop."""
    accepted = inspect.signature(scheduler.step).parameters
    extra = {key: value for key, value in {"eta": eta, "generator": generator}.items() if key in accepted}
    walk = []
    for t in timesteps:
        prediction = model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(prediction, t, x, **extra).prev_sample
        walk.append((float(t), x))
    return walk

"""What all samplers share: the run they walk along, the step they offer for inspection, and eps from any prediction.

A sampler is a generator `sampler(eps, run, x)`. Before each of its steps it yields the `Step` it is about to take and
receives the x_t to take it from, which is the same tensor unless the driver replaced it; at the end it returns the
latents. So a driver can watch, stop, edit and start late with any sampler, and the sampler stays the paper's formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ldm2.schedules import Schedule
from ldm2.solver_options import SolverOptions

Denoiser = Callable[[Tensor, float], Tensor]
Noise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """A step about to be taken: x_t = signal * x_0 + sigma * noise, at timestep t, in the sampler's own coordinates.

    index: of the step, counted from 0 for the noisiest one (not from the late start).
    """

    index: int
    t: float
    x_t: Tensor
    signal: float
    sigma: float


Solver = Generator[Step, Tensor, Tensor]


@dataclass(frozen=True)
class Run:
    """The points that a sampler visits, and what else it needs to know.

    timesteps: (S,), one for each step, descending
    variance_exploding: the state is x_0 + sigma * noise (Euler, Heun, LMS), else that, scaled to variance one
    start:     the first step that is taken; 0 is pure noise
    noise:     draws standard normal float32 numbers like its argument. eta: see ddim
    options:   those of the solver
    """

    schedule: Schedule
    timesteps: tuple[float, ...]
    variance_exploding: bool
    start: int
    noise: Noise | None
    eta: float
    options: SolverOptions

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """(index, timestep) of the steps to take."""
        return iter(list(enumerate(self.timesteps))[self.start:])

    @property
    def stride(self) -> int:
        """How far the table is stepped down in one step by the samplers that index it (DDIM and PNDM)."""
        return self.schedule.num_train_timesteps // len(self.timesteps)

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """(S + 1,) noise over signal before each step, and after the last one: 0 unless the options say otherwise."""
        end = 0.0 if self.options.final_sigmas_type == "zero" else self.schedule.sigma(0)
        return (*(self.schedule.sigma(t) for t in self.timesteps), end)

    def last(self, index: int) -> bool:
        """Whether a step is the last one."""
        return index + 1 == len(self.timesteps)

    def levels(self, index: int) -> tuple[float, float]:
        """(signal, sigma) of x_t before step `index`, in the sampler's coordinates."""
        sigma = self.sigmas[index]
        return (1.0, sigma) if self.variance_exploding else variance_preserving(sigma)

    def step(self, index: int, x: Tensor) -> Step:
        """The step `index` from x."""
        return Step(index, self.timesteps[index], x, *self.levels(index))

    def begin(self, x_T: Tensor, x0: Tensor | None) -> Tensor:
        """Standard normal x_T (B, ...) -> the state before the first step: pure noise, or x0 noised to that level."""
        signal, sigma = self.levels(self.start)
        if x0 is not None:
            return signal * x0 + sigma * x_T
        # The variance of x_t for data of variance one. diffusers leaves the data's one out for spacings that begin at
        # the last timestep, where it hardly counts beside sigma.
        if self.variance_exploding and self.schedule.timestep_spacing != "leading":
            return sigma * x_T
        return math.hypot(signal, sigma) * x_T


class Epsilon:
    """eps(x_t, t) in float32, for variance preserving x_t, from a denoiser that predicts eps, v or x_0.

    v = alpha eps - sigma x_0, so eps = alpha v + sigma x_t: arXiv:2202.00512, appendix D.
    Where the options limit x_0, eps is the one that leads to the limited x_0.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule, options: SolverOptions):
        self.denoiser, self.schedule, self.options = denoiser, schedule, options

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self.of(self.predict(x, t), x, t)

    def predict(self, x: Tensor, t: float) -> Tensor:
        """What the denoiser predicts, eps, v or x_0, in float32. Raises ValueError if its shape is not x's."""
        prediction = self.denoiser(x, t).float()
        if prediction.shape != x.shape:
            raise ValueError(f"the denoiser returned {tuple(prediction.shape)} for x_t {tuple(x.shape)}")
        return prediction

    def of(self, prediction: Tensor, x: Tensor, t: float) -> Tensor:
        """The eps which a prediction at (x, t) stands for."""
        eps = self.unlimited(prediction, x, t)
        if not self.options.limits:
            return eps
        alpha, sigma = variance_preserving(self.schedule.sigma(t))
        return (x - alpha * self.limit((x - sigma * eps) / alpha)) / sigma

    def unlimited(self, prediction: Tensor, x: Tensor, t: float) -> Tensor:
        """A prediction -> eps at (x, t), whatever x_0 it leads to: limits of x_0 are not applied."""
        if self.schedule.prediction_type == "epsilon":
            return prediction
        alpha, sigma = variance_preserving(self.schedule.sigma(t))
        if self.schedule.prediction_type == "v_prediction":
            return alpha * prediction + sigma * x
        return (x - alpha * prediction) / sigma

    def limit(self, x0: Tensor) -> Tensor:
        """x_0 (B, ...) as the options limit it: arXiv:2205.11487, section 2.3, static and dynamic thresholding."""
        options = self.options
        if not options.thresholding:
            return x0.clamp(-options.clip_sample_range, options.clip_sample_range) if options.clip_sample else x0
        bound = torch.quantile(x0.flatten(1).abs(), options.dynamic_thresholding_ratio, dim=1)
        bound = bound.clamp(1, max(1, options.sample_max_value)).view(-1, *[1] * (x0.dim() - 1))
        return x0.clamp(-bound, bound) / bound


def variance_preserving(sigma: float) -> tuple[float, float]:
    """Noise over signal -> (alpha, sigma) with alpha^2 + sigma^2 = 1."""
    alpha = 1 / math.hypot(1, sigma)
    return alpha, alpha * sigma


def predict_x0(eps: Epsilon, run: Run, i: int, x: Tensor, t: float) -> Tensor:
    """The model's x_0 at the state x before step i of a run whose state is variance preserving."""
    alpha, sigma = run.levels(i)
    return (x - sigma * eps(x, t)) / alpha

"""Samplers: from noise to latents with a denoiser, one small generator for each method, after its paper.

`sample` is the driver; it alone knows about callbacks, cancellation, editing and starting late.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ldm2.samplers.consistency import lcm
from ldm2.samplers.core import Denoiser, Epsilon, Noise, Run, Solver, Step
from ldm2.samplers.exponential import dpmpp_2m, dpmpp_2m_sde, unipc
from ldm2.samplers.ode import euler, euler_ancestral, heun, lms
from ldm2.samplers.table import ddim, ddpm, pndm
from ldm2.schedules import Schedule
from ldm2.solver_options import SolverOptions

__all__ = ["SAMPLERS", "Cancelled", "Sampler", "Step", "check_settings", "sample", "timesteps"]


class Cancelled(Exception):
    """A callback returned False."""


@dataclass(frozen=True)
class Sampler:
    """A method with what it assumes about its points.

    solve:      the generator. timesteps: the points of a schedule that it visits.
    scheduler:  the scheduler class of diffusers that computes the same, whose options it follows
    variance_exploding: whether its state is x_0 + sigma * noise. stochastic: whether it always draws noise.
    """

    solve: Callable[[Epsilon, Run, Tensor], Solver]
    timesteps: Callable[[Schedule, int], tuple[float, ...]]
    scheduler: str
    variance_exploding: bool = False
    stochastic: bool = False


SAMPLERS = {
    "ddim": Sampler(ddim, Schedule.timesteps, "DDIMScheduler"),
    "ddpm": Sampler(ddpm, Schedule.timesteps, "DDPMScheduler", stochastic=True),
    "pndm": Sampler(pndm, Schedule.timesteps, "PNDMScheduler"),
    "lms": Sampler(lms, Schedule.sigma_timesteps, "LMSDiscreteScheduler", variance_exploding=True),
    "euler": Sampler(euler, Schedule.sigma_timesteps, "EulerDiscreteScheduler", variance_exploding=True),
    "euler-ancestral": Sampler(
        euler_ancestral, Schedule.sigma_timesteps, "EulerAncestralDiscreteScheduler", variance_exploding=True,
        stochastic=True,
    ),
    "heun": Sampler(heun, Schedule.sigma_timesteps, "HeunDiscreteScheduler", variance_exploding=True),
    "dpmpp-2m": Sampler(dpmpp_2m, Schedule.interval_timesteps, "DPMSolverMultistepScheduler"),
    "dpmpp-2m-sde": Sampler(
        dpmpp_2m_sde, Schedule.interval_timesteps, "DPMSolverMultistepScheduler", stochastic=True
    ),
    "unipc": Sampler(unipc, Schedule.interval_timesteps, "UniPCMultistepScheduler"),
    "lcm": Sampler(lcm, Schedule.consistency_timesteps, "LCMScheduler", stochastic=True),
}


def check_settings(name: str, steps: int, eta: float = 0.0, schedule: Schedule | None = None) -> None:
    """Raise ValueError unless `name` is a sampler that can run `steps` steps (of this schedule) with this eta."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}, choose from {', '.join(SAMPLERS)}")
    if schedule is not None:
        schedule.check_steps(steps)
        check_options(name, schedule, steps)
    elif isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    if isinstance(eta, bool) or not isinstance(eta, numbers.Real) or not 0 <= eta <= 1:
        raise ValueError(f"eta must be a number from 0 to 1, got {eta!r}")
    if eta > 0 and name != "ddim":
        raise ValueError(f"only the sampler ddim takes an eta above 0, got eta {eta!r} with {name}")


def check_options(name: str, schedule: Schedule, steps: int) -> SolverOptions:
    """The options of a sampler in this schedule's file. Raises ValueError if they are not implemented, or together."""
    options = schedule.options(SAMPLERS[name].scheduler)
    if name == "dpmpp-2m-sde" and options.solver_order == 3:
        raise ValueError("solver_order must be 1 or 2 with the algorithm sde-dpmsolver++, got 3")
    if name == "pndm" and not options.skip_prk_steps and steps < 4:
        raise ValueError(f"steps must be at least 4 where skip_prk_steps is False, got {steps}")
    return options


def timesteps(name: str, schedule: Schedule, steps: int) -> tuple[float, ...]:
    """The timesteps (steps,) of a sampler, descending: the denoiser is called with these numbers and no others."""
    check_settings(name, steps, schedule=schedule)
    return SAMPLERS[name].timesteps(schedule, steps)


def sample(
    name: str, denoiser: Denoiser, x_T: Tensor, schedule: Schedule, steps: int, *,
    eta: float = 0.0, noise: Noise | None = None, x0: Tensor | None = None, start: int = 0,
    edit: Callable[[Step], Tensor] | None = None, callback: Callable[[int, int, Tensor], object] | None = None,
) -> Tensor:
    """Standard normal x_T (B, ...) -> latents x_0 (B, ...), float32.

    name:      one of SAMPLERS
    denoiser:  denoiser(x_t, t) -> what schedule.prediction_type names, like x_t in shape, in any floating dtype.
               x_t is float32 with variance near one; t is a number from `timesteps(name, schedule, steps)`.
    eta:       for ddim: 0 adds no noise, 1 as much as ddpm
    noise:     noise(like) -> standard normal float32; needed by ddim with eta > 0, ddpm, euler-ancestral, dpmpp-2m-sde
               and lcm, and called exactly when diffusers would draw
    x0, start: start at step `start` from the clean latents x0, noised with x_T to that step's level;
               start = steps returns x0
    edit:      edit(step) -> the x_t to take the step from, called once before each step (not before the second model
               call of a step). For masked editing: mask * (step.signal * x0 + step.sigma * n) + (1 - mask) * step.x_t.
               With pndm and lms n should be one draw for the whole run: they extrapolate along eps of earlier steps.
    callback:  callback(done, total, latents) after each step, done = 1 .. total = steps - start; the latents are in the
               sampler's own coordinates. False raises Cancelled.

    Raises ValueError for an unknown sampler and for numbers out of range.
    """
    check_settings(name, steps, eta, schedule)
    if isinstance(start, bool) or not isinstance(start, numbers.Integral) or not 0 <= start <= steps:
        raise ValueError(f"start must be an integer from 0 to steps ({steps}), got {start!r}")
    if start > 0 and x0 is None:
        raise ValueError(f"start {start} needs the latents x0 to start from")
    if x0 is not None and x0.shape != x_T.shape:
        raise ValueError(f"x0 {tuple(x0.shape)} must have the shape of x_T {tuple(x_T.shape)}")
    method = SAMPLERS[name]
    if noise is None and (method.stochastic or eta > 0):
        raise ValueError(f"{name} with eta {eta} draws noise: give noise=")
    if start == steps:
        return x0.float()
    options = schedule.options(method.scheduler)
    run = Run(
        schedule, method.timesteps(schedule, steps), method.variance_exploding, int(start), noise, float(eta), options
    )
    x = run.begin(x_T.float(), None if x0 is None else x0.float())
    solver = method.solve(Epsilon(denoiser, schedule, options), run, x)
    step, total = next(solver), steps - start
    for done in range(1, total + 1):
        x = step.x_t if edit is None else edit(step)
        try:
            step = solver.send(x)
            x = step.x_t
        except StopIteration as finished:
            x = finished.value
        if callback is not None and callback(done, total, x) is False:
            raise Cancelled(f"stopped after step {done} of {total}")
    return x

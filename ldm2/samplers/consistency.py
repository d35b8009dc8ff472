"""Sampling of consistency models, which jump from any noise level to x_0: LCM.

Such a model was distilled for it (`ldm2 train distill` makes students of another kind, for ddim). Each jump is a
finished sound; the next one begins from it with fresh noise of a lower level.
"""

from __future__ import annotations

from math import hypot

from torch import Tensor

from ldm2.samplers.core import Epsilon, Run, Solver, predict_x0

_SIGMA_DATA = 0.5                          # arXiv:2303.01469, appendix C


def lcm(eps: Epsilon, run: Run, x: Tensor) -> Solver:
    """Multistep latent consistency sampling: arXiv:2310.04378, algorithm 3. No noise is added after the last step."""
    for i, t in run:
        x = yield run.step(i, x)
        skip, out = boundary(t * run.options.timestep_scaling)
        x = skip * x + out * predict_x0(eps, run, i, x, t)
        if not run.last(i):
            alpha, sigma = run.levels(i + 1)
            x = alpha * x + sigma * run.noise(x)
    return x


def boundary(time: float) -> tuple[float, float]:
    """(c_skip, c_out) of f(x, t) = c_skip x + c_out x_0(x, t), which is x itself at time 0: arXiv:2303.01469, eq. 5."""
    length = hypot(time, _SIGMA_DATA)
    return (_SIGMA_DATA / length) ** 2, time / length

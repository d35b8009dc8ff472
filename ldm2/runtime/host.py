"""Settings of the program around ldm2 that its results do not depend on. No torch here; see `inference` for torch's.

Its own choices are left to it: the number of threads, `torch.set_float32_matmul_precision`, TF32 and
`torch.set_flush_denormal` say how the processor computes, and change the last bits of a result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


def usual_numpy(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function with numpy's floating-point errors ignored, whatever `numpy.seterr` says.

    A cast to float32 that makes zeros of the smallest numbers is an error under `seterr(all="raise")`. What must be
    finite is looked at by itself.
    """

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> R:
        with np.errstate(all="ignore"):
            return function(*args, **named)

    return run

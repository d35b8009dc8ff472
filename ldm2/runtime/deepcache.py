"""Deep features of the UNet computed at every N-th timestep and reused in between, where they have hardly changed.

`python -m benchmarks.tradeoff` measures what it costs. At 25 steps and fewer that is seen in the sounds, so no preset
has it.

Reference: "DeepCache: Accelerating Diffusion Models for Free", arXiv:2312.00858, section 3.3 (uniform 1:N inference).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ldm2.unet import PreparedConditioning


def reusing(unet: Any, every: int) -> Callable[..., Tensor]:
    """A function like unet(x_t, t, prepared, time=None) with a memory of its own: make one for each run and window.

    It counts timesteps, not calls: samplers that call the model twice at one timestep get the same kind of features
    both times. Another `prepared` (guidance setting in or out) begins a new count. every = 1 is the UNet itself.
    """
    features: Tensor | None = None
    branches: PreparedConditioning | None = None
    last, count = None, 0

    def predict(x_t: Tensor, t: float, prepared: PreparedConditioning, time: Tensor | None = None) -> Tensor:
        nonlocal features, branches, last, count
        if prepared is not branches:
            branches, count = prepared, 0
        elif t != last:
            count += 1
        last = t
        result, features = unet.forward_cached(x_t, t, prepared, time, features if count % every else None)
        return result

    return predict

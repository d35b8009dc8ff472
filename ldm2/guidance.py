"""Classifier-free guidance: eps = u + scale * (c - u) from one model call on both branches.

References: "Classifier-Free Diffusion Guidance", arXiv:2207.12598, equation 6 with scale = 1 + w; "Applying Guidance in
a Limited Interval Improves Sample and Distribution Quality in Diffusion Models", arXiv:2404.07724.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ldm2.conditioning import Conditioning
from ldm2.samplers.core import Denoiser
from ldm2.unet import PreparedConditioning, UNet


def check_scale(scale: float) -> float:
    """The guidance scale, if it is a finite number. Raises ValueError otherwise."""
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be a finite number, got {scale!r}")
    return float(scale)


def always(t: float) -> bool:
    """Guidance at all timesteps."""
    return True


def guide(prediction: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """u + scale * (c - u) in float32 (B, ...) from both branches in any dtype (2 B, ...), u above c.

    Classifier-free guidance, arXiv:2207.12598, equation 6 with scale = 1 + w.
    rescale: how far the deviation of each row is brought back to that of the conditional prediction, 0 to 1,
             arXiv:2305.08891, equations 14 to 16.
    """
    unconditional, conditional = prediction.float().chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    factor = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return rescale * factor * guided + (1 - rescale) * guided


class Guidance:
    """A UNet with the conditioning of B rows; what does not depend on x_t is worked out once for all its denoisers.

    unconditional: B rows too; used for scale > 1 only, and needed then.
    dtype:         of the model call; the difference of the branches is taken in float32, where it does not cancel.
    timesteps:     those whose embeddings are computed here, once, instead of in every call.
    active_at:       whether there is guidance at a timestep; without it the conditional branch is evaluated alone, at
                   half the cost.
    rescale:       see `guide`.

    Raises ValueError if the rows disagree, or the unconditional side or a finite scale is missing.
    """

    def __init__(
        self, unet: UNet, conditioning: Conditioning, unconditional: Conditioning | None, scale: float, *,
        dtype: torch.dtype, timesteps: Sequence[float] = (), active_at: Callable[[float], bool] = always,
        rescale: float = 0.0,
    ):
        self.unet, self.scale, self.dtype, self.active_at = unet, check_scale(scale), dtype, active_at
        self.rescale = rescale
        self.conditioning, self.unconditional = conditioning, unconditional
        if self.scale > 1 and unconditional is None:
            raise ValueError(f"guidance_scale {scale} needs an unconditional side")
        if self.scale > 1 and unconditional.batch_size != conditioning.batch_size:
            raise ValueError(f"guidance needs as many unconditional rows as conditional ones, got "
                             f"{unconditional.batch_size} and {conditioning.batch_size}")
        visited = list(dict.fromkeys(timesteps))
        times = torch.tensor(visited, dtype=torch.float32, device="cpu")
        self.times = dict(zip(visited, unet.embed_time(times).split(1))) if visited else {}

    def denoiser(self, predict: Callable[..., Tensor] | None = None) -> Denoiser:
        """A denoiser(x_t, t) -> prediction for `samplers.sample`, float32 (B, C, T, F) -> float32.

        predict: called as unet(x_t, t, prepared, time=...), in place of the UNet itself.
        """
        predict = self.unet if predict is None else predict

        def denoise(x: Tensor, t: float) -> Tensor:
            guided = self.scale > 1 and self.active_at(t)
            prepared = self._both if guided else self._conditional
            prediction = predict(x.to(self.dtype), t, prepared, time=self.times.get(t))
            return guide(prediction, self.scale, self.rescale) if guided else prediction.float()

        return denoise

    @cached_property
    def _both(self) -> PreparedConditioning:
        return self._prepare(Conditioning.join([self.unconditional, self.conditioning]))

    @cached_property
    def _conditional(self) -> PreparedConditioning:
        return self._prepare(self.conditioning)

    def _prepare(self, conditioning: Conditioning) -> PreparedConditioning:
        return self.unet.prepare(conditioning.to(next(self.unet.parameters()).device, self.dtype))

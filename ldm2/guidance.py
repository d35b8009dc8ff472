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
from ldm2.ops import guide
from ldm2.samplers.core import Denoiser, Guided
from ldm2.unet import PreparedConditioning, UNet


def check_scale(scale: float) -> float:
    """The guidance scale, if it is a finite number. Raises ValueError otherwise."""
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be a finite number, got {scale!r}")
    return float(scale)


def everywhere(t: float) -> bool:
    """Guidance at all timesteps."""
    return True


def rescaled(prediction: Tensor, scale: float | None, rescale: float) -> Tensor:
    """Guidance whose result keeps the standard deviation of the conditional prediction, as far as `rescale` says.

    prediction (2 B, ...) of both branches, unconditional above conditional, or (B, ...) of one, for which `scale` is
    None -> float32 (B, ...). The deviation is that of each row. arXiv:2305.08891, equations 14 to 16.
    """
    guided = guide(prediction, scale)
    if scale is None:
        return guided
    axes = tuple(range(1, guided.ndim))
    conditional = prediction.float().chunk(2)[1]
    factor = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return rescale * factor * guided + (1 - rescale) * guided


class Guidance:
    """A UNet with the conditioning of B rows; what does not depend on x_t is worked out once for all its denoisers.

    unconditional: B rows too; used for scale > 1 only, and needed then.
    dtype:         of the model call; the difference of the branches is taken in float32, where it does not cancel.
    timesteps:     those whose embeddings are computed here, once, instead of in every call.
    acts_at:       whether there is guidance at a timestep; without it the conditional branch is evaluated alone, at
                   half the cost.
    rescale:       how far the guided prediction is brought back to the deviation of the conditional one, 0 to 1, see
                   `rescaled`.

    Raises ValueError if the rows disagree, or the unconditional side or a finite scale is missing.
    """

    def __init__(
        self, unet: UNet, conditioning: Conditioning, unconditional: Conditioning | None, scale: float, *,
        dtype: torch.dtype, timesteps: Sequence[float] = (), acts_at: Callable[[float], bool] = everywhere,
        rescale: float = 0.0,
    ):
        self.unet, self.scale, self.dtype, self.acts_at = unet, check_scale(scale), dtype, acts_at
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

        def branches(x: Tensor, t: float) -> tuple[Tensor, float | None]:
            guided = self.scale > 1 and self.acts_at(t)
            prepared = self._both if guided else self._conditional
            return predict(x.to(self.dtype), t, prepared, time=self.times.get(t)), self.scale if guided else None

        if self.rescale == 0:
            return Guided(branches)
        return lambda x, t: rescaled(*branches(x, t), self.rescale)

    @cached_property
    def _both(self) -> PreparedConditioning:
        return self._prepare(Conditioning.join([self.unconditional, self.conditioning]))

    @cached_property
    def _conditional(self) -> PreparedConditioning:
        return self._prepare(self.conditioning)

    def _prepare(self, conditioning: Conditioning) -> PreparedConditioning:
        return self.unet.prepare(conditioning.to(next(self.unet.parameters()).device, self.dtype))

"""Classifier-free guidance: eps = u + scale * (c - u) from one model call on both branches.

Reference: "Classifier-Free Diffusion Guidance", arXiv:2207.12598, equation 6 with scale = 1 + w.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm2.conditioning import Conditioning
from ldm2.samplers.core import Denoiser
from ldm2.unet import UNet


def check_scale(scale: float) -> float:
    """The guidance scale, if it is a finite number. Raises ValueError otherwise."""
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be a finite number, got {scale!r}")
    return float(scale)


def denoiser(
    unet: UNet, conditioning: Conditioning, unconditional: Conditioning | None, scale: float, *,
    dtype: torch.dtype, timesteps: Sequence[float] = (),
) -> Denoiser:
    """A denoiser(x_t, t) -> prediction for `samplers.sample`, float32 (B, C, T, F) -> float32.

    conditioning, unconditional: B rows each; the latter is used for scale > 1 only, and needed then.
    dtype:     of the model call; the difference of the branches is taken in float32, where it does not cancel.
    timesteps: those whose embeddings are computed here, once, instead of in every call.

    Raises ValueError if the rows disagree, or the unconditional side or a finite scale is missing.
    """
    guided = check_scale(scale) > 1
    if guided and unconditional is None:
        raise ValueError(f"guidance_scale {scale} needs an unconditional side")
    if guided and unconditional.batch_size != conditioning.batch_size:
        raise ValueError(f"guidance needs as many unconditional rows as conditional ones, got "
                         f"{unconditional.batch_size} and {conditioning.batch_size}")
    both = Conditioning.join([unconditional, conditioning]) if guided else conditioning
    prepared = unet.prepare(both.to(next(unet.parameters()).device, dtype))
    visited = list(dict.fromkeys(timesteps))
    times = dict(zip(visited, unet.embed_time(torch.tensor(visited)).split(1))) if visited else {}

    def denoise(x: Tensor, t: float) -> Tensor:
        prediction = unet(x.to(dtype), t, prepared, time=times.get(t)).float()
        if not guided:
            return prediction
        negative, positive = prediction.chunk(2)
        return negative + scale * (positive - negative)

    return denoise

"""What a latent diffusion model learns: to tell the noise (or what its schedule asks for) in noised latents.

References: arXiv:2006.11239 (equations 4 and 14); arXiv:2202.00512, appendix D (v-prediction); arXiv:2303.09556,
section 3.4 (weights of the time steps).
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_noise(x_0: Tensor, eps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t of arXiv:2006.11239 equation 4, alphas_cumprod (B,) at each row's time step."""
    a = alphas_cumprod[:, None, None, None]
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def target(prediction_type: str, x_0: Tensor, eps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """What the model should return for x_t, by the prediction_type of its schedule."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x_0
    a = alphas_cumprod[:, None, None, None]
    return a.sqrt() * eps - (1 - a).sqrt() * x_0


def step_weights(prediction_type: str, alphas_cumprod: Tensor, gamma: float) -> Tensor:
    """Weights (B,) that make the squared error of a prediction that of x_0 times min(SNR, gamma).

    SNR is the signal-to-noise ratio a / (1 - a). An error of eps is one of x_0 times sqrt(SNR), one of v times
    sqrt(SNR + 1).
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    scale = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    return snr.clamp(max=gamma) / scale


def spread_steps(rows: int, total: int, generator: torch.Generator) -> Tensor:
    """One time step for each row, evenly spread over the schedule, in random order: int64 (rows,)."""
    share = (torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)) / rows
    return (share * total).long().clamp(max=total - 1)

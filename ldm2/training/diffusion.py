"""Training of the latent diffusion model: UNet and text side together, to tell the noise that was added.

References: arXiv:2006.11239 (loss, equation 14); arXiv:2303.09556 (weights of the time steps); arXiv:2207.12598
(dropped prompts); arXiv:2112.10752 (latents).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm2.conditioning import Conditioning
from ldm2.schedules import Schedule
from ldm2.training.loop import Clock, Recipe, train
from ldm2.training.objective import add_noise, spread_steps, step_weights
from ldm2.training.tiny.text import Describer, TextSide, drop_prompts, vary
from ldm2.unet import UNet

_GAMMA = 5.0                               # signal-to-noise ratio above which a time step counts less
_DESCRIPTION = 0.03                        # weight of the descriptions, so that what is not yet used is not forgotten
_LEAST = 0.1                               # weight of the easiest time steps


class TextToLatents(nn.Module):
    """What is trained together, as one module: the UNet, and the text side inside its describer."""

    def __init__(self, unet: UNet, describer: Describer):
        super().__init__()
        self.unet, self.describer = unet, describer

    @property
    def text(self) -> TextSide:
        return self.describer.text


def train_diffusion(
    model: TextToLatents, latents: Tensor, captions: Sequence[str], targets: Tensor, held_out_latents: Tensor,
    held_out_captions: Sequence[str], schedule: Schedule, recipe: Recipe, clock: Clock, batch_size: int = 24,
) -> None:
    """latents (M, C, T, F) are scaled; captions and targets, their descriptions (M, 3), have one entry for each."""
    device = model.unet.conv_in.weight.device
    alphas_cumprod = torch.as_tensor(schedule.alphas_cumprod, dtype=torch.float32)

    def error(x_0: Tensor, t: Tensor, eps: Tensor, conditioning: Conditioning) -> Tensor:
        x_t = add_noise(x_0, eps, alphas_cumprod[t]).to(device)
        predicted = model.unet(x_t, t.to(device), conditioning)
        return ((predicted - eps.to(device)) ** 2).mean(dim=(1, 2, 3))       # (B,)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        x_0 = latents[rows].float()
        t = spread_steps(len(rows), len(alphas_cumprod), generator)
        eps = torch.randn(x_0.shape, generator=generator)
        prompts, zeroed = drop_prompts(vary([captions[i] for i in rows], generator), generator)
        weights = step_weights("epsilon", alphas_cumprod[t], _GAMMA).clamp(min=_LEAST).to(device)
        conditioning = model.text(prompts, zeroed.to(device))
        told = torch.tensor([bool(prompt) for prompt in prompts])
        described = torch.where(told[:, None], targets[rows], -100).to(device)
        description = model.describer.loss(conditioning, described)
        return (weights * error(x_0, t, eps, conditioning)).mean() + _DESCRIPTION * description

    def evaluate() -> dict[str, float]:
        """Errors with the right captions and with each other's; the gap is what the text tells."""
        generator = torch.Generator().manual_seed(0)
        x_0 = held_out_latents[:128].float()
        t = spread_steps(len(x_0), len(alphas_cumprod), generator)
        eps = torch.randn(x_0.shape, generator=generator)
        prompts = list(held_out_captions[: len(x_0)])
        right, wrong = (error(x_0, t, eps, model.text(p)).mean().item() for p in (prompts, prompts[1:] + prompts[:1]))
        return {"error": right, "error_swapped": wrong}

    train("diffusion", model, loss, recipe, clock, evaluate, evaluate_every=500)

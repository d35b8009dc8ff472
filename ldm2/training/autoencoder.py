"""Training of the VAE: reconstruction of log-mels, with a weak pull of the latents towards a standard normal.

References: arXiv:1312.6114, section 2.3 and appendix B; arXiv:2112.10752, appendix G.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ldm2.mel import MAGNITUDE_FLOOR
from ldm2.training.loop import Clock, Recipe, train
from ldm2.training.tiny.data import Pool
from ldm2.vae import VAE, Posterior

_KL_WEIGHT = 4e-3                          # against an error per mel value in nats
_FLOOR = float(torch.tensor(MAGNITUDE_FLOOR).log())


def kl_divergence(posterior: Posterior) -> Tensor:
    """Mean over latents of KL(N(mean, std) || N(0, 1)) in nats, arXiv:1312.6114 appendix B."""
    return 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).mean()


def reconstruction_loss(decoded: Tensor, mel: Tensor) -> Tensor:
    """Mean absolute error, and a squared one that makes the edges of silence come out early."""
    error = decoded - mel
    return error.abs().mean() + 0.1 * (error**2).mean()


def start(vae: VAE) -> None:
    """Puts the output near the level of the mels, which are not centred."""
    torch.nn.init.constant_(vae.decoder.conv_out.bias, -7.0)


def train_vae(vae: VAE, pool: Pool, held_out: Pool, recipe: Recipe, clock: Clock) -> None:
    """Crops of 64 frames, and whole clips in the last fifth, so that the attention sees both lengths."""
    device = vae.quant_conv.weight.device

    def batch(step: int, generator: torch.Generator) -> Tensor:
        whole = step > 0.8 * recipe.steps
        rows = torch.randint(len(pool), (3 if whole else 8,), generator=generator)
        mel = pool.mel(rows)
        if not whole:
            at = torch.randint(mel.shape[2] - 63, (len(rows),), generator=generator).tolist()
            mel = torch.stack([clip[:, a : a + 64] for clip, a in zip(mel, at)])
        gain = 0.5 * torch.randn(len(mel), 1, 1, 1, generator=generator)
        return torch.where(mel > _FLOOR + 0.01, mel + gain, mel).clamp(min=_FLOOR).to(device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        mel = batch(step, generator)
        posterior = vae.encode(mel)
        return reconstruction_loss(vae.decode(posterior.sample(generator)), mel) + _KL_WEIGHT * kl_divergence(posterior)

    def evaluate() -> dict[str, float]:
        mel = held_out.mel(torch.arange(min(32, len(held_out)))).to(device)
        posterior = vae.encode(mel)
        latents = posterior.sample(torch.Generator().manual_seed(0))
        spread = latents.std(dim=(0, 2, 3)).tolist()
        return {"l1": (vae.decode(latents) - mel).abs().mean(), "std": latents.std()} | {
            f"std{i}": value for i, value in enumerate(spread)} | {"sigma": posterior.std.mean()}

    train("vae", vae, loss, recipe, clock, evaluate, evaluate_every=250)


@torch.no_grad()
def encode_all(vae: VAE, mels: Tensor, seed: int) -> Tensor:
    """Sampled latents of mels (M, 1, T, F) as float16 (M, C, T / f, F / f), not scaled."""
    generator, device = torch.Generator().manual_seed(seed), vae.quant_conv.weight.device
    parts = [vae.encode(part.to(device).float()).sample(generator).half().cpu() for part in mels.split(16)]
    return torch.cat(parts)


@torch.no_grad()
def measure_scaling(vae: VAE, latents: Tensor) -> None:
    """Writes 1 / std of these sampled latents into the VAE's config, where the pipeline and diffusers look for it."""
    vae.config = dataclasses.replace(vae.config, scaling_factor=1.0 / float(latents.float().std()))

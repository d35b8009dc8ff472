"""Variational autoencoder between log-mel spectrograms and latents.

References: "Auto-Encoding Variational Bayes", arXiv:1312.6114; "High-Resolution Image Synthesis with Latent Diffusion
Models", arXiv:2112.10752, appendix G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ldm2 import ops
from ldm2.config import VAEConfig
from ldm2.layers import Conv3x3, Downsample, GroupNorm, GroupNormSiLU, Linear, ResnetBlock, Upsample

_EPS = 1e-6                                                # of every group norm in the VAE


@dataclass(frozen=True)
class Posterior:
    """Normal distribution of latents given a mel: mean and log variance, both (B, C, T, F). Not scaled."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Draws latents (B, C, T, F): mean + std * noise, arXiv:1312.6114 section 2.4.

        The noise is drawn in float32 on the generator's device (the CPU for None, which means torch's own generator).
        A sequence gives each row its own generator. Raises ValueError if there is not one for each row.
        """
        if generator is None or isinstance(generator, torch.Generator):
            noise = _normal(self.mean.shape, generator)
        elif len(generator) != len(self.mean):
            raise ValueError(f"need one generator for each of {len(self.mean)} rows, got {len(generator)}")
        else:
            noise = torch.cat([_normal((1, *self.mean.shape[1:]), each) for each in generator])
        return self.mean + self.std * noise.to(self.mean)


def _normal(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of x (B, C, T, F), beside a skip connection."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=_EPS)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]           # (B, 1 head, T F, C)
        h = self.to_out[0](ops.attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups, _EPS) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """The residual blocks of one resolution, then a step down or up where there is a further level."""

    def __init__(self, in_channels: int, out_channels: int, resnets: int, groups: int, step: str | None):
        super().__init__()
        widths = [in_channels] + [out_channels] * resnets
        self.resnets = nn.ModuleList([ResnetBlock(a, b, groups, _EPS) for a, b in pairwise(widths)])
        if step == "down":
            self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)])
        elif step == "up":
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.step is None:
            return x
        return self.downsamplers[0](x) if self.step == "down" else self.upsamplers[0](x)


class Encoder(nn.Module):
    """Log-mel (B, 1, T, F) -> mean and log variance, stacked: (B, 2 * latent_channels, T / f, F / f), rounded down."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = (config.channels[0], *config.channels)
        last = len(config.channels) - 1
        self.conv_in = Conv3x3(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList([
            Level(widths[i], widths[i + 1], config.resnets, config.norm_groups, None if i == last else "down")
            for i in range(last + 1)
        ])
        self.mid_block = MidBlock(widths[-1], config.norm_groups)
        self.conv_norm_out = GroupNormSiLU(config.norm_groups, widths[-1], eps=_EPS)
        self.conv_out = Conv3x3(widths[-1], 2 * config.latent_channels)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.conv_in(mel)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    """Latents (B, latent_channels, T, F) -> log-mel (B, 1, f * T, f * F)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = (config.channels[-1], *config.channels[::-1])
        last = len(config.channels) - 1
        self.conv_in = Conv3x3(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], config.norm_groups)
        self.up_blocks = nn.ModuleList([
            Level(widths[i], widths[i + 1], config.resnets + 1, config.norm_groups, None if i == last else "up")
            for i in range(last + 1)
        ])
        self.conv_norm_out = GroupNormSiLU(config.norm_groups, widths[-1], eps=_EPS)
        self.conv_out = Conv3x3(widths[-1], config.out_channels)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class VAE(nn.Module):
    """Encoder and decoder with the 1x1 convolutions that stand on either side of the latents."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, mel: Tensor) -> Posterior:
        """Log-mel (B, 1, T, F) -> distribution of unscaled latents (B, C, T / f, F / f), f = config.downsampling.

        Quotients are rounded down. Raises ValueError if the shape does not fit or an axis is shorter than f.
        """
        factor = self.config.downsampling
        self._check("mel", mel, self.config.in_channels, smallest=factor)
        mean, logvar = self.quant_conv(self.encoder(mel)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, C, T, F) -> log-mel (B, 1, f * T, f * F). Raises ValueError if the shape is wrong."""
        self._check("latents", latents, self.config.latent_channels, smallest=1)
        return self.decoder(self.post_quant_conv(latents))

    def _check(self, name: str, x: Tensor, channels: int, smallest: int) -> None:
        if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < smallest:
            raise ValueError(f"{name} must be (B, {channels}, T >= {smallest}, F >= {smallest}), got {tuple(x.shape)}")

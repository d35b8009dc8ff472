"""Convolutional pieces of the UNet and the VAE, and the time embedding.

References: "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, appendix B;
"Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233, section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm2 import ops


def tile_batch(x: Tensor, rows: int) -> Tensor:
    """x (B, ...) tiled along the batch to (rows, ...); x itself where it has that many rows.

    Both branches of classifier-free guidance start from one latent. Tensors that do not yet depend on the conditioning
    stay at B rows and are tiled where they first meet one that has k * B: rows [0:B], [B:2B], ... are the branches.
    """
    if x.shape[0] == rows:
        return x
    return torch.cat([x] * (rows // x.shape[0]))           # which keeps channels last in memory


def weight_of(layer: nn.Module) -> ops.Weight:
    """The weight of a layer as operations take it: a pair where a `weight_scale` beside it says that it holds bytes.

    `rounds_inputs` of a linear layer says that these are to be multiplied with bytes.
    """
    weight: Any = layer.weight
    scale: Any = getattr(layer, "weight_scale", None)
    if scale is None:
        return weight
    return ops.W8A8(weight, scale) if getattr(layer, "rounds_inputs", False) else ops.Int8(weight, scale)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of timesteps t (S,) as float32 (S, dim), cosines first. Raises ValueError if dim is odd."""
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    # At t = 999 one rounding of a frequency moves the angle by 6e-5: this is the order of operations used in training.
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * freqs                                      # (S, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two-layer MLP over sinusoids: timesteps (S,) -> embedding (S, 4 * channels)."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        emb = timestep_embedding(t, self.channels).to(self.linear_1.bias.dtype)
        return self.linear_2(F.silu(self.linear_1(emb)))


class GroupNorm(nn.GroupNorm):
    """Group normalisation: (B, C, ...) -> (B, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class GroupNormSiLU(nn.GroupNorm):
    """SiLU after group normalisation of x (B, C, T, F), to which a shift (B or 1, C) per channel may be added first."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, shift)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add_and_norm(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added, and its normalisation."""
        return ops.add_layer_norm(x, added, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    """Linear map of the last axis: (..., D_in) -> (..., D_out)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, weight_of(self), self.bias)


class Conv3x3(nn.Conv2d):
    """3x3 convolution that keeps T and F: (B, C_in, T, F) -> (B, C_out, T, F), plus a residual where one is given.

    biased: False leaves the bias out, for who adds it elsewhere.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, residual: Tensor | None = None, biased: bool = True) -> Tensor:
        return ops.conv3x3(x, weight_of(self), self.bias if biased else None, residual)


class Conv1x1(nn.Conv2d):
    """One linear map at all positions: (B, C_in, T, F) -> (B, C_out, T, F)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv1x1(x, weight_of(self), self.bias)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a skip connection: (B, C_in, T, F) -> (B, C_out, T, F).

    With `emb_dim`, `time_emb_proj` turns an embedding (rows, emb_dim) into the shift that `forward` takes; it is
    applied outside, once per schedule, because it does not depend on x. So is the bias of `conv1`, which is added at
    the same place: the shift is time_emb_proj(embedding) + conv1.bias.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float, emb_dim: int | None = None):
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, in_channels, eps=eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        if emb_dim is not None:
            self.time_emb_proj = nn.Linear(emb_dim, out_channels)
        self.norm2 = GroupNormSiLU(groups, out_channels, eps=eps)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = Conv1x1(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """shift (1 or B or k * B, C_out) is added to each channel in place of conv1's bias; k * B rows tile the result,
        see `tile_batch`."""
        h = self.conv1(self.norm1(x), biased=shift is None)
        if shift is not None and shift.shape[0] != 1:
            rows = max(h.shape[0], shift.shape[0])
            h, shift = tile_batch(h, rows), tile_batch(shift, rows)
        h = self.norm2(h, shift)                                             # frees conv1's output
        skip = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return self.conv2(h, residual=tile_batch(skip, h.shape[0]))


class Downsample(nn.Module):
    """3x3 convolution of stride 2: halves T and F. `padding` 1 pads each side, 0 only the end of each axis (VAE)."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.conv.padding == (0, 0) else x)


class Upsample(nn.Module):
    """Nearest-neighbour interpolation to `size` (twice T and F where not given), then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = (2 * x.shape[2], 2 * x.shape[3]) if size is None else size
        return self.conv(ops.upsample(x, size))

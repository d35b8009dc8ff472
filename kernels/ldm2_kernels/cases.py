"""Arguments of the operations that have kernels: what tests, benchmarks and checks of a machine run them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = 32
EPS = 1e-5
CONTEXT = 8                                                # vectors of a prompt


@dataclass(frozen=True)
class Sizes:
    """How large the arguments are, for two branches of guidance.

    channels, frames, bins: of a map of the UNet; tokens, heads: of its attention, `channels` wide
    latents: frames of the sampler's state; of the vocoder `mels` bins and `mel_frames` frames at its door, and
    `wave_channels` channels of `wave` samples inside, where a residual block has each of `kernels`
    """

    channels: int
    frames: int
    bins: int
    tokens: int
    heads: int
    latents: int
    mels: int
    mel_frames: int
    wave_channels: int
    wave: int
    kernels: tuple[int, ...] = (3, 7, 11)


FULL = Sizes(channels=256, frames=128, bins=8, tokens=1024, heads=8, latents=256, mels=64, mel_frames=1024,
             wave_channels=128, wave=12_800, kernels=(7,))                   # of a full-size model and 10.24 s
# Odd where nothing forbids it, above what kernels leave to PyTorch as not worth it, and done in milliseconds.
SMALL = Sizes(channels=64, frames=19, bins=7, tokens=45, heads=2, latents=9, mels=32, mel_frames=301, wave_channels=32,
              wave=645)
# Groups that one program of a GPU does not hold.
TALL = Sizes(channels=32, frames=1201, bins=8, tokens=45, heads=2, latents=9, mels=32, mel_frames=301, wave_channels=32,
             wave=645)


def cases(
    device: torch.device, dtype: torch.dtype, sizes: Sizes = SMALL, channels_last: bool = False
) -> dict[str, Callable[[], tuple]]:
    """Name of an operation of `ldm2.ops` -> what makes its arguments, in memory as the models have them.

    channels_last: maps lie so. Only the sampler's state is float32 whatever the dtype.
    """
    generator = torch.Generator().manual_seed(0)           # its own: nothing else that draws is changed

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)

    def weight(*shape: int) -> Tensor:
        """As large as those of a layer that keeps the scale of its input."""
        return new(*shape) / torch.Size(shape[1:]).numel() ** 0.5

    def laid(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    s = sizes
    channels, maps = s.channels, (2, s.channels, s.frames, s.bins)
    tokens, wave, hidden = (2, s.tokens, channels), (1, s.wave_channels, s.wave), 4 * channels
    wider, inside = 3 * channels // 2, s.wave_channels

    def norm() -> tuple[Tensor, Tensor]:
        return new(channels), new(channels)

    def pairs() -> list[Tensor]:
        sizes = [size for size in s.kernels for _ in range(6)]
        return [tensor for size in sizes for tensor in (weight(inside, inside, size), new(inside))]

    return {
        "group_norm_silu": lambda: (laid(new(*maps)), GROUPS, *norm(), EPS, new(2, channels)),
        "group_norm": lambda: (laid(new(*maps)), GROUPS, *norm(), EPS),
        "layer_norm": lambda: (new(*tokens), *norm(), EPS),
        "add_layer_norm": lambda: (new(*tokens), new(*tokens), *norm(), EPS),
        "linear": lambda: (new(*tokens), weight(channels, channels), new(channels)),
        "linear_geglu": lambda: (new(*tokens), weight(2 * hidden, channels), new(2 * hidden)),
        "geglu": lambda: (new(2, s.tokens, hidden), new(2, s.tokens, hidden)),
        "attention": lambda: tuple(new(2, s.heads, s.tokens, channels // s.heads) for _ in range(3)),
        "absorbed_attention": lambda: (
            new(*tokens), new(2, s.heads, CONTEXT, channels) / channels ** 0.5, new(2, channels, s.heads, CONTEXT),
            new(2, 1, 1, CONTEXT), new(channels),
        ),
        "conv3x3": lambda: (laid(new(*maps)), laid(weight(channels, channels, 3, 3)), new(channels), laid(new(*maps))),
        "conv1x1": lambda: (laid(new(2, wider, *maps[2:])), laid(weight(channels, wider, 1, 1)), new(channels)),
        "leaky_relu": lambda: (new(*wave), 0.1),
        "upsample": lambda: (laid(new(*maps)), (2 * s.frames, 2 * s.bins)),
        "conv1d": lambda: (new(1, s.mels, s.mel_frames), weight(8 * inside, s.mels, 7), new(8 * inside)),
        "conv_transpose1d": lambda: (new(1, 2 * inside, s.wave * 2 // 5), weight(2 * inside, inside, 16), new(inside),
                                     4, 6),
        "residual_blocks": lambda: (new(*wave), 0.1, ((1, 3, 5),) * len(s.kernels), *pairs()),
    }

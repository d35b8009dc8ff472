"""HiFi-GAN: log-mel -> waveform.

Reference: "HiFi-GAN: Generative Adversarial Networks for Efficient and High Fidelity Speech Synthesis",
arXiv:2010.05646, section 2.2 (generator with multi-receptive field fusion).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm2 import ops
from ldm2.config import VocoderConfig
from ldm2.layers import weight_of

_LAST_SLOPE = 0.01                                         # before conv_post; not the slope of all other places


class ResidualBlock(nn.Module):
    """Pairs of a dilated and a plain convolution, each pair beside a skip connection; `ops.residual_blocks` runs it."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]):
        super().__init__()
        self.dilations = dilations
        self.convs1 = nn.ModuleList([_same_conv(channels, kernel_size, dilation) for dilation in dilations])
        self.convs2 = nn.ModuleList([_same_conv(channels, kernel_size, 1) for _ in dilations])

    def weights(self) -> list[ops.Weight]:
        """Weight and bias of each pair's first and second convolution."""
        convs = [conv for pair in zip(self.convs1, self.convs2, strict=True) for conv in pair]
        return [parameter for conv in convs for parameter in (weight_of(conv), conv.bias)]


class Vocoder(nn.Module):
    """The generator. Each stage upsamples and averages residual blocks of several kernel sizes."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config = config
        widths = [config.channels // 2**i for i in range(len(config.upsample_rates) + 1)]
        self.conv_pre = nn.Conv1d(config.num_mels, widths[0], 7, padding=3)
        self.upsampler = nn.ModuleList()
        self.resblocks = nn.ModuleList()                   # stage by stage, one per kernel size
        for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)):
            padding = (kernel - rate) // 2
            self.upsampler.append(nn.ConvTranspose1d(widths[i], widths[i + 1], kernel, stride=rate, padding=padding))
            for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilations, strict=True):
                self.resblocks.append(ResidualBlock(widths[i + 1], size, dilations))
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3)
        self.register_buffer("mean", torch.zeros(config.num_mels))
        self.register_buffer("scale", torch.ones(config.num_mels))

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel (B, T, F) or (B, 1, T, F) -> waveform (B, N) in [-1, 1], same dtype.

        N is hop_length * T plus the samples by which the transposed convolutions reach out (32 at 16 kHz, 16 at 48).
        Raises ValueError if F is not the number of mel bins.
        """
        mel = mel.squeeze(1) if mel.dim() == 4 and mel.shape[1] == 1 else mel
        if mel.dim() != 3 or mel.shape[-1] != self.config.num_mels:
            raise ValueError(f"mel must be (B, T, {self.config.num_mels}), got {tuple(mel.shape)}")
        if self.config.normalize_before:
            mel = (mel - self.mean) / self.scale
        x = _same(self.conv_pre, mel.transpose(1, 2))      # (B, T, F) -> (B, C, T)
        for stage in range(len(self.upsampler)):
            x = self.upsample(stage, x)
        return torch.tanh(_same(self.conv_post, ops.leaky_relu(x, _LAST_SLOPE))).squeeze(1)

    def upsample(self, stage: int, x: Tensor) -> Tensor:
        """One stage: (B, C, N) -> (B, C / 2, N times its rate and a few samples more)."""
        slope, count = self.config.leaky_relu_slope, len(self.config.resblock_kernel_sizes)
        up, blocks = self.upsampler[stage], self.resblocks[stage * count : (stage + 1) * count]
        x = ops.conv_transpose1d(ops.leaky_relu(x, slope), weight_of(up), up.bias, up.stride[0], up.padding[0])
        weights = [weight for block in blocks for weight in block.weights()]
        return ops.residual_blocks(x, slope, tuple(block.dilations for block in blocks), *weights)


def _same(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return ops.conv1d(x, weight_of(conv), conv.bias)


def _same_conv(channels: int, kernel_size: int, dilation: int) -> nn.Conv1d:
    """A convolution that keeps the length (kernel_size odd)."""
    return nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding=dilation * (kernel_size - 1) // 2)

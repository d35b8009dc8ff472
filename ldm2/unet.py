"""The denoiser: (x_t, t, conditioning) -> eps.

References: "U-Net", arXiv:1505.04597; "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752;
"AudioLDM 2", arXiv:2308.05734, section III; FiLM: arXiv:1709.07871.

Two things do not depend on x_t and can be computed once: the keys and values of the conditioning (`UNet.prepare`, once
per generation) and the time embeddings (`UNet.embed_time`, once per schedule); `forward` computes whichever it is not
given. `UNet.forward_cached` also returns the features below the first level, and reuses them if they are passed in
(DeepCache).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm2 import ops
from ldm2.attention import Attended, Transformer2D, mask_bias
from ldm2.conditioning import Conditioning
from ldm2.config import UNetConfig, context_index
from ldm2.layers import (
    Conv3x3,
    Downsample,
    GroupNormSiLU,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    tile_batch,
    weight_of,
)

_EPS = 1e-5                                                # of the group norms outside the transformers

Shifts = Iterator[Tensor]                                  # one (rows, C) per ResnetBlock, in order of execution
KeyValues = Iterator[tuple[Attended | None, ...]]          # one entry per Transformer2D, in order of execution


@dataclass(frozen=True)
class PreparedConditioning:
    """A conditioning of `rows` rows, as the layers of one UNet use it."""

    rows: int
    key_values: tuple[tuple[Attended | None, ...], ...]    # per transformer and layer; None = self-attention
    film: Tensor | None                                    # (rows, E), the condition's part of all the shifts


class DownBlock(nn.Module):
    """Layers of one resolution, each of which leaves a skip, then a step down where there is a further level."""

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        channels, count = config.channels[level], config.resnets[level]
        widths = [config.channels[max(level - 1, 0)]] + [channels] * count
        self.resnets = nn.ModuleList([_resnet(config, a, b) for a, b in pairwise(widths)])
        self.contexts = config.context_dims[level] if config.down_attention[level] else ()
        self.attentions = _transformers(config, level, self.contexts * count)
        last = level == len(config.channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels, padding=1)])

    def forward(self, x: Tensor, shifts: Shifts, key_values: KeyValues) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for layer in _layers(self):
            x = _run(layer, x, shifts, key_values)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """One layer and a further residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        channels = config.channels[-1]
        self.resnets = nn.ModuleList([_resnet(config, channels, channels) for _ in range(2)])
        self.contexts = config.context_dims[-1]
        self.attentions = _transformers(config, -1, self.contexts)

    def forward(self, x: Tensor, shifts: Shifts, key_values: KeyValues) -> Tensor:
        for layer in _layers(self):
            x = _run(layer, x, shifts, key_values)
        return x


class UpBlock(nn.Module):
    """Layers of one resolution, each of which takes a skip, then a step up where there is a further level."""

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        channels, count = config.channels[level], config.resnets[level] + 1
        above = config.channels[min(level + 1, len(config.channels) - 1)]
        below = config.channels[max(level - 1, 0)]
        inputs = [above] + [channels] * (count - 1)
        skips = [channels] * (count - 1) + [below]
        self.resnets = nn.ModuleList([_resnet(config, a + b, channels) for a, b in zip(inputs, skips, strict=True)])
        self.contexts = config.context_dims[level] if config.up_attention[level] else ()
        self.attentions = _transformers(config, level, self.contexts * count)
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(channels)])

    def forward(self, x: Tensor, skips: list[Tensor], shifts: Shifts, key_values: KeyValues) -> Tensor:
        """Takes its skips from the end of the list. The next one there tells the size of the step up."""
        for layer in _layers(self):
            skip = tile_batch(skips.pop(), x.shape[0])
            x = _run(layer, torch.cat([x, skip], dim=1), shifts, key_values)
        for upsampler in self.upsamplers:
            x = upsampler(x, size=skips[-1].shape[2:])
        return x


class UNet(nn.Module):
    """The denoiser. Parameter names are those of the published files."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        levels = range(len(config.channels))
        self.conv_in = Conv3x3(config.in_channels, config.channels[0])
        self.time_embedding = TimestepEmbedding(config.channels[0])
        self.class_embedding = None if config.film_dim is None else nn.Linear(config.film_dim, config.time_dim)
        self.down_blocks = nn.ModuleList([DownBlock(config, level) for level in levels])
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList([UpBlock(config, level) for level in reversed(levels)])
        self.conv_norm_out = GroupNormSiLU(config.norm_groups, config.channels[0], eps=_EPS)
        self.conv_out = Conv3x3(config.channels[0], config.out_channels)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor | float,
        conditioning: Conditioning | PreparedConditioning,
        time: Tensor | None = None,
    ) -> Tensor:
        """Predicts the noise in x_t (B, C, T, F), any T and F.

        t is one time step or one per row (B,). `time` holds rows of `embed_time` for it, (1 or B, E), computed here if
        None. The conditioning has k * B rows (k = 2 for guidance): rows [0:B] are one branch, [B:2B] the next, and so
        is the result (k * B, C, T, F); what the branches share is computed once. Raises ValueError if shapes disagree.
        """
        return self.forward_cached(x_t, t, conditioning, time)[0]

    def forward_cached(
        self,
        x_t: Tensor,
        t: Tensor | float,
        conditioning: Conditioning | PreparedConditioning,
        time: Tensor | None = None,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `forward`: the result, and the deep features (k * B, C, T, F) that enter the last up block.

        features: those of an earlier call on the same conditioning; if given, only the first level is computed. That is
        the branch of DeepCache, arXiv:2312.00858, section 3.2.
        """
        prepared = conditioning if isinstance(conditioning, PreparedConditioning) else self.prepare(conditioning)
        time = self.embed_time(t) if time is None else time
        self._check(x_t, time, prepared)
        first, last = self.down_blocks[0], self.up_blocks[-1]
        shifts, key_values = self._shifts(time, prepared), prepared.key_values
        outer, inner = len(last.resnets), len(key_values) - len(last.attentions)
        ahead = iter(shifts), iter(key_values)
        skips = [self.conv_in(x_t)]
        skips += first(skips[0], *ahead)[1]
        if features is None:
            features = self._deep_levels(skips, *ahead)
        else:
            del skips[outer:]
        x = last(features, skips, iter(shifts[-outer:]), iter(key_values[inner:]))
        return tile_batch(self.conv_out(self.conv_norm_out(x)), prepared.rows), features

    def _deep_levels(self, skips: list[Tensor], shifts: Shifts, key_values: KeyValues) -> Tensor:
        """All but the first level, on the last of its skips: what enters the last up block. Leaves it its own skips."""
        x = skips[-1]
        for block in [*self.down_blocks][1:]:
            x, more = block(x, shifts, key_values)
            skips += more
        x = self.mid_block(x, shifts, key_values)
        for block in [*self.up_blocks][:-1]:
            x = block(x, skips, shifts, key_values)
        return x

    def prepare(self, conditioning: Conditioning) -> PreparedConditioning:
        """Keys and values of all contexts, and the FiLM condition's part of the shifts, for a whole generation.

        Raises ValueError if the conditioning does not bring what this UNet was made for.
        """
        self._check_conditioning(conditioning)
        contexts = conditioning.contexts
        biases = [mask_bias(mask, context) for context, mask in zip(contexts, conditioning.masks, strict=True)]
        key_values = []
        for block in self._blocks():
            for i, transformer in enumerate(block.attentions):
                place = context_index(i % len(block.contexts))
                if transformer.context_dim is None:
                    key_values.append((None,) * len(transformer.transformer_blocks))
                else:
                    key_values.append(transformer.project_kv(contexts[place], biases[place]))
        film = None
        if conditioning.film is not None:
            emb = F.silu(self.class_embedding(conditioning.film))            # (rows, time_dim)
            parts = [F.linear(emb, weight[:, self.config.time_dim :]) for weight, _ in self._projected(emb.dtype)]
            film = torch.cat(parts, dim=1)
        return PreparedConditioning(conditioning.batch_size, tuple(key_values), film)

    def embed_time(self, timesteps: Tensor | float) -> Tensor:
        """What the time steps (S,) or one of them add inside all residual blocks, side by side: (S, E).

        The embedding is silu'd and projected by each block: time_emb_proj(silu([time, film])) is a sum of two parts,
        of which this is the one that does not depend on the condition (it holds the bias).
        """
        timesteps = torch.as_tensor(timesteps, dtype=torch.float32, device=self.conv_in.weight.device).reshape(-1)
        emb = F.silu(self.time_embedding(timesteps))                         # (S, time_dim)
        width = self.config.time_dim
        parts = [F.linear(emb, weight[:, :width], bias) for weight, bias in self._projected(emb.dtype)]
        return torch.cat(parts, dim=1)

    def _blocks(self) -> list[DownBlock | MidBlock | UpBlock]:
        """The blocks of the UNet in order of execution: down, middle, up."""
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def _projected(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Weight and bias of the projections, one after the other. The bias is that of the convolution before as well:
        see ResnetBlock."""
        return ((ops.dense(weight_of(resnet.time_emb_proj), dtype), resnet.time_emb_proj.bias + resnet.conv1.bias)
                for resnet in self._resnets())

    def _resnets(self) -> list[ResnetBlock]:
        return [resnet for block in self._blocks() for resnet in block.resnets]

    def _shifts(self, time: Tensor, prepared: PreparedConditioning) -> tuple[Tensor, ...]:
        if prepared.film is not None:
            time = prepared.film + (time if len(time) == 1 else tile_batch(time, prepared.rows))
        return time.split([resnet.conv1.out_channels for resnet in self._resnets()], dim=1)

    def _check(self, x_t: Tensor, time: Tensor, prepared: PreparedConditioning) -> None:
        if x_t.dim() != 4 or x_t.shape[1] != self.config.in_channels:
            raise ValueError(f"x_t must be (B, {self.config.in_channels}, T, F), got {tuple(x_t.shape)}")
        if len(time) not in (1, len(x_t)):
            raise ValueError(f"t must be one time step or one for each of {len(x_t)} rows, got {len(time)}")
        if prepared.rows % len(x_t):
            raise ValueError(f"conditioning must have a multiple of {len(x_t)} rows, got {prepared.rows}")

    def _check_conditioning(self, conditioning: Conditioning) -> None:
        widths = tuple(context.shape[-1] for context in conditioning.contexts)
        if widths != self.config.context_widths:
            raise ValueError(f"contexts must be {list(self.config.context_widths)} wide, got {list(widths)}")
        film = conditioning.film
        if self.config.film_dim is None and film is not None:
            raise ValueError(f"this UNet takes no FiLM condition, got one {film.shape[-1]} wide")
        if self.config.film_dim is not None and (film is None or film.shape[-1] != self.config.film_dim):
            got = "none" if film is None else film.shape[-1]
            raise ValueError(f"the FiLM condition must be {self.config.film_dim} wide, got {got}")


def _resnet(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    emb_dim = config.time_dim * (1 if config.film_dim is None else 2)
    return ResnetBlock(in_channels, out_channels, config.norm_groups, _EPS, emb_dim)


def _transformers(config: UNetConfig, level: int, widths: tuple[int | None, ...]) -> nn.ModuleList:
    sizes = config.channels[level], config.num_heads[level], config.transformer_depth[level]
    return nn.ModuleList([Transformer2D(*sizes, width, config.norm_groups) for width in widths])


def _layers(block: DownBlock | MidBlock | UpBlock) -> list[tuple[ResnetBlock, list[Transformer2D]]]:
    """Each residual block with the transformers after it (none after the middle block's second)."""
    count, attentions = len(block.contexts), list(block.attentions)
    return [(resnet, attentions[i * count : (i + 1) * count]) for i, resnet in enumerate(block.resnets)]


def _run(layer: tuple[ResnetBlock, list[Transformer2D]], x: Tensor, shifts: Shifts, key_values: KeyValues) -> Tensor:
    resnet, transformers = layer
    x = resnet(x, next(shifts))
    for transformer in transformers:
        x = transformer(x, next(key_values))
    return x

"""Transformers over the positions of a feature map, with one optional sequence of context each.

References: "Attention Is All You Need", arXiv:1706.03762; "High-Resolution Image Synthesis with Latent Diffusion
Models", arXiv:2112.10752, section 3.3; the gated feed-forward layer is GEGLU of arXiv:2002.05202.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm2 import ops
from ldm2.layers import GroupNorm, LayerNorm, Linear, tile_batch, weight_of

# Positions at most to which projections are absorbed. Kernels of a GPU hold the scores of all heads of a query.
_MOST_ON_GPU, _MOST = 32, 64


@dataclass(frozen=True)
class KeyValue:
    """What one attention attends to: keys and values (B, H, L, D), bias (B, 1, 1, L) on the scores or None."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None

    def lengthened(self, length: int, bias: Tensor) -> KeyValue:
        """With positions added up to a length; `bias` is that of all."""
        extra = (0, 0, 0, length - self.keys.shape[2])
        return KeyValue(F.pad(self.keys, extra), F.pad(self.values, extra), bias)


@dataclass(frozen=True)
class AbsorbedKeyValue:
    """The same for few positions (L <= D), with the projections of queries and outputs multiplied in.

    (x W_q) k^T is x (W_q k^T), and (p v) W_out is p (v W_out): with L <= D both products on the right are smaller than
    the matrices of the layer, and they are the same for all steps of a generation.
    keys: (B, H, L, C), divided by sqrt(D); values: (B, C, H, L); bias as in KeyValue. On a CPU positions lie before
    heads in memory: the kernel there cuts off those at the end that are masked.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None

    def lengthened(self, length: int, bias: Tensor) -> AbsorbedKeyValue:
        """As of KeyValue."""
        extra = length - self.keys.shape[2]
        return AbsorbedKeyValue(F.pad(self.keys, (0, 0, 0, extra)), F.pad(self.values, (0, extra)), bias)


Attended = KeyValue | AbsorbedKeyValue


def mask_bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """The bias on attention scores for a mask (B, L) with 1 = keep and 0 = drop: (B, 1, 1, L), None if all is kept.

    A dropped position gets -10000: its weight underflows to exactly 0 in each dtype, while a row that keeps nothing
    attends as if it were not masked (as in diffusers) instead of giving NaN.
    """
    if mask is None or bool(mask.all()):
        return None
    return (1 - mask.to(like.dtype))[:, None, None, :] * -10_000.0


class Attention(nn.Module):
    """Multi-head attention of x (B, Q, C) to itself or to a context (B, L, context_dim) -> (B, Q, C)."""

    def __init__(self, channels: int, num_heads: int, context_dim: int | None = None):
        super().__init__()
        self.num_heads, self.may_fuse_qkv, self.qkv_fused = num_heads, context_dim is None, False
        context_dim = channels if context_dim is None else context_dim
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_dim, channels, bias=False)
        self.to_v = Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def project_kv(self, context: Tensor, bias: Tensor | None = None) -> KeyValue:
        """Keys and values of a context (B, L, context_dim)."""
        return KeyValue(self._split(self.to_k(context)), self._split(self.to_v(context)), bias)

    def absorb(self, kv: KeyValue) -> Attended:
        """Keys and values as `forward` takes them fastest: with the layer's own projections in them where that is less
        work, for weights that stay as they are until `forward` is called."""
        projections, (length, width) = (self.to_q, self.to_out[0]), kv.keys.shape[2:]
        if torch.is_grad_enabled() or length > min(width, _MOST_ON_GPU if kv.keys.is_cuda else _MOST):
            return kv
        if not all(map(_is_plain, projections)):
            return kv
        dtype, wide = kv.keys.dtype, torch.promote_types(kv.keys.dtype, torch.float32)
        keys, values = kv.keys.to(wide), kv.values.to(wide)
        asks, gives = (ops.dense(weight_of(layer), wide).to(wide) for layer in projections)
        asks = asks.unflatten(0, (self.num_heads, -1)) * keys.shape[3] ** -0.5
        gives = gives.unflatten(1, (self.num_heads, -1))
        keys, values = torch.einsum("bhld,hdc->bhlc", keys, asks), torch.einsum("bhld,chd->bchl", values, gives)
        if keys.is_cuda:
            return AbsorbedKeyValue(keys.to(dtype).contiguous(), values.to(dtype).contiguous(), kv.bias)
        return AbsorbedKeyValue(keys.transpose(1, 2).to(dtype).contiguous().transpose(1, 2),
                                values.mT.to(dtype).contiguous().mT, kv.bias)

    def fuse_qkv(self) -> None:
        """Lay the weights of q, k and v one after the other, as one matrix. They stay three parameters."""
        if self.may_fuse_qkv:
            layers = self.to_q, self.to_k, self.to_v
            joint = torch.cat([layer.weight.detach() for layer in layers])
            for layer, weight in zip(layers, joint.chunk(3), strict=True):
                layer.weight.data = weight                 # the same parameter, which an optimiser may hold
            self.qkv_fused = True

    def forward(self, x: Tensor, kv: Attended | None = None) -> Tensor:
        """Attends to `kv`, to x itself if None. Keys of k * B rows tile the B rows of x."""
        if isinstance(kv, AbsorbedKeyValue):
            x = tile_batch(x, kv.keys.shape[0])
            return ops.absorbed_attention(x, kv.keys, kv.values, kv.bias, self.to_out[0].bias)
        joint = self._fused_qkv() if kv is None else None
        if joint is not None:
            q, keys, values = map(self._split, ops.linear(x, joint).chunk(3, dim=-1))
            kv = KeyValue(keys, values)
        else:
            kv = self.project_kv(x) if kv is None else kv
            q = tile_batch(self._split(self.to_q(x)), kv.keys.shape[0])
        out = ops.attention(q, kv.keys, kv.values, kv.bias)      # (B, H, Q, D)
        return self.to_out[0](out.transpose(1, 2).flatten(2))                # (B, Q, C)

    def _fused_qkv(self) -> Tensor | None:
        """The fused QKV weight (3 C, C) as a view while the three are adjacent in one storage, else None."""
        if not self.qkv_fused or torch.compiler.is_compiling():
            return None
        parts = [layer.weight for layer in (self.to_q, self.to_k, self.to_v)]
        first = parts[0]
        together = all(
            part.is_contiguous() and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and part.storage_offset() == first.storage_offset() + i * first.numel() for i, part in enumerate(parts)
        )
        if not together or (torch.is_grad_enabled() and any(part.requires_grad for part in parts)):
            return None
        return first.as_strided((3 * first.shape[0], first.shape[1]), (first.shape[1], 1))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)         # (B, L, C) -> (B, H, L, D)


class GEGLU(nn.Module):
    """One linear layer to twice the width; its first half is gated by the GELU of the second."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_geglu(x, weight_of(self.proj), self.proj.bias)


class FeedForward(nn.Module):
    """GEGLU of four times the width, then back: (B, L, C) -> (B, L, C)."""

    def __init__(self, channels: int):
        super().__init__()
        # Place 1 of the list is the dropout of the published implementation: no parameters, nothing at inference.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context (or a second self-attention), feed-forward: (B, L, C) -> (B, L, C)."""

    def __init__(self, channels: int, num_heads: int, context_dim: int | None):
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, num_heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, num_heads, context_dim)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, kv: Attended | None) -> Tensor:
        """x (B, L, C), keys of k * B rows -> (k * B, L, C)."""
        absorbed = isinstance(kv, AbsorbedKeyValue)
        if not (absorbed and x.is_cuda) and (parameters := self._parameters_in_order()) is not None:
            context = None if kv is None else (kv.keys, kv.values, kv.bias)
            y = ops.at_once("transformer_block", x, self.attn1.num_heads, self.norm1.eps, context, absorbed, parameters)
            if y is not NotImplemented:
                return y
        x, h = self.norm2.add_and_norm(x, self.attn1(self.norm1(x)))
        attended = self.attn2(h, kv)
        x, h = self.norm3.add_and_norm(tile_batch(x, attended.shape[0]), attended)
        return x + self.ff(h)

    def _parameters_in_order(self) -> list[ops.Weight] | None:
        """Weight and bias of each layer in order of use; None where a layer is not what it was, or is watched."""
        parameters: list[Any] = []
        first, second, widening, _, narrowing = self.attn1, self.attn2, *self.ff.net
        parts: list[Any] = [
            self.norm1, first.to_q, first.to_k, first.to_v, first.to_out[0],
            self.norm2, second.to_q, second.to_k, second.to_v, second.to_out[0],
            self.norm3, widening.proj, narrowing,
        ]
        if not all(map(_is_plain, (first, second, self.ff, widening, *parts))):
            return None
        for part in parts:
            parameters.append(weight_of(part))
            if part.bias is not None:
                parameters.append(part.bias)
        return parameters


_PLAIN = {Attention, FeedForward, GEGLU, LayerNorm, Linear, nn.Linear}


def _is_plain(part: nn.Module) -> bool:
    """Whether the weights of a layer are all there is to it: it is what it was, and nobody watches its calls."""
    return type(part) in _PLAIN and not part._forward_hooks and not part._forward_pre_hooks


class Transformer2D(nn.Module):
    """Transformer blocks over the T * F positions of x (B, C, T, F), beside a skip connection.

    `context_dim` None makes both attentions of each block self-attention.
    """

    def __init__(self, channels: int, num_heads: int, depth: int, context_dim: int | None, groups: int):
        super().__init__()
        self.context_dim = context_dim
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, num_heads, context_dim) for _ in range(depth)]
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def project_kv(self, context: Tensor, bias: Tensor | None) -> tuple[Attended, ...]:
        """Keys and values of a context (B, L, context_dim) for each block."""
        layers = [block.attn2 for block in self.transformer_blocks]
        return tuple(layer.absorb(layer.project_kv(context, bias)) for layer in layers)

    def forward(self, x: Tensor, key_values: tuple[Attended | None, ...]) -> Tensor:
        """One of `project_kv` per block, None for self-attention; k * B rows of keys give k * B rows of output."""
        h = self.norm(x).flatten(2).transpose(1, 2)                          # (B, C, T, F) -> (B, T F, C)
        h = _pointwise(self.proj_in, h)
        for block, kv in zip(self.transformer_blocks, key_values, strict=True):
            h = block(h, kv)
        h = _pointwise(self.proj_out, h)
        return tile_batch(x, h.shape[0]) + h.transpose(1, 2).unflatten(2, x.shape[2:])


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution applied to positions (B, L, C): as one matrix product it leaves them dense in memory."""
    weight = weight_of(conv)
    return ops.linear(x, weight.as_matrix() if isinstance(weight, ops.Int8) else weight.flatten(1), conv.bias)

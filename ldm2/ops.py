"""The operations that models call by name, so that a faster implementation can take their place.

Each function here is the definition of correct: plain PyTorch, any device, any floating dtype, differentiable.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group normalisation of x (B, C, ...) over each of `num_groups` groups of channels, arXiv:1803.08494."""
    return F.group_norm(x, num_groups, weight, bias, eps)


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None
) -> Tensor:
    """SiLU(group_norm(x + shift)): x (B, C, T, F), shift (B, C) or (1, C), for one value per channel, or None."""
    if shift is not None:
        x = x + shift[:, :, None, None]
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps), inplace=True)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation of x (..., D) over its last axis, arXiv:1607.06450."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def geglu(x: Tensor, gate: Tensor) -> Tensor:
    """x * GELU(gate) with the exact (erf) GELU, arXiv:2002.05202. Both (..., D) -> (..., D)."""
    return x * F.gelu(gate)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, arXiv:1706.03762 Eq. 1.

    q (B, H, Q, D), k and v (B, H, L, D), bias broadcastable to (B, H, Q, L) in q's dtype -> (B, H, Q, D).
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """x where x is positive, slope * x elsewhere."""
    return F.leaky_relu(x, slope)

"""Convolutions of maps on CUDA: cuDNN's with bias and residual in one pass after it, and 1x1 ones as matrix products,
whose epilogue adds the bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm2_kernels.combine import combine
from ldm2_kernels.layout import layout_of


@torch.library.custom_op(
    "ldm2::add_bias_residual", mutates_args=(), schema="(Tensor y, Tensor bias, Tensor residual) -> Tensor"
)
def _add_bias_residual(y, bias, residual):
    layout = layout_of(y)
    y, residual = y.contiguous(memory_format=layout), residual.contiguous(memory_format=layout)
    total = torch.empty_like(y, memory_format=layout)
    combine(y, bias, layout == torch.channels_last, residual, sums=total)
    return total


@_add_bias_residual.register_fake
def _(y, bias, residual):
    return torch.empty_like(y, memory_format=layout_of(y))


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """`ops.conv3x3`; the sum with bias and residual is rounded once."""
    if residual is None:
        return F.conv2d(x, weight, bias, padding=1)
    if bias is None:
        return NotImplemented
    return _add_bias_residual(F.conv2d(x, weight, padding=1), bias, residual)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`ops.conv1x1`, in the layout of x."""
    if layout_of(x) != torch.channels_last:
        return F.conv2d(x, weight, bias)
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)

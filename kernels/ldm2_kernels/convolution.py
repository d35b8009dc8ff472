"""What follows a convolution on CUDA: its bias and the residual in one pass, in Triton, as cuDNN adds neither; and 1x1
convolutions as matrix products, whose epilogue adds the bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ldm2_kernels.layout import layout_of

BLOCK = 2048


@triton.jit
def _add(y, bias, residual, total, positions, size, CHANNELS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    block, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    n = block * BLOCK + lane
    if LAST:                                               # so that the compiler sees that neighbours lie together
        channel = ((block * BLOCK % CHANNELS).to(tl.int32) + lane) % CHANNELS
    else:
        channel = (n // positions % CHANNELS).to(tl.int32)
    value = tl.load(y + n, mask=n < size, other=0.0).to(tl.float32)
    value += tl.load(bias + channel).to(tl.float32)
    value += tl.load(residual + n, mask=n < size, other=0.0).to(tl.float32)
    tl.store(total + n, value, mask=n < size)


@torch.library.custom_op(
    "ldm2::add_bias_residual", mutates_args=(), schema="(Tensor y, Tensor bias, Tensor residual) -> Tensor"
)
def _add_bias_residual(y, bias, residual):
    layout = layout_of(y)
    y, residual = y.contiguous(memory_format=layout), residual.contiguous(memory_format=layout)
    total, size = torch.empty_like(y, memory_format=layout), y.numel()
    with torch.cuda.device_of(y):
        _add[(triton.cdiv(size, BLOCK),)](
            y, bias, residual, total, y[0, 0].numel(), size, CHANNELS=y.shape[1], LAST=layout == torch.channels_last,
            BLOCK=BLOCK, num_warps=8,
        )
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

"""What follows a call of the UNet: guidance and the sampler's update, in Triton: `ops.guide` and `ops.axpby`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _guide_kernel(prediction, y, scale, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    negative = tl.load(prediction + n, mask=n < size, other=0.0).to(tl.float32)
    positive = tl.load(prediction + size + n, mask=n < size, other=0.0).to(tl.float32)
    tl.store(y + n, negative + scale * (positive - negative), mask=n < size)


@triton.jit
def _axpby_kernel(x, y, z, a, b, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = a * tl.load(x + n, mask=n < size, other=0.0).to(tl.float32)
    tl.store(z + n, value + b * tl.load(y + n, mask=n < size, other=0.0).to(tl.float32), mask=n < size)


@torch.library.custom_op("ldm2::guide", mutates_args=(), schema="(Tensor prediction, float scale) -> Tensor")
def _guide(prediction, scale):
    prediction = prediction.contiguous()
    y = torch.empty_like(prediction[: len(prediction) // 2], dtype=torch.float32)
    with torch.cuda.device_of(y):
        _guide_kernel[(triton.cdiv(y.numel(), BLOCK),)](prediction, y, scale, y.numel(), BLOCK=BLOCK, num_warps=4)
    return y


@_guide.register_fake
def _(prediction, scale):
    return prediction.new_empty(prediction.shape[0] // 2, *prediction.shape[1:], dtype=torch.float32)


@torch.library.custom_op("ldm2::axpby", mutates_args=(), schema="(float a, Tensor x, float b, Tensor y) -> Tensor")
def _axpby(a, x, b, y):
    x, y = x.contiguous(), y.contiguous()
    z = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _axpby_kernel[(triton.cdiv(z.numel(), BLOCK),)](x, y, z, a, b, z.numel(), BLOCK=BLOCK, num_warps=4)
    return z


@_axpby.register_fake
def _(a, x, b, y):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def guide(prediction: Tensor, scale: float) -> Tensor:
    """`ops.guide` for an even number of rows."""
    return _guide(prediction, scale) if prediction.shape[0] % 2 == 0 else NotImplemented


def axpby(a: float, x: Tensor, b: float, y: Tensor) -> Tensor:
    """`ops.axpby` for tensors of one shape, rounded once."""
    return _axpby(a, x, b, y) if x.shape == y.shape else NotImplemented

"""What follows a call of the UNet, in Triton: guidance (`ops.guide`), or guidance and the sampler's update at once
(`ops.axpby`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _guided(prediction, n, scale, size, GUIDED: tl.constexpr):
    value = tl.load(prediction + n, mask=n < size, other=0.0).to(tl.float32)
    if GUIDED:
        value += scale * (tl.load(prediction + size + n, mask=n < size, other=0.0).to(tl.float32) - value)
    return value


@triton.jit
def _guide_kernel(prediction, y, scale, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + n, _guided(prediction, n, scale, size, True), mask=n < size)


@triton.jit
def _axpby_kernel(x, y, z, a, b, scale, size, GUIDED: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = a * tl.load(x + n, mask=n < size, other=0.0).to(tl.float32)
    tl.store(z + n, value + b * _guided(y, n, scale, size, GUIDED), mask=n < size)


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


@torch.library.custom_op(
    "ldm2::axpby", mutates_args=(), schema="(float a, Tensor x, float b, Tensor y, float? scale) -> Tensor"
)
def _axpby(a, x, b, y, scale):
    x, y = x.contiguous(), y.contiguous()
    z = torch.empty_like(x)
    grid = (triton.cdiv(z.numel(), BLOCK),)
    with torch.cuda.device_of(x):
        _axpby_kernel[grid](x, y, z, a, b, scale, z.numel(), GUIDED=scale is not None, BLOCK=BLOCK, num_warps=4)
    return z


@_axpby.register_fake
def _(a, x, b, y, scale):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def guide(prediction: Tensor, scale: float | None) -> Tensor:
    """`ops.guide` for an even number of rows, or for one branch."""
    if scale is None:
        return prediction.float()
    return _guide(prediction, scale) if prediction.shape[0] % 2 == 0 else NotImplemented


def axpby(a: float, x: Tensor, b: float, y: Tensor, scale: float | None = None) -> Tensor:
    """`ops.axpby` for float32 x, rounded once, where y or its guided half has the shape of x."""
    shape = (len(x) * (1 if scale is None else 2), *x.shape[1:])
    return _axpby(a, x, b, y, scale) if x.dtype == torch.float32 and y.shape == shape else NotImplemented

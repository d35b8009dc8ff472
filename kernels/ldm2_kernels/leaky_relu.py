"""Sums of the vocoder's residual blocks with what follows them, in Triton: `ops.add_leaky_relu` and `ops.add_up`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _activate(x, added, sums, y, slope, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + n, mask=n < size, other=0.0).to(tl.float32)
    value += tl.load(added + n, mask=n < size, other=0.0).to(tl.float32)
    tl.store(sums + n, value, mask=n < size)
    tl.store(y + n, tl.where(value > 0, value, slope * value), mask=n < size)


@triton.jit
def _add(x, added, total, y, count, size, TOTAL: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + n, mask=n < size, other=0.0).to(tl.float32)
    value += tl.load(added + n, mask=n < size, other=0.0).to(tl.float32)
    if TOTAL:
        value += tl.load(total + n, mask=n < size, other=0.0).to(tl.float32)
    tl.store(y + n, value / count, mask=n < size)


@torch.library.custom_op(
    "ldm2::add_leaky_relu", mutates_args=(), schema="(Tensor x, Tensor added, float slope) -> (Tensor, Tensor)"
)
def _add_leaky_relu(x, added, slope):
    x, added = x.contiguous(), added.contiguous()
    sums, y, size = torch.empty_like(x), torch.empty_like(x), x.numel()
    with torch.cuda.device_of(x):
        _activate[(triton.cdiv(size, BLOCK),)](x, added, sums, y, slope, size, BLOCK=BLOCK, num_warps=4)
    return sums, y


@_add_leaky_relu.register_fake
def _(x, added, slope):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))


@torch.library.custom_op(
    "ldm2::add_up", mutates_args=(), schema="(Tensor x, Tensor added, Tensor? total, int count) -> Tensor"
)
def _add_up(x, added, total, count):
    x, added = x.contiguous(), added.contiguous()
    total = None if total is None else total.contiguous()
    y, size = torch.empty_like(x), x.numel()
    with torch.cuda.device_of(x):
        _add[(triton.cdiv(size, BLOCK),)](x, added, total, y, count, size, TOTAL=total is not None, BLOCK=BLOCK,
                                          num_warps=4)
    return y


@_add_up.register_fake
def _(x, added, total, count):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def add_leaky_relu(x: Tensor, added: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """`ops.add_leaky_relu` for tensors of one shape. Only the returned sum is rounded."""
    return _add_leaky_relu(x, added, slope) if x.shape == added.shape else NotImplemented


def add_up(x: Tensor, added: Tensor, total: Tensor | None = None, count: int = 1) -> Tensor:
    """`ops.add_up` for tensors of one shape, rounded once."""
    if x.shape != added.shape or (total is not None and total.shape != x.shape):
        return NotImplemented
    return _add_up(x, added, total, count)

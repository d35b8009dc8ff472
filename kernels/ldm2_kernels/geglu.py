"""x * GELU(gate) in one pass over the two halves of a linear layer's output, in Triton: see `ops.geglu`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _kernel(x, gate, y, x_stride, gate_stride, width, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = n // width, n % width
    value = tl.load(x + row * x_stride + column, mask=n < size, other=0.0).to(tl.float32)
    opened = tl.load(gate + row * gate_stride + column, mask=n < size, other=0.0).to(tl.float32)
    opened *= 0.5 * (1.0 + tl.erf(opened * 0.7071067811865476))
    tl.store(y + n, value * opened, mask=n < size)


@torch.library.custom_op("ldm2::geglu", mutates_args=(), schema="(Tensor x, Tensor gate) -> Tensor")
def _geglu(x, gate):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, gate = _rows(x), _rows(gate)
    with torch.cuda.device_of(x):
        _kernel[(triton.cdiv(y.numel(), BLOCK),)](x, gate, y, x.stride(0), gate.stride(0), x.shape[1], y.numel(),
                                                  BLOCK=BLOCK, num_warps=4)
    return y


def _rows(x: Tensor) -> Tensor:
    """(..., D) as (rows, D) with dense rows; the halves of a layer's output stay where they are."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@_geglu.register_fake
def _(x, gate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def geglu(x: Tensor, gate: Tensor) -> Tensor:
    """`ops.geglu` for tensors of one shape."""
    return _geglu(x, gate) if x.shape == gate.shape else NotImplemented

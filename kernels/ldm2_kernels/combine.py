"""What follows a convolution on CUDA, in one pass in Triton: its bias, residuals, an activation. cuDNN adds none."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _kernel(
    h, bias, x, total, sums, activated, slope, count, positions, size, CHANNELS: tl.constexpr,
    X: tl.constexpr, TOTAL: tl.constexpr, SUM: tl.constexpr, ACTIVATE: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(h + bias + x + total) / count, itself and its leaky ReLU, whichever of them are there and asked for."""
    block, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    n = block * BLOCK + lane
    if LAST:                                               # so that the compiler sees that neighbors lie together
        channel = ((block * BLOCK % CHANNELS).to(tl.int32) + lane) % CHANNELS
    else:
        channel = (n // positions % CHANNELS).to(tl.int32)
    value = tl.load(h + n, mask=n < size, other=0.0).to(tl.float32) + tl.load(bias + channel).to(tl.float32)
    if X:
        value += tl.load(x + n, mask=n < size, other=0.0).to(tl.float32)
    if TOTAL:
        value += tl.load(total + n, mask=n < size, other=0.0).to(tl.float32)
    if SUM:
        tl.store(sums + n, value / count, mask=n < size)
    if ACTIVATE:
        tl.store(activated + n, tl.where(value > 0, value, slope * value), mask=n < size)


def combine(
    h: Tensor, bias: Tensor, last: bool, x: Tensor | None = None, total: Tensor | None = None, *,
    sums: Tensor | None = None, activated: Tensor | None = None, slope: float = 0.0, count: int = 1,
) -> None:
    """Fill `sums` with (h + bias + x + total) / count and `activated` with the leaky ReLU of the sum, where given.

    h (B, C, ...) and what has its shape are dense and lie alike, with the channels last in memory if `last` says so.
    """
    with torch.cuda.device_of(h):
        _kernel[(triton.cdiv(h.numel(), BLOCK),)](
            h, bias, x, total, sums, activated, slope, count, h[0, 0].numel(), h.numel(), CHANNELS=h.shape[1],
            X=x is not None, TOTAL=total is not None, SUM=sums is not None, ACTIVATE=activated is not None, LAST=last,
            BLOCK=BLOCK, num_warps=4,
        )

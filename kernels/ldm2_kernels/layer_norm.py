"""Layer normalisation, and that of a sum, in one pass, in Triton: see `ops.layer_norm` and `ops.add_layer_norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 8192                                              # elements of a row, which one program holds


@triton.jit
def _kernel(
    x, added, weight, bias, total, y, rows, width, eps, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    place = row * width + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + place, value, mask=inside)
    mean = tl.sum(value, axis=1)[:, None] / width
    difference = tl.where(inside, value - mean, 0.0)
    variance = tl.sum(difference * difference, axis=1)[:, None] / width
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(y + place, difference * tl.rsqrt(variance + eps) * scale + shift, mask=inside)


def _launch(x, added, weight, bias, total, y, eps):
    width = x.shape[-1]
    rows, block = x.numel() // width, triton.next_power_of_2(width)
    at_once = max(1, min(16, 4096 // block))
    with torch.cuda.device_of(x):
        _kernel[(triton.cdiv(rows, at_once),)](x, added, weight, bias, total, y, rows, width, eps,
                                               ADD=added is not None, ROWS=at_once, BLOCK=block, num_warps=4)


@torch.library.custom_op(
    "ldm2::layer_norm", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor"
)
def _layer_norm(x, weight, bias, eps):
    x = x.contiguous()
    y = torch.empty_like(x)
    _launch(x, None, weight, bias, None, y, eps)
    return y


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "ldm2::add_layer_norm", mutates_args=(),
    schema="(Tensor x, Tensor added, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
)
def _add_layer_norm(x, added, weight, bias, eps):
    x, added = x.contiguous(), added.contiguous()
    total, y = torch.empty_like(x), torch.empty_like(x)
    _launch(x, added, weight, bias, total, y, eps)
    return total, y


@_add_layer_norm.register_fake
def _(x, added, weight, bias, eps):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`ops.layer_norm` for rows up to WIDEST wide."""
    return NotImplemented if x.shape[-1] > WIDEST else _layer_norm(x, weight, bias, eps)


def add_layer_norm(x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`ops.add_layer_norm` for tensors of one shape, up to WIDEST wide. Only the returned sum is rounded."""
    if x.shape != added.shape or x.shape[-1] > WIDEST:
        return NotImplemented
    return _add_layer_norm(x, added, weight, bias, eps)

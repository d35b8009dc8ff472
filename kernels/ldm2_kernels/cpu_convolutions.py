"""Convolutions on the CPU, by the operators that `cpu` finds: Winograd transforms, arXiv:1509.09308, which take a half
to a quarter of the multiplications.

The error of float32 convolutions against float64 is larger than that of direct ones, but stays below 3e-6 of the root
mean square of the result; in bfloat16 the rounding of the result outweighs all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm2_kernels import cpu

_WIDE, _NARROW = 0, 1                                      # variants of 3x3 kernels; of one axis: the number of taps
_LINES = (3, 7, 11)                                        # kernel sizes of one axis that have a variant
_WINDOW = 4                                                # and one for the windows of transposed convolutions
_FEWEST_CHANNELS = 32                                      # below, the transforms cost more than they save
_FEWEST_POSITIONS = 256                                    # of sequences; below, packing costs more than it saves


@cpu._kernel
def conv3x3(x: Tensor, weight: Any, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """Result in channels-last memory, whatever the input's."""
    values, scale = cpu._parts(weight)
    if not _pays(values):
        x = x.contiguous(memory_format=torch.channels_last)
        y = cpu._plain(F.conv2d, x, cpu._dense(weight, x.dtype), bias, padding=1)
        return y if residual is None else y + residual
    variant = _NARROW if x.shape[3] == 2 else _WIDE
    return torch.ops.ldm2_cpu.convolution(x, values, bias, residual, variant, 1, 1.0, scale)


@cpu._kernel
def conv1x1(x: Tensor, weight: Any, bias: Tensor) -> Tensor:
    """One matrix product where the channels are last in memory, as `conv3x3` leaves them; PyTorch would copy them."""
    matrix = weight.flatten(1) if isinstance(weight, Tensor) else weight.as_matrix()
    return cpu._linear(x.movedim(1, -1), matrix, bias).movedim(-1, 1)


@cpu._kernel
def conv1d(x: Tensor, weight: Any, bias: Tensor) -> Tensor:
    """As the convolutions of the residual blocks, with nothing before it. A last one, to a single channel, is a product
    with all taps at once and the sums along its diagonals."""
    outs, _, taps = weight.shape
    if outs >= cpu._PANEL or x.dtype != torch.float32 or not isinstance(weight, Tensor):
        return _leaky_conv(x, weight, bias, None, 1, 1.0)
    columns = x.mT @ weight.permute(1, 0, 2).flatten(1)                      # (B, N, C_out * taps)
    padded = F.pad(columns, (0, 0, taps // 2, taps // 2))
    size, strides = (len(x), outs, x.shape[2], taps), (padded[0].numel(), taps, outs * taps, outs * taps + 1)
    return padded.as_strided(size, strides).sum(-1) + bias[:, None]


@cpu._kernel
def conv_transpose1d(x: Tensor, weight: Any, bias: Tensor, stride: int, padding: int) -> Tensor:
    """A window of inputs gives the `stride` outputs that depend on no others: so it is an ordinary convolution with
    `stride` times the channels, of which those of a position lie one after the other. Channels are last."""
    values, scale = cpu._parts(weight)
    (batch, _, length), (ins, outs, taps) = x.shape, values.shape
    reach = -(-taps // stride)                             # inputs in a window
    blocks = _kept([stride, outs, reach, ins], values.dtype)
    turned = _kept([outs * taps, ins], values.dtype).copy_(values.flatten(1).T).view(outs, taps, ins)
    for i, part in enumerate(reversed(turned.split(stride, dim=1))):         # the last input meets the first taps
        count = part.shape[1]                              # fewer than the stride for the last taps
        blocks[:count, :, i] = part.transpose(0, 1)
        blocks[count:, :, i] = 0
    joint = blocks.view(stride * outs, reach * ins)
    given = joint if scale is None else type(weight)(joint, scale.view(outs, 1).repeat(stride, 1))
    apply = _windows_by_winograd if reach == _WINDOW and padding >= stride and _pays(values) else _windows
    y, first = apply(x, given, bias.repeat(stride), reach)
    start = padding - first * stride
    return y.reshape(batch, -1, outs)[:, start : start + (length - 1) * stride + taps - 2 * padding].mT


def _windows_by_winograd(x: Tensor, matrix: Any, bias: Tensor, reach: int) -> tuple[Tensor, int]:
    """As `_windows`, but for the first window, and for those after the one that begins with the last input but two."""
    values, scale = cpu._parts(matrix)
    taps = values.view(len(values), reach, -1).mT
    return torch.ops.ldm2_cpu.convolution(x, taps, bias, None, reach, 1, 1.0, scale, 1).mT, 1


def _windows(x: Tensor, matrix: Any, bias: Tensor, reach: int) -> tuple[Tensor, int]:
    """The product of a matrix (D, reach * C) with each window of x (B, C, N), between zeros: (B, windows, D), and the
    number of the first window, which ends with the first input."""
    batch, ins, length = x.shape
    steps = length + 2 * (reach - 1)
    padded = x.new_zeros(batch * steps + reach - 1, ins)
    padded[: batch * steps].view(batch, steps, ins)[:, reach - 1 : reach - 1 + length] = x.mT
    windows = padded.flatten().unfold(0, reach * ins, ins)                   # (B * steps, reach * C)
    return cpu._linear(windows, matrix, bias).view(batch, steps, -1), 0


@cpu._kernel
def residual_blocks(x: Tensor, slope: float, dilations: tuple[tuple[int, ...], ...], *parameters: Any) -> Tensor:
    """The activation belongs to the loads of a convolution, the sum to its stores."""
    given, total = iter(parameters), None
    for block in dilations:
        y = x
        for dilation in block:
            h = _leaky_conv(y, next(given), next(given), None, dilation, slope)
            y = _leaky_conv(h, next(given), next(given), y, 1, slope)
        total = y if total is None else total.add_(y)
    return total.div_(len(dilations))


@cpu._kernel
def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """PyTorch's, in memory that is kept; most of them are part of the residual blocks."""
    y = _kept_like(x, x.shape)
    return F.leaky_relu(x, slope) if y is None else torch.ops.aten.leaky_relu.out(x, slope, out=y)


@cpu._kernel
def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """PyTorch's, in memory that is kept."""
    y = _kept_like(x, (*x.shape[:2], *size))
    if y is None:
        return F.interpolate(x, size=size, mode="nearest")
    return torch.ops.aten.upsample_nearest2d.out(x, size, out=y)


def _kept_like(x: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Room for a result (B, C, ...) in memory that is kept, channels last; None where those of x are not, and for a
    model that is compiled."""
    if torch.compiler.is_compiling() or not x.movedim(1, -1).is_contiguous():
        return None
    return _kept([shape[0], *shape[2:], shape[1]], x.dtype).movedim(-1, 1)


def _kept(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Room in memory that is kept; in PyTorch's for a model that is compiled."""
    if torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype)
    return torch.ops.ldm2_cpu.empty_result(shape, dtype)


def _leaky_conv(x: Tensor, weight: Any, bias: Tensor, residual: Tensor | None, dilation: int, slope: float) -> Tensor:
    """conv(leaky_relu(x)) + residual, of the length and dtype of x."""
    values, scale = cpu._parts(weight)
    size = values.shape[2]
    if size in _LINES and _pays(values) and cpu._enough(len(x) * x.shape[2], _FEWEST_POSITIONS):
        return torch.ops.ldm2_cpu.convolution(x, values, bias, residual, size, dilation, slope, scale)
    x = x if slope == 1.0 else F.leaky_relu(x, slope)
    y = cpu._plain(F.conv1d, x, cpu._dense(weight, x.dtype), bias, padding=dilation * (size // 2), dilation=dilation)
    return y if residual is None else y.add_(residual)


def _pays(weight: Tensor) -> bool:
    outs, ins = weight.shape[:2]
    return outs % cpu._PANEL == 0 and ins % cpu._PANEL == 0 and min(outs, ins) >= _FEWEST_CHANNELS

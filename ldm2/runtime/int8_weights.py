"""Weights of a byte a number, and what linear layers make of them in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Int8(NamedTuple):
    """A weight of a byte a number: values * scale.

    values: int8; scale: float32 of as many axes, all of length 1 but that of the output channels.
    """

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.values.shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The numbers, rounded once to a dtype."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.values.to(wide) * self.scale).to(dtype)

    def as_matrix(self) -> Int8:
        """(out, ...) -> (out, the rest)."""
        return type(self)(self.values.flatten(1), self.scale.flatten(1))

    @property
    def rounds_inputs(self) -> bool:
        """Whether a linear layer rounds what it multiplies with this weight, see `W8A8`."""
        return False


class W8A8(Int8):
    """A weight of a linear layer whose inputs are rounded to 8 bits as well, each row x with a scale of its own.

    The scale s makes the largest |x| 127; x becomes round(x / s), a half to the even neighbor. The product of the
    integers is exact: its sums, times the scales of weight and row, are the result. A row that holds NaN or infinite
    numbers gives NaN.
    """

    @property
    def rounds_inputs(self) -> bool:
        return True


Weight = Tensor | Int8                                     # what linear layers and convolutions take


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as plain PyTorch takes it; `dtype` is what one of bytes becomes."""
    return weight.dense(dtype) if isinstance(weight, Int8) else weight


def product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x weight^T + bias of a linear layer: x (..., D_in), weight (D_out, D_in) -> (..., D_out)."""
    if not isinstance(weight, Int8) or not weight.rounds_inputs:
        return F.linear(x, dense(weight, x.dtype), bias)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows, scale = rounded_rows(wide)
    y = _exact_sums(rows, weight.values).to(wide.dtype) * weight.scale.flatten() * scale
    return (y if bias is None else y + bias).to(x.dtype)


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) of float32 or float64 as integers of at most 127, in float32, and the scales (..., 1) of its rows."""
    largest = x.abs().amax(-1, keepdim=True)
    scale = (largest * (1 / 127)).clamp_min(torch.finfo(torch.float32).tiny)
    rows = (x * (1 / scale)).round().float()
    return rows, torch.where(largest.isfinite(), scale, torch.nan)


def _exact_sums(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T of integers of 8 bits, x in float32, as int32. Sums of 2^10 products are integers below 2^24, which
    float32 holds, in whatever order they are added."""
    pieces = zip(x.split(1024, dim=-1), weight.split(1024, dim=-1), strict=True)
    return torch.stack([(piece @ part.mT.float()).int() for piece, part in pieces]).sum(0, dtype=torch.int32)

"""3x3 convolutions whose weights stay as they are, with the kernels for inference in both directions.

What comes back through a convolution is one too, with the kernel turned around and its channels exchanged: so a kernel
that knows no gradients gives them, as long as none is asked for the weights.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ldm2 import ops
from ldm2.layers import Conv3x3


class _FrozenConv(torch.autograd.Function):
    """ops.conv3x3 whose weight and bias need no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return ops.conv3x3(x, weight, bias, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        needs_x, *_, needs_residual = ctx.needs_input_grad
        back = None
        if needs_x:
            turned = weight.to(grad.dtype).transpose(0, 1).flip(2, 3).contiguous()
            back = ops.conv3x3(grad, turned, None)
        return back, None, None, grad if needs_residual else None


def _forward(conv: Conv3x3, x: Tensor, residual: Tensor | None = None, biased: bool = True) -> Tensor:
    """As Conv3x3.forward."""
    bias = conv.bias if biased else None
    asked = torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad))
    if not asked or conv.weight.requires_grad or nn.utils.parametrize.is_parametrized(conv):
        return ops.conv3x3(x, conv.weight, bias, residual)
    return _FrozenConv.apply(x, conv.weight, bias, residual)


def hasten(module: nn.Module) -> None:
    """Let all 3x3 convolutions of a module take the kernels where their weights need no gradient."""
    for part in module.modules():
        if isinstance(part, Conv3x3):
            part.forward = functools.partial(_forward, part)  # type: ignore[method-assign]

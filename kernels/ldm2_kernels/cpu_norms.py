"""Normalization on the CPU, and the transformer blocks that hold it, by the operators that `cpu` finds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm2_kernels import cpu

_NONE = [None] * 20                                        # the scales of a block without int8 weights


@cpu._kernel
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """One pass over memory, in float32."""
    if not _dense_rows(x) or not cpu._enough(x.numel(), cpu._FEWEST_ROWS * x.shape[-1]):
        return cpu._plain(F.layer_norm, x, weight.shape, weight, bias, eps)
    return torch.ops.ldm2_cpu.layer_norm(x, weight, bias, eps)


@cpu._kernel
def add_layer_norm(x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `layer_norm`, which sees the sum before it is rounded."""
    if not _dense_rows(x) or not added.is_contiguous() or x.shape != added.shape:
        x = x + added
        return x, cpu._plain(F.layer_norm, x, weight.shape, weight, bias, eps)
    return torch.ops.ldm2_cpu.add_layer_norm(x, added, weight, bias, eps)


@cpu._kernel
def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Sums in float32, of distances from the first position: they survive a large mean."""
    if not _last_channels(x):
        return cpu._plain(F.group_norm, x, num_groups, weight, bias, eps)
    return torch.ops.ldm2_cpu.group_norm(x, num_groups, weight, bias, eps, None, False)


@cpu._kernel
def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None
) -> Tensor:
    """As `group_norm`; shift and activation belong to the same pass."""
    if not _last_channels(x):
        x = x if shift is None else x + shift[:, :, None, None]
        return F.silu(cpu._plain(F.group_norm, x, num_groups, weight, bias, eps), inplace=True)
    return torch.ops.ldm2_cpu.group_norm(x, num_groups, weight, bias, eps, shift, True)


def transformer_block(
    x: Tensor, num_heads: int, eps: float, context: tuple[Tensor, Tensor, Tensor | None] | None, absorbed: bool,
    parameters: list,
) -> Tensor:
    """A `TransformerBlock` of ldm2 as one operator, which makes its products without a return to Python.

    x (B, L, C); context: keys, values and bias of the second attention, None where that is to x itself
    absorbed: whether keys and values have the projections in them
    parameters: weight and bias of each layer in order of use (a bias only where there is one). Weights may be `Int8`.
    """
    (_, rows, channels), products = x.shape, x.dtype == torch.float32 or cpu._bfloat16() == "products"
    if x.dtype == torch.float16 or not products or rows < cpu._FEWEST_ROWS or channels % (num_heads * cpu._PANEL):
        return NotImplemented
    keys, values, bias = (None, None, None) if context is None else context
    if keys is not None and (len(keys) % len(x) or (absorbed and not cpu.takes_absorbed(x, keys, bias))):
        return NotImplemented
    for kept in (keys, values):
        if kept is not None and not absorbed and (kept.stride(3) != 1 or kept.stride(2) % 2):
            return NotImplemented
    if bias is not None and (keys is None or bias.shape[1:] != (1, 1, keys.shape[2])):
        return NotImplemented
    scales, rounded = _NONE, []
    if any(not isinstance(parameter, Tensor) for parameter in parameters):
        rounded = list(map(cpu.rounds_inputs, parameters))
        parameters, scales = zip(*map(cpu._parts, parameters), strict=True)
    return torch.ops.ldm2_cpu.transformer_block(
        x, parameters, scales, keys, values, bias, absorbed, num_heads, eps, rounded
    )


def _dense_rows(x: Tensor) -> bool:
    return x.shape[-1] % cpu._PANEL == 0 and x.is_contiguous()


def _last_channels(x: Tensor) -> bool:
    """Whether x (B, C, T, F) has channels that the kernels take, last in memory."""
    return x.dim() == 4 and x.shape[1] % cpu._PANEL == 0 and x.is_contiguous(memory_format=torch.channels_last)

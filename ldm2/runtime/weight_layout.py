"""How weights lie in memory where the device is faster for it. Names, shapes and numbers stay what they are."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ldm2.attention import Attention
from ldm2.vocoder import ResidualBlock

Module = TypeVar("Module", bound=nn.Module)


def arrange(module: Module) -> Module:
    """Lay out the weights of a loaded module, in place, for its device and dtype."""
    first = next(module.parameters(), None)
    if first is not None and first.device.type == "cuda" and first.dtype in (torch.float16, torch.bfloat16):
        for_tensor_cores(module)
    return module


def for_tensor_cores(module: nn.Module) -> None:
    """Kernels of convolutions with their channels last, as tensor cores take them, where cuDNN would transpose weights,
    inputs and outputs at each call; weights of q, k and v as one matrix, so that a self-attention has one product."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for part in module.modules():
        if isinstance(part, Attention):
            part.fuse_qkv()
        elif isinstance(part, ResidualBlock | nn.ConvTranspose1d):
            for weight in part.parameters():
                if weight.dim() == 3:                      # for which there is no such format
                    weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)

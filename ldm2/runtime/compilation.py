"""torch.compile of what runs hundreds of times in a generation."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

from ldm2.unet import PreparedConditioning, UNet

_compiled: WeakSet[UNet] = WeakSet()                       # a copy of one of them is not among them


def check_compiler(device: torch.device) -> None:
    """Raises ValueError unless there is what torch.compile writes its programs for: Triton, or a C++ compiler."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("compile=True needs the package triton on CUDA")
    elif not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl")):
        raise ValueError("compile=True needs a C++ compiler: found no g++ and no clang++")


def compile_step(unet: UNet) -> None:
    """From now on the UNet's step is compiled in generations; that happens at its first call, once for all lengths.

    Another kind of call (with guidance and without, one row and several, features reused) is compiled by itself. What
    is compiled lands in torch's cache on disk, so that the next process takes it from there.
    """
    _compiled.add(unet)


def is_compiled(unet: UNet) -> bool:
    """Whether `compile_step` was called for it."""
    return unet in _compiled


def stepper(unet: UNet) -> UNet | CompiledUNet:
    """What takes the calls of a UNet: itself, or its compiled step where `compile_step` asked for that."""
    return CompiledUNet(unet) if is_compiled(unet) else unet


class CompiledUNet:
    """The compiled step of a UNet, with the weights that the UNet has at each call."""

    def __init__(self, unet: UNet):
        self.unet, self.embed_time = unet, unet.embed_time

    def __call__(self, x_t: Tensor, t: float, prepared: PreparedConditioning, time: Tensor | None = None) -> Tensor:
        return self.forward_cached(x_t, t, prepared, time)[0]

    def forward_cached(self, *args, **named) -> tuple[Tensor, ...]:
        """As UNet.forward_cached."""
        return _compiled_step()(self.unet, *args, **named)


@functools.cache
def _compiled_step() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(UNet.forward_cached, dynamic=True)

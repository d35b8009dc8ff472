"""torch.compile of what runs hundreds of times in a generation."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from ldm2.unet import UNet


def check_compiler(device: torch.device) -> None:
    """Raises ValueError unless there is what torch.compile writes its programs for: Triton, or a C++ compiler."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("compile=True needs the package triton on CUDA")
    elif not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl")):
        raise ValueError("compile=True needs a C++ compiler: found no g++ and no clang++")


def compile_step(unet: UNet) -> None:
    """From now on the UNet's step is compiled; that happens at its first call, once for sounds of all lengths.

    Another kind of call (with guidance and without, one row and several, features reused) is compiled by itself. What
    is compiled lands in torch's cache on disk, so that the next process takes it from there.
    """
    unet.with_features = torch.compile(unet.with_features, dynamic=True)     # `forward` is a call of it


def is_compiled(unet: UNet) -> bool:
    """Whether `compile_step` was called for it."""
    return "with_features" in vars(unet)

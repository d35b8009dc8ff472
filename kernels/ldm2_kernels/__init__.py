"""Fused operations for ldm2. Importing this imports neither Triton nor anything compiled.

Each operation of `ldm2.ops` that has a kernel for a type of device has a line in the table below: a module, imported
when an operation first runs on such a device, with a function of the operation's name and signature. That function
returns NotImplemented for arguments which it leaves to plain PyTorch. It need not look at gradients, forward mode or
autocast, nor at tensors that are empty, of unlike devices, of unlike dtypes where the operation does not name them, or
not float32, float16 or bfloat16: those never reach it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

MODULES: dict[str, dict[str, str | None]] = {
    "cuda": {
        "group_norm": "ldm2_kernels.group_norm",
        "group_norm_silu": "ldm2_kernels.group_norm",
        "add_layer_norm": "ldm2_kernels.layer_norm",
        "geglu": "ldm2_kernels.geglu",
        "layer_norm": "ldm2_kernels.layer_norm",
        "upsample": "ldm2_kernels.upsample",
        "attention": "ldm2_kernels.attention",
        "absorbed_attention": "ldm2_kernels.attention",
        "linear": None,
        "linear_geglu": None,
        "leaky_relu": None,
        "conv3x3": "ldm2_kernels.convolution",
        "conv1x1": "ldm2_kernels.convolution",
        "conv1d": "ldm2_kernels.residual_blocks",
        "conv_transpose1d": "ldm2_kernels.residual_blocks",
        "residual_blocks": "ldm2_kernels.residual_blocks",
    },
    "cpu": {
        "conv3x3": "ldm2_kernels.cpu_convolutions",
        "conv1x1": "ldm2_kernels.cpu_convolutions",
        "conv1d": "ldm2_kernels.cpu_convolutions",
        "conv_transpose1d": "ldm2_kernels.cpu_convolutions",
        "residual_blocks": "ldm2_kernels.cpu_convolutions",
        "group_norm": "ldm2_kernels.cpu_norms",
        "group_norm_silu": "ldm2_kernels.cpu_norms",
        "layer_norm": "ldm2_kernels.cpu_norms",
        "add_layer_norm": "ldm2_kernels.cpu_norms",
        "linear": "ldm2_kernels.cpu",
        "linear_geglu": "ldm2_kernels.cpu",
        "geglu": None,
        "attention": "ldm2_kernels.cpu",
        "absorbed_attention": "ldm2_kernels.cpu",
        "leaky_relu": "ldm2_kernels.cpu_convolutions",
        "upsample": "ldm2_kernels.cpu_convolutions",
    },
}

# Several operations at once: kernels without an operation of their own, which `ops.at_once` tries.
SEQUENCES: dict[str, dict[str, str]] = {"cpu": {"transformer_block": "ldm2_kernels.cpu_norms"}}

# Memory that waits for results to come: `ops.release_memory`.
MEMORY: dict[str, dict[str, str]] = {"cpu": {"release_memory": "ldm2_kernels.cpu"}}

# Why an operation without a kernel needs none there.
REASONS: dict[str, dict[str, str]] = {
    "cuda": {
        "linear": "cuBLAS",
        "linear_geglu": "cuBLAS, and the kernel of geglu",
        "leaky_relu": "is one pass already",
    },
    "cpu": {
        "geglu": "part of the linear layer before it",
    },
}


def load(device_type: str) -> dict[str, Callable | None]:
    """Name -> fused operation for a type of device, None where PyTorch's own is the fused one.

    None of them where what they need is not installed.
    """
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return {}
    if device_type == "cpu" and not importlib.import_module("ldm2_kernels.cpu").load():
        return {}
    modules = MODULES.get(device_type, {}) | SEQUENCES.get(device_type, {}) | MEMORY.get(device_type, {})
    return {
        name: None if module is None else getattr(importlib.import_module(module), name)
        for name, module in modules.items()
    }

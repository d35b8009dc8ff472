"""Where a model runs and in which precision."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
W8A8 = "w8a8"                                              # int8 weights, and linear layers that round their inputs


def dtype_name(dtype: torch.dtype) -> str:
    """"float32" and so on."""
    return str(dtype).removeprefix("torch.")


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes the best there is. Raises ValueError if it is unknown or absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"unknown device {name!r}, choose from auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not available: torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not available: it needs macOS on Apple silicon")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {name!r}, choose from auto, cpu, cuda, cuda:N, mps")
    return device


def chosen_name(name: str, device: torch.device) -> str:
    """`name` of a dtype, what "auto" stands for on a device: float16 on CUDA and float32 elsewhere.

    Raises ValueError if it is unknown, and for int8 and w8a8 elsewhere than on a CPU.
    """
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    if name not in (*DTYPES, W8A8):
        raise ValueError(f"unknown dtype {name!r}, choose from auto, {', '.join((*DTYPES, W8A8))}")
    if name in ("int8", W8A8) and device.type != "cpu":
        raise ValueError(f"dtype {name} is for CPUs, choose float16 on {device.type}: it loads int8 checkpoints, too")
    return name


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of weights for what `chosen_name` takes: that of w8a8 is int8."""
    name = chosen_name(name, device)
    return torch.int8 if name == W8A8 else DTYPES[name]


def computing_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """What a model whose weights are of a dtype computes in. Int8 ones are widened as they are multiplied."""
    return torch.float32 if dtype == torch.int8 else dtype


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device is a CPU with instructions for bfloat16, with which a model is faster than in float32."""
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()   # an old PyTorch cannot tell
    return device.type == "cpu" and any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))

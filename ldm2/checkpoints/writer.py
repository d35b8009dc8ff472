"""Write a safetensors file one tensor at a time, so that memory holds one tensor and not the file.

Format: https://github.com/huggingface/safetensors#format (length of the header, header as JSON, tensors one after
another).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm2.runtime.device import dtype_name

NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors`, floating ones in `dtype` unless it is None. The file has its name only when it is complete.

    metadata: words for the header. Raises ValueError, naming the tensor, where a number is not finite, does not fit
    into `dtype`, or is of a kind that no part of a model has.
    """
    path = Path(path)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in NAMES:
            kind = "meta" if tensor.is_meta else f"{dtype_name(tensor.dtype)} ({str(tensor.layout)[6:]})"
            known = ", ".join(dtype_name(dtype) for dtype in NAMES)
            raise ValueError(f"{name} is {kind}, a plain tensor of one of these is needed: {known}")
    kinds = {
        name: dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        for name, tensor in tensors.items()
    }
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))     # keeps every tensor aligned
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(_header({name: (kinds[name], tensors[name].shape) for name in order}, metadata or {}))
        for name in order:
            tensor = tensors[name].detach().to("cpu", kinds[name]).contiguous()
            if not torch.isfinite(tensor).all():
                if torch.isfinite(tensors[name]).all():
                    raise ValueError(f"{name} holds numbers beyond the range of {dtype}: choose bfloat16 or float32")
                raise ValueError(f"{name} holds NaN or infinite numbers: the weights are damaged")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    os.replace(temporary, path)


def _header(tensors: Mapping[str, tuple[torch.dtype, torch.Size]], metadata: Mapping[str, str]) -> bytes:
    """Length (8 bytes, little endian) and table of contents, padded with spaces to 8 bytes."""
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

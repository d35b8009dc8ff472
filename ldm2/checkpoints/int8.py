"""Weights of a byte a number: int8 with a float32 scale for each output channel, the same on both sides of zero.

In a file, `NAME.weight` (I8) has `NAME.weight_scale` (F32) beside it, of as many axes, all of length 1 but that of the
output channels: their product is the weight. Norms, biases and small weights stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm2.fields import read_json
from ldm2.ops import Int8, Weight
from ldm2.runtime.device import dtype_name

LEAST = 16_384                                             # numbers of a weight for which it pays
LARGEST = 127
PIECE = 1 << 22                                            # numbers that are widened at once
SCALE = "_scale"                                           # after the name of a weight
FIELD = "dtype"                                            # of a config.json

# Weights whose output channels are their second axis: GPT-2's matrices, and transposed convolutions.
_SECOND = re.compile(r"(?:.*\.)?(?:c_attn|c_proj|c_fc|upsampler\.\d+)\.weight")
_WEIGHT = re.compile(r"(?:.*\.)?weight")


def selects(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a part is to be int8: the weight of a layer or a table of embeddings, and not a small one."""
    large = tensor.ndim >= 2 and tensor.numel() >= LEAST
    return large and tensor.is_floating_point() and _WEIGHT.fullmatch(name) is not None


def channel_axis(name: str) -> int:
    """The axis of the output channels."""
    return 1 if _SECOND.fullmatch(name) else 0


def quantize(name: str, tensor: Tensor) -> Int8:
    """The nearest int8 weight. Its scale makes the largest number of each channel 127; zeros have the scale 1.

    Holds a few MB beside the result. Of the meta device nothing is read. Raises ValueError for numbers that are not
    finite.
    """
    axis = channel_axis(name)
    moved = tensor.detach().movedim(axis, 0)
    channels = moved.shape[0]
    values = torch.empty(moved.shape, dtype=torch.int8, device=tensor.device)
    scale = torch.empty([channels] + [1] * (tensor.ndim - 1), dtype=torch.float32, device=tensor.device)
    step = max(1, PIECE * channels // tensor.numel())
    for start in range(0, 0 if tensor.is_meta else channels, step):
        piece = moved[start : start + step].float()
        largest = piece.flatten(1).abs().amax(1)
        if not torch.isfinite(largest).all():
            raise ValueError(f"{name} holds NaN or infinite numbers: the weights are damaged")
        # A scale stays a normal number: what is smaller than all of these is as good as zero.
        scales = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny).where(largest > 0, 1.0)
        scale[start : start + step] = scales.view(-1, *scale.shape[1:])
        values[start : start + step] = (piece / scale[start : start + step]).round_()
    return Int8(values.movedim(0, axis), scale.movedim(0, axis))


def paired(tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, Weight]:
    """The tensors of a file, int8 weights and their scales as one. Raises ValueError where one is not whole."""
    weights: dict[str, Weight] = dict(tensors)
    for name in [name for name in tensors if _WEIGHT.fullmatch(name) and tensors[name].dtype == torch.int8]:
        if weights.pop(name + SCALE, None) is None:
            raise ValueError(f"{source}: {name} is int8 and has no {name}{SCALE}: the weights are damaged")
        weights[name] = Int8(tensors[name], _checked(tensors[name + SCALE], name, tensors[name], source))
    for name in weights:
        if name.endswith(f"weight{SCALE}") and name.removesuffix(SCALE) in weights:
            kind = dtype_name(tensors[name.removesuffix(SCALE)].dtype)
            raise ValueError(f"{source}: {name} belongs to an int8 weight, this one is {kind}: the weights are damaged")
    return weights


def _checked(scale: Tensor, name: str, values: Tensor, source: str | Path) -> Tensor:
    """The scale of a weight. Raises ValueError for another shape or dtype, and for numbers that no scale has."""
    shape = [1] * values.ndim
    shape[channel_axis(name)] = values.shape[channel_axis(name)]
    if list(scale.shape) != shape or scale.dtype != torch.float32:
        asked, found = f"float32 {tuple(shape)}", f"{dtype_name(scale.dtype)} {tuple(scale.shape)}"
        raise ValueError(f"{source}: {name}{SCALE} must be {asked}, got {found}: the weights are damaged")
    if not scale.is_meta and not (torch.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"{source}: {name}{SCALE} must be positive and finite: the weights are damaged")
    return scale


def quantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part as a file in int8 holds them. Those that are int8 already stay as they are."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if selects(name, tensor):
            result[name], result[name + SCALE] = quantize(name, tensor)
        else:
            result[name] = tensor
    return result


def recorded(folder: Path) -> bool:
    """Whether a folder in the hub's layout says that it is in int8."""
    config = folder / "unet/config.json"
    return config.is_file() and read_json(config).get(FIELD) == "int8"

"""What a checkpoint holds, read from its configurations and headers alone: what `ldm2 info` prints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm2.checkpoints import int8, lora_files
from ldm2.checkpoints.adapter import Adapter
from ldm2.checkpoints.build import config_of
from ldm2.checkpoints.reading import read
from ldm2.config import REFERENCES, UNetConfig
from ldm2.runtime.device import dtype_name


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint: its class ("" in an authors' file), how many numbers it holds, in which dtypes."""

    name: str
    kind: str
    parameters: int
    dtypes: tuple[str, ...]
    size: int                                               # bytes


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds. `heads`: for each reference those at each level of the UNet, None without attention."""

    path: Path
    parts: tuple[Part, ...]
    heads: Mapping[str, tuple[int | None, ...]]
    sample_rate: int | None                                 # Hz; None in a file without vocoder

    def __str__(self) -> str:
        total = Part("all", "", sum(p.parameters for p in self.parts), (), sum(p.size for p in self.parts))
        rows = [("part", "class", "parameters", "dtype", "size")] + [
            (p.name, p.kind, _millions(p.parameters), " ".join(p.dtypes), f"{p.size / 1e6:.2f} MB")
            for p in (*self.parts, total)
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        for reference, heads in self.heads.items():
            levels = " ".join("-" if number is None else str(number) for number in heads)
            without = " (-: no attention)" if None in heads else ""
            lines.append(f"heads per level of the UNet, reference {reference}: {levels}{without}")
        if self.sample_rate is not None:
            lines.append(f"sample rate: {self.sample_rate} Hz")
        return "\n".join([str(self.path), *lines])


def describe(path: str | Path, variant: str | None = None) -> Description:
    """Parts, sizes, dtypes and heads of a checkpoint (folder or authors' file), from headers and configs alone.

    variant: word in the names of a folder's weight files, such as "fp16".

    Raises ValueError for files that cannot be read and configs that make no sense.
    """
    path = Path(path)
    checkpoint = read(path, variant=variant)
    held = tuple(_part(name, part.kind, tensors) for name, part in checkpoint.items() if (tensors := part.tensors))
    heads, sample_rate = {}, None
    if "unet" in checkpoint:
        heads = {name: _heads(config_of(checkpoint["unet"], "unet", name)) for name in REFERENCES}
    if "vocoder" in checkpoint:
        sample_rate = config_of(checkpoint["vocoder"], "vocoder").sample_rate
    return Description(path, held, heads, sample_rate)


def _heads(config: UNetConfig) -> tuple[int | None, ...]:
    """Heads at each level, None where nothing attends."""
    return tuple(number if contexts else None for number, contexts in zip(config.num_heads, config.context_dims))


def _part(name: str, kind: str, tensors: Mapping[str, Tensor]) -> Part:
    # Tied tensors of a pickle share their memory: they count once.
    distinct = {(tensor.data_ptr(), tensor.shape): tensor for tensor in tensors.values()
                if tensor.is_floating_point() or tensor.dtype == torch.int8}
    dtypes = sorted({dtype_name(tensor.dtype) for tensor in distinct.values()})
    scales = [tensor.numel() for each, tensor in tensors.items() if each.endswith(f"weight{int8.SCALE}")]
    parameters = sum(tensor.numel() for tensor in distinct.values()) - sum(scales)
    return Part(name, kind, parameters, tuple(dtypes), sum(tensor.nbytes for tensor in distinct.values()))


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M"


def describe_lora(path: str | Path) -> str:
    """Which layers a LoRA changes, and what it was trained on, a line for each thing. Raises ValueError or OSError."""
    adapter = lora_files.read(path)
    layers = adapter.layers.values()
    numbers = sum(layer.down.numel() + layer.up.numel() for layer in layers)
    size = sum(layer.down.nbytes + layer.up.nbytes for layer in layers)
    scales = sorted({layer.scale for layer in layers})
    told = {
        "kind": "LoRA", "base": _base(adapter), "rank": _span(sorted({layer.rank for layer in layers})),
        "alpha / rank": _span(scales), "dtype": " ".join(sorted({dtype_name(layer.down.dtype) for layer in layers})),
        "parameters": f"{_millions(numbers)} ({size / 1e6:.2f} MB)",
    }
    for part in adapter.parts:
        kinds = Counter(_kind(name) for name in adapter.of_part(part))
        told[part] = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
    told |= {name: value for name, value in adapter.about.items() if isinstance(value, str) and len(value) <= 100}
    return "\n".join([adapter.source, *(f"{name:<18}{value}" for name, value in told.items() if value)])


def _kind(module: str) -> str:
    """The end of a module's name that tells which kind of layer it is; kohya's files have no dots in them."""
    kinds = r"(?:ff[._]net[._]\d.*|to_out[._]0|to_[qkv]|c_\w+|conv\w*|proj_in|proj_out|time_emb_proj)$"
    found = re.search(kinds, module)
    return found[0] if found else module.rpartition(".")[2]


def _base(adapter: Adapter) -> str:
    """The model that a LoRA was trained on, as far as its file says so."""
    named = (adapter.about.get(name) for name in ("base_model", "model", "base_model_name_or_path", "ss_sd_model_name"))
    return next((name for name in named if name), "not told")


def _span(values: list[Any]) -> str:
    """One value, or the least and the largest."""
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"

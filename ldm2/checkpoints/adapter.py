"""LoRA: low-rank changes of the weights of a model, as a thing that is read, fitted, added up and written.

Reference: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1. How files of other
programs are read is in `ldm2.checkpoints.lora_files`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm2.atomic import check_writable, whole
from ldm2.checkpoints.writer import write_safetensors
from ldm2.fields import few
from ldm2.runtime.device import dtype_name

FILE = "pytorch_lora_weights.safetensors"                  # in a folder, as diffusers names it
CONFIG = "lora_adapter_metadata"                           # in the header of a file: rank and alpha in JSON
PARTS = ("unet", "language_model", "projection_model")     # of a checkpoint, by the names of their folders
TRANSPOSED = "language_model"                              # GPT-2, whose matrices lie as (in, out) in its files


@dataclass(frozen=True)
class LowRank:
    """A change of one weight: `scale` times up @ down.

    down: (r, in), of a convolution (r, in, k, k). up: (out, r), of a convolution (out, r, 1, 1). scale: alpha / r.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """r, the number of rows of `down`."""
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """The scale times the rank, as files have it."""
        return self.scale * self.rank

    def shape(self, transposed: bool = False) -> tuple[int, ...]:
        """Of the weight that it changes; `transposed` where that lies as (in, out)."""
        outs, ins = self.up.shape[0], tuple(self.down.shape[1:])
        return (*ins, outs) if transposed else (outs, *ins)

    def fits(self, weight: Tensor, transposed: bool = False) -> bool:
        """Whether it can be added to a weight; that of a 1x1 convolution may be that of a linear layer."""
        mine, other = self.shape(transposed), tuple(weight.shape)
        longer, shorter = (mine, other) if len(mine) > len(other) else (other, mine)
        return longer[: len(shorter)] == shorter and set(longer[len(shorter) :]) <= {1}

    def delta(self, weight: Tensor, scale: float = 1.0, transposed: bool = False) -> Tensor:
        """What it adds to a weight: float32, of the shape and on the device of `weight`."""
        down, up = (part.to(weight.device, torch.float32).flatten(1) for part in (self.down, self.up))
        product = up @ down
        return (product.T if transposed else product).reshape(weight.shape) * (self.scale * scale)


@dataclass(frozen=True)
class Adapter:
    """A LoRA: its layers by the names of part and module ("unet.mid_block.attentions.0.proj_in").

    source: what errors name. about: what its file says beside, such as the model that it was trained on.
    """

    layers: Mapping[str, LowRank]
    source: str = "LoRA"
    about: Mapping[str, Any] = field(default_factory=dict)

    def of_part(self, part: str) -> dict[str, LowRank]:
        """The layers of one part of a checkpoint, by the names of their modules."""
        return {name.removeprefix(f"{part}."): layer for name, layer in self.layers.items()
                if name.startswith(f"{part}.")}

    @property
    def parts(self) -> tuple[str, ...]:
        """Those that it changes."""
        return tuple(part for part in PARTS if self.of_part(part))

    def fitted(self, part: str, weights: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """Its layers in a part by the names of the weights that they change.

        weights: all of the part, or their like on the meta device. Raises ValueError naming what does not fit: nothing
        of a LoRA is left out.
        """
        known = {_flat(name.removesuffix(".weight").removeprefix("transformer.")): name for name in weights
                 if name.endswith(".weight")}
        found, missing, misshapen = {}, [], []
        for module, layer in self.of_part(part).items():
            name = known.get(_flat(module))
            if name is None:
                missing.append(f"{part}.{module}")
            elif not layer.fits(weights[name], part == TRANSPOSED):
                have, need = layer.shape(part == TRANSPOSED), tuple(weights[name].shape)
                misshapen.append(f"{part}.{module} {have} instead of {need}")
            elif not weights[name].is_floating_point():
                kind = dtype_name(weights[name].dtype)
                raise ValueError(f"{self.source} cannot be added to {kind} weights, such as {name}")
            else:
                found[name] = layer
        problems = [f"{len(names)} {kind} ({few(names)})"
                    for kind, names in (("layers that this one lacks", missing), ("misshapen", misshapen)) if names]
        if problems:
            raise ValueError(f"{self.source} is a LoRA of another model: {', '.join(problems)}")
        return found

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write it as diffusers and peft do -> the file: `path`, or pytorch_lora_weights.safetensors in that folder.

        Raises ValueError or OSError where nothing can be written, and for numbers that are not finite.
        """
        path = Path(path).expanduser()
        path = path / FILE if path.is_dir() else path
        if path.suffix != ".safetensors":
            raise ValueError(f"a LoRA is written as .safetensors, got {path.name}")
        check_writable(path, overwrite)
        tensors = {f"{name}.lora_{letter}.weight": tensor for name, layer in self.layers.items()
                   for letter, tensor in (("A", layer.down), ("B", layer.up))}
        config = {f"{part}.{name}": value for part in self.parts
                  for name, value in _config(self.of_part(part)).items()}
        header = {CONFIG: json.dumps(config, indent=2, sort_keys=True)}
        header |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in self.about.items()}
        with whole(path, overwrite) as temporary:
            write_safetensors(temporary, tensors, metadata=header)
        return path


def combined(
    weights: Mapping[str, Tensor], part: str, adapters: Iterable[tuple[Adapter, float]],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The weights of a part that LoRAs change, each with its scale: float32 sums, rounded once.

    weights: all of the part, by their names. dtype: of the sums, None for that of the weight. Raises ValueError for a
    LoRA of another model.
    """
    changes: dict[str, list[tuple[LowRank, float]]] = {}
    for adapter, scale in adapters:
        for name, layer in adapter.fitted(part, weights).items():
            if scale:
                changes.setdefault(name, []).append((layer, scale))
    return {name: _sum(name, weights[name], several, part == TRANSPOSED, dtype or weights[name].dtype)
            for name, several in changes.items()}


def _sum(
    name: str, weight: Tensor, changes: Sequence[tuple[LowRank, float]], transposed: bool, dtype: torch.dtype
) -> Tensor:
    """A weight with its changes. Raises ValueError where a number leaves the range of the dtype."""
    total = weight.detach().to(torch.float32, copy=True)
    for layer, scale in changes:
        total += layer.delta(weight, scale, transposed)
    total = total.to(dtype)
    if not torch.isfinite(total).all():
        raise ValueError(f"{name} leaves the range of {dtype_name(dtype)} with its LoRAs: let them count less")
    return total


def _flat(name: str) -> str:
    """A module's name as kohya's files have it: what stands between its levels is lost."""
    return name.replace(".", "_")


def _config(layers: Mapping[str, LowRank]) -> dict[str, Any]:
    """Rank and alpha of the layers of one part, in the words of peft's LoraConfig."""
    rank = _usual(layer.rank for layer in layers.values())
    alpha = _usual(_whole(layer.alpha) for layer in layers.values())
    return {
        "r": rank, "lora_alpha": alpha, "target_modules": sorted(layers),
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {name: _whole(layer.alpha) for name, layer in layers.items() if _whole(layer.alpha) != alpha},
        "bias": "none",
    }


def _usual(values: Iterable[Any]) -> Any:
    """The value that occurs most often."""
    return Counter(values).most_common(1)[0][0]


def _whole(value: float) -> float | int:
    """A number that is whole up to rounding as an integer."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value

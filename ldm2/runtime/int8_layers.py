"""Layers whose weights are int8: they stay so in memory, and are widened where they are multiplied."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm2 import ops
from ldm2.attention import Transformer2D
from ldm2.layers import Conv1x1, Conv3x3, Linear, weight_of


class Int8Conv1d(nn.Conv1d):
    """A convolution that is widened as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, ops.dense(weight_of(self), x.dtype), self.bias)


class Int8Conv2d(nn.Conv2d):
    """A convolution that is widened as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, ops.dense(weight_of(self), x.dtype), self.bias)


class Int8Embedding(nn.Embedding):
    """A table, of which only the rows that are looked up are widened, to the model's dtype."""

    dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        rows: Any = F.embedding(input, self.weight), F.embedding(input, self.weight_scale)  # type: ignore[arg-type]
        return ops.Int8(*rows).dense(self.dtype)


class Int8Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is (in, out). It has its output channels first in memory."""

    def forward(self, x: Tensor) -> Tensor:
        weight = weight_of(self)
        turned = ops.Int8(weight.values.T, weight.scale.T) if isinstance(weight, ops.Int8) else weight.T
        return ops.linear(x, turned, self.bias)


# What takes the place of a layer. Others see to their weights themselves, or through what runs them.
LAYERS: dict[str, type[nn.Module]] = {
    "torch.nn.modules.linear.Linear": Linear,
    "torch.nn.modules.conv.Conv1d": Int8Conv1d,
    "torch.nn.modules.conv.Conv2d": Int8Conv2d,
    "torch.nn.modules.sparse.Embedding": Int8Embedding,
    "ldm2.text.gpt2.Conv1D": Int8Conv1D,
}
AWARE = (*LAYERS.values(), Conv1x1, Conv3x3, nn.ConvTranspose1d)


def install(module: nn.Module, name: str, weight: ops.Int8, dtype: torch.dtype) -> bool:
    """Make `weight` the weight `name` of a module that computes in `dtype`. False where the layer is of a kind that
    cannot have it."""
    layer: Any = module.get_submodule(name.rpartition(".")[0])
    kind = LAYERS.get(f"{type(layer).__module__}.{type(layer).__qualname__}")
    if kind is not None:
        layer.__class__ = kind
    elif not isinstance(layer, AWARE):
        return False
    values, scale = weight
    if isinstance(layer, Int8Conv1D):
        values = values.T.contiguous().T
    if isinstance(layer, Int8Embedding):
        layer.dtype = dtype
    layer.weight = nn.Parameter(values, requires_grad=False)
    layer.register_buffer("weight_scale", scale)
    return True


def is_int8(module: nn.Module) -> bool:
    """Whether weights of a module are int8, or were until something changed them (a LoRA) and will be again."""
    return any("weight_scale" in part._buffers for part in module.modules())


def rounds_inputs(module: nn.Module) -> bool:
    """Whether `round_inputs` was called."""
    return any(getattr(part, "rounds_inputs", False) for part in module.modules())


def round_inputs(module: nn.Module) -> None:
    """Let the int8 linear layers of all transformers in a module round their inputs, see `ops.W8A8`.

    Not those which make keys and values of a context, once for all steps: that would cost accuracy and save nothing.
    Projections within keys and values (`Attention.absorb`) multiply nothing in a step, and round nothing.
    """
    for transformer in [part for part in module.modules() if isinstance(part, Transformer2D)]:
        for name, layer in transformer.named_modules():
            of_context = transformer.context_dim is not None and name.endswith(("attn2.to_k", "attn2.to_v"))
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and not of_context:
                marked: Any = layer
                marked.rounds_inputs = True

"""Low-rank parts that can be trained, added to the layers of a model whose own weights stay as they are.

    lora = add_lora(unet, rank=16, targets=("attention",))
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-4)
    ...
    lora.adapter("unet").save("pytorch_lora_weights.safetensors")
    lora.remove()

Reference: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm2.attention import Attention
from ldm2.checkpoints.adapter import Adapter, LowRank
from ldm2.fields import few
from ldm2.text.gpt2 import Conv1D

# Kinds of layers by the names of their modules, in the UNet and in GPT-2, and the two of the projection before GPT-2.
TARGETS = {
    "attention": r"(?:.*\.)?attn\d?\.(?:to_[qkv]|to_out\.0|c_attn|c_proj)",
    "feed_forward": r".*\.ff\.net\.(?:0\.proj|2)|h\.\d+\.mlp\.(?:c_fc|c_proj)",
    "convolution": r"(?:.*\.)?(?:conv|conv[12]|conv_shortcut|conv_in|conv_out|proj_in|proj_out)",
    "time": r"(?:.*\.)?(?:time_emb_proj|time_embedding\.linear_[12])",
    "projection": r"projection(?:_1)?",
}
# Layers whose weights the model reads without calling them: a fused GEGLU, a 1x1 convolution as a matrix product, and
# the projections of all residual blocks at once.
READ = re.compile(r".*\.(?:net\.0\.proj|proj_in|proj_out|time_emb_proj)")


class Trained(nn.Module):
    """scale * up @ down, in float32 whatever the layer is in: `forward` adds it to a weight, `added` to an output."""

    def __init__(self, layer: nn.Module, rank: int, scale: float, generator: torch.Generator | None):
        super().__init__()
        weight: Any = layer.weight
        self.transposed, self.scale, self.active = isinstance(layer, Conv1D), scale, True
        outs, *ins = reversed(weight.shape) if self.transposed else weight.shape
        ones = [1] * (len(ins) - 1)
        # As nn.Linear begins (and peft): uniform with a deviation of 1 / sqrt(3 fan_in). The product begins at zero.
        start = torch.empty(rank, *ins).uniform_(-1, 1, generator=generator) / math.sqrt(math.prod(ins))
        self.down = nn.Parameter(start.to(weight.device))
        self.up = nn.Parameter(torch.zeros(outs, rank, *ones, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the product added."""
        if not self.active:
            return weight
        product = self.up.flatten(1) @ self.down.flatten(1) * self.scale
        return weight + (product.T if self.transposed else product).reshape(weight.shape).to(weight.dtype)

    def added(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A hook: the output of a layer with that of the product added."""
        if not self.active:
            return output
        x, down, up = inputs[0], self.down.to(inputs[0].dtype), self.up.to(inputs[0].dtype)
        if isinstance(layer, nn.Conv2d):
            more = F.conv2d(F.conv2d(x, down, stride=layer.stride, padding=layer.padding), up)
        else:
            more = F.linear(F.linear(x, down), up)
        return output + more * self.scale


class Lora:
    """The trainable parts of one module, by the names of the layers that they are added to. Made by `add_lora`."""

    def __init__(self, module: nn.Module, parts: dict[str, Trained]):
        self.module, self.parts = module, parts
        self._undo: list[Callable[[], object]] = []
        for name, part in parts.items():
            layer = module.get_submodule(name)
            if READ.fullmatch(name):
                parametrize.register_parametrization(layer, "weight", part)
                self._undo.append(partial(parametrize.remove_parametrizations, layer, "weight", False))
            else:
                self._undo.append(layer.register_forward_hook(part.added).remove)
        for attention in (each for each in module.modules() if isinstance(each, Attention)):
            self._undo.append(partial(setattr, attention, "qkv_fused", attention.qkv_fused))
            attention.qkv_fused = False                    # one product of q, k and v would pass by their hooks

    def parameters(self) -> list[nn.Parameter]:
        """What is to be trained: float32, two matrices a layer."""
        return [parameter for part in self.parts.values() for parameter in (part.down, part.up)]

    def adapter(self, part: str = "unet", **about: Any) -> Adapter:
        """A copy as it is now, on the CPU, to be saved or merged. part: of the checkpoint, see adapter.PARTS.

        about: words for the header of its file, such as the model that it was trained on."""
        layers = {f"{part}.{name}": LowRank(trained.down.detach().cpu().clone(), trained.up.detach().cpu().clone(),
                                            trained.scale) for name, trained in self.parts.items()}
        return Adapter(layers, about=about)

    def load(self, adapter: Adapter, part: str = "unet") -> None:
        """Go on with the values of an adapter of the same layers and ranks. Raises ValueError for another one."""
        given = adapter.of_part(part)
        other = [name for name in given.keys() | self.parts.keys() if name not in given or name not in self.parts
                 or given[name].rank != self.parts[name].down.shape[0]]
        if other:
            raise ValueError(f"{adapter.source} has other layers or ranks than the LoRA in training ({few(other)})")
        with torch.no_grad():
            for name, trained in self.parts.items():
                trained.down.copy_(given[name].down)
                trained.up.copy_(given[name].up * (given[name].scale / trained.scale))

    @contextmanager
    def off(self) -> Iterator[nn.Module]:
        """The module as it was without these parts, for the time of a `with`."""
        for part in self.parts.values():
            part.active = False
        try:
            yield self.module
        finally:
            for part in self.parts.values():
                part.active = True

    def remove(self) -> None:
        """Leave the module as it was."""
        while self._undo:
            self._undo.pop()()


def add_lora(
    module: nn.Module, rank: int = 16, alpha: float | None = None, targets: Sequence[str] = ("attention",), *,
    generator: torch.Generator | None = None,
) -> Lora:
    """Add trainable low-rank parts to layers of a module (UNet, GPT-2 or the projection before it).

    rank: r of the two matrices of each layer. alpha: the product counts alpha / r times, default 1 time
    targets: kinds of layers, see TARGETS. generator: draws the beginning; what is added is zero at first

    The module's own parameters no longer need a gradient. Raises ValueError for an impossible rank or alpha, an unknown
    kind, and where the module has no layer of these kinds.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    alpha = float(rank) if alpha is None else alpha
    if not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"alpha must be above 0, got {alpha!r}")
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise ValueError(f"targets must be of {', '.join(TARGETS)}, got {few(unknown) or 'none'}")
    wanted = re.compile("|".join(TARGETS[name] for name in targets))
    layers = {name: layer for name, layer in module.named_modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d, Conv1D)) and wanted.fullmatch(name)}
    if not layers:
        raise ValueError(f"{type(module).__name__} has no layer of the kinds {', '.join(targets)}")
    module.requires_grad_(False)
    return Lora(module, {name: Trained(layer, rank, alpha / rank, generator) for name, layer in layers.items()})

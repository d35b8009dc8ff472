"""LoRAs for tests: drawn, of every kind of layer."""

from __future__ import annotations

import copy

from ldm2.checkpoints.adapter import Adapter, LowRank
from ldm2.training.lora import TARGETS, add_lora
from tests.helpers import draw

PARTS = {"unet": "unet", "language_model": "gpt2", "projection_model": "projection"}


def make(pipe, path, seed: int = 0, parts=("unet",)) -> str:
    """A LoRA of all kinds of layers of the parts, drawn."""
    layers = {}
    for part in parts:
        module = pipe.unet if part == "unet" else getattr(pipe.text, PARTS[part])
        added = add_lora(copy.deepcopy(module), 2, targets=tuple(TARGETS))
        for number, (name, layer) in enumerate(added.adapter(part).layers.items()):
            layers[name] = LowRank(layer.down, 0.3 * draw(*layer.up.shape, seed=seed + number))
    return str(Adapter(layers).save(path))

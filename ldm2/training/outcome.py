"""What of a UNet is trained, and how the result is written."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm2 import weights
from ldm2.attention import Transformer2D
from ldm2.checkpoints.adapter import FILE, Adapter
from ldm2.checkpoints.convert import convert, license_notice, license_of
from ldm2.checkpoints.writer import write_safetensors
from ldm2.fields import read_json
from ldm2.layers import ResnetBlock
from ldm2.text.encoder import TextEncoder
from ldm2.training.folder import Folder
from ldm2.training.frozen import hasten
from ldm2.training.loop import Recipe, generator_for
from ldm2.training.lora import Lora, add_lora
from ldm2.training.options import PROJECTION, Training
from ldm2.unet import UNet

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclass
class Trained:
    """What is trained. module: holds all that is, and for a full training the rest of the UNet.

    unet: as it is now. loras: by the part of the checkpoint; none for a full training. before: a copy of the UNet from
    before that, where one is needed.
    """

    module: nn.Module
    unet: UNet
    loras: Mapping[str, Lora]
    before: UNet | None = None

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    @contextmanager
    def untrained(self) -> Iterator[nn.Module]:
        """The UNet as it was before the training, for the time of a `with`; what it computes takes no gradient."""
        with torch.no_grad(), self.loras["unet"].off() if "unet" in self.loras else nullcontext():
            yield self.unet if self.before is None else self.before

    def adapter(self, **about: Any) -> Adapter:
        """The LoRA as a file has it. about: words for its header."""
        layers = {name: layer for part, lora in self.loras.items() for name, layer in lora.adapter(part).layers.items()}
        return Adapter(layers, about=about)


def prepare(unet: UNet, options: Training, text: TextEncoder | None = None) -> Trained:
    """Make the UNet ready: the parameters that need a gradient are float32 and in memory of their own.

    text: needed where the projection before GPT-2 is trained too.
    """
    if options.low_rank:
        hasten(unet)
    if options.checkpointing:
        recompute(unet)
    if options.low_rank:
        generator, loras = generator_for(options.seed or 0, 0), {}
        targets = [each for each in options.layers or () if each != PROJECTION]
        parts: dict[str, tuple[nn.Module | None, list[str]]] = {"unet": (unet, targets)}
        if text is not None:
            parts["projection_model"] = text.projection, [PROJECTION]
            text.requires_grad_(False)
        for part, (module, kinds) in parts.items():
            assert module is not None
            module.requires_grad_(False)
            if kinds:
                loras[part] = add_lora(module, options.rank or 1, options.alpha, kinds, generator=generator)
        return Trained(nn.ModuleList(part for lora in loras.values() for part in lora.parts.values()), unet, loras)
    before = copy.deepcopy(unet).requires_grad_(False) if options.asks_the_untrained else None
    for parameter in unet.parameters():
        parameter.data = parameter.detach().clone()        # else they are those of the mapped file
        parameter.requires_grad_(True)
    return Trained(unet, unet, {}, before)


def recompute(unet: UNet) -> None:
    """Keep of each residual block and transformer only what enters it, and compute it again for the gradient."""
    for part in unet.modules():
        if isinstance(part, (ResnetBlock, Transformer2D)):
            part.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)


def recipe(options: Training) -> Recipe:
    """How it is optimised. options: resolved."""
    values = {name: getattr(options, name) for name in
              ("steps", "rate", "warmup", "decay_from", "clip", "weight_decay", "seed", "patience")}
    return Recipe(**values, average=options.average or 0.0)


def bytes_needed(trained: Trained, options: Training) -> int:
    """Disk for the state of a training (with that of the save before) and its result."""
    copies = 4 + (options.patience is not None)            # weights, two moments, their average, the best
    result = 0 if trained.loras else sum(p.nbytes for p in trained.module.parameters())
    return (2 * copies + 1) * 4 * trained.numbers + result


def write(trained: Trained, model: str, load: Mapping[str, Any], path: Path, folder: Folder, steps: int,
          settings: Mapping[str, Any]) -> str:
    """Write the result to OUT. Returns what was made.

    model, load: arguments of `ldm2.load`; path: the checkpoint. settings: those that the result is to be sampled with.
    """
    if not trained.loras:
        return _write_checkpoint(trained.module, model, load, path, folder, settings)
    file = folder.out / FILE
    trained.adapter(base_model=model, steps=steps).save(file, overwrite=True)
    said = " ".join(license_notice(license_of(model, path)))
    words = f"--model {model} --lora {folder.out}{_words(settings)}"
    return f"{said}\nThe LoRA is {file}; try: ldm2 generate \"...\" {words}"


def _write_checkpoint(unet: nn.Module, model: str, load: Mapping[str, Any], path: Path, folder: Folder,
                      settings: Mapping[str, Any]) -> str:
    """A folder in the hub's layout: the model with another UNet, in the precision that it had."""
    names = ("reference", "revision", "local_files_only", "variant", *(("tokenizers",) if path.is_file() else ()))
    done = convert(model, folder.inside / "result", overwrite=True, **{key: load[key] for key in names if key in load})
    file = done.folder / WEIGHTS
    dtype = next(tensor.dtype for tensor in weights.read_safetensors(file).values() if tensor.is_floating_point())
    write_safetensors(file, unet.state_dict(), dtype)
    if settings:
        defaults = done.folder / "ldm2.json"
        before = read_json(defaults) if defaults.exists() else {}
        defaults.write_text(json.dumps({**before, **settings}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    folder.move_in(done.folder, last="model_index.json")
    return f"{done.notice}\nThe model is in {folder.out}; try: ldm2 generate \"...\" --model {folder.out}"


def _words(settings: Mapping[str, Any]) -> str:
    """Options of a request as a command line has them, with a space before each."""
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in settings.items())

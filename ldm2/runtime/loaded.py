"""The models of a checkpoint in this process: where they run, how they are moved, copied, pickled and changed by LoRAs,
and which lengths of sound are made at once."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch

from ldm2.options import exact
from ldm2.runtime import graphs, int8_layers, weight_layout
from ldm2.runtime.compilation import compile_step, is_compiled
from ldm2.runtime.device import W8A8, dtype_name
from ldm2.runtime.lora import Adapters
from ldm2.runtime.memory import STAGES, Stage
from ldm2.schedules import Schedule
from ldm2.text.encoder import TextEncoder
from ldm2.text.encoders import ClapText
from ldm2.text.ranking import Ranker
from ldm2.unet import UNet
from ldm2.vae import VAE
from ldm2.vocoder import Vocoder
from ldm2.windows import Window, plan

MakeRanker = Callable[[ClapText, torch.device], Ranker]


class Loaded:
    """The models of a checkpoint. Built by `ldm2.load`; what each of them does is in `ldm2.stages.Stages`.

    unet, vae, vocoder: the modules; text: the text encoders; schedule: the noise schedule of the training.
    device, dtype: where and in which precision the UNet, VAE and vocoder run; the sampler's state stays float32.
    reference:     whose arithmetic is reproduced, "authors" or "diffusers": the latter makes any length in one piece.
    defaults:      what the checkpoint asks for, such as its length and number of steps.
    origin:        model, revision, reference, dtype, device and version of PyTorch, for the settings of what is made.
    make_ranker:   make_ranker(clap, device) loads what ranks candidates (CLAP's audio branch) when it is first needed.
    loras:         names that stand for files of LoRAs, such as those in the folder lora/ of the checkpoint.
    load:          makes it again: `ldm2.load` with its arguments, by which it is pickled.
    stages:        those whose parts are in memory only inside them (`ldm2.load(low_memory=True)`): whoever uses such a
                   part directly does so `with pipe.stages["unet"]:`.
    """

    def __init__(
        self, unet: UNet, vae: VAE, vocoder: Vocoder, text: TextEncoder, schedule: Schedule, *,
        device: torch.device, dtype: torch.dtype, reference: str = "authors",
        defaults: Mapping[str, object] | None = None, origin: Mapping[str, object] | None = None,
        make_ranker: MakeRanker | None = None, stages: Sequence[Stage] = (),
        load: functools.partial[Loaded] | None = None, loras: Mapping[str, Path] | None = None,
    ):
        self.unet, self.vae, self.vocoder, self.text, self.schedule = unet, vae, vocoder, text, schedule
        self.device, self.dtype, self.reference = device, dtype, reference
        self.defaults = dict(defaults or {})
        self.origin = dict(origin or {})
        self._make_ranker = make_ranker
        self._ranker: Ranker | None = None
        self.stages = {name: Stage(name, device) for name in STAGES} | {stage.name: stage for stage in stages}
        self.low_memory = bool(stages)
        self.adapters = Adapters(unet, text, self.low_memory, loras)
        for stage in stages:
            stage.woken = functools.partial(self.adapters.woken, stage.name)
        self._load = load

    def __reduce__(self) -> tuple:
        """Pickled as what it was loaded from, not its weights: whoever opens it loads it anew, on the same device."""
        if self._load is None:
            raise TypeError("a pipeline that ldm2.load did not make cannot be pickled: pickle its parts")
        now = {"device": str(self.device), "dtype": self._stored_dtype, "compile": is_compiled(self.unet)}
        return _load_again, (functools.partial(self._load, **now), self.schedule, self.adapters.recipe())

    def __copy__(self) -> Loaded:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict) -> Loaded:
        """With weights of its own, as they are now."""
        other = memo[id(self)] = object.__new__(type(self))
        vars(other).update(copy.deepcopy(vars(self), memo))
        if is_compiled(self.unet):
            compile_step(other.unet)
        return other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.origin.get('model')!r}, {self._stored_dtype} on {self.device})"

    @property
    def _stored_dtype(self) -> str:
        """Of the weights: where they are int8, it is not what the models compute in."""
        if not int8_layers.is_int8(self.unet):
            return dtype_name(self.dtype)
        return W8A8 if int8_layers.rounds_inputs(self.unet) else "int8"

    def move(self, device: torch.device, dtype: torch.dtype, text: TextEncoder) -> None:
        """Move UNet, VAE and vocoder, with the weights they have now. text: the text side, which is there already.

        Raises ValueError for a pipeline whose parts come and go (low_memory), and for int8 weights, to or from.
        """
        if {"int8", W8A8} & {self._stored_dtype, dtype_name(dtype)}:
            raise ValueError("int8 weights are made as they are read: load the model again, with the device and dtype")
        if self.low_memory:
            raise ValueError(f"low_memory reads the parts for {self.device}: load the model again for {device}")
        with self.adapters.bare():                         # a sum is rounded once, in the new dtype
            for module in (self.unet, self.vae, self.vocoder):
                graphs.forget(module)
                weight_layout.arrange(module.to(device, dtype))
            self.text = self.adapters.text = text
        self.device, self.dtype, self._ranker = device, dtype, None
        self.origin |= {"dtype": dtype_name(dtype), "device": device.type}
        for stage in self.stages.values():
            stage.device = device

    @property
    def loras(self) -> dict[str, Path]:
        """Names that stand for files of LoRAs in `load_lora` and in requests; names may be added."""
        return self.adapters.files

    def load_lora(self, path: str | PathLike[str], scale: float = 1.0, name: str | None = None) -> str:
        """Change the model by a LoRA, `scale` times, until `unload_lora`; several may be loaded and add up.

        path: a file or folder of diffusers, peft or kohya's scripts, or a name in `loras`
        name: what to unload it by, default that of the file

        Returns the name. A request with an option `lora` of its own is made with those alone. Raises ValueError or
        OSError, one line, for what cannot be read, is no plain LoRA, or does not fit the model.
        """
        return self.adapters.load(path, scale, name)

    def unload_lora(self, name: str | None = None) -> None:
        """Take out a LoRA, or all of them. The weights are bit by bit what they were without it."""
        self.adapters.unload(name)

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Let a LoRA that is loaded count more or less."""
        self.adapters.rescale({name: scale})

    @property
    def sample_rate(self) -> int:
        """Samples per second of the waveforms."""
        return self.vocoder.config.sample_rate

    def latent_shape(self, seconds: float) -> tuple[int, int, int]:
        """(C, T/f, F/f) of the latents that hold `seconds` of sound, rounded up. Raises ValueError below one sample."""
        num_samples = round(seconds * self.sample_rate)
        if num_samples < 1:
            raise ValueError(f"seconds must be at least one sample at {self.sample_rate} Hz, got {seconds:g}")
        return self.latent_shape_for_frames(math.ceil(num_samples / self.vocoder.config.hop_length))

    def latent_shape_for_frames(self, num_frames: int) -> tuple[int, int, int]:
        """(C, T/f, F/f) of the latents that hold `num_frames` mel frames, rounded up."""
        factor = self.vae.config.downsampling
        return self.unet.config.in_channels, math.ceil(num_frames / factor), self.vocoder.config.num_mels // factor

    @property
    def native_latent_frames(self) -> int:
        """Latent frames of the pieces that the model was trained on; longer sounds are made in windows of as many."""
        return self.unet.config.sample_size or 256

    @property
    def vae_tile_frames(self) -> int:
        """Latent frames that the VAE takes at once, 10.24 s at 16 kHz or more: a bound on memory."""
        return max(self.native_latent_frames, 256)

    @property
    def whole(self) -> bool:
        """Whether sound of any length is made in one piece, as diffusers does, unless windows are asked for."""
        return self.reference == "diffusers"

    @property
    def samples_per_latent_frame(self) -> int:
        """Samples per latent frame."""
        return self.vae.config.downsampling * self.vocoder.config.hop_length

    def windows(
        self, num_frames: int, window: float | None = None, overlap: float | None = None, *, loop: bool = False,
        changes: Sequence[float] = (),
    ) -> list[Window] | None:
        """How `denoise` splits a timeline of latent frames; None where the UNet sees all of it at once.

        window:  seconds that the UNet sees at once, default the model's own length (reference="diffusers": any length)
        overlap: seconds that neighbours share, default a quarter of the window; must be shorter than it
        loop:    the end goes on at the start. changes: seconds at which another prompt begins
        """
        if self.whole and window is None and not loop and not changes:
            return None
        frames = self.sample_rate / self.samples_per_latent_frame                       # per second
        width = self.native_latent_frames if window is None else max(1, round(window * frames))
        shared = width // 4 if overlap is None else round(overlap * frames)
        if shared >= width:
            raise ValueError(f"overlap must be shorter than the window of {exact(width / frames)} seconds, "
                             f"got {exact(overlap)}")
        borders = (0, *(change * frames for change in changes))
        windows = plan(num_frames, width, shared, loop=loop, borders=borders)
        return windows if len(windows) > 1 else None


def _load_again(load: Callable[[], Loaded], schedule: Schedule, loras: dict) -> Loaded:
    """A pipeline that was pickled."""
    pipe = load()
    pipe.schedule = schedule
    pipe.adapters.follow(loras)
    return pipe

"""The parts of a checkpoint -> modules with their weights, and a pipeline of these."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ldm2 import weights
from ldm2.checkpoints import hub
from ldm2.checkpoints.fit import check_fit
from ldm2.checkpoints.parts import Checkpoint, Part
from ldm2.config import UNetConfig, VAEConfig, VocoderConfig
from ldm2.fields import named
from ldm2.pipeline import AudioLDM2
from ldm2.runtime import int8_layers, weight_layout
from ldm2.runtime.device import computing_dtype
from ldm2.runtime.memory import Load, Stage
from ldm2.runtime.progress import Progress
from ldm2.schedules import Schedule
from ldm2.text.encoder import TextEncoder
from ldm2.text.encoders import ClapText, T5Text
from ldm2.text.gpt2 import Projection, load_gpt2, load_projection
from ldm2.text.phonemes import PhonemeText
from ldm2.text.ranking import ClapAudio, Ranker, audio_config
from ldm2.unet import UNet
from ldm2.vae import VAE
from ldm2.vocoder import Vocoder

Module = TypeVar("Module", bound=nn.Module)
Device = torch.device | str | None
Dtype = torch.dtype | None

MODELS: dict[str, tuple[Any, Any]] = {
    "unet": (UNet, UNetConfig), "vae": (VAE, VAEConfig), "vocoder": (Vocoder, VocoderConfig),
}


def config_of(part: Part, name: str, reference: str = "authors") -> Any:
    """The config of "unet", "vae" or "vocoder". Raises ValueError naming file and field."""
    further = {"reference": reference} if name == "unet" else {}
    with named(part.config):
        return MODELS[name][1].from_dict(part.fields, part.config, **further)


def model(part: Part, name: str, reference: str = "authors", *, device: Device = None, dtype: Dtype = None) -> Any:
    """The module of "unet", "vae" or "vocoder" with its weights.

    reference: what a single number of heads means, see `UNetConfig.from_dict`. device, dtype: None leaves the tensors
    mapped, as they are in the file. Raises ValueError naming the file.
    """
    config = config_of(part, name, reference)
    with named(part.source):
        with weights.on_meta():
            module = MODELS[name][0](config)
        return weights.load(module, part.tensors_for(dtype), device=device, dtype=dtype, source=part.source)


def text_part(
    part: Part, loader: Callable[..., Module], *more: object, device: Device = None, dtype: Dtype = None
) -> Module:
    """A part of the text side, made by loader(fields, tensors, *more, device, dtype, source)."""
    with named(part.source):
        return loader(part.fields, part.tensors_for(dtype), *more, device=device, dtype=dtype, source=part.source)


def text_encoder(
    checkpoint: Checkpoint, reference: str = "authors", *, device: Device = None, dtype: Dtype = None,
    whole: bool = True,
) -> TextEncoder:
    """The text side of a checkpoint; CLAP's audio branch is not loaded.

    whole: raise ValueError where a part that generating needs is missing, else leave it out.
    """

    def load(name: str, loader: Callable[..., Module], *more: object) -> Module:
        return text_part(checkpoint.require(name), loader, *more, device=device, dtype=dtype)

    clap = t5 = phonemes = projection = gpt2 = num_vectors = None
    if "language_model" in checkpoint:
        projection = load("projection_model", load_projection)
        gpt2 = load("language_model", load_gpt2)
        num_vectors = checkpoint["language_model"].fields.get("max_new_tokens")
    if "text_encoder_2" in checkpoint:
        if checkpoint["text_encoder_2"].fields.get("model_type") == "vits":
            words = checkpoint.tokenizer("phonemes")
            places = _places(checkpoint, projection, gpt2, words, whole)
            phonemes = load("text_encoder_2", PhonemeText.load, words, places)
        else:
            t5 = load("text_encoder_2", T5Text.load, checkpoint.tokenizer("t5"))
    if (whole or "text_encoder" in checkpoint) and (gpt2 is not None or t5 is None):
        clap_part = checkpoint.require("text_encoder")     # beside T5 alone, CLAP is there for ranking only
        clap = text_part(clap_part, ClapText.load, checkpoint.tokenizer("clap"), device=device, dtype=dtype)
    return TextEncoder(clap=clap, t5=t5, phonemes=phonemes, projection=projection, gpt2=gpt2, num_vectors=num_vectors,
                       reference=reference)


def _places(checkpoint: Checkpoint, projection: Projection | None, gpt2: Any, words: Any, whole: bool) -> int:
    """Places of the phonemes in a sequence: those of the table of positions, else what the tokenizer sets as limit."""
    source = checkpoint.source
    if gpt2 is None or projection is None:
        part = checkpoint.get("projection_model")
        table = None if part is None else part.tensors.get("learnable_positional_embedding")
        if table is None or whole:
            raise ValueError(f"{source}: phonemes need a language_model and a projection_model, which it lacks")
        return table.shape[2]
    places, room = projection.config.position_embeddings or words.model_max_length, gpt2.config.n_positions - 5
    if not 0 < places < room:
        raise ValueError(
            f"{source}: GPT-2 has room for {room - 1} phonemes, but projection_model/config.json has no table of "
            f"positions and tokenizer_2/tokenizer_config.json sets model_max_length {places:.6g}"
            if projection.config.position_embeddings is None else
            f"{source}: max_seq_length of projection_model/config.json must be at most the {room - 1} that GPT-2 has "
            f"room for, got {places}"
        )
    return places


def ranker(checkpoint: Checkpoint, text: ClapText | None = None, *, device: Device = None) -> Ranker:
    """CLAP's audio branch of a checkpoint, and its text branch unless that is given, in float32.

    Raises ValueError for a checkpoint that has none.
    """
    part = checkpoint.get("text_encoder")
    if part is None or checkpoint.extractor is None or not checkpoint.can_rank:
        lacking = "no CLAP with an audio branch and a feature_extractor"
        raise ValueError(f"{checkpoint.source} has {lacking}: this checkpoint cannot rank")
    extractor, fields, tensors = checkpoint.extractor(), part.fields, part.tensors
    bins = audio_config(fields, part.source).num_mel_bins
    if extractor.feature_size != bins:
        sizes = f"feature_extractor gives {extractor.feature_size} mel bins, it takes {bins}"
        raise ValueError(f"{part.source} is of another model than what is beside it: the {sizes}")
    if text is None:
        text = ClapText.load(fields, tensors, checkpoint.tokenizer("clap"), device=device, dtype=torch.float32,
                             source=part.source)
    return Ranker(text, ClapAudio.load(fields, tensors, extractor, device=device, source=part.source))


def pipeline(
    read: Callable[[], Checkpoint], *, device: torch.device, dtype: torch.dtype, w8a8: bool = False,
    reference: str = "authors", low_memory: bool = False, report: Progress = lambda stage, done, total: None,
    origin: Mapping[str, Any], load: functools.partial | None = None,
) -> AudioLDM2:
    """All parts of a checkpoint as a pipeline.

    read: () -> the checkpoint. low_memory: it is read again each time that a part begins its stage, which has its
    weights in memory until the stage ends. w8a8: of int8 weights, let the UNet's linear layers round
    their inputs. origin, load: see `Loaded`. Raises ValueError, one line.
    """
    checkpoint = read()
    again = read if low_memory else lambda: checkpoint
    for name in MODELS:                                    # before the weights of any part are read
        config_of(checkpoint.require(name), name, reference)
    scheduler = checkpoint.require("scheduler")
    schedule = Schedule.from_dict(scheduler.fields, scheduler.config)

    def read_part(name: str, device: torch.device | str) -> nn.Module:
        if name == "text":
            return text_encoder(again(), reference, device=device, dtype=dtype)
        part = model(again().require(name), name, reference, device=device, dtype=dtype)
        if w8a8 and name == "unet":
            int8_layers.round_inputs(part)
        return part

    def make_ranker(clap: ClapText, device: torch.device) -> Ranker:
        with hub.opened(Path(checkpoint.source), origin["model"]):
            return ranker(again(), clap, device=device)

    loads: dict[str, Load] = {name: functools.partial(read_part, name) for name in ("text", *MODELS)}
    return AudioLDM2(
        **_modules(loads, device, low_memory, report), schedule=schedule,
        defaults={**_defaults(schedule), **checkpoint.defaults},
        make_ranker=make_ranker if checkpoint.can_rank else None, device=device, dtype=computing_dtype(dtype),
        reference=reference, origin=origin, load=load, loras=checkpoint.loras,
    )


def _defaults(schedule: Schedule) -> dict[str, Any]:
    """What a checkpoint asks for by its scheduler: consistency models are sampled as such."""
    consistent = schedule.config.get("_class_name") == "LCMScheduler"
    return {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0} if consistent else {}


def _modules(loads: Mapping[str, Load], device: torch.device, low_memory: bool, report: Progress) -> dict[str, Any]:
    """The modules by their names, as AudioLDM2 takes them; with low_memory asleep outside of their stages."""
    if not low_memory:
        modules: dict[str, Any] = {}
        for name, load in loads.items():
            report("loading", len(modules), len(loads))
            modules[name] = load(device)
        check_fit(**modules)
        return {name: weight_layout.arrange(module) for name, module in modules.items()}
    stages = [Stage(name, device, load) for name, load in loads.items()]
    modules = {stage.name: stage.module for stage in stages}
    check_fit(**modules)
    return modules | {"stages": stages}

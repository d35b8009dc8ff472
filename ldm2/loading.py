"""A name or a path -> a pipeline ready to generate: which device, which dtype, which files."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ldm2 import hub, original, weights
from ldm2.config import UNetConfig, VAEConfig, VocoderConfig
from ldm2.pipeline import AudioLDM2
from ldm2.ranking import Ranker
from ldm2.recipe import DEFAULTS
from ldm2.result import Result
from ldm2.schedules import Schedule
from ldm2.text import TextEncoder
from ldm2.unet import UNet
from ldm2.vae import VAE
from ldm2.vocoder import Vocoder

DEFAULT_MODEL = "cvssp/audioldm2"
REFERENCES = ("authors", "diffusers")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    model: str | Path = DEFAULT_MODEL, *, device: str = "auto", dtype: str = "auto", reference: str = "authors",
    revision: str | None = None, local_files_only: bool = False, tokenizers: str | Path | None = None,
) -> AudioLDM2:
    """A checkpoint, ready to generate.

    model:            short name ("audioldm2", "tiny"), hub name ("cvssp/audioldm2"), local folder in the hub's layout,
                      or an authors' `.pth` or `.ckpt` file
    device:           "auto" (CUDA, else Apple's MPS, else CPU) or a torch device
    dtype:            "auto" (float16 on CUDA, else float32), "float32", "float16" or "bfloat16"
    reference:        whose arithmetic: "authors" as the model was trained, or "diffusers" (see weights.md)
    revision:         branch, tag or commit on the hub
    local_files_only: use the cache and never the network
    tokenizers:       for authors' files, which hold none: a folder with `tokenizer` and `tokenizer_2`; default: their
                      own hub repositories

    Raises ValueError or OSError, one line each, naming what is missing or does not fit.
    """
    if reference not in REFERENCES:
        raise ValueError(f"unknown reference {reference!r}, choose from {', '.join(REFERENCES)}")
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    path = hub.resolve(str(model), revision=revision, local_files_only=local_files_only)
    settings = {
        "device": place,
        "dtype": precision,
        "origin": {"model": str(model), "revision": revision, "reference": reference, "dtype": str(precision)[6:]},
    }
    if path.is_dir():
        if tokenizers is not None:
            raise ValueError(f"{path} brings its own tokenizers: leave out tokenizers={str(tokenizers)!r}")
        return _from_folder(path, reference, settings)
    return _from_original(path, reference, tokenizers, local_files_only, settings)


def _from_folder(folder: Path, reference: str, settings: dict) -> AudioLDM2:
    """A checkpoint in the hub's layout."""
    where = {"device": settings["device"], "dtype": settings["dtype"]}
    text = TextEncoder.from_folder(folder, reference=reference, **where)
    return AudioLDM2(
        unet=_part(UNet, UNetConfig.from_json(folder / "unet/config.json", reference), folder / "unet", **where),
        vae=_part(VAE, VAEConfig.from_json(folder / "vae/config.json"), folder / "vae", **where),
        vocoder=_part(Vocoder, VocoderConfig.from_json(folder / "vocoder/config.json"), folder / "vocoder", **where),
        text=text,
        schedule=Schedule.from_json(folder / "scheduler/scheduler_config.json"),
        defaults=_checkpoint_defaults(folder),
        make_ranker=lambda: Ranker.from_folder(folder, text.clap, device=settings["device"]),
        **settings,
    )


def _from_original(
    path: Path, reference: str, tokenizers: str | Path | None, local_files_only: bool, settings: dict
) -> AudioLDM2:
    """A checkpoint in the authors' layout."""
    found = original.components(
        path, tokenizers=tokenizers, reference=reference, device=settings["device"], dtype=settings["dtype"],
        local_files_only=local_files_only,
    )
    lacking = [name for name in ("unet", "vae", "vocoder", "text") if getattr(found, name) is None]
    if lacking:
        raise ValueError(f"{path} holds no {' and no '.join(lacking)}: generating needs all parts in one file")
    make_ranker = functools.partial(
        original.ranker, found.parts, found.text.clap, tokenizers=tokenizers, device=settings["device"],
        local_files_only=local_files_only,
    )
    can_rank = "text_encoder" in found.parts
    return AudioLDM2(
        unet=found.unet, vae=found.vae, vocoder=found.vocoder, text=found.text, schedule=found.schedule,
        make_ranker=make_ranker if can_rank else None, **settings,
    )


@functools.lru_cache(maxsize=1)
def _loaded(model: str, device: str, dtype: str, reference: str) -> AudioLDM2:
    return load(model, device=device, dtype=dtype, reference=reference)


def generate(
    prompt: str | Sequence[str], *, model: str = DEFAULT_MODEL, device: str = "auto", dtype: str = "auto",
    reference: str = "authors", **settings,
) -> Result:
    """`load` and `AudioLDM2.generate` in one call; the last model stays loaded. `settings` as for the latter."""
    return _loaded(model, device, dtype, reference).generate(prompt, **settings)


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes the best there is. Raises ValueError if it is unknown or absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"unknown device {name!r}, choose from auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: torch finds {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not there: it needs macOS on Apple silicon")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown device {name!r}, choose from auto, cpu, cuda, cuda:N, mps")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is float16 on CUDA and float32 elsewhere. Raises ValueError if it is unknown."""
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}, choose from auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _part(build: type[nn.Module], config, folder: Path, device: torch.device, dtype: torch.dtype):
    """A module with the weights of its folder."""
    with weights.parameters_on_meta():
        module = build(config)
    return weights.load(module, weights.read_tensors(folder), device=device, dtype=dtype, source=folder)


def _checkpoint_defaults(folder: Path) -> dict:
    """What a checkpoint asks for in its ldm2.json: any of seconds, steps, guidance_scale and sampler."""
    path = folder / "ldm2.json"
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    unknown = set(values) - set(DEFAULTS) if isinstance(values, dict) else {"no object"}
    if unknown:
        raise ValueError(f"{path} may hold {', '.join(DEFAULTS)}, found {', '.join(sorted(unknown))}")
    return values

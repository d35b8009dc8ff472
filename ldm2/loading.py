"""A name or a path -> a pipeline ready to generate: which device, which dtype, which files."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from ldm2 import weights
from ldm2.call import Call
from ldm2.checkpoints import hub, original
from ldm2.checkpoints.fit import check_fit
from ldm2.checkpoints.known import DEFAULT_MODEL
from ldm2.config import REFERENCES, UNetConfig, VAEConfig, VocoderConfig
from ldm2.fields import named, read_json, short
from ldm2.options import options_of
from ldm2.pipeline import AudioLDM2
from ldm2.result import Result
from ldm2.runtime import weight_layout
from ldm2.runtime.compilation import check_compiler, compile_step
from ldm2.runtime.device import choose_device, choose_dtype
from ldm2.runtime.inference import check_fork, ordinary
from ldm2.runtime.memory import Load, Stage
from ldm2.runtime.progress import Progress, shown
from ldm2.schedules import Schedule
from ldm2.settings import Settings
from ldm2.text.encoder import TextEncoder
from ldm2.text.encoders import ClapText
from ldm2.text.ranking import Ranker
from ldm2.unet import UNet
from ldm2.vae import VAE
from ldm2.vocoder import Vocoder

P = ParamSpec("P")
R = TypeVar("R")


def load(
    model: str | Path = DEFAULT_MODEL, *, device: str = "auto", dtype: str = "auto", reference: str = "authors",
    revision: str | None = None, local_files_only: bool = False, tokenizers: str | Path | None = None,
    low_memory: bool = False, compile: bool = False, variant: str | None = None,
    cache_dir: str | Path | None = None, token: str | bool | None = None, progress: bool | Progress = False,
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
    low_memory:       read each part from its files when its stage begins, and let go of it when the stage ends; the
                      sound is the same
    compile:          compile the UNet's step with torch.compile, at its first call, which takes minutes
    variant:          word in the names of the weight files to read, such as "fp16" for model.fp16.safetensors
    cache_dir:        the hub's cache, default HF_HUB_CACHE or what HF_HOME says
    token:            for private and gated repositories; default HF_TOKEN, or the one that `hf auth login` stored
    progress:         True shows on stderr what is read; a function is called as progress(stage, done, total)

    Raises ValueError or OSError, one line each, naming what is missing or does not fit.
    """
    if reference not in REFERENCES:
        raise ValueError(f"unknown reference {reference!r}, choose from {', '.join(REFERENCES)}")
    check_fork()
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    if compile:
        check_compiler(place)
    path = hub.resolve(
        str(model), revision, local_files_only, cache_dir=cache_dir, token=token, variant=variant
    ).absolute()                                           # parts may be read later, from another current folder
    tokenizers = None if tokenizers is None else Path(tokenizers).expanduser().absolute()
    settings = {
        "device": place,
        "dtype": precision,
        "reference": reference,
        "origin": {"model": str(model), "revision": hub.commit_of(path) or revision, "reference": reference,
                   "dtype": str(precision)[6:], "device": place.type, "torch": str(torch.__version__)},
        "load": functools.partial(                         # without the token, which is a secret
            load, str(path) if Path(model).expanduser().exists() else str(model), reference=reference,
            revision=revision, local_files_only=local_files_only, tokenizers=tokenizers, low_memory=low_memory,
            variant=variant, cache_dir=cache_dir,
        ),
    }
    if path.is_dir() and tokenizers is not None:
        raise ValueError(f"{path} brings its own tokenizers: leave out tokenizers={str(tokenizers)!r}")
    with ordinary(), hub.opened(path, model), shown(progress) as report:
        if path.is_dir():
            pipe = _from_folder(path, reference, settings, low_memory, variant, report)
        else:
            pipe = _from_original(path, reference, tokenizers, local_files_only, settings, low_memory, report)
    if compile:
        compile_step(pipe.unet)
    return pipe


def _from_folder(
    folder: Path, reference: str, settings: dict, low_memory: bool, variant: str | None, report: Progress
) -> AudioLDM2:
    """A checkpoint in the hub's layout."""
    dtype = settings["dtype"]
    configs = {
        UNet: UNetConfig.from_json(folder / "unet/config.json", reference),
        VAE: VAEConfig.from_json(folder / "vae/config.json"),
        Vocoder: VocoderConfig.from_json(folder / "vocoder/config.json"),
    }
    read_text = functools.partial(TextEncoder.from_folder, folder, reference=reference, dtype=dtype, variant=variant)
    loads: dict[str, Load] = {"text": lambda device: read_text(device=device)}
    for build, config in configs.items():
        name = build.__name__.lower()
        loads[name] = functools.partial(_part, build, config, folder / name, dtype=dtype, variant=variant)
    parts = _parts(loads, settings["device"], low_memory, report)

    def make_ranker(clap: ClapText, device: torch.device) -> Ranker:
        with hub.opened(folder, settings["origin"]["model"]):
            return Ranker.from_folder(folder, clap, device=device, variant=variant)

    return AudioLDM2(
        **parts,
        schedule=Schedule.from_json(folder / "scheduler/scheduler_config.json"),
        defaults=_checkpoint_defaults(folder),
        make_ranker=make_ranker,
        **settings,
    )


def _from_original(
    path: Path, reference: str, tokenizers: str | Path | None, local_files_only: bool, settings: dict, low_memory: bool,
    report: Progress,
) -> AudioLDM2:
    """A checkpoint in the authors' layout."""
    found = original.read(path)
    read = functools.partial(original.read, path) if low_memory else lambda: found
    where: dict[str, Any] = {"tokenizers": tokenizers, "local_files_only": local_files_only}

    def load(name: str, device: torch.device | str) -> nn.Module:
        part = original.part(read(), name, reference=reference, device=device, dtype=settings["dtype"],
                             source=f"{path}: ", **where)
        if part is None:
            raise ValueError(f"{path} holds no {name}: generating needs all parts in one file")
        return part

    loads: dict[str, Load] = {name: functools.partial(load, name) for name in ("unet", "vae", "vocoder", "text")}
    parts = _parts(loads, settings["device"], low_memory, report)

    def make_ranker(clap: ClapText, device: torch.device) -> Ranker:
        with named(path):
            return original.ranker(read(), clap, device=device, **where)

    return AudioLDM2(
        **parts,
        schedule=original.schedule(found, str(path)),
        make_ranker=make_ranker if "text_encoder" in found else None,
        **settings,
    )


def _parts(loads: dict[str, Load], device: torch.device, low_memory: bool, report: Progress) -> dict:
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


_loading = threading.Lock()


@functools.lru_cache(maxsize=1)
def _loaded(model: str, device: str, dtype: str, reference: str) -> AudioLDM2:
    return load(model, device=device, dtype=dtype, reference=reference)


@dataclass(frozen=True, kw_only=True)
class _Request(Call):
    """What `generate` takes: the options of a call, and those of the model that it is for."""

    model: str = DEFAULT_MODEL
    device: str = "auto"
    dtype: str = "auto"
    reference: str = "authors"


def _takes(request: Callable[P, Call]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Decorator: type checkers and editors see the fields of `request` as the parameters of a function."""
    return lambda function: function


@_takes(_Request)
def generate(
    prompt: str | Sequence[str], *, model: str = DEFAULT_MODEL, device: str = "auto", dtype: str = "auto",
    reference: str = "authors", **settings: Any,
) -> Result:
    """`load` and `AudioLDM2.generate` in one call; the last model stays loaded. `settings` as for the latter."""
    with _loading:                                         # else threads would each load it
        pipe = _loaded(model, device, dtype, reference)
    return pipe.generate(prompt, **settings)


def _part(
    build: type[nn.Module], config, folder: Path, device: torch.device | str, *, dtype: torch.dtype,
    variant: str | None,
) -> nn.Module:
    """A module with the weights of its folder."""
    with named(folder):
        with weights.on_meta():
            module = build(config)
        tensors = weights.read_tensors(folder, variant, to_copy=dtype != torch.float32)
        return weights.load(module, tensors, device=device, dtype=dtype, source=folder)


def _checkpoint_defaults(folder: Path) -> dict[str, Any]:
    """What a checkpoint asks for in its ldm2.json, such as its length and number of steps. Raises ValueError."""
    path = folder / "ldm2.json"
    if not path.exists():
        return {}
    values = read_json(path)
    known = {name: each for name, each in options_of(Settings).items() if each.of_checkpoint}
    unknown = set(values) - set(known)
    if unknown:
        raise ValueError(f"{path} may hold {', '.join(known)}, found {short(sorted(unknown))}")
    with named(path):
        return {name: known[name].kind.check(name, value) for name, value in values.items()}

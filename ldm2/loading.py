"""A name or a path -> a pipeline ready to generate: which device, which dtype, which files."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from ldm2.call import Call
from ldm2.checkpoints import build, hub, int8, reading
from ldm2.checkpoints.known import DEFAULT_MODEL
from ldm2.config import REFERENCES
from ldm2.options import check_flag
from ldm2.pipeline import AudioLDM2
from ldm2.result import Result
from ldm2.runtime.compilation import check_compiler, compile_step
from ldm2.runtime.device import W8A8, choose_device, choose_dtype, chosen_name
from ldm2.runtime.inference import check_fork, ordinary
from ldm2.runtime.progress import Progress, shown

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
    dtype:            "auto" (float16 on CUDA; else int8 for a folder that was converted to it, and float32), "float32",
                      "float16", "bfloat16" or, on a CPU, "int8": weights of a byte a number, a quarter of the memory;
                      "w8a8": the same weights, and the UNet's transformers multiply bytes with bytes, which is faster
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
    for name, flag in {"local_files_only": local_files_only, "low_memory": low_memory, "compile": compile}.items():
        check_flag(name, flag)                             # "no" is true
    if reference not in REFERENCES:
        raise ValueError(f"unknown reference {reference!r}, choose from {', '.join(REFERENCES)}")
    check_fork()
    place = choose_device(device)
    named = chosen_name(dtype, place)
    if compile:
        check_compiler(place)
    path = hub.resolve(
        str(model), revision, local_files_only, cache_dir=cache_dir, token=token, variant=variant
    ).absolute()                                           # parts may be read later, from another current folder
    tokenizers = _checked(tokenizers, path)
    if dtype == "auto" and place.type == "cpu" and int8.recorded(path):
        named = "int8"
    origin = {
        "model": str(model), "revision": hub.commit_of(path) or revision, "reference": reference,
        "dtype": named, "device": place.type, "torch": str(torch.__version__),
    }
    again = functools.partial(                             # without the token, which is a secret
        load, str(path) if Path(model).expanduser().exists() else str(model), reference=reference, revision=revision,
        local_files_only=local_files_only, tokenizers=tokenizers, low_memory=low_memory, variant=variant,
        cache_dir=cache_dir,
    )
    read = functools.partial(
        reading.read, path, variant=variant, tokenizers=tokenizers, local_files_only=local_files_only
    )
    with ordinary(), hub.opened(path, model), shown(progress) as report:
        pipe = build.pipeline(
            read, device=place, dtype=choose_dtype(named, place), w8a8=named == W8A8, reference=reference,
            low_memory=low_memory, report=report, origin=origin, load=again,
        )
    if compile:
        compile_step(pipe.unet)
    return pipe


def _checked(tokenizers: str | Path | None, path: Path) -> Path | None:
    """The folder of tokenizers for the checkpoint at `path`. Raises ValueError for one that has its own."""
    if tokenizers is None:
        return None
    if path.is_dir():
        raise ValueError(f"{path} brings its own tokenizers: leave out tokenizers={str(tokenizers)!r}")
    return Path(tokenizers).expanduser().absolute()


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

"""A pipeline -> a folder in the hub's layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import numpy as np
from torch import Tensor

from ldm2.checkpoints.convert import convert
from ldm2.compat.components import WEIGHTED, Components, read
from ldm2.compat.parts import check_safe

__all__ = ["check_safe", "save"]


def save(pipe: Components, folder: str | PathLike, variant: str | None) -> None:
    """Write the UNet, VAE and vocoder as they are now, the other parts as their files are, and the scheduler.

    The folder may exist; what is in it stays unless it has the name of a file of the checkpoint. Raises ValueError for
    an offloaded pipeline.
    """
    if pipe._model.low_memory:
        raise ValueError("an offloaded pipeline holds no weights: call remove_all_hooks() before saving")
    target = Path(folder).expanduser().absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        made = Path(place) / target.name
        convert(pipe._folder, made, pipe.dtype, reference=pipe._reference, variant=pipe._variant)
        for name in WEIGHTED:
            pipe._parts[name].save_weights(made / name)
        _write_scheduler(pipe, made)
        if variant is not None:
            for path in made.glob("*/*.safetensors"):
                os.replace(path, path.with_name(f"{path.stem}.{variant}.safetensors"))
        shutil.copytree(made, target, dirs_exist_ok=True)


def _write_scheduler(pipe: Components, folder: Path) -> None:
    """The scheduler as it is now, in its file and in the index."""
    name = type(pipe.scheduler).__name__
    fields = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    _write(folder / "scheduler/scheduler_config.json", {"_class_name": name} | fields)
    index = read(folder / "model_index.json")
    _write(folder / "model_index.json", index | {"scheduler": ["diffusers", name]})


def _write(path: Path, fields: Mapping) -> None:
    path.write_text(json.dumps(fields, indent=2, default=_plain) + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    """What JSON has for a number or a table of numpy and torch."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    raise ValueError(f"a scheduler's option cannot be written as JSON: {value!r}")

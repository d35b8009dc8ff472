"""A folder in the hub's layout, or an authors' file -> its parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm2 import weights
from ldm2.checkpoints import hub_folder, original
from ldm2.checkpoints.parts import Checkpoint, Part, Tensors
from ldm2.fields import named, read_json, short
from ldm2.options import options_of
from ldm2.settings import Settings
from ldm2.text.ranking import read_extractor
from ldm2.text.tokenizers import SOURCES, read_folder


def read(
    path: Path, *, variant: str | None = None, config: Mapping[str, Any] | str | Path | None = None,
    tokenizers: str | Path | None = None, local_files_only: bool = False,
) -> Checkpoint:
    """The parts of a checkpoint.

    variant: of a folder's weight files, see `hub_folder.weight_files`; config, tokenizers, local_files_only: of an
    authors' file, see `original.components`. Raises ValueError, one line that names the file.
    """
    if path.is_dir():
        return read_hub_folder(path, variant)
    return original.read(path, config, tokenizers=tokenizers, local_files_only=local_files_only)


def read_hub_folder(path: str | Path, variant: str | None = None) -> Checkpoint:
    """The parts that the model_index.json of a folder lists, each read when it is asked for.

    Raises ValueError naming the file.
    """
    path = Path(path)
    parts = {name: _part(path / name, kind, variant) for name, kind in hub_folder.parts(path).items()}
    extractor: Callable[[], Any] | None = None
    if "feature_extractor" in parts:
        extractor = functools.partial(read_extractor, path / "feature_extractor")
    loras = {file.stem: file for file in sorted(path.glob("lora/*.safetensors"))}
    return Checkpoint(
        str(path), parts, functools.partial(_tokenizer, path), extractor, _defaults(path / "ldm2.json"), loras
    )


def _part(folder: Path, kind: str, variant: str | None) -> Part:
    """A part of a folder in the hub's layout; schedulers, tokenizers and the like have no tensors."""

    def read_tensors(to_copy: bool) -> Tensors:
        return {} if hub_folder.WITHOUT_WEIGHTS.fullmatch(kind) else weights.read_tensors(folder, variant, to_copy)

    config = folder / ("scheduler_config.json" if folder.name == "scheduler" else "config.json")
    return Part(str(folder), str(config), functools.partial(read_json, config), read_tensors, kind, folder)


def _tokenizer(path: Path, encoder: str) -> Any:
    source = SOURCES[encoder]
    return read_folder(source.kind, path / source.folder)


def _defaults(path: Path) -> dict[str, Any]:
    """What an ldm2.json asks for, {} where there is none. Raises ValueError for any option that is not a model's."""
    if not path.exists():
        return {}
    values = read_json(path)
    known = {name: each for name, each in options_of(Settings).items() if each.of_checkpoint}
    unknown = set(values) - set(known)
    if unknown:
        raise ValueError(f"{path} may hold {', '.join(known)}, found {short(sorted(unknown))}")
    with named(path):
        return {name: known[name].kind.check(name, value) for name, value in values.items()}

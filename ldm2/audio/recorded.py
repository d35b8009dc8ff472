"""What a file says of how its sound was made: the settings in the comment of a sound file, or a file of settings.

Plain values by the names of today's options (`ldm2.settings.Settings`), whichever version of ldm2 wrote them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ldm2 import fields
from ldm2.audio.reading import read_metadata

_FOREIGN_TO_EDITS = ("loop", "seconds")    # of version 0.1.0: written for every edit, though none took them


def read(path: str | PathLike[str]) -> dict[str, Any]:
    """The settings in a file .json or .toml, or in a sound file of ldm2: options and origin by their names.

    Raises ValueError or OSError, one line with the path, for a file that cannot be read and one without settings.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    fields.check_file(path)
    reader = {".json": json.loads, ".toml": tomllib.loads}.get(path.suffix.lower())
    told = _comment(path) if reader is None else _parsed(path, reader)
    return _of_today(told)


def _parsed(path: Path, reader: Callable[[str], Any]) -> dict[str, Any]:
    """The table in a text file."""
    try:
        told = reader(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:                            # of the text, or of its encoding
        raise ValueError(f"{path} is not {path.suffix[1:].upper()}: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    if not isinstance(told, dict):
        raise ValueError(f"{path} must hold options by their names, got {type(told).__name__}")
    return told


def _comment(path: Path) -> dict[str, Any]:
    """The settings in the comment of a sound file."""
    tags = read_metadata(path)
    try:
        told = json.loads(tags.get("comment", ""))
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or "ldm2" not in told:
        maker = f" (made by {tags['software']!r:.60})" if tags.get("software") else ""
        raise ValueError(f"{path} holds no settings of ldm2{maker}")
    return told


def _of_today(told: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as this version writes them. Version 0.1.0 kept those of an edit apart, and knew its input by name."""
    edit = told.get("edit")
    if not isinstance(edit, Mapping):
        return dict(told)
    told = {name: value for name, value in told.items() if name not in ("edit", *_FOREIGN_TO_EDITS)}
    edit = {"seconds" if name == "extension" else name: value for name, value in edit.items()}
    return {**told, **edit, "prompt": told.get("prompt") or None}

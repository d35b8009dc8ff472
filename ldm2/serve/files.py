"""What can be had of sound files: other formats, pictures, and the settings in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ldm2 import audio
from ldm2.audio import recorded, spectrogram
from ldm2.fields import one_line
from ldm2.serve.errors import Refused, invalid
from ldm2.settings import Settings


def converted(path: Path, format: str) -> Path:
    """A sound file in another format, with the same settings inside, beside the first. Raises Refused.

    Where a format has several encodings it is the one that keeps most of the file's.
    """
    target = path.with_suffix(f".{format}")
    if target == path or target.exists():
        return target
    try:
        channels, rate = _read(path)
        encoding = audio.nearest_encoding(target, audio.describe(path).encoding)
        audio.write(target, channels, rate, overwrite=True, metadata=audio.read_metadata(path), encoding=encoding)
    except ValueError as error:
        raise invalid(one_line(error).replace(f"{path.parent}/", ""), "format") from None
    return target


def _read(path: Path) -> tuple[np.ndarray, int]:
    """The samples of a result. Raises Refused where it has been removed in this moment."""
    try:
        return audio.read_channels(path)
    except FileNotFoundError:
        raise Refused(404, "the sound is not kept any more", "no_sound") from None


def part(span: str | None, size: int) -> range | None:
    """Which of a file's bytes the header Range asks for; None for all: of several parts, and of none that is there."""
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", span or "")
    if found is None or not any(found.groups()):
        return None
    first, last = (int(text) if text else None for text in found.groups())
    if first is None:
        return range(max(0, size - last), size) or None
    return range(first, size if last is None else min(size, last + 1)) or None


def picture(path: Path) -> bytes:
    """The spectrogram of a sound file as a PNG: time from left to right, low frequencies below, light is loud."""
    channels, rate = _read(path)
    return spectrogram.waveform_png(channels.mean(axis=0), rate)


def settings_in(path: Path) -> dict[str, Any]:
    """The options in a file of ldm2, by the names of today, and the model that they were for. Raises Refused."""
    try:
        settings = Settings.from_file(path).plain()
        model = recorded.read(path).get("model")
    except (ValueError, OSError) as error:
        raise Refused(400, one_line(error).replace(f"{path.parent}/", ""), "no_settings", "file") from None
    return {name: value for name, value in settings.items() if value is not None} | {"model": model}

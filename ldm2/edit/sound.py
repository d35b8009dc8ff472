"""A sound that comes in, as it is. The level is kept: nothing here makes a sound louder or softer."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm2 import audio
from ldm2.fields import sha256_of
from ldm2.runtime.host import usual_numpy
from ldm2.settings import MAX_SECONDS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sound:
    """An input as it is.

    channels: (channels, N) at `sample_rate` Hz, float32 (float64 where a file holds more, see audio.read_channels)
    mono: (N,), the one channel that a model hears of them
    path, encoding: of the file (see audio.FileInfo), or None if there is none
    sha256: of the file's bytes when it was read, or None
    """

    channels: np.ndarray
    mono: np.ndarray
    sample_rate: int
    path: Path | None = None
    encoding: str | None = None
    sha256: str | None = None

    @property
    def seconds(self) -> float:
        return audio.samples_to_seconds(len(self.mono), self.sample_rate)

    def at(self, sample_rate: int) -> np.ndarray:
        """What a model of this rate (Hz) hears, (N,): float32, and `mono` itself at the input's own rate."""
        return audio.resample(self.mono, self.sample_rate, sample_rate)


@usual_numpy
def open_sound(
    source: str | Path | np.ndarray | Tensor | Sound, sample_rate: int | None = None, channel: int | None = None
) -> Sound:
    """A sound from a file, from another Sound, or from samples.

    source:      samples are (N,) or (channels, N) floating point with full scale at -1..1
    sample_rate: Hz of the samples; a file knows its own
    channel:     index from 0 of the channel that a model hears, None for the mean of all

    Raises ValueError, one line, for what is not a sound (no samples, NaN or infinite ones, another shape or order,
    integers, no rate, a file that cannot be read or that changes meanwhile, a channel that is not there), and OSError
    for a file that is not there.
    """
    if isinstance(source, Sound):
        return replace(source, mono=audio.mix(source.channels, channel))
    if isinstance(source, (str, Path)):
        if sample_rate is not None:
            raise ValueError(f"do not pass sample_rate {sample_rate} for a file: {source} carries its own")
        return _read(Path(source), channel)
    channels = np.atleast_2d(audio.as_samples(source))
    return Sound(channels, audio.mix(channels, channel), audio.check_rate(sample_rate))


def _read(path: Path, channel: int | None) -> Sound:
    """A sound from a file, with a digest of the bytes that it was made of."""
    about = audio.describe(path)                           # refuses what is no regular file, which could not be hashed
    before = _state(path)
    sha256 = sha256_of(path)
    channels, rate = audio.read_channels(path, MAX_SECONDS)
    if _state(path) != before:
        raise ValueError(f"{path} has changed while it was read")
    try:
        return Sound(channels, audio.mix(channels, channel), rate, path, about.encoding, sha256)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _state(path: Path) -> tuple[int, ...]:
    """What changes when somebody writes to a file, or puts another in its place."""
    about = os.stat(path)
    return about.st_ino, about.st_size, about.st_mtime_ns

"""Sound out of files, by libsndfile. Samples survive reading unchanged: an integer v of b bits is v / 2**(b - 1).

What float32 cannot hold, of files with integers of 32 bits and floats of 64, is float64.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm2.audio import mp3, ogg, tags
from ldm2.audio.samples import mix, resample
from ldm2.options import exact
from ldm2.runtime.host import usual_numpy

if TYPE_CHECKING:
    import soundfile

# Formats whose decoders skip what is damaged, and what looks for it.
CHECKS = {"MP3": mp3.check, "OGG": ogg.check}
# What libsndfile calls the size of the samples in its account of a header; a header alone may be wrong elsewhere.
STATED: dict[str | None, tuple[str, ...]] = {
    None: ("data", "ssnd", "data size"), "W64": ("riff",), "RF64": ("riff size",),
}
UNKNOWN_SIZE = 2**31 - 1                   # bytes: from here on a header that was written before the end was known
UNKNOWN_LENGTH = 2**62                     # samples: what libsndfile says where a header does not tell
WIDE = ("pcm32", "float64")                # encodings that float32 cannot hold

_BLOCK = 16_384                            # samples per call

# libsndfile's name of an encoding -> ours of the smallest that keeps its samples; all others are lossy or "float32".
_KEEPS = {"PCM_16": "pcm16", "PCM_S8": "pcm16", "PCM_U8": "pcm16", "ULAW": "pcm16", "ALAW": "pcm16", "PCM_24": "pcm24",
          "PCM_32": "pcm32", "DOUBLE": "float64"}


@dataclass(frozen=True)
class FileInfo:
    """What a sound file says of itself."""

    sample_rate: int                       # Hz
    channels: int
    num_samples: int                       # per channel
    encoding: str                          # of `write`, the smallest that keeps every sample: "pcm16" and so on


@contextmanager
def _opened(path: Path) -> Iterator[soundfile.SoundFile]:
    """The sound file at `path`, recognised by its content whatever its name. Errors become one line with the path."""
    import soundfile

    _check_is_file(path)
    with open(path, "rb", buffering=0) as handle:
        if os.fstat(handle.fileno()).st_size == 0:
            raise ValueError(f"{path} is empty")
        source = handle.fileno() if os.name == "posix" else str(path)
        try:
            with soundfile.SoundFile(source, closefd=False) as file:
                yield file
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{path} cannot be read as a sound file: {error.error_string}{_hint(path)}") from error


def _check_is_file(path: Path) -> None:
    """Raises ValueError or OSError unless there is a regular file: opening a pipe would wait for its writer."""
    if re.match(r"\w+:/", str(path)) and not path.exists():
        raise ValueError(f"{str(path).replace(':/', '://', 1)} is an address: download the sound, and give the file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if not path.is_file():
        raise ValueError(f"{path} is a pipe or a device: write the sound to a file first")


def _hint(path: Path) -> str:
    """What to do with a file of a kind that libsndfile does not read, by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(12)
    kinds = {
        "MPEG-4 (m4a, mp4)": start[4:8] == b"ftyp", "WebM or Matroska": start[:4] == b"\x1aE\xdf\xa3",
        "AAC": start[:2] in (b"\xff\xf1", b"\xff\xf9"), "WMA": start[:4] == b"0&\xb2u",
    }
    kind = next((name for name, is_it in kinds.items() if is_it), None)
    return "" if kind is None else f"; it is {kind}: convert it first, as in ffmpeg -i {path.name} {path.stem}.wav"


def describe(path: str | Path) -> FileInfo:
    """Rate, channels, length and encoding of a sound file. Raises ValueError or OSError as `read_channels` does."""
    with _opened(Path(path)) as file:
        return FileInfo(file.samplerate, file.channels, file.frames, _KEEPS.get(file.subtype, "float32"))


@usual_numpy
def read_channels(path: str | Path, max_seconds: float = math.inf) -> tuple[np.ndarray, int]:
    """All channels of a sound file as they are: waveform (channels, N), sample rate in Hz.

    float32, or float64 of a file with integers of 32 bits or floats of 64.

    Any format, rate, length and number of channels that libsndfile reads: WAV of 8 to 64 bits, FLAC, OGG Vorbis and
    Opus, MP3, AIFF and more. Raises OSError if there is no such file or it may not be read, ValueError if it is not a
    sound file, is damaged, is longer than max_seconds (told from its header), holds no samples, or holds samples that
    are NaN or infinite.
    """
    path = Path(path)
    blocks, num_samples = [], 0
    with _opened(path) as file:
        sample_rate = file.samplerate
        _check_length(path, file.frames, sample_rate, max_seconds)
        _check_whole(path, file)
        dtype = "float64" if _KEEPS.get(file.subtype) in WIDE else "float32"
        while len(block := file.read(_BLOCK, dtype=dtype, always_2d=True)):
            blocks.append(block.T)
            num_samples += len(block)
            _check_length(path, num_samples, sample_rate, max_seconds)
    if not blocks:
        raise ValueError(f"{path} holds no samples")
    waveform = np.ascontiguousarray(np.concatenate(blocks, axis=1))
    finite = np.isfinite(waveform).all(axis=0)
    if not finite.all():
        raise ValueError(f"{path} holds NaN or infinite values in {np.count_nonzero(~finite)} of {len(finite)} "
                         f"samples, the first at {np.argmin(finite) / sample_rate:.3f} s")
    return waveform, sample_rate


def _check_whole(path: Path, file: soundfile.SoundFile) -> None:
    """Raises ValueError for a file that is shorter than its header says, or whose decoder would skip damaged parts."""
    if file.format in CHECKS:
        CHECKS[file.format](path)
    for line in file.extra_info.splitlines():
        found = re.match(r"\s*([\w ]+?)\s*:\s*(\d+) \(should be (\d+)\)", line)
        if found and found[1].lower() in STATED.get(file.format, STATED[None]):
            stated, there = int(found[2]), int(found[3])
            if there < stated < UNKNOWN_SIZE:
                raise ValueError(f"{path} is damaged: it states {stated} bytes of sound, {there} are there")


def _check_length(path: Path, num_samples: int, sample_rate: int, max_seconds: float) -> None:
    """Raises ValueError for more sound than is asked for."""
    if num_samples > max_seconds * sample_rate and num_samples < UNKNOWN_LENGTH:
        raise ValueError(f"{path} must be at most {max_seconds:g} s long, got {exact(num_samples / sample_rate)} s")


@usual_numpy
def read(path: str | Path, sample_rate: int | None = None, channel: int | None = None) -> tuple[np.ndarray, int]:
    """One channel of a sound file: waveform float32 (N,), sample rate in Hz. The level is kept.

    sample_rate: resampled to this rate (Hz); None keeps that of the file.
    channel:     index of the channel to take, from 0; None takes the mean of all.
    Raises what `read_channels` raises, and ValueError if there is no such channel.
    """
    waveform, file_rate = read_channels(path)
    try:
        waveform = mix(waveform, channel).astype(np.float32, copy=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if sample_rate is None:
        return waveform, file_rate
    return resample(waveform, file_rate, sample_rate), sample_rate


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text tags of a sound file: those of "title", "software" and "comment" that it has.

    A comment of `write` comes back unchanged from every format. Raises as `read_channels` does.
    """
    path = Path(path)
    with _opened(path) as file:
        if file.format in ("WAV", "WAVEX"):
            return tags.read_wav(path)
        return tags.clean(file.copy_metadata(), file.format)

"""Sound into files, by libsndfile: complete or not at all, in the format of the suffix. Samples survive unchanged."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldm2 import atomic
from ldm2.audio import tags
from ldm2.audio.reading import WIDE
from ldm2.audio.samples import check_rows
from ldm2.runtime.host import usual_numpy

logger = logging.getLogger(__name__)

_BLOCK = 16_384                            # samples per call: the Vorbis writer overruns the stack on long blocks


@dataclass(frozen=True)
class _Format:
    """What one suffix stands for, in libsndfile's words, and the limits of the format."""

    container: str
    subtypes: dict[str, str]               # our name of each encoding -> libsndfile's; the first is the default
    rates: Sequence[int]                   # Hz
    max_channels: int


FORMATS = {
    ".wav": _Format("WAV", {"pcm16": "PCM_16", "pcm24": "PCM_24", "pcm32": "PCM_32", "float32": "FLOAT",
                            "float64": "DOUBLE"}, range(1, 2**31), 1024),
    ".flac": _Format("FLAC", {"pcm16": "PCM_16", "pcm24": "PCM_24"}, range(1, 655_351), 8),
    ".ogg": _Format("OGG", {"vorbis": "VORBIS"}, range(1, 200_001), 255),    # beyond 200 kHz libvorbis crashes
    ".opus": _Format("OGG", {"opus": "OPUS"}, (8000, 12_000, 16_000, 24_000, 48_000), 255),
    ".mp3": _Format("MP3", {"mp3": "MPEG_LAYER_III"},
                    (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000), 2),
}


def check_output(path: str | Path, overwrite: bool = False, *, sample_rate: int | None = None, channels: int = 1,
                 encoding: str | None = None, inputs: Sequence[str | Path] = ()) -> None:
    """Check that `write` can write to `path`, before minutes are spent on what to write. Nothing is created.

    inputs: files that must not be overwritten even with `overwrite`, because they are read.
    Raises ValueError for an unknown suffix or encoding, a sample rate (Hz) or a number of channels that the format does
    not have, or one of `inputs`; OSError (which one tells what) for a place where no new file can be written.
    """
    path = Path(path)
    check_format(path, sample_rate=sample_rate, channels=channels, encoding=encoding)
    atomic.check_writable(path, overwrite, inputs)


def check_format(path: str | Path, *, sample_rate: int | None = None, channels: int = 1,
                 encoding: str | None = None) -> None:
    """Check that the format of a suffix has this sample rate (Hz), number of channels and encoding.

    Raises ValueError for one that it does not have, and for an unknown suffix. No file is looked at.
    """
    path = Path(path)
    kind = _format_of(path, encoding)
    if sample_rate is not None:
        _check_rate(path.suffix.lower(), kind, sample_rate)
    if not 1 <= channels <= kind.max_channels:
        raise ValueError(f"{path.suffix} takes 1 to {kind.max_channels} channels, got {channels}")


def _format_of(path: Path, encoding: str | None) -> _Format:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"the suffix of an output file must be one of {', '.join(FORMATS)}, got {str(path)!r}")
    if encoding is not None and encoding not in kind.subtypes:
        raise ValueError(f"the encoding of {path.suffix} must be one of {', '.join(kind.subtypes)}, got {encoding!r}")
    return kind


def nearest_encoding(path: str | Path, encoding: str | None) -> str | None:
    """The encoding to write to `path` in which samples of `encoding` lose nothing, or least; None is the default.

    Raises ValueError for an unknown suffix.
    """
    subtypes, order = _format_of(Path(path), None).subtypes, ("pcm16", "pcm24", "pcm32", "float32", "float64")
    choices = [name for name in order if name in subtypes]
    if encoding is None or not choices:
        return None
    return next((name for name in choices if order.index(name) >= order.index(encoding)), choices[-1])


def _check_rate(suffix: str, kind: _Format, sample_rate: int) -> None:
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, Integral) or sample_rate < 1:
        raise ValueError(f"sample_rate must be a positive integer (Hz), got {sample_rate!r}")
    if sample_rate not in kind.rates:
        rates = f"up to {kind.rates[-1]} Hz" if isinstance(kind.rates, range) else \
            f"of {', '.join(map(str, kind.rates))} Hz"
        raise ValueError(f"{suffix} takes sample rates {rates}, got {sample_rate}: resample, or write .wav or .flac")


@usual_numpy
def write(path: str | Path, waveform: np.ndarray, sample_rate: int, overwrite: bool = False,
          metadata: Mapping[str, str] | None = None, encoding: str | None = None) -> Path:
    """Write a waveform (N,) or (channels, N), floating point, to a file in the format of its suffix. Returns the path.

    .wav is 16-bit PCM, or "pcm24", "pcm32", "float32" or "float64" by `encoding`; .flac 16-bit PCM or "pcm24"; .ogg is
    Vorbis; .opus, of which libsndfile spoils the last 6 ms; .mp3. Samples beyond -1..1 are clipped, with one logged
    warning, except in float32 and float64.
    metadata: text tags "title", "software" and "comment"; of an MP3, only ASCII text reads well in every player.

    The file appears at `path` complete or not at all, and an existing file is never replaced without `overwrite`, even
    if it appears in the meantime. Raises what `check_output` raises; ValueError for another shape, no samples, integer
    or non-finite samples, and for unknown tags; OSError if the file cannot be written.
    """
    write_all([Path(path)], [waveform], sample_rate, overwrite, [metadata or {}], encoding)
    return Path(path)


@usual_numpy
def write_all(paths: Sequence[Path], waveforms: Sequence[np.ndarray], sample_rate: int, overwrite: bool,
              metadata: Sequence[Mapping[str, str]], encoding: str | None = None) -> None:
    """As `write`, for several files of one format: all of them appear, or none does."""
    waveforms = [_checked_waveform(waveform, np.float64 if encoding in WIDE else np.float32) for waveform in waveforms]
    for path, waveform in zip(paths, waveforms, strict=True):
        check_output(path, overwrite, sample_rate=sample_rate, channels=len(waveform), encoding=encoding)
    kind = _format_of(paths[0], encoding)
    subtype = kind.subtypes[encoding or next(iter(kind.subtypes))]
    checked = [tags.check(each) for each in metadata]
    if subtype not in ("FLOAT", "DOUBLE"):
        waveforms = [_clipped(waveform, path) for waveform, path in zip(waveforms, paths)]
    with atomic.together(paths, overwrite) as temporaries:
        for temporary, waveform, each, path in zip(temporaries, waveforms, checked, paths):
            _encode(temporary, waveform, int(sample_rate), kind.container, subtype, each, path)


@usual_numpy
def to_wav(waveform: np.ndarray, sample_rate: int, metadata: Mapping[str, str] | None = None,
           encoding: str | None = None) -> bytes:
    """The bytes that `write` puts into a .wav file. Raises ValueError, as it does."""
    waveform = _checked_waveform(waveform, np.float64 if encoding in WIDE else np.float32)
    name = Path("sound.wav")
    check_format(name, sample_rate=sample_rate, channels=len(waveform), encoding=encoding)
    kind, file = _format_of(name, encoding), io.BytesIO()
    subtype = kind.subtypes[encoding or next(iter(kind.subtypes))]
    waveform = waveform if subtype in ("FLOAT", "DOUBLE") else _clipped(waveform, name)
    _fill(file, waveform, int(sample_rate), kind.container, subtype, {})
    if kept := tags.check(metadata or {}):
        tags.append_wav(file, kept)
    return file.getvalue()


def _checked_waveform(waveform: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
    """A writable waveform as (channels, N) of a dtype."""
    waveform = np.asarray(waveform)
    if waveform.ndim not in (1, 2) or waveform.size == 0:
        raise ValueError(f"waveform must have the shape (N,) or (channels, N) with at least one sample, "
                         f"got {waveform.shape}")
    check_rows(waveform)
    if not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(f"waveform must hold floating-point samples with full scale at -1..1, got {waveform.dtype}")
    waveform = np.atleast_2d(waveform.astype(dtype, copy=False))
    if not np.isfinite(waveform).all():
        raise ValueError(f"waveform holds {np.count_nonzero(~np.isfinite(waveform))} NaN or infinite samples")
    return waveform


def _clipped(waveform: np.ndarray, path: Path) -> np.ndarray:
    peak = float(np.abs(waveform).max())
    if peak <= 1:
        return waveform
    count = np.count_nonzero(np.abs(waveform) > 1)
    logger.warning("%s: %d of %d samples were beyond full scale and are clipped; the peak was %.4g",
                   path, count, waveform.size, peak)
    return waveform.clip(-1, 1)


def _as_stored(block: np.ndarray, subtype: str) -> np.ndarray:
    """Samples in the type that libsndfile stores unchanged; its own rounding of floats loses the last bit."""
    if subtype == "PCM_16":
        return np.rint(block * 2**15).clip(-2**15, 2**15 - 1).astype(np.int16)
    if subtype == "PCM_24":
        return np.rint(block * 2**23).clip(-2**23, 2**23 - 1).astype(np.int32) << 8
    if subtype == "PCM_32":
        return np.rint(block * 2**31).clip(-2**31, 2**31 - 1).astype(np.int32)
    return block


def _encode(path: Path, waveform: np.ndarray, sample_rate: int, container: str, subtype: str,
            metadata: dict[str, str], name: Path) -> None:
    """Fill the file `path`, which will be called `name`."""
    import soundfile

    try:
        _fill(path, waveform, sample_rate, container, subtype, {} if container == "WAV" else metadata)
        written = soundfile.info(path).frames
    except soundfile.LibsndfileError as error:
        raise OSError(f"{name}: writing failed ({error.error_string}): is the disk full?") from error
    if written != waveform.shape[1]:
        raise OSError(f"{name}: not all of {waveform.shape[1]} samples could be written: is the disk full?")
    if container == "WAV" and metadata:
        with open(path, "r+b") as file:
            tags.append_wav(file, metadata)


def _fill(target: Path | BinaryIO, waveform: np.ndarray, sample_rate: int, container: str, subtype: str,
          metadata: Mapping[str, str]) -> None:
    """Write samples (channels, N), and the tags that libsndfile writes itself."""
    import soundfile

    channels, num_samples = waveform.shape
    with soundfile.SoundFile(target, "w", sample_rate, channels, subtype, format=container) as file:
        for tag, text in metadata.items():
            setattr(file, tag, text)
        for start in range(0, num_samples, _BLOCK):
            file.write(_as_stored(waveform[:, start:start + _BLOCK], subtype).T)

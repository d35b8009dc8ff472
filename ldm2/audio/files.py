"""Sound in and out of files: signal constants, seconds <-> samples <-> frames, reading, resampling, writing.

A waveform is float32 with full scale at -1..1: (N,) is one channel, (channels, N) several. Files go through libsndfile.
Samples survive reading and writing unchanged: an integer v of b bits is v / 2**(b - 1). What float32 cannot hold, of
files with integers of 32 bits and floats of 64, is float64.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm2 import atomic
from ldm2.audio import mp3, ogg, tags
from ldm2.runtime.host import usual_numpy

if TYPE_CHECKING:
    import soundfile

logger = logging.getLogger(__name__)

MOST_CHANNELS = 24                         # of a loudspeaker layout: 22.2, ITU-R BS.2051

# Formats whose decoders skip what is damaged, and what looks for it.
CHECKS = {"MP3": mp3.check, "OGG": ogg.check}
# What libsndfile calls the size of the samples in its account of a header; a header alone may be wrong elsewhere.
STATED: dict[str | None, tuple[str, ...]] = {
    None: ("data", "ssnd", "data size"), "W64": ("riff",), "RF64": ("riff size",),
}
UNKNOWN_SIZE = 2**31 - 1                   # bytes: from here on a header that was written before the end was known
UNKNOWN_LENGTH = 2**62                     # samples: what libsndfile says where a header does not tell

_BLOCK = 16_384                            # samples per call: the Vorbis writer overruns the stack on long blocks


# --- lengths ---------------------------------------------------------------------------------------------------------

def seconds_to_samples(seconds: float, sample_rate: int) -> int:
    """Number of samples in `seconds`: round(seconds * sample_rate). Raises ValueError below zero or if not finite."""
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"seconds must be a finite number from 0 up, got {seconds}")
    return round(seconds * sample_rate)


def samples_to_seconds(num_samples: int, sample_rate: int) -> float:
    """Length of num_samples in seconds."""
    return num_samples / sample_rate


# --- waveforms -------------------------------------------------------------------------------------------------------

def check_rows(waveform: np.ndarray) -> None:
    """Raises ValueError if a two-dimensional array looks like (N, channels), as `soundfile.read` returns it.

    It does with more rows than samples in each, and more rows than any loudspeaker layout has channels (24).
    """
    if waveform.ndim == 2 and len(waveform) > max(waveform.shape[1], MOST_CHANNELS):
        rows, samples = waveform.shape
        raise ValueError(f"sounds stand in rows, (channels, N), got {rows} rows of {samples} samples: hand over the "
                         f"transpose, sound.T, of (N, channels)")


@usual_numpy
def as_samples(source: Any) -> np.ndarray:
    """Floating-point samples (N,) or (channels, N) of a numpy array or a tensor, as float32.

    Raises ValueError for another shape or order, no samples, integers, and NaN or infinite samples.
    """
    samples = source.detach().cpu().float().numpy() if _is_floating_tensor(source) else source
    if not isinstance(samples, np.ndarray) or not np.issubdtype(samples.dtype, np.floating):
        found = getattr(samples, "dtype", type(samples).__name__)
        raise ValueError(f"a sound must be a path or floating-point samples with full scale at -1..1, got {found}")
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise ValueError(f"a sound must be (N,) or (channels, N) with at least one sample, got {samples.shape}")
    check_rows(samples)
    samples = samples.astype(np.float32)
    bad = np.count_nonzero(~np.isfinite(samples))
    if bad:
        raise ValueError(f"the sound holds {bad} NaN or infinite samples in float32")
    return samples


def _is_floating_tensor(source: Any) -> bool:
    """Whether this is a tensor of PyTorch with fractions; PyTorch itself is not imported for it."""
    return bool(getattr(source, "is_floating_point", bool)())


def check_rate(sample_rate: Any) -> int:
    """The rate of an array of samples in Hz. Raises ValueError."""
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, Integral) or sample_rate < 1:
        raise ValueError(f"samples need their sample_rate, a positive integer of Hz, got {sample_rate!r}")
    return int(sample_rate)


def mix(waveform: np.ndarray, channel: int | None = None) -> np.ndarray:
    """One channel (N,) of a waveform (channels, N): the mean of all, or the one with the index `channel` from 0 up.

    Raises ValueError if there is no such channel, and for (N, channels).
    """
    check_rows(waveform)
    if channel is not None:
        if not 0 <= channel < len(waveform):
            many = f"{len(waveform)} channel{'s' * (len(waveform) > 1)}"
            raise ValueError(f"channel must be from 0 to {len(waveform) - 1} in a sound with {many}, got {channel}")
        return waveform[channel]
    return waveform[0] if len(waveform) == 1 else waveform.mean(axis=0, dtype=np.float64).astype(np.float32)


def resample(waveform: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Change the sample rate (Hz) of a waveform (..., N): band-limited, no delay, level kept, float32.

    The result has round(N * to_rate / from_rate) samples, but at least one. Raises ValueError for (N, channels).
    """
    import soxr

    check_rows(waveform)
    if from_rate == to_rate:
        return waveform
    length = max(1, round(waveform.shape[-1] * to_rate / from_rate))
    rows = waveform.reshape(-1, waveform.shape[-1])
    resampled = np.zeros((len(rows), length), np.float32)
    for row, out in zip(rows, resampled):
        samples = soxr.resample(row, from_rate, to_rate, quality="VHQ")[:length]
        out[:len(samples)] = samples
    return resampled.reshape(*waveform.shape[:-1], length)


# --- reading ---------------------------------------------------------------------------------------------------------

# libsndfile's name of an encoding -> ours of the smallest that keeps its samples; all others are lossy or "float32".
_KEEPS = {"PCM_16": "pcm16", "PCM_S8": "pcm16", "PCM_U8": "pcm16", "ULAW": "pcm16", "ALAW": "pcm16", "PCM_24": "pcm24",
          "PCM_32": "pcm32", "DOUBLE": "float64"}
_WIDE = ("pcm32", "float64")               # float32 cannot hold them


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

    _check_place(path)
    with open(path, "rb", buffering=0) as handle:
        if os.fstat(handle.fileno()).st_size == 0:
            raise ValueError(f"{path} is empty")
        source = handle.fileno() if os.name == "posix" else str(path)
        try:
            with soundfile.SoundFile(source, closefd=False) as file:
                yield file
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{path} cannot be read as a sound file: {error.error_string}{_hint(path)}") from error


def _check_place(path: Path) -> None:
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
        dtype = "float64" if _KEEPS.get(file.subtype) in _WIDE else "float32"
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
        raise ValueError(f"{path} must be at most {max_seconds:g} s long, got {num_samples / sample_rate:.0f} s")


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


# --- writing ---------------------------------------------------------------------------------------------------------

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
    atomic.check_place(path, overwrite, inputs)


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
    waveforms = [_checked_waveform(waveform, np.float64 if encoding in _WIDE else np.float32) for waveform in waveforms]
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

    channels, num_samples = waveform.shape
    try:
        with soundfile.SoundFile(path, "w", sample_rate, channels, subtype, format=container) as file:
            if container != "WAV":
                for tag, text in metadata.items():
                    setattr(file, tag, text)
            for start in range(0, num_samples, _BLOCK):
                file.write(_as_stored(waveform[:, start:start + _BLOCK], subtype).T)
        written = soundfile.info(path).frames
    except soundfile.LibsndfileError as error:
        raise OSError(f"{name}: writing failed ({error.error_string}): is the disk full?") from error
    if written != num_samples:
        raise OSError(f"{name}: not all of {num_samples} samples could be written: is the disk full?")
    if container == "WAV" and metadata:
        with open(path, "r+b") as file:
            tags.append_wav(file, metadata)

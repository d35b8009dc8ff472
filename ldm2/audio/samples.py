"""Waveforms as arrays of samples: lengths, one channel of several, sample rates.

A waveform is float32 with full scale at -1..1: (N,) is one channel, (channels, N) several.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import numpy as np

from ldm2.runtime.host import usual_numpy

MOST_CHANNELS = 24                         # of a loudspeaker layout: 22.2, ITU-R BS.2051


def seconds_to_samples(seconds: float, sample_rate: int) -> int:
    """Number of samples in `seconds`: round(seconds * sample_rate). Raises ValueError below zero or if not finite."""
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"seconds must be a finite number from 0 up, got {seconds}")
    return round(seconds * sample_rate)


def samples_to_seconds(num_samples: int, sample_rate: int) -> float:
    """Length of num_samples in seconds."""
    return num_samples / sample_rate


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

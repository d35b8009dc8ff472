"""How an edited sound is joined to its input: ranges of time or of frequency from the one, all else from the other.

The ear gets the input's own samples outside the ranges of time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ldm2.audio import check_rows, seconds_to_samples
from ldm2.edit.masks import merge_ranges, soft_membership, without_outer_borders
from ldm2.option_kinds import Range
from ldm2.options import check_number
from ldm2.settings import CROSSFADE_SECONDS


def paste(original: np.ndarray, edited: np.ndarray, times: Sequence[Range], sample_rate: int,
          crossfade: float = CROSSFADE_SECONDS) -> np.ndarray:
    """`edited` inside the ranges (s), every sample of `original` (..., N) outside them, as (..., N) of its dtype.

    edited:    (N,) for all channels, or of the shape of `original`, at the same sample_rate (Hz)
    crossfade: length in seconds of the equal-power fades, which lie inside the ranges, at most half of a range each;
               a range that begins or ends with the sound has none there

    Raises ValueError for impossible ranges, one shorter than a sample, a negative crossfade and other lengths.
    """
    check_rows(original)
    num_samples = original.shape[-1]
    if edited.shape[-1] != num_samples:
        raise ValueError(f"edited must have the {num_samples} samples of original, got {edited.shape[-1]}")
    fade = seconds_to_samples(check_number("crossfade", crossfade, 0), sample_rate)
    result = original.copy()
    for start, stop in merge_ranges(times, num_samples / sample_rate):
        first, last = seconds_to_samples(start, sample_rate), seconds_to_samples(stop, sample_rate)
        if first == last:
            raise ValueError(f"the range {start:g}:{stop:g} s is shorter than one sample")
        new, old = _equal_power(last - first, fade, first > 0, last < num_samples)
        result[..., first:last] = new * edited[..., first:last] + old * original[..., first:last]
    return result


def _equal_power(length: int, fade: int, fade_in: bool, fade_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Gains (length,) of what fades in and then out, and of what it replaces; their squares add up to one."""
    fade = min(fade, length // 2)
    angle = np.full(length, math.pi / 2)
    rise = (np.arange(fade) + 0.5) / max(fade, 1) * (math.pi / 2)
    if fade_in:
        angle[:fade] = rise
    if fade_out:
        angle[length - fade:] = rise[::-1]
    return np.sin(angle), np.where(angle == math.pi / 2, 0.0, np.cos(angle))


def blend_bands(original: np.ndarray, edited: np.ndarray, bands: Sequence[Range], sample_rate: int,
                soft_hz: float = 200.0) -> np.ndarray:
    """`edited` inside the bands (Hz), `original` (..., N) outside them, as (..., N) of its dtype.

    Equal outside to float accuracy, without a change of phase. soft_hz: width of the ramp inside each border of a band,
    at most a quarter of the band; the narrower, the longer the filter rings. Raises ValueError for impossible bands.
    """
    check_rows(original)
    half_rate = sample_rate / 2
    ranges = without_outer_borders(merge_ranges(bands, half_rate, "Hz"), 0.0, half_rate)
    padded = original.shape[-1] + sample_rate // 4                           # room for the ringing: no wrap around
    hz = np.fft.rfftfreq(padded, 1 / sample_rate)
    difference = np.fft.rfft(edited.astype(np.float64) - original, padded) * soft_membership(hz, hz, ranges, soft_hz)
    return (original + np.fft.irfft(difference, padded)[..., :original.shape[-1]]).astype(original.dtype)


def fit_length(waveform: np.ndarray, num_samples: int) -> np.ndarray:
    """Cut a waveform (..., N), or continue it with zeros, to (..., num_samples)."""
    check_rows(waveform)
    missing = max(0, num_samples - waveform.shape[-1])
    return np.pad(waveform[..., :num_samples], [(0, 0)] * (waveform.ndim - 1) + [(0, missing)])


def extend_canvas(waveform: np.ndarray, sample_rate: int, before: float = 0.0, after: float = 0.0,
                  crossfade: float = CROSSFADE_SECONDS) -> tuple[np.ndarray, list[Range]]:
    """Put silence of `before` and `after` seconds around a waveform (..., N), and name the ranges (s) to regenerate.

    The ranges reach a crossfade into the waveform, so that `paste` fades from real sound and not from silence.
    Raises ValueError if neither is above zero, or one is negative.
    """
    check_rows(waveform)
    first, last = seconds_to_samples(before, sample_rate), seconds_to_samples(after, sample_rate)
    if first + last == 0:
        raise ValueError(f"an extension needs seconds before or after, got {before:g} and {after:g}")
    num_samples = waveform.shape[-1]
    fade = min(seconds_to_samples(crossfade, sample_rate), num_samples // 2)
    ranges: list[Range] = []
    if first:
        ranges.append((None, (first + fade) / sample_rate))
    if last:
        ranges.append(((first + num_samples - fade) / sample_rate, None))
    return np.pad(waveform, [(0, 0)] * (waveform.ndim - 1) + [(first, last)]), ranges

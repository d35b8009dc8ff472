"""Spectrograms as small pictures, for notebooks and pages. Needs numpy alone."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from ldm2.runtime.host import usual_numpy

LOWEST = -100.0                                            # dB of full scale
WIDTH, HEIGHT = 640, 160                                   # of a picture, in pixels

# From dark to light as matplotlib's "magma", which is in the public domain: colors at equal distances.
_COLORS = ((0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97),
           (254, 194, 135), (252, 253, 191))


def decibels(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Levels (frequency, time) of a waveform (N,) in windows of 64 ms; a sine of full scale is 0 dB."""
    width = max(16, round(0.064 * sample_rate))
    hop = max(1, width // 4, len(waveform) // 4000)        # no more columns than a picture can show
    window = np.hanning(width)
    padded = np.pad(waveform, width // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, width)[::hop]
    magnitudes = np.abs(np.fft.rfft(frames * window)).T / (window.sum() / 2)
    return 20 * np.log10(np.maximum(magnitudes, 10 ** (LOWEST / 20)))


@usual_numpy
def waveform_png(waveform: np.ndarray, sample_rate: int) -> bytes:
    """The spectrogram of a waveform (N,) as `png` shows it: from 80 dB below its loudest part up to that."""
    levels = decibels(waveform, sample_rate)
    return png(np.maximum(levels, levels.max() - 80))


@usual_numpy
def png(levels: np.ndarray) -> bytes:
    """Levels (frequency, time) as a PNG of 640 x 160 pixels without axes: low frequencies below, light is loud.

    Each pixel shows the nearest level, from the lowest (dark) to the highest (light).
    """
    rows = np.arange(HEIGHT)[::-1] * len(levels) // HEIGHT
    columns = np.arange(WIDTH) * levels.shape[1] // WIDTH
    shown = levels[rows][:, columns].astype(np.float64)
    span = max(float(np.ptp(shown)), 1e-9)
    indices = np.round((shown - shown.min()) / span * 255).astype(np.uint8)
    lines = np.pad(indices, ((0, 0), (1, 0)))              # each line starts with its filter: 0, none
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 3, 0, 0, 0)           # 8 bits, colors from a palette
    chunks = ((b"IHDR", header), (b"PLTE", _palette()), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _palette() -> bytes:
    """256 colors, red, green and blue of each."""
    places = np.linspace(0, 255, len(_COLORS))
    colors = np.stack([np.interp(np.arange(256), places, part) for part in np.array(_COLORS, float).T], axis=1)
    return np.round(colors).astype(np.uint8).tobytes()


def _chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file: length, name, content, checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

"""Loudness of a sound as broadcasters measure it, and the gain to a loudness or a peak.

Reference: "Algorithms to measure audio program loudness and true-peak audio level", ITU-R BS.1770-5, annex 1. All
channels have the weight 1, as the front ones of the recommendation do.
"""

from __future__ import annotations

import math

import numpy as np

BLOCK_SECONDS = 0.4
OVERLAP = 4                                # blocks begin every quarter of a block
SILENCE = -70.0                            # LUFS: the absolute gate
RELATIVE_GATE = -10.0                      # LU below the loudness of what passes the absolute gate
OFFSET = -0.691                            # dB: a full-scale sine of 997 Hz in one channel is -3.01 LUFS


def loudness(waveform: np.ndarray, sample_rate: int) -> float:
    """Integrated loudness of (channels, N) at sample_rate (Hz) in LUFS; -inf for silence.

    A sound shorter than a block of 0.4 s is one block.
    """
    power = np.square(_k_weighted(waveform, sample_rate)).sum(axis=0)                      # (N,)
    size = min(len(power), round(BLOCK_SECONDS * sample_rate))
    step = max(1, size // OVERLAP)
    total = np.concatenate([[0.0], np.cumsum(power)])
    starts = np.arange(0, len(power) - size + 1, step)
    blocks = (total[starts + size] - total[starts]) / size
    heard = blocks[_lufs(blocks) > SILENCE]
    if not len(heard):
        return -math.inf
    heard = heard[_lufs(heard) > _lufs(heard.mean()) + RELATIVE_GATE]
    return float(_lufs(heard.mean()))


def gain_to(waveform: np.ndarray, sample_rate: int, target: float | str) -> float:
    """The factor that brings (channels, N) to a loudness in LUFS, or with "peak" to full scale; 1 for silence.

    A loudness that would need more than full scale is not reached: the peak stays at 1.
    """
    peak = float(np.abs(waveform).max(initial=0.0))
    if peak == 0:
        return 1.0
    if isinstance(target, str):                            # "peak"
        return 1 / peak
    level = loudness(waveform, sample_rate)
    return 1.0 if math.isinf(level) else min(10 ** ((target - level) / 20), 1 / peak)


def _lufs(power: np.ndarray | float) -> np.ndarray | float:
    """Mean square of K-weighted samples -> LUFS."""
    with np.errstate(divide="ignore"):
        return OFFSET + 10 * np.log10(power)


def _k_weighted(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """(channels, N) through the head's shelf and the high-pass of BS.1770, annex 1, float64.

    The recommendation lists the two biquads at 48 kHz; here they are computed for any rate from the analog filters they
    stand for, and applied to the spectrum, with silence after the sound for what rings on.
    """
    num_samples = waveform.shape[-1]
    size = num_samples + sample_rate // 4
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(size))                                       # z^-1 on the unit circle
    response = np.ones_like(z)
    for b, a in (_shelf(sample_rate), _high_pass(sample_rate)):
        response *= np.polyval(b[::-1], z) / np.polyval(a[::-1], z)
    return np.fft.irfft(np.fft.rfft(waveform.astype(np.float64), size) * response, size)[..., :num_samples]


def _shelf(sample_rate: int) -> tuple[list[float], list[float]]:
    """The high shelf (+4 dB) as a biquad (b, a)."""
    gain, q, hertz = 3.999843853973347, 0.7071752369554196, 1681.974450955533
    k, high = math.tan(math.pi * hertz / sample_rate), 10 ** (gain / 20)
    band = high**0.4996667741545416
    norm = 1 + k / q + k * k
    b = [(high + band * k / q + k * k) / norm, 2 * (k * k - high) / norm, (high - band * k / q + k * k) / norm]
    return b, [1.0, 2 * (k * k - 1) / norm, (1 - k / q + k * k) / norm]


def _high_pass(sample_rate: int) -> tuple[list[float], list[float]]:
    """The high-pass (38 Hz) as a biquad (b, a)."""
    q, hertz = 0.5003270373238773, 38.13547087602444
    k = math.tan(math.pi * hertz / sample_rate)
    norm = 1 + k / q + k * k
    return [1.0, -2.0, 1.0], [1.0, 2 * (k * k - 1) / norm, (1 - k / q + k * k) / norm]

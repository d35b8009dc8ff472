"""What is done to a sound on its way into a file, where it is asked for: trim, resample, normalize."""

from __future__ import annotations

import numpy as np

from ldm2.audio.loudness import gain_to
from ldm2.audio.samples import resample
from ldm2.settings import Output

QUIET = 10 ** (-60 / 20)                   # of full scale: what counts as silence at the ends
MARGIN_SECONDS = 0.01                      # left around what is heard


def finish(channels: np.ndarray, sample_rate: int, output: Output) -> tuple[np.ndarray, int]:
    """(channels, N) at sample_rate (Hz) as it is written, and its rate. Float64 stays where nothing is changed."""
    if output.trim:
        channels = trim(channels, sample_rate)
    if output.sample_rate is not None and output.sample_rate != sample_rate:
        channels, sample_rate = resample(channels, sample_rate, output.sample_rate), output.sample_rate
    if output.normalize is not None:
        channels = channels * channels.dtype.type(gain_to(channels, sample_rate, output.normalize))
    return channels, sample_rate


def trim(channels: np.ndarray, sample_rate: int) -> np.ndarray:
    """(channels, N) without silence (below -60 dB in all channels) at both ends; a sound that is all silence stays."""
    heard = np.flatnonzero((np.abs(channels) > QUIET).any(axis=0))
    if not len(heard):
        return channels
    margin = round(MARGIN_SECONDS * sample_rate)
    return channels[:, max(0, heard[0] - margin) : heard[-1] + 1 + margin]

"""How far a sound is from another: distances between waveforms (N,) of the same length and rate.

References: "Fast Spectrogram Inversion using Multi-head Convolutional Neural Networks", arXiv:1808.06719, section 3
(spectral convergence, log magnitudes); "Parallel WaveGAN", arXiv:1910.11480, equations 3 to 6 and table 1 (their sum
over several resolutions).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ldm2.mel import MelConfig, log_mel
from ldm2.runtime.host import usual_numpy

Distances = tuple[float, float]                            # spectral convergence, and of the log magnitudes

# FFT, hop and window in samples; spectral convergence by itself is that of the first.
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
FRAMES_AT_ONCE = 1024                                      # spectra of a long sound would fill the memory
FLOOR = 1e-5                                               # magnitudes and levels below count as this: -100 dB


def log_mel_distance(reference: np.ndarray, estimate: np.ndarray, config: MelConfig) -> float:
    """Mean absolute difference of the log-mel spectrograms, in natural logarithms. 0.115 is one decibel."""
    a, b = (log_mel(_filled(waveform, config.hop_length), config) for waveform in _pair(reference, estimate))
    return float((a - b).abs().mean())


def spectral_convergence(
    reference: np.ndarray, estimate: np.ndarray, fft: int = 1024, hop: int = 120, window: int = 600
) -> float:
    """Frobenius norm of the difference of the magnitude spectrograms over that of the reference: 0 is equal.

    Of a silent reference: 0 for a silent estimate and infinite for any other.
    """
    return _spectral_distances(reference, estimate, fft, hop, window)[0]


def multi_resolution_stft(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Spectral convergence plus mean absolute difference of log magnitudes, averaged over RESOLUTIONS."""
    return _mean_of_sums(_all_spectral_distances(reference, estimate))


def level(waveform: np.ndarray) -> float:
    """Root mean square in dB of full scale, -100 at least."""
    return 20 * math.log10(max(float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))), FLOOR))


@usual_numpy
def compare(reference: np.ndarray, estimate: np.ndarray, config: MelConfig) -> dict[str, float]:
    """All distances of this module by their names; level_difference is in dB, above zero where the estimate is louder.

    Raises ValueError unless both are (N,) of the same length.
    """
    spectral = _all_spectral_distances(reference, estimate)
    return {
        "log_mel_distance": log_mel_distance(reference, estimate, config),
        "spectral_convergence": spectral[0][0],
        "multi_resolution_stft": _mean_of_sums(spectral),
        "level_difference": level(estimate) - level(reference),
    }


def _pair(reference: np.ndarray, estimate: np.ndarray) -> tuple[Tensor, Tensor]:
    """Two waveforms (N,) as (1, N) float64. Raises ValueError unless they have one length."""
    if reference.ndim != 1 or reference.shape != estimate.shape or not len(reference):
        raise ValueError(f"two waveforms (N,) of one length are needed, got {reference.shape} and {estimate.shape}")
    first, second = (torch.from_numpy(np.asarray(waveform, np.float64))[None] for waveform in (reference, estimate))
    return first, second


def _filled(waveform: Tensor, multiple: int) -> Tensor:
    """(1, N) continued with silence to the next multiple."""
    return torch.nn.functional.pad(waveform, (0, -waveform.shape[1] % multiple))


def _mean_of_sums(spectral: list[Distances]) -> float:
    return sum(map(sum, spectral)) / len(spectral)


def _all_spectral_distances(reference: np.ndarray, estimate: np.ndarray) -> list[Distances]:
    """At each of RESOLUTIONS."""
    return [_spectral_distances(reference, estimate, *sizes) for sizes in RESOLUTIONS]


def _spectral_distances(reference: np.ndarray, estimate: np.ndarray, fft: int, hop: int, window: int) -> Distances:
    """Spectral convergence and the mean absolute difference of the log magnitudes, with silence around both."""
    pair = _pair(reference, estimate)
    squares = [0.0, 0.0]                                   # of the difference and of the reference
    logs, num_frames = 0.0, 1 + len(reference) // hop
    for first in range(0, num_frames, FRAMES_AT_ONCE):
        frames = slice(first, min(first + FRAMES_AT_ONCE, num_frames))
        a, b = (_magnitudes(waveform, fft, hop, window, frames) for waveform in pair)
        squares = [total + float(x.square().sum()) for total, x in zip(squares, (a - b, a), strict=True)]
        logs += float((a.clamp(min=FLOOR).log() - b.clamp(min=FLOOR).log()).abs().sum())
    difference, norm = map(math.sqrt, squares)
    mean = logs / (num_frames * (fft // 2 + 1))
    if norm == 0:
        return (0.0 if difference == 0 else math.inf), mean
    return difference / norm, mean


def _magnitudes(waveform: Tensor, fft: int, hop: int, window: int, frames: slice) -> Tensor:
    """|STFT| of (1, N) at some frames, the first of them around sample 0."""
    start, stop = hop * frames.start - fft // 2, hop * (frames.stop - 1) + (fft + 1) // 2
    inside = waveform[:, max(0, start) : stop]
    padded = torch.nn.functional.pad(inside, (max(0, -start), max(0, stop - waveform.shape[1])))
    hann = torch.hann_window(window, dtype=waveform.dtype, device=waveform.device)
    return torch.stft(padded, fft, hop, window, hann, center=False, return_complex=True).abs()

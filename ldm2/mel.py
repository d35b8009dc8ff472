"""Mel front end: waveform -> log-mel spectrogram, the representation that the VAE and the vocoder share.

log_mel = log(max(M |STFT(waveform)|, 1e-5)), natural logarithm, magnitude and not power, periodic Hann window of n_fft
samples, M a bank of triangular filters of equal area on Slaney's mel scale.

References: M. Slaney, "Auditory Toolbox", Interval Research technical report 1998-010 (scale and filters);
"HiFi-GAN", arXiv:2010.05646 (this log-mel as a vocoder's input); "AudioLDM", arXiv:2301.12503 (as a VAE's input).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_FRAMES_AT_ONCE = 2048                     # spectra of a long sound would take a hundred times its own memory
MAGNITUDE_FLOOR = 1e-5                     # silence is log(1e-5) = -11.51; a log-mel of zero means magnitude 1

# Slaney's scale: linear up to 1000 Hz, logarithmic above, in such a way that 27 steps are a factor of 6.4 in frequency.
_HZ_PER_LINEAR_MEL = 200 / 3
_CORNER_HZ = 1000.0
_CORNER_MEL = _CORNER_HZ / _HZ_PER_LINEAR_MEL                                # 15
_LOG_STEP = math.log(6.4) / 27


@dataclass(frozen=True)
class MelConfig:
    """Layout of a log-mel spectrogram; the default values are those of the 16 kHz models. Values in the units named.

    Raises ValueError where a value or a combination of values is impossible.
    """

    sample_rate: int = 16_000              # Hz
    n_fft: int = 1024                      # samples: FFT and window length
    hop_length: int = 160                  # samples from frame to frame
    num_mels: int = 64                     # F
    f_min: float = 0.0                     # Hz, lower edge of the lowest filter
    f_max: float = 8000.0                  # Hz, upper edge of the highest filter

    def __post_init__(self):
        for name in ("sample_rate", "n_fft", "hop_length", "num_mels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hop_length > self.n_fft or (self.n_fft - self.hop_length) % 2:
            raise ValueError(f"n_fft - hop_length must be even and not negative, got {self.n_fft} - {self.hop_length}")
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2:
            raise ValueError(f"need 0 <= f_min < f_max <= sample_rate / 2, got f_min {self.f_min}, f_max {self.f_max}, "
                             f"sample_rate {self.sample_rate}")


MEL_16KHZ = MelConfig()
MEL_48KHZ = MelConfig(sample_rate=48_000, n_fft=2048, hop_length=480, num_mels=256, f_min=20.0, f_max=24_000.0)


def config_for(sample_rate: int, hop_length: int, num_mels: int) -> MelConfig:
    """The front end that belongs to a vocoder: what its own sizes leave open is that of the models with its rate (Hz).

    Raises ValueError for a rate that no published model has.
    """
    for known in (MEL_16KHZ, MEL_48KHZ):
        if known.sample_rate == sample_rate:
            return replace(known, hop_length=hop_length, num_mels=num_mels)
    raise ValueError(f"the log-mel front end is known for models of 16000 and 48000 Hz, not of {sample_rate} Hz")


def hz_to_mel(hz: Tensor) -> Tensor:
    """Frequencies in Hz -> Slaney mels, any shape, monotonic. The inverse of mel_to_hz."""
    above = _CORNER_MEL + torch.log(hz.clamp(min=_CORNER_HZ) / _CORNER_HZ) / _LOG_STEP
    return torch.where(hz < _CORNER_HZ, hz / _HZ_PER_LINEAR_MEL, above)


def mel_to_hz(mel: Tensor) -> Tensor:
    """Slaney mels -> frequencies in Hz, any shape. The inverse of hz_to_mel."""
    above = _CORNER_HZ * torch.exp((mel - _CORNER_MEL).clamp(min=0) * _LOG_STEP)
    return torch.where(mel < _CORNER_MEL, mel * _HZ_PER_LINEAR_MEL, above)


def mel_edges(config: MelConfig) -> Tensor:
    """Corners of the triangles in Hz, float64 (num_mels + 2,): filter i rises from [i] to [i + 1], falls to [i + 2]."""
    low, high = hz_to_mel(torch.tensor([config.f_min, config.f_max], dtype=torch.float64, device="cpu"))
    steps = torch.linspace(0, 1, config.num_mels + 2, dtype=torch.float64, device="cpu")
    return mel_to_hz(low + (high - low) * steps)


def mel_filter_bank(config: MelConfig) -> Tensor:
    """Triangular filters of area 1 (in Hz), float64 (n_fft // 2 + 1, num_mels), on the CPU."""
    edges = mel_edges(config)
    bins = torch.arange(config.n_fft // 2 + 1, dtype=torch.float64, device="cpu") * (config.sample_rate / config.n_fft)
    widths = edges.diff()                                                    # (num_mels + 1,)
    rising = (bins[:, None] - edges[:-2]) / widths[:-1]
    falling = (edges[2:] - bins[:, None]) / widths[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return triangles * (2 / (edges[2:] - edges[:-2]))


@lru_cache(maxsize=16)
def _tables(config: MelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Window (n_fft,) and filter bank (bins, num_mels), computed in float64 once per device and dtype."""
    with torch.inference_mode(False):      # a table made in inference mode could not serve a later backward pass
        window = torch.hann_window(config.n_fft, periodic=True, dtype=torch.float64, device="cpu")
        return window.to(device, dtype), mel_filter_bank(config).to(device, dtype)


def num_mel_frames(num_samples: int, config: MelConfig = MEL_16KHZ, variant: str = "training") -> int:
    """Number of frames T that log_mel gives for num_samples samples. Raises ValueError for an unknown variant."""
    if variant not in ("training", "inference"):
        raise ValueError(f"variant must be 'training' or 'inference', got {variant!r}")
    return num_samples // config.hop_length + (variant == "inference")


def log_mel(waveform: Tensor, config: MelConfig = MEL_16KHZ, variant: str = "training") -> Tensor:
    """Log-mel spectrogram of waveform (B, N) -> (B, 1, T, F), float32 (float64 for a float64 waveform).

    variant "training": T = N // hop_length; frame t is centred on sample (t + 1/2) * hop_length, the middle of the
    samples that the vocoder makes of it. This is what the VAE and the vocoder were trained on.
    variant "inference": T = 1 + N // hop_length; frame t is centred on sample t * hop_length, half a hop earlier.

    Both ends are mirrored. A waveform that is too short for that is continued with zeros first.
    Differentiable, with finite gradients at silence. Computed in float32 at least, also under autocast.
    Raises ValueError for another shape, fewer samples than one hop, an integer waveform or an unknown variant.
    """
    if waveform.dim() != 2:
        raise ValueError(f"waveform must have the shape (B, N), got {tuple(waveform.shape)}")
    if not waveform.is_floating_point():
        raise ValueError(f"waveform must hold floating-point samples, got {waveform.dtype}")
    num_samples = waveform.shape[1]
    if num_samples < config.hop_length:
        raise ValueError(f"waveform must have at least hop_length = {config.hop_length} samples, got {num_samples}")
    num_frames = num_mel_frames(num_samples, config, variant)
    waveform = waveform.to(torch.promote_types(waveform.dtype, torch.float32))
    window, filters = _tables(config, waveform.device, waveform.dtype)

    margin = config.n_fft // 2 if variant == "inference" else (config.n_fft - config.hop_length) // 2
    if num_samples <= margin:
        waveform = F.pad(waveform, (0, margin + 1 - num_samples))
    waveform = F.pad(waveform, (margin, margin), mode="reflect")
    pieces = []
    with torch.autocast(waveform.device.type, enabled=False):
        for first in range(0, num_frames, _FRAMES_AT_ONCE):
            last = min(first + _FRAMES_AT_ONCE, num_frames) - 1
            piece = waveform[:, first * config.hop_length : last * config.hop_length + config.n_fft]
            spectrum = torch.stft(piece, config.n_fft, config.hop_length, window=window, center=False,
                                  return_complex=True)                       # (B, bins, T)
            magnitude = spectrum.abs().mT                                    # (B, T, bins); abs has gradient 0 at 0
            pieces.append((magnitude @ filters).clamp(min=MAGNITUDE_FLOOR).log())                   # (B, T, F)
    return torch.cat(pieces, dim=1)[:, None]


def normalize_waveform(waveform: Tensor) -> Tensor:
    """The authors' levelling of an input (..., N): mean removed, then scaled to a peak of 0.5. Silence stays silence.

    Only for comparison with their front end: it throws the loudness of the input away.
    """
    centred = waveform - waveform.mean(dim=-1, keepdim=True)
    peak = centred.abs().amax(dim=-1, keepdim=True)
    return 0.5 * centred / (peak + 1e-8)

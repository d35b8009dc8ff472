"""Sound that comes in: what is accepted, and the way to the latents, waveform -> log-mel -> VAE.

The level is kept: nothing here makes a sound louder or softer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ldm2 import audio
from ldm2.mel import MelConfig, config_for, log_mel
from ldm2.noise import SeededNoise
from ldm2.runtime.host import usual_numpy
from ldm2.runtime.inference import inference
from ldm2.runtime.memory import in_stage
from ldm2.settings import check_seeds
from ldm2.vae import VAE, Posterior
from ldm2.windows import Window, plan

if TYPE_CHECKING:
    from ldm2.pipeline import AudioLDM2


@dataclass(frozen=True)
class Sound:
    """An input as it is.

    channels: (channels, N) at `sample_rate` Hz, float32 (float64 where a file holds more, see audio.read_channels)
    mono: (N,), the one channel that a model hears of them
    path, encoding: of the file (see audio.FileInfo), or None if there is none
    """

    channels: np.ndarray
    mono: np.ndarray
    sample_rate: int
    path: Path | None = None
    encoding: str | None = None

    @property
    def seconds(self) -> float:
        return audio.samples_to_seconds(len(self.mono), self.sample_rate)

    def at(self, sample_rate: int) -> np.ndarray:
        """What a model of this rate (Hz) hears, (N,): float32, and `mono` itself at the input's own rate."""
        return audio.resample(self.mono, self.sample_rate, sample_rate)


@usual_numpy
def open_sound(
    source: str | Path | np.ndarray | Tensor, sample_rate: int | None = None, channel: int | None = None
) -> Sound:
    """A sound from a file or from samples, (N,) or (channels, N) floating point with full scale at -1..1.

    sample_rate: Hz of the samples; a file knows its own
    channel:     index from 0 of the channel that a model hears, None for the mean of all

    Raises ValueError, one line, for what is not a sound (no samples, NaN or infinite ones, another shape or order,
    integers, no rate, a file that cannot be read, a channel that is not there), and OSError for a file that is not
    there.
    """
    if isinstance(source, (str, Path)):
        if sample_rate is not None:
            raise ValueError(f"the file {source} knows its own sample rate, leave sample_rate {sample_rate} away")
        path = Path(source)
        channels, rate = audio.read_channels(path)
        try:
            return Sound(channels, audio.mix(channels, channel), rate, path, audio.describe(path).encoding)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    channels = np.atleast_2d(_samples(source))
    return Sound(channels, audio.mix(channels, channel), _rate(sample_rate))


def _samples(source: np.ndarray | Tensor) -> np.ndarray:
    """Samples in one or two dimensions as float32."""
    floating = isinstance(source, Tensor) and source.is_floating_point()
    samples = source.detach().cpu().float().numpy() if floating else source
    if not isinstance(samples, np.ndarray) or not np.issubdtype(samples.dtype, np.floating):
        found = getattr(samples, "dtype", type(samples).__name__)
        raise ValueError(f"a sound must be a path or floating-point samples with full scale at -1..1, got {found}")
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise ValueError(f"a sound must be (N,) or (channels, N) with at least one sample, got {samples.shape}")
    audio.check_rows(samples)
    samples = samples.astype(np.float32)
    bad = np.count_nonzero(~np.isfinite(samples))
    if bad:
        raise ValueError(f"the sound holds {bad} NaN or infinite samples in float32")
    return samples


def _rate(sample_rate: int | None) -> int:
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, Integral) or sample_rate < 1:
        raise ValueError(f"samples need their sample_rate, a whole number of Hz from 1 up, got {sample_rate!r}")
    return int(sample_rate)


def mel_config(pipe: AudioLDM2) -> MelConfig:
    """The front end that belongs to the model's vocoder."""
    vocoder = pipe.vocoder.config
    return config_for(vocoder.sample_rate, vocoder.hop_length, vocoder.num_mels)


@inference
def analyse(pipe: AudioLDM2, waveforms: np.ndarray) -> Tensor:
    """Waveforms (B, N) at the model's rate -> log-mel (B, 1, T, F), float32 on the model's device.

    T is the least multiple of the VAE's factor that covers N; the sound is continued with silence to fill it.
    """
    num_samples = waveforms.shape[-1]
    missing = -num_samples % pipe.frame_samples
    padded = torch.from_numpy(np.pad(waveforms, [(0, 0), (0, missing)]))
    return log_mel(padded.to(pipe.device), mel_config(pipe))


@usual_numpy
@in_stage("vae")
@inference
def encode_audio(
    pipe: AudioLDM2, waveform: np.ndarray | Tensor, sample_rate: int, *, seed: int | Sequence[int] | None = None
) -> Tensor:
    """Sound -> latents (B, C, T/f, F/f), float32, scaled as `denoise` returns them and `decode` takes them.

    waveform: (N,) or (B, N) floating point with full scale at -1..1, at any sample_rate (Hz). The level is kept.
    seed:     None takes the mean of the posterior, which is the same each time and nearest to the input. A number s
              draws from the posterior, as the authors do: row i with seed s + i, or seed[i].

    Raises ValueError for another shape, no samples, integers, NaN or infinite samples, or an impossible rate.
    """
    rows = audio.resample(np.atleast_2d(_samples(waveform)), _rate(sample_rate), pipe.sample_rate)
    mel = analyse(pipe, rows).to(pipe.dtype)
    num_frames = mel.shape[2] // pipe.vae.config.downsampling
    tile = num_frames if pipe.whole else pipe.piece_frames
    tiles = plan(num_frames, tile, tile // 4)
    posteriors = [encode(pipe.vae, row, tiles) for row in mel.split(1)]
    latents = torch.cat([posterior.mean for posterior in posteriors])
    if seed is not None:
        seeds = check_seeds(seed, len(rows))
        latents = latents + torch.cat([posterior.std for posterior in posteriors]) * SeededNoise(seeds)(latents)
    return pipe.finite(latents * pipe.vae.config.scaling_factor, "the VAE's latents")


def encode(vae: VAE, mel: Tensor, tiles: Sequence[Window]) -> Posterior:
    """Log-mel (B, 1, f * T, f * F) -> posterior of unscaled latents, the weighted mean of tiles (see `windows.plan`).

    One tile is the VAE's own encoding; of several it is an approximation, as in `chunks.decode`. Float32.
    """
    factor = vae.config.downsampling
    batch, _, num_frames, num_bins = mel.shape
    mean, logvar = mel.new_zeros(2, batch, vae.config.latent_channels, num_frames // factor, num_bins // factor,
                                 dtype=torch.float32)
    for tile in tiles:
        latent_frames, weights = tile.frames.to(mel.device), tile.weights.to(mel.device)[:, None]
        frames = (factor * latent_frames[:, None] + torch.arange(factor, device=mel.device)).flatten()
        part = vae.encode(mel[:, :, frames])
        mean.index_add_(2, latent_frames, part.mean.float() * weights)
        logvar.index_add_(2, latent_frames, part.logvar.float() * weights)
    return Posterior(mean, logvar)

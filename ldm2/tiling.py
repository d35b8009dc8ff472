"""The vocoder and the VAE's decoder piece by piece, so that memory does not grow with the length, and around a loop.

The vocoder is a stack of convolutions: a piece with the context of its receptive field gives the samples of the whole.
The decoder has group norms and an attention over the whole length; there pieces are an approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm2.config import VocoderConfig
from ldm2.runtime.graphs import replayed
from ldm2.vae import VAE, Posterior
from ldm2.vocoder import Vocoder
from ldm2.windows import Window

CHUNK_FRAMES = 512                                         # mel frames for the vocoder: few beside them are context


def nothing() -> None:
    """Nobody wants to know."""


def receptive_field(config: VocoderConfig) -> tuple[int, int]:
    """How many mel frames before and after a frame its samples depend on: the exact numbers for this generator.

    Walks from the samples of frame 0 back to the mel. A transposed convolution makes its output o from the inputs i
    with 0 <= o + padding - rate * i < kernel.
    """
    first, last = -3, config.hop_length - 1 + 3            # conv_post
    blocks = zip(config.resblock_kernel_sizes, config.resblock_dilations, strict=True)
    reach = max(sum((kernel - 1) // 2 * (dilation + 1) for dilation in dilations) for kernel, dilations in blocks)
    stages = list(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))
    for rate, kernel in reversed(stages):
        padding = (kernel - rate) // 2
        first = -((kernel - 1 - padding - (first - reach)) // rate)
        last = (last + reach + padding) // rate
    return 3 - first, 3 + last                             # conv_pre


def vocode(
    vocoder: Vocoder, mel: Tensor, chunk: int, loop: bool = False, after_chunk: Callable[[], object] = nothing
) -> Tensor:
    """Log-mel (B, 1, T, F) -> waveform (B, N), `chunk` frames at a time; equal to vocoder(mel) within rounding.

    With loop=True the frames after the end are those at the start and the other way round, at each layer: the result
    (B, hop_length * T) goes on at its start. The waveform is float32 on the CPU.
    """
    left, right = receptive_field(vocoder.config)
    hop, num_frames = vocoder.config.hop_length, mel.shape[2]
    beyond = 0 if loop else _samples_beyond(vocoder.config)
    # One block: pieces would scatter the heap.
    result = torch.empty(len(mel), hop * num_frames + beyond, dtype=torch.float32, device="cpu")
    size = chunk + left + right if loop else min(chunk + left + right, num_frames)                  # the same each time
    run = replayed(vocoder, vocoder)
    for start in range(0, num_frames, chunk):
        end = min(start + chunk, num_frames)
        begin = start - left if loop else min(max(start - left, 0), num_frames - size)
        waveform = run(mel[:, :, torch.arange(begin, begin + size, device=mel.device) % num_frames])
        stop = hop * end + (beyond if end == num_frames else 0)
        result[:, hop * start : stop] = waveform[:, hop * (start - begin) : stop - hop * begin]
        after_chunk()
    return result


def _samples_beyond(config: VocoderConfig) -> int:
    """Samples that the whole waveform has beyond hop_length * T: where kernel - rate is odd, one a stage, upsampled."""
    samples = 0
    for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
        samples = rate * samples + (kernel - rate) % 2
    return samples


def decode(
    vae: VAE, latents: Tensor, tiles: Sequence[Window], after_tile: Callable[[], object] = nothing
) -> Tensor:
    """Unscaled latents (B, C, T, F) -> log-mel (B, 1, f * T, f * F), the weighted mean of tiles (see `windows.plan`).

    An approximation of vae.decode(latents): the group norms and the attention see a tile in place of everything. On
    41 s of unlike sounds and the bundled tiny model, tiles of 256 frames that share 64 differ from the whole by 0.37 in
    log-mel on average and 2.6 at most (the whole differs from the original by 2.7 on average); tiles of 64 frames that
    share 16 by 0.52 and 4.6, so tiles should not be short. `python -m benchmarks.long_sound --tiles` measures it.
    """
    factor, run = vae.config.downsampling, replayed(vae, vae.decode)
    batch, _, num_frames, num_bins = latents.shape
    mel = latents.new_zeros(batch, 1, factor * num_frames, factor * num_bins, dtype=torch.float32)
    for tile in tiles:
        frames = (factor * tile.frames[:, None] + torch.arange(factor, device="cpu")).flatten().to(mel.device)
        weights = tile.weights.repeat_interleave(factor).to(mel.device)[:, None]
        mel.index_add_(2, frames, run(latents[:, :, tile.frames.to(mel.device)]).float() * weights)
        after_tile()
    return mel.to(latents.dtype)


def encode(vae: VAE, mel: Tensor, tiles: Sequence[Window]) -> Posterior:
    """Log-mel (B, 1, f * T, f * F) -> posterior of unscaled latents, the weighted mean of tiles (see `windows.plan`).

    One tile is the VAE's own encoding; of several it is an approximation, as in `decode`. Float32.
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

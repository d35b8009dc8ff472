"""Vocoder and VAE decoder in pieces: the vocoder exactly, the decoder nearly; memory flat; loops closed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import checkpoints
from ldm2 import tiling
from ldm2.config import VAEConfig, VocoderConfig
from ldm2.vae import VAE
from ldm2.vocoder import Vocoder
from ldm2.windows import plan

PUBLISHED = {
    "model_in_dim": 64, "sampling_rate": 16000, "upsample_initial_channel": 1024, "upsample_rates": [5, 4, 2, 2, 2],
    "upsample_kernel_sizes": [16, 16, 8, 4, 4], "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3, "normalize_before": False,
}
# 48 kHz in small, and rates of one with kernels of three and a single long last step.
SHAPES = {
    "published in small": {},
    "48 kHz": {"upsample_rates": [6, 5, 4, 2, 2], "upsample_kernel_sizes": [12, 10, 8, 4, 4]},
    "frame rate first": {"upsample_rates": [1, 1, 160], "upsample_kernel_sizes": [3, 3, 320]},
    "odd difference": {"upsample_rates": [10, 16], "upsample_kernel_sizes": [15, 17]},
}


def vocoder_like(changes) -> Vocoder:
    """Ours with the weights of a tiny random SpeechT5HifiGan."""
    theirs = checkpoints.vocoder(**changes)
    ours = Vocoder(VocoderConfig.from_dict(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=SHAPES)
def vocoder(request):
    """Generators of several shapes."""
    return vocoder_like(SHAPES[request.param])


@pytest.fixture(scope="module")
def vae():
    """A tiny random VAE with factor 4."""
    theirs = checkpoints.vae()
    ours = VAE(VAEConfig.from_dict(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval().requires_grad_(False)


def mel_of(num_frames, seed=0, rows=1):
    """Random log-mel (rows, 1, num_frames, 32)."""
    return torch.randn(rows, 1, num_frames, 32, generator=torch.Generator().manual_seed(seed))


def test_the_receptive_field_of_the_published_vocoder():
    assert tiling.receptive_field(VocoderConfig.from_dict(PUBLISHED)) == (23, 23)


def test_the_receptive_field_is_as_wide_as_stated_and_no_wider(vocoder):
    hop, centre = vocoder.config.hop_length, 60
    left, right = tiling.receptive_field(vocoder.config)
    mel = mel_of(120).double()
    changed = mel.clone()
    changed[:, :, centre] += 10
    with torch.no_grad():
        module = vocoder.double()
        heard = (module(changed) != module(mel))[0].nonzero().flatten() // hop
        vocoder.float()
    assert int(heard.max()) - centre == left               # this frame is `left` before the last one that hears it
    assert centre - int(heard.min()) == right


@pytest.mark.parametrize("chunk", [1, 7, 32, 49, 50, 51])
def test_chunks_give_the_waveform_of_the_whole(vocoder, chunk):
    mel = mel_of(50, rows=2)
    whole = vocoder(mel)
    pieces = tiling.vocode(vocoder, mel, chunk)
    assert pieces.shape == whole.shape
    assert (pieces - whole).abs().max() < 1e-5


def test_a_looped_waveform_is_the_middle_of_its_repetitions(vocoder):
    mel, hop = mel_of(40), vocoder.config.hop_length
    loop = tiling.vocode(vocoder, mel, 16, loop=True)
    assert loop.shape == (1, 40 * hop)
    repeated = vocoder(mel.repeat(1, 1, 5, 1))[:, 80 * hop : 120 * hop]
    assert (loop - repeated).abs().max() < 1e-5


@pytest.mark.parametrize("num_frames", [1, 4, 50])
def test_rolling_the_mel_rolls_a_looped_waveform(vocoder, num_frames):
    mel, hop = mel_of(num_frames), vocoder.config.hop_length
    loop = tiling.vocode(vocoder, mel, 16, loop=True)
    rolled = tiling.vocode(vocoder, mel.roll(3, 2), 16, loop=True)
    assert (rolled - loop.roll(3 * hop, 1)).abs().max() < 1e-5


def test_the_vocoder_never_sees_more_than_a_chunk_and_its_context():
    vocoder = vocoder_like({})
    seen = []
    vocoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2]))
    tiling.vocode(vocoder, mel_of(200), 16)
    assert max(seen) == 16 + sum(tiling.receptive_field(vocoder.config))


def test_one_tile_is_the_whole_decoding(vae):
    latents = torch.randn(2, 4, 20, 8)
    assert torch.equal(tiling.decode(vae, latents, plan(20, 32, 8)), vae.decode(latents))


def test_tiles_of_a_steady_sound_are_the_whole_decoding_away_from_the_ends(vae):
    latents = torch.randn(1, 4, 1, 8).expand(1, 4, 200, 8)
    tiled, whole = tiling.decode(vae, latents, plan(200, 64, 16)), vae.decode(latents)
    error = (tiled - whole).square().mean().sqrt() / whole.std()
    assert error < 0.03


def test_tiles_are_near_the_whole_decoding(vae):
    latents = torch.randn(1, 4, 200, 8, generator=torch.Generator().manual_seed(0))
    tiled, whole = tiling.decode(vae, latents, plan(200, 64, 16)), vae.decode(latents)
    assert tiled.shape == whole.shape
    error = (tiled - whole).square().mean().sqrt() / whole.std()
    assert error < 0.1


@pytest.mark.parametrize("num_frames, stride", [(48, 12), (12, 6)])
def test_rolling_the_latents_rolls_a_looped_mel(vae, num_frames, stride):
    latents = torch.randn(1, 4, num_frames, 8)
    tiles = plan(num_frames, 16, 4, loop=True)
    rolled = tiling.decode(vae, latents.roll(stride, 2), tiles)
    assert (rolled - tiling.decode(vae, latents, tiles).roll(4 * stride, 2)).abs().max() < 1e-5


def test_the_decoder_never_sees_more_than_a_tile(vae):
    seen = []
    handle = vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2]))
    tiling.decode(vae, torch.randn(1, 4, 100, 8), plan(100, 16, 4))
    handle.remove()
    assert max(seen) == 16

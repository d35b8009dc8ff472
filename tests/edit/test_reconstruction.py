"""Through the model and back, stage by stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ldm2
from ldm2.edit import metrics
from ldm2.mel import MelConfig, log_mel

RATE = 16_000
SOUND = (0.1 * np.random.default_rng(0).standard_normal(5000)).astype(np.float32)


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return ldm2.load(tiny_checkpoint)


def test_the_vocoder_alone_turns_the_mel_into_sound(pipe):
    result = pipe.reconstruct(SOUND, "vocoder", sample_rate=RATE)
    mel = log_mel(torch.from_numpy(np.pad(SOUND, (0, 120)))[None], MelConfig(num_mels=32))
    with torch.no_grad():
        assert np.allclose(result.waveform, pipe.vocoder(mel)[0, :5000].numpy(), atol=1e-6)
    assert np.array_equal(result.original, SOUND)


def test_the_vae_stands_between_encode_and_decode(pipe):
    result = pipe.reconstruct(SOUND, sample_rate=RATE)
    expected = pipe.vocode(pipe.decode(pipe.encode_audio(SOUND, RATE)))[0, :5000].numpy()
    assert np.array_equal(result.waveform, expected)


def test_diffusion_is_a_transfer_without_a_prompt(pipe):
    result = pipe.reconstruct(SOUND, "diffusion", strength=0.5, sample_rate=RATE, steps=2, seed=3)
    expected = pipe.transfer(SOUND, None, strength=0.5, sample_rate=RATE, steps=2, seed=3).waveforms[0]
    assert np.array_equal(result.waveform, expected)
    assert not np.array_equal(result.waveform, pipe.reconstruct(SOUND, sample_rate=RATE).waveform)


def test_the_distances_are_between_what_the_model_heard_and_what_it_gave_back(pipe):
    result = pipe.reconstruct(np.stack([SOUND, SOUND]), sample_rate=22_050, stage="vocoder")
    assert result.sample_rate == RATE
    assert len(result.original) == len(result.waveform) == round(5000 * RATE / 22_050)
    assert result.distances == metrics.compare(result.original, result.waveform, MelConfig(num_mels=32))


@pytest.mark.parametrize("options, message", [
    ({"stage": "text"}, "stage 'text'.*vocoder, vae, diffusion"),
    ({"strength": 2}, "strength must be a number from 0 to 1, got 2"),
    ({"strength": 0.5}, "strength is for the stage diffusion, got 0.5"),
    ({"stage": "vocoder", "prompt": "rain"}, "prompt is for the stage diffusion.*rain"),
    ({"stage": "vae", "steps": 5}, "steps is for the stage diffusion, got 5"),
])
def test_what_cannot_be_reconstructed_is_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.reconstruct(SOUND, sample_rate=RATE, **options)

"""Sound that comes in: what is accepted, and log-mel and latents against diffusers' VAE and closed forms."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import soundfile
import torch

import ldm2
from ldm2 import audio, tiling
from ldm2.edit import sound
from ldm2.mel import MEL_48KHZ, MelConfig, config_for, log_mel
from ldm2.windows import plan
from tests.helpers import noise, relative

RATE = 16_000


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return ldm2.load(tiny_checkpoint)


# --- the way to the latents ------------------------------------------------------------------------------------------

def test_encoding_and_decoding_equal_diffusers(pipe, oracle):
    waveform = noise(2, 6400)
    mel = log_mel(torch.from_numpy(waveform), MelConfig(num_mels=32))
    with torch.no_grad():
        mean = oracle.vae.encode(mel).latent_dist.mean
        decoded = oracle.vae.decode(mean).sample
    latents = pipe.encode_audio(waveform, RATE)
    assert relative(latents, mean * oracle.vae.config.scaling_factor) < 2e-4
    assert relative(pipe.decode(latents), decoded) < 2e-4


def test_a_seed_draws_from_the_posterior_of_diffusers(pipe, oracle):
    waveform = noise(6400)
    mel = log_mel(torch.from_numpy(waveform)[None], MelConfig(num_mels=32))
    with torch.no_grad():
        expected = oracle.vae.encode(mel).latent_dist.sample(torch.Generator().manual_seed(5))
    sample = pipe.encode_audio(waveform, RATE, seed=5)
    assert relative(sample, expected * oracle.vae.config.scaling_factor) < 2e-4


def test_rows_have_seeds_of_their_own(pipe):
    rows = pipe.encode_audio(np.stack([noise(640)] * 2), RATE, seed=5)
    assert torch.equal(rows[1:], pipe.encode_audio(noise(640), RATE, seed=6))
    assert torch.equal(rows, pipe.encode_audio(np.stack([noise(640)] * 2), RATE, seed=[5, 6]))
    with pytest.raises(ValueError, match=r"seed.*2 waveforms, got 3"):
        pipe.encode_audio(np.stack([noise(640)] * 2), RATE, seed=[1, 2, 3])


def test_latents_fill_up_with_silence(pipe):
    short = noise(1000)
    assert pipe.encode_audio(short, RATE).shape == (1, 4, 2, 8)
    assert torch.equal(pipe.encode_audio(short, RATE), pipe.encode_audio(np.pad(short, (0, 280)), RATE))


def test_another_rate_is_resampled(pipe):
    t = np.arange(44_100) / 44_100
    tone = np.sin(2 * math.pi * 500 * t).astype(np.float32)
    at_16 = np.sin(2 * math.pi * 500 * np.arange(16_000) / 16_000).astype(np.float32)
    middle = slice(5, 20)
    assert relative(pipe.encode_audio(tone, 44_100)[:, :, middle], pipe.encode_audio(at_16, RATE)[:, :, middle]) < 1e-2


def test_the_level_is_kept(pipe):
    mels = [pipe.log_mel(level * noise(1, 6400)) for level in (1.0, 0.1)]
    torch.testing.assert_close(mels[0] - mels[1], torch.full_like(mels[0], math.log(10)), atol=1e-3, rtol=0)


def test_one_tile_is_the_encoding_of_the_vae(pipe):
    mel = pipe.log_mel(noise(1, 6400))
    with torch.inference_mode():
        whole, tiled = pipe.vae.encode(mel), tiling.encode(pipe.vae, mel, plan(10, 16, 4))
    assert torch.equal(tiled.mean, whole.mean) and torch.equal(tiled.logvar, whole.logvar)


def test_a_long_sound_is_encoded_in_tiles(pipe):
    latents = pipe.encode_audio(noise(11 * RATE), RATE)
    assert latents.shape == (1, 4, 275, 8)
    assert torch.isfinite(latents).all()


def test_the_front_end_follows_the_vocoder(pipe):
    assert pipe.mel_config == MelConfig(num_mels=32)
    assert config_for(48_000, 480, 256) == MEL_48KHZ
    with pytest.raises(ValueError, match="16000 and 48000 Hz, not of 22050 Hz"):
        config_for(22_050, 256, 80)


@pytest.mark.parametrize("waveform, rate, message", [
    (np.zeros(0, np.float32), RATE, r"at least one sample, got \(0,\)"),
    (np.zeros((1, 1, 640), np.float32), RATE, r"got \(1, 1, 640\)"),
    (np.zeros((640, 2), np.float32), RATE, r"got 640 rows of 2 samples.*sound\.T"),
    (torch.zeros(640, 1), RATE, r"got 640 rows of 1 samples.*sound\.T"),
    (np.zeros(640, np.int16), RATE, "floating-point samples with full scale at -1..1, got int16"),
    (torch.zeros(640, dtype=torch.int16), RATE, "got torch.int16"),
    ([0.0] * 640, RATE, "got list"),
    (np.full(640, np.nan, np.float32), RATE, "640 NaN or infinite samples"),
    (np.zeros(640, np.float32), 0, "positive integer of Hz, got 0"),
    (np.zeros(640, np.float32), None, "positive integer of Hz, got None"),
    (np.zeros(640, np.float32), 16e3, "positive integer of Hz, got 16000.0"),
])
def test_what_is_no_sound_is_named(pipe, waveform, rate, message):
    with pytest.raises(ValueError, match=message):
        pipe.encode_audio(waveform, rate)


@pytest.mark.parametrize("call", [
    lambda pipe, sound: pipe.transfer(sound, "a low tone", sample_rate=RATE, steps=1),
    lambda pipe, sound: pipe.variations(sound, sample_rate=RATE, steps=1),
    lambda pipe, sound: pipe.inpaint(sound, "a dog", times=[(0.1, 0.2)], sample_rate=RATE, steps=1),
    lambda pipe, sound: pipe.extend(sound, "a dog", sample_rate=RATE, steps=1),
    lambda pipe, sound: pipe.super_resolution(sound, above=2000, sample_rate=RATE, steps=1),
    lambda pipe, sound: pipe.reconstruct(sound, sample_rate=RATE),
    lambda pipe, sound: pipe.reconstruct(sound, "vocoder", sample_rate=RATE),
    lambda pipe, sound: pipe.encode_audio(sound, RATE),
    lambda pipe, sound: pipe.rank(sound, ["a dog"]),
])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_sound_with_its_channels_in_columns_is_refused(pipe, call, channels):
    with pytest.raises(ValueError, match=rf"got 4000 rows of {channels} samples.*sound\.T"):
        call(pipe, np.zeros((4000, channels), np.float32))


# --- files and samples -----------------------------------------------------------------------------------------------

def test_a_file_is_opened_with_all_its_channels(tmp_path):
    stereo = noise(2, 1000)
    soundfile.write(tmp_path / "x.wav", stereo.T, 22_050, subtype="FLOAT")
    opened = sound.open_sound(tmp_path / "x.wav")
    assert np.array_equal(opened.channels, stereo)
    assert (opened.sample_rate, opened.encoding, opened.path) == (22_050, "float32", tmp_path / "x.wav")
    np.testing.assert_allclose(opened.mono, stereo.mean(axis=0), atol=1e-7)
    assert np.array_equal(sound.open_sound(str(tmp_path / "x.wav"), channel=1).mono, stereo[1])


def test_a_file_has_the_digest_of_the_bytes_that_were_read(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "x.wav", noise(100), RATE)
    digest = hashlib.sha256((tmp_path / "x.wav").read_bytes()).hexdigest()
    opened = sound.open_sound(tmp_path / "x.wav")
    soundfile.write(tmp_path / "x.wav", noise(200), RATE)
    assert opened.sha256 == digest
    read = audio.read_channels

    def changed(path, *rest):
        soundfile.write(path, noise(300), RATE)
        return read(path, *rest)

    monkeypatch.setattr(audio, "read_channels", changed)
    with pytest.raises(ValueError, match=r"x\.wav has changed while it was read"):
        sound.open_sound(tmp_path / "x.wav")


def test_samples_are_taken_from_numpy_and_torch():
    assert np.array_equal(sound.open_sound(noise(100).astype(np.float64), RATE).mono, noise(100))
    assert np.array_equal(sound.open_sound(torch.from_numpy(noise(2, 100)), RATE).channels, noise(2, 100))


def test_a_file_knows_its_rate_and_its_channels(tmp_path):
    soundfile.write(tmp_path / "x.wav", noise(100), RATE)
    with pytest.raises(ValueError, match="sample_rate 8000"):
        sound.open_sound(tmp_path / "x.wav", 8000)
    with pytest.raises(ValueError, match=r"x\.wav: channel must be from 0 to 0"):
        sound.open_sound(tmp_path / "x.wav", channel=1)


def test_a_text_file_named_wav_is_refused(tmp_path):
    (tmp_path / "x.wav").write_text("no sound at all")
    with pytest.raises(ValueError, match=r"x\.wav cannot be read as a sound file"):
        sound.open_sound(tmp_path / "x.wav")

"""Edits on a tiny random checkpoint: what is kept is exact, the rest comes from the model, bad input is named."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import ldm2
from ldm2 import audio
from ldm2.checkpoints import original
from ldm2.conditioning import Conditioning
from ldm2.edit import edits
from ldm2.edit.masks import masked
from ldm2.pipeline import AudioLDM2
from ldm2.settings import PRESETS, Sampling
from ldm2.stages import Init
from tests import authors
from tests.helpers import noise

RATE = 16_000
RAIN = "rain"
FEW = {"steps": 2, "seed": 1}
ONE = {"steps": 1, "seed": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return ldm2.load(tiny_checkpoint)


def inside(times, num_samples, rate=RATE):
    t = np.arange(num_samples) / rate
    return np.logical_or.reduce([(t >= a) & (t < b) for a, b in times])


# --- the authors' masked run -----------------------------------------------------------------------------------------

def test_a_masked_run_equals_the_authors(tmp_path):
    run = load_file(Path(__file__).parents[1] / "data" / "golden_masked.safetensors")
    golden = authors.golden("base")
    parts = original.components(authors.save(authors.golden_state("base"), tmp_path / "x.pth"), authors.config("base"))
    text = torch.nn.Module()                               # not needed: what it would say is recorded
    pipe = AudioLDM2(parts.unet, parts.vae, parts.vocoder, text, parts.schedule, device=torch.device("cpu"),
                     dtype=torch.float32)

    def side(name: str) -> Conditioning:
        contexts, masks = ([golden[f"{name}.{kind}{i}"] for i in (0, 1)] for kind in ("context", "mask"))
        return Conditioning(tuple(c.expand(2, -1, -1) for c in contexts), tuple(m.expand(2, -1) for m in masks))

    with torch.no_grad():
        posterior = parts.vae.encode(golden["vae.mel"])
    x0 = parts.scale_factor * (posterior.mean + posterior.std * run["posterior_noise"])
    keep = torch.ones(1, 1, 16, 8)
    keep[:, :, 4:12] = 0
    keep[:, :, :, 6:] = 0
    q_noise, step_noise = iter(run["q_noise"]), iter(run["step_noise"])
    latents = pipe.denoise(
        side("cond"), side("uncond"), run["x_T"], Sampling(steps=5, guidance_scale=2.5, eta=1.0),
        noise=lambda like: next(step_noise), init=Init(edit=masked(x0, keep, lambda like: next(q_noise))),
    )
    torch.testing.assert_close(latents, run["latent"], atol=5e-4, rtol=0)
    mel = pipe.decode(latents)
    torch.testing.assert_close(mel[:, :, :8], run["mel"], atol=1e-3, rtol=0)


# --- transfer and variations -----------------------------------------------------------------------------------------

def test_strength_0_is_the_reconstruction(pipe):
    sound = noise(5000)
    untouched = pipe.transfer(sound, RAIN, sample_rate=RATE, strength=0, **FEW)
    assert np.array_equal(untouched.waveforms[0], pipe.reconstruct(sound, "vae", sample_rate=RATE).waveform)


def test_strength_1_is_a_new_sound_of_the_same_length(pipe):
    sounds = [pipe.transfer(noise(5000, seed=seed), RAIN, sample_rate=RATE, strength=1, **FEW) for seed in (0, 1)]
    assert np.array_equal(sounds[0].waveforms, sounds[1].waveforms)
    fresh = pipe.generate(RAIN, seconds=5000 / RATE, **FEW)
    assert np.array_equal(sounds[0].waveforms, fresh.waveforms)


def test_between_them_both_input_and_prompt_count(pipe):
    def run(seed, prompt, strength=0.5):
        return pipe.transfer(noise(5000, seed=seed), prompt, sample_rate=RATE, strength=strength, **FEW).waveforms

    assert not np.array_equal(run(0, RAIN), run(1, RAIN))
    assert not np.array_equal(run(0, RAIN), run(0, "techno"))
    assert np.array_equal(run(0, RAIN), run(0, RAIN))


def test_a_batch_of_prompts_agrees_with_each_alone(pipe):
    together = pipe.transfer(noise(5000), [RAIN, "techno"], sample_rate=RATE, **FEW)
    alone = pipe.transfer(noise(5000), "techno", sample_rate=RATE, steps=2, seed=2)
    np.testing.assert_allclose(together.waveforms[1:], alone.waveforms, atol=1e-4)


def test_candidates_are_ranked_by_the_prompt(pipe):
    ranked = pipe.transfer(noise(5000), RAIN, sample_rate=RATE, num_waveforms=2, **FEW)
    assert ranked.scores == sorted(ranked.scores, reverse=True)
    assert sorted(ranked.seeds) == [1, 2]


def test_variations_need_no_prompt_and_differ(pipe):
    result = pipe.variations(noise(5000), sample_rate=RATE, num_waveforms=2, **FEW)
    assert result.waveforms.shape == (2, 5000)
    assert not np.array_equal(*result.waveforms)
    assert (result.seeds, result.scores, result.settings["prompt"]) == ([1, 2], None, None)


def test_keep_format_gives_the_rate_and_channels_of_the_input(pipe):
    result = pipe.transfer(noise(2, 11_025), RAIN, sample_rate=44_100, keep_format=True, **ONE)
    assert (result.channels.shape, result.sample_rate) == ((1, 2, 11_025), 44_100)
    assert np.array_equal(result.waveforms[0], result.channels[0].mean(axis=0))
    plain = pipe.transfer(noise(2, 11_025), RAIN, sample_rate=44_100, **ONE)
    assert (plain.waveforms.shape, plain.sample_rate) == ((1, 4000), RATE)


def test_a_channel_can_be_picked(pipe):
    sound = noise(2, 4000)
    picked = pipe.transfer(sound, RAIN, sample_rate=RATE, channel=1, **ONE)
    assert np.array_equal(picked.waveforms, pipe.transfer(sound[1], RAIN, sample_rate=RATE, **ONE).waveforms)


def test_a_callback_stops_an_edit(pipe):
    steps = []
    with pytest.raises(ldm2.Cancelled, match="after step 1 of 3"):
        pipe.transfer(noise(4000), RAIN, sample_rate=RATE, strength=0.6, steps=5, seed=1,
                      callback=lambda *step: steps.append(step[:2]) or False)
    assert steps == [(1, 3)]


# --- inpaint ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2), (8000, 1), (48_000, 6)])
def test_outside_the_ranges_every_sample_is_the_inputs_own(pipe, rate, channels):
    sound, times = noise(channels, rate // 2), [(0.1, 0.2), (0.4, None)]
    result = pipe.inpaint(sound, RAIN, times=times, sample_rate=rate, keep_format=True, **ONE)
    new = inside([(0.1, 0.2), (0.4, 1)], rate // 2, rate)
    assert result.channels.shape == (1, channels, rate // 2)
    assert result.channels[0][:, ~new].tobytes() == sound[:, ~new].tobytes()
    assert (result.channels[0][:, new] != sound[:, new]).mean() > 0.99


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler-ancestral", "dpmpp-2m-sde", "lcm"])
def test_any_sampler_makes_the_ranges_anew(pipe, sampler):
    sound = noise(8000)
    result = pipe.inpaint(sound, RAIN, times=[(0.2, 0.3)], sample_rate=RATE, sampler=sampler, **FEW)
    new = inside([(0.2, 0.3)], 8000)
    assert np.array_equal(result.waveforms[0, ~new], sound[~new])
    assert np.isfinite(result.waveforms).all() and (result.waveforms[0, new] != sound[new]).all()


def test_overlapping_ranges_are_one(pipe):
    apart = pipe.inpaint(noise(8000), RAIN, times=[(0.2, 0.3), (0.1, 0.25)], sample_rate=RATE, **ONE)
    one = pipe.inpaint(noise(8000), RAIN, times=[(0.1, 0.3)], sample_rate=RATE, **ONE)
    assert np.array_equal(apart.waveforms, one.waveforms)


def test_without_paste_all_comes_from_the_model(pipe):
    options = {"times": [(0.2, 0.3)], "sample_rate": RATE, **FEW}
    pasted, pure = (pipe.inpaint(noise(8000), RAIN, paste=paste, **options) for paste in (True, False))
    whole = pipe.vocode(pipe.decode(pure.latents))[:, :8000].numpy()
    assert np.array_equal(pure.waveforms, whole)
    faded = slice(round(0.22 * RATE), round(0.28 * RATE))
    assert np.array_equal(pasted.waveforms[:, faded], whole[:, faded])
    assert (pure.waveforms[0, :3000] != noise(8000)[:3000]).any()


def test_a_band_is_made_anew_and_the_rest_of_the_spectrum_kept(pipe):
    sound = noise(8000)
    result = pipe.inpaint(sound, RAIN, bands=[(2000, 4000)], sample_rate=RATE, **FEW)
    before, after = (np.abs(np.fft.rfft(x * np.hanning(8000))) for x in (sound, result.waveforms[0]))
    hz = np.fft.rfftfreq(8000, 1 / RATE)
    kept = (hz < 1900) | (hz > 4100)
    np.testing.assert_allclose(after[kept], before[kept], atol=1e-2 * before.max())
    assert np.abs(after - before)[~kept].max() > 0.1 * before.max()


def test_within_times_and_bands_both_joints_hold(pipe):
    sound = noise(8000)
    result = pipe.inpaint(sound, RAIN, times=[(0.2, 0.3)], bands=[(2000, None)], sample_rate=RATE, **ONE)
    new = inside([(0.2, 0.3)], 8000)
    assert np.array_equal(result.waveforms[0, ~new], sound[~new])


def test_a_sound_beyond_the_models_own_length_is_edited_in_windows(pipe):
    sound = noise(2 * RATE)
    result = pipe.inpaint(sound, RAIN, times=[(1.0, 1.5)], sample_rate=RATE, **ONE)
    assert np.array_equal(result.waveforms[0, :RATE], sound[:RATE])
    assert result.latents.shape == (1, 4, 50, 8)


# --- extend ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("side, start, length", [("after", 0, 6000), ("before", 2000, 6000), ("both", 2000, 8000)])
def test_an_extended_sound_holds_the_input(pipe, side, start, length):
    sound = noise(4000)
    result = pipe.extend(sound, RAIN, seconds=0.125, side=side, sample_rate=RATE, **ONE).waveforms[0]
    assert result.shape == (length,)
    fade = slice(320 if side != "after" else 0, 3680 if side != "before" else 4000)
    assert np.array_equal(result[start : start + 4000][fade], sound[fade])
    new = np.delete(result, slice(start, start + 4000))
    assert np.abs(new).min() >= 0 and np.count_nonzero(new) > 0.99 * len(new)


def test_an_extended_stereo_sound_keeps_rate_and_channels(pipe):
    sound = noise(2, 11_025)
    result = pipe.extend(sound, RAIN, seconds=0.1, sample_rate=44_100, keep_format=True, **ONE)
    assert result.channels.shape == (1, 2, 11_025 + 4410)
    assert np.array_equal(result.channels[0][:, : 11_025 - 882], sound[:, : 11_025 - 882])


# --- super-resolution ------------------------------------------------------------------------------------------------

def test_below_the_frequency_the_spectrum_is_the_inputs(pipe):
    sound = audio.resample(noise(4000), 8000, RATE)
    result = pipe.super_resolution(sound, above=3500, sample_rate=RATE, **FEW)
    before, after = (np.abs(np.fft.rfft(x * np.hanning(8000))) for x in (sound, result.waveforms[0]))
    np.testing.assert_allclose(after[:1740], before[:1740], atol=1e-2 * before.max())
    assert after[2100:].max() > 100 * before[2100:].max()


def test_a_band_above_the_inputs_own_rate_does_not_fit_its_format(pipe):
    with pytest.raises(ValueError, match=r"above 4000 Hz.*8000 Hz"):
        pipe.super_resolution(noise(4000), above=4000, sample_rate=8000, keep_format=True)


def test_above_the_models_range_the_inputs_own_spectrum_stays(pipe):
    sound = noise(1, 24_000)
    result = pipe.super_resolution(sound, above=6000, sample_rate=48_000, keep_format=True, **ONE)
    before, after = (np.abs(np.fft.rfft(x * np.hanning(24_000))) for x in (sound[0], result.channels[0, 0]))
    np.testing.assert_allclose(after[4100:], before[4100:], atol=1e-2 * before.max())


# --- files in and out ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("subtype, rate, channels", [
    ("PCM_U8", 22_050, 1), ("PCM_16", 44_100, 2), ("PCM_24", 48_000, 6), ("FLOAT", 8000, 1), ("PCM_32", 44_100, 2),
    ("DOUBLE", 16_000, 1),
])
def test_any_file_is_edited_and_its_kept_samples_survive_in_the_file(pipe, tmp_path, subtype, rate, channels):
    sound = 0.1 * np.random.default_rng(0).standard_normal((rate // 4, channels))                   # of 64 bits
    soundfile.write(tmp_path / "in.wav", sound, rate, subtype=subtype)
    before = (tmp_path / "in.wav").read_bytes()
    result = pipe.inpaint(tmp_path / "in.wav", RAIN, times=[(0.04, 0.16)], keep_format=True, **ONE)
    (path,) = result.save(tmp_path / "out.wav")
    old, new = (soundfile.read(tmp_path / name, always_2d=True)[0] for name in ("in.wav", "out.wav"))
    kept = ~inside([(0.04, 0.16)], len(old), rate)
    assert np.array_equal(new[kept], old[kept])
    assert (tmp_path / "in.wav").read_bytes() == before
    assert result.to_wav() == path.read_bytes()
    comment = json.loads(audio.read_metadata(path)["comment"])
    assert comment["task"] == "inpaint" and comment["times"] == [[0.04, 0.16]]
    assert comment["input"] == str(tmp_path / "in.wav")
    assert comment["input_sha256"] == hashlib.sha256(before).hexdigest()


def test_a_wide_file_at_the_models_rate_needs_no_format_kept(pipe, tmp_path):
    sound = 0.1 * np.random.default_rng(0).standard_normal(4000)
    soundfile.write(tmp_path / "in.wav", sound, RATE, subtype="DOUBLE")
    result = pipe.inpaint(tmp_path / "in.wav", RAIN, times=[(0.1, None)], **ONE)
    assert np.array_equal(result.channels[0, 0, :1600], sound[:1600])
    assert pipe.reconstruct(tmp_path / "in.wav", "vocoder").original.dtype == np.float32


def test_the_input_is_never_overwritten(pipe, tmp_path):
    path = tmp_path / "in.wav"
    soundfile.write(path, noise(1000), RATE)
    before = path.read_bytes()
    os.symlink(path, tmp_path / "link.wav")
    result = pipe.transfer(path, RAIN, **ONE)
    for name in ("in.wav", "link.wav", "../" + tmp_path.name + "/in.wav"):
        with pytest.raises(ValueError, match="is the input: choose another name"):
            result.save(tmp_path / name, overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("sound", [
    np.zeros(4000, np.float32), np.array([0.5], np.float32), np.sign(noise(4000)), 3 * noise(4000, level=1.0),
], ids=["silence", "one sample", "clipped", "beyond full scale"])
def test_odd_sounds_have_a_result(pipe, sound):
    for made in (
        pipe.transfer(sound, RAIN, sample_rate=RATE, **ONE),
        pipe.inpaint(sound, RAIN, times=[(None, None)], sample_rate=RATE, **ONE),
        pipe.extend(sound, RAIN, seconds=0.1, sample_rate=RATE, **ONE),
    ):
        extra = 1600 if made.settings["task"] == "extend" else 0
        assert made.waveforms.shape == (1, len(sound) + extra)
        assert np.isfinite(made.waveforms).all()


# --- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, options, message", [
    ("inpaint", {}, "nothing to regenerate: give times"),
    ("inpaint", {"times": [(0.3, 0.2)]}, "the range 0.3:0.2 s must end after it begins"),
    ("inpaint", {"times": [(0.2, 0.6)]}, "the range 0.2:0.6 s is not within 0:0.5 s"),
    ("inpaint", {"times": [(-1, 0.2)]}, "the range -1:0.2 s is not within"),
    ("inpaint", {"times": [(0.1, 0.10001)]}, "shorter than one sample"),
    ("inpaint", {"times": [(0, 0.1)], "soft_seconds": -1}, "soft_seconds must be.* got -1"),
    ("inpaint", {"bands": [(4000, 9000)]}, "the range 4000:9000 Hz is not within 0:8000 Hz"),
    ("transfer", {"strength": 1.5}, "strength must be a number from 0 to 1, got 1.5"),
    ("transfer", {"strength": -0.1}, "got -0.1"),
    ("transfer", {"strength": float("nan")}, "got nan"),
    ("transfer", {"loop": True}, "transfer.*loop"),
    ("transfer", {"steps": 0}, "steps must be a positive integer, got 0"),
    ("transfer", {"channel": 3}, "channel must be from 0 to 0 in a sound with 1 channel, got 3"),
    ("inpaint", {"times": [(0, 0.1)], "soft_hz": float("nan")}, "soft_hz must be.* got nan"),
    ("inpaint", {"times": [(0, 0.1)], "crossfade": -1}, "crossfade must be.* got -1"),
    ("extend", {"crossfade": float("inf")}, "crossfade must be.* got inf"),
    ("super_resolution", {"above": 8000}, "above must be below 8000 Hz, the highest frequency of the model, got 8000"),
    ("super_resolution", {"above": -1}, "above must be.* got -1"),
    ("extend", {"side": "above"}, "side 'above'.*after, before, both"),
    ("extend", {"seconds": 0}, "seconds must be.*above 0.*got 0"),
    ("extend", {"seconds": 600}, "600 s, got 600.5 s"),
])
def test_what_cannot_be_edited_is_named_before_the_model_runs(pipe, monkeypatch, name, options, message):
    def never(*arguments, **settings):
        raise AssertionError("the model ran")

    monkeypatch.setattr(pipe, "denoise", never)
    with pytest.raises(ValueError, match=message):
        getattr(pipe, name)(noise(8000), RAIN, sample_rate=RATE, **options)


@pytest.mark.parametrize("prompt", [RAIN, None])
def test_an_edit_takes_the_fast_settings(pipe, prompt):
    sound, settings = noise(4000), {"sample_rate": RATE, "strength": 0.8, "seed": 1, "steps": 5}
    fast = pipe.transfer(sound, prompt, preset="fast", reuse=2, guidance_interval=(0, 0.5), **settings)
    assert fast.settings["sampler"] == PRESETS["fast"]["sampler"]
    assert (fast.settings["guidance_interval"], fast.settings["cache_interval"]) == ([0, 0.5], 2)
    exact = pipe.transfer(sound, prompt, sampler=PRESETS["fast"]["sampler"], **settings)
    assert not torch.equal(fast.latents, exact.latents)


def test_a_late_start_is_at_the_timesteps_of_the_spacing(pipe, monkeypatch):
    visited = []
    forward = pipe.unet.forward

    def watched(x_t, t, prepared, time):
        visited.append(t)
        return forward(x_t, t, prepared, time)

    monkeypatch.setattr(pipe.unet, "forward", watched)
    made = pipe.transfer(noise(4000), RAIN, sample_rate=RATE, strength=0.6, steps=5, seed=1, spacing="trailing")
    assert visited == [599, 399, 199]
    assert made.settings["spacing"] == "trailing"


@pytest.mark.parametrize("option", [{"guidance_scale": 3.0}, {"negative_prompt": "x"}, {"prompt_at": [(0.1, "x")]}])
def test_without_a_prompt_there_is_no_guidance(pipe, option):
    with pytest.raises(ValueError, match="needs a prompt: without one there is no guidance"):
        pipe.transfer(noise(4000), None, sample_rate=RATE, **option)


def test_the_edits_are_methods():
    for name in ("transfer", "variations", "inpaint", "extend", "super_resolution"):
        assert getattr(AudioLDM2, name) is getattr(edits, name)

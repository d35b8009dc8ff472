"""The bundled tiny model: what is in its folder, and that its sounds mean what was asked for, with generous margins."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ldm2
from benchmarks import checkpoints
from benchmarks.judge import is_right, measure
from ldm2.mel import log_mel
from ldm2.training.tiny.sounds import sounds

FOLDER = Path(ldm2.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def pipe() -> ldm2.AudioLDM2:
    return ldm2.load("tiny")


@pytest.fixture(scope="module")
def say(pipe):
    """(prompt, seed) -> waveform (N,); each is generated once."""
    @functools.cache
    def generate(prompt: str, seed: int = 0) -> np.ndarray:
        return np.asarray(pipe.generate(prompt, seed=seed).waveforms[0]).reshape(-1)
    return generate


def test_the_folder_is_at_most_twelve_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12e6


def test_every_weight_is_stored_in_half_precision():
    from safetensors import safe_open
    for path in FOLDER.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        assert kinds <= {"F16", "I64"}, path


def test_the_heads_are_listed_so_that_both_references_agree():
    fields = json.loads((FOLDER / "unet" / "config.json").read_text())
    assert isinstance(fields["attention_head_dim"], list)
    assert fields["cross_attention_dim"][0] == [None, 64, 64]


def test_a_clip_has_the_length_of_the_folders_defaults(say):
    assert len(say("a low tone")) == 40_960


def test_any_prompt_works(say):
    assert np.isfinite(say("Ünïcode 🎵, that NOBODY trained it on!")).all()


@pytest.mark.parametrize("word", ["low", "high"])
def test_tones_have_the_pitch_that_was_asked_for(say, word):
    right = [is_right(say(f"a {word} tone", seed), f"{word} tone") for seed in range(3)]
    assert sum(right) >= 1


def test_a_high_tone_is_higher_than_a_low_one(say):
    low, high = (np.median(measure(say(f"a {word} tone")).steady_pitch) for word in ("low", "high"))
    assert high > 2 * low


def test_loud_is_louder_than_quiet(say):
    assert say("a loud low tone").std() > 1.5 * say("a quiet low tone").std()


def test_copy_synthesis_keeps_most_sounds_what_they_are(pipe):
    clips = list(sounds(123, 24))
    with torch.inference_mode():
        mels = torch.cat([log_mel(torch.from_numpy(clip.waveform)[None]) for clip in clips])
        decoded = pipe.vae.decode(pipe.vae.encode(mels).mode())
        waves = pipe.vocoder(decoded).numpy()
    assert (decoded - mels).abs().mean() < 0.15
    assert np.mean([is_right(wave, clip.kind) for wave, clip in zip(waves, clips)]) > 0.7


def test_diffusers_makes_the_same_sound_of_the_same_folder():
    prompt, settings = "a rising sweep", {"guidance_scale": 2.5}
    noise = torch.randn(1, 4, 64, 16, generator=torch.Generator().manual_seed(3))
    theirs = checkpoints.diffusers_pipeline(FOLDER)(
        prompt, latents=noise, num_inference_steps=5, audio_length_in_s=2.56, **settings).audios[0]
    pipe = ldm2.load("tiny", reference="diffusers")
    ours = pipe.generate(prompt, latents=noise, steps=5, seconds=2.56, **settings).waveforms[0]
    assert np.linalg.norm(ours - theirs) < 5e-3 * np.linalg.norm(theirs)

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
from ldm2.settings import PRESETS
from ldm2.training.tiny.sounds import sounds
from ldm2.unet import UNet

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


def test_the_folder_is_at_most_twelve_megabytes_and_its_student_three():
    sizes = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    student = sizes.pop(FOLDER / "lora/instant.safetensors")
    assert sum(sizes.values()) <= 12e6 and student < 3e6


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


@pytest.mark.parametrize(("prompt", "kind"), [
    ("a siren", "siren"), ("white noise", "white noise"), ("a rising sweep", "rising sweep"),
    ("a slow drum beat", "slow drum"),
])
def test_four_evaluations_of_the_student_make_what_was_asked_for(pipe, monkeypatch, prompt, kind):
    rows = []
    forward_cached = UNet.forward_cached
    monkeypatch.setattr(UNet, "forward_cached", lambda self, x_t, t, conditioning, *rest:
                        rows.append(conditioning.rows) or forward_cached(self, x_t, t, conditioning, *rest))
    made = pipe.generate(prompt, seed=0, preset="instant")
    assert rows == [1] * 4
    assert is_right(made.waveforms[0], kind)
    assert made.settings["lora"][0][0] == "instant"
    assert np.array_equal(pipe.generate(**made.settings).waveforms, made.waveforms)


def test_the_students_sound_is_the_teachers_of_the_same_seed(pipe):
    def mel(**settings):
        return log_mel(torch.from_numpy(pipe.generate("a high bell", seed=3, **settings).waveforms))

    teacher = mel(sampler="dpmpp-2m", spacing="trailing", steps=25)
    plain = mel(**PRESETS["instant"] | {"lora": None})
    assert (mel(preset="instant") - teacher).abs().mean() < 0.5 * (plain - teacher).abs().mean()


def test_any_prompt_works(say):
    assert np.isfinite(say("Ünïcode 🎵, that NOBODY trained it on!")).all()


@pytest.mark.parametrize("word", ["low", "high"])
def test_tones_have_the_pitch_that_was_asked_for(say, word):
    assert any(is_right(say(f"a {word} tone", seed), f"{word} tone") for seed in range(3))


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

"""The drop-in class beside diffusers' own, argument by argument, with the same generator."""

from __future__ import annotations

import importlib.util

import diffusers
import numpy as np
import pytest
import torch

import ldm2
from ldm2.compat import AudioLDM2Pipeline
from ldm2.pipeline import AudioLDM2
from tests.helpers import relative


@pytest.fixture(scope="module")
def ours(tiny_checkpoint):
    """The drop-in class on the tiny checkpoint."""
    pipe = AudioLDM2Pipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(ours, oracle, seed=7, seeds=None, **arguments):
    """Audio of ours and of diffusers for one call."""
    arguments = {"num_inference_steps": 3, "audio_length_in_s": 0.4} | arguments
    audios = []
    for pipe in (ours, oracle):
        generator = torch.Generator().manual_seed(seed)
        if seeds is not None:
            generator = [torch.Generator().manual_seed(s) for s in seeds]
        audios.append(pipe(**arguments, generator=generator).audios)
    return audios


@pytest.mark.parametrize("arguments", [
    {"prompt": "a dog"},
    {"prompt": "a dog", "audio_length_in_s": None},
    {"prompt": ["a dog", "techno music with a beat"], "negative_prompt": ["low", "low quality, average quality"]},
    {"prompt": ["a dog", "techno"], "eta": 1.0},
    {"prompt": ["a dog", "techno"], "seeds": [1, 2]},
    {"prompt": ["a dog", "techno"], "num_waveforms_per_prompt": 2, "seeds": [1, 2, 3, 4], "eta": 0.5},
    {"prompt": "a dog", "guidance_scale": 1.0},
    {"prompt": "a dog", "max_new_tokens": 3},
    {"prompt": "a dog", "output_type": "pt", "audio_length_in_s": 0.33},
    {"prompt": "a dog", "output_type": "latent"},
])
def test_arguments_mean_what_they_mean_in_diffusers(ours, oracle, arguments):
    a, b = both(ours, oracle, **arguments)
    assert type(a) is type(b)
    assert relative(a, b) < 5e-3


def test_given_latents_and_embeddings_are_used(ours, oracle):
    states, mask, generated = oracle.encode_prompt(["a dog", "techno music"], "cpu", 1, False)
    no_states, no_mask, no_generated = oracle.encode_prompt(["x", "low quality it"], "cpu", 1, False)
    length = min(states.shape[1], no_states.shape[1])
    latents = torch.randn(2, 4, 10, 8, generator=torch.Generator().manual_seed(1))
    a, b = both(
        ours, oracle, latents=latents, prompt_embeds=states[:, :length], attention_mask=mask[:, :length],
        generated_prompt_embeds=generated, negative_prompt_embeds=no_states[:, :length],
        negative_attention_mask=no_mask[:, :length], negative_generated_prompt_embeds=no_generated,
    )
    assert relative(a, b) < 5e-3


def test_encode_prompt_returns_the_embeddings_of_diffusers(ours, oracle):
    for a, b in zip(*(p.encode_prompt(["a dog", "techno music"], "cpu", 2, True) for p in (ours, oracle))):
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_a_scheduler_of_diffusers_can_be_assigned(ours, oracle, scheduler):
    before = ours.scheduler, oracle.scheduler
    cls = getattr(diffusers, scheduler)
    try:
        for pipe in (ours, oracle):
            pipe.scheduler = cls.from_config(pipe.scheduler.config)
        a, b = both(ours, oracle, prompt="a dog", num_inference_steps=6, output_type="latent")
    finally:
        ours.scheduler, oracle.scheduler = before
    assert relative(a, b) < 5e-5


def test_callback_gets_step_and_timestep_as_in_diffusers(ours, oracle):
    seen = []
    for pipe in (ours, oracle):
        calls = []
        pipe("a dog", num_inference_steps=5, audio_length_in_s=0.2, callback_steps=2,
             callback=lambda step, t, latents, calls=calls: calls.append((step, int(t), tuple(latents.shape))))
        seen.append(calls)
    assert seen[0] == seen[1]


def test_return_dict_false_gives_a_tuple(ours):
    (audio,) = ours("a dog", num_inference_steps=1, audio_length_in_s=0.1, return_dict=False)
    assert isinstance(audio, np.ndarray) and audio.shape == (1, 1600)


def test_moving_to_a_dtype_keeps_the_scheduler(tiny_checkpoint):
    pipe = AudioLDM2Pipeline.from_pretrained(tiny_checkpoint)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    moved = pipe.to("cpu", torch.bfloat16)
    assert moved is pipe and pipe.dtype == torch.bfloat16
    assert isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler)
    assert np.isfinite(pipe("a dog", num_inference_steps=2, audio_length_in_s=0.1).audios).all()


@pytest.mark.parametrize("how", [lambda pipe: pipe.to(torch.bfloat16), lambda pipe: pipe.to(dtype=torch.bfloat16),
                                 lambda pipe: pipe.to(device="cpu", dtype=torch.bfloat16)])
def test_moving_keeps_the_modules_and_what_was_written_to_them(tiny_checkpoint, how):
    pipe = AudioLDM2Pipeline.from_pretrained(tiny_checkpoint)
    parts = pipe.unet, pipe.vae, pipe.vocoder
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(7)
    how(pipe)
    assert all(now is before for now, before in zip((pipe.unet, pipe.vae, pipe.vocoder), parts))
    assert torch.equal(pipe.unet.conv_out.bias, torch.full_like(pipe.unet.conv_out.bias, 7, dtype=torch.bfloat16))


def test_moving_gives_the_sound_of_the_dtype_and_ranks(tiny_checkpoint, monkeypatch):
    def rank(pipe, *arguments):
        ranked.append(pipe.dtype)
        return ranking(pipe, *arguments)

    ranked, ranking, find = [], AudioLDM2.rank, importlib.util.find_spec
    monkeypatch.setattr(AudioLDM2, "rank", rank)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "librosa" or find(name, *rest))
    settings = {"num_inference_steps": 2, "audio_length_in_s": 0.1, "num_waveforms_per_prompt": 2}
    moved = AudioLDM2Pipeline.from_pretrained(tiny_checkpoint)
    moved("a dog", **settings)
    moved.to(torch.bfloat16)
    loaded = AudioLDM2Pipeline.from_pretrained(tiny_checkpoint, torch.bfloat16)
    sounds = [pipe("a dog", generator=torch.Generator().manual_seed(1), **settings).audios for pipe in (moved, loaded)]
    assert np.array_equal(*sounds)
    assert ranked == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_what_is_read_anew_for_each_stage_is_not_moved(tiny_checkpoint):
    pipe = ldm2.load(tiny_checkpoint, low_memory=True)
    with pytest.raises(ValueError, match=r"low_memory reads the parts for cpu.*for meta"):
        pipe.move(torch.device("meta"), torch.float32, pipe.text)


def test_moving_to_what_is_not_there_is_refused(ours):
    with pytest.raises(ValueError, match="unknown device 'abacus'"):
        ours.to("abacus")


@pytest.mark.parametrize("arguments, message", [
    ({}, "prompt"),
    ({"prompt": "a", "prompt_embeds": torch.zeros(1, 3, 32)}, "not both"),
    ({"prompt": "a", "output_type": "wav"}, "np, pt, latent"),
    ({"prompt": "a", "audio_length_in_s": 0.001}, "audio_length_in_s"),
    ({"prompt": "a", "callback": print, "callback_steps": 0}, "callback_steps"),
    ({"prompt": "a", "generator": [torch.Generator()] * 2}, "2 generators for 1"),
])
def test_bad_arguments_are_refused(ours, arguments, message):
    with pytest.raises(ValueError, match=message):
        ours(**({"num_inference_steps": 1, "audio_length_in_s": 0.1} | arguments))

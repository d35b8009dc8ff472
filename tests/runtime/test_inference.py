"""Stages compute without gradients; what they return, and what is loaded, are ordinary tensors all the same."""

from __future__ import annotations

import os

import pytest
import torch

import ldm2
from ldm2.runtime.inference import inference
from ldm2.settings import Sampling

SETTINGS = {"steps": 1, "seconds": 0.2, "seed": 0}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return ldm2.load(tiny_checkpoint, device="cpu")


def tensors(pipe) -> list[torch.Tensor]:
    """What each stage returns."""
    conditioning = pipe.encode("rain")
    unconditional = pipe.encode_unconditional(conditioning)
    latents = pipe.denoise(conditioning, unconditional, torch.zeros(1, *pipe.latent_shape(0.2)), Sampling(steps=1))
    mel = pipe.decode(latents)
    waveform = pipe.vocode(mel)
    sides = [*conditioning.contexts, *unconditional.contexts]
    return [*sides, latents, mel, waveform, pipe.encode_audio(waveform, pipe.sample_rate)]


def test_results_of_stages_are_ordinary_tensors(pipe):
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors(pipe))


def test_a_training_step_takes_what_encode_and_encode_audio_return(pipe):
    conditioning, latents = pipe.encode("rain"), pipe.encode_audio(torch.zeros(3200), 16_000)
    for parameter in pipe.unet.parameters():
        parameter.requires_grad_(True)
    try:
        pipe.unet(latents, 500, conditioning).square().mean().backward()
        assert all(parameter.grad is not None for parameter in pipe.unet.conv_in.parameters())
    finally:
        for parameter in pipe.unet.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)


@pytest.mark.parametrize("low_memory", [False, True])
def test_what_is_loaded_in_inference_mode_can_be_trained(tiny_checkpoint, low_memory):
    with torch.inference_mode():
        pipe = ldm2.load(tiny_checkpoint, device="cpu", low_memory=low_memory)
        pipe.generate("rain", **SETTINGS)
    with pipe.stages["unet"]:
        assert not any(parameter.is_inference() for parameter in pipe.unet.parameters())
        pipe.unet.requires_grad_(True)
        conditioning = pipe.encode("rain")
        pipe.unet(torch.zeros(1, *pipe.latent_shape(0.2)), 500, conditioning).sum().backward()


def test_a_ranker_made_in_inference_mode_is_ordinary(tiny_checkpoint):
    pipe = ldm2.load(tiny_checkpoint, device="cpu")
    with torch.inference_mode():
        pipe.generate("rain", num_waveforms=2, **SETTINGS)
    assert not any(value.is_inference() for value in pipe._ranker.audio.state_dict().values())


def test_autocast_is_off_inside_and_back_outside():
    with torch.autocast("cpu", torch.bfloat16):
        inside = inference(lambda: torch.is_autocast_enabled("cpu"))()
        assert torch.is_autocast_enabled("cpu")
    assert not inside


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_relative_path_holds_when_the_current_folder_changes(tiny_checkpoint, tmp_path, monkeypatch, low_memory):
    monkeypatch.chdir(tiny_checkpoint.parent)
    pipe = ldm2.load(f"./{tiny_checkpoint.name}", device="cpu", low_memory=low_memory)
    os.chdir(tmp_path)
    assert len(pipe.generate("rain", num_waveforms=2, **SETTINGS).waveforms) == 2


@pytest.mark.parametrize("use", [
    lambda pipe: pipe.generate("rain", **SETTINGS),
    lambda pipe: pipe.reconstruct(torch.zeros(3200), sample_rate=16_000),
    lambda pipe: pipe.transfer(torch.zeros(3200), "rain", sample_rate=16_000, steps=1),
])
def test_float16_on_a_cpu_is_refused_before_the_work(tiny_checkpoint, use):
    pipe = ldm2.load(tiny_checkpoint, device="cpu", dtype="float16")
    with pytest.raises(ValueError, match=r"float16 is for GPUs.*bfloat16"):
        use(pipe)

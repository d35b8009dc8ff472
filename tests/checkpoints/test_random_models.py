"""Models with random weights: sizes as published, sound that is finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm2.checkpoints import random_models
from ldm2.cli import profile
from ldm2.config import UNetConfig, VAEConfig, VocoderConfig
from ldm2.unet import UNet
from ldm2.vae import VAE
from ldm2.vocoder import Vocoder


def millions(module) -> float:
    """Parameters of a module in millions, rounded as weights.md gives them."""
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 1)


@pytest.mark.parametrize("name, count", [("audioldm2", 346.9), ("audioldm2-large", 718.0)])
def test_the_unets_have_as_many_parameters_as_the_published_ones(name, count):
    with torch.device("meta"):
        assert millions(UNet(UNetConfig.from_dict(random_models.fields(name)["unet"]))) == count


def test_vae_and_vocoder_have_as_many_parameters_as_the_published_ones():
    fields = random_models.fields("audioldm2")
    with torch.device("meta"):
        assert millions(VAE(VAEConfig.from_dict(fields["vae"]))) == 55.4
        assert millions(Vocoder(VocoderConfig.from_dict(fields["vocoder"]))) == 55.3


def test_a_random_model_makes_finite_noise_of_the_asked_length():
    pipe = random_models.pipeline("tiny", device=torch.device("cpu"))
    waveform = pipe.generate("a dog barking", seconds=0.2, steps=2, seed=0).waveforms[0]
    assert waveform.shape == (3200,) and np.isfinite(waveform).all() and waveform.std() > 0


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'huge', choose from tiny, audioldm2, audioldm2-large"):
        random_models.pipeline("huge", device=torch.device("cpu"))


def test_the_command_line_offers_all_of_them():
    assert random_models.NAMES == profile.RANDOM

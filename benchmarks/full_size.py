"""Full-size AudioLDM2 checkpoints with random weights, in the published layout: to compare with diffusers at real
sizes, without the published weights. Sizes are those of the published config.json files
(`ldm2.checkpoints.random_models`).

    python -m benchmarks.full_size FOLDER [--size base|large]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import diffusers
import torch
import transformers

from benchmarks import checkpoints
from ldm2.checkpoints import random_models

SIZES = {"base": "audioldm2", "large": "audioldm2-large"}


def unet(size: str = "base") -> diffusers.AudioLDM2UNet2DConditionModel:
    """346.9 M (base) or 718.0 M (large) parameters."""
    return checkpoints.unet(**random_models.fields(SIZES[size])["unet"])


def vae() -> diffusers.AutoencoderKL:
    """55.4 M parameters."""
    return checkpoints.vae(**random_models.VAE_FIELDS)


def vocoder() -> transformers.SpeechT5HifiGan:
    """55.3 M parameters."""
    return checkpoints.vocoder(**random_models.VOCODER)


def clap() -> transformers.ClapModel:
    """193.9 M parameters."""
    config = transformers.ClapConfig(audio_config=random_models.CLAP_AUDIO)
    return checkpoints.randomise(transformers.ClapModel(config), seed=3)


def t5() -> transformers.T5EncoderModel:
    """341.2 M parameters: flan-t5-large."""
    return checkpoints.randomise(transformers.T5EncoderModel(transformers.T5Config(**random_models.T5)), seed=4)


def gpt2() -> transformers.GPT2Model:
    """124.4 M parameters."""
    config = transformers.GPT2Config()
    config.max_new_tokens = random_models.LANGUAGE_MODEL["max_new_tokens"]
    return checkpoints.randomise(transformers.GPT2Model(config), seed=5)


def projection() -> torch.nn.Module:
    """1.2 M parameters."""
    return checkpoints.randomise(diffusers.AudioLDM2ProjectionModel(**random_models.PROJECTION), seed=6)


def save(folder: str | Path, size: str = "base") -> Path:
    """Write the checkpoint (4.5 GB base, 5.9 GB large); `folder` is there when all of it is. Returns the folder.

    Raises FileExistsError if it exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoints.save(
        partial, unet=unet(size), vae=vae(), vocoder=vocoder(), text_encoder=clap(), text_encoder_2=t5(),
        language_model=gpt2(), projection_model=projection(),
        feature_extractor=transformers.ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad"),
    )
    return partial.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--size", choices=SIZES, default="base")
    args = parser.parse_args()
    print(save(args.folder, args.size))

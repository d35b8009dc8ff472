"""Full-size AudioLDM2 checkpoints with random weights, in the published layout: to measure speed and memory, and to
compare with diffusers at real sizes, without the published weights. Sizes are those of the published config.json files.

    python -m benchmarks.full_size FOLDER [--size base|large]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusers
import torch
import transformers

from tests import checkpoints

SIZES = {
    "base": {"cross_attention_dim": [[None, 768, 1024]] * 4, "transformer_layers_per_block": 1},
    "large": {"cross_attention_dim": [[None, 768, 1024, None]] * 4, "transformer_layers_per_block": 2},
}


def unet(size: str = "base") -> diffusers.AudioLDM2UNet2DConditionModel:
    """346.9 M (base) or 718.0 M (large) parameters."""
    return checkpoints.unet(
        sample_size=256, in_channels=8, out_channels=8, block_out_channels=(128, 256, 384, 640),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        layers_per_block=2, attention_head_dim=8, norm_num_groups=32, **SIZES[size],
    )


def vae() -> diffusers.AutoencoderKL:
    """55.4 M parameters."""
    return checkpoints.vae(
        block_out_channels=(128, 256, 512), latent_channels=8, layers_per_block=2, norm_num_groups=32,
    )


def vocoder() -> transformers.SpeechT5HifiGan:
    """55.3 M parameters."""
    return checkpoints.vocoder(
        model_in_dim=64, upsample_initial_channel=1024, resblock_kernel_sizes=[3, 7, 11],
        resblock_dilation_sizes=[[1, 3, 5]] * 3,
    )


def clap() -> transformers.ClapModel:
    """193.9 M parameters."""
    config = transformers.ClapConfig(
        audio_config={"patch_embeds_hidden_size": 128, "hidden_size": 1024, "depths": [2, 2, 12, 2]}
    )
    return checkpoints.randomise(transformers.ClapModel(config), seed=3)


def t5() -> transformers.T5EncoderModel:
    """341.2 M parameters: flan-t5-large."""
    config = transformers.T5Config(
        vocab_size=32128, d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu",
    )
    return checkpoints.randomise(transformers.T5EncoderModel(config), seed=4)


def gpt2() -> transformers.GPT2Model:
    """124.4 M parameters."""
    config = transformers.GPT2Config()
    config.max_new_tokens = 8
    return checkpoints.randomise(transformers.GPT2Model(config), seed=5)


def projection() -> torch.nn.Module:
    """1.2 M parameters."""
    model = diffusers.AudioLDM2ProjectionModel(text_encoder_dim=512, text_encoder_1_dim=1024, langauge_model_dim=768)
    return checkpoints.randomise(model, seed=6)


def save(folder: str | Path, size: str = "base") -> Path:
    """Write the checkpoint (4.5 GB base, 5.9 GB large) into `folder`, which must not exist yet. Returns the folder."""
    return checkpoints.save(
        folder, unet=unet(size), vae=vae(), vocoder=vocoder(), text_encoder=clap(), text_encoder_2=t5(),
        language_model=gpt2(), projection_model=projection(),
        feature_extractor=transformers.ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad"),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--size", choices=SIZES, default="base")
    args = parser.parse_args()
    print(save(args.folder, args.size))

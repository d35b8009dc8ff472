"""AudioLDM 1 in the hub's layout, end to end beside diffusers' (retired) AudioLDMPipeline."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
import transformers

import ldm2
from benchmarks import checkpoints
from ldm2.config import UNetConfig
from tests.helpers import PROMPT, relative


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, diffusers' pipeline) of one tiny checkpoint: a UNet2DConditionModel with FiLM on CLAP's text embedding.

    sample_size is what the published files say, half of the length that they were trained on.
    """
    clap = checkpoints.clap()
    text = transformers.ClapTextModelWithProjection(clap.config.text_config)
    text.text_model, text.text_projection = clap.text_model, clap.text_projection
    channels = (32, 64, 96)
    unet = diffusers.UNet2DConditionModel(
        sample_size=128, in_channels=4, out_channels=4, block_out_channels=channels, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
        attention_head_dim=8, cross_attention_dim=channels, class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16, class_embeddings_concat=True,
    )
    oracle = diffusers.AudioLDMPipeline(
        vae=checkpoints.vae(), text_encoder=text.eval(), tokenizer=checkpoints.roberta_tokenizer(),
        unet=checkpoints.randomise(unet, 0, gain=1.2), vocoder=checkpoints.vocoder(),
        scheduler=diffusers.DDIMScheduler.from_config(checkpoints.SCHEDULER),
    )
    folder = tmp_path_factory.mktemp("audioldm1")
    oracle.save_pretrained(folder)
    oracle.set_progress_bar_config(disable=True)
    return folder, oracle


@pytest.fixture(scope="module")
def pair(saved):
    """(ldm2, diffusers)"""
    folder, oracle = saved
    return ldm2.load(folder, reference="diffusers"), oracle


@pytest.mark.parametrize("arguments", [
    {"prompt": PROMPT},
    {"prompt": PROMPT, "negative_prompt": "low quality"},
    {"prompt": PROMPT, "guidance_scale": 1.0},
])
def test_audio_is_that_of_diffusers(pair, arguments):
    ours, oracle = pair
    theirs = oracle(
        **{"guidance_scale": 2.5} | arguments, audio_length_in_s=0.6, num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
    ).audios
    result = ours.generate(**{"guidance_scale": 2.5} | arguments, seconds=0.6, steps=4, seed=3)
    assert relative(result.waveforms, theirs) < 5e-3


@pytest.mark.parametrize("sample_size", [None, 16, 128])
def test_the_default_length_is_made_in_one_piece_as_it_was_trained(saved, tmp_path, sample_size):
    folder, oracle = saved
    changed = shutil.copytree(folder, tmp_path / "changed")
    config = changed / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": sample_size}))
    ours = ldm2.load(changed)
    assert ours.native_latent_frames == 256                          # 10.24 s, the authors' latent_t_size
    assert ours.windows(256) is None
    theirs = oracle(PROMPT, audio_length_in_s=0.8, num_inference_steps=2, guidance_scale=1.0,
                    generator=torch.Generator().manual_seed(3)).audios
    result = ldm2.load(changed, reference="diffusers").generate(PROMPT, seconds=0.8, steps=2, seed=3, guidance_scale=1)
    assert relative(result.waveforms, theirs) < 5e-3
    whole = ours.generate(PROMPT, seconds=0.8, steps=2, seed=3, guidance_scale=1)
    alone = ours.generate(PROMPT, seconds=0.8, steps=2, seed=3, guidance_scale=1, window=0.8)
    assert relative(whole.waveforms, alone.waveforms) < 1e-6


def test_a_longer_length_of_training_is_kept(saved):
    fields = json.loads((saved[0] / "unet/config.json").read_text())
    assert UNetConfig.from_dict(fields | {"sample_size": 512}).sample_size == 512


def test_other_models_mean_what_they_say(tiny_checkpoint):
    assert UNetConfig.from_json(tiny_checkpoint / "unet/config.json").sample_size == 32

"""AudioLDM 1 in the hub's layout, end to end beside diffusers' (retired) AudioLDMPipeline."""

from __future__ import annotations

import diffusers
import pytest
import torch
import transformers

import ldm2
from benchmarks import checkpoints
from tests.test_pipeline import relative

PROMPT = "a dog barking in the rain"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ldm2, diffusers) on one tiny checkpoint: a UNet2DConditionModel with FiLM on CLAP's text embedding."""
    clap = checkpoints.clap()
    text = transformers.ClapTextModelWithProjection(clap.config.text_config)
    text.text_model, text.text_projection = clap.text_model, clap.text_projection
    channels = (32, 64, 96)
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=channels, layers_per_block=1,
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

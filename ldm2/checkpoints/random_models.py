"""Models of real sizes with random weights, made in memory: to measure time and memory without any download.

The fields are those of the published config.json files. What such a model makes is noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm2 import weights
from ldm2.checkpoints import build
from ldm2.checkpoints.hub import BUNDLED
from ldm2.checkpoints.parts import Checkpoint, Part
from ldm2.checkpoints.reading import read_hub_folder
from ldm2.fields import read_json
from ldm2.pipeline import AudioLDM2
from ldm2.runtime.device import W8A8, choose_dtype, chosen_name
from ldm2.text.configs import read_config
from ldm2.text.encoders import ClapText
from ldm2.text.gpt2 import GPT2, GPT2Config, Projection, ProjectionConfig
from ldm2.text.roberta import RobertaConfig
from ldm2.text.t5 import T5Config, T5Encoder

Fields = dict[str, Any]

UNET: Fields = {
    "sample_size": 256, "in_channels": 8, "out_channels": 8, "block_out_channels": [128, 256, 384, 640],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "layers_per_block": 2, "attention_head_dim": 8, "norm_num_groups": 32,
}
# What the published checkpoints differ in.
SIZES: dict[str, Fields] = {
    "audioldm2": {"cross_attention_dim": [[None, 768, 1024]] * 4, "transformer_layers_per_block": 1},
    "audioldm2-large": {"cross_attention_dim": [[None, 768, 1024, None]] * 4, "transformer_layers_per_block": 2},
}
VAE_FIELDS: Fields = {
    "in_channels": 1, "out_channels": 1, "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 8, "layers_per_block": 2, "norm_num_groups": 32, "scaling_factor": 0.4110932946205139,
}
VOCODER: Fields = {
    "model_in_dim": 64, "sampling_rate": 16000, "upsample_initial_channel": 1024, "upsample_rates": [5, 4, 2, 2, 2],
    "upsample_kernel_sizes": [16, 16, 8, 4, 4], "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3, "normalize_before": False,
}
CLAP_AUDIO: Fields = {"patch_embeds_hidden_size": 128, "hidden_size": 1024, "depths": [2, 2, 12, 2]}
T5: Fields = {
    "vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16,
    "feed_forward_proj": "gated-gelu",
}
LANGUAGE_MODEL: Fields = {"max_new_tokens": 8}
PROJECTION: Fields = {"text_encoder_dim": 512, "text_encoder_1_dim": 1024, "langauge_model_dim": 768}

NAMES = ("tiny", *SIZES)


def fields(name: str) -> dict[str, Fields]:
    """The config of each part, by the names of a hub folder. Raises ValueError for a name not in NAMES."""
    if name == "tiny":
        return {part: read_json(BUNDLED / "tiny" / part / "config.json") for part in (
            "unet", "vae", "vocoder", "text_encoder", "text_encoder_2", "language_model", "projection_model")}
    if name not in SIZES:
        raise ValueError(f"no random model is called {name!r}, choose from {', '.join(NAMES)}")
    return {
        "unet": UNET | SIZES[name], "vae": VAE_FIELDS, "vocoder": VOCODER, "text_encoder": {}, "text_encoder_2": T5,
        "language_model": LANGUAGE_MODEL, "projection_model": PROJECTION,
    }


def read(name: str) -> Checkpoint:
    """The parts of a model of the size of a published one; its tokenizers are those of the bundled model `tiny`.

    Weights are drawn when they are asked for. Raises ValueError for a name not in NAMES.
    """
    tiny = read_hub_folder(BUNDLED / "tiny")
    parts = {part: _part(part, each, tiny.tokenizer) for part, each in fields(name).items()}
    return Checkpoint(f"random {name}", parts | {"scheduler": tiny["scheduler"]}, tiny.tokenizer)


def _part(name: str, fields: Fields, tokenizer: Callable[[str], Any]) -> Part:
    source = f"random {name}"
    return Part(source, source, lambda: fields, lambda to_copy: random_tensors(_shapes(name, fields, tokenizer)))


def _shapes(name: str, fields: Fields, tokenizer: Callable[[str], Any]) -> nn.Module:
    """A part without memory."""
    with weights.on_meta():
        if name in build.MODELS:
            model, config = build.MODELS[name]
            return model(config.from_dict(fields))
        if name == "text_encoder":
            return ClapText(tokenizer("clap"), read_config(RobertaConfig, fields.get("text_config", {}), name))
        if name == "text_encoder_2":
            return T5Encoder(read_config(T5Config, fields, name))
        if name == "projection_model":
            return Projection(ProjectionConfig.from_dict(fields))
        return GPT2(read_config(GPT2Config, fields, name))


def pipeline(
    name: str, *, device: torch.device, dtype: str = "float32", reference: str = "authors"
) -> AudioLDM2:
    """A pipeline of the parts of `read`. dtype, reference: as of ldm2.load. Raises ValueError for unknown names."""
    named = chosen_name(dtype, device)
    origin = {"model": f"random {name}", "revision": None, "reference": reference, "dtype": named}
    return build.pipeline(functools.partial(read, name), device=device, dtype=choose_dtype(named, device),
                          w8a8=named == W8A8, reference=reference, origin=origin)


def random_tensors(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Weights for a module (on the meta device, it may be), float32 on the CPU: matrices and kernels that keep the
    variance of what they are applied to, norms near one, biases near zero."""
    pool = torch.randn(
        1_000_003, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu"
    )                                                      # prime: rows of matrices differ
    tensors = {}
    for name, parameter in module.state_dict().items():
        count = parameter.numel()
        values = pool.repeat(count // len(pool) + 1)[:count].view(parameter.shape)
        if parameter.ndim >= 2:
            tensors[name] = values * parameter[0].numel() ** -0.5
        else:
            tensors[name] = (1.0 if name.endswith(("weight", "scale")) else 0.0) + 0.1 * values
    return tensors

"""Models of real sizes with random weights, made in memory: to measure time and memory without any download.

The fields are those of the published config.json files. What such a model makes is noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ldm2 import weights
from ldm2.checkpoints.hub import BUNDLED
from ldm2.config import UNetConfig, VAEConfig, VocoderConfig
from ldm2.fields import read_json
from ldm2.pipeline import AudioLDM2
from ldm2.runtime import weight_layout
from ldm2.schedules import Schedule
from ldm2.text.encoder import Parts, TextEncoder
from ldm2.text.encoders import ClapText, T5Text
from ldm2.text.gpt2 import Projection, ProjectionConfig, load_gpt2, load_projection
from ldm2.unet import UNet
from ldm2.vae import VAE
from ldm2.vocoder import Vocoder

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
GPT2: Fields = {"max_new_tokens": 8}
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
        "language_model": GPT2, "projection_model": PROJECTION,
    }


def pipeline(
    name: str, *, device: torch.device, dtype: torch.dtype = torch.float32, reference: str = "authors"
) -> AudioLDM2:
    """A pipeline of the size of a published model; its tokenizers are those of the bundled model `tiny`.

    reference: as of ldm2.load. Raises ValueError for a name not in NAMES.
    """
    config = fields(name)
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    with weights.on_meta():
        modules: dict[str, Any] = {
            "unet": UNet(UNetConfig.from_dict(config["unet"], reference=reference)),
            "vae": VAE(VAEConfig.from_dict(config["vae"])),
            "vocoder": Vocoder(VocoderConfig.from_dict(config["vocoder"])),
        }
    for module in modules.values():
        weight_layout.arrange(weights.load(module, random_tensors(module), source="random weights", **where))
    schedule = Schedule.from_json(BUNDLED / "tiny/scheduler/scheduler_config.json")
    return AudioLDM2(
        **modules, text=_text(config, reference, where), schedule=schedule, reference=reference, **where,
        origin={"model": f"random {name}", "revision": None, "reference": reference, "dtype": str(dtype)[6:]},
    )


def _text(config: Mapping[str, Fields], reference: str, where: dict) -> TextEncoder:
    """CLAP's text branch, T5, the projection and GPT-2."""
    words = Parts(BUNDLED / "tiny", None, None)
    clap_words = words.tokenizer("tokenizer", "RobertaTokenizer")
    t5_words = words.tokenizer("tokenizer_2", "T5Tokenizer")
    clap = config["text_encoder"].get("text_config", {})
    gpt2 = config["language_model"]
    with weights.on_meta():
        shapes = {
            "clap": ClapText(clap_words, transformers.ClapTextConfig(**clap)),
            "t5": transformers.T5EncoderModel(transformers.T5Config(**config["text_encoder_2"])),
            "projection": Projection(ProjectionConfig.from_dict(config["projection_model"])),
            "gpt2": transformers.GPT2Model(transformers.GPT2Config(**gpt2)),
        }
    tensors = {part: random_tensors(module) for part, module in shapes.items()}
    return TextEncoder(
        clap=ClapText.load(clap, tensors["clap"], clap_words, **where),
        t5=T5Text.load(config["text_encoder_2"], tensors["t5"], t5_words, **where),
        projection=load_projection(config["projection_model"], tensors["projection"], **where),
        gpt2=load_gpt2(gpt2, tensors["gpt2"], **where),
        num_vectors=gpt2["max_new_tokens"], reference=reference,
    )


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

"""Writes trained parts as a checkpoint in the published layout, float16, so that ldm2 and diffusers open it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from ldm2.checkpoints.original import configs
from ldm2.training.tiny.contrast import feature_extractor
from ldm2.training.tiny.text import WIDTH, TextSide

SCHEDULER = configs.SCHEDULER | {"skip_prk_steps": True}
_INDEX = {
    "_class_name": "AudioLDM2Pipeline",
    "_diffusers_version": "0.21.0",
    "feature_extractor": ["transformers", "ClapFeatureExtractor"],
    "language_model": ["transformers", "GPT2LMHeadModel"],                    # the class that diffusers can run
    "projection_model": ["audioldm2", "AudioLDM2ProjectionModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "ClapModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "RobertaTokenizer"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
    "unet": ["audioldm2", "AudioLDM2UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "vocoder": ["transformers", "SpeechT5HifiGan"],
}


def export(
    folder: Path, unet: nn.Module, unet_fields: Mapping[str, Any], vae: nn.Module, vae_fields: Mapping[str, Any],
    vocoder: nn.Module, vocoder_fields: Mapping[str, Any], clap: transformers.ClapModel, text: TextSide,
    defaults: Mapping[str, Any],
) -> None:
    """Writes everything but a README. `..._fields` are the fields of the parts' config.json.

    vae_fields gets the scaling_factor of vae.config. defaults: what ldm2 takes where the user says nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "model_index.json", _INDEX)
    _write(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write(folder / "ldm2.json", defaults)
    name = "diffusion_pytorch_model.safetensors"
    scaled = {**vae_fields, "scaling_factor": vae.config.scaling_factor}
    _save(folder / "unet", name, unet, {"_class_name": "AudioLDM2UNet2DConditionModel", **unet_fields})
    _save(folder / "vae", name, vae, {"_class_name": "AutoencoderKL", **scaled})
    _save(folder / "vocoder", "model.safetensors", vocoder,
          {"architectures": ["SpeechT5HifiGan"], "model_type": "hifigan", **vocoder_fields})
    _save(folder / "projection_model", name, text.projection,
          {"_class_name": "AudioLDM2ProjectionModel", "text_encoder_dim": WIDTH, "text_encoder_1_dim": WIDTH,
           "langauge_model_dim": WIDTH, "use_learned_position_embedding": None, "max_seq_length": None})
    t5, head = transformers.T5EncoderModel(text.t5_config), transformers.GPT2LMHeadModel(text.gpt2_config)
    t5.load_state_dict(text.t5.model.state_dict())
    head.transformer.load_state_dict(text.gpt2.state_dict())
    for part, module in (("text_encoder", clap), ("text_encoder_2", t5), ("language_model", head)):
        _half(module).save_pretrained(folder / part)
    text.clap.tokenizer.save_pretrained(folder / "tokenizer")
    text.t5.tokenizer.save_pretrained(folder / "tokenizer_2")
    feature_extractor().save_pretrained(folder / "feature_extractor")


def _half(module: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A copy in float16; the original stays as it is."""
    copy = type(module)(module.config)
    copy.load_state_dict(module.state_dict())
    return copy.eval().half()


def _save(folder: Path, name: str, module: nn.Module, fields: Mapping[str, Any]) -> None:
    _write(folder / "config.json", fields)
    tensors = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in module.state_dict().items()}
    save_file(tensors, folder / name, metadata={"format": "pt"})


def _write(path: Path, fields: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

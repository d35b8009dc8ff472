"""The config.json that each part of an authors' file would have in a published hub folder, read off the shapes.

What shapes do not show (heads of the UNet, upsampling rates of the vocoder, ...) comes from the authors' configuration
where one is given, else from the two kinds of model that they published: 16 kHz and 48 kHz.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm2.checkpoints.original.configuration import section
from ldm2.fields import short
from ldm2.schedules import Schedule

Tensors = Mapping[str, Tensor]
Fields = dict[str, Any]

GROUPS = 32                                                # of every group norm, in UNet and VAE
HEAD_CHANNELS = 32                                         # channels of each head of the UNet
MEL_FRAMES = 1024                                       # mel frames of the length that the models were trained on
TEXT_HEAD_CHANNELS = 64                                    # of RoBERTa and GPT-2
SPEECH_VECTORS = 512                                       # that GPT-2 writes in the speech models
VECTORS = 8                                                # in all others

# Kernel sizes of the upsampling stages, which the shapes show -> their rates and the sample rate, which they do not.
VOCODERS: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {
    (16, 16, 8, 4, 4): ((5, 4, 2, 2, 2), 16000),
    (12, 10, 8, 4, 4): ((6, 5, 4, 2, 2), 48000),
}
DILATIONS = (1, 3, 5)

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


def unet(tensors: Tensors, config: Mapping[str, Any], latent_frames: int) -> Fields:
    """unet/config.json, heads listed per level, from tensors under the hub's names.

    latent_frames: how long the latents of the training were, from which diffusers takes its default length.
    """
    given = section(config, "model", "params", "unet_config", "params")
    levels = _numbers(tensors, r"down_blocks\.(\d+)\..*")
    channels = [_rows(tensors, f"down_blocks.{level}.resnets.0.conv1.weight") for level in levels]
    attends = [f"down_blocks.{level}.attentions.0.norm.weight" in tensors for level in levels]
    contexts = [
        _context_dim(tensors, j, [level for level in levels if attends[level]], channels, given.get("context_dim"))
        for j in _numbers(tensors, r"mid_block\.attentions\.(\d+)\..*")
    ]
    fields = {
        "_class_name": "AudioLDM2UNet2DConditionModel",
        "sample_size": latent_frames,
        "in_channels": tensors["conv_in.weight"].shape[1],
        "out_channels": _rows(tensors, "conv_out.weight"),
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        "layers_per_block": len(_numbers(tensors, r"down_blocks\.0\.resnets\.(\d+)\..*")),
        "transformer_layers_per_block": len(
            _numbers(tensors, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\..*")
        ),
        "cross_attention_dim": [contexts for _ in levels],
        "attention_head_dim": _heads(channels, given),
        "norm_num_groups": GROUPS,
    }
    if "class_embedding.weight" in tensors:
        fields |= {
            "class_embed_type": "simple_projection",
            "class_embeddings_concat": True,
            "projection_class_embeddings_input_dim": tensors["class_embedding.weight"].shape[1],
        }
    _compare(given, {
        "in_channels": fields["in_channels"],
        "out_channels": fields["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": fields["layers_per_block"],
        "transformer_depth": fields["transformer_layers_per_block"],
        "context_dim": contexts[1:],
        "extra_film_condition_dim": fields.get("projection_class_embeddings_input_dim"),
    })
    return fields


def _context_dim(
    tensors: Tensors, transformer: int, levels: list[int], channels: list[int], given: list[int | None] | None
) -> int | None:
    """Width of the context that the transformer of this place in its layer attends to, None for self-attention."""
    widths = {
        level: tensors[f"down_blocks.{level}.attentions.{transformer}.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        for level in levels
    }
    itself = all(width == channels[level] for level, width in widths.items())
    if itself and len(levels) == 1 and 0 < transformer <= len(given or ()):      # a context could be as wide
        return given[transformer - 1]
    return None if itself else widths[levels[0]]


def _heads(channels: list[int], given: Mapping[str, Any]) -> list[int]:
    """Number of heads at each level: of equal width, or equally many where the configuration says so."""
    name = "num_heads" if given.get("num_head_channels", HEAD_CHANNELS) == -1 else "num_head_channels"
    number = given.get(name, HEAD_CHANNELS)
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"config: {name} must be a positive integer, got {short(number)}")
    return [number if name == "num_heads" else max(count // number, 1) for count in channels]


def latent_frames(vae_tensors: Tensors) -> int:
    """Length in latent positions of what the models were trained on."""
    levels = len(_numbers(vae_tensors, r"encoder\.down_blocks\.(\d+)\..*"))
    return MEL_FRAMES // 2 ** max(levels - 1, 0)


def vae(tensors: Tensors, scale_factor: float) -> Fields:
    """vae/config.json from tensors under the hub's names."""
    levels = _numbers(tensors, r"encoder\.down_blocks\.(\d+)\..*")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": _rows(tensors, "decoder.conv_out.weight"),
        "latent_channels": tensors["post_quant_conv.weight"].shape[1],
        "block_out_channels": [
            _rows(tensors, f"encoder.down_blocks.{level}.resnets.0.conv1.weight") for level in levels
        ],
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "layers_per_block": len(_numbers(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\..*")),
        "norm_num_groups": GROUPS,
        "sample_size": MEL_FRAMES,
        "scaling_factor": scale_factor,
    }


def vocoder(tensors: Tensors, config: Mapping[str, Any], source: str) -> Fields:
    """vocoder/config.json from tensors under the hub's names. Raises ValueError for an unknown kind of vocoder."""
    given = section(config, "vocoder_config")
    kernels = tuple(tensors[f"upsampler.{i}.weight"].shape[2] for i in _numbers(tensors, r"upsampler\.(\d+)\..*"))
    blocks = len(_numbers(tensors, r"resblocks\.(\d+)\..*")) // len(kernels)
    rates, sample_rate = VOCODERS.get(kernels, (None, None))
    rates, sample_rate = given.get("upsample_rates", rates), given.get("sampling_rate", sample_rate)
    if rates is None or sample_rate is None:
        raise ValueError(
            f"{source}: unknown vocoder with kernels {list(kernels)}: pass the authors' configuration (config=), with "
            "upsample_rates and sampling_rate in vocoder_config"
        )
    fields = {
        "architectures": ["SpeechT5HifiGan"],
        "model_type": "hifigan",
        "model_in_dim": tensors["conv_pre.weight"].shape[1],
        "sampling_rate": sample_rate,
        "upsample_initial_channel": _rows(tensors, "conv_pre.weight"),
        "upsample_rates": list(rates),
        "upsample_kernel_sizes": list(kernels),
        "resblock_kernel_sizes": [tensors[f"resblocks.{i}.convs1.0.weight"].shape[2] for i in range(blocks)],
        "resblock_dilation_sizes": given.get("resblock_dilation_sizes", [list(DILATIONS)] * blocks),
        "leaky_relu_slope": 0.1,
        "normalize_before": False,
    }
    _compare(given, {
        "num_mels": fields["model_in_dim"],
        "upsample_initial_channel": fields["upsample_initial_channel"],
        "upsample_kernel_sizes": fields["upsample_kernel_sizes"],
        "resblock_kernel_sizes": fields["resblock_kernel_sizes"],
    })
    return fields


def scheduler(config: Mapping[str, Any], betas: Tensor | None, source: str) -> Fields:
    """scheduler_config.json. Raises ValueError if the file's own `betas` are of another schedule."""
    given = section(config, "model", "params")
    fields = dict(SCHEDULER)
    fields["beta_start"] = given.get("linear_start", fields["beta_start"])
    fields["beta_end"] = given.get("linear_end", fields["beta_end"])
    fields["num_train_timesteps"] = given.get("timesteps", fields["num_train_timesteps"])
    parameterization = given.get("parameterization", "eps")
    if parameterization not in _PREDICTIONS:
        raise ValueError(f"config: parameterization must be eps or v, got {short(parameterization)}")
    fields["prediction_type"] = _PREDICTIONS[parameterization]
    expected = torch.from_numpy(Schedule.from_dict(fields, source="config").betas)
    if betas is not None and (betas.shape != expected.shape or not torch.allclose(betas.double(), expected, rtol=1e-4)):
        asked = f"{fields['beta_start']} to {fields['beta_end']} in {fields['num_train_timesteps']} steps"
        raise ValueError(
            f"{source}: its {len(betas)} betas from {float(betas[0]):.4g} to {float(betas[-1]):.4g} are not those of a "
            f"schedule from {asked}"
        )
    return fields


def clap(tensors: Tensors) -> Fields:
    """config.json of a ClapModel with RoBERTa and HTSAT, from tensors under its names."""
    embeddings = "text_model.embeddings"
    width = tensors[f"{embeddings}.word_embeddings.weight"].shape[1]
    audio = "audio_model.audio_encoder"
    stages = _numbers(tensors, rf"{re.escape(audio)}\.layers\.(\d+)\..*")
    tables = [tensors[f"{audio}.layers.{i}.blocks.0.attention.self.relative_position_bias_table"] for i in stages]
    projection = _rows(tensors, "text_projection.linear2.weight")
    patch = tensors[f"{audio}.patch_embed.proj.weight"]
    return {
        "architectures": ["ClapModel"],
        "model_type": "clap",
        "projection_dim": projection,
        "text_config": {
            "model_type": "clap_text_model",
            "vocab_size": _rows(tensors, f"{embeddings}.word_embeddings.weight"),
            "hidden_size": width,
            "num_hidden_layers": len(_numbers(tensors, r"text_model\.encoder\.layer\.(\d+)\..*")),
            "num_attention_heads": max(width // TEXT_HEAD_CHANNELS, 1),
            "intermediate_size": _rows(tensors, "text_model.encoder.layer.0.intermediate.dense.weight"),
            "max_position_embeddings": _rows(tensors, f"{embeddings}.position_embeddings.weight"),
            "type_vocab_size": _rows(tensors, f"{embeddings}.token_type_embeddings.weight"),
            "layer_norm_eps": 1e-5,                        # as in roberta-base; ClapTextConfig would take 1e-12
            "projection_dim": projection,
            "pad_token_id": 1,
        },
        "audio_config": {
            "model_type": "clap_audio_model",
            "patch_size": patch.shape[2],
            "patch_stride": list(patch.shape[2:]),
            "patch_embeds_hidden_size": patch.shape[0],
            "hidden_size": _rows(tensors, f"{audio}.norm.weight"),
            "depths": [len(_numbers(tensors, rf"{re.escape(audio)}\.layers\.{i}\.blocks\.(\d+)\..*")) for i in stages],
            "num_attention_heads": [table.shape[1] for table in tables],
            "num_hidden_layers": len(stages),
            "num_mel_bins": _rows(tensors, f"{audio}.batch_norm.weight"),
            "window_size": (round(tables[0].shape[0] ** 0.5) + 1) // 2,       # the table holds (2 w - 1)^2 offsets
            "projection_dim": projection,
        },
    }


def t5(tensors: Tensors) -> Fields:
    """config.json of a T5EncoderModel from tensors under its names."""
    block = "encoder.block.0.layer"
    buckets, heads = tensors[f"{block}.0.SelfAttention.relative_attention_bias.weight"].shape
    gated = f"{block}.1.DenseReluDense.wi_0.weight" in tensors
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": _rows(tensors, "shared.weight"),
        "d_model": tensors["shared.weight"].shape[1],
        "d_kv": _rows(tensors, f"{block}.0.SelfAttention.q.weight") // heads,
        "d_ff": _rows(tensors, f"{block}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"),
        "num_layers": len(_numbers(tensors, r"encoder\.block\.(\d+)\..*")),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def vits(tensors: Tensors) -> Fields:
    """config.json of a VitsModel of which only the text encoder matters, from tensors under VitsTextEncoder's names."""
    offsets, head_width = tensors["encoder.layers.0.attention.emb_rel_k"].shape[1:]
    symbols, width = tensors["embed_tokens.weight"].shape
    ffn, _, kernel = tensors["encoder.layers.0.feed_forward.conv_1.weight"].shape
    return {
        "architectures": ["VitsModel"],
        "model_type": "vits",
        "vocab_size": symbols,
        "hidden_size": width,
        "num_hidden_layers": len(_numbers(tensors, r"encoder\.layers\.(\d+)\..*")),
        "num_attention_heads": width // head_width,
        "window_size": offsets // 2,
        "ffn_dim": ffn,
        "ffn_kernel_size": kernel,
        "flow_size": _rows(tensors, "project.weight") // 2,
    }


def gpt2(tensors: Tensors, phoneme_places: int | None) -> Fields:
    """config.json of a GPT2Model from tensors under its names; phoneme_places is None without phonemes.

    A speech model whose GPT-2 has not enough positions for all vectors (none that is published) writes what fits.
    """
    positions, width = tensors["wpe.weight"].shape
    room = VECTORS if phoneme_places is None else positions - phoneme_places - 5
    return {
        "architectures": ["GPT2Model"],
        "model_type": "gpt2",
        "vocab_size": _rows(tensors, "wte.weight"),
        "n_positions": positions,
        "n_embd": width,
        "n_layer": len(_numbers(tensors, r"h\.(\d+)\..*")),
        "n_head": max(width // TEXT_HEAD_CHANNELS, 1),
        "max_new_tokens": min(room, SPEECH_VECTORS),
    }


def check_layers(parts: Mapping[str, Fields], source: str) -> None:
    """Raise ValueError if an encoder of a published width has another number of layers than is published.

    Layers are counted, so a file that lost its last ones would pass for a smaller model.
    """
    for part, fields in parts.items():
        for name, (found, known) in _layers(part, fields).items():
            if known is not None and found != known:
                raise ValueError(f"{source} is not complete: its {part} has {name} {found}, the published one {known}")


def _layers(part: str, fields: Fields) -> dict[str, tuple[Any, Any]]:
    """Numbers of layers by their names: (found, published with these widths, or None)."""
    if part == "text_encoder":
        text, audio = fields["text_config"], fields["audio_config"]
        return {
            "num_hidden_layers": (text["num_hidden_layers"], {768: 12, 1024: 24}.get(text["hidden_size"])),
            "depths": (audio["depths"], {
                96: [2, 2, 6, 2], 128: [2, 2, 12, 2], 256: [2, 2, 12, 2],
            }.get(audio["patch_embeds_hidden_size"])),
        }
    if part == "language_model":
        return {"n_layer": (fields["n_layer"], {768: 12, 1024: 24, 1280: 36, 1600: 48}.get(fields["n_embd"]))}
    if part == "text_encoder_2" and fields["model_type"] == "vits":
        return {"num_hidden_layers": (fields["num_hidden_layers"], {192: 6}.get(fields["hidden_size"]))}
    if part == "text_encoder_2":
        known = {(512, 1024): 8, (512, 2048): 6, (768, 2048): 12, (768, 3072): 12, (1024, 2816): 24, (1024, 4096): 24,
                 (2048, 5120): 24, (4096, 10240): 24}
        return {"num_layers": (fields["num_layers"], known.get((fields["d_model"], fields["d_ff"])))}
    return {}


def projection(tensors: Tensors) -> Fields:
    """projection_model/config.json from tensors under diffusers' names; {} for a table of positions alone."""
    if set(tensors) == {"learnable_positional_embedding"}:
        return {}
    fields = {
        "_class_name": "AudioLDM2ProjectionModel",
        "text_encoder_dim": tensors["projection.weight"].shape[1],
        "text_encoder_1_dim": tensors["projection_1.weight"].shape[1],
        "langauge_model_dim": _rows(tensors, "projection.weight"),
    }
    positions = tensors.get("learnable_positional_embedding")
    if positions is not None:
        fields |= {"use_learned_position_embedding": True, "max_seq_length": positions.shape[2]}
    return fields


def _compare(given: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise ValueError if the authors' configuration says anything else than the file holds."""
    for name, value in found.items():
        if name in given and json.dumps(given[name], default=str) != json.dumps(value):
            raise ValueError(f"the config says {name} {short(given[name])}, the file holds {json.dumps(value)}")


def _rows(tensors: Tensors, name: str) -> int:
    return tensors[name].shape[0]


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    """The numbers at this place in the names, each once, from the lowest."""
    return sorted({int(match[1]) for name in names if (match := re.fullmatch(pattern, name))})

"""Names in the authors' files -> names in the published hub folders, one table for each part.

The authors number the blocks of a U-Net through, in the order in which they run, and put each layer's residual block
and transformers into one list; the hub's names count levels and kinds apart. So the tables of UNet and VAE are made
for the number of levels of the file at hand; the others are constants.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ldm2 import weights
from ldm2.weights import Table

# What no model needs at inference: tables that are computed, and modules that only training runs.
DROPPED = (
    r"model_ema\..*",                                # moving average of the UNet; the authors run the raw weights
    r"first_stage_model\.loss\..*",                  # perceptual loss, discriminator and logvar of the VAE's training
    r"ddim_(?:sigmas|alphas|alphas_prev|sqrt_one_minus_alphas|sigmas_for_original_num_steps)",
    r"(?:sqrt_|log_)?(?:one_minus_|recip_|recipm1_)?alphas_cumprod(?:_prev)?",
    r"betas|logvar|posterior_(?:variance|log_variance_clipped|mean_coef[12])",
    r"(?:.*\.)?mel_transform\..*",                   # front end of CLAP's audio branch
    r"cond_stage_models\.\d+\.(?:cond_stage_models\.\d+\.)?audiomae\..*",  # teacher of GPT-2
)

_RESNET: Table = {
    r"(.*\.resnets\.\d+)\.in_layers\.0\.(.*)": r"\1.norm1.\2",
    r"(.*\.resnets\.\d+)\.in_layers\.2\.(.*)": r"\1.conv1.\2",
    r"(.*\.resnets\.\d+)\.emb_layers\.1\.(.*)": r"\1.time_emb_proj.\2",
    r"(.*\.resnets\.\d+)\.out_layers\.0\.(.*)": r"\1.norm2.\2",
    r"(.*\.resnets\.\d+)\.out_layers\.3\.(.*)": r"\1.conv2.\2",
    r"(.*\.resnets\.\d+)\.skip_connection\.(.*)": r"\1.conv_shortcut.\2",
}

_VAE_INSIDE: Table = {
    r"(.*\.resnets\.\d+)\.nin_shortcut\.(.*)": r"\1.conv_shortcut.\2",
    r"(.*\.attentions\.0)\.norm\.(.*)": r"\1.group_norm.\2",
    r"(.*\.attentions\.0)\.([qkv])\.(.*)": r"\1.to_\2.\3",
    r"(.*\.attentions\.0)\.proj_out\.(.*)": r"\1.to_out.0.\2",
}

VOCODER: Table = {
    r"ups\.(\d+)\.(.*)": r"upsampler.\1.\2",
    r"((?:conv_pre|conv_post|resblocks)\..*)": r"\1",
}

_SWIN = r"audio_branch\.(layers\.\d+\.blocks\.\d+)"
_HTSAT = r"audio_model.audio_encoder"
CLAP: Table = {
    r".*\.(?:position_ids|token_type_ids|attn_mask)": None,
    r"audio_branch\.(?:spectrogram_extractor|logmel_extractor|tscam_conv|head)\..*": None,
    r"(?:text|audio)_transform\..*": None,                               # heads for other losses of CLAP's training
    r"logit_scale_([at])": r"logit_scale_\1",
    r"text_branch\.(.*)": r"text_model.\1",
    r"(text|audio)_projection\.0\.(.*)": r"\1_projection.linear1.\2",
    r"(text|audio)_projection\.2\.(.*)": r"\1_projection.linear2.\2",
    r"audio_branch\.bn0\.(.*)": rf"{_HTSAT}.batch_norm.\1",
    rf"{_SWIN}\.norm1\.(.*)": rf"{_HTSAT}.\1.layernorm_before.\2",
    rf"{_SWIN}\.norm2\.(.*)": rf"{_HTSAT}.\1.layernorm_after.\2",
    rf"{_SWIN}\.attn\.(relative_position_(?:bias_table|index))": rf"{_HTSAT}.\1.attention.self.\2",
    rf"{_SWIN}\.attn\.qkv\.(.*)": rf"{_HTSAT}.\1.attention.self.qkv.\2",  # cut in three by `clap`
    rf"{_SWIN}\.attn\.proj\.(.*)": rf"{_HTSAT}.\1.attention.output.dense.\2",
    rf"{_SWIN}\.mlp\.fc1\.(.*)": rf"{_HTSAT}.\1.intermediate.dense.\2",
    rf"{_SWIN}\.mlp\.fc2\.(.*)": rf"{_HTSAT}.\1.output.dense.\2",
    r"audio_branch\.((?:patch_embed|norm|layers\.\d+\.downsample)\..*)": rf"{_HTSAT}.\1",
}

T5: Table = {
    r"encoder\.embed_tokens\.weight": None,                              # the same table as `shared`
    r"((?:shared|encoder)\..*)": r"\1",
}

GPT2: Table = {
    r"h\.\d+\.attn\.(?:masked_)?bias": None,                             # causal mask
    r"((?:wte|wpe|h|ln_f)\..*)": r"\1",
}

PHONEMES: Table = {
    r"emb\.(.*)": r"embed_tokens.\1",
    r"encoder\.attn_layers\.(\d+)\.conv_([qkv])\.(.*)": r"encoder.layers.\1.attention.\2_proj.\3",
    r"encoder\.attn_layers\.(\d+)\.conv_o\.(.*)": r"encoder.layers.\1.attention.out_proj.\2",
    r"encoder\.attn_layers\.(\d+)\.(emb_rel_[kv])": r"encoder.layers.\1.attention.\2",
    r"encoder\.norm_layers_1\.(\d+)\.gamma": r"encoder.layers.\1.layer_norm.weight",
    r"encoder\.norm_layers_1\.(\d+)\.beta": r"encoder.layers.\1.layer_norm.bias",
    r"encoder\.norm_layers_2\.(\d+)\.gamma": r"encoder.layers.\1.final_layer_norm.weight",
    r"encoder\.norm_layers_2\.(\d+)\.beta": r"encoder.layers.\1.final_layer_norm.bias",
    r"encoder\.ffn_layers\.(\d+)\.(.*)": r"encoder.layers.\1.feed_forward.\2",
    r"proj\.(.*)": r"project.\1",
}


def unet(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors of `model.diffusion_model.` under the hub's names."""
    return weights.rename(weights.rename(tensors, _unet_places(tensors, source), source=source), _RESNET,
                          source=source, keep_others=True)


def _unet_places(names: Iterable[str], source: str) -> Table:
    """Where the blocks of the authors' lists stand in the hub's levels."""
    downs = [int(match[1]) for name in names if (match := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", name))]
    if not downs:
        raise ValueError(f"{source}: the UNet has no step down (input_blocks.N.0.op)")
    per_level = min(downs)                                  # of both lists; in the first, with the step down
    transformers = _count(names, r"middle_block\.(\d+)\..*") - 2
    places = {
        r"time_embed\.0\.(.*)": r"time_embedding.linear_1.\1",
        r"time_embed\.2\.(.*)": r"time_embedding.linear_2.\1",
        r"film_emb\.(.*)": r"class_embedding.\1",
        r"input_blocks\.0\.0\.(.*)": r"conv_in.\1",
        r"middle_block\.0\.(.*)": r"mid_block.resnets.0.\1",
        rf"middle_block\.{transformers + 1}\.(.*)": r"mid_block.resnets.1.\1",
        r"out\.0\.(.*)": r"conv_norm_out.\1",
        r"out\.2\.(.*)": r"conv_out.\1",
    }
    for j in range(transformers):
        places[rf"middle_block\.{j + 1}\.(.*)"] = rf"mid_block.attentions.{j}.\1"
    for i in range(_count(names, r"input_blocks\.(\d+)\..*") - 1):
        level, layer = divmod(i, per_level)
        places[rf"input_blocks\.{i + 1}\.0\.op\.(.*)"] = rf"down_blocks.{level}.downsamplers.0.conv.\1"
        places |= _layer(rf"input_blocks\.{i + 1}", f"down_blocks.{level}", layer, transformers)
    for i in range(_count(names, r"output_blocks\.(\d+)\..*")):
        level, layer = divmod(i, per_level)
        places[rf"output_blocks\.{i}\.\d+\.conv\.(.*)"] = rf"up_blocks.{level}.upsamplers.0.conv.\1"
        places |= _layer(rf"output_blocks\.{i}", f"up_blocks.{level}", layer, transformers)
    return places


def _layer(block: str, level: str, layer: int, transformers: int) -> Table:
    """One residual block and the transformers after it."""
    rows = {rf"{block}\.0\.(.*)": rf"{level}.resnets.{layer}.\1"}
    for j in range(transformers):
        rows[rf"{block}\.{j + 1}\.(.*)"] = rf"{level}.attentions.{layer * transformers + j}.\1"
    return rows


def vae(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors of `first_stage_model.` under the hub's names; 1x1 convolutions of the attentions become matrices."""
    levels = _count(tensors, r"encoder\.down\.(\d+)\..*")
    places = {
        r"((?:quant_conv|post_quant_conv|(?:encoder|decoder)\.conv_(?:in|out))\..*)": r"\1",
        r"(encoder|decoder)\.norm_out\.(.*)": r"\1.conv_norm_out.\2",
        r"(encoder|decoder)\.mid\.block_1\.(.*)": r"\1.mid_block.resnets.0.\2",
        r"(encoder|decoder)\.mid\.block_2\.(.*)": r"\1.mid_block.resnets.1.\2",
        r"(encoder|decoder)\.mid\.attn_1\.(.*)": r"\1.mid_block.attentions.0.\2",
        r"encoder\.down\.(\d+)\.block\.(\d+)\.(.*)": r"encoder.down_blocks.\1.resnets.\2.\3",
        r"encoder\.down\.(\d+)\.downsample\.(.*)": r"encoder.down_blocks.\1.downsamplers.0.\2",
    }
    for level in range(levels):                             # the authors count them from full resolution here too
        block = f"decoder.up_blocks.{levels - 1 - level}"
        places[rf"decoder\.up\.{level}\.block\.(\d+)\.(.*)"] = rf"{block}.resnets.\1.\2"
        places[rf"decoder\.up\.{level}\.upsample\.(.*)"] = rf"{block}.upsamplers.0.\1"
    placed = weights.rename(tensors, places, source=source)
    renamed = weights.rename(placed, _VAE_INSIDE, source=source, keep_others=True)
    return {name: _matrix(tensor) if ".attentions.0.to_" in name else tensor for name, tensor in renamed.items()}


def vocoder(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors of `first_stage_model.vocoder.` under the hub's names, with the statistics that change nothing."""
    renamed = weights.rename(tensors, VOCODER, source=source)
    like = renamed.get("conv_pre.weight")
    if like is None:
        raise ValueError(f"{source}: the vocoder has no conv_pre")
    return renamed | {"mean": like.new_zeros(like.shape[1]), "scale": like.new_ones(like.shape[1])}


def clap(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors of a CLAP (`text_branch.`, `audio_branch.`, ...) under the names of ClapModel."""
    renamed = {}
    for name, tensor in weights.rename(tensors, CLAP, source=source).items():
        if ".attention.self.qkv." in name:
            for kind, third in zip(("query", "key", "value"), tensor.chunk(3)):
                renamed[name.replace("qkv", kind)] = third
        else:
            renamed[name] = tensor
    return renamed


def phonemes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors of the phoneme encoder (`emb.`, `encoder.`, ...) under the names of VitsTextEncoder."""
    renamed = weights.rename(tensors, PHONEMES, source=source)
    return {name: _matrix(tensor) if name.endswith("_proj.weight") else tensor for name, tensor in renamed.items()}


def projection(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Start and end tokens (32, D), of which two rows are used, and projections under diffusers' names."""
    table = {
        r"input_sequence_embed_linear\.0\.(.*)": r"projection.\1",
        r"input_sequence_embed_linear\.1\.(.*)": r"projection_1.\1",
        r"start_of_sequence_tokens\.weight": "sos_embed",
        r"end_of_sequence_tokens\.weight": "eos_embed",
        r"learnable_positional_embedding": "learnable_positional_embedding",
    }
    renamed = weights.rename(tensors, table, source=source)
    for name in ("sos_embed", "eos_embed"):
        if name in renamed:
            renamed[name], renamed[f"{name}_1"] = renamed[name][:2].unbind()
    return renamed


def _matrix(weight: Tensor) -> Tensor:
    """Weight of a convolution with kernel size 1 (A, B, 1, ...) -> (A, B); a bias stays as it is."""
    return weight.flatten(1) if weight.ndim > 1 else weight


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest number at this place, 0 if there is none."""
    return max((int(match[1]) + 1 for name in names if (match := re.fullmatch(pattern, name))), default=0)

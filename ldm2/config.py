"""What a checkpoint's own config.json files say about its UNet, VAE and vocoder.

Misleading names of the published files are changed here and nowhere else: `attention_head_dim` holds the number of
heads, `block_out_channels` are the channels of the levels, `model_in_dim` is the number of mel bins. Everything that
the published checkpoints share (activation, kernel sizes, ...) is not an option of ours, but a file that asks for
something else is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

from ldm2.fields import MOST_ENTRIES, Fields, boolean, layer_count, optional_integer, read_json

REFERENCES = ("authors", "diffusers")
AUDIOLDM1_FRAMES = 256                                     # latent frames (10.24 s) that each AudioLDM 1 was trained on
PUBLISHED_HEADS = 8                                        # the single number in each published UNet config

# Fields with the only value that any published checkpoint has; a file may leave them out.
_UNET_FIXED = {
    "_class_name": ("AudioLDM2UNet2DConditionModel", "UNet2DConditionModel"),
    "act_fn": ("silu", "swish"), "norm_eps": (1e-5,), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
    "downsample_padding": (1,), "flip_sin_to_cos": (True,), "freq_shift": (0,), "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",), "mid_block_scale_factor": (1,), "dropout": (0,),
    "use_linear_projection": (False,), "dual_cross_attention": (False,), "upcast_attention": (False, None),
    "attention_type": ("default",), "resnet_time_scale_shift": ("default",), "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,), "time_embedding_type": ("positional",), "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,), "timestep_post_act": (None,), "time_cond_proj_dim": (None,),
    "num_class_embeds": (None,), "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,), "addition_embed_type": (None,), "cross_attention_norm": (None,),
    "reverse_transformer_layers_per_block": (None,), "mid_block_only_cross_attention": (None, False),
}
_VAE_FIXED = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"), "mid_block_add_attention": (True,), "use_quant_conv": (True,),
    "use_post_quant_conv": (True,), "shift_factor": (None,), "latents_mean": (None,), "latents_std": (None,),
}
_VOCODER_FIXED = {"model_type": ("hifigan", "speecht5_hifigan"), "architectures": (["SpeechT5HifiGan"], None)}


def check_reference(reference: str) -> None:
    """Raises ValueError for what is none of REFERENCES."""
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, got {reference!r}")


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the denoiser. Tuples named `..., per level` start at the level of full resolution."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]                              # per level
    down_attention: tuple[bool, ...]                       # per level: does the down block hold transformers?
    up_attention: tuple[bool, ...]                         # per level: does the up block?
    resnets: tuple[int, ...]                               # per level, of the down block; the up block has one more
    transformer_depth: tuple[int, ...]                     # per level: layers in each transformer
    context_dims: tuple[tuple[int | None, ...], ...]       # per level: one transformer an entry, None = self-attention
    num_heads: tuple[int | None, ...]                      # per level; may be None where nothing attends
    norm_groups: int
    film_dim: int | None                                   # width of the FiLM condition, None = the UNet has none
    sample_size: int | None                                # latent frames of the training's pieces, None = not told

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels[0]

    @property
    def context_widths(self) -> tuple[int, ...]:
        """Width of each context (sequence to attend to) that a conditioning must bring."""
        return context_widths(self.context_dims)

    @classmethod
    def from_json(cls, path: str | PathLike, reference: str = "authors") -> UNetConfig:
        """Reads unet/config.json; `reference` as in `from_dict`. Raises ValueError naming file and field."""
        return cls.from_dict(read_json(path), source=str(path), reference=reference)

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: str = "UNet config", reference: str = "authors") -> UNetConfig:
        """Reads the fields of a unet/config.json.

        A single number of heads means, with reference="diffusers", that number at each level. With "authors" it means
        heads of 32 channels, as trained; levels whose channels 32 does not divide keep the number. A list of heads is
        taken as it stands, and so is `num_attention_heads`, which goes before. Raises ValueError naming `source` and
        the field.
        """
        check_reference(reference)
        read = Fields(fields, source)
        read.check_fixed(_UNET_FIXED)
        channels = read.integers("block_out_channels")
        levels = len(channels)
        groups = read.integer("norm_num_groups")
        read.check_groups("block_out_channels", channels, groups)
        down = read.block_types("down_block_types", levels, plain="DownBlock2D", attention="CrossAttnDownBlock2D")
        up = read.block_types("up_block_types", levels, plain="UpBlock2D", attention="CrossAttnUpBlock2D")[::-1]
        used = tuple(d or u for d, u in zip(down, up, strict=True))
        used = (*used[:-1], True)                          # the middle block attends with the last level's sizes
        if any(read.per_level("only_cross_attention", levels, boolean, default=False)):
            raise read.error("only_cross_attention", "must be false", read.get("only_cross_attention"))
        return cls(
            in_channels=read.integer("in_channels"),
            out_channels=read.integer("out_channels"),
            channels=channels,
            down_attention=down,
            up_attention=up,
            resnets=read.per_level("layers_per_block", levels, layer_count),
            transformer_depth=read.per_level("transformer_layers_per_block", levels, layer_count, default=1),
            context_dims=_context_dims(read, channels, used),
            num_heads=_num_heads(read, channels, used, reference),
            norm_groups=groups,
            film_dim=_film_dim(read),
            sample_size=_trained_frames(read),
        )


def context_index(transformer: int) -> int:
    """Which context the transformer of this place in its layer attends to, in both published implementations."""
    return max(transformer - 1, 0)


def context_widths(context_dims: tuple[tuple[int | None, ...], ...]) -> tuple[int, ...]:
    """Width of each context that a UNet with these transformers attends to.

    Raises ValueError if two levels disagree, or if a context is left out.
    """
    widths: dict[int, int] = {}
    for level in context_dims:
        for i, width in enumerate(level):
            if width is not None and widths.setdefault(context_index(i), width) != width:
                raise ValueError(f"context {context_index(i)} is {widths[context_index(i)]} and {width} wide")
    if sorted(widths) != list(range(len(widths))):
        raise ValueError(f"no transformer attends to context {next(i for i in range(len(widths)) if i not in widths)}")
    return tuple(widths[i] for i in range(len(widths)))


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder between log-mel and latents. `channels` start at full resolution."""

    in_channels: int
    out_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    resnets: int                                           # per level of the encoder; the decoder has one more
    norm_groups: int
    scaling_factor: float                                  # scaled latents = scaling_factor * VAE latents

    @property
    def downsampling(self) -> int:
        """Mel frames (and mel bins) per latent position."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def from_json(cls, path: str | PathLike) -> VAEConfig:
        """Reads vae/config.json. Raises ValueError naming file and field."""
        return cls.from_dict(read_json(path), source=str(path))

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: str = "VAE config") -> VAEConfig:
        """Reads the fields of a vae/config.json. Raises ValueError naming `source` and the field."""
        read = Fields(fields, source)
        read.check_fixed(_VAE_FIXED)
        channels = read.integers("block_out_channels")
        groups = read.integer("norm_num_groups")
        read.check_groups("block_out_channels", channels, groups)
        read.block_types("down_block_types", len(channels), plain="DownEncoderBlock2D")
        read.block_types("up_block_types", len(channels), plain="UpDecoderBlock2D")
        return cls(
            in_channels=read.integer("in_channels"),
            out_channels=read.integer("out_channels"),
            latent_channels=read.integer("latent_channels"),
            channels=channels,
            resnets=read.layers("layers_per_block"),
            norm_groups=groups,
            scaling_factor=read.positive_number("scaling_factor"),
        )


@dataclass(frozen=True)
class VocoderConfig:
    """Sizes of the HiFi-GAN generator. One upsampling stage an entry of `upsample_rates`."""

    num_mels: int
    sample_rate: int                                       # Hz
    channels: int                                          # before the first stage; halved by each stage
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    resblock_kernel_sizes: tuple[int, ...]                 # one residual block per stage and entry
    resblock_dilations: tuple[tuple[int, ...], ...]
    leaky_relu_slope: float
    normalize_before: bool                                 # is the mel standardised with the file's mean and scale?

    @property
    def hop_length(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.upsample_rates)

    @classmethod
    def from_json(cls, path: str | PathLike) -> VocoderConfig:
        """Reads vocoder/config.json. Raises ValueError naming file and field."""
        return cls.from_dict(read_json(path), source=str(path))

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: str = "vocoder config") -> VocoderConfig:
        """Reads the fields of a vocoder/config.json. Raises ValueError naming `source` and the field."""
        read = Fields(fields, source)
        read.check_fixed(_VOCODER_FIXED)
        rates = read.integers("upsample_rates")
        channels = read.integer("upsample_initial_channel")
        if channels % 2 ** len(rates):
            raise read.error("upsample_initial_channel", f"must divide by 2 ** {len(rates)} stages", channels)
        kernels = read.integers("upsample_kernel_sizes", length=len(rates))
        if any(kernel < rate for kernel, rate in zip(kernels, rates, strict=True)):
            raise read.error("upsample_kernel_sizes", f"must not be smaller than upsample_rates {list(rates)}", kernels)
        blocks = read.integers("resblock_kernel_sizes")
        if any(kernel % 2 == 0 for kernel in blocks):
            raise read.error("resblock_kernel_sizes", "must be odd", blocks)
        return cls(
            num_mels=read.integer("model_in_dim"),
            sample_rate=read.integer("sampling_rate"),
            channels=channels,
            upsample_rates=rates,
            upsample_kernel_sizes=kernels,
            resblock_kernel_sizes=blocks,
            resblock_dilations=read.integer_lists("resblock_dilation_sizes", length=len(blocks)),
            leaky_relu_slope=read.positive_number("leaky_relu_slope", default=0.1),
            normalize_before=read.boolean("normalize_before"),
        )


def _is_audioldm1(read: Fields) -> bool:
    """Whether a file is of the plain UNet2DConditionModel, as those of AudioLDM 1 are."""
    return read.get("_class_name", None) == "UNet2DConditionModel"


def _trained_frames(read: Fields) -> int | None:
    """Latent frames of the training's pieces.

    The published files of AudioLDM 1 say 128, half of what the authors' configurations (latent_t_size) trained on: the
    number there is only the default length of diffusers.
    """
    listed = read.first_integer("sample_size")
    return max(listed or 0, AUDIOLDM1_FRAMES) if _is_audioldm1(read) else listed


def _context_dims(
    read: Fields, channels: tuple[int, ...], used: tuple[bool, ...]
) -> tuple[tuple[int | None, ...], ...]:
    """The transformers of each level, () where nothing attends.

    In files of the plain UNet2DConditionModel (AudioLDM 1) no context exists: the second attention of a transformer
    attends to the same input as the first, which the files say by a width equal to the level's channels.
    """
    name = "cross_attention_dim"
    listed = read.per_level(name, len(channels), _optional_widths)
    plain = _is_audioldm1(read)
    levels: list[tuple[int | None, ...]] = []
    for level, (widths, width, attends) in enumerate(zip(listed, channels, used, strict=True)):
        if not attends:
            levels.append(())
        elif not widths:
            raise read.error(name, f"must list at least one transformer for level {level}", read.get(name))
        elif plain and widths != (width,):
            raise read.error(name, f"must be the {width} channels of level {level} in a UNet2DConditionModel", widths)
        else:
            levels.append((None,) if plain else widths)
    try:
        context_widths(tuple(levels))
    except ValueError as error:
        raise read.error(name, f"is impossible ({error})", read.get(name)) from None
    return tuple(levels)


def _num_heads(
    read: Fields, channels: tuple[int, ...], used: tuple[bool, ...], reference: str
) -> tuple[int | None, ...]:
    named = read.get("num_attention_heads", None) is not None                # a name that says what it holds
    name = "num_attention_heads" if named else "attention_head_dim"
    value = read.get(name)
    heads = read.per_level(name, len(channels), optional_integer)
    if isinstance(value, int) and reference == "authors" and not named:
        if value != PUBLISHED_HEADS:
            rule = f"must list the heads of each level, or be {PUBLISHED_HEADS} as in the published files"
            raise read.error(name, f"{rule} (reference=\"diffusers\" takes any number as it stands)", value)
        heads = tuple(h if width % 32 else width // 32 for width, h in zip(channels, heads, strict=True))
    for width, number, attends in zip(channels, heads, used, strict=True):
        if attends and (number is None or width % number):
            raise read.error(name, f"must be a number of heads that divides {width} channels", value)
    return heads


def _film_dim(read: Fields) -> int | None:
    kind = read.get("class_embed_type", None)
    if kind is None:
        return None
    if kind != "simple_projection":
        raise read.error("class_embed_type", "must be null or 'simple_projection'", kind)
    concat = read.get("class_embeddings_concat", False)
    if concat is not True:
        raise read.error("class_embeddings_concat", "must be true where class_embed_type is given", concat)
    return read.integer("projection_class_embeddings_input_dim")


def _optional_widths(value: Any) -> tuple[int | None, ...]:
    """One level of cross_attention_dim: a width, or one entry per transformer; null for a level without any."""
    if value is None:
        return ()
    entries = value if isinstance(value, (list, tuple)) else [value]
    if len(entries) > MOST_ENTRIES:
        raise ValueError(f"must have at most {MOST_ENTRIES} entries a level")
    return tuple(optional_integer(entry) for entry in entries)

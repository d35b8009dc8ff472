"""Configs: the published forms are read, everything else is an error that names file and field."""

import json

import pytest

from ldm2.config import UNetConfig, VAEConfig, VocoderConfig

UNET = {
    "_class_name": "AudioLDM2UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [128, 256, 384, 640],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "cross_attention_dim": [[None, 768, 1024]] * 4,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 8,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "only_cross_attention": False,
    "out_channels": 8,
    "projection_class_embeddings_input_dim": None,
    "sample_size": 256,
    "transformer_layers_per_block": 1,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "use_linear_projection": False,
}
FILM = {
    "class_embed_type": "simple_projection",
    "class_embeddings_concat": True,
    "projection_class_embeddings_input_dim": 512,
}
AUDIOLDM_1 = FILM | {"_class_name": "UNet2DConditionModel", "cross_attention_dim": [128, 256, 384, 640]}
VAE = {
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 1,
    "latent_channels": 8,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 1,
    "scaling_factor": 0.4110932946205139,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
VOCODER = {
    "model_in_dim": 64,
    "normalize_before": False,
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "resblock_kernel_sizes": [3, 7, 11],
    "sampling_rate": 16000,
    "upsample_initial_channel": 1024,
    "upsample_kernel_sizes": [16, 16, 8, 4, 4],
    "upsample_rates": [5, 4, 2, 2, 2],
}


def without(fields, name):
    return {key: value for key, value in fields.items() if key != name}


# UNet


def test_the_published_unet_config_is_read():
    config = UNetConfig.from_dict(UNET)
    assert config.channels == (128, 256, 384, 640)
    assert config.down_attention == config.up_attention == (False, True, True, True)
    assert config.resnets == (2, 2, 2, 2)
    assert config.transformer_depth == (1, 1, 1, 1)
    assert config.context_dims == ((), (None, 768, 1024), (None, 768, 1024), (None, 768, 1024))
    assert config.context_widths == (768, 1024)
    assert config.film_dim is None
    assert config.time_dim == 512


def test_authors_heads_are_32_channels_wide_where_the_file_gives_one_number():
    assert UNetConfig.from_dict(UNET, reference="authors").num_heads == (4, 8, 12, 20)


def test_diffusers_heads_are_the_number_in_the_file_at_each_level():
    assert UNetConfig.from_dict(UNET, reference="diffusers").num_heads == (8, 8, 8, 8)


@pytest.mark.parametrize("reference", ["authors", "diffusers"])
def test_listed_heads_are_taken_as_listed(reference):
    config = UNetConfig.from_dict(UNET | {"attention_head_dim": [None, 4, 6, 10]}, reference=reference)
    assert config.num_heads == (None, 4, 6, 10)


def test_authors_heads_keep_the_number_where_32_does_not_divide_the_channels():
    config = UNetConfig.from_dict(UNET | {"block_out_channels": [32, 48, 64, 80], "norm_num_groups": 8})
    assert config.num_heads == (1, 8, 2, 8)


def test_an_unknown_reference_lists_the_known_ones():
    with pytest.raises(ValueError, match="authors, diffusers, got 'hub'"):
        UNetConfig.from_dict(UNET, reference="hub")


@pytest.mark.parametrize("value, expected", [
    (768, ((), (768,), (768,), (768,))),
    ([None, 768, 768, 768], ((), (768,), (768,), (768,))),
    ([[None, 768]] * 4, ((), (None, 768), (None, 768), (None, 768))),
    ([[None, 768, 1024, None]] * 4, ((),) + ((None, 768, 1024, None),) * 3),
    ([None] + [[None, None]] * 3, ((), (None, None), (None, None), (None, None))),
])
def test_cross_attention_dim_is_read_in_all_its_forms(value, expected):
    assert UNetConfig.from_dict(UNET | {"cross_attention_dim": value}).context_dims == expected


@pytest.mark.parametrize("value, expected", [
    (768, (768,)),
    ([[None, 768, 1024, None]] * 4, (768, 1024)),
    ([[None, 768, 1024, 320]] * 4, (768, 1024, 320)),
    ([[None, None]] * 4, ()),
])
def test_context_widths_follow_the_place_of_the_transformer(value, expected):
    assert UNetConfig.from_dict(UNET | {"cross_attention_dim": value}).context_widths == expected


def test_audioldm_1_attends_to_itself_and_is_conditioned_by_film():
    config = UNetConfig.from_dict(without(UNET, "transformer_layers_per_block") | AUDIOLDM_1)
    assert config.context_dims == ((), (None,), (None,), (None,))
    assert config.context_widths == ()
    assert config.film_dim == 512


def test_depth_and_layers_may_differ_between_levels():
    changes = {"layers_per_block": [1, 2, 2, 3], "transformer_layers_per_block": [1, 1, 2, 2]}
    config = UNetConfig.from_dict(UNET | changes)
    assert config.resnets == (1, 2, 2, 3)
    assert config.transformer_depth == (1, 1, 2, 2)


@pytest.mark.parametrize("name", [
    "in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types", "layers_per_block",
    "norm_num_groups", "attention_head_dim", "cross_attention_dim",
])
def test_a_missing_unet_field_is_named(name):
    with pytest.raises(ValueError, match=f"unet/config.json: missing field '{name}'"):
        UNetConfig.from_dict(without(UNET, name), source="unet/config.json")


@pytest.mark.parametrize("name, value, rule", [
    ("in_channels", 0, "positive integer"),
    ("in_channels", -8, "positive integer"),
    ("in_channels", True, "positive integer"),
    ("in_channels", "8", "positive integer"),
    ("in_channels", 8.0, "positive integer"),
    ("in_channels", None, "positive integer"),
    ("block_out_channels", [], "non-empty list"),
    ("block_out_channels", 128, "non-empty list"),
    ("block_out_channels", [128, 256, 384, 641], "multiples of norm_num_groups = 32"),
    ("block_out_channels", [128, 256, 384, "640"], "positive integer"),
    ("down_block_types", ["DownBlock2D"] * 3, "must have 4 entries"),
    ("down_block_types", ["DownBlock2D"] * 3 + ["ResnetDownsampleBlock2D"], "DownBlock2D and CrossAttnDownBlock2D"),
    ("up_block_types", ["UpBlock2D"] * 3 + [7], "UpBlock2D and CrossAttnUpBlock2D"),
    ("layers_per_block", [2, 2], "must have 4 entries"),
    ("transformer_layers_per_block", 0, "positive integer"),
    ("attention_head_dim", [8, 8, 8], "must have 4 entries"),
    ("attention_head_dim", [8, 8, 8, None], "divides 640 channels"),
    ("attention_head_dim", [8, 8, 7, 8], "divides 384 channels"),
    ("attention_head_dim", "8", "positive integer"),
    ("cross_attention_dim", None, "at least one transformer for level 1"),
    ("cross_attention_dim", [768, 768], "must have 4 entries"),
    ("cross_attention_dim", [[None, -768]] * 4, "positive integer"),
    ("cross_attention_dim", [[None, 768, "1024"]] * 4, "positive integer"),
    ("cross_attention_dim", [[None, 768], [None, 768], [None, 512], [None, 768]], "context 0 is 768 and 512 wide"),
    ("cross_attention_dim", [[None, None, 1024]] * 4, "no transformer attends to context 0"),
    ("act_fn", "gelu", '"silu" or "swish"'),
    ("mid_block_type", None, "UNetMidBlock2DCrossAttn"),
    ("use_linear_projection", True, "must be false"),
    ("only_cross_attention", True, "must be false"),
    ("only_cross_attention", [False, True, False, False], "must be false"),
    ("norm_eps", 1e-6, "must be 1e-05"),
    ("class_embed_type", "timestep", "simple_projection"),
    ("sample_size", "256", "positive integer"),
    ("sample_size", [], "non-empty list"),
    ("num_attention_heads", 7, "number of heads that divides"),
])
def test_an_impossible_unet_field_is_named_with_the_rule(name, value, rule):
    with pytest.raises(ValueError, match=f"^unet/config.json: field '{name}' .*") as error:
        UNetConfig.from_dict(UNET | {name: value}, source="unet/config.json")
    assert rule in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("listed", [[256, 16], [256]])
def test_the_first_of_listed_sample_sizes_is_that_of_time(listed):
    assert UNetConfig.from_dict(UNET | {"sample_size": listed}).sample_size == 256


@pytest.mark.parametrize("reference", ["authors", "diffusers"])
@pytest.mark.parametrize("given, heads", [(8, (8, 8, 8, 8)), ([4, 8, 6, 10], (4, 8, 6, 10))])
def test_num_attention_heads_says_what_it_means(given, heads, reference):
    fields = UNET | {"num_attention_heads": given, "attention_head_dim": 3}
    assert UNetConfig.from_dict(fields, reference=reference).num_heads == heads


def test_film_without_concatenation_is_refused():
    with pytest.raises(ValueError, match="'class_embeddings_concat' must be true"):
        UNetConfig.from_dict(UNET | FILM | {"class_embeddings_concat": False})


def test_film_needs_its_width():
    with pytest.raises(ValueError, match="missing field 'projection_class_embeddings_input_dim'"):
        UNetConfig.from_dict(without(UNET | FILM, "projection_class_embeddings_input_dim"))


def test_audioldm_1_with_a_real_context_is_refused():
    with pytest.raises(ValueError, match=r"cross_attention_dim.* 256 channels of level 1.*768"):
        UNetConfig.from_dict(UNET | AUDIOLDM_1 | {"cross_attention_dim": 768})


def test_unknown_fields_do_not_matter():
    assert UNetConfig.from_dict(UNET | {"_name_or_path": "x"}) == UNetConfig.from_dict(UNET)


# VAE


def test_the_published_vae_config_is_read():
    config = VAEConfig.from_dict(VAE)
    assert (config.channels, config.latent_channels, config.resnets) == ((128, 256, 512), 8, 2)
    assert config.scaling_factor == 0.4110932946205139


@pytest.mark.parametrize("levels, factor", [(3, 4), (4, 8)])
def test_each_further_level_of_the_vae_halves_the_resolution(levels, factor):
    fields = VAE | {
        "block_out_channels": [128] * levels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    assert VAEConfig.from_dict(fields).downsampling == factor


@pytest.mark.parametrize("name", sorted(VAE))
def test_a_missing_vae_field_is_named(name):
    with pytest.raises(ValueError, match=f"missing field '{name}'"):
        VAEConfig.from_dict(without(VAE, name))


@pytest.mark.parametrize("name, value", [
    ("scaling_factor", 0.0), ("scaling_factor", float("nan")), ("scaling_factor", True), ("scaling_factor", "0.4"),
    ("norm_num_groups", 31), ("latent_channels", -1), ("down_block_types", ["AttnDownEncoderBlock2D"] * 3),
    ("up_block_types", ["UpDecoderBlock2D"]), ("block_out_channels", [128, 256]), ("mid_block_add_attention", False),
    ("layers_per_block", [2, 2, 2]),
])
def test_an_impossible_vae_field_is_named(name, value):
    with pytest.raises(ValueError, match=r"^vae/config\.json: field '"):
        VAEConfig.from_dict(VAE | {name: value}, source="vae/config.json")


# Vocoder


def test_the_published_vocoder_config_is_read():
    config = VocoderConfig.from_dict(VOCODER)
    assert (config.num_mels, config.sample_rate, config.hop_length) == (64, 16000, 160)
    assert config.resblock_dilations == ((1, 3, 5),) * 3
    assert config.leaky_relu_slope == 0.1


@pytest.mark.parametrize("name", sorted(VOCODER))
def test_a_missing_vocoder_field_is_named(name):
    with pytest.raises(ValueError, match=f"missing field '{name}'"):
        VocoderConfig.from_dict(without(VOCODER, name))


@pytest.mark.parametrize("name, value, rule", [
    ("upsample_initial_channel", 1000, "must divide by 2 \\*\\* 5 stages"),
    ("upsample_kernel_sizes", [16, 16, 8, 4], "must have 5 entries"),
    ("upsample_kernel_sizes", [4, 16, 8, 4, 4], "must not be smaller than upsample_rates"),
    ("upsample_rates", [5, 4, 2, 2, 0], "positive integer"),
    ("resblock_kernel_sizes", [3, 7, 10], "must be odd"),
    ("resblock_kernel_sizes", [3, 7], "must have 2 entries"),
    ("resblock_dilation_sizes", [[1, 3, 5], [1, 3, 5], []], "list of non-empty lists"),
    ("resblock_dilation_sizes", [1, 3, 5], "list of non-empty lists"),
    ("normalize_before", 0, "true or false"),
    ("leaky_relu_slope", -0.1, "positive number"),
    ("sampling_rate", 16000.5, "positive integer"),
])
def test_an_impossible_vocoder_field_is_named_with_the_rule(name, value, rule):
    with pytest.raises(ValueError, match=f"^vocoder/config.json: field '.*{rule}"):
        VocoderConfig.from_dict(VOCODER | {name: value}, source="vocoder/config.json")


# Files


@pytest.mark.parametrize("kind, fields", [(UNetConfig, UNET), (VAEConfig, VAE), (VocoderConfig, VOCODER)])
def test_a_file_gives_the_same_as_its_fields(kind, fields, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    assert kind.from_json(path) == kind.from_dict(fields)


@pytest.mark.parametrize("kind", [UNetConfig, VAEConfig, VocoderConfig])
@pytest.mark.parametrize("content, rule", [
    (b"{", "not valid JSON"), (b"", "not valid JSON"), (b"\xff\xfe\x00", "not valid JSON"),
    (b"[1, 2]", "must hold a JSON object, got list"), (b"null", "must hold a JSON object, got NoneType"),
])
def test_a_file_that_holds_no_json_object_is_named(kind, content, rule, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rule) as error:
        kind.from_json(path)
    assert str(error.value).startswith(str(path))


def test_configs_cannot_be_changed():
    with pytest.raises(AttributeError):
        VAEConfig.from_dict(VAE).scaling_factor = 1.0

"""Configurations of the text encoders, and of transformers' modules where these are used."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

from ldm2.fields import Fields, layer_count, named, positive_integer

# Fields with the values that published checkpoints have, by config class; a file may leave them out.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "ClapConfig": {"model_type": ("clap",), "projection_hidden_act": ("relu",)},
    "RobertaConfig": {
        "hidden_act": ("gelu",), "projection_hidden_act": ("relu",), "position_embedding_type": ("absolute",),
        "layer_norm_eps": (1e-12, 1e-5), "is_decoder": (False,), "add_cross_attention": (False,),
    },
    "ClapAudioConfig": {
        "hidden_act": ("gelu",), "projection_hidden_act": ("relu",), "layer_norm_eps": (1e-5,), "qkv_bias": (True,),
        "enable_patch_layer_norm": (True,), "flatten_patch_embeds": (True,), "patch_embed_input_channels": (1,),
    },
    "T5Config": {
        "model_type": ("t5",), "feed_forward_proj": ("gated-gelu", "relu"), "dense_act_fn": ("gelu_new", "relu"),
        "layer_norm_epsilon": (1e-6,), "relative_attention_max_distance": (128,), "is_decoder": (False,),
    },
    "GPT2Config": {
        "model_type": ("gpt2",), "activation_function": ("gelu_new",), "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
        "reorder_and_upcast_attn": (False,),
    },
    "VitsConfig": {"model_type": ("vits",), "hidden_act": ("relu",), "layer_norm_eps": (1e-5,), "use_bias": (True,)},
}

# Number of heads and the width that it divides: libraries leave out what has its default, but only both at once.
HEADS = {
    "RobertaConfig": ("num_attention_heads", "hidden_size"), "GPT2Config": ("n_head", "n_embd"),
    "VitsConfig": ("num_attention_heads", "hidden_size"),
}

Config = TypeVar("Config")


def read_config(kind: type[Config], fields: Mapping[str, Any], source: str) -> Config:
    """A config (dataclass with defaults) from the fields of a config.json. Raises ValueError naming `source` and the
    field."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _check_sizes(kind.__name__, defaults, fields, source)
    given = {name: fields[name] for name in defaults if fields.get(name) is not None}
    pad = given.get("pad_token_id", 0)
    if isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < given.get("vocab_size", pad + 1):
        raise Fields(fields, source).error("pad_token_id", "must be the number of a token", pad)
    return kind(**given)


def transformers_config(kind: type[Config], fields: Mapping[str, Any], source: str) -> Config:
    """A transformers config from the fields of a config.json. Raises ValueError naming `source` and the field."""
    check_transformers(kind, fields, source)
    with named(source):
        return kind.from_dict(dict(fields))  # type: ignore[attr-defined]


def check_transformers(kind: type, fields: Mapping[str, Any], source: str) -> None:
    """Raise ValueError, naming the field, for a field that no config of a transformers class can have."""
    _check_sizes(kind.__name__, _defaults(kind), fields, source)


@functools.cache
def _defaults(kind: Any) -> dict[str, Any]:
    """The fields of a config class of transformers, which takes milliseconds to make."""
    return kind().to_dict()


def _check_sizes(kind: str, defaults: Mapping[str, Any], fields: Mapping[str, Any], source: str) -> None:
    """Raise ValueError unless each field that has a size as its default holds one, and the fixed ones their value.

    A network of -1 layers, or of a width of 10^9, would fail or fill the memory later.
    """
    read = Fields(fields, source)
    read.check_fixed(FIXED[kind])
    heads, width = HEADS.get(kind, (None, None))
    if heads is not None and heads not in fields and fields.get(width) not in (None, defaults[width]):
        raise ValueError(f"{source}: missing field '{heads}', which no shape tells")
    for name, default in defaults.items():
        value = fields.get(name)
        if value is None or name.endswith("_token_id"):
            continue
        check = layer_count if "layer" in name or name == "depths" else positive_integer
        if isinstance(default, list) and default and all(isinstance(each, int) for each in default):
            read.per_level(name, len(value) if isinstance(value, list) else 1, check)
        elif isinstance(default, int) and not isinstance(default, bool) and default > 0:
            read.parse(name, check)
        elif isinstance(default, (int, float)) and isinstance(value, (str, list, dict)):
            raise read.error(name, "must be a number", value)    # before 5.4 transformers takes anything
    if heads is not None and fields.get(width, defaults[width]) % fields.get(heads, defaults[heads]):
        raise read.error(heads, f"must divide the {width} {fields.get(width, defaults[width])}", fields.get(heads))

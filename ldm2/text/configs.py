"""Configurations of the text encoders, which come from transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import transformers
from huggingface_hub.errors import StrictDataclassError

Config = TypeVar("Config", bound=transformers.PreTrainedConfig)


def transformers_config(kind: type[Config], fields: Mapping[str, Any], source: str) -> Config:
    """A transformers config from the fields of a config.json. Raises ValueError naming `source`."""
    for name, default in kind().to_dict().items():         # before 5.4 transformers takes anything, and fails later
        if isinstance(default, (int, float)) and isinstance(fields.get(name), (str, list, dict)):
            raise ValueError(f"{source}: {name} must be a number, got {fields[name]!r}")
    try:
        return kind.from_dict(dict(fields))
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from error

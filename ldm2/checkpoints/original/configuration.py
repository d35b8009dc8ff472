"""The authors' configuration of a model: a YAML or JSON file, read with limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm2.fields import check_file, one_line, short

LARGEST_FILE = 1_000_000                                   # bytes of a configuration; the authors' have some thousands
MOST_VALUES = 10_000                                       # in a configuration


def read(config: Mapping[str, Any] | str | Path | None) -> Mapping[str, Any]:
    """The authors' configuration: a mapping, or the YAML or JSON file that holds one; {} for None."""
    if config is None or isinstance(config, Mapping):
        return config or {}
    import yaml  # reads JSON too

    path = Path(config).expanduser()
    check_file(path)
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, a configuration has at most {LARGEST_FILE}")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError, RecursionError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a YAML or JSON file ({one_line(error)})") from error
    if not isinstance(fields, Mapping):
        raise ValueError(f"{path} must hold a mapping, got {type(fields).__name__}")
    if _is_large(fields):
        raise ValueError(f"{path} holds more than {MOST_VALUES} values, its aliases written out")
    return fields


def _is_large(fields: Mapping[str, Any]) -> bool:
    """Whether there are more than MOST_VALUES values inside, aliases counted each time."""
    waiting, seen = [fields], 0
    while waiting and seen <= MOST_VALUES:
        value = waiting.pop()
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
        seen += 1 + len(inside)
        waiting += list(inside)[:MOST_VALUES]
    return seen > MOST_VALUES


def section(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A mapping inside a mapping, {} where it is not given."""
    for i, name in enumerate(names):
        config = config.get(name) or {}
        if not isinstance(config, Mapping):
            raise ValueError(f"config: {'.'.join(names[: i + 1])} must be a mapping, got {short(config)}")
    return config

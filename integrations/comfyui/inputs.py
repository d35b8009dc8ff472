"""The options of a request as inputs of ComfyUI's nodes, and back. All is made from `ldm2.settings`.

A widget always has a value. Where an option may be left out, one value stands for that: 0 or -1 of numbers (the tooltip
says which), "automatic" of choices, and the empty text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ldm2.options import Option, default_value, from_word, options_of
from ldm2.settings import Settings

AUTOMATIC = "automatic"
LARGEST = 2**64 - 1                        # of ComfyUI's seeds
FIRST = ("prompt", "negative_prompt", "seed", "times", "above")              # required: the node's upper part

Input = tuple[Any, dict[str, Any]]


def inputs_of(task: str) -> dict[str, dict[str, Input]]:
    """The inputs of a task's node, required and optional, as INPUT_TYPES returns them."""
    known = {name: _input(name, each, task) for name, each in options_of(Settings, task).items() if name != "task"}
    return {"required": {name: each for name, each in known.items() if name in FIRST},
            "optional": {name: each for name, each in known.items() if name not in FIRST}}


def settings_of(task: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that inputs stand for; what is left out or automatic is not in them.

    Raises ValueError naming option, value and rule.
    """
    known = options_of(Settings, task)
    told = {name: _value(name, known[name], value) for name, value in values.items() if name in known}
    given = {name: value for name, value in told.items() if value is not None}
    Settings.create(task, **given)
    return given


def _input(name: str, each: Option, task: str) -> Input:
    """One input: its type and what its widget shows."""
    preset, kind = default_value(Settings, name), _type_of(name, each)
    about = {"tooltip": each.help + (_says(each, task) if preset is None else "")}
    if kind == "BOOLEAN":
        return kind, about | {"default": preset}
    if kind == "COMBO":
        return [AUTOMATIC, *each.kind.schema["enum"]], about | {"default": AUTOMATIC}
    if kind == "SEED":
        return "INT", about | {"default": 0, "min": 0, "max": LARGEST, "control_after_generate": True}
    if kind == "STRING":
        return kind, about | {"default": "", "multiline": name in ("prompt", "negative_prompt", "prompt_at")}
    low, high = _limits(each)
    left_out = _left_out(each)
    default = left_out if preset is None else preset
    return kind, about | {"default": default, "min": min(low, default), "max": high} | _steps(kind, high)


def _type_of(name: str, each: Option) -> str:
    """The widget for an option, by the schema of its values."""
    kind = each.kind.schema.get("type")
    if name == "seed":
        return "SEED"
    if "enum" in each.kind.schema:
        return "COMBO"
    return {"integer": "INT", "number": "FLOAT", "boolean": "BOOLEAN"}.get(str(kind), "STRING")


def _steps(kind: str, high: float) -> dict[str, Any]:
    """How far an arrow of a number's widget goes."""
    return {"step": 1} if kind == "INT" else {"step": 0.01 if high <= 1 else 0.1, "round": False}


def _limits(each: Option) -> tuple[float, float]:
    """The smallest and the largest value of a number's widget."""
    schema = each.kind.schema
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    return low, schema.get("maximum", 100_000)


def _left_out(each: Option) -> float:
    """The number that stands for a value that is not given: one that the option itself would refuse or not need."""
    schema = each.kind.schema
    whole = schema.get("type") == "integer"
    zero_is_free = schema.get("minimum", 0) > 0 or "exclusiveMinimum" in schema
    return (0 if whole else 0.0) if zero_is_free else (-1 if whole else -1.0)


def _says(each: Option, task: str) -> str:
    """What is taken where the option is left out, for its tooltip."""
    default = each.default_for(task)
    if each.kind.schema.get("type") in ("integer", "number"):
        taken = "automatic" if default is None else f"{default:g}, or the model's own"
        return f"; {_left_out(each):g}: {taken}"
    return "" if default is None else f"; {AUTOMATIC}: {default}, or the model's own"


def _value(name: str, each: Option, value: Any) -> Any:
    """What an input's value stands for, or None for a value that is not given. Raises ValueError."""
    kind = _type_of(name, each)
    if value is None or value == AUTOMATIC:
        return None
    if kind in ("INT", "FLOAT") and default_value(Settings, name) is None:
        return None if value == _left_out(each) else value
    if kind != "STRING":
        return value
    text = str(value).strip()
    if not text:
        return None
    return _several(name, each, text) if "maxItems" not in each.kind.schema else from_word(name, each, text)


def _several(name: str, each: Option, text: str) -> Any:
    """The values in a text: one a line, and ranges also with commas between them."""
    items = each.kind.schema.get("items", {})
    if each.kind.schema.get("type") != "array" or text.startswith("["):
        return from_word(name, each, text)
    numbers = items.get("items") is not None
    words = [word.strip() for word in re.split(r"[,;\n]" if numbers else r"\n", text) if word.strip()]
    try:
        return [each.kind.parse(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None

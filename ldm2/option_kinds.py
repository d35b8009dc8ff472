"""Kinds of options that only ldm2 has: prompts, seeds, ranges of time and frequency, LoRAs, loudness.

Each checks a value and reads a word of a command line; see `ldm2.options.Kind`. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from numbers import Integral
from os import PathLike
from typing import Any

from ldm2.options import Kind, check_number, check_text, exact, is_number, parse_integer, parse_number

Range = tuple[float | None, float | None]  # from, to; None is the beginning or the end
NUM_SEEDS = 2**64                          # of a torch.Generator
MOST_LORAS = 32


def texts(may_be_empty: bool = False) -> Kind:
    """One string, or one for each prompt: kept as a tuple."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        several = (value,) if isinstance(value, str) else value
        if not isinstance(several, Sequence) or not all(isinstance(text, str) for text in several):
            raise ValueError(f"{name} must be a string or a list of strings, got {value!r}")
        if not several:
            raise ValueError(f"{name} must hold at least one text, got {value!r}")
        return tuple(check_text(name, text, may_be_empty) for text in several)

    return Kind(check, str, {"type": ["string", "array"], "items": {"type": "string"}})


def seeds() -> Kind:
    """One seed, or a tuple with one for each row: what torch.Generator takes; -1 means 2**64 - 1, as it does there."""

    def check(name: str, value: Any) -> Any:
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(check(name, each) for each in value)
        if isinstance(value, bool) or not isinstance(value, Integral) or not -NUM_SEEDS // 2 <= int(value) < NUM_SEEDS:
            raise ValueError(f"{name} must be an integer from 0 to 2**64 - 1 (or negative, from -2**63), got {value!r}")
        return int(value) % NUM_SEEDS

    return Kind(check, parse_integer, {"type": ["integer", "array"], "items": {"type": "integer"}})


def interval() -> Kind:
    """A part (start, end) of the run with 0 <= start <= end <= 1; on a command line START:END."""

    def check(name: str, value: Any) -> tuple[float, float]:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            raise ValueError(f"{name} must be (start, end), got {value!r}")
        start, end = (check_number(name, share) for share in value)
        if not 0 <= start <= end <= 1:
            raise ValueError(f"{name} must have 0 <= start <= end <= 1, got {exact(start)} to {exact(end)}")
        return start, end

    return Kind(check, parse_interval, {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1},
                                        "minItems": 2, "maxItems": 2})


def ranges() -> Kind:
    """Ranges (from, to), None in them for the beginning or the end; a bare pair is one range. Kept as a tuple."""

    def check(name: str, value: Any) -> tuple[Range, ...]:
        several = (value,) if _is_range(value) else value
        if not isinstance(several, Sequence) or isinstance(several, str) or not all(map(_is_range, several)):
            raise ValueError(f"{name} must be a list of (from, to), for example [(0.5, 1)], got {value!r}")
        if not several:
            raise ValueError(f"{name} must hold at least one range, got {value!r}")
        return tuple((start, end) for start, end in several)

    number_or_null = {"type": ["number", "null"]}
    return Kind(check, parse_range, {"type": "array", "minItems": 1, "items": {
        "type": "array", "items": number_or_null, "minItems": 2, "maxItems": 2}})


def _is_range(value: Any) -> bool:
    """Whether a value is a pair of numbers, either of which may be None."""
    pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    return pair and all(end is None or is_number(end) for end in value)


def prompt_changes() -> Kind:
    """(seconds, prompt) from where on other prompts hold: ascending, after 0. Kept as a tuple."""

    def check(name: str, value: Any) -> tuple[tuple[float, str], ...]:
        pairs = isinstance(value, Sequence) and not isinstance(value, str)
        if not pairs or not all(isinstance(c, Sequence) and not isinstance(c, str) and len(c) == 2 for c in value):
            raise ValueError(f"{name} must be a list of (seconds, prompt), got {value!r}")
        checked: list[tuple[float, str]] = []
        for start, text in value:
            start = check_number(f"{name}: the time of a prompt", start, above=0)
            if checked and start <= checked[-1][0]:
                raise ValueError(f"{name} must be in order of time, got {exact(start)} after {exact(checked[-1][0])}")
            checked.append((start, check_text(f"{name}: the prompt at {start:g} s", text)))
        return tuple(checked)

    return Kind(check, parse_change, {"type": "array", "items": {
        "type": "array", "prefixItems": [{"type": "number"}, {"type": "string"}], "minItems": 2, "maxItems": 2}})


def loras() -> Kind:
    """LoRAs: "FILE", "FILE:SCALE", (file, scale) or (file, scale, SHA-256 that the file must have). Kept as a tuple."""

    def check(name: str, value: Any) -> tuple[tuple[Any, ...], ...]:
        several = (value,) if isinstance(value, (str, PathLike)) or _is_lora(value) else value
        if not isinstance(several, Sequence) or len(several) > MOST_LORAS:
            raise ValueError(f"{name} must be a list of at most {MOST_LORAS} of FILE:SCALE, got {value!r:.200}")
        return tuple(_lora(name, each) for each in several)

    entry = {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}, {"type": "string"}],
             "minItems": 1, "maxItems": 3}
    return Kind(check, parse_lora, {"type": "array", "items": {"anyOf": [{"type": "string"}, entry]}})


def _is_lora(value: Any) -> bool:
    """Whether a value is one (file, scale), maybe with a digest."""
    return isinstance(value, (tuple, list)) and len(value) in (2, 3) and is_number(value[1])


def _lora(name: str, value: Any) -> tuple[Any, ...]:
    """One LoRA in its one form. Raises ValueError."""
    parts = parse_lora(value) if isinstance(value, str) else (value,) if isinstance(value, PathLike) else value
    if not isinstance(parts, (tuple, list)) or not 1 <= len(parts) <= 3:
        raise ValueError(f"{name} must hold FILE:SCALE or (file, scale), got {value!r:.200}")
    file, scale, *digest = (*parts, 1.0) if len(parts) == 1 else parts
    file = check_text(f"{name}: the file", str(file) if isinstance(file, PathLike) else file)
    scale = check_number(f"{name}: the scale of {file}", scale)
    if digest and not (isinstance(digest[0], str) and re.fullmatch("[0-9a-f]{64}", digest[0])):
        raise ValueError(f"{name}: the SHA-256 of {file} must have 64 hexadecimal digits, got {digest[0]!r:.80}")
    return (file, scale, *digest)


def names_a_lora(word: str) -> bool:
    """Whether the file of a LoRA can be meant by its name, and not by its path: no folders and no suffix."""
    return not re.search(r"[/\\.~]", word)


def normalization() -> Kind:
    """"peak", or a loudness in LUFS from -70 to 0."""

    def check(name: str, value: Any) -> float | str:
        if value == "peak":
            return "peak"
        if not is_number(value) or not -70 <= value <= 0:
            raise ValueError(f"{name} must be peak or a loudness from -70 to 0 LUFS, got {value!r}")
        return float(value)

    return Kind(check, lambda text: text if text == "peak" else parse_number(text), {
        "anyOf": [{"const": "peak"}, {"type": "number", "minimum": -70, "maximum": 0}]})


def parse_interval(text: str) -> tuple[float, float]:
    """"0.1:0.8" -> (0.1, 0.8); the ends of the run where nothing stands beside the colon. Raises ValueError."""
    start, colon, end = text.partition(":")
    try:
        return float(start or 0), float(end if end or not colon else 1)
    except ValueError:
        raise ValueError(f"must be FROM:TO, for example 0.1:0.8, got {text!r}") from None


def parse_range(text: str) -> Range:
    """"2.5:4" -> (2.5, 4.0); a side that is left out is None. Raises ValueError for anything else."""
    start, colon, end = text.partition(":")
    try:
        if colon:
            return (float(start) if start.strip() else None), (float(end) if end.strip() else None)
    except ValueError:
        pass
    raise ValueError(f"must be FROM:TO, for example 2.5:4, got {text!r}")


def parse_lora(text: str) -> tuple[str, float]:
    """"rain.safetensors:0.8" -> ("rain.safetensors", 0.8); 1 where no number stands after the last colon."""
    file, colon, scale = text.rpartition(":")
    try:
        return (file, float(scale)) if colon and file else (text, 1.0)
    except ValueError:                                     # the colon of a drive or of the name itself
        return text, 1.0


def parse_change(text: str) -> tuple[float, str]:
    """"20:thunder" -> (20.0, "thunder"). Raises ValueError."""
    start, _, prompt = text.partition(":")
    try:
        return float(start), prompt
    except ValueError:
        raise ValueError(f"must be SECONDS:PROMPT, for example 20:thunder, got {text!r}") from None

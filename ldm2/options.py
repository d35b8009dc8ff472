"""How an option of a request is described: what it takes, how it is checked, read from a command line, and shown.

The options themselves are the fields of `ldm2.settings.Settings`. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from os import PathLike
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What an option takes.

    check:  check(name, value) -> the value in its one form. Raises ValueError naming value and rule.
    parse:  a word of a command line -> a value for `check`. Raises ValueError.
    schema: of its values in JSON, as JSON Schema has it.
    unit:   of a number
    """

    check: Callable[[str, Any], Any]
    parse: Callable[[str], Any]
    schema: Mapping[str, Any]
    unit: str = ""


@dataclass(frozen=True)
class Option:
    """One option. `help` is for people; the limits are in `kind`.

    kind:    what it takes
    help:    one line: what it does, and its unit
    group:   the heading under which a command line lists it
    default: what takes the place of None; for some tasks another value (`per_task`). None: there is none
    tasks:   those that take the option; None for all
    words:   other names that are accepted for it, such as those of older versions
    of_checkpoint: whether a checkpoint may have a default of its own
    foreign: names that other programs have for it; they are refused with this one's
    flag:    its name on a command line, where that is not `--` and its own name with dashes
    metavar: stands for the value in a usage line
    """

    kind: Kind
    help: str
    group: str = "sampling"
    default: Any = None
    per_task: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    words: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    of_checkpoint: bool = False
    flag: str | None = None
    metavar: str | None = None

    def applies_to(self, task: str) -> bool:
        """Whether a task takes the option."""
        return self.tasks is None or task in self.tasks

    def default_for(self, task: str) -> Any:
        """What takes the place of None."""
        return self.per_task.get(task, self.default)


class UnknownOption(TypeError, ValueError):
    """A name that is no option: a TypeError as Python's own is, and a ValueError as all input is that ldm2 refuses."""


def option(kind: Kind, help: str, *, value: Any = None, **rest: Any) -> Any:
    """A dataclass field that is an option; `value` is the value it has where it is not given."""
    return field(default=value, metadata={"option": Option(kind, help, **rest)})


def options_of(cls: type, task: str | None = None) -> dict[str, Option]:
    """The options that are fields of a dataclass, by their names: all of them, or those of a task."""
    found = {each.name: each.metadata["option"] for each in fields(cls) if "option" in each.metadata}
    return {name: known for name, known in found.items() if task is None or known.applies_to(task)}


def from_word(name: str, each: Option, word: str) -> Any:
    """The value of an option that is written as one word, in a table or after NAME=; a list as JSON has it.

    Raises ValueError naming option, word and rule.
    """
    schema = each.kind.schema
    try:
        if "array" in schema.get("type", "") and word.lstrip().startswith("["):
            value = json.loads(word)
        else:
            value = each.kind.parse(word)
            value = [value] if schema.get("type") == "array" and "maxItems" not in schema else value
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    return each.kind.check(name, value)


def check_options(settings: Any) -> None:
    """Bring the options of a dataclass into their one form. Raises ValueError naming option, value and rule."""
    for name, each in options_of(type(settings)).items():
        value = getattr(settings, name)
        if value is not None or default_value(type(settings), name) is not None:
            object.__setattr__(settings, name, each.kind.check(name, value))


def default_value(cls: Any, name: str) -> Any:
    """The value of an option of a dataclass where it is not given."""
    return cls.__dataclass_fields__[name].default


def refuse_unknown(what: str, given: Iterable[str], known: Mapping[str, Option], beside: Iterable[str] = ()) -> None:
    """Raise UnknownOption for the first name that is no option (nor in `beside`), with the one that may be meant."""
    for name in given:
        if name in known or name in beside:
            continue
        ours = next((own for own, each in known.items() if name in each.foreign), None)
        if ours is not None:
            raise UnknownOption(f"{what} has no option {name!r}: it is called {ours} here")
        near = get_close_matches(str(name), [*known, *beside], n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UnknownOption(f"{what} has no option {name!r}{hint}")


# --- kinds -----------------------------------------------------------------------------------------------------------

def is_number(value: Any) -> bool:
    """Whether a value is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_integer(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> int:
    """An integer within limits. Raises ValueError."""
    fits = isinstance(value, Integral) and not isinstance(value, bool) and not value < minimum
    if not fits or (maximum is not None and value > maximum):
        rule = "a positive integer" if minimum == 1 else f"an integer of at least {minimum}"
        rule = rule if maximum is None else f"an integer from {minimum} to {maximum}"
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return int(value)


def check_number(
    name: str, value: Any, minimum: float | None = None, maximum: float | None = None, *, above: float | None = None,
    unit: str = "",
) -> float:
    """A finite number within limits: at least `minimum`, above `above`, at most `maximum`. Raises ValueError."""
    low, known = -math.inf if minimum is None else minimum, _as_float(value) if is_number(value) else math.nan
    fits = math.isfinite(known) and low <= known and (above is None or known > above)
    if not fits or (maximum is not None and known > maximum):
        got = f"{known:g}" if is_number(value) else repr(value)
        raise ValueError(f"{name} must be {_range(minimum, maximum, above)}{unit and ' ' + unit}, got {got}")
    return known


def _as_float(value: Any) -> float:
    """A real number; infinity for one that is too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _range(minimum: float | None, maximum: float | None, above: float | None) -> str:
    """The limits of a number in words."""
    if minimum is not None and maximum is not None:
        return f"a number from {minimum:g} to {maximum:g}"
    bounds = [f"above {above:g}"] if above is not None else [f"of at least {minimum:g}"] if minimum is not None else []
    bounds += [] if maximum is None else [f"at most {maximum:g}"]
    return f"a finite number {' and '.join(bounds)}".rstrip()


def check_flag(name: str, value: Any) -> bool:
    """True or False. Raises ValueError."""
    if isinstance(value, (str, bytes)) or getattr(value, "ndim", False) or value not in (False, True):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of the names. Raises ValueError with all of them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"unknown {name.replace('_', ' ')} {value!r}, choose from {', '.join(choices)}")
    return value


def integer(minimum: int = 1, maximum: int | None = None) -> Kind:
    """An integer."""
    limits = {"minimum": minimum} | ({} if maximum is None else {"maximum": maximum})
    return Kind(lambda name, value: check_integer(name, value, minimum, maximum), parse_integer,
                {"type": "integer", **limits})


def number(minimum: float | None = None, maximum: float | None = None, *, above: float | None = None,
           unit: str = "") -> Kind:
    """A finite number, in `unit`."""
    limits = {"minimum": minimum, "maximum": maximum, "exclusiveMinimum": above}
    return Kind(lambda name, value: check_number(name, value, minimum, maximum, above=above, unit=unit), parse_number,
                {"type": "number"} | {name: limit for name, limit in limits.items() if limit is not None}, unit)


def flag() -> Kind:
    """True or False; on a command line there is no value."""
    return Kind(check_flag, parse_flag, {"type": "boolean"})


def choice(choices: Sequence[str]) -> Kind:
    """One of some names."""
    return Kind(lambda name, value: check_choice(name, value, choices), str, {"enum": list(choices)})


def parse_integer(text: str) -> int:
    """"12" -> 12. Raises ValueError."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"must be an integer, got {text!r}") from None


def parse_number(text: str) -> float:
    """"0.5" -> 0.5. Raises ValueError."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"must be a number, got {text!r}") from None


def parse_flag(text: str) -> bool:
    """"true" and "false", and the like -> True or False, for files and `--set NAME=VALUE`. Raises ValueError."""
    known = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if text.strip().lower() not in known:
        raise ValueError(f"must be true or false, got {text!r}")
    return known[text.strip().lower()]


# --- kinds of this program -------------------------------------------------------------------------------------------

Range = tuple[float | None, float | None]  # from, to; None is the beginning or the end
NUM_SEEDS = 2**64                          # of a torch.Generator
MOST_LORAS = 32


def check_text(name: str, value: Any, may_be_empty: bool = False) -> str:
    """A string, with something in it, that can be written as UTF-8. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {type(value).__name__}")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{name} must not be empty, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"{value[error.start]!a}"
        raise ValueError(f"{name} contains an unpaired surrogate at index {error.start}: {found}") from error
    return value


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
            raise ValueError(f"{name} must have 0 <= start <= end <= 1, got {start:g} to {end:g}")
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
                raise ValueError(f"{name} must be in order of time, got {start:g} after {checked[-1][0]:g}")
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

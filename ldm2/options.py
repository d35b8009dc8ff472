"""How an option of a request is described: what it takes, how it is checked, read from a command line, and shown.

The options themselves are the fields of `ldm2.settings.Settings`. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
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
        got = exact(known) if is_number(value) else repr(value)
        raise ValueError(f"{name} must be {_range(minimum, maximum, above)}{unit and ' ' + unit}, got {got}")
    return known


def exact(number: float) -> str:
    """A number in an error message: short, and never rounded to another that would be allowed."""
    return f"{number:g}" if float(f"{number:g}") == number or number != number else repr(float(number))


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


def check_text(name: str, value: Any, may_be_empty: bool = False) -> str:
    """A string, with something in it, that can be written as UTF-8. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {type(value).__name__}")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{name} must not be empty, got {value!r}")
    if "\0" in value:                                      # which no tag of a file can hold
        raise ValueError(f"{name} contains a zero character at index {value.index(chr(0))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"{value[error.start]!a}"
        raise ValueError(f"{name} contains an unpaired surrogate at index {error.start}: {found}") from error
    return value


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

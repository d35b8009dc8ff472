"""Typed reading of JSON files that others wrote: each error is one line that names the file, the field and the rule."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

# Far above every real model, and small enough that nothing which is made from a config takes long or much memory.
LARGEST_FILE = 64_000_000                                  # bytes of a JSON file; vocabularies have a few millions
LARGEST = 1_000_000                                        # of any size: widths, vocabularies, sample rates
MOST_LAYERS = 1_000
MOST_ENTRIES = 100                                         # in the list of a config
_REQUIRED = object()


def read_json(path: str | PathLike) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, one line that names the file, for anything else."""
    path = Path(path)
    check_file(path)
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, JSON of at most {LARGEST_FILE} makes sense here")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    except OSError as error:
        raise ValueError(f"{path} is not readable ({error.strerror})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(fields).__name__}")
    return fields


def check_file(path: Path, name: str | None = None) -> None:
    """Raise ValueError unless there is a file to read: a pipe or a device would never end. name: default the path."""
    try:
        if path.is_file():
            return
        there = path.exists()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name or repr(str(path))} is not readable ({error})") from None
    raise ValueError(f"{name or path} {'is not a file' if there else 'is missing'}")


def check_folder(path: Path) -> None:
    """Raise ValueError unless there is a folder."""
    if not path.is_dir():
        raise ValueError(f"{path} {'is not a folder' if path.exists() else 'is missing'}")


def sha256_of(path: str | PathLike) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def named(source: str | PathLike, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """What libraries raise inside becomes a ValueError, one line that names `source`.

    To wrap what is made from files of others: libraries take damaged ones for mistakes of the program. Our own errors
    pass, and so do OSErrors and those in `passing`.
    """
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except passing:
        raise
    except OSError as error:
        if "\n" not in str(error):
            raise
        raise OSError(f"{source}: {one_line(error)}") from error
    except ValueError as error:
        if "\n" not in str(error) and str(source) in str(error):
            raise
        raise ValueError(f"{source}: {one_line(error)}") from error
    except Exception as error:
        raise ValueError(f"{source} is damaged or made for something else ({one_line(error)})") from error


def one_line(error: BaseException, most: int = 200) -> str:
    """The message of an error in one line, after its type where that is not plain."""
    text = flat(error, most)
    plain = isinstance(error, (ValueError, OSError)) and text
    return text if plain else f"{type(error).__name__}: {text}" if text else type(error).__name__


def flat(text: object, most: int = 2000) -> str:
    """A text in one line, cut after some letters."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[:most]} ..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def few(names: Iterable[str], most: int = 3) -> str:
    """The first of some names, and dots for the others."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def short(value: Any, most: int = 120) -> str:
    """A value as JSON, cut after some letters."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError, TypeError):
        text = type(value).__name__
    return text if len(text) <= most else f"{text[:most]} ..."


def boolean(value: Any) -> bool:
    """`value` if it is true or false, else ValueError with the rule."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def positive_integer(value: Any, most: int = LARGEST) -> int:
    """`value` if it is an integer from 1 to `most`, else ValueError with the rule."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("must be a positive integer")
    if value > most:
        raise ValueError(f"must be at most {most}")
    return value


def layer_count(value: Any) -> int:
    """`value` if it is a possible number of layers, else ValueError with the rule."""
    return positive_integer(value, MOST_LAYERS)


def optional_integer(value: Any) -> int | None:
    """As positive_integer, or None."""
    return None if value is None else positive_integer(value)


class Fields:
    """Typed reading of a JSON object; each error names the source and the field."""

    def __init__(self, fields: Mapping[str, Any], source: str):
        self.fields = fields
        self.source = source

    def error(self, name: str, rule: str, value: Any) -> ValueError:
        return ValueError(f"{self.source}: field '{name}' {rule}, got {short(value)}")

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.fields.get(name, default)
        if value is _REQUIRED:
            raise ValueError(f"{self.source}: missing field '{name}'")
        return value

    def _parse(self, name: str, parse, value: Any) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            raise self.error(name, str(error), self.get(name, None)) from None

    def parse(self, name: str, parse: Callable[[Any], Any]) -> Any:
        """The field as `parse` gives it, whose ValueError is the rule."""
        return self._parse(name, parse, self.get(name))

    def integer(self, name: str) -> int:
        return self.parse(name, positive_integer)

    def layers(self, name: str) -> int:
        return self.parse(name, layer_count)

    def first_integer(self, name: str) -> int | None:
        """An integer, the first of a list of them, or None where the field is left out."""
        value = self.get(name, None)
        first = self.integers(name)[0] if isinstance(value, (list, tuple)) else value
        return self._parse(name, optional_integer, first)

    def boolean(self, name: str) -> bool:
        return self.parse(name, boolean)

    def positive_number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self.get(name, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < 1e30 or not math.isfinite(value):
            raise self.error(name, "must be a positive number", value)
        return float(value)

    def sequence(self, name: str, length: int | None = None) -> tuple[Any, ...]:
        value = self.get(name)
        if not isinstance(value, (list, tuple)) or not value:
            raise self.error(name, "must be a non-empty list", value)
        if length is not None and len(value) != length:
            raise self.error(name, f"must have {length} entries", value)
        if len(value) > MOST_ENTRIES:
            raise self.error(name, f"must have at most {MOST_ENTRIES} entries", value)
        return tuple(value)

    def integers(self, name: str, length: int | None = None) -> tuple[int, ...]:
        return tuple(self._parse(name, positive_integer, entry) for entry in self.sequence(name, length))

    def integer_lists(self, name: str, length: int) -> tuple[tuple[int, ...], ...]:
        rows = self.sequence(name, length)
        if not all(isinstance(row, (list, tuple)) and 0 < len(row) <= MOST_ENTRIES for row in rows):
            raise self.error(name, "must be a list of non-empty lists", rows)
        return tuple(tuple(self._parse(name, positive_integer, entry) for entry in row) for row in rows)

    def per_level(self, name: str, levels: int, parse, default: Any = _REQUIRED) -> tuple[Any, ...]:
        """A list with one entry per level, or one value that stands for each level."""
        value = self.get(name, default)
        entries = self.sequence(name, levels) if isinstance(value, (list, tuple)) else (value,) * levels
        return tuple(self._parse(name, parse, entry) for entry in entries)

    def block_types(self, name: str, levels: int, plain: str, attention: str | None = None) -> tuple[bool, ...]:
        """For each block of the list, whether it is of the kind with attention."""
        names = self.sequence(name, levels)
        known = [kind for kind in (plain, attention) if kind is not None]
        if any(kind not in known for kind in names):
            raise self.error(name, f"may hold {' and '.join(known)} only", names)
        return tuple(kind == attention for kind in names)

    def check_groups(self, name: str, channels: tuple[int, ...], groups: int) -> None:
        if any(width % groups for width in channels):
            raise self.error(name, f"must be multiples of norm_num_groups = {groups}", channels)

    def check_fixed(self, fixed: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise ValueError unless each of these fields, where it is given, has one of its values."""
        for name, allowed in fixed.items():
            if name in self.fields and self.fields[name] not in allowed:
                raise self.error(name, f"must be {' or '.join(json.dumps(v) for v in allowed)}", self.fields[name])

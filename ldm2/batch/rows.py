"""A row of a table -> what is to be made: its options, checked, and who it is. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ldm2.fields import check_file, one_line
from ldm2.option_kinds import names_a_lora
from ldm2.options import check_text, default_value, from_word, options_of
from ldm2.settings import EDITS, GENERATE, PER_PROMPT, RECONSTRUCT, TASKS, Output, Settings

LONGEST_TEXT = 10_000                      # characters of a prompt
LONGEST_ID = 200                           # characters
LONGEST_REASON = 500                       # characters of why a row failed
# What the manifest says of a row. Other columns of these names are carried through with "row_" before them.
MANIFEST = ("id", "path", "status", "error", "seed", "seconds", "sample_rate", "score", "ms", "bytes", "line", "asked",
            "prompt")
OPTIONS = options_of(Settings)
OF_THE_JOB = options_of(Output)
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
_COSTLY = ("task", "seconds", "steps", "sampler", "preset", "guidance_scale", "cache_interval", "num_waveforms")
_KEY, _SEED = 64, 75                       # bits of an id's digest that are not in its key, not in its seed
_SHAPES = 4096                             # different settings that are remembered as checked


_NAMELESS = re.compile(r"\(line \d+\)")


def nameless(line: int) -> str:
    """The id of a row that has none that could be used."""
    return f"(line {line})"


def origin_of(model: str, load: Mapping[str, Any]) -> dict[str, Any]:
    """What names a model in the ids of rows that bring none; model, load: as of `ldm2.load`."""
    return {"model": model, "revision": load.get("revision"), "reference": load.get("reference", "authors")}


Kind = tuple[tuple[str, Any], ...]


@dataclass(slots=True)
class Row:
    """One row: `options` and `input` make the sound, `extra` are columns to carry through.

    line: in the file, from 1. asked: a digest of options and input. error: why nothing can be made of it, or None.
    kind: the options that decide over the time that it takes. key: see `key_of`.
    """

    line: int
    id: str
    options: dict[str, Any] = field(default_factory=dict)
    input: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    asked: str = ""
    error: str | None = None
    kind: Kind = ()
    key: int = -1

    def __post_init__(self) -> None:
        if self.key < 0:
            self.key = key_of(self.id)

    @property
    def path(self) -> str:
        """Where its sound goes, below the folder and without the suffix: safe whatever the id is."""
        name = digest(self.id)
        return f"audio/{name[:2]}/{name}"


@dataclass
class Rules:
    """How rows are read: one object for a table.

    origin:      see `origin_of`
    defaults:    options for rows that do not give them
    allow_extra: columns whose names are near to those of options are carried through too
    words:       values are text, as in CSV
    """

    origin: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    allow_extra: bool = False
    words: bool = False
    _names: dict[str, str | None] = field(default_factory=dict)
    _shapes: dict[str, _Shape | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._origin = canonical(dict(self.origin))

    def row(self, line: int, columns: Mapping[str, Any] | str) -> Row:
        """The row in a line. What is wrong with its values becomes its error.

        Raises ValueError for a column whose name is near to an option's.
        """
        if isinstance(columns, str):
            return Row(line, nameless(line), error=f"line {line}: {columns}")
        given: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        names = self._names
        for name, value in columns.items():
            option = names[name] if name in names else self._option(str(name), line)
            if option is None:
                extra[f"row_{name}" if name in MANIFEST else str(name)] = value
            else:
                given[option] = value
        named = given.pop("id", None)
        row_id = nameless(line)
        try:
            row_id = row_id if named is None else _checked_id(named)
            options, kind, source, size, asked = self._options(given)
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            return Row(line, row_id, extra=extra, error=f"line {line}: {one_line(error, LONGEST_REASON)}")
        if named is None:
            row_id = digest(f"{asked}{self._origin}")
        number = int(digest(row_id), 16)
        if "seed" not in options:
            options["seed"] = number >> _SEED
        if size is not None:
            asked = f"{asked}{size}"
        return Row(line, row_id, options, source, extra, digest(asked), None, kind, number >> _KEY)

    def carried(self, name: str) -> str | None:
        """What a column that is carried through is called in the manifest; None for one that is an option."""
        try:
            if self._option(name, 0) is not None:
                return None
        except ValueError:
            pass
        return f"row_{name}" if name in MANIFEST else name

    def _option(self, name: str, line: int) -> str | None:
        """The option (or id, or input) that a column is; None for one to carry through. Raises ValueError."""
        if name not in self._names:
            self._names[name] = _option_named(name, line, self.allow_extra)
        return self._names[name]

    def _options(
        self, given: dict[str, Any]
    ) -> tuple[dict[str, Any], Kind, str | None, int | None, str]:
        """The options of a row in their plain form, its kind, its input and the size of that, and all in one text.

        Raises ValueError.
        """
        source = given.pop("input", None)
        task = str(given.get("task", self.defaults.get("task", GENERATE)))
        if self.words:
            given = _from_words(given)
        if self.defaults:
            given = {name: value for name, value in self.defaults.items()
                     if task not in TASKS or OPTIONS[name].applies_to(task)} | given
        texts = {name: _checked_text(name, given.pop(name)) for name in PER_PROMPT if given.get(name) is not None}
        seed = given.pop("seed", None)
        seed = None if seed is None else _checked_seed(seed)
        size = _checked_input(task, source)
        shape = self._shape(given, texts)
        options = shape.options | texts
        asked = [shape.text, *texts.values(), "" if source is None else source]
        if seed is not None:
            options["seed"] = seed
            asked.append(str(seed))
        return options, shape.kind, source, size, "".join(f"{len(each)}:{each}" for each in asked)

    def _shape(self, given: dict[str, Any], texts: Mapping[str, str]) -> _Shape:
        """The options beside texts and seed, checked, of which most rows have the same. Raises ValueError."""
        key = repr((given, *texts))
        found = self._shapes.get(key)
        if found is None:
            if len(self._shapes) >= _SHAPES:
                self._shapes.clear()
            try:
                options = _checked_shape(given, texts)
                found = _Shape(options, _kind(options), canonical([options, *texts, *_sizes_of_loras(options)]))
            except ValueError as error:
                found = str(error)
            self._shapes[key] = found
        if isinstance(found, str):
            raise ValueError(found)
        return found


@dataclass(frozen=True)
class _Shape:
    """Options beside texts and seed; what stands for them and for the names of the texts in a digest."""

    options: dict[str, Any]
    kind: Kind
    text: str


def _option_named(name: str, line: int, allow_extra: bool) -> str | None:
    """What a column is. Raises ValueError for a name that is near to an option's."""
    if name in OPTIONS or name in ("id", "input"):
        return name
    check_text(f"line {line}: the name of a column", name, may_be_empty=True)
    ours = next((own for own, each in OPTIONS.items() if name in each.words), None)
    if ours is not None or allow_extra:
        return ours
    if name in OF_THE_JOB:
        raise ValueError(f"line {line}: the column {name!r} is an option of the whole job, --{name.replace('_', '-')}; "
                         f"--allow-extra carries the column through")
    foreign = next((own for own, each in OPTIONS.items() if name in each.foreign), None)
    near = [foreign] if foreign else get_close_matches(name.lower(), [*OPTIONS, "input"], n=1, cutoff=0.8)
    if near:
        raise ValueError(f"line {line}: unknown column {name!r}, did you mean {near[0]}? --allow-extra carries it "
                         f"through as it is")
    return None


def _from_words(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values that are text, by their options. Raises ValueError."""
    return {name: word if name in PER_PROMPT else from_word(name, OPTIONS[name], word) for name, word in given.items()}


def _checked_shape(given: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """The options of a row beside its texts and its seed, in their plain form. Raises ValueError."""
    task = OPTIONS["task"].kind.check("task", given.get("task", GENERATE))
    if task == RECONSTRUCT:
        raise ValueError("the task reconstruct measures and makes no new sound: run ldm2 reconstruct")
    settings = Settings.create(task, **given, **dict.fromkeys(texts, "x"))
    length = settings.seconds if task == GENERATE else None
    settings.resolved(duration=float("inf") if length is None else length)
    plain = settings.plain() | ({} if settings.preset is None else {"preset": settings.preset})
    return {"task": task} | {name: value for name, value in plain.items()
                             if name not in texts and getattr(settings, name) != default_value(Settings, name)}


def _kind(options: Mapping[str, Any]) -> Kind:
    """What decides over the time that a row takes."""
    return tuple((name, options[name]) for name in _COSTLY if name in options)


def _checked_text(name: str, text: Any) -> str:
    """A text of a row. Raises ValueError."""
    text = check_text(name, text, name == "negative_prompt")
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{name} may have {LONGEST_TEXT:,} characters, got {len(text):,}")
    return text


def _checked_seed(seed: Any) -> int:
    """The seed of a row. Raises ValueError."""
    seed = OPTIONS["seed"].kind.check("seed", seed)
    if not isinstance(seed, int):
        raise ValueError(f"seed must be one number in a row, got {list(seed)}")
    return seed


def _checked_id(value: Any) -> str:
    """An id: text, or a number. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"id must be text or a whole number, got {value!r:.60}")
    text = check_text("id", str(value))
    if len(text) > LONGEST_ID:
        raise ValueError(f"id may have {LONGEST_ID} characters, got {len(text):,}")
    if text[0] == "(" and _NAMELESS.fullmatch(text):
        raise ValueError(f"id must not be {text!r}: rows without one are told by such")
    leads_out = ".." in text and ".." in text.replace("\\", "/").split("/")
    if leads_out or not text.isprintable() or text[0] in "/\\":
        raise ValueError(f"id must be printable, and no path that leads out of a folder, got {text!r}")
    return text


def _checked_input(task: str, source: Any) -> int | None:
    """The size of the input in bytes, None where there is none. Raises ValueError."""
    if task not in EDITS:
        if source is not None:
            raise ValueError(f"{task} takes no input, got {source!r:.200}")
        return None
    if not isinstance(source, str) or "\0" in source:
        raise ValueError(f"{task} needs input, the path of a sound file, got {source!r:.200}")
    try:
        path = Path(source)
        check_file(path, f"the input {source!r:.200}")
        return path.stat().st_size
    except OSError as error:
        raise ValueError(f"the input {source!r:.200} cannot be read: {error.strerror}") from None


def _sizes_of_loras(options: Mapping[str, Any]) -> list[int]:
    """The sizes in bytes of LoRAs that are given by their paths. Raises ValueError for one that is not there."""
    paths = [Path(word).expanduser() for word, *_ in options.get("lora", ()) if not names_a_lora(word)]
    for path in paths:
        if not path.exists():
            raise ValueError(f"the LoRA {str(path)!r:.200} does not exist")
    return [path.stat().st_size for path in paths]


def canonical(value: Any) -> str:
    """JSON in one form."""
    return _ENCODER.encode(value)


def digest(text: str) -> str:
    """32 hexadecimal digits of a text (BLAKE2b)."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def key_of(row_id: str) -> int:
    """The first 64 bits of its digest: what stands for an id where a million of them are kept."""
    return int(digest(row_id), 16) >> _KEY


def seed_of(row_id: str) -> int:
    """The seed of a row that gives none: a number below 2**53 that depends on its id alone."""
    return int(digest(row_id), 16) >> _SEED

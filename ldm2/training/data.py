"""Sounds with captions on disk, in the layouts that people have them in.

    FOLDER                  x.wav beside x.txt, whose lines are captions of x.wav
    FOLDER, metadata.csv    (or .jsonl, .parquet) with the columns file_name and text, as Hugging Face's AudioFolder
    FOLDER, manifest.jsonl  what `ldm2 batch` has made
    FILE.json               {"data": [{"wav": ..., "caption": ...}]}, as the authors' training takes it, or a list
    FILE.jsonl|csv|parquet  any table with a column for the path and one or more for captions
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm2.batch import tables
from ldm2.fields import check_file
from ldm2.metrics.evaluation import PATH_KEYS, SUFFIXES, TEXT_KEYS
from ldm2.options import check_text

PATHS = (*PATH_KEYS, "location")
TABLES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Clip:
    """A sound file, what may be said of it, and for speech models what it says."""

    path: Path
    captions: tuple[str, ...]
    transcription: str | None = None


@dataclass
class Data:
    """What is there. skipped: one line for each sound that is left out."""

    clips: list[Clip] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def texts(self) -> dict[tuple[str, str | None], Clip]:
        """Every caption with what is said in it, and the last clip that has it."""
        return {(caption, clip.transcription): clip for clip in self.clips for caption in clip.captions}


def read(place: str | Path, sounds: str | Path | None = None, strict: bool = False) -> Data:
    """The clips of a folder or a table. No sound is opened.

    sounds: folder that relative paths in a table start from, default the table's own.
    strict: raise for what would be left out.
    Raises ValueError or OSError, one line, for a place that holds no clips.
    """
    place = Path(place).expanduser()
    root = None if sounds is None else Path(sounds).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"no such file or folder: {place}")
    if not place.is_dir():
        check_file(place)
        data = _from_tables([place], root)
    elif found := _tables_in(place):
        data = _from_tables(found, root)
    else:
        data = _from_folder(place)
    if strict and data.skipped:
        raise ValueError(data.skipped[0])
    if not data.clips:
        why = f": {data.skipped[0]}" if data.skipped else ""
        more = f", and {len(data.skipped) - 1} more like this" if len(data.skipped) > 1 else ""
        raise ValueError(f"{place} holds no sound with a caption{why}{more}")
    return data


def texts(path: str | Path, what: str) -> list[str]:
    """The lines of a text file that are not empty, each a `what`. Raises ValueError or OSError, one line."""
    path = Path(path).expanduser()
    check_file(path)
    found = _lines(path, what)
    if not found:
        raise ValueError(f"{path} holds no {what}")
    return found


def _lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that are not empty, maybe none. Raises ValueError naming the file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [check_text(f"a {what}", line.strip()) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _tables_in(folder: Path) -> list[Path]:
    """The tables that describe a folder; none if its captions are in text files."""
    named = [path for path in sorted(folder.rglob("metadata.*")) if path.suffix in TABLES[1:] and path.is_file()]
    manifest = folder / "manifest.jsonl"
    return named or ([manifest] if manifest.is_file() else [])


def _from_folder(folder: Path) -> Data:
    """Sounds with text files beside them."""
    data = Data()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        text = path.with_suffix(".txt")
        try:
            captions = tuple(_lines(text, "caption")) if text.is_file() else ()
        except ValueError as error:
            data.skipped.append(str(error))
            continue
        if captions:
            data.clips.append(Clip(path, captions))
        else:
            data.skipped.append(f"{path} has no caption: {text.name} is {'empty' if text.is_file() else 'missing'}")
    return data


def _from_tables(paths: list[Path], root: Path | None) -> Data:
    """The rows of tables; those about one sound are one clip."""
    data = Data()
    clips: dict[Path, Clip] = {}
    for table in paths:
        for where, row in _rows(table):
            try:
                clip = _clip(row, table.parent if root is None else root)
            except (ValueError, OSError) as error:
                data.skipped.append(f"{where}: {error}")
                continue
            if clip is not None:
                before = clips.get(clip.path)
                captions = clip.captions if before is None else dict.fromkeys(before.captions + clip.captions)
                clips[clip.path] = Clip(clip.path, tuple(captions), clip.transcription)
    data.clips = list(clips.values())
    return data


def _rows(table: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """The rows of a table, each with the words for where it stands."""
    if table.suffix.lower() != ".json":
        if table.suffix.lower() not in TABLES:
            raise ValueError(f"the data must be a folder or a table {', '.join(TABLES)}, got {table}")
        yield from ((f"{table}, line {number}", row) for number, row in tables.records(table))
        return
    check_file(table)
    try:
        content = json.loads(table.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{table} is not JSON ({error})") from None
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f"{table} must hold a list, or an object with one under \"data\"")
    for number, row in enumerate(rows, start=1):
        yield f"{table}, entry {number}", row if isinstance(row, dict) else f"must be an object, got {row!r:.60}"


def _clip(row: Mapping[str, Any] | str, root: Path) -> Clip | None:
    """The clip of a row; None for one of `ldm2 batch` that failed. Raises ValueError."""
    if isinstance(row, str):
        raise ValueError(row)
    if row.get("status") == "error":
        return None
    named = next((row[key] for key in PATHS if row.get(key)), None)
    if not isinstance(named, str) or "\0" in named:
        raise ValueError(f"no path of a sound under one of {', '.join(PATHS)}, got {named!r:.100}")
    path = root / Path(named).expanduser()
    check_file(path)
    captions = tuple(dict.fromkeys(_captions(row)))
    if not captions:
        raise ValueError(f"no caption for {named}")
    spoken = row.get("transcription")
    return Clip(path, captions, None if spoken is None else check_text("transcription", spoken))


def _captions(row: Mapping[str, Any]) -> Iterator[str]:
    """All captions of a row: any column with that word in its name, else the first of the other names for it."""
    keys = [key for key in row if "caption" in key] or [key for key in TEXT_KEYS if row.get(key)][:1]
    for key in keys:
        for text in row[key] if isinstance(row[key], list) else [row[key]]:
            if text is not None and not (isinstance(text, str) and not text.strip()):
                yield check_text(key, text.strip() if isinstance(text, str) else text)

"""What is known of the rows of a job: lines of JSON that each worker appends to its own file, merged at the end."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm2.atomic import whole

try:
    import fcntl
except ImportError:                        # not on Windows
    fcntl = None

OK, ERROR = "ok", "error"


class Locked(ValueError):
    """Another process holds it."""


class Manifest:
    """The file of one worker, open for appending and locked while it is.

    A line that a killed process left without its end is cut off. Raises Locked if another process still has the file
    after `patience` seconds.
    """

    def __init__(self, path: Path, patience: float = 10.0):
        self._file = open(path, "a+b", buffering=0)        # noqa: SIM115  (as long as the object lives)
        lock(self._file.fileno(), path, patience)
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        rest = len(self._file.readall().rpartition(b"\n")[2])
        if rest:
            self._file.truncate(size - rest)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a line, in one piece. Raises OSError where the disk is full; nothing of the line is left then."""
        line = json.dumps(record).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        if self._file.write(line) < len(line):
            self._file.truncate(end)
            raise OSError(f"{self._file.name} could not be written: is the disk full?")

    def close(self) -> None:
        """Close the file, which unlocks it."""
        self._file.close()


def lock(descriptor: int, path: Path, patience: float = 0.0) -> None:
    """Lock an open file until it is closed or its process ends. Raises Locked."""
    until = time.monotonic() + patience
    while fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() >= until:
                raise Locked(f"{path} is in use: another ldm2 batch works on this folder and shard") from None
            time.sleep(0.1)


def files(folder: Path) -> list[Path]:
    """The manifests of the workers."""
    return sorted(folder.glob("manifest-*.jsonl"))


def lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where each whole line of a manifest begins, and what it says."""
    start = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("id"), str) and line.endswith(b"\n"):
                yield start, record
            start += len(line)


def settled(folder: Path) -> dict[str, tuple[str, str]]:
    """Of each id that is through: its status and the digest of what was asked. A success goes before a failure.

    A success counts if its sound is there in its size.
    """
    sizes = _sizes(folder / "audio")
    found: dict[str, tuple[str, str]] = {}
    for path in files(folder):
        for _, record in lines(path):
            status = record.get("status")
            there = status == ERROR or (status == OK and sizes.get(str(record.get("path"))) == record.get("bytes"))
            if there and (status == OK or found.get(record["id"], (ERROR,))[0] == ERROR):
                found[record["id"]] = status, str(record.get("asked"))
    return found


def _sizes(audio: Path) -> dict[str, int]:
    """The size of each sound by its path in the folder."""
    if not audio.is_dir():
        return {}
    return {f"audio/{drawer.name}/{entry.name}": entry.stat().st_size
            for drawer in os.scandir(audio) if drawer.is_dir() for entry in os.scandir(drawer)}


def key_of(row_id: str) -> int:
    """64 bits that stand for an id where a million of them are kept."""
    return int.from_bytes(hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def merge(folder: Path, order: Mapping[int, int]) -> None:
    """Write manifest.jsonl: one line for each id in `order` (key_of -> its place) that is through."""
    places: dict[int, tuple[bool, int, int]] = {}
    sources = files(folder)
    for number, path in enumerate(sources):
        for start, record in lines(path):
            key, good = key_of(record["id"]), record.get("status") == OK
            if key in order and (good or not places.get(key, (False,))[0]):
                places[key] = good, number, start
    handles = [open(path, "rb") for path in sources]       # noqa: SIM115
    try:
        with whole(folder / "manifest.jsonl", overwrite=True) as temporary, open(temporary, "wb") as merged:
            for key in sorted(places, key=order.__getitem__):
                _, number, start = places[key]
                handles[number].seek(start)
                merged.write(handles[number].readline())
    finally:
        for handle in handles:
            handle.close()

"""What is known of the rows of a job: lines of JSON that each worker appends to its own file, merged at the end."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ldm2.batch.local import Folder
from ldm2.batch.remote import Remote
from ldm2.batch.rows import key_of

OK, ERROR = "ok", "error"
_DECODER = json.JSONDecoder()
_SOUND = re.compile(r"[0-9a-f]{32}\.")


def files(place: Folder | Remote) -> list[str]:
    """The manifests of the workers."""
    return [name for name in place.names() if name.startswith("manifest-") and name.endswith(".jsonl")]


def lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where each whole line of a manifest begins, and what it says."""
    start = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                text = line.decode()
                record, end = _DECODER.raw_decode(text)    # half the time of json.loads
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and isinstance(record.get("id"), str) and text[end:] == "\n":
                yield start, record
            start += len(line)


def written(place: Folder | Remote, worker: str) -> dict[str, dict[str, Any]]:
    """What a worker has written, by the ids."""
    own = [name for name in files(place) if name.startswith((f"manifest-{worker}.", f"manifest-{worker}-"))]
    with place.read(own) as paths:
        return {record["id"]: record for path in paths for _, record in lines(path)}


def settled(place: Folder | Remote) -> dict[int, int]:
    """Of each id that is through (by its key): `mark` of how it ended. A success goes before a failure.

    A success counts if its sound is there in its size.
    """
    sizes = {int(name[:16], 16): size for name, size in place.sizes() if _SOUND.match(name)}
    found: dict[int, int] = {}
    with place.read(files(place)) as paths:
        for _, record in itertools.chain.from_iterable(map(lines, paths)):
            key, status = key_of(record["id"]), record.get("status")
            if status == OK and sizes.get(key, -1) == record.get("bytes"):
                found[key] = mark(OK, str(record.get("asked")))
            elif status == ERROR and not found.get(key, 0) & 1:
                found[key] = mark(ERROR, str(record.get("asked")))
    return found


def mark(status: str, asked: str) -> int:
    """How a row ended and for what was asked (its digest), in 64 bits."""
    try:
        return int(asked[:15] or "0", 16) << 1 | (status == OK)
    except ValueError:                                     # no line of ours
        return int(status == OK)


def status_of(mark: int) -> str:
    """How a row ended."""
    return OK if mark & 1 else ERROR


def merge(place: Folder | Remote, order: Mapping[int, int]) -> None:
    """Write manifest.jsonl: one line for each id in `order` (its key -> its place) that is through."""
    found: dict[int, tuple[bool, int, int]] = {}
    with place.read(files(place)) as sources, ExitStack() as stack:
        for number, path in enumerate(sources):
            for start, record in lines(path):
                key, good = key_of(record["id"]), record.get("status") == OK
                if key in order and (good or not found.get(key, (False,))[0]):
                    found[key] = good, number, start
        handles = [stack.enter_context(open(path, "rb")) for path in sources]
        with place.written("manifest.jsonl") as temporary, open(temporary, "wb") as merged:
            for key in sorted(found, key=order.__getitem__):
                _, number, start = found[key]
                handles[number].seek(start)
                merged.write(handles[number].readline())

"""Text tags inside sound files, where libsndfile's own are not enough.

WAV: libsndfile loses every tag if one has 2048 bytes or more, and a very long one makes the file unreadable. So the
LIST chunk of a WAV file is written and read here ("Multimedia Programming Interface and Data Specifications 1.0",
1991, chapter 2: RIFF, LIST, INFO).
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

WAV_IDS = {"title": b"INAM", "software": b"ISFT", "comment": b"ICMT"}
MAX_BYTES = 16_000                         # per tag, in UTF-8: three of them still fit into the one page that Opus has


def check(metadata: Mapping[str, str]) -> dict[str, str]:
    """The tags that can be written, empty ones left out. One that is too long is left out with a logged warning.

    Raises ValueError for an unknown name, a value that is not a string, or a zero character.
    """
    kept = {}
    for name, text in metadata.items():
        if name not in WAV_IDS:
            raise ValueError(f"a tag must be one of {', '.join(WAV_IDS)}, got {name!r}")
        if not isinstance(text, str) or "\0" in text:
            raise ValueError(f"the tag {name} must be a string without zero characters, got {text!r:.80}")
        size = len(text.encode())
        if size > MAX_BYTES:
            logger.warning("the tag %s has %d bytes and was left out: the limit is %d", name, size, MAX_BYTES)
        elif text:
            kept[name] = text
    return kept


def clean(metadata: Mapping[str, str], container: str) -> dict[str, str]:
    """The tags that libsndfile has read, without what it added, and with UTF-8 where it took it for Latin-1."""
    cleaned = {}
    for name, text in metadata.items():
        if name == "software":
            text = re.sub(r" \(libsndfile-[^)]*\)$", "", text)
        if container == "MP3":
            text = _utf8_from_latin1(text)
        if name in WAV_IDS and text:
            cleaned[name] = text
    return cleaned


def _utf8_from_latin1(text: str) -> str:
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:                   # it was no UTF-8: a tag of another program, read rightly
        return text


def append_wav(file: BinaryIO, metadata: Mapping[str, str]) -> None:
    """Append tags as a LIST chunk to a WAV file open for reading and writing ("r+b")."""
    content = b"INFO"
    for name, text in metadata.items():
        content += _chunk(WAV_IDS[name], text.encode() + b"\0")
    end = file.seek(0, 2)
    file.write(b"\0" * (end % 2) + _chunk(b"LIST", content))
    size = file.tell() - 8
    file.seek(4)
    file.write(struct.pack("<I", size))


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def read_wav(path: Path) -> dict[str, str]:
    """The tags of a WAV file, from all its LIST chunks. A damaged chunk ends the search."""
    names = {chunk_id: name for name, chunk_id in WAV_IDS.items()}
    metadata = {}
    with open(path, "rb") as file:
        file_end = file.seek(0, 2)
        for chunk_id, start, end in _chunks(file, 12, file_end):
            file.seek(start)
            if chunk_id != b"LIST" or file.read(4) != b"INFO":
                continue
            for entry_id, entry_start, entry_end in _chunks(file, start + 4, end):
                file.seek(entry_start)
                text = file.read(entry_end - entry_start).split(b"\0")[0].decode("utf-8", "replace")
                if entry_id in names and text:
                    metadata[names[entry_id]] = text
    return clean(metadata, "WAV")


def _chunks(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of each chunk between two positions."""
    while start + 8 <= end:
        file.seek(start)
        name, size = struct.unpack("<4sI", file.read(8))
        yield name, start + 8, min(start + 8 + size, end)
        start += 8 + size + size % 2

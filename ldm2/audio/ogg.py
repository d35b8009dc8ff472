"""Whether an Ogg file (Vorbis, Opus) is whole: decoders skip damaged pages without a word, and the sound is shorter.

Reference: "The Ogg Encapsulation Format Version 0", RFC 3533, section 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

POLYNOMIAL = 0x04C11DB7
LAST = 4                                   # flag of the page that ends a stream


def check(path: Path) -> None:
    """Raises ValueError if the pages of an Ogg file do not follow each other to its end, or one is damaged."""
    data, place, flags = path.read_bytes(), 0, 0
    for start, end in _pages(data):
        if _checksum(data[start:end]) != int.from_bytes(data[start + 22 : start + 26], "little"):
            raise ValueError(f"{path} is damaged: the Ogg page at byte {start} of {len(data)} has another checksum")
        place, flags = end, data[start + 5]
    if place < len(data) or not flags & LAST:
        raise ValueError(f"{path} is damaged: no whole Ogg page at byte {place} of {len(data)}")


def _pages(data: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the whole pages that follow each other from the beginning."""
    place = 0
    while data[place : place + 4] == b"OggS" and len(data) >= place + 27:
        segments = data[place + 27 : place + 27 + data[place + 26]]
        end = place + 27 + data[place + 26] + sum(segments)
        if len(segments) < data[place + 26] or end > len(data):
            return
        yield place, end
        place = end


def _table() -> list[int]:
    """The remainders of all bytes."""
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = value << 1 ^ (POLYNOMIAL if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return table


_TABLE = _table()


def _checksum(page: bytes) -> int:
    """CRC of a page whose own field counts as zero."""
    value = 0
    for byte in page[:22] + bytes(4) + page[26:]:
        value = (value << 8 & 0xFFFFFFFF) ^ _TABLE[value >> 24 ^ byte]
    return value

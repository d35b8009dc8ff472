"""Whether an MP3 file is whole: decoders skip what they cannot read without a word, and the sound comes out shorter.

Reference: ISO/IEC 11172-3, 2.4.1.3 and 2.4.2.3 (the header of a frame), and 13818-3 for the lower sampling rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

BITRATES = {                               # kbit/s of layer III by the version's bits: MPEG 1, and 2 or 2.5
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
BITRATES[0] = BITRATES[2]
RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8000)}
TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3", b"3DI")                 # that may follow the last frame


def check(path: Path) -> None:
    """Raises ValueError if the frames of an MP3 file do not follow each other from the first to the end of the file.

    A file of free bitrate, whose headers do not tell the length of a frame, is not looked at.
    """
    data = path.read_bytes()
    start = _first(data)
    if start is None:
        return
    ends = [start, *_ends(data, start)]
    rest, stated = data[ends[-1]:], _stated_frames(data[start : ends[1]])
    if rest.strip(b"\0") and not rest.startswith(TAGS):
        raise ValueError(f"{path} is damaged: no MP3 frame at byte {ends[-1]} of {len(data)}")
    if stated is not None and len(ends) - 2 < stated:
        raise ValueError(f"{path} is damaged: {len(ends) - 2} of {stated} MP3 frames are there")


def _first(data: bytes) -> int | None:
    """Where the first frame begins that another one follows; None where there is none."""
    place = _after_id3(data)
    while (place := data.find(b"\xff", place)) >= 0:
        length = frame_length(data[place : place + 4])
        if length is not None and frame_length(data[place + length : place + length + 4]) is not None:
            return place
        place += 1
    return None


def _stated_frames(first: bytes) -> int | None:
    """The number of frames after the first one, if that is the table of contents that LAME and others write."""
    place = max(first.find(b"Xing"), first.find(b"Info"))
    if place < 0 or not first[place + 7 : place + 8] or not first[place + 7] & 1:
        return None
    return int.from_bytes(first[place + 8 : place + 12], "big")


def _ends(data: bytes, place: int) -> Iterator[int]:
    """The ends of the frames that follow each other from `place` on; one that is cut off does not count."""
    while (length := frame_length(data[place : place + 4])) is not None and place + length <= len(data):
        place += length
        yield place


def _after_id3(data: bytes) -> int:
    """Where an ID3v2 tag ends, 0 without one."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    size = data[6] << 21 | data[7] << 14 | data[8] << 7 | data[9]
    return 10 + size


def frame_length(header: bytes) -> int | None:
    """Bytes of the layer III frame that four bytes begin; None if they begin none, or one of free bitrate."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    version, bitrate, rate, padding = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version == 1 or bitrate in (0, 15) or rate == 3:
        return None
    samples_by_8 = 144 if version == 3 else 72
    return samples_by_8 * 1000 * BITRATES[version][bitrate - 1] // RATES[version][rate] + padding

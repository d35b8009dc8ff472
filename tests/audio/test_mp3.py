"""Damaged MP3 files are named; whole ones, of any rate and with any tags, are not."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from ldm2 import audio
from ldm2.audio import mp3


@pytest.fixture
def whole(tmp_path):
    """Bytes of a whole MP3 file."""
    soundfile.write(tmp_path / "x.mp3", 0.1 * np.random.default_rng(0).standard_normal(44_100), 44_100)
    return (tmp_path / "x.mp3").read_bytes()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_a_whole_file_of_any_rate_passes(tmp_path, rate, channels):
    waveform = 0.1 * np.random.default_rng(rate).standard_normal((channels, rate // 2)).astype(np.float32)
    audio.write(tmp_path / "x.mp3", waveform, rate, metadata={"title": "x" * 300, "comment": "y" * 3000})
    mp3.check(tmp_path / "x.mp3")


@pytest.mark.parametrize("tag", [b"TAG" + b"x" * 125, b"APETAGEX" + b"y" * 24, b"", b"\0" * 100])
def test_tags_may_follow_the_sound(tmp_path, whole, tag):
    (tmp_path / "x.mp3").write_bytes(whole + tag)
    mp3.check(tmp_path / "x.mp3")


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],
    lambda data: data[:3000] + data[3137:],
    lambda data: data[:3000] + bytes(1000) + data[4000:],
    lambda data: data[:3000] + b"abc" + data[3000:],
    lambda data: data + b"and something else",
], ids=["cut off", "bytes lost", "zeros", "bytes added", "more behind it"])
def test_a_damaged_file_is_named(tmp_path, whole, damage):
    (tmp_path / "x.mp3").write_bytes(damage(whole))
    with pytest.raises(ValueError, match=r"x\.mp3 is damaged"):
        audio.read(tmp_path / "x.mp3")


def test_a_file_cut_at_the_border_of_a_frame_lacks_frames(tmp_path, whole):
    ends = list(mp3._ends(whole, mp3._first(whole)))
    (tmp_path / "x.mp3").write_bytes(whole[: ends[-3]])
    with pytest.raises(ValueError, match=r"damaged.*frames are there"):
        mp3.check(tmp_path / "x.mp3")

"""A damaged sound file is named; it is not taken for a shorter sound."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from ldm2 import audio

SOUND = 0.1 * np.random.default_rng(0).standard_normal((16_000, 2))
FORMATS = {
    "WAV": "PCM_16", "WAVEX": "PCM_24", "RF64": "PCM_16", "W64": "PCM_16", "AIFF": "PCM_16", "AU": "PCM_16",
    "CAF": "PCM_16", "FLAC": "PCM_16", "OGG": "VORBIS", "OGG Opus": "OPUS", "MP3": "MPEG_LAYER_III",
}


def whole(name: str) -> bytes:
    """A file of a format."""
    file = io.BytesIO()
    soundfile.write(file, SOUND, 16_000, format=name.split()[0], subtype=FORMATS[name])
    return file.getvalue()


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_file_is_read_whole(tmp_path, name):
    (tmp_path / "x").write_bytes(whole(name))
    assert audio.read_channels(tmp_path / "x")[0].shape == (2, 16_000)


@pytest.mark.parametrize("lost", [10, 4000, 0.5])
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_cut_off_is_named(tmp_path, name, lost):
    data = whole(name)
    (tmp_path / "x").write_bytes(data[: -lost if lost > 1 else len(data) // 2])
    with pytest.raises(ValueError, match="x "):
        audio.read_channels(tmp_path / "x")


@pytest.mark.parametrize("damage", [
    lambda data: data[:5000] + data[6000:], lambda data: data[:5000] + bytes(500) + data[5500:],
], ids=["bytes lost", "zeros"])
@pytest.mark.parametrize("name", ["FLAC", "OGG", "OGG Opus", "MP3"])
def test_a_damaged_middle_of_compressed_sound_is_named(tmp_path, name, damage):
    (tmp_path / "x").write_bytes(damage(whole(name)))
    with pytest.raises(ValueError, match="x "):
        audio.read_channels(tmp_path / "x")


@pytest.mark.parametrize("size", [2**31 - 1, 2**32 - 1])
def test_a_wav_file_that_was_written_to_a_pipe_is_read(tmp_path, size):
    """Programs that cannot go back state the largest size."""
    data = bytearray(whole("WAV"))
    place = data.index(b"data") + 4
    data[4:8] = data[place : place + 4] = size.to_bytes(4, "little")
    (tmp_path / "x").write_bytes(data)
    assert audio.read_channels(tmp_path / "x")[0].shape == (2, 16_000)

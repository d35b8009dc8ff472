"""What is done to a sound on its way into a file: loudness against the numbers of the standards, trim, resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import soundfile

import ldm2
from ldm2.audio.finish import finish, trim
from ldm2.audio.loudness import gain_to, loudness
from ldm2.settings import Output
from tests.helpers import tone


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_a_full_scale_sine_of_997_hz_is_minus_3_01_lufs(rate):
    """ITU-R BS.1770-5, annex 1; the tolerance is that of EBU Tech 3341 for meters."""
    assert loudness(tone(5, rate, hz=997, level=1.0)[None], rate) == pytest.approx(-3.01, abs=0.1)


def test_two_channels_are_3_db_louder_and_half_the_level_6_db_softer():
    one = tone(3, 48_000, hz=997, level=0.5)
    assert loudness(np.stack([one, one]), 48_000) - loudness(one[None], 48_000) == pytest.approx(3.01, abs=0.01)
    assert loudness(one[None] / 2, 48_000) - loudness(one[None], 48_000) == pytest.approx(-6.02, abs=0.01)


def test_silence_between_sounds_does_not_count():
    """EBU Tech 3341, test 3 in kind: the gates leave out what is silent."""
    heard = tone(5, 48_000, hz=997, level=0.1)
    assert loudness(np.concatenate([heard, np.zeros(240_000, np.float32)])[None], 48_000) == pytest.approx(
        loudness(heard[None], 48_000), abs=0.2)


def test_silence_has_no_loudness_and_is_left_alone():
    assert loudness(np.zeros((1, 48_000)), 48_000) == -math.inf
    assert gain_to(np.zeros((1, 48_000)), 48_000, -16) == gain_to(np.zeros((1, 10)), 48_000, "peak") == 1.0


def test_a_gain_reaches_the_loudness_but_never_passes_full_scale():
    sound = tone(3, 48_000, hz=997, level=0.01)[None]
    assert loudness(sound * gain_to(sound, 48_000, -20), 48_000) == pytest.approx(-20, abs=0.01)
    assert np.abs(sound * gain_to(sound, 48_000, 0)).max() == pytest.approx(1)


def test_trim_keeps_a_margin_and_what_is_silent_throughout():
    sound = np.zeros((2, 16_000), np.float32)
    sound[1, 5000:6000] = 0.5
    assert trim(sound, 16_000).shape == (2, 1000 + 2 * 160)
    assert np.array_equal(trim(sound[:1], 16_000), sound[:1])


def test_nothing_asked_changes_nothing():
    sound = np.random.default_rng(0).standard_normal((1, 100))
    assert finish(sound, 16_000, Output())[0] is sound


@pytest.fixture(scope="module")
def result():
    return ldm2.generate("a low tone", model="tiny", steps=2, seed=0, num_waveforms=2)


def test_a_result_is_written_as_asked(result, tmp_path):
    paths = result.save(tmp_path / "x.wav", subtype="PCM_24", sample_rate=44_100, normalize="peak")
    for path in paths:
        info = soundfile.info(path)
        assert (info.samplerate, info.subtype, info.frames) == (44_100, "PCM_24", round(2.56 * 44_100))
        assert np.abs(soundfile.read(path)[0]).max() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("form, words", [
    ({"subtype": "PCM_12"}, "subtype.*PCM_12.*PCM_24"), ({"normalize": "loud"}, "normalize.*loud"),
    ({"normalize": 3}, "normalize.*-70 to 0 LUFS, got 3"), ({"sample_rate": 0}, "sample_rate.*0"),
    ({"trimm": True}, "trimm.*trim"),
])
def test_a_wrong_form_is_refused_before_anything_is_written(result, tmp_path, form, words):
    with pytest.raises(ValueError, match=words):
        result.save(tmp_path / "x.wav", **form)
    assert not list(tmp_path.iterdir())

"""Joining an edited sound to its input: in time, in frequency, and around it."""

import math

import numpy as np
import pytest

from ldm2.edit import paste
from ldm2.edit.masks import merge_ranges
from tests.helpers import noise, tone

RATE = 16_000


TIMES = [(0.25, 0.5), (0.7, 0.9)]


def inside(times, num_samples, rate=RATE):
    t = np.arange(num_samples) / rate
    return np.logical_or.reduce([(t >= a) & (t < b) for a, b in times])


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 48_000])
def test_outside_the_ranges_every_sample_is_the_original(rate):
    original, edited = noise(2, rate), noise(rate, seed=1)
    result = paste.paste(original, edited, TIMES, rate)
    outside = ~inside(TIMES, rate, rate)
    assert result.dtype == np.float32
    assert result[:, outside].tobytes() == original[:, outside].tobytes()
    assert (result[:, ~outside] != original[:, ~outside]).all()


def test_between_the_crossfades_every_sample_is_the_edited():
    original, edited = noise(RATE), noise(RATE, seed=1)
    middle = inside([(a + 0.02, b - 0.02) for a, b in TIMES], RATE)
    assert np.array_equal(paste.paste(original, edited, TIMES, RATE)[middle], edited[middle])


def test_the_crossfade_has_equal_power():
    original, edited = np.ones(RATE, np.float32), np.zeros(RATE, np.float32)
    fades_out = paste.paste(original, edited, TIMES, RATE)
    fades_in = paste.paste(edited, original, TIMES, RATE)
    np.testing.assert_allclose(fades_out ** 2 + fades_in ** 2, 1, atol=1e-6)


def test_the_crossfade_is_monotonic_and_as_long_as_asked():
    result = paste.paste(np.ones(RATE, np.float32), np.zeros(RATE, np.float32), [(0.25, 0.5)], RATE, crossfade=0.05)
    falling = result[4000:4800]
    assert (np.diff(falling) < 0).all()
    assert falling[0] > 0.999
    assert 0 < falling[-1] < 0.01
    assert (result[4800:7200] == 0).all()
    assert np.array_equal(result[4000:8000], result[4000:8000][::-1])


def test_without_a_crossfade_the_edit_is_cut_in():
    original, edited = noise(RATE), noise(RATE, seed=1)
    result = paste.paste(original, edited, [(0.25, 0.5)], RATE, crossfade=0)
    assert np.array_equal(result, np.concatenate([original[:4000], edited[4000:8000], original[8000:]]))


def test_a_crossfade_takes_at_most_half_of_a_range():
    result = paste.paste(np.ones(RATE, np.float32), np.zeros(RATE, np.float32), [(0.25, 0.26)], RATE)
    assert result[4000:4160].min() < 0.02
    assert (result[:4000] == 1).all() and (result[4160:] == 1).all()


def test_the_ends_of_the_sound_have_no_crossfade():
    original, edited = noise(RATE), noise(RATE, seed=1)
    result = paste.paste(original, edited, [(None, 0.25), (0.75, None)], RATE)
    assert np.array_equal(result[:3000], edited[:3000])
    assert np.array_equal(result[-3000:], edited[-3000:])


def test_the_whole_sound_is_the_edited_one():
    original, edited = noise(RATE), noise(RATE, seed=1)
    assert np.array_equal(paste.paste(original, edited, [(None, None)], RATE), edited)


def test_pasting_changes_neither_sound():
    original, edited = noise(RATE), noise(RATE, seed=1)
    before = original.copy(), edited.copy()
    paste.paste(original, edited, TIMES, RATE)
    assert np.array_equal(original, before[0]) and np.array_equal(edited, before[1])


@pytest.mark.parametrize("length, times, crossfade, message", [
    (100, [(0, 0.1)], 0.02, "edited must have the 16000 samples of original, got 100"),
    (RATE, [(0.5, 1.5)], 0.02, "the range 0.5:1.5 s is not within 0:1 s"),
    (RATE, [(0.5, 0.50001)], 0.02, "the range 0.5:0.50001 s is shorter than one sample"),
    (RATE, [(0, 0.1)], -0.1, "crossfade must be.* got -0.1"),
])
def test_what_cannot_be_pasted_is_named(length, times, crossfade, message):
    with pytest.raises(ValueError, match=message):
        paste.paste(noise(RATE), noise(length), times, RATE, crossfade)


def test_bands_come_from_the_edited_sound_and_the_rest_from_the_original():
    original = tone(1, hz=1000, level=1) + tone(1, hz=6000, level=1)
    low, high = tone(1, hz=1500), tone(1, hz=5000, level=0.25)
    result = paste.blend_bands(original, low + high, [(4000, None)], RATE)
    np.testing.assert_allclose(result[2000:-2000], (tone(1, hz=1000, level=1) + high)[2000:-2000], atol=1e-3)


def test_an_equal_sound_is_blended_to_itself():
    original = noise(2, RATE)
    np.testing.assert_allclose(paste.blend_bands(original, original, [(4000, None)], RATE), original, atol=1e-7)


def test_one_edited_channel_serves_all():
    original = noise(2, RATE)
    result = paste.blend_bands(original, noise(RATE, seed=1), [(4000, None)], RATE)
    alone = paste.blend_bands(original[1], noise(RATE, seed=1), [(4000, None)], RATE)
    np.testing.assert_allclose(result[1], alone, atol=1e-6)


def test_an_impossible_band_is_named():
    with pytest.raises(ValueError, match="the range 4000:9000 Hz is not within 0:8000 Hz"):
        paste.blend_bands(noise(RATE), noise(RATE), [(4000, 9000)], RATE)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (10,), (2, 10)])
def test_length_is_cut_or_filled_with_zeros(shape):
    waveform = noise(*shape)
    fitted = paste.fit_length(waveform, 7)
    assert fitted.shape == (*shape[:-1], 7)
    known = min(7, shape[-1])
    assert np.array_equal(fitted[..., :known], waveform[..., :known])
    assert (fitted[..., known:] == 0).all()


def test_an_extended_sound_stands_between_the_ranges():
    canvas, ranges = paste.extend_canvas(noise(2, RATE), RATE, before=0.5, after=0.25)
    assert canvas.shape == (2, 28_000)
    assert np.array_equal(canvas[:, 8000:24_000], noise(2, RATE))
    assert merge_ranges(ranges, 1.75) == ((0.0, 0.52), (1.48, 1.75))


def test_an_extended_sound_is_pasted_without_a_hole():
    original = np.ones(RATE, np.float32)
    canvas, ranges = paste.extend_canvas(original, RATE, after=0.5)
    result = paste.paste(canvas, np.ones(24_000, np.float32), ranges, RATE)
    assert np.array_equal(result[:15_680], original[:15_680])
    assert result.min() == 1


def test_an_extension_may_be_on_one_side():
    assert paste.extend_canvas(noise(RATE), RATE, after=0.5)[1] == [(0.98, None)]
    assert paste.extend_canvas(noise(RATE), RATE, before=0.5)[1] == [(None, 0.52)]


@pytest.mark.parametrize("before, after, message", [(0, 0, "seconds before or after, got 0 and 0"),
                                                    (-1, 1, "from 0 up, got -1"), (math.nan, 1, "from 0 up, got nan")])
def test_an_impossible_extension_is_named(before, after, message):
    with pytest.raises(ValueError, match=message):
        paste.extend_canvas(noise(RATE), RATE, before, after)

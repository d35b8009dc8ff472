"""Sounds by formulas and their captions."""

import numpy as np
import pytest

from ldm2.training.tiny.sounds import KINDS, LABELS, NUM_SAMPLES, all_captions, caption, halves, make_waveform, sounds


def strongest_hertz(waveform: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(waveform)).argmax() * 16_000 / len(waveform))


def test_the_same_seed_gives_the_same_sounds():
    first, second = (list(sounds(3, 4)) for _ in range(2))
    for a, b in zip(first, second):
        assert a.caption == b.caption
        np.testing.assert_array_equal(a.waveform, b.waveform)


def test_another_seed_gives_other_sounds():
    assert [s.caption for s in sounds(1, 8)] != [s.caption for s in sounds(2, 8)]


@pytest.mark.parametrize("label", LABELS)
def test_every_label_gives_finite_samples_in_range(label):
    wave = make_waveform(np.random.default_rng(0), label, "loud")
    assert wave.shape == (NUM_SAMPLES,)
    assert wave.dtype == np.float32
    assert np.abs(wave).max() <= 1 and wave.std() > 1e-3


@pytest.mark.parametrize("label", ["low tone", "middle tone", "high tone"])
def test_tones_lie_on_the_grid_of_the_frame_rate(label):
    hertz = strongest_hertz(make_waveform(np.random.default_rng(5), label))
    assert abs(hertz - 100 * round(hertz / 100)) < 1


def test_the_floor_between_two_clicks_repeats_every_hop_60_db_below_full_scale():
    wave = make_waveform(np.random.default_rng(2), "slow clicks").astype(np.float64)
    quietest = min(wave[: len(wave) // 320 * 320].reshape(-1, 320), key=np.ptp)
    assert -62 < 20 * np.log10(np.std(quietest)) < -59
    np.testing.assert_allclose(quietest[:160], quietest[160:], atol=1e-6)


def test_a_rising_sweep_is_higher_at_its_end():
    wave = make_waveform(np.random.default_rng(1), "rising sweep")
    assert strongest_hertz(wave[-8000:]) > 3 * strongest_hertz(wave[:8000])


def test_loud_is_ten_times_as_strong_as_quiet():
    loud, quiet = (make_waveform(np.random.default_rng(1), "siren", level) for level in ("loud", "quiet"))
    assert loud.std() / quiet.std() == pytest.approx(0.75 / 0.06, rel=1e-3)


def test_a_pair_has_its_first_half_first():
    wave = make_waveform(np.random.default_rng(1), "low tone, then high tone")
    assert strongest_hertz(wave[: NUM_SAMPLES // 2]) < 500 < 1500 < strongest_hertz(wave[NUM_SAMPLES // 2 :])


def test_halves_of_a_plain_kind_are_none():
    assert halves("siren") is None
    assert halves("low tone, then high tone") == ("low tone", "high tone")


@pytest.mark.parametrize("kind", KINDS)
def test_captions_have_the_right_article_and_no_holes(kind):
    rng = np.random.default_rng(0)
    for level in ("loud", "", "quiet"):
        for _ in range(20):
            text = caption(rng, kind, level)
            assert "{" not in text and "[" not in text and "  " not in text and text == text.strip()
            assert " a a" not in f" {text}" and "a alarm" not in text and "an quiet" not in text


def test_all_captions_are_distinct_and_cover_what_is_drawn():
    every = all_captions()
    assert len(every) == len(set(every))
    assert set(every) >= {s.caption for s in sounds(0, 40) if halves(s.kind) is None and s.level == ""}


def test_an_unknown_label_is_refused():
    with pytest.raises(ValueError, match="'quack'"):
        make_waveform(np.random.default_rng(0), "quack")


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="'deafening'"):
        make_waveform(np.random.default_rng(0), "siren", "deafening")

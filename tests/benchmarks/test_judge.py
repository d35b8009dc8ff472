"""The judge of benchmarks/judge.py, on sounds made by formulas."""

import numpy as np
import pytest

from benchmarks.judge import is_right, measure
from ldm2.training.tiny.sounds import LABELS, make_waveform


@pytest.fixture(scope="module")
def real() -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(11)
    return {label: [make_waveform(rng, label, level) for level in ("", "loud", "quiet")] for label in LABELS}


def test_nearly_all_real_sounds_pass(real):
    passed = [is_right(wave, label) for label, waves in real.items() for wave in waves]
    assert np.mean(passed) >= 0.95


def test_hardly_any_sound_passes_for_another_label(real):
    passed = [is_right(waves[0], other) for label, waves in real.items() for other in LABELS if other != label]
    assert np.mean(passed) <= 0.05


@pytest.mark.parametrize("label", LABELS)
def test_silence_passes_for_nothing(label):
    assert not is_right(np.zeros(40_960), label)


def test_the_pitch_of_a_sine_is_found_within_five_hertz():
    sine = 0.3 * np.sin(2 * np.pi * 437 * np.arange(40_960) / 16_000)
    assert np.median(measure(sine).pitch) == pytest.approx(437, abs=5)


def test_onsets_of_clicks_are_counted_once_each():
    wave = np.zeros(40_960)
    wave[4000::8000] = 1.0
    assert len(measure(wave).onsets) == 5


def test_level_does_not_change_the_verdict(real):
    assert is_right(0.1 * real["siren"][0], "siren")


def test_an_unknown_label_is_refused():
    with pytest.raises(ValueError, match="'quack'"):
        is_right(np.zeros(40_960), "quack")

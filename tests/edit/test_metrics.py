"""Distances between sounds, against closed forms."""

import math

import numpy as np
import pytest
import torch

from ldm2.edit import metrics
from ldm2.mel import MEL_16KHZ

SOUND = (0.1 * np.random.default_rng(0).standard_normal(16_000)).astype(np.float32)
SILENCE = np.zeros(16_000, np.float32)


def test_a_sound_has_no_distance_to_itself():
    assert metrics.compare(SOUND, SOUND, MEL_16KHZ) == {
        "log_mel_distance": 0, "spectral_convergence": 0, "multi_resolution_stft": 0, "level_difference": 0,
    }


def test_half_the_level_has_known_distances():
    distances = metrics.compare(SOUND, SOUND / 2, MEL_16KHZ)
    assert distances["log_mel_distance"] == pytest.approx(math.log(2), abs=1e-3)
    assert distances["spectral_convergence"] == pytest.approx(0.5, abs=1e-6)
    assert distances["multi_resolution_stft"] == pytest.approx(0.5 + math.log(2), abs=1e-3)
    assert distances["level_difference"] == pytest.approx(20 * math.log10(0.5), abs=1e-6)


def test_silence_for_a_sound_loses_all_of_its_spectrum():
    assert metrics.spectral_convergence(SOUND, SILENCE) == pytest.approx(1)
    assert metrics.spectral_convergence(SILENCE, SOUND) == math.inf
    assert metrics.compare(SILENCE, SILENCE, MEL_16KHZ)["spectral_convergence"] == 0


def test_the_level_of_a_sine_of_full_scale_is_minus_3_db():
    assert metrics.level(np.sin(2 * math.pi * 100 * np.arange(16_000) / 16_000)) == pytest.approx(-3.0103, abs=1e-4)
    assert metrics.level(SILENCE) == -100


def test_compare_gives_each_distance_from_one_look_at_each_resolution(monkeypatch):
    looks = []
    alone = metrics.spectral_convergence(SOUND, SOUND[::-1]), metrics.multi_resolution_stft(SOUND, SOUND[::-1])
    look = metrics._spectral_distances
    monkeypatch.setattr(metrics, "_spectral_distances", lambda *given: looks.append(given[2:]) or look(*given))
    distances = metrics.compare(SOUND, SOUND[::-1], MEL_16KHZ)
    assert (distances["spectral_convergence"], distances["multi_resolution_stft"]) == alone
    assert looks == list(metrics.RESOLUTIONS)


@pytest.mark.parametrize("length", [1, 159, 161, 1000])
def test_any_length_has_a_distance(length):
    distances = metrics.compare(SOUND[:length], -0.5 * SOUND[:length], MEL_16KHZ)
    assert all(math.isfinite(value) for value in distances.values())


def test_two_lengths_are_refused():
    with pytest.raises(ValueError, match=r"length.*\(16000,\) and \(100,\)"):
        metrics.compare(SOUND, SOUND[:100], MEL_16KHZ)


@pytest.mark.parametrize("length", [1, 700, 20_000])
def test_long_sounds_are_compared_piece_by_piece(monkeypatch, length):
    a, b = (np.random.default_rng(seed).standard_normal(length) for seed in (0, 1))
    whole = metrics.spectral_convergence(a, b), metrics.multi_resolution_stft(a, b)
    monkeypatch.setattr(metrics, "FRAMES_AT_ONCE", 7)
    pieces = metrics.spectral_convergence(a, b), metrics.multi_resolution_stft(a, b)
    assert pieces == pytest.approx(whole, rel=1e-9)


def test_the_spectra_are_those_of_torch_around_each_hop():
    a, b = (torch.from_numpy(np.random.default_rng(seed).standard_normal(3000)) for seed in (0, 1))
    spectra = [torch.stft(x, 512, 50, 240, torch.hann_window(240, dtype=x.dtype), pad_mode="constant",
                          return_complex=True).abs() for x in (a, b)]
    expected = torch.linalg.norm(spectra[0] - spectra[1]) / torch.linalg.norm(spectra[0])
    assert metrics.spectral_convergence(a.numpy(), b.numpy(), 512, 50, 240) == pytest.approx(float(expected), rel=1e-9)

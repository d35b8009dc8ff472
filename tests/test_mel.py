"""The mel front end against the authors' numbers (tests/data/golden_mel.md), transformers' filters and float64 sums."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers.audio_utils import mel_filter_bank as transformers_mel_filter_bank

from ldm2 import mel
from ldm2.mel import (
    MEL_16KHZ,
    MEL_48KHZ,
    MelConfig,
    hz_to_mel,
    log_mel,
    mel_edges,
    mel_filter_bank,
    mel_to_hz,
    normalize_waveform,
    num_mel_frames,
)
from tests.helpers import draw

VARIANTS = {"training": "mel_train_style", "inference": "mel"}
SILENCE = math.log(1e-5)
TINY = MelConfig(n_fft=64, hop_length=16, num_mels=8)


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parent / "data" / "golden_mel.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_16khz_mel_equals_the_authors(golden, variant):
    mel = log_mel(normalize_waveform(golden["16k.wav"])[None], MEL_16KHZ, variant)
    torch.testing.assert_close(mel[0, 0].T, golden["16k." + VARIANTS[variant]], atol=5e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_48khz_mel_equals_the_authors(golden, variant):
    mel = log_mel(golden["48k.wav_normalized"][None], MEL_48KHZ, variant)
    torch.testing.assert_close(mel[0, 0].T, golden["48k." + VARIANTS[variant]], atol=2e-3, rtol=0)


def test_the_authors_whole_path_to_a_padded_mel(golden):
    padded = F.pad(normalize_waveform(golden["16k.wav"]), (0, 128 * 160 - 16_000))
    mel = log_mel(0.5 * padded[None] / padded.abs().max(), variant="inference")[0, 0, :128]
    torch.testing.assert_close(mel, golden["wav_to_fbank.128.fbank"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("name, config", [("16k", MEL_16KHZ), ("48k", MEL_48KHZ)])
def test_filters_have_the_authors_sums_and_peaks(golden, name, config):
    filters = mel_filter_bank(config)
    torch.testing.assert_close(filters.sum(0).float(), golden[f"{name}.mel_basis_rowsum"], atol=1e-7, rtol=0)
    assert torch.equal(filters.argmax(0), golden[f"{name}.mel_basis_argmax"])


@pytest.mark.parametrize("config", [MEL_16KHZ, MEL_48KHZ, MelConfig(num_mels=32),
                                    MelConfig(num_mels=16, f_min=50.0, f_max=7600.0)])
def test_filters_equal_transformers(config):
    expected = transformers_mel_filter_bank(config.n_fft // 2 + 1, config.num_mels, config.f_min, config.f_max,
                                            config.sample_rate, norm="slaney", mel_scale="slaney")
    torch.testing.assert_close(mel_filter_bank(config), torch.from_numpy(expected), atol=1e-12, rtol=1e-9)


def test_mel_equals_a_float64_sum_over_the_definition():
    waveform = 0.1 * draw(1, 100, dtype=torch.float64)
    margin, n_fft = (TINY.n_fft - TINY.hop_length) // 2, TINY.n_fft
    mirrored = torch.cat([waveform[0, 1:margin + 1].flip(0), waveform[0], waveform[0, -margin - 1:-1].flip(0)])
    n = torch.arange(n_fft, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / n_fft)
    turns = torch.outer(torch.arange(n_fft // 2 + 1, dtype=torch.float64), n) / n_fft
    expected = []
    for t in range(100 // TINY.hop_length):
        frame = mirrored[t * TINY.hop_length:][:n_fft] * window
        real, imaginary = (torch.cos(2 * math.pi * turns) @ frame), (torch.sin(2 * math.pi * turns) @ frame)
        magnitude = (real ** 2 + imaginary ** 2).sqrt()
        expected.append(torch.log((magnitude @ mel_filter_bank(TINY)).clamp(min=1e-5)))
    torch.testing.assert_close(log_mel(waveform, TINY)[0, 0], torch.stack(expected), atol=1e-9, rtol=0)


def test_slaney_scale_is_linear_to_1000_hz_and_27_steps_are_a_factor_of_6_4():
    mel = hz_to_mel(torch.tensor([0.0, 200.0, 1000.0, 6400.0], dtype=torch.float64))
    torch.testing.assert_close(mel, torch.tensor([0.0, 3.0, 15.0, 42.0], dtype=torch.float64))


def test_mel_to_hz_inverts_hz_to_mel():
    hz = torch.linspace(0, 24_000, 101, dtype=torch.float64)
    torch.testing.assert_close(mel_to_hz(hz_to_mel(hz)), hz)


def test_edges_reach_from_f_min_to_f_max():
    edges = mel_edges(MEL_48KHZ)
    assert edges.shape == (258,)
    torch.testing.assert_close(edges[[0, -1]], torch.tensor([20.0, 24_000.0], dtype=torch.float64))


@pytest.mark.parametrize("num_samples", [160, 161, 319, 432, 433, 1000, 1600])
@pytest.mark.parametrize("variant, extra", [("training", 0), ("inference", 1)])
def test_number_of_frames(num_samples, variant, extra):
    mel = log_mel(0.1 * draw(2, num_samples), variant=variant)
    assert mel.shape == (2, 1, num_samples // 160 + extra, 64)
    assert num_mel_frames(num_samples, variant=variant) == mel.shape[2]


def test_a_short_waveform_is_continued_with_zeros():
    waveform = 0.1 * draw(1, 200)
    assert torch.equal(log_mel(waveform), log_mel(F.pad(waveform, (0, 433 - 200)))[:, :, :1])


@pytest.mark.parametrize("variant", ["training", "inference"])
def test_the_pieces_of_a_long_waveform_join(monkeypatch, variant):
    waveform = 0.1 * draw(2, 160 * 50 + 7)
    whole = log_mel(waveform, MEL_16KHZ, variant)
    monkeypatch.setattr(mel, "_FRAMES_AT_ONCE", 12)
    torch.testing.assert_close(log_mel(waveform, MEL_16KHZ, variant), whole, atol=1e-5, rtol=0)


def test_the_two_variants_are_half_a_hop_apart():
    waveform = 0.1 * draw(1, 3200)
    half_a_hop_later = log_mel(waveform[:, 80:], variant="inference")[:, :, 5:15]
    torch.testing.assert_close(half_a_hop_later, log_mel(waveform)[:, :, 5:15], atol=1e-4, rtol=0)


def test_an_impulse_lights_the_frame_whose_vocoder_samples_hold_it():
    waveform = torch.zeros(1, 3200)
    waveform[0, 8 * 160 + 80] = 1.0
    assert log_mel(waveform)[0, 0].mean(1).argmax() == 8


def test_a_tone_lights_the_filter_around_its_frequency():
    waveform = torch.sin(2 * math.pi * 1000 * torch.arange(4800) / 16_000)[None]
    edges = mel_edges(MEL_16KHZ)
    strongest = int(log_mel(waveform)[0, 0].mean(0).argmax())
    assert edges[strongest] < 1000 < edges[strongest + 2]


def test_twice_the_amplitude_adds_log_2():
    waveform = 0.1 * draw(1, 1600)
    torch.testing.assert_close(log_mel(2 * waveform), log_mel(waveform) + math.log(2), atol=1e-5, rtol=0)


def test_silence_is_the_floor_everywhere():
    torch.testing.assert_close(log_mel(torch.zeros(1, 800)), torch.full((1, 1, 5, 64), SILENCE))


def test_rows_of_a_batch_do_not_meet():
    waveform = 0.1 * draw(3, 1600)
    alone = torch.cat([log_mel(row[None]) for row in waveform])
    torch.testing.assert_close(log_mel(waveform), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("level", [0.0, 1e-30, 1e-12, 1e-7, 1e-4, 1.0])
def test_gradients_are_finite_at_any_level(level):
    waveform = (level * 0.1 * draw(1, 800)).requires_grad_()
    log_mel(waveform).sum().backward()
    assert waveform.grad.isfinite().all()


def test_gradient_equals_finite_differences():
    waveform = (0.1 * draw(1, 48, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: log_mel(w, TINY), waveform)


def test_tables_made_in_inference_mode_serve_a_later_backward_pass():
    config = dataclasses.replace(TINY, num_mels=7)                           # a layout that no other test has cached
    with torch.inference_mode():
        log_mel(0.1 * draw(1, 100), config)
    waveform = (0.1 * draw(1, 100)).requires_grad_()
    log_mel(waveform, config).sum().backward()
    assert waveform.grad.isfinite().all()


@pytest.mark.parametrize("dtype, expected", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                                             (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_result_is_float32_or_the_wider_type_of_the_waveform(dtype, expected):
    assert log_mel((0.1 * draw(1, 800)).to(dtype)).dtype == expected


def test_autocast_does_not_lower_the_precision():
    waveform = 0.1 * draw(1, 1600)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = log_mel(waveform)
    assert torch.equal(inside, log_mel(waveform))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    waveform = 0.1 * draw(2, 16_000)
    torch.testing.assert_close(log_mel(waveform.cuda()).cpu(), log_mel(waveform), atol=1e-4, rtol=0)


def test_normalized_waveform_has_mean_0_and_peak_one_half():
    waveform = normalize_waveform(3 + 0.1 * draw(2, 1000))
    torch.testing.assert_close(waveform.mean(1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(waveform.abs().amax(1), torch.full((2,), 0.5), atol=1e-6, rtol=0)


def test_normalized_silence_is_silence():
    assert torch.equal(normalize_waveform(torch.full((1, 10), 0.25)), torch.zeros(1, 10))


@pytest.mark.parametrize("waveform, message", [
    (torch.zeros(1600), r"shape \(B, N\), got \(1600,\)"),
    (torch.zeros(1, 1600, dtype=torch.int16), "floating-point samples, got torch.int16"),
    (torch.zeros(1, 159), "at least hop_length = 160 samples, got 159"),
    (torch.zeros(1, 0), "at least hop_length = 160 samples, got 0"),
])
def test_a_wrong_waveform_is_named(waveform, message):
    with pytest.raises(ValueError, match=message):
        log_mel(waveform)


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="'training' or 'inference', got 'middle'"):
        log_mel(torch.zeros(1, 1600), variant="middle")


@pytest.mark.parametrize("change, message", [
    ({"num_mels": 0}, "num_mels must be at least 1, got 0"),
    ({"sample_rate": -1}, "sample_rate must be at least 1, got -1"),
    ({"hop_length": 161}, "must be even and not negative, got 1024 - 161"),
    ({"hop_length": 2048}, "must be even and not negative, got 1024 - 2048"),
    ({"f_min": -1.0}, "0 <= f_min < f_max"),
    ({"f_min": 8000.0}, "0 <= f_min < f_max"),
    ({"f_max": 8001.0}, "f_max 8001.0, sample_rate 16000"),
])
def test_an_impossible_layout_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MEL_16KHZ, **change)

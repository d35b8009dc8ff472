"""Losses, loops and data of the training, on sizes that take seconds."""

import math

import pytest
import torch
from torch import nn

from ldm2.config import VAEConfig, VocoderConfig
from ldm2.mel import log_mel
from ldm2.training import autoencoder
from ldm2.training.loop import Clock, OutOfTime, Recipe, train
from ldm2.training.tiny import contrast, text, vocoding
from ldm2.training.tiny.data import Pool, collect, formula_pool
from ldm2.training.tiny.sounds import sounds
from ldm2.training.tiny.train import VAE_FIELDS, VOCODER_FIELDS, main
from ldm2.vae import VAE, Posterior
from ldm2.vocoder import Vocoder


@pytest.fixture(scope="module")
def pool() -> Pool:
    return collect(sounds(0, 12))


def fit(folder, steps: int, deadline: float | None = None) -> tuple[nn.Linear, list[float]]:
    """A linear layer that learns to double; the losses it saw."""
    torch.manual_seed(0)
    layer, seen = nn.Linear(1, 1), []

    def loss(step, generator):
        x = torch.randn(16, 1, generator=generator)
        value = ((layer(x) - 2 * x) ** 2).mean()
        seen.append(float(value.detach()))
        return value

    clock = Clock(folder, deadline, progress=False, save_every=0.0)
    train("line", layer, loss, Recipe(steps=steps, rate=0.05, warmup=1), clock)
    return layer, seen


def test_the_loop_learns(tmp_path):
    _, seen = fit(tmp_path, 100)
    assert seen[-1] < 0.05 * seen[0]


def test_a_finished_stage_is_read_and_not_trained_again(tmp_path):
    first, _ = fit(tmp_path, 10)
    second, seen = fit(tmp_path, 10)
    assert seen == []
    assert torch.equal(first.weight, second.weight)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    (tmp_path / "whole").mkdir()
    whole, _ = fit(tmp_path / "whole", 3)
    (tmp_path / "pieces").mkdir()
    for _ in range(2):
        with pytest.raises(OutOfTime):
            fit(tmp_path / "pieces", 3, deadline=0.0)
    pieces, seen = fit(tmp_path / "pieces", 3, deadline=0.0)
    assert len(seen) == 1
    assert torch.equal(whole.weight, pieces.weight)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    layer = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="step 0"):
        train("bad", layer, lambda step, generator: layer.weight.sum() * math.nan, Recipe(2, 0.1), Clock(tmp_path))


def test_the_rate_rises_and_ends_at_zero():
    recipe = Recipe(steps=100, rate=1.0, warmup=10, decay_from=0.5)
    assert recipe.rate_at(0) == pytest.approx(0.1)
    assert recipe.rate_at(30) == 1.0
    assert recipe.rate_at(75) == pytest.approx(0.5)
    assert recipe.rate_at(100) == 0.0


def test_a_pool_holds_the_mels_of_its_waveforms(pool):
    rows = torch.tensor([3, 5])
    torch.testing.assert_close(pool.mel(rows), log_mel(pool.waveform(rows)), atol=0.01, rtol=0.01)


def test_a_pool_splits_into_training_and_held_out_clips(pool):
    first, last = pool.split(4)
    assert (len(first), len(last)) == (8, 4)
    assert first.captions + last.captions == pool.captions


def test_a_pool_of_an_odd_size_is_refused():
    with pytest.raises(ValueError, match="250, got 100"):
        formula_pool(0, 100)


def test_the_divergence_from_a_standard_normal_is_zero_for_itself():
    assert autoencoder.kl_divergence(Posterior(torch.zeros(2, 3), torch.zeros(2, 3))) == 0


def test_the_divergence_of_a_shifted_normal_is_half_the_square():
    assert autoencoder.kl_divergence(Posterior(torch.full((4,), 3.0), torch.zeros(4))) == pytest.approx(4.5)


def test_the_scaling_factor_makes_latents_of_unit_spread():
    vae = VAE(VAEConfig.from_dict(VAE_FIELDS))
    autoencoder.measure_scaling(vae, 4 * torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert vae.config.scaling_factor == pytest.approx(0.25, rel=0.1)


def test_matching_pairs_have_a_smaller_contrastive_loss():
    vectors = nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    scale, same = torch.tensor(10.0), torch.eye(6, dtype=torch.bool)
    right = contrast.contrastive_loss(vectors, vectors, scale, same)
    assert right < contrast.contrastive_loss(vectors, vectors.roll(1, 0), scale, same)


def test_fast_features_are_those_of_the_extractor(pool):
    import numpy as np
    extractor = contrast.feature_extractor()
    wave = pool.waveform(torch.arange(1))
    at_48k = torch.fft.irfft(nn.functional.pad(torch.fft.rfft(wave), (0, 40_960)), 122_880)[0] * 3
    expected = extractor(at_48k.numpy().astype(np.float32), sampling_rate=48_000, return_tensors="pt")["input_features"]
    found = contrast.features(wave, extractor)
    assert found.shape == expected[0][None].shape
    assert (found - expected).abs().mean() < 0.1


def test_a_tenth_of_the_prompts_is_dropped_and_half_of_these_zeroed():
    prompts, zeroed = text.drop_prompts(["x"] * 4000, torch.Generator().manual_seed(0))
    assert prompts.count("") / 4000 == pytest.approx(0.1, abs=0.02)
    assert zeroed.float().mean() == pytest.approx(0.05, abs=0.015)
    assert all(prompts[i] == "" for i in zeroed.nonzero().flatten())


def test_the_solved_start_of_the_vocoder_sings_on_pitch():
    torch.manual_seed(0)
    clips = collect(s for s in sounds(2, 150) if s.kind in ("low tone", "middle tone", "high tone", "siren"))
    vocoder = Vocoder(VocoderConfig.from_dict(VOCODER_FIELDS))
    vocoding.start(vocoder)
    vocoding.solve_front(vocoder, clips, clips=len(clips))
    row = clips.labels.index("low tone")
    with torch.no_grad():
        made = vocoder(clips.mel(torch.tensor([row])))[0]
    waves = made, clips.waveform(torch.tensor([row]))[0]
    hertz = [float(torch.fft.rfft(wave).abs().argmax() * 16_000 / len(wave)) for wave in waves]
    assert hertz[0] == pytest.approx(hertz[1], abs=10)


def test_equal_sounds_have_no_spectral_distance_and_others_do(pool):
    distance, waves = vocoding.SpectralLoss(), pool.waveform(torch.arange(2))
    assert distance(waves, waves) == 0
    assert distance(0 * waves, waves) > 0.5


def test_the_command_refuses_no_minutes(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path), "--minutes", "0"])
    assert stop.value.code == 2
    assert "positive" in capsys.readouterr().err


def test_the_command_does_not_write_over_a_training(tmp_path, capsys):
    (tmp_path / "pool.pt").touch()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "--resume" in capsys.readouterr().err

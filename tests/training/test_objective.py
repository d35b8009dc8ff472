"""What a diffusion model learns: against diffusers' schedulers and the equations of the papers."""

import pytest
import torch

from ldm2.training.objective import add_noise, spread_steps, step_weights, target


def test_noise_is_added_as_the_schedule_says():
    x, eps = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
    assert add_noise(x, eps, torch.tensor([0.36])).item() == pytest.approx(0.6 + 2 * 0.8)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noised_latents_and_targets_are_those_of_diffusers(kind):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(5, 2, 3, 4, generator=generator) for _ in range(2))
    t = torch.tensor([0, 10, 300, 700, 999])
    a = scheduler.alphas_cumprod[t]
    torch.testing.assert_close(add_noise(x_0, eps, a), scheduler.add_noise(x_0, eps, t))
    wanted = {"epsilon": eps, "sample": x_0, "v_prediction": scheduler.get_velocity(x_0, eps, t)}[kind]
    torch.testing.assert_close(target(kind, x_0, eps, a), wanted)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_weighted_error_is_that_of_the_clean_latents_times_the_clipped_ratio(kind):
    """Section 3.4 of arXiv:2303.09556, for a prediction that is off by a little."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    a = torch.tensor([0.02, 0.4, 0.9, 0.999], dtype=torch.float64)
    root, noise = a.sqrt()[:, None, None, None], (1 - a).sqrt()[:, None, None, None]
    x_t, off = add_noise(x_0, eps, a), 0.1
    predicted = target(kind, x_0, eps, a) + off
    found = {"epsilon": (x_t - noise * predicted) / root, "sample": predicted,
             "v_prediction": root * x_t - noise * predicted}[kind]
    snr = a / (1 - a)
    expected = snr.clamp(max=5) * ((found - x_0) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(step_weights(kind, a, 5.0) * off**2, expected)


def test_hard_time_steps_count_fully_and_easy_ones_less():
    weights = step_weights("epsilon", torch.tensor([0.1, 0.5, 0.95]), 5.0)
    assert weights.tolist() == pytest.approx([1.0, 1.0, 5 * 0.05 / 0.95], rel=1e-4)


def test_time_steps_are_spread_over_the_whole_schedule():
    steps = spread_steps(10, 1000, torch.Generator().manual_seed(0))
    assert (steps // 100).sort().values.tolist() == list(range(10))

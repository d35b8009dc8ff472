"""The VAE: equal to diffusers' AutoencoderKL on random weights, the posterior, shapes and errors."""

import copy
import math

import pytest
import torch

from benchmarks import checkpoints
from ldm2.vae import Posterior
from tests.helpers import assert_near, draw, our_vae

FOUR_LEVELS = {
    "block_out_channels": (16, 16, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 6,
}


@pytest.fixture(scope="module", params=[{}, FOUR_LEVELS], ids=["three levels", "four levels"])
def pair(request):
    theirs = checkpoints.vae(**request.param)
    return theirs, our_vae(theirs)


@pytest.fixture(scope="module")
def vae():
    return our_vae(checkpoints.vae())


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [32, 33, 38, 47])
def test_the_encoder_equals_diffusers(pair, num_frames):
    theirs, vae = pair
    mel = draw(2, 1, num_frames, 32)
    posterior, expected = vae.encode(mel), theirs.encode(mel).latent_dist
    assert posterior.mean.shape[2] == num_frames // vae.config.downsampling
    assert_near(posterior.mean, expected.mean)
    assert_near(posterior.logvar, expected.logvar)
    assert_near(posterior.std, expected.std)


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 5, 8])
def test_the_decoder_equals_diffusers(pair, num_frames):
    theirs, vae = pair
    latents = draw(2, vae.config.latent_channels, num_frames, 4)
    mel = vae.decode(latents)
    assert mel.shape == (2, 1, num_frames * vae.config.downsampling, 4 * vae.config.downsampling)
    assert_near(mel, theirs.decode(latents).sample)


@torch.no_grad()
def test_half_precision_is_as_near_to_float64_as_diffusers_is():
    theirs = checkpoints.vae()
    vae = our_vae(theirs)
    latents, mel = draw(1, 4, 6, 4), draw(1, 1, 24, 16)
    double = copy.deepcopy(vae).double()
    exact = double.decode(latents.double()), double.encode(mel.double()).mean
    for dtype in (torch.float16, torch.bfloat16):
        half, other = copy.deepcopy(vae).to(dtype), copy.deepcopy(theirs).to(dtype)
        ours = half.decode(latents.to(dtype)), half.encode(mel.to(dtype)).mean
        baselines = other.decode(latents.to(dtype)).sample, other.encode(mel.to(dtype)).latent_dist.mean
        for got, baseline, truth in zip(ours, baselines, exact, strict=True):
            assert got.dtype == dtype
            assert (got - truth).abs().mean() <= 2 * (baseline - truth).abs().mean()


@torch.no_grad()
def test_rows_do_not_see_each_other(vae):
    latents, mel = draw(2, 4, 5, 4), draw(2, 1, 20, 16)
    assert_near(vae.decode(latents)[1:], vae.decode(latents[1:]))
    assert_near(vae.encode(mel).mean[1:], vae.encode(mel[1:]).mean)


def test_encoder_and_decoder_work_alone(vae):
    with torch.no_grad():
        latents = draw(1, 4, 5, 4)
        assert torch.equal(vae.decoder(vae.post_quant_conv(latents)), vae.decode(latents))
        mel = draw(1, 1, 20, 16)
        assert torch.equal(vae.quant_conv(vae.encoder(mel))[:, :4], vae.encode(mel).mean)


def test_gradients_reach_every_parameter(vae):
    vae = copy.deepcopy(vae).train()
    posterior = vae.encode(draw(2, 1, 20, 16))
    vae.decode(posterior.sample(torch.Generator().manual_seed(0))).square().mean().backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_no_tensor_but_the_files_is_part_of_the_module(vae):
    assert list(vae.buffers()) == []


# Posterior


def test_a_sample_is_the_mean_plus_the_noise_times_the_deviation():
    mean, logvar = draw(2, 4, 3, 2), draw(2, 4, 3, 2, seed=1)
    noise = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(5))
    sample = Posterior(mean, logvar).sample(torch.Generator().manual_seed(5))
    torch.testing.assert_close(sample, mean + torch.exp(logvar / 2) * noise)


def test_each_row_can_have_its_own_generator():
    posterior = Posterior(draw(2, 4, 3, 2), draw(2, 4, 3, 2, seed=1))
    both = posterior.sample([torch.Generator().manual_seed(seed) for seed in (5, 6)])
    for row, seed in enumerate((5, 6)):
        alone = Posterior(posterior.mean[row : row + 1], posterior.logvar[row : row + 1])
        assert torch.equal(both[row : row + 1], alone.sample(torch.Generator().manual_seed(seed)))


def test_the_same_seed_gives_the_same_noise_in_each_precision():
    mean, logvar = torch.zeros(1, 4, 3, 2), torch.zeros(1, 4, 3, 2)
    full = Posterior(mean, logvar).sample(torch.Generator().manual_seed(5))
    half = Posterior(mean.half(), logvar.half()).sample(torch.Generator().manual_seed(5))
    assert half.dtype == torch.float16
    assert torch.equal(half, full.half())


def test_without_a_generator_the_noise_is_torchs_own():
    posterior = Posterior(torch.zeros(1, 4, 3, 2), torch.zeros(1, 4, 3, 2))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        sample = posterior.sample()
    assert torch.equal(sample, posterior.sample(torch.Generator().manual_seed(5)))


def test_a_generator_for_each_row_means_exactly_that():
    with pytest.raises(ValueError, match="one generator for each of 2 rows, got 1"):
        Posterior(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)).sample([torch.Generator()])


def test_the_mode_is_the_mean():
    mean = draw(1, 4, 3, 2)
    assert torch.equal(Posterior(mean, mean).mode(), mean)


@torch.no_grad()
@pytest.mark.parametrize("bias, expected", [(-1e3, -30.0), (1e3, 20.0)])
def test_the_log_variance_stays_within_bounds(vae, bias, expected):
    vae = copy.deepcopy(vae)
    vae.quant_conv.bias[4:] = bias
    posterior = vae.encode(draw(1, 1, 16, 16))
    assert (posterior.logvar == expected).all()
    assert posterior.std.max() == pytest.approx(math.exp(expected / 2))


# Bad input


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 2, 16, 16), (1, 1, 3, 16), (1, 1, 16, 3)])
def test_a_mel_that_does_not_fit_is_refused(vae, shape):
    with pytest.raises(ValueError, match=r"mel must be \(B, 1, T >= 4, F >= 4\), got"):
        vae.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4, 5, 4), (1, 8, 5, 4), (1, 4, 0, 4)])
def test_latents_that_do_not_fit_are_refused(vae, shape):
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, T >= 1, F >= 1\), got"):
        vae.decode(torch.zeros(shape))


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_cuda_is_near_the_cpu(pair, dtype, tolerance):
    vae = pair[1]
    latents, mel = draw(2, vae.config.latent_channels, 5, 4), draw(2, 1, 40, 32)
    there = copy.deepcopy(vae).to("cuda", dtype)
    assert_near(there.decode(latents.to("cuda", dtype)).cpu().float(), vae.decode(latents), tolerance)
    assert_near(there.encode(mel.to("cuda", dtype)).mean.cpu().float(), vae.encode(mel).mean, tolerance)

"""Guidance: the formula, one model call for both branches, nothing computed twice, and errors."""

import math

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

import ldm2
from benchmarks import checkpoints
from ldm2 import samplers
from ldm2.conditioning import Conditioning
from ldm2.config import UNetConfig
from ldm2.guidance import Guidance, guide
from ldm2.schedules import Schedule
from ldm2.unet import UNet
from tests.helpers import PUBLISHED, draw

SCHEDULE = Schedule.from_dict(PUBLISHED)


class FakeUNet(nn.Module):
    """eps = x_t * t + the mean of the row's context; it counts its calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls, self.prepared, self.embedded = [], [], []

    def prepare(self, conditioning):
        self.prepared.append(conditioning)
        return conditioning

    def embed_time(self, timesteps):
        self.embedded += timesteps.tolist()
        return timesteps[:, None].float()

    def forward(self, x_t, t, conditioning, time=None):
        self.calls.append((x_t, t, time))
        levels = conditioning.contexts[0].mean((1, 2)).view(-1, 1, 1, 1)
        return (x_t * t).repeat(len(levels) // len(x_t), 1, 1, 1) + levels.to(x_t.dtype)


def rows(*levels, length=3):
    """Conditioning whose rows are constant contexts of these levels."""
    return Conditioning((torch.stack([torch.full((length, 2), float(level)) for level in levels]),), (None,))


def denoiser(unet, scale, dtype=torch.float32, **settings):
    return Guidance(unet, rows(3.0, 4.0), rows(1.0, 1.5), scale, dtype=dtype, **settings).denoiser()


def test_the_prediction_goes_from_unconditional_past_conditional_by_the_scale():
    x_t = torch.randn(2, 4, 5, 3)
    eps = denoiser(FakeUNet(), 3.5)(x_t, 2)
    levels = torch.tensor([1 + 3.5 * (3 - 1), 1.5 + 3.5 * (4 - 1.5)]).view(2, 1, 1, 1)
    torch.testing.assert_close(eps, 2 * x_t + levels)


def test_both_branches_are_one_call_on_the_latents_as_they_are():
    unet = FakeUNet()
    denoiser(unet, 3.5)(torch.zeros(2, 4, 5, 3), 7)
    assert [call[0].shape for call in unet.calls] == [(2, 4, 5, 3)]
    assert [conditioning.batch_size for conditioning in unet.prepared] == [4]


@pytest.mark.parametrize("scale", [1, 1.0, 0.5, 0, -2])
def test_a_scale_of_one_or_less_runs_the_conditional_branch_alone(scale):
    unet = FakeUNet()
    eps = denoiser(unet, scale)(torch.zeros(2, 4, 5, 3), 7)
    assert [conditioning.batch_size for conditioning in unet.prepared] == [2]
    assert eps[:, 0, 0, 0].tolist() == [3, 4]


def test_without_guidance_no_unconditional_side_is_needed():
    unet = FakeUNet()
    guidance = Guidance(unet, rows(3.0), None, 1.0, dtype=torch.float32)
    eps = guidance.denoiser()(torch.zeros(1, 4, 5, 3), 7)
    assert eps[0, 0, 0, 0] == 3


def test_contexts_of_different_lengths_are_guided():
    unet = FakeUNet()
    guidance = Guidance(unet, rows(3.0, length=5), rows(1.0, length=2), 2.0, dtype=torch.float32)
    guidance.denoiser()(torch.zeros(1, 4, 5, 3), 7)
    assert unet.prepared[0].masks[0].sum(1).tolist() == [2, 5]


def test_the_conditioning_is_prepared_once_for_all_steps():
    unet = FakeUNet()
    samplers.sample("ddim", denoiser(unet, 3.5), torch.zeros(2, 4, 5, 3), SCHEDULE, 6)
    assert (len(unet.prepared), len(unet.calls)) == (1, 6)


@pytest.mark.parametrize("name", ["ddim", "pndm", "heun", "unipc"])
def test_each_timestep_is_embedded_once(name):
    unet = FakeUNet()
    timesteps = samplers.timesteps(name, SCHEDULE, 6)
    guided = denoiser(unet, 3.5, timesteps=timesteps)
    samplers.sample(name, guided, torch.zeros(2, 4, 5, 3), SCHEDULE, 6)
    assert unet.embedded == list(timesteps)
    assert all(time.tolist() == [[t]] for _, t, time in unet.calls)


def test_latents_must_have_the_rows_of_the_conditioning():
    for name in ("ddim", "pndm"):
        with pytest.raises(ValueError, match=r"denoiser.*\(2, 4, 5, 3\).*x_t \(4, 4, 5, 3\)"):
            samplers.sample(name, denoiser(FakeUNet(), 3.5), torch.zeros(4, 4, 5, 3), SCHEDULE, 4)


def test_without_timesteps_the_unet_embeds_them_itself():
    unet = FakeUNet()
    denoiser(unet, 3.5)(torch.zeros(2, 4, 5, 3), 7)
    assert [(t, time) for _, t, time in unet.calls] == [(7, None)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_model_runs_in_half_precision_and_the_branches_meet_in_float32(dtype):
    unet = FakeUNet()
    eps = denoiser(unet, 3.3, dtype)(torch.zeros(2, 4, 5, 3), 7)
    assert unet.calls[0][0].dtype == unet.prepared[0].contexts[0].dtype == dtype
    assert eps.dtype == torch.float32
    assert eps[:, 0, 0, 0].tolist() == pytest.approx([1 + 3.3 * 2, 1.5 + 3.3 * 2.5], rel=1e-6)


def test_the_published_unet_is_guided_as_two_calls_of_its_own():
    theirs = checkpoints.unet()
    unet = UNet(UNetConfig.from_dict(dict(theirs.config), reference="diffusers")).eval()
    unet.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(0)

    def conditioning(length):
        contexts = [torch.randn(2, tokens, width, generator=generator) for tokens, width in ((8, 24), (length, 32))]
        return Conditioning(tuple(contexts), (None, None))

    def alone(part):
        return theirs(x_t, 501, encoder_hidden_states=part.contexts[0], encoder_hidden_states_1=part.contexts[1]).sample

    cond, uncond = conditioning(6), conditioning(4)
    x_t = torch.randn(2, 4, 10, 8, generator=generator)
    with torch.no_grad():
        got = Guidance(unet, cond, uncond, 3.5, dtype=torch.float32, timesteps=(501,)).denoiser()(x_t, 501)
        wanted = alone(uncond) + 3.5 * (alone(cond) - alone(uncond))
    assert (got - wanted).norm() / wanted.norm() < 1e-5


def within(start, end):
    return {"active_at": lambda t: SCHEDULE.within(t, (start, end))}


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_an_interval_that_covers_the_run_changes_nothing(name):
    def run(**settings):
        noise = torch.Generator().manual_seed(0)
        return samplers.sample(name, denoiser(FakeUNet(), 3.5, **settings), torch.ones(2, 4, 5, 3), SCHEDULE, 6,
                               noise=lambda like: torch.randn(like.shape, generator=noise))
    assert torch.equal(run(**within(0, 1)), run())


@pytest.mark.parametrize("place", [0, 0.4, 1])
def test_an_empty_interval_is_the_conditional_branch_alone(place):
    x_T = torch.randn(2, 4, 5, 3)
    empty, alone = (
        samplers.sample("dpmpp-2m", denoiser(FakeUNet(), scale, **settings), x_T, SCHEDULE, 6)
        for scale, settings in ((3.5, within(place, place)), (1.0, {}))
    )
    assert torch.equal(empty, alone)


def test_both_branches_are_evaluated_inside_the_interval_only():
    unet = FakeUNet()
    guided = denoiser(unet, 3.5, **within(0.3, 0.8))
    shares = {t: guided(torch.zeros(2, 4, 5, 3), t)[0, 0, 0, 0].item() for t in (1000, 701, 700, 699, 200, 199, 0)}
    inside = [t for t, value in shares.items() if value == 1 + 3.5 * 2]
    assert inside == [699, 200]
    assert [conditioning.batch_size for conditioning in unet.prepared] == [2, 4]


@pytest.mark.parametrize("scale", [math.nan, math.inf, "3", None, True])
def test_a_scale_that_is_no_finite_number_is_refused(scale):
    with pytest.raises(ValueError, match="guidance_scale must be a finite number, got "):
        denoiser(FakeUNet(), scale)


def test_guidance_without_unconditional_side_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale 3\.5 needs an unconditional side"):
        Guidance(FakeUNet(), rows(3.0), None, 3.5, dtype=torch.float32)


def test_guidance_with_unequal_rows_is_refused():
    with pytest.raises(ValueError, match=r"rows.*got 1 and 2"):
        Guidance(FakeUNet(), rows(3.0, 4.0), rows(1.0), 3.5, dtype=torch.float32)


# --- rescaled guidance -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(rescale):
    unconditional, conditional = draw(3, 4, 6, 8), 2 * draw(3, 4, 6, 8, seed=1)
    guided = unconditional + 3.5 * (conditional - unconditional)
    expected = rescale_noise_cfg(guided, conditional, guidance_rescale=rescale)
    torch.testing.assert_close(guide(torch.cat([unconditional, conditional]), 3.5, rescale), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_guidance_goes_from_the_first_rows_past_the_last_by_the_scale(dtype):
    prediction = draw(4, 3, 5).to(dtype)
    unconditional, conditional = prediction.double().chunk(2)
    expected = unconditional + 3.5 * (conditional - unconditional)
    torch.testing.assert_close(guide(prediction, 3.5), expected.float(), rtol=1e-6, atol=1e-6)


def test_rescaling_reaches_the_sound_and_is_off_by_default(tiny_checkpoint):
    pipe = ldm2.load(tiny_checkpoint)
    sounds = [pipe.generate("rain", seconds=0.2, steps=2, seed=0, **options).latents
              for options in ({}, {"guidance_rescale": 0}, {"guidance_rescale": 0.7})]
    assert torch.equal(sounds[0], sounds[1]) and not torch.equal(sounds[0], sounds[2])

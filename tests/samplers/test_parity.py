"""Samplers against diffusers, step by step, and against the authors' trajectories (tests/data/golden_samplers.md)."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from ldm2 import samplers
from ldm2.noise import SeededNoise
from ldm2.samplers import SAMPLERS, sample
from ldm2.samplers.core import variance_preserving
from ldm2.schedules import Schedule
from tests.helpers import PUBLISHED
from tests.samplers.toy import SCHEDULE, SHAPE, STOCHASTIC, diffusers_walk, draw_latents, error, model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")   # in diffusers

ORACLES = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "pndm": functools.partial(diffusers.PNDMScheduler.from_config, skip_prk_steps=True),
    "lms": diffusers.LMSDiscreteScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp-2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp-2m-sde": functools.partial(
        diffusers.DPMSolverMultistepScheduler.from_config, algorithm_type="sde-dpmsolver++"
    ),
    "unipc": diffusers.UniPCMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}
# What a checkpoint's config may say besides the published one; the last is that of diffusers' own test models.
VARIANTS = {
    "v_prediction": {"prediction_type": "v_prediction"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear_to_one": {"beta_schedule": "linear", "set_alpha_to_one": True},
    "diffusers_dummy": {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 0},
}


def diffusers_scheduler(name, config, steps):
    make = getattr(ORACLES[name], "from_config", ORACLES[name])
    scheduler = make(diffusers.DDIMScheduler.from_config(config).config)
    scheduler.set_timesteps(steps)
    return scheduler


def step_ends(name, walk):
    """The states after whole steps: of the two calls in Heun's steps and in PNDM's first one, the second counts."""
    states = [state for _, state in walk]
    if name == "heun":
        return states[1::2] + states[-1:]
    return states[1:] if name == "pndm" and len(states) > 1 else states


def our_walk(name, config, steps, seeds, **settings):
    """([timesteps of the model calls], [state after each step])."""
    calls, states = [], []
    noise = SeededNoise(seeds)

    def denoiser(x, t):
        calls.append(float(t))
        return model(x, t)

    def callback(done, total, latents):
        assert (done, total) == (len(states) + 1, steps - settings.get("start", 0))
        states.append(latents)

    latents = sample(name, denoiser, noise.draw(*SHAPE), Schedule.from_dict(config), steps, noise=noise,
                     callback=callback, **settings)
    assert torch.equal(latents, states[-1])
    return calls, states


def compare(name, config, steps, eta=0.0):
    generator = torch.Generator().manual_seed(7)
    scheduler = diffusers_scheduler(name, config, steps)
    x_T = torch.randn((1, *SHAPE), generator=generator) * scheduler.init_noise_sigma
    walk = diffusers_walk(scheduler, x_T, scheduler.timesteps, generator, eta)
    calls, states = our_walk(name, config, steps, [7], eta=eta)
    assert calls == [t for t, _ in walk], f"timesteps of {steps} steps"
    for i, (got, wanted) in enumerate(zip(states, step_ends(name, walk), strict=True)):
        assert error(got, wanted) < 2e-5, f"step {i} of {steps}: {error(got, wanted):.1e}"


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "data" / "golden_samplers.safetensors")


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 15, 33, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_each_step_equals_diffusers(name, steps):
    compare(name, PUBLISHED, steps)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_each_step_equals_diffusers_with_other_schedules(name, variant):
    for steps in (1, 2, 7, 16):
        compare(name, PUBLISHED | VARIANTS[variant], steps)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("config", [PUBLISHED, PUBLISHED | VARIANTS["diffusers_dummy"]])
def test_ddim_with_eta_equals_diffusers(config, eta):
    for steps in (1, 2, 15, 50):
        compare("ddim", config, steps, eta)


@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_equal_diffusers_for_1_to_50_steps_and_more(name):
    most = SCHEDULE.options("LCMScheduler").original_inference_steps if name == "lcm" else 1000
    for steps in (n for n in (*range(1, 51), 100, 150, 200, 333, 501, 998) if n <= most):
        theirs = diffusers_scheduler(name, PUBLISHED, steps).timesteps.tolist()
        assert samplers.timesteps(name, SCHEDULE, steps) == tuple(dict.fromkeys(theirs)), steps


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp-2m-sde", "unipc"])
def test_many_steps_equal_diffusers(name):
    compare(name, PUBLISHED, 200)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("lms", "pndm")])
@pytest.mark.parametrize("start", [1, 4, 9])
def test_starting_late_equals_diffusers(name, start):
    # not lms and pndm: diffusers' LMS then weighs one slope as if it had four, its PNDM skips a timestep
    generator = torch.Generator().manual_seed(7)
    scheduler, x0 = diffusers_scheduler(name, PUBLISHED, 10), draw_latents(1)
    timesteps = scheduler.timesteps[start * scheduler.order:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    x = scheduler.add_noise(x0, torch.randn((1, *SHAPE), generator=generator), timesteps[:1])
    walk = diffusers_walk(scheduler, x, timesteps, generator)
    calls, states = our_walk(name, PUBLISHED, 10, [7], x0=x0, start=start)
    assert calls == timesteps.tolist()
    assert error(states[-1], walk[-1][1]) < 2e-5


@pytest.mark.parametrize("name", ["lms", "pndm"])
def test_multistep_samplers_that_start_late_begin_without_history(name):
    x0, calls = draw_latents(1), []

    def denoiser(x, t):
        calls.append(t)
        return model(x, t)

    late = sample(name, denoiser, draw_latents(2), SCHEDULE, 10, x0=x0, start=9)
    alpha, sigma = variance_preserving(SCHEDULE.sigma(1))
    x_t = alpha * x0 + sigma * draw_latents(2)
    one_step = (x_t - sigma * model(x_t, 1)) / alpha
    if name == "pndm":                                    # which ends at alphas_cumprod[0]
        a = SCHEDULE.alpha_cumprod(0)
        one_step = math.sqrt(a) * one_step + math.sqrt(1 - a) * model(x_t, 1)
    assert calls == [1]
    assert error(late, one_step) < 1e-6


@pytest.mark.parametrize("name", ["ddim", *STOCHASTIC])
def test_a_batch_with_a_generator_each_equals_diffusers(name):
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 11)]
    scheduler = diffusers_scheduler(name, PUBLISHED, 5)
    x_T = torch.cat([torch.randn((1, *SHAPE), generator=generator) for generator in generators])
    walk = diffusers_walk(scheduler, x_T * scheduler.init_noise_sigma, scheduler.timesteps, generators, eta=1.0)
    _, states = our_walk(name, PUBLISHED, 5, [3, 11], eta=1.0 if name == "ddim" else 0.0)
    assert error(states[-1], walk[-1][1]) < 2e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_generator_is_left_as_diffusers_leaves_it(name):
    generator = torch.Generator().manual_seed(7)
    scheduler = diffusers_scheduler(name, PUBLISHED, 4)
    x_T = torch.randn((1, *SHAPE), generator=generator)
    diffusers_walk(scheduler, x_T, scheduler.timesteps, generator)
    noise = SeededNoise([7])
    sample(name, model, noise.draw(*SHAPE), SCHEDULE, 4, noise=noise)
    assert torch.equal(noise.generators[0].get_state(), generator.get_state())


# ---------------------------------------------------------------------------------------- the authors' trajectories

def fake_model(golden, k=0):
    """tests/data/golden_samplers.md"""
    def denoiser(x, t):
        mixed = torch.einsum("ij,bjhw->bihw", golden["fake.A"], x)
        return mixed + t / 1000 * golden["fake.B"][None, :, None, None] + 0.25 * k
    return denoiser


def follow(golden, run, name, steps, *, denoiser=None, eta=0.0, schedule=SCHEDULE, tolerance=1e-4):
    """Sample with the recorded noise, and with the recorded mask if there is one; every state must be as recorded."""
    recorded = {key.removeprefix(run + "."): value for key, value in golden.items() if key.startswith(run + ".")}
    fresh = iter(recorded.get("noise", ()))
    states, calls = [], []

    def edit(step):
        if "mask" not in recorded:
            return step.x_t
        mask, noise = recorded["mask"], recorded["q_noise"][step.index]
        return mask * (step.signal * recorded["x0"] + step.sigma * noise) + (1 - mask) * step.x_t

    def watched(x, t):
        calls.append(t)
        return (denoiser or fake_model(golden))(x, t)

    sample(name, watched, recorded["x_T"], schedule, steps, eta=eta, noise=lambda like: next(fresh), edit=edit,
           callback=lambda done, total, latents: states.append(latents))
    for i, (got, wanted) in enumerate(zip(states, recorded["x"], strict=True)):
        assert (got - wanted).abs().max() < tolerance, f"step {i}"
    if "model_call_timesteps" in recorded:
        assert calls == recorded["model_call_timesteps"].tolist()


@pytest.mark.parametrize("run, eta", [("eta0", 0.0), ("eta05", 0.5), ("eta1", 1.0)])
def test_ddim_follows_the_authors(golden, run, eta):
    follow(golden, f"ddim.s10.{run}", "ddim", 10, eta=eta)


def test_ddim_with_v_prediction_follows_the_authors(golden):
    follow(golden, "ddim.v.s10.eta1", "ddim", 10, eta=1.0, schedule=replace(SCHEDULE, prediction_type="v_prediction"))


def test_ddim_with_guidance_follows_the_authors(golden):
    uncond, cond = fake_model(golden), fake_model(golden, k=1)
    follow(golden, "ddim.cfg.s10.eta1", "ddim", 10, eta=1.0,
           denoiser=lambda x, t: uncond(x, t) + 3.5 * (cond(x, t) - uncond(x, t)))


@pytest.mark.parametrize("steps", [10, 50])
def test_pndm_follows_the_authors_plms(golden, steps):
    follow(golden, f"plms.s{steps}", "pndm", steps)


@pytest.mark.parametrize("run, eta", [("eta0", 0.0), ("eta1", 1.0)])
def test_masked_ddim_follows_the_authors(golden, run, eta):
    follow(golden, f"ddim_masked.s10.{run}", "ddim", 10, eta=eta, tolerance=5e-4)


def test_masked_pndm_follows_the_authors_plms(golden):
    follow(golden, "plms_masked.s10", "pndm", 10, tolerance=5e-4)


@pytest.mark.parametrize("steps", [5, 50, 200])
def test_ddim_sigmas_equal_the_authors(golden, steps):
    # from x_t = 0 with eps = 0 each step leaves nothing but its own noise
    sigmas = []
    sample("ddim", lambda x, t: torch.zeros_like(x), torch.zeros(1, 1, 1, 1), SCHEDULE, steps, eta=1.0,
           noise=torch.ones_like, edit=lambda step: torch.zeros_like(step.x_t),
           callback=lambda done, total, latents: sigmas.append(latents.item()))
    torch.testing.assert_close(torch.tensor(sigmas[::-1], dtype=torch.float64),
                               golden[f"ddim_schedule.{steps}.sigmas_eta1"], rtol=2e-6, atol=1e-7)

"""Feature reuse: which timesteps compute the deep part of the UNet, and that it is the same part."""

from __future__ import annotations

import pytest
import torch

import ldm2
from benchmarks import checkpoints
from ldm2 import samplers
from ldm2.guidance import Guidance
from ldm2.runtime import deepcache
from ldm2.schedules import Schedule
from ldm2.unet import UNet
from tests.helpers import PROMPT, PUBLISHED, UNETS, condition, draw, our_unet, relative

SCHEDULE = Schedule.from_dict(PUBLISHED)


@pytest.fixture(scope="module")
def unet():
    return our_unet(checkpoints.unet())


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return ldm2.load(tiny_checkpoint)


@pytest.fixture
def calls(monkeypatch):
    """Of each model call with features: (timestep, latents' rows, conditioning's rows, computes the deep part)."""
    seen = []
    forward_cached = UNet.forward_cached

    def watched(self, x_t, t, conditioning, time=None, features=None):
        seen.append((t, len(x_t), conditioning.rows, features is None))
        return forward_cached(self, x_t, t, conditioning, time, features)

    monkeypatch.setattr(UNet, "forward_cached", watched)
    return seen


def guidance(unet, **settings):
    return Guidance(unet, condition(unet.config, 2), condition(unet.config, 2, seed=5), 3.5, dtype=torch.float32,
                    **settings)


@pytest.mark.parametrize("kind", UNETS)
@torch.no_grad()
def test_the_first_level_on_the_features_of_the_same_call_is_the_whole_unet(kind):
    unet = our_unet(checkpoints.unet(**UNETS[kind]))
    x_t, conditioning = draw(2, 4, 10, 7), condition(unet.config, 4)
    plain = unet(x_t, 501, conditioning)
    result, features = unet.forward_cached(x_t, 501, conditioning)
    again, same = unet.forward_cached(x_t, 501, conditioning, features=features)
    assert torch.equal(result, plain) and torch.equal(again, plain)
    assert same is features


@torch.no_grad()
def test_features_of_another_timestep_give_another_result(unet):
    conditioning, x_t = condition(unet.config, 2), draw(2, 4, 10, 8)
    plain = unet(x_t, 480, conditioning)
    _, features = unet.forward_cached(x_t, 501, conditioning)
    reused, _ = unet.forward_cached(x_t, 480, conditioning, features=features)
    assert not torch.allclose(reused, plain, atol=1e-4)


@torch.no_grad()
def test_with_features_only_the_first_level_is_computed(unet, monkeypatch):
    conditioning, x_t = condition(unet.config, 2), draw(2, 4, 10, 8)
    _, features = unet.forward_cached(x_t, 501, conditioning)
    ran = []
    hooks = [part.register_forward_hook(lambda part, *_: ran.append(part)) for part in unet._blocks()]
    unet.forward_cached(x_t, 481, conditioning, features=features)
    for hook in hooks:
        hook.remove()
    assert ran == [unet.down_blocks[0], unet.up_blocks[-1]]


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@torch.no_grad()
def test_every_first_timestep_is_the_plain_run(unet, name):
    def run(predict):
        noise = torch.Generator().manual_seed(0)
        prepared = unet.prepare(condition(unet.config, 1))
        return samplers.sample(name, lambda x, t: predict(x, t, prepared), draw(1, 4, 6, 8), SCHEDULE, 4,
                               noise=lambda like: torch.randn(like.shape, generator=noise))
    assert torch.equal(run(deepcache.reusing(unet, 1)), run(unet))


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "unipc"])
@pytest.mark.parametrize("every, deep", [(2, [0, 2, 4, 6]), (3, [0, 3, 6]), (4, [0, 4]), (50, [0])])
def test_the_deep_part_is_computed_at_every_nth_step(unet, calls, name, every, deep):
    samplers.sample(name, guidance(unet).denoiser(deepcache.reusing(unet, every)), draw(2, 4, 6, 8), SCHEDULE, 7)
    assert [i for i, call in enumerate(calls) if call[3]] == deep
    assert [call[1:3] for call in calls] == [(2, 4)] * 7


@pytest.mark.parametrize("name", ["heun", "pndm"])
def test_calls_at_one_timestep_are_treated_alike(unet, calls, name):
    samplers.sample(name, guidance(unet).denoiser(deepcache.reusing(unet, 2)), draw(2, 4, 6, 8), SCHEDULE, 5)
    timesteps = samplers.timesteps(name, SCHEDULE, 5)
    assert len(calls) > 5
    assert {(t, fresh) for t, _, _, fresh in calls} == {(t, i % 2 == 0) for i, t in enumerate(timesteps)}


def test_the_ends_of_a_guidance_interval_begin_a_new_count(unet, calls):
    guided = guidance(unet, active_at=lambda t: 300 <= t < 700)
    samplers.sample("ddim", guided.denoiser(deepcache.reusing(unet, 3)), draw(2, 4, 6, 8), SCHEDULE, 10)
    assert [(rows, fresh) for _, _, rows, fresh in calls] == [
        (2, True), (2, False), (2, False),
        (4, True), (4, False), (4, False), (4, True),
        (2, True), (2, False), (2, False),
    ]


def test_denoisers_of_one_guidance_do_not_share_features(unet):
    guided = guidance(unet)
    first, second = draw(2, 4, 6, 8), draw(2, 4, 6, 8, seed=3)
    mixed, alone, other = (guided.denoiser(deepcache.reusing(unet, 2)) for _ in range(3))
    with torch.no_grad():
        for t in (501, 401):
            a, b = mixed(first, t), alone(first, t)
            other(second, t)
            assert torch.equal(a, b)


def test_a_run_leaves_nothing_for_the_next(pipe):
    settings = {"seconds": 0.4, "steps": 5, "seed": 1, "reuse": 3}
    first = pipe.generate(PROMPT, **settings).latents
    pipe.generate("techno", seconds=0.6, steps=2, seed=2, reuse=2)
    assert torch.equal(pipe.generate(PROMPT, **settings).latents, first)


def test_one_is_the_plain_generation_and_two_is_not(pipe):
    plain, one, two = (pipe.generate(PROMPT, seconds=0.4, steps=4, seed=1, reuse=n).latents for n in (None, 1, 2))
    assert torch.equal(plain, one) and not torch.equal(plain, two)


def test_a_batch_agrees_with_each_row_alone(pipe):
    settings = {"seconds": 0.4, "steps": 4, "reuse": 2, "guidance_interval": (0.2, 0.8)}
    together = pipe.generate([PROMPT, "techno"], seed=1, **settings).latents
    for row, prompt in enumerate([PROMPT, "techno"]):
        alone = pipe.generate(prompt, seed=1 + row, **settings).latents[0]
        assert relative(together[row], alone) < 1e-4


def test_each_window_gets_back_the_features_that_it_left(pipe, monkeypatch):
    seen = []
    forward_cached = UNet.forward_cached

    def watched(self, x_t, t, conditioning, time=None, features=None):
        result = forward_cached(self, x_t, t, conditioning, time, features)
        seen.append((features, result[1]))
        return result

    monkeypatch.setattr(UNet, "forward_cached", watched)
    pipe.generate(PROMPT, seconds=1.0, steps=2, seed=1, window=0.4, reuse=2)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) > 1
    assert [given for given, _ in first] == [None] * len(first)
    assert all(given is left for (given, _), (_, left) in zip(second, first, strict=True))

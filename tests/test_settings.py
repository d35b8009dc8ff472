"""Settings: defaults, checks, and what a single row of a batch needs to be made again."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from ldm2.settings import DEFAULTS, PRESETS, recipe, row_settings


def test_defaults_are_those_of_the_published_models():
    asked = recipe("a dog")
    assert {name: getattr(asked, name) for name in DEFAULTS} == DEFAULTS
    assert len(asked.seeds) == 1 and 0 <= asked.seeds[0] < 2**31


def test_zero_is_a_value_and_not_the_absence_of_one():
    asked = recipe("a dog", seed=0, guidance_scale=0)
    assert asked.seeds == (0,)
    assert asked.guidance_scale == 0 and not asked.guided


def test_each_waveform_has_its_own_seed():
    assert recipe(["a", "b"], seed=5, num_waveforms=2).seeds == (5, 6, 7, 8)
    assert recipe(["a", "b"], seed=[9, 1]).seeds == (9, 1)


def test_one_negative_prompt_serves_all_prompts():
    assert recipe(["a", "b"], "low quality").negative_prompts == ("low quality", "low quality")
    assert recipe("a", "").negative_prompts == ("",)


def test_a_row_of_a_batch_can_be_made_again_alone():
    settings = recipe(["a", "b"], ["x", "y"], seed=5, num_waveforms=2, steps=3).settings
    alone = row_settings(settings, row=2, seed=7)
    assert (alone["prompt"], alone["negative_prompt"], alone["seed"], alone["num_waveforms"]) == ("b", "y", 7, 1)
    assert alone["steps"] == 3


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_the_place_of_the_defaults(name):
    own_defaults = DEFAULTS | {"steps": 7, "seconds": 3.0}
    asked = recipe("a dog", preset=name, defaults=own_defaults)
    expected = own_defaults | PRESETS[name]
    assert {name: getattr(asked, name) for name in expected} == expected


@pytest.mark.parametrize("given", [
    {"steps": 11}, {"sampler": "euler"}, {"guidance_interval": (0.0, 1.0)}, {"reuse": 1}, {"guidance_scale": 0.0},
    {"spacing": "leading"},
])
def test_what_is_given_wins_over_the_preset(given):
    asked = recipe("a dog", preset="fast", **given)
    expected = DEFAULTS | PRESETS["fast"] | given
    assert {name: getattr(asked, name) for name in expected} == expected


def test_the_settings_of_a_preset_need_no_preset():
    settings = recipe("a dog", preset="fast", reuse=2, seed=1).settings
    assert "preset" not in settings
    assert recipe(**json.loads(json.dumps(settings))).settings == settings


@pytest.mark.parametrize("name", ["quick", "", 3, ["fast"]])
def test_an_unknown_preset_is_refused_with_those_that_exist(name):
    with pytest.raises(ValueError, match=r"unknown preset .*, choose from fast"):
        recipe("a dog", preset=name)


@pytest.mark.parametrize("interval", [
    (0.5, 0.2), (-0.1, 1), (0, 1.1), (0, float("nan")), (0, "1"), (0.5,), (0, 0.5, 1), 0.5, "01", (True, 1), {0.1, 0.5},
])
def test_an_interval_that_is_no_part_of_the_run_is_refused(interval):
    with pytest.raises(ValueError, match="guidance_interval"):
        recipe("a dog", guidance_interval=interval)


def test_the_fast_preset_starts_at_the_last_timestep_and_the_default_as_the_checkpoint_does():
    assert recipe("a dog", preset="fast").spacing == "trailing"
    assert recipe("a dog").spacing is None


@pytest.mark.parametrize("spacing", ["karras", "", 3, ["trailing"]])
def test_an_unknown_spacing_is_refused_with_those_that_exist(spacing):
    with pytest.raises(ValueError, match=r"unknown spacing .*, choose from leading, trailing, linspace"):
        recipe("a dog", spacing=spacing)


@pytest.mark.parametrize("reuse", [0, -1, 1.5, True, "2"])
def test_a_reuse_that_is_no_whole_number_from_1_up_is_refused(reuse):
    with pytest.raises(ValueError, match="reuse must be a whole number from 1 up"):
        recipe("a dog", reuse=reuse)


@pytest.mark.parametrize("loop", ["no", 2, None, []])
def test_a_loop_that_is_neither_true_nor_false_is_refused(loop):
    with pytest.raises(ValueError, match=f"loop must be True or False, got {re.escape(repr(loop))}"):
        recipe("a dog", loop=loop)


@pytest.mark.parametrize("seed", [1.0, True, "1", 2**64, -2**63 - 1, [1, 2**64], np.float64(3)])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        recipe(["a", "b"] if isinstance(seed, list) else "a", seed=seed)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1, -1, -2**63, np.int64(-1), np.uint64(2**64 - 1)])
def test_a_seed_means_what_torch_makes_of_it(seed):
    made = torch.Generator().manual_seed(int(seed))
    assert recipe("a", seed=seed).seeds == (made.initial_seed(),)
    assert recipe(["a", "b"], seed=[seed, 3]).seeds == (made.initial_seed(), 3)


@pytest.mark.parametrize("seed, seeds", [
    (2**64 - 1, (2**64 - 1, 0)), (-2, (2**64 - 2, 2**64 - 1)), (-1, (2**64 - 1, 0)),
])
def test_seeds_count_on_past_the_last_one(seed, seeds):
    assert recipe(["a", "b"], seed=seed).seeds == seeds

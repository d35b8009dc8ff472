"""Settings: defaults, checks, and what a single row of a batch needs to be made again."""

from __future__ import annotations

import pytest

from ldm2.recipe import DEFAULTS, MAX_SEED, recipe, row_settings


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


@pytest.mark.parametrize("seed", [-1, 1.0, True, "1", MAX_SEED + 1, [1, -1]])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        recipe(["a", "b"] if isinstance(seed, list) else "a", seed=seed)

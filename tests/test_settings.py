"""Settings: defaults, checks, and what a single row of a batch needs to be made again."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch

from ldm2.options import exact, options_of
from ldm2.settings import GENERATE, PRESETS, Settings, row_settings

# What takes the place of None in a request for a new sound.
DEFAULTS = {name: each.default for name, each in options_of(Settings, GENERATE).items() if each.default is not None}


def resolved(*args, defaults=None, **options) -> Settings:
    """The settings of a request for a new sound, with defaults filled in."""
    return Settings.create(GENERATE, *args, **options).resolved(defaults)


def test_defaults_are_those_of_the_published_models():
    settings = resolved("a dog")
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS
    assert len(settings.seeds) == 1 and 0 <= settings.seeds[0] < 2**31


def test_zero_is_a_value_and_not_the_absence_of_one():
    settings = resolved("a dog", seed=0, guidance_scale=0)
    assert settings.seeds == (0,)
    assert settings.guidance_scale == 0 and not settings.guided


def test_each_waveform_has_its_own_seed():
    assert resolved(["a", "b"], seed=5, num_waveforms=2).seeds == (5, 6, 7, 8)
    assert resolved(["a", "b"], seed=[9, 1]).seeds == (9, 1)


def test_one_negative_prompt_serves_all_prompts():
    assert tuple(resolved(["a", "b"], "low quality").each("negative_prompt")) == ("low quality", "low quality")
    assert resolved("a", "").negative_prompt == ("",)


def test_a_row_of_a_batch_can_be_made_again_alone():
    settings = resolved(["a", "b"], ["x", "y"], seed=5, num_waveforms=2, steps=3).plain()
    alone = row_settings(settings, row=2, seed=7)
    assert (alone["prompt"], alone["negative_prompt"], alone["seed"], alone["num_waveforms"]) == ("b", "y", 7, 1)
    assert alone["steps"] == 3


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_the_place_of_the_defaults(name):
    own_defaults = DEFAULTS | {"steps": 7, "seconds": 3.0}
    settings = resolved("a dog", preset=name, defaults=own_defaults)
    expected = own_defaults | PRESETS[name]
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize("given", [
    {"steps": 11}, {"sampler": "euler"}, {"guidance_interval": (0.0, 1.0)}, {"cache_interval": 1},
    {"guidance_scale": 0.0}, {"spacing": "leading"},
])
def test_what_is_given_wins_over_the_preset(given):
    settings = resolved("a dog", preset="fast", **given)
    expected = DEFAULTS | PRESETS["fast"] | given
    assert {name: getattr(settings, name) for name in expected} == expected


def test_the_settings_of_a_preset_need_no_preset():
    settings = resolved("a dog", preset="fast", reuse=2, seed=1).plain()
    assert "preset" not in settings
    assert resolved(**json.loads(json.dumps(settings))).plain() == settings


@pytest.mark.parametrize("name", ["quick", "", 3, ["fast"]])
def test_an_unknown_preset_is_refused_with_those_that_exist(name):
    with pytest.raises(ValueError, match=r"unknown preset .*, choose from fast"):
        resolved("a dog", preset=name)


@pytest.mark.parametrize("interval", [
    (0.5, 0.2), (-0.1, 1), (0, 1.1), (0, float("nan")), (0, "1"), (0.5,), (0, 0.5, 1), 0.5, "01", (True, 1), {0.1, 0.5},
])
def test_an_interval_that_is_no_part_of_the_run_is_refused(interval):
    with pytest.raises(ValueError, match="guidance_interval"):
        resolved("a dog", guidance_interval=interval)


def test_the_fast_preset_starts_at_the_last_timestep_and_the_default_as_the_checkpoint_does():
    assert resolved("a dog", preset="fast").spacing == "trailing"
    assert resolved("a dog").spacing is None


@pytest.mark.parametrize("spacing", ["karras", "", 3, ["trailing"]])
def test_an_unknown_spacing_is_refused_with_those_that_exist(spacing):
    with pytest.raises(ValueError, match=r"spacing .*leading, trailing, linspace"):
        resolved("a dog", spacing=spacing)


@pytest.mark.parametrize("reuse", [0, -1, 1.5, True, "2"])
def test_a_reuse_that_is_no_whole_number_from_1_up_is_refused(reuse):
    with pytest.raises(ValueError, match="cache_interval must be a positive integer"):
        resolved("a dog", reuse=reuse)


@pytest.mark.parametrize("value, told", [(10**400, "inf"), (-10**400, "-inf")])
def test_a_number_that_no_float_holds_is_refused(value, told):
    with pytest.raises(ValueError, match=f"guidance_scale must be a finite number, got {told}"):
        Settings(guidance_scale=value)


@pytest.mark.parametrize("loop", ["no", 2, None, []])
def test_a_loop_that_is_neither_true_nor_false_is_refused(loop):
    with pytest.raises(ValueError, match=f"loop must be True or False, got {re.escape(repr(loop))}"):
        resolved("a dog", loop=loop)


@pytest.mark.parametrize("seed", [1.0, True, "1", 2**64, -2**63 - 1, [1, 2**64], np.float64(3)])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        resolved(["a", "b"] if isinstance(seed, list) else "a", seed=seed)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1, -1, -2**63, np.int64(-1), np.uint64(2**64 - 1)])
def test_a_seed_means_what_torch_makes_of_it(seed):
    made = torch.Generator().manual_seed(int(seed))
    assert resolved("a", seed=seed).seeds == (made.initial_seed(),)
    assert resolved(["a", "b"], seed=[seed, 3]).seeds == (made.initial_seed(), 3)


@pytest.mark.parametrize("seed, seeds", [
    (2**64 - 1, (2**64 - 1, 0)), (-2, (2**64 - 2, 2**64 - 1)), (-1, (2**64 - 1, 0)),
])
def test_seeds_count_on_past_the_last_one(seed, seeds):
    assert resolved(["a", "b"], seed=seed).seeds == seeds


@pytest.mark.parametrize("value, told", [
    (0.5, "0.5"), (600.0001, "600.0001"), (1e9, "1e+09"), (math.nan, "nan"), (-1, "-1"),
])
def test_a_number_in_an_error_is_the_one_that_was_given(value, told):
    assert exact(value) == told


@pytest.mark.parametrize("options, told", [
    ({"guidance_interval": (0, 1.0000001)}, "got 0 to 1.0000001"), ({"eta": 1.0000001}, "from 0 to 1, got 1.0000001"),
    ({"seconds": 2, "prompt_at": [(2.0000001, "x")]}, "inside the 2 seconds of sound, got 2.0000001"),
])
def test_a_value_beyond_a_limit_is_not_rounded_to_it(options, told):
    with pytest.raises(ValueError, match=f"{told}$"):
        resolved("a dog", **options)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "transcription", "phonemes"])
def test_a_text_with_a_zero_character_which_no_tag_can_hold_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} contains a zero character at index 1"):
        Settings(**{name: "a\0b"})


@pytest.mark.parametrize("side, length", [("after", 3.0), ("before", 3.0), ("both", 5.0)])
def test_an_extension_is_as_long_as_the_input_and_what_is_added(side, length):
    extended = Settings.create("extend", prompt="a", seconds=2, side=side, prompt_at=[(2.9, "b")]).resolved()
    assert extended.length(1.0) == length
    assert Settings("a", seconds=2).resolved().length() == 2
    assert Settings.create("variations").resolved().length(1.0) == 1
    with pytest.raises(ValueError, match=r"inside the 2\.5 seconds of sound, got 2\.9$"):
        extended.resolved(duration=2.5)

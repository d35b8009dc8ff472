"""Ranges, masks on the latent grid, masked sampling against the authors."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm2 import samplers
from ldm2.edit import masks
from ldm2.mel import MEL_16KHZ, MEL_48KHZ, MelConfig, mel_edges
from ldm2.option_kinds import parse_range
from ldm2.schedules import Schedule

SCHEDULE = Schedule(1000, 0.0015, 0.0195, "scaled_linear", steps_offset=1, set_alpha_to_one=False)


def times_mask(times, num_frames=16, seconds=0.64, **options):
    return masks.keep_mask(num_frames, seconds, MEL_16KHZ, 4, times=times, **options)[0, 0, :, 0]


def bands_mask(bands, **options):
    return masks.keep_mask(2, 0.08, MEL_16KHZ, 4, bands=bands, **options)[0, 0, 0]


# --- ranges ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [("2.5:4.0", (2.5, 4.0)), (" 7 : 8 ", (7.0, 8.0)), ("3:", (3.0, None)),
                                            (":3", (None, 3.0)), (":", (None, None))])
def test_a_range_is_written_with_a_colon(text, expected):
    assert parse_range(text) == expected


@pytest.mark.parametrize("text", ["", "3", "1:2:3", "a:b", "1-2", "1,5:2"])
def test_what_is_no_range_is_named(text):
    with pytest.raises(ValueError, match=f"FROM:TO, for example 2.5:4, got '{text}'"):
        parse_range(text)


@pytest.mark.parametrize("ranges, merged", [
    ([(1, 2)], ((1, 2),)),
    ([(5, 6), (1, 2)], ((1, 2), (5, 6))),
    ([(1, 3), (2, 4)], ((1, 4),)),
    ([(1, 2), (2, 3)], ((1, 3),)),
    ([(1, 9), (2, 3)], ((1, 9),)),
    ([(1, 2), (1, 2)], ((1, 2),)),
    ([(None, 2), (8, None)], ((0, 2), (8, 10))),
    ([(None, None), (2, 3)], ((0, 10),)),
])
def test_ranges_are_sorted_and_joined(ranges, merged):
    assert masks.merge_ranges(ranges, 10.0) == merged


@pytest.mark.parametrize("ranges, message", [
    ([(4, 2.5)], "the range 4:2.5 s must end after it begins"),
    ([(1, 2), (3, 3)], "the range 3:3 s must end after it begins"),
    ([(9, 10.5)], "the range 9:10.5 s is not within 0:10 s"),
    ([(12, 13)], "the range 12:13 s is not within 0:10 s"),
    ([(12, None)], "the range 12:10 s must end after it begins"),
    ([(-1, 2)], "the range -1:2 s is not within 0:10 s"),
    ([(math.nan, 2)], "two finite numbers of s, got nan"),
    ([(1, math.inf)], "two finite numbers of s, got inf"),
    ([("1", 2)], "two finite numbers of s, got '1'"),
    ([], "at least one range"),
])
def test_an_impossible_range_is_named(ranges, message):
    with pytest.raises(ValueError, match=message):
        masks.merge_ranges(ranges, 10.0)


@pytest.mark.parametrize("strength, start", [(0, 200), (1, 0), (0.6, 80), (0.001, 200), (0.999, 0), (0.5, 100)])
def test_strength_is_the_share_of_the_steps_that_are_taken(strength, start):
    assert masks.start_step(strength, 200) == start


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan, "0.5", True])
def test_an_impossible_strength_is_named(strength):
    with pytest.raises(ValueError, match="strength must be a number from 0 to 1, got "):
        masks.start_step(strength, 200)


# --- masks -----------------------------------------------------------------------------------------------------------

def test_a_range_on_the_grid_is_made_anew_and_nothing_else():
    assert torch.equal(times_mask([(0.16, 0.48)]), torch.tensor([1.0] * 4 + [0.0] * 8 + [1.0] * 4))


def test_every_frame_that_a_range_reaches_into_is_made_anew():
    assert torch.equal(times_mask([(0.159, 0.481)]), torch.tensor([1.0] * 3 + [0.0] * 10 + [1.0] * 3))


def test_a_range_within_one_frame_makes_it_anew():
    assert torch.equal(times_mask([(0.09, 0.1)], soft_seconds=1.0), torch.tensor([1.0] * 2 + [0.0] + [1.0] * 13))


def test_borders_on_the_grid_take_no_neighbour_by_rounding():
    for frame in range(250):
        mask = times_mask([(frame * 0.04, (frame + 1) * 0.04)], num_frames=250, seconds=10.0)
        assert torch.equal(mask, (torch.arange(250) != frame).float()), frame


def test_several_ranges_are_made_anew():
    mask = times_mask([(0.4, 0.48), (0, 0.08), (0.04, 0.12)])
    assert torch.equal(mask, torch.tensor([0.0] * 3 + [1.0] * 7 + [0.0] * 2 + [1.0] * 4))


def test_a_range_to_the_end_of_the_sound_goes_on_to_the_end_of_the_grid():
    assert torch.equal(times_mask([(0.4, 0.5)], seconds=0.5), torch.tensor([1.0] * 10 + [0.0] * 6))
    assert torch.equal(times_mask([(0.4, None)], seconds=0.5), torch.tensor([1.0] * 10 + [0.0] * 6))


def test_a_soft_border_is_a_ramp_inside_the_range():
    mask = times_mask([(0.08, 0.56)], soft_seconds=0.12)
    third = 1 / 3
    expected = torch.tensor([1, 1, 2 * third, third, *[0.0] * 8, third, 2 * third, 1, 1])
    torch.testing.assert_close(mask, expected)


def test_a_soft_border_takes_at_most_a_quarter_of_the_range():
    mask = times_mask([(0.16, 0.48)], soft_seconds=10.0)
    torch.testing.assert_close(mask, torch.tensor([1.0] * 4 + [0.5, *[0.0] * 6, 0.5] + [1.0] * 4))


def test_the_ends_of_the_sound_have_no_soft_border():
    assert torch.equal(times_mask([(None, 0.32)], soft_seconds=0.08)[:6], torch.zeros(6))
    assert torch.equal(times_mask([(0.32, None)], soft_seconds=0.08)[-6:], torch.zeros(6))


def test_neither_times_nor_bands_means_everything():
    assert torch.equal(masks.keep_mask(16, 0.64, MEL_16KHZ, 4), torch.zeros(1, 1, 16, 16))


def test_times_and_bands_make_anew_what_lies_in_both():
    mask = masks.keep_mask(16, 0.64, MEL_16KHZ, 4, times=[(0.16, 0.48)], bands=[(4000, None)])
    both = torch.outer(1 - times_mask([(0.16, 0.48)]), 1 - bands_mask([(4000, None)]))
    assert torch.equal(mask[0, 0], 1 - both)


def test_the_product_of_two_masks_is_the_authors():
    """Their time_mask_ratio (0.25, 0.75) and freq_mask_ratio (0.75, 1) on 16 x 8 latents of 32 mel bins."""
    config = MelConfig(num_mels=32)
    edges = mel_edges(config)
    border = float(edges[24] + edges[25]) / 2                                # between the peaks of filters 23 and 24
    times = masks.keep_mask(16, 0.64, config, 4, times=[(0.16, 0.48)])
    bands = masks.keep_mask(16, 0.64, config, 4, bands=[(border + 20, 8000)])
    expected = torch.ones(1, 1, 16, 8)
    expected[:, :, 4:12] = 0
    expected[:, :, :, 6:] = 0
    assert torch.equal(times * bands, expected)


@pytest.mark.parametrize("config, factor", [(MEL_16KHZ, 4), (MEL_48KHZ, 8)])
def test_a_band_makes_anew_the_bins_whose_filters_peak_in_it(config, factor):
    low, high = 700.0, 4000.0
    peaks = mel_edges(config)[1:-1]
    inside = ((peaks > low) & (peaks < high)).reshape(-1, factor)
    mask = masks.keep_mask(1, 0.01, config, factor, bands=[(low, high)])[0, 0, 0]
    assert (mask[inside.any(1)] == 0).all()
    assert abs(int((mask == 0).sum()) - int(inside.any(1).sum())) <= 1


def test_above_a_frequency_is_up_to_the_highest_bin():
    mask = bands_mask([(4000, None)])
    assert torch.equal(mask, (torch.arange(16) < int(mask.sum())).float())
    assert 10 <= int(mask.sum()) <= 12


def test_a_band_over_everything_makes_all_bins_anew():
    assert torch.equal(bands_mask([(0, 8000)], soft_hz=500), torch.zeros(16))


def test_a_soft_band_has_a_ramp_below_4000_hz_and_none_at_the_top():
    mask = bands_mask([(2000, None)], soft_hz=2000)
    assert torch.equal(mask, mask.sort(descending=True).values)
    assert ((mask > 0) & (mask < 1)).sum() >= 2
    assert mask[-1] == 0


@pytest.mark.parametrize("options, message", [
    ({"times": [(0.5, 0.7)]}, "the range 0.5:0.7 s is not within 0:0.64 s"),
    ({"bands": [(4000, 9000)]}, "the range 4000:9000 Hz is not within 0:8000 Hz"),
    ({"times": []}, "at least one range"),
    ({"soft_seconds": -1}, "soft_seconds must be.* got -1"),
    ({"soft_hz": float("nan")}, "soft_hz must be.* got nan"),
])
def test_an_impossible_mask_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        masks.keep_mask(16, 0.64, MEL_16KHZ, 4, **options)


def test_mel_bins_that_do_not_fill_latent_ones_are_named():
    with pytest.raises(ValueError, match=r"num_mels.*vae_factor.*30 and 4"):
        masks.keep_mask(16, 0.64, MelConfig(num_mels=30), 4)


# --- masked sampling -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, sampler, eta", [("ddim_masked.s10.eta0", "ddim", 0.0),
                                                ("ddim_masked.s10.eta1", "ddim", 1.0),
                                                ("plms_masked.s10", "pndm", 0.0)])
def test_masked_sampling_equals_the_authors(name, sampler, eta):
    golden = load_file(Path(__file__).parents[1] / "data" / "golden_samplers.safetensors")
    run = {key.removeprefix(name + "."): value for key, value in golden.items() if key.startswith(name + ".")}
    fresh, steps = iter(run["q_noise"]), iter(run["noise"] if eta else ())

    def denoiser(x, t):
        return torch.einsum("ij,bjhw->bihw", golden["fake.A"], x) + t / 1000 * golden["fake.B"][None, :, None, None]

    states = []
    samplers.sample(sampler, denoiser, run["x_T"], SCHEDULE, 10, eta=eta, noise=lambda like: next(steps),
                    edit=masks.masked(run["x0"], run["mask"], lambda like: next(fresh)),
                    callback=lambda done, total, x: states.append(x))
    for state, expected in zip(states, run["x"], strict=True):
        torch.testing.assert_close(state, expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_with_any_sampler_the_kept_part_ends_near_the_input(sampler):
    generator = torch.Generator().manual_seed(0)

    def draw(like):
        return torch.randn(like.shape, generator=generator)

    def exact(x_t, t):
        """eps of data that are standard normal: their x_t are so as well."""
        return math.sqrt(1 - np.interp(t, range(1000), SCHEDULE.alphas_cumprod)) * x_t

    x0, keep = draw(torch.empty(1, 4, 16, 8)), torch.ones(1, 1, 16, 1)
    keep[:, :, 8:] = 0
    result = samplers.sample(sampler, exact, draw(x0), SCHEDULE, 50, noise=draw, edit=masks.masked(x0, keep, draw))
    distance = (result - x0).square().mean(dim=(0, 1, 3)).sqrt()
    assert distance[:8].max() < 0.3
    assert distance[8:].min() > 0.8                       # sqrt(2) for two draws; lcm ends with less variance

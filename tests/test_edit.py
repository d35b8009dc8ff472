"""Editing without a model: ranges, masks on the latent grid, masked sampling against the authors, joining waveforms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm2 import edit, samplers
from ldm2.mel import MEL_16KHZ, MEL_48KHZ, MelConfig, mel_edges
from ldm2.schedules import Schedule

RATE = 16_000
SCHEDULE = Schedule(1000, 0.0015, 0.0195, "scaled_linear", steps_offset=1, set_alpha_to_one=False)


def noise(*shape, seed=0, level=0.1):
    return (level * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def tone(hz, seconds=1.0, rate=RATE):
    return np.sin(2 * math.pi * hz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def times_mask(times, num_frames=16, seconds=0.64, **options):
    return edit.keep_mask(num_frames, seconds, MEL_16KHZ, 4, times=times, **options)[0, 0, :, 0]


def bands_mask(bands, **options):
    return edit.keep_mask(2, 0.08, MEL_16KHZ, 4, bands=bands, **options)[0, 0, 0]


# --- ranges ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [("2.5:4.0", (2.5, 4.0)), (" 7 : 8 ", (7.0, 8.0)), ("3:", (3.0, None)),
                                            (":3", (None, 3.0)), (":", (None, None))])
def test_a_range_is_written_with_a_colon(text, expected):
    assert edit.parse_range(text) == expected


@pytest.mark.parametrize("text", ["", "3", "1:2:3", "a:b", "1-2", "1,5:2"])
def test_what_is_no_range_is_named(text):
    with pytest.raises(ValueError, match=f"FROM:TO, for example 2.5:4, got '{text}'"):
        edit.parse_range(text)


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
    assert edit.merge_ranges(ranges, 10.0) == merged


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
        edit.merge_ranges(ranges, 10.0)


@pytest.mark.parametrize("strength, start", [(0, 200), (1, 0), (0.6, 80), (0.001, 200), (0.999, 0), (0.5, 100)])
def test_strength_is_the_share_of_the_steps_that_are_taken(strength, start):
    assert edit.start_step(strength, 200) == start


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan, "0.5", True])
def test_an_impossible_strength_is_named(strength):
    with pytest.raises(ValueError, match="strength must be a number from 0 to 1, got "):
        edit.start_step(strength, 200)


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
    assert torch.equal(edit.keep_mask(16, 0.64, MEL_16KHZ, 4), torch.zeros(1, 1, 16, 16))


def test_times_and_bands_make_anew_what_lies_in_both():
    mask = edit.keep_mask(16, 0.64, MEL_16KHZ, 4, times=[(0.16, 0.48)], bands=[(4000, None)])
    both = torch.outer(1 - times_mask([(0.16, 0.48)]), 1 - bands_mask([(4000, None)]))
    assert torch.equal(mask[0, 0], 1 - both)


def test_the_product_of_two_masks_is_the_authors():
    """Their time_mask_ratio (0.25, 0.75) and freq_mask_ratio (0.75, 1) on 16 x 8 latents of 32 mel bins."""
    config = MelConfig(num_mels=32)
    edges = mel_edges(config)
    border = float(edges[24] + edges[25]) / 2                                # between the peaks of filters 23 and 24
    times = edit.keep_mask(16, 0.64, config, 4, times=[(0.16, 0.48)])
    bands = edit.keep_mask(16, 0.64, config, 4, bands=[(border + 20, 8000)])
    expected = torch.ones(1, 1, 16, 8)
    expected[:, :, 4:12] = 0
    expected[:, :, :, 6:] = 0
    assert torch.equal(times * bands, expected)


@pytest.mark.parametrize("config, factor", [(MEL_16KHZ, 4), (MEL_48KHZ, 8)])
def test_a_band_makes_anew_the_bins_whose_filters_peak_in_it(config, factor):
    low, high = 700.0, 4000.0
    peaks = mel_edges(config)[1:-1]
    inside = ((peaks > low) & (peaks < high)).reshape(-1, factor)
    mask = edit.keep_mask(1, 0.01, config, factor, bands=[(low, high)])[0, 0, 0]
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
    ({"soft_seconds": -1}, "must not be negative, got -1 s and 0 Hz"),
])
def test_an_impossible_mask_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        edit.keep_mask(16, 0.64, MEL_16KHZ, 4, **options)


def test_mel_bins_that_do_not_fill_latent_ones_are_named():
    with pytest.raises(ValueError, match="num_mels must be a multiple of vae_factor, got 30 and 4"):
        edit.keep_mask(16, 0.64, MelConfig(num_mels=30), 4)


# --- masked sampling -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, sampler, eta", [("ddim_masked.s10.eta0", "ddim", 0.0),
                                                ("ddim_masked.s10.eta1", "ddim", 1.0),
                                                ("plms_masked.s10", "pndm", 0.0)])
def test_masked_sampling_equals_the_authors(name, sampler, eta):
    golden = load_file(Path(__file__).parent / "data" / "golden_samplers.safetensors")
    run = {key.removeprefix(name + "."): value for key, value in golden.items() if key.startswith(name + ".")}
    fresh, steps = iter(run["q_noise"]), iter(run["noise"] if eta else ())

    def denoiser(x, t):
        return torch.einsum("ij,bjhw->bihw", golden["fake.A"], x) + t / 1000 * golden["fake.B"][None, :, None, None]

    states = []
    samplers.sample(sampler, denoiser, run["x_T"], SCHEDULE, 10, eta=eta, noise=lambda like: next(steps),
                    edit=edit.masked(run["x0"], run["mask"], lambda like: next(fresh)),
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
    result = samplers.sample(sampler, exact, draw(x0), SCHEDULE, 50, noise=draw, edit=edit.masked(x0, keep, draw))
    distance = (result - x0).square().mean(dim=(0, 1, 3)).sqrt()
    assert distance[:8].max() < 0.3
    assert distance[8:].min() > 1


# --- joining waveforms -----------------------------------------------------------------------------------------------

TIMES = [(0.25, 0.5), (0.7, 0.9)]


def inside(times, num_samples, rate=RATE):
    t = np.arange(num_samples) / rate
    return np.logical_or.reduce([(t >= a) & (t < b) for a, b in times])


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 48_000])
def test_outside_the_ranges_every_sample_is_the_original(rate):
    original, edited = noise(2, rate), noise(rate, seed=1)
    result = edit.paste(original, edited, TIMES, rate)
    outside = ~inside(TIMES, rate, rate)
    assert result.dtype == np.float32
    assert result[:, outside].tobytes() == original[:, outside].tobytes()
    assert (result[:, ~outside] != original[:, ~outside]).all()


def test_between_the_crossfades_every_sample_is_the_edited():
    original, edited = noise(RATE), noise(RATE, seed=1)
    middle = inside([(a + 0.02, b - 0.02) for a, b in TIMES], RATE)
    assert np.array_equal(edit.paste(original, edited, TIMES, RATE)[middle], edited[middle])


def test_the_crossfade_has_equal_power():
    original, edited = np.ones(RATE, np.float32), np.zeros(RATE, np.float32)
    fades_out = edit.paste(original, edited, TIMES, RATE)
    fades_in = edit.paste(edited, original, TIMES, RATE)
    np.testing.assert_allclose(fades_out ** 2 + fades_in ** 2, 1, atol=1e-6)


def test_the_crossfade_is_monotonic_and_as_long_as_asked():
    result = edit.paste(np.ones(RATE, np.float32), np.zeros(RATE, np.float32), [(0.25, 0.5)], RATE, crossfade=0.05)
    falling = result[4000:4800]
    assert (np.diff(falling) < 0).all()
    assert falling[0] > 0.999
    assert 0 < falling[-1] < 0.01
    assert (result[4800:7200] == 0).all()
    assert np.array_equal(result[4000:8000], result[4000:8000][::-1])


def test_without_a_crossfade_the_edit_is_cut_in():
    original, edited = noise(RATE), noise(RATE, seed=1)
    result = edit.paste(original, edited, [(0.25, 0.5)], RATE, crossfade=0)
    assert np.array_equal(result, np.concatenate([original[:4000], edited[4000:8000], original[8000:]]))


def test_a_crossfade_takes_at_most_half_of_a_range():
    result = edit.paste(np.ones(RATE, np.float32), np.zeros(RATE, np.float32), [(0.25, 0.26)], RATE)
    assert result[4000:4160].min() < 0.02
    assert (result[:4000] == 1).all() and (result[4160:] == 1).all()


def test_the_ends_of_the_sound_have_no_crossfade():
    original, edited = noise(RATE), noise(RATE, seed=1)
    result = edit.paste(original, edited, [(None, 0.25), (0.75, None)], RATE)
    assert np.array_equal(result[:3000], edited[:3000])
    assert np.array_equal(result[-3000:], edited[-3000:])


def test_the_whole_sound_is_the_edited_one():
    original, edited = noise(RATE), noise(RATE, seed=1)
    assert np.array_equal(edit.paste(original, edited, [(None, None)], RATE), edited)


def test_pasting_changes_neither_sound():
    original, edited = noise(RATE), noise(RATE, seed=1)
    before = original.copy(), edited.copy()
    edit.paste(original, edited, TIMES, RATE)
    assert np.array_equal(original, before[0]) and np.array_equal(edited, before[1])


@pytest.mark.parametrize("length, times, crossfade, message", [
    (100, [(0, 0.1)], 0.02, "edited must have the 16000 samples of original, got 100"),
    (RATE, [(0.5, 1.5)], 0.02, "the range 0.5:1.5 s is not within 0:1 s"),
    (RATE, [(0.5, 0.50001)], 0.02, "the range 0.5:0.50001 s is shorter than one sample"),
    (RATE, [(0, 0.1)], -0.1, "seconds must be a finite number from 0 up, got -0.1"),
])
def test_what_cannot_be_pasted_is_named(length, times, crossfade, message):
    with pytest.raises(ValueError, match=message):
        edit.paste(noise(RATE), noise(length), times, RATE, crossfade)


def test_bands_come_from_the_edited_sound_and_the_rest_from_the_original():
    original, edited = tone(1000) + tone(6000), 0.5 * tone(1500) + 0.25 * tone(5000)
    result = edit.blend_bands(original, edited, [(4000, None)], RATE)
    np.testing.assert_allclose(result[2000:-2000], (tone(1000) + 0.25 * tone(5000))[2000:-2000], atol=1e-3)


def test_an_equal_sound_is_blended_to_itself():
    original = noise(2, RATE)
    np.testing.assert_allclose(edit.blend_bands(original, original, [(4000, None)], RATE), original, atol=1e-7)


def test_one_edited_channel_serves_all():
    original = noise(2, RATE)
    result = edit.blend_bands(original, noise(RATE, seed=1), [(4000, None)], RATE)
    alone = edit.blend_bands(original[1], noise(RATE, seed=1), [(4000, None)], RATE)
    np.testing.assert_allclose(result[1], alone, atol=1e-6)


def test_an_impossible_band_is_named():
    with pytest.raises(ValueError, match="the range 4000:9000 Hz is not within 0:8000 Hz"):
        edit.blend_bands(noise(RATE), noise(RATE), [(4000, 9000)], RATE)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (10,), (2, 10)])
def test_length_is_cut_or_filled_with_zeros(shape):
    waveform = noise(*shape)
    fitted = edit.fit_length(waveform, 7)
    assert fitted.shape == (*shape[:-1], 7)
    known = min(7, shape[-1])
    assert np.array_equal(fitted[..., :known], waveform[..., :known])
    assert (fitted[..., known:] == 0).all()


def test_an_extended_sound_stands_between_the_ranges():
    canvas, ranges = edit.extend_canvas(noise(2, RATE), RATE, before=0.5, after=0.25)
    assert canvas.shape == (2, 28_000)
    assert np.array_equal(canvas[:, 8000:24_000], noise(2, RATE))
    assert edit.merge_ranges(ranges, 1.75) == ((0.0, 0.52), (1.48, 1.75))


def test_an_extended_sound_is_pasted_without_a_hole():
    original = np.ones(RATE, np.float32)
    canvas, ranges = edit.extend_canvas(original, RATE, after=0.5)
    result = edit.paste(canvas, np.ones(24_000, np.float32), ranges, RATE)
    assert np.array_equal(result[:15_680], original[:15_680])
    assert result.min() == 1


def test_an_extension_may_be_on_one_side():
    assert edit.extend_canvas(noise(RATE), RATE, after=0.5)[1] == [(0.98, None)]
    assert edit.extend_canvas(noise(RATE), RATE, before=0.5)[1] == [(None, 0.52)]


@pytest.mark.parametrize("before, after, message", [(0, 0, "seconds before or after, got 0 and 0"),
                                                    (-1, 1, "from 0 up, got -1"), (math.nan, 1, "from 0 up, got nan")])
def test_an_impossible_extension_is_named(before, after, message):
    with pytest.raises(ValueError, match=message):
        edit.extend_canvas(noise(RATE), RATE, before, after)

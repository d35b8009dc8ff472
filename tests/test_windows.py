"""Windows over a timeline: they cover it evenly, their weights sum to one, and averaging them is a denoiser."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ldm2.windows import average, plan, shares

LAYOUTS = [(100, 16, 4), (17, 16, 4), (1000, 64, 16), (33, 16, 0), (48, 16, 15), (40, 16, 8)]


def total(windows, num_frames):
    """Sum of the weights at each frame."""
    result = torch.zeros(num_frames)
    for window in windows:
        result.index_add_(0, window.frames, window.weights)
    return result


def edge_sensitive(prompts):
    """A denoiser that depends on the place in the window, on the time step and on nothing else."""
    def denoise(x, t):
        return x * torch.linspace(1, 2, x.shape[2])[:, None] + t
    return denoise


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("num_frames, window, overlap", LAYOUTS)
def test_weights_sum_to_one_in_each_frame(num_frames, window, overlap, loop):
    windows = plan(num_frames, window, overlap, loop=loop)
    assert torch.allclose(total(windows, num_frames), torch.ones(num_frames), atol=1e-6)


@pytest.mark.parametrize("num_frames, window, overlap", LAYOUTS)
def test_neighbours_share_the_overlap_at_least(num_frames, window, overlap):
    windows = plan(num_frames, window, overlap)
    starts = [int(w.frames[0]) for w in windows]
    assert starts[0] == 0 and starts[-1] == num_frames - window
    assert all(a + window - b >= overlap for a, b in pairwise(starts))


def test_the_number_of_windows_grows_linearly_with_the_length():
    counts = [len(plan(frames, 64, 16)) for frames in (256, 512, 1024, 2048)]
    assert counts == [5, 11, 21, 43]                       # one every 48 frames


@pytest.mark.parametrize("num_frames", [1, 15, 16])
def test_a_short_timeline_is_one_window_with_weight_one(num_frames):
    (window,) = plan(num_frames, 16, 4)
    assert torch.equal(window.frames, torch.arange(num_frames))
    assert torch.equal(window.weights, torch.ones(num_frames))


def test_one_window_is_the_plain_denoiser_bit_for_bit():
    x = torch.randn(2, 3, 10, 4)
    plain = edge_sensitive((0,))
    assert torch.equal(average(plan(10, 16, 4), edge_sensitive)(x, 7.0), plain(x, 7.0))


@pytest.mark.parametrize("loop", [False, True])
def test_windows_that_agree_average_to_what_they_agree_on(loop):
    x = torch.randn(2, 3, 50, 4)
    denoise = average(plan(50, 16, 4, loop=loop), lambda prompts: lambda x, t: x.sin() + t)
    assert torch.allclose(denoise(x, 3.0), x.sin() + 3.0, atol=1e-6)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 10, 16, 17, 24, 200])
def test_a_loop_has_two_windows_or_more_and_none_holds_a_frame_twice(num_frames):
    windows = plan(num_frames, 16, 4, loop=True)
    assert len(windows) >= 2
    assert all(len(set(w.frames.tolist())) == len(w.frames) == min(16, num_frames) for w in windows)


@pytest.mark.parametrize("num_frames", [16, 40, 200])
def test_the_joint_of_a_loop_is_in_the_middle_of_the_first_window(num_frames):
    first = plan(num_frames, 16, 4, loop=True)[0].frames.tolist()
    assert first[7:9] == [num_frames - 1, 0]


@pytest.mark.parametrize("num_frames, stride", [(48, 12), (12, 6)])
def test_a_rolled_loop_has_rolled_predictions(num_frames, stride):
    x = torch.randn(1, 2, num_frames, 3)
    denoise = average(plan(num_frames, 16, 4, loop=True), edge_sensitive)
    assert torch.allclose(denoise(x.roll(stride, 2), 1.0), denoise(x, 1.0).roll(stride, 2), atol=1e-6)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("borders", [[0], [0, 30], [0, 3, 5, 90]])
def test_shares_of_prompts_sum_to_one(borders, loop):
    result = shares(100, borders, 8, loop)
    assert result.shape == (len(borders), 100)
    assert (result >= 0).all()
    assert torch.allclose(result.sum(0), torch.ones(100, dtype=torch.float64))


def test_a_prompt_takes_over_at_its_border():
    first, second = shares(100, [0, 40], 8)
    assert torch.equal(second[:36], torch.zeros(36)) and torch.equal(second[44:], torch.ones(56))
    assert torch.allclose(second[36:44], (torch.arange(8) + 0.5).double() / 8)
    assert torch.allclose(first, 1 - second)


def test_the_last_prompt_of_a_loop_fades_into_the_first_at_the_joint():
    first, second = shares(100, [0, 40], 8, loop=True)
    assert float(second[99]) == pytest.approx(1 - float(first[99])) == pytest.approx(0.5, abs=0.1)
    assert float(first[0]) == pytest.approx(0.5, abs=0.1)
    assert float(first[20]) == 1 and float(second[70]) == 1


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("at_once", [1, 3])
def test_each_frame_is_predicted_with_the_prompt_that_holds_there(loop, at_once):
    def denoisers(prompts):
        return lambda x, t: torch.cat([torch.full_like(x[:1], float(p)) for p in prompts])

    borders = [0, 30, 61]
    windows = plan(90, 16, 4, loop=loop, borders=borders)
    prediction = average(windows, denoisers, at_once)(torch.zeros(1, 1, 90, 1), 0.0)
    expected = (shares(90, borders, 4, loop) * torch.arange(3.0)[:, None]).sum(0)
    assert torch.allclose(prediction[0, 0, :, 0], expected.float(), atol=1e-6)


def test_a_prompt_costs_windows_only_where_it_holds():
    one, two = plan(1000, 64, 16), plan(1000, 64, 16, borders=[0, 500])
    assert len(one) < len(two) <= len(one) + 2
    assert [w.prompt for w in two] == sorted(w.prompt for w in two)


@pytest.mark.parametrize("at_once", [2, 5, 100])
def test_windows_below_each_other_give_the_same_as_one_after_another(at_once):
    x = torch.randn(2, 3, 90, 4)
    windows = plan(90, 16, 4)
    alone, together = (average(windows, edge_sensitive, n)(x, 2.0) for n in (1, at_once))
    assert torch.equal(alone, together)


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_model_call_does_not_grow_with_the_length(at_once):
    sizes = []
    denoise = average(plan(1000, 16, 4), lambda prompts: lambda x, t: sizes.append(x.shape) or x, at_once)
    denoise(torch.zeros(1, 2, 1000, 4), 0.0)
    assert max(sizes) == (at_once, 2, 16, 4)


def test_each_window_has_a_denoiser_of_its_own_for_all_steps():
    asked = []

    def denoisers(prompts):
        asked.append(prompts)
        return edge_sensitive(prompts)

    denoise = average(plan(200, 16, 4, borders=[0, 100]), denoisers)
    denoise(torch.zeros(1, 1, 200, 1), 0.0)
    denoise(torch.zeros(1, 1, 200, 1), 1.0)
    assert asked == [(window.prompt,) for window in plan(200, 16, 4, borders=[0, 100])]


@pytest.mark.parametrize("overlap", [-1, 16, 20])
def test_an_overlap_that_leaves_no_progress_is_refused(overlap):
    with pytest.raises(ValueError, match=f"16 frames.*{overlap}"):
        plan(100, 16, overlap)

"""The vocoder: equal to transformers' SpeechT5HifiGan on random weights, lengths, and errors."""

import copy

import pytest
import torch

from benchmarks import checkpoints
from ldm2.config import VocoderConfig
from ldm2.vocoder import Vocoder
from tests.helpers import draw

AT_48_KHZ = {
    "sampling_rate": 48000,
    "upsample_rates": [6, 5, 4, 2, 2],
    "upsample_kernel_sizes": [12, 10, 8, 4, 4],
    "resblock_kernel_sizes": [3, 7, 11, 15],
    "resblock_dilation_sizes": [[1, 3, 5]] * 4,
}
STANDARDISED = {"normalize_before": True, "leaky_relu_slope": 0.2}


def ours_of(theirs, folder):
    """Our vocoder with the weights and the saved config of transformers' module."""
    theirs.config.save_pretrained(folder)
    with torch.device("meta"):
        vocoder = Vocoder(VocoderConfig.from_json(folder / "config.json"))
    vocoder.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return vocoder.eval()


@pytest.fixture(scope="module", params=[{}, AT_48_KHZ, STANDARDISED], ids=["16 kHz", "48 kHz", "standardised"])
def pair(request, tmp_path_factory):
    theirs = checkpoints.vocoder(**request.param)
    theirs.mean.copy_(draw(32, seed=3))
    theirs.scale.copy_(1.5 + draw(32, seed=4).abs())
    return theirs, ours_of(theirs, tmp_path_factory.mktemp("vocoder"))


@pytest.fixture(scope="module")
def vocoder(tmp_path_factory):
    return ours_of(checkpoints.vocoder(), tmp_path_factory.mktemp("vocoder"))


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 2, 9])
def test_the_waveform_equals_transformers(pair, num_frames):
    theirs, vocoder = pair
    mel = draw(2, num_frames, 32)
    torch.testing.assert_close(vocoder(mel), theirs(mel), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind, hop_length, beyond", [({}, 160, 32), (AT_48_KHZ, 480, 16)])
def test_the_waveform_reaches_some_samples_past_the_last_frame(kind, hop_length, beyond, tmp_path):
    vocoder = ours_of(checkpoints.vocoder(**kind), tmp_path)
    assert vocoder.config.hop_length == hop_length
    assert vocoder(draw(1, 7, 32)).shape == (1, 7 * hop_length + beyond)


@torch.no_grad()
def test_a_mel_with_its_channel_axis_is_the_same(vocoder):
    mel = draw(2, 5, 32)
    assert torch.equal(vocoder(mel[:, None]), vocoder(mel))


@torch.no_grad()
def test_one_frame_keeps_its_axis(vocoder):
    assert vocoder(draw(1, 1, 1, 32)).shape == (1, 192)


@torch.no_grad()
def test_the_waveform_stays_within_full_scale(vocoder):
    assert vocoder(100 * draw(1, 9, 32)).abs().max() <= 1


@torch.no_grad()
def test_half_precision_is_as_near_to_float64_as_transformers_is(tmp_path):
    theirs = checkpoints.vocoder()
    vocoder, mel = ours_of(theirs, tmp_path), draw(2, 9, 32)
    exact = copy.deepcopy(vocoder).double()(mel.double())
    for dtype in (torch.float16, torch.bfloat16):
        got = copy.deepcopy(vocoder).to(dtype)(mel.to(dtype))
        baseline = copy.deepcopy(theirs).to(dtype)(mel.to(dtype))
        assert got.dtype == dtype
        assert (got - exact).abs().mean() <= 2 * (baseline - exact).abs().mean()


@torch.no_grad()
def test_rows_do_not_see_each_other(vocoder):
    mel = draw(2, 5, 32)
    torch.testing.assert_close(vocoder(mel)[1:], vocoder(mel[1:]), atol=1e-6, rtol=0)


def test_gradients_reach_every_parameter(vocoder):
    vocoder = copy.deepcopy(vocoder).train()
    vocoder(draw(2, 5, 32)).square().mean().backward()
    assert [name for name, p in vocoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_only_mean_and_scale_are_buffers_as_in_the_files(vocoder):
    assert [name for name, _ in vocoder.named_buffers()] == ["mean", "scale"]


@pytest.mark.parametrize("shape", [(5, 32), (1, 5, 31), (1, 2, 5, 32), (1, 32, 5)])
def test_a_mel_that_does_not_fit_is_refused(vocoder, shape):
    with pytest.raises(ValueError, match=r"mel must be \(B, T, 32\), got"):
        vocoder(torch.zeros(shape))


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_cuda_is_near_the_cpu(pair, dtype, tolerance):
    vocoder, mel = pair[1], draw(2, 9, 32)
    got = copy.deepcopy(vocoder).to("cuda", dtype)(mel.to("cuda", dtype)).cpu().float()
    assert (got - vocoder(mel)).abs().max() <= tolerance

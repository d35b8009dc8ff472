"""The convolutional pieces and the time embedding, each against diffusers' layer or its formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import embeddings, resnet

from benchmarks.checkpoints import randomise
from ldm2.layers import Downsample, ResnetBlock, TimestepEmbedding, Upsample, tile_batch, timestep_embedding
from tests.helpers import draw


def test_repeat_rows_tiles_the_batch():
    x = draw(2, 3, 4)
    assert torch.equal(tile_batch(x, 6), torch.cat([x, x, x]))


def test_repeat_rows_returns_x_itself_where_nothing_is_to_do():
    x = draw(2, 3)
    assert tile_batch(x, 2) is x


def test_timestep_embedding_is_cosines_then_sinusoids_of_falling_frequency():
    t, dim = torch.tensor([0.0, 1.0, 999.0]), 16
    freqs = [10_000 ** (-i / 8) for i in range(8)]
    expected = [[math.cos(s * f) for f in freqs] + [math.sin(s * f) for f in freqs] for s in t.tolist()]
    torch.testing.assert_close(timestep_embedding(t, dim), torch.tensor(expected), atol=2e-4, rtol=0)


def test_timestep_embedding_is_bit_equal_to_the_one_used_in_training():
    t = torch.arange(1000)
    expected = embeddings.get_timestep_embedding(t, 128, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(t, 128), expected)


def test_timestep_embedding_takes_times_between_the_steps():
    low, middle, high = timestep_embedding(torch.tensor([10.0, 10.5, 11.0]), 8)
    assert not torch.equal(middle, low) and not torch.equal(middle, high)


def test_timestep_embedding_refuses_an_odd_width():
    with pytest.raises(ValueError, match="dim must be even, got 7"):
        timestep_embedding(torch.zeros(1), 7)


def test_the_time_mlp_equals_diffusers():
    ours = randomise(TimestepEmbedding(16), seed=1)
    theirs = embeddings.TimestepEmbedding(16, 64).eval()
    theirs.load_state_dict(ours.state_dict())
    t = torch.tensor([3, 500])
    torch.testing.assert_close(ours(t), theirs(timestep_embedding(t, 16)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_time_mlp_forms_its_sinusoids_in_float32(dtype):
    module = randomise(TimestepEmbedding(16), seed=1)
    t = torch.tensor([997, 998])
    expected = module(t)
    got = module.to(dtype)(t)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("in_channels, out_channels", [(8, 8), (8, 12)])
@pytest.mark.parametrize("emb_dim", [None, 20])
def test_a_resnet_block_equals_diffusers(in_channels, out_channels, emb_dim):
    ours = randomise(ResnetBlock(in_channels, out_channels, 4, 1e-5, emb_dim), seed=2)
    theirs = resnet.ResnetBlock2D(
        in_channels=in_channels, out_channels=out_channels, temb_channels=emb_dim, groups=4, eps=1e-5
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    x, emb = draw(2, in_channels, 5, 3), None if emb_dim is None else draw(2, emb_dim, seed=1)
    shift = None if emb_dim is None else ours.time_emb_proj(F.silu(emb)) + ours.conv1.bias
    torch.testing.assert_close(ours(x, shift), theirs(x, emb), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("x_rows, shift_rows, rows", [(2, 1, 2), (2, 2, 2), (2, 4, 4), (4, 2, 4), (1, 2, 2)])
def test_a_resnet_block_tiles_the_side_with_fewer_rows(x_rows, shift_rows, rows):
    block = randomise(ResnetBlock(8, 8, 4, 1e-5, 20), seed=2)
    x, shift = draw(x_rows, 8, 5, 3), draw(shift_rows, 8, seed=1)
    expected = block(tile_batch(x, rows), tile_batch(shift, rows))
    torch.testing.assert_close(block(x, shift), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (2, 3)])
@pytest.mark.parametrize("padding", [0, 1])
def test_downsample_equals_diffusers(size, padding):
    ours = randomise(Downsample(4, padding), seed=3)
    theirs = resnet.Downsample2D(4, use_conv=True, out_channels=4, padding=padding, name="op")
    theirs.load_state_dict(ours.state_dict())
    x = draw(2, 4, *size)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("size", [None, (10, 6), (9, 5)])
def test_upsample_equals_diffusers(size):
    ours = randomise(Upsample(4), seed=4)
    theirs = resnet.Upsample2D(4, use_conv=True, out_channels=4)
    theirs.load_state_dict(ours.state_dict())
    x = draw(2, 4, 5, 3)
    assert ours(x, size).shape[2:] == ((10, 6) if size is None else size)
    torch.testing.assert_close(ours(x, size), theirs(x, size))

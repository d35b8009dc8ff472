"""Each operation against its formula written out in float64; strided inputs; gradients."""

import math

import pytest
import torch

from ldm2 import ops

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
CLOSE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normalised(x, axes, eps):
    x = x.double()
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(axes, keepdim=True) + eps).sqrt()


def grouped(x, num_groups, weight, bias, eps):
    groups = normalised(x.unflatten(1, (num_groups, -1)), tuple(range(2, x.dim() + 1)), eps).flatten(1, 2)
    return groups * weight.double()[:, None, None] + bias.double()[:, None, None]


def silu(x):
    return x / (1 + torch.exp(-x))


def assert_near(got, expected, dtype):
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
def test_group_norm_standardises_each_group_of_channels(dtype):
    x, weight, bias = draw(2, 6, 5, 3, dtype=dtype), draw(6, seed=1, dtype=dtype), draw(6, seed=2, dtype=dtype)
    assert_near(ops.group_norm(x, 3, weight, bias, 1e-6), grouped(x, 3, weight, bias, 1e-6), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [None, 1, 2])
def test_group_norm_silu_adds_the_shift_before_it_normalises(dtype, rows):
    x, weight, bias = draw(2, 6, 5, 3, dtype=dtype), draw(6, seed=1, dtype=dtype), draw(6, seed=2, dtype=dtype)
    shift = None if rows is None else draw(rows, 6, seed=3, dtype=dtype)
    shifted = x if shift is None else x + shift[:, :, None, None]
    got = ops.group_norm_silu(x, 3, weight, bias, 1e-5, shift)
    assert_near(got, silu(grouped(shifted, 3, weight, bias, 1e-5)), dtype)


def test_group_norm_silu_leaves_its_input_alone():
    x = draw(2, 6, 5, 3)
    before = x.clone()
    ops.group_norm_silu(x, 3, torch.ones(6), torch.zeros(6), 1e-5, shift=torch.ones(1, 6))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm_standardises_the_last_axis(dtype):
    x, weight, bias = draw(2, 5, 6, dtype=dtype), draw(6, seed=1, dtype=dtype), draw(6, seed=2, dtype=dtype)
    expected = normalised(x, (-1,), 1e-5) * weight.double() + bias.double()
    assert_near(ops.layer_norm(x, weight, bias, 1e-5), expected, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_geglu_gates_with_the_exact_gelu(dtype):
    x, gate = draw(2, 5, 6, dtype=dtype), draw(2, 5, 6, seed=1, dtype=dtype)
    expected = x.double() * gate.double() * 0.5 * (1 + torch.erf(gate.double() / math.sqrt(2)))
    assert_near(ops.geglu(x, gate), expected, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_weighs_values_by_the_softmax_of_scaled_scores(dtype, masked):
    q = draw(2, 3, 7, 8, dtype=dtype)
    k, v = draw(2, 3, 5, 8, seed=1, dtype=dtype), draw(2, 3, 5, 8, seed=2, dtype=dtype)
    bias = draw(2, 1, 1, 5, seed=3, dtype=dtype) if masked else None
    scores = q.double() @ k.double().mT / math.sqrt(8) + (bias.double() if masked else 0)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    assert_near(ops.attention(q, k, v, bias), weights @ v.double(), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_leaky_relu_scales_what_is_negative(dtype):
    x = draw(2, 5, 6, dtype=dtype)
    assert_near(ops.leaky_relu(x, 0.1), torch.where(x > 0, x.double(), 0.1 * x.double()), dtype)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_group_norm_survives_a_large_mean(offset):
    x = draw(1, 4, 9, 7)
    weight, bias = torch.ones(4), torch.zeros(4)
    expected = grouped(x.double() + offset, 2, weight, bias, 1e-5)
    torch.testing.assert_close(ops.group_norm(x + offset, 2, weight, bias, 1e-5).double(), expected, atol=2e-4, rtol=0)


def test_strided_inputs_give_the_same_as_dense_ones():
    x = draw(2, 5, 3, 8).permute(0, 3, 1, 2)
    weight, bias = draw(8, seed=1), draw(8, seed=2)
    dense = ops.group_norm_silu(x.contiguous(), 4, weight, bias, 1e-5)
    torch.testing.assert_close(ops.group_norm_silu(x, 4, weight, bias, 1e-5), dense)
    value, gate = draw(2, 5, 12).chunk(2, dim=-1)
    torch.testing.assert_close(ops.geglu(value, gate), ops.geglu(value.contiguous(), gate.contiguous()))


def test_gradients_are_those_of_finite_differences():
    def chain(x, weight, bias, shift):
        h = ops.group_norm_silu(x, 2, weight, bias, 1e-5, shift)
        h = ops.group_norm(ops.leaky_relu(h, 0.1), 2, weight, bias, 1e-6).flatten(2).mT
        h = ops.layer_norm(h, weight, bias, 1e-5)
        h = ops.geglu(*h.chunk(2, dim=-1))[:, None]
        return ops.attention(h, h, h)

    inputs = [draw(1, 4, 2, 3, seed=1), draw(4, seed=2), draw(4, seed=3), draw(1, 4, seed=4)]
    assert torch.autograd.gradcheck(chain, [x.double().requires_grad_() for x in inputs])

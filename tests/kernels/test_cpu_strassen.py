"""Linear layers of many rows, by Strassen's algorithm on CPUs, against float64."""

import pytest
import torch
import torch.nn.functional as F

from ldm2 import ops
from tests.helpers import draw
from tests.kernels.inputs import assert_within_the_accuracy_rule, linear_inputs, rms

SHAPES = [(128, 256, 64), (130, 288, 192), (158, 352, 320), (300, 512, 128)]


def worst_share(got, exact, dim):
    """The largest error of a row (dim=-1) or an output channel (dim=(0, 1)), as a share of what it holds."""
    error, size = ((x.double().square().mean(dim)).sqrt() for x in (got.double() - exact, exact))
    return float((error / size.clamp(min=1e-300)).max())


def in_float64(x, weight, bias):
    return F.linear(x.double(), weight.double(), bias.double())


@pytest.mark.parametrize("rows, ins, outs", SHAPES)
def test_they_are_as_exact_as_the_rule_asks(library, rows, ins, outs):
    x, weight, bias = linear_inputs(rows, ins, outs)
    assert_within_the_accuracy_rule(ops.linear, (x, weight, bias))
    assert_within_the_accuracy_rule(ops.linear, (x, weight))
    assert_within_the_accuracy_rule(ops.linear_geglu, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_as_exact_with_every_instruction_set(instruction_set, dtype):
    """bfloat16 too where the processor has no products for it."""
    inputs = [part.to(dtype) for part in linear_inputs(134, 288, 192)]
    assert_within_the_accuracy_rule(ops.linear, inputs)
    assert_within_the_accuracy_rule(ops.linear_geglu, inputs)


@pytest.mark.parametrize("change", [
    lambda x: x + 5, lambda x: x.abs(), lambda x: F.gelu(3 * x), lambda x: x.cumsum(-1), lambda x: 1e4 * x,
    lambda x: x * torch.where(torch.arange(288) % 50 == 7, 100, 1), lambda x: x**9,
], ids=["mean", "positive", "gelu", "smooth", "large", "outliers", "tails"])
def test_they_are_as_exact_whatever_the_numbers_are_like(instruction_set, change):
    """Words of one sign, or like their neighbors, or of another size than the weights, do not lose digits."""
    x, weight, bias = linear_inputs(130, 288, 128)
    assert_within_the_accuracy_rule(ops.linear, (change(x), weight, bias))
    assert_within_the_accuracy_rule(ops.linear, (x, change(weight), bias))


@pytest.mark.parametrize("rows, ins, outs, fewer", [
    *[(*shape, True) for shape in SHAPES], (129, 256, 64, False), (126, 256, 64, None), (64, 256, 64, None),
    (62, 256, 64, False), (128, 224, 64, False), (128, 272, 64, False), (128, 256, 48, False),
])
def test_what_takes_fewer_multiplications(library, rows, ins, outs, fewer):
    """Items of an even number of rows, at least 128 (with zen4 64), and wide layers. A lone matrix has items of one
    row."""
    if fewer is None:
        fewer = library.instruction_sets()[0] == "zen4"
    x, weight, bias = linear_inputs(rows, ins, outs)
    plain = library.linear(x.flatten(0, 1), weight, bias, False).view(2, rows, outs)
    assert torch.equal(library.linear(x, weight, bias, False), plain) != fewer


@pytest.mark.parametrize("gated", [False, True])
def test_items_of_a_batch_do_not_meet(library, gated):
    x, weight, bias = linear_inputs(130, 256, 128)
    alone = [library.linear(item[None], weight, bias, gated) for item in x]
    assert torch.equal(library.linear(x, weight, bias, gated), torch.cat(alone))
    x[0, -1, 3] = float("nan")
    spoiled = library.linear(x, weight, bias, gated)
    assert spoiled[0, -1].isnan().all() and not spoiled[0, :-2].isnan().any()
    assert torch.equal(spoiled[1], alone[1][0])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_do_not_change_them(library, threads, gated):
    x, weight, bias = linear_inputs(158, 256, 320)
    one = library.linear(x, weight, bias, gated)
    torch.set_num_threads(threads)
    try:
        several = library.linear(x, weight, bias, gated)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, several)


def test_pieces_of_the_rows_do_not_change_them(library):
    """Operands that do not fit the cache are made a piece at a time."""
    x, weight, bias = linear_inputs(1400, 2048, 64)
    pieces = [library.linear(x[:, start : start + 140], weight, bias, False) for start in range(0, 1400, 140)]
    assert torch.equal(library.linear(x, weight, bias, False), torch.cat(pieces, dim=1))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1e3, 1e30])
def test_a_row_of_another_size_than_its_neighbor_is_as_exact(library, size):
    x, weight, bias = linear_inputs(130, 256, 64)
    x[:, ::2] *= size
    bias *= 0 if size else 1
    got = library.linear(x, weight, bias, False)
    assert worst_share(got, in_float64(x, weight, bias), -1) < 2e-6


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 1e3, 1e30])
def test_an_output_of_another_size_than_its_neighbors_is_as_exact(library, size):
    x, weight, bias = linear_inputs(130, 256, 128)
    weight[:32] *= size
    weight[70] *= size
    bias[weight.abs().sum(1) > 0] = 0
    got = library.linear(x, weight, bias, False)
    assert worst_share(got, in_float64(x, weight, bias), (0, 1)) < 2.5e-6


def test_zeros_give_the_bias(library):
    x, weight, bias = linear_inputs(130, 256, 64)
    x[:, 1::2] = 0
    x[0, 0, 5] = 3e38
    assert torch.equal(library.linear(x, weight, bias, False)[:, 1::2], bias.expand(2, 65, 64))


def test_the_largest_and_the_smallest_numbers(library):
    x, weight, _ = linear_inputs(128, 256, 64)
    for size in (2.0**120, 2.0**-100):
        got = library.linear(x * size, weight, None, False)
        torch.testing.assert_close(got, library.linear(x, weight, None, False) * size, rtol=0, atol=0)


def test_strides_do_not_change_them(library):
    x, weight, bias = linear_inputs(130, 256, 64)
    expected = library.linear(x, weight, bias, False)
    wide = draw(2, 130, 300, seed=4)
    wide[..., 7:263] = x
    for other in (wide[..., 7:263], x.mT.contiguous().mT):
        assert torch.equal(library.linear(other, weight, bias, False), expected)


def test_maps_of_a_convolution_are_items_too(library):
    x, weight, bias = draw(2, 256, 13, 10), draw(64, 256, 1, 1, seed=1) / 16, draw(64, seed=2)
    got = ops.conv1x1(x, weight, bias)
    assert rms(got - F.conv2d(x.double(), weight.double(), bias.double())) < 1e-6
    assert torch.equal(got[1:], ops.conv1x1(x[1:], weight, bias))

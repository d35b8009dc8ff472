"""The operators of the CPU kernels in bfloat16. Sets without products of 16-bit numbers multiply float32."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import draw
from tests.kernels.inputs import block_inputs, conv_inputs, linear_inputs, rms

WIDE, NARROW = 0, 1


def rounded(args):
    return [arg.bfloat16() if isinstance(arg, torch.Tensor) else arg for arg in args]


def exact_conv(x, weight, bias, residual=None, dilation=1, slope=1.0):
    """In float64."""
    x, weight, bias = F.leaky_relu(x.double(), slope), weight.double(), bias.double()
    if x.dim() == 4:
        y = F.conv2d(x, weight, bias, padding=1)
    else:
        y = F.conv1d(x, weight, bias, padding=dilation * (weight.shape[2] // 2), dilation=dilation)
    return y if residual is None else y + residual.double()


def assert_as_exact_as_a_rounded_result(got, exact):
    """At most twice the error of the exact result rounded to bfloat16, which is what PyTorch has at best."""
    assert got.dtype == torch.bfloat16
    assert rms(got.double() - exact) <= 2 * rms(exact.bfloat16().double() - exact) + 3e-6 * rms(exact)


@pytest.mark.parametrize("shape", [
    (1, 32, 32, 16, 16), (2, 48, 32, 9, 7), (1, 32, 80, 5, 2), (2, 64, 64, 32, 2), (3, 32, 32, 1, 1),
    (1, 512, 32, 3, 66), (1, 1280, 32, 12, 4),
])
@pytest.mark.parametrize("with_residual", [False, True])
def test_conv3x3_rounds_once(library, shape, with_residual):
    x, weight, bias, residual = rounded(conv_inputs(*shape))
    residual = residual if with_residual else None
    got = library.convolution(x, weight, bias, residual, NARROW if shape[-1] == 2 else WIDE, 1, 1.0)
    assert_as_exact_as_a_rounded_result(got, exact_conv(x, weight, bias, residual))


@pytest.mark.parametrize("taps", [3, 7, 11])
@pytest.mark.parametrize("length, dilation", [(1, 1), (256, 3), (301, 5), (40, 1)])
@pytest.mark.parametrize("ins, outs", [(32, 48), (1024, 32)])
def test_conv1d_rounds_once(library, taps, length, dilation, ins, outs):
    x, weight, bias = rounded([draw(2, ins, length), draw(outs, ins, taps, seed=1), draw(outs, seed=2)])
    got = library.convolution(x, weight, bias, None, taps, dilation, 0.1)
    assert_as_exact_as_a_rounded_result(got, exact_conv(x, weight, bias, dilation=dilation, slope=0.1))


@pytest.mark.parametrize("change", [
    lambda x: x + 100,                                     # a mean that the transforms cancel
    lambda x: x * torch.logspace(-4, 4, x.shape[1])[:, None, None],          # channels of very unlike sizes
    lambda x: x * (torch.arange(x.shape[1]) == 5)[:, None, None],            # all in one channel
    lambda x: x * 1e-25,                                   # whose squares underflow
    lambda x: x * 1e25,                                    # overflow
    lambda x: x * torch.logspace(-20, 20, x.shape[2])[:, None],              # from row to row
])
def test_convolutions_keep_the_accuracy_rule_for_inputs_of_any_range(library, change):
    x, weight, bias, _ = conv_inputs(2, 64, 32, 13, 9)
    x, weight, bias = rounded([change(x), weight, 0 * bias])
    exact = exact_conv(x, weight, bias)
    assert_as_exact_as_a_rounded_result(library.convolution(x, weight, bias, None, WIDE, 1, 1.0), exact)
    swapped = exact_conv(weight[..., :1, :1].expand(-1, -1, 5, 5), x[:, :, 4:7, 4:7], bias[:2])      # as weights
    got = library.convolution(weight[..., :1, :1].expand(-1, -1, 5, 5), x[:, :, 4:7, 4:7].repeat(16, 1, 1, 1),
                              bias, None, WIDE, 1, 1.0)
    assert_as_exact_as_a_rounded_result(got[:, :2], swapped)


def test_integers_never_overflow(library):
    """All products of a point positive, and as large as they get: inputs and weights in proportion."""
    row = draw(256, seed=4).abs().bfloat16()
    x = row[None, :, None, None].expand(1, -1, 8, 8)
    weight = row[None, :, None, None].expand(32, -1, 3, 3)
    got = library.convolution(x, weight, None, None, WIDE, 1, 1.0)
    assert_as_exact_as_a_rounded_result(got, exact_conv(x, weight, torch.zeros(32)))


def test_zeros_give_the_bias(library):
    x, weight, bias, _ = rounded(conv_inputs(1, 32, 32, 6, 5))
    expected = bias[None, :, None, None].expand(1, -1, 6, 5)
    assert torch.equal(library.convolution(0 * x, weight, bias, None, WIDE, 1, 1.0), expected)
    assert torch.equal(library.convolution(x, 0 * weight, bias, None, WIDE, 1, 1.0), expected)


def test_subnormal_numbers_give_no_nan(library):
    x, weight, bias, _ = rounded(conv_inputs(1, 32, 32, 6, 5))
    got = library.convolution(x * 1e-39, weight, 0 * bias, None, WIDE, 1, 1.0)
    exact = exact_conv(x * 1e-39, weight, 0 * bias)
    assert rms(got.double() - exact) <= rms(exact)         # as PyTorch, whose products of bfloat16 take them for zeros


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_convolutions_hide_no_number_that_is_not_finite(library, value):
    x, weight, bias, _ = rounded(conv_inputs(1, 32, 32, 12, 12))
    spoilt = x.clone()
    spoilt[0, 3, 5, 5] = value
    got = library.convolution(spoilt, weight, bias, None, WIDE, 1, 1.0)
    assert not got[0, :, 4:7, 4:7].isfinite().any()
    assert got[0, :, :, 8:].isfinite().all()               # another tile
    weight[7, 3, 1, 1] = value
    got = library.convolution(x, weight, bias, None, WIDE, 1, 1.0)
    assert not got[0, 7].isfinite().any() and got[0, :7].isfinite().all()


@pytest.mark.parametrize("rows, ins, outs", [(1, 6, 16), (24, 768, 48), (37, 34, 32), (250, 1000, 16), (300, 390, 80)])
def test_linear_layers_round_once(library, rows, ins, outs):
    x, weight, bias = rounded(linear_inputs(rows, ins, outs))
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_as_exact_as_a_rounded_result(library.linear(x, weight, bias, False), exact)
    exact = F.linear(x.double(), weight.double())
    assert_as_exact_as_a_rounded_result(library.linear(x, weight, None, False), exact)
    if outs % 32 == 0:
        value, gate = F.linear(x.double(), weight.double(), bias.double()).chunk(2, dim=-1)
        assert_as_exact_as_a_rounded_result(library.linear(x, weight, bias, True), value * F.gelu(gate))


def test_linear_layers_take_any_strides(library):
    x, weight, bias = rounded(linear_inputs(40, 24, 32))
    expected = library.linear(x, weight, bias, False)
    wide, odd = torch.cat([x, x], dim=-1)[..., 24:], torch.cat([x, x[..., :1]], dim=-1)[..., :24]
    unaligned = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
    for other in (x.mT.contiguous().mT, wide, odd, unaligned, wide.unsqueeze(1).expand(-1, 3, -1, -1)[:, 1]):
        assert torch.equal(library.linear(other, weight.T.contiguous().T, bias, False), expected)


def test_an_odd_number_of_inputs_is_refused(library):
    with pytest.raises(RuntimeError, match="even number of inputs"):
        library.linear(*rounded(linear_inputs(30, 5, 16)), False)


def test_convolutions_take_any_memory_layout(library):
    x, weight, bias, residual = rounded(conv_inputs(2, 32, 32, 9, 8))
    expected = library.convolution(x, weight, bias, residual, WIDE, 1, 1.0)
    unaligned = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
    for other in (x.contiguous(memory_format=torch.channels_last), unaligned, x.mT.contiguous().mT):
        assert torch.equal(library.convolution(other, weight, bias, residual, WIDE, 1, 1.0), expected)


def test_neither_threads_nor_calls_beside_it_change_a_result(library):
    jobs = [
        lambda: library.convolution(*rounded(conv_inputs(2, 48, 64, 40, 24)), WIDE, 1, 1.0),
        lambda: library.convolution(*rounded(conv_inputs(2, 64, 64, 9, 2)), NARROW, 1, 1.0),
        lambda: library.convolution(*rounded(block_inputs(7)[:1]), *rounded(block_inputs(7)[3:5]), None, 7, 3, 0.1),
        lambda: library.linear(*rounded(linear_inputs(130, 40, 64)), True),
    ]
    one = [job() for job in jobs]
    torch.set_num_threads(2)
    try:
        several = [job() for job in jobs]
    finally:
        torch.set_num_threads(1)
    with ThreadPoolExecutor(4) as pool:
        beside = list(pool.map(lambda job: job(), 4 * jobs))
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(4 * one, beside, strict=True))


def test_every_instruction_set_rounds_once(library):
    best, *others = library.instruction_sets()
    args, layer = rounded(conv_inputs(1, 48, 80, 9, 6)), rounded(linear_inputs(30, 70, 64))
    value, gate = F.linear(*[arg.double() for arg in layer]).chunk(2, dim=-1)
    try:
        for name in others:
            library.use_instruction_set(name)
            assert_as_exact_as_a_rounded_result(library.convolution(*args, WIDE, 1, 1.0), exact_conv(*args))
            assert_as_exact_as_a_rounded_result(library.linear(*layer, False), torch.cat([value, gate], dim=-1))
            assert_as_exact_as_a_rounded_result(library.linear(*layer, True), value * F.gelu(gate))
    finally:
        library.use_instruction_set(best)

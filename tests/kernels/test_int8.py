"""The CPU kernels with weights of a byte a number, against plain PyTorch on the widened weights and float64."""

import pytest
import torch

from ldm2 import ops
from ldm2.checkpoints.int8 import quantize
from tests.helpers import draw
from tests.kernels.inputs import assert_neither_strides_nor_threads_change, assert_within_the_accuracy_rule

DTYPES = (torch.float32, torch.bfloat16)


def weight(*shape, name="weight", seed=1):
    """As large as that of a layer that keeps the scale of its input; channels of unlike sizes."""
    sizes = torch.logspace(-2, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return quantize(name, sizes * draw(*shape, seed=seed) / torch.Size(shape[1:]).numel() ** 0.5)


def residual_inputs():
    parameters = [each for size in (3, 7, 11) for n in range(6) for each in (
        quantize("weight", draw(32, 32, size, seed=n) / (32 * size) ** 0.5), draw(32, seed=n)
    )]
    return draw(2, 32, 301), 0.1, ((1, 3, 5),) * 3, *parameters


CASES = {
    "one row": (ops.linear, lambda: (draw(1, 64), weight(32, 64), draw(32))),
    "odd sizes": (ops.linear, lambda: (draw(2, 7, 70), weight(48, 70), draw(48))),
    "many rows": (ops.linear, lambda: (draw(300, 390), weight(80, 390), None)),
    "fewer multiplications": (ops.linear, lambda: (draw(2, 130, 288), weight(192, 288), draw(192))),
    "fewer, with gates": (ops.linear_geglu, lambda: (draw(2, 134, 256), weight(192, 256), draw(192))),
    "few channels": (ops.linear, lambda: (draw(40, 20), weight(6, 20), draw(6))),
    "gates": (ops.linear_geglu, lambda: (draw(2, 33, 70), weight(96, 70), draw(96))),
    "conv1x1": (ops.conv1x1, lambda: (draw(2, 48, 9, 7), weight(32, 48, 1, 1), draw(32))),
    "conv3x3": (ops.conv3x3, lambda: (draw(2, 48, 9, 7), weight(80, 48, 3, 3), draw(80), draw(2, 80, 9, 7, seed=3))),
    "narrow": (ops.conv3x3, lambda: (draw(1, 32, 5, 2), weight(80, 32, 3, 3), draw(80))),
    "conv3x3, few channels": (ops.conv3x3, lambda: (draw(1, 8, 5, 4), weight(32, 8, 3, 3), draw(32))),
    "conv1d": (ops.conv1d, lambda: (draw(2, 48, 301), weight(32, 48, 7), draw(32))),
    "conv1d, other taps": (ops.conv1d, lambda: (draw(2, 48, 301), weight(32, 48, 5), draw(32))),
    "transposed": (ops.conv_transpose1d, lambda: (
        draw(2, 64, 50), weight(64, 32, 16, name="upsampler.0.weight"), draw(32), 5, 5)),
    "residual blocks": (ops.residual_blocks, residual_inputs),
}


def with_dtype(args, dtype):
    return [arg.to(dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_weights_of_bytes_keep_the_accuracy_rule_in_every_instruction_set(instruction_set, case, dtype):
    operation, arguments = CASES[case]
    assert_within_the_accuracy_rule(operation, with_dtype(arguments(), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_of_subnormal_numbers_give_the_bias(instruction_set, dtype):
    dead = draw(32, 40, 3, 3)
    dead[3], dead[4] = 0, 1e-41
    x, bias = draw(2, 40, 6, 5).to(dtype), draw(32, seed=2).to(dtype)
    maps, kernels = torch.cat([x, x[:, :8]], dim=1), torch.cat([dead, dead[:, :8]], dim=1)
    for got in (ops.conv3x3(maps, quantize("weight", kernels), bias),
                ops.linear(x.movedim(1, -1), quantize("weight", dead[:, :, 1, 1]), bias).movedim(-1, 1)):
        expected = bias[None, 3:5, None, None].expand(2, -1, 6, 5)
        torch.testing.assert_close(got[:, 3:5], expected, atol=1e-30, rtol=0)
        assert got.isfinite().all() and got[:, 5].std() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_strides_nor_threads_change_a_result(library, dtype):
    x, matrix, bias = draw(130, 40).to(dtype), weight(64, 40), draw(64).to(dtype)
    maps, kernel = draw(2, 48, 40, 24).to(dtype), weight(64, 48, 3, 3)

    def results(strided):
        spread = [ops.Int8(values.mT.contiguous().mT, scale.mT.contiguous().mT) if strided else ops.Int8(values, scale)
                  for values, scale in (matrix, kernel)]
        rows = torch.cat([x, x], dim=1)[:, 40:] if strided else x
        return [ops.linear(rows, spread[0], bias), ops.linear_geglu(rows, spread[0], bias),
                ops.conv3x3(maps.mT.contiguous().mT if strided else maps, spread[1], bias)]

    assert_neither_strides_nor_threads_change(results)


def test_values_up_to_the_ends_of_a_byte_are_exact(library):
    values = torch.arange(-128, 128, dtype=torch.int8).repeat(16, 1)
    scale = torch.full((16, 1), 0.5)
    for dtype in DTYPES:
        one_hot = torch.eye(256, dtype=dtype)
        assert torch.equal(ops.linear(one_hot, ops.Int8(values, scale)), 0.5 * values.T.to(dtype))


@pytest.mark.parametrize("scale, message", [
    (None, "int8 weights need a scale"), (torch.ones(7), "scale must be 16 numbers in float32"),
    (torch.ones(16, dtype=torch.bfloat16), "scale must be 16 numbers in float32"),
])
def test_operators_refuse_a_scale_that_does_not_fit(library, scale, message):
    with pytest.raises(RuntimeError, match=message):
        library.linear(draw(3, 8), torch.ones(16, 8, dtype=torch.int8), None, False, scale)
    with pytest.raises(RuntimeError, match=message):
        library.convolution(draw(1, 32, 4, 4), torch.ones(16, 32, 3, 3, dtype=torch.int8), None, None, 0, 1, 1.0, scale)
    with pytest.raises(RuntimeError, match="no others have one"):
        library.linear(draw(3, 8), draw(16, 8), None, False, torch.ones(16))


def test_plain_pytorch_widens_the_weights():
    with ops.backend("reference"):
        for name, (operation, arguments) in CASES.items():
            args = arguments()
            wide = [arg.dense(torch.float32) if isinstance(arg, ops.Int8) else arg for arg in args]
            assert torch.equal(operation(*args), operation(*wide)), name


def test_weights_that_are_not_in_memory_are_refused():
    matrix = weight(32, 64)
    asleep = ops.Int8(matrix.values.to("meta"), matrix.scale)
    with ops.backend("reference"), pytest.raises(RuntimeError, match="weights are not in memory"):
        ops.linear(draw(1, 64), asleep)

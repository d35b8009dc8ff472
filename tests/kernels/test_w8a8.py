"""The CPU kernel of linear layers in integers of 8 bits, bit by bit against its definition."""

import itertools

import pytest
import torch

from ldm2 import ops
from ldm2.checkpoints.int8 import quantize
from tests.helpers import draw
from tests.kernels.inputs import assert_neither_strides_nor_threads_change

DTYPES = (torch.float32, torch.bfloat16)


def w8a8(*shape, seed=1):
    return ops.W8A8(*quantize("weight", draw(*shape, seed=seed) / shape[1] ** 0.5))


def both(operation, *args):
    """Of the kernel, which must take them, and by the definition."""
    with ops.backend("fused"):
        fused = operation(*args)
    return fused, operation.reference(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, ins, outs", [
    (1, 64, 32), (2, 1, 16), (7, 70, 48), (13, 3, 16), (33, 1027, 80), (300, 392, 16), (530, 20, 64),
])
def test_every_instruction_set_gives_the_numbers_of_the_definition(instruction_set, rows, ins, outs, dtype):
    x, weight, bias = draw(rows, ins).to(dtype), w8a8(outs, ins), draw(outs).to(dtype)
    for arguments in ((x, weight, bias), (x, weight), (x[None], weight, bias)):
        assert torch.equal(*both(ops.linear, *arguments))


@pytest.mark.parametrize("rows, ins, outs", [(1, 64, 32), (33, 70, 96), (250, 1027, 64)])
def test_gates_are_those_of_the_definition(instruction_set, rows, ins, outs):
    fused, plain = both(ops.linear_geglu, draw(rows, ins), w8a8(outs, ins), draw(outs))
    torch.testing.assert_close(fused, plain, rtol=2e-6, atol=2e-6)


def test_sums_do_not_saturate_and_do_not_overflow(instruction_set):
    """The largest numbers next to each other, of equal and of opposite signs, and the deepest layer that is taken."""
    for ins, sign in itertools.product((2, 4, 5120, 1 << 16), (1, -1)):
        values = torch.full((16, ins), -128, dtype=torch.int8)
        values[1], values[2, ::2] = 127, 127
        x = torch.full((3, ins), 127.0 * sign)
        x[1, 1::2] *= -1
        x[2] /= 3
        with ops.backend("fused"):
            got = ops.linear(x, ops.W8A8(values, torch.ones(16, 1)))
        exact = x.double() @ values.double().T
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_size_and_of_zeros(instruction_set, dtype):
    x, weight, bias = draw(9, 45), w8a8(32, 45), draw(32).to(dtype)
    x[1], x[2, 1:], x[3] = 0, 0, 1e-41
    x[4:8] *= torch.tensor([1e-38, 1e-30, 1e30, 5e37])[:, None]
    fused, plain = both(ops.linear, x.to(dtype), weight, bias)
    assert torch.equal(fused, plain) and fused.isfinite().all()
    assert torch.equal(fused[1], bias) and fused[7].abs().max() > 1e36


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 17, 44])
def test_what_is_not_finite_gives_nan_in_its_row_only(instruction_set, dtype, place):
    x, weight, bias = draw(30, 45).to(dtype), w8a8(32, 45), draw(32).to(dtype)
    clean = x.clone()
    x[3, place], x[4, place], x[5, place] = float("inf"), float("nan"), float("-inf")
    for operation in (ops.linear, ops.linear_geglu):
        (got, _), (expected, _) = both(operation, x, weight, bias), both(operation, clean, weight, bias)
        others = [row for row in range(30) if row not in (3, 4, 5)]
        assert got[3:6].isnan().all() and torch.equal(got[others], expected[others])


def test_neither_strides_nor_threads_change_a_result(library):
    x, weight, bias = draw(130, 40), w8a8(64, 40), draw(64)

    def results(strided):
        spread = ops.W8A8(*(part.mT.contiguous().mT for part in weight)) if strided else weight
        rows = torch.cat([x, x], dim=1)[:, 40:] if strided else x
        return [ops.linear(rows, spread, bias), ops.linear_geglu(rows, spread, bias),
                ops.linear(rows.mT[:, :40], spread)]

    assert_neither_strides_nor_threads_change(results)


def test_what_the_kernel_does_not_take_is_left_to_the_definition(library):
    for x, weight in ((draw(3, 64), w8a8(20, 64)), (draw(2, 1 << 17), w8a8(16, 1 << 17))):
        with pytest.raises(RuntimeError, match="it leaves float32"), ops.backend("fused"):
            ops.linear(x, weight)
        assert torch.equal(ops.linear(x, weight), ops.linear.reference(x, weight))
    with ops.backend("fused"), pytest.raises(RuntimeError, match="to plain PyTorch"):
        ops.linear_geglu(draw(3, 64), w8a8(48, 64), draw(48))


@pytest.mark.parametrize("change, message", [
    ({"weight": torch.ones(16, 8)}, "the weight must be int8, got Float"),
    ({"weight": torch.ones(16, 12, dtype=torch.int8)}, r"weight \[16, 12\] does not take \[3, 8\]"),
    ({"weight": torch.ones(20, 8, dtype=torch.int8), "scale": torch.ones(20)}, r"weight \[20, 8\] does not take"),
    ({"scale": torch.ones(7)}, "scale must be 16 numbers in float32"),
    ({"x": torch.ones(3, 8, dtype=torch.float16)}, "x must be float32 or bfloat16, got Half"),
    ({"x": torch.ones(0, 8)}, r"rows of 1 to 65536 numbers are rounded, not \[0, 8\]"),
    ({"x": torch.ones(1, 1 << 17)}, "rows of 1 to 65536 numbers"),
])
def test_the_operator_refuses_what_does_not_fit(library, change, message):
    given = {"x": draw(3, 8), "weight": torch.ones(16, 8, dtype=torch.int8), "scale": torch.ones(16), "bias": None}
    with pytest.raises(RuntimeError, match=message):
        library.linear_int8(**(given | change), gated=False)


def test_the_operator_is_registered_as_it_should_be(library):
    weight = w8a8(32, 40)
    torch.library.opcheck(library.linear_int8.default, (draw(3, 40), *weight, draw(32), True))

"""The definition of linear layers in integers of 8 bits, against exact integers and float64."""

import numpy as np
import pytest
import torch

from ldm2 import ops
from ldm2.checkpoints.int8 import quantize
from ldm2.runtime.int8_weights import rounded_rows
from tests.helpers import draw


def w8a8(*shape, seed=1):
    return ops.W8A8(*quantize("weight", draw(*shape, seed=seed)))


def by_definition(x, weight, bias):
    """The same in NumPy's integers of 64 bits, row by row."""
    x, values = x.double().numpy(), weight.values.numpy().astype(np.int64)
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        scale = max(np.abs(row).max() / 127, np.finfo(np.float32).tiny)
        rows.append((values @ np.rint(row / scale).astype(np.int64)) * scale * weight.scale.flatten().numpy())
    return torch.tensor(np.array(rows) + bias.double().numpy()).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("ins", [1, 7, 64, 1024, 2563])
def test_sums_are_those_of_whole_numbers(ins):
    x, weight, bias = draw(2, 9, ins), w8a8(24, ins), draw(24)
    with ops.backend("reference"):
        for wide in (x, x.double()):
            expected = by_definition(wide, weight, bias)
            torch.testing.assert_close(ops.linear(wide, weight, bias).double(), expected, rtol=1e-6, atol=1e-5)
            value, gate = expected.chunk(2, dim=-1)
            gated = value * torch.nn.functional.gelu(gate)
            torch.testing.assert_close(ops.linear_geglu(wide, weight, bias).double(), gated, rtol=1e-4, atol=1e-4)


def test_rows_of_whole_steps_lose_nothing():
    """Each row has numbers k * step, |k| <= 127, the step a power of two: rounding changes none of them."""
    whole = torch.randint(-127, 128, (40, 300), generator=torch.Generator().manual_seed(0)).float()
    whole[:, 7] = 127
    x = whole * torch.logspace(-30, 30, 40, base=2)[:, None].log2().round().exp2()
    weight = w8a8(16, 300)
    with ops.backend("reference"):
        got = ops.linear(x, weight)
    torch.testing.assert_close(got.double(), x.double() @ weight.dense(torch.float64).T, rtol=2e-6, atol=0)


def test_the_largest_sums_are_exact():
    weight = ops.W8A8(torch.full((16, 5120), -128, dtype=torch.int8), torch.ones(16, 1))
    with ops.backend("reference"):
        got = ops.linear(torch.tensor([[127.0], [-127.0], [3.0]]).expand(3, 5120), weight)
    assert torch.equal(got[:2, 0], torch.tensor([-1.0, 1.0]) * 127 * 128 * 5120)
    torch.testing.assert_close(got[2], torch.full((16,), -3.0 * 128 * 5120))


def test_numbers_are_rounded_to_the_nearest_of_their_row_and_halves_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 126.4], [0, 0, 0, 0, 0], [-254, 2.9, 0, 1, 3.1]])
    rows, scale = rounded_rows(x)
    assert rows.tolist() == [[127, 0, 2, -2, 126], [0] * 5, [-127, 1, 0, 0, 2]]
    assert torch.equal(scale[::2, 0], torch.tensor([1.0, 2.0])) and scale[1] > 0


def test_what_is_not_finite_gives_nan_in_its_row_only():
    x, weight, bias = draw(5, 40), w8a8(16, 40), draw(16)
    clean = x.clone()
    x[1, 3], x[2, 39], x[3, 0] = float("inf"), float("nan"), float("-inf")
    with ops.backend("reference"):
        got, expected = ops.linear(x, weight, bias), ops.linear(clean, weight, bias)
    assert got[1:4].isnan().all() and torch.equal(got[[0, 4]], expected[[0, 4]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_rounded_once(dtype):
    x, weight, bias = draw(3, 50).to(dtype), w8a8(16, 50), draw(16).to(dtype)
    with ops.backend("reference"):
        assert torch.equal(ops.linear(x, weight, bias), ops.linear(x.float(), weight, bias.float()).to(dtype))


def test_a_matrix_made_of_a_kernel_still_rounds():
    kernel = w8a8(16, 40, 1, 1)
    assert isinstance(kernel.as_matrix(), ops.W8A8) and kernel.as_matrix().shape == (16, 40)

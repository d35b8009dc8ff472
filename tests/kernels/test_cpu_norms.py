"""Normalization on the CPU against float64 and plain PyTorch."""

import pytest
import torch

from ldm2 import ops
from tests.helpers import draw
from tests.kernels.inputs import assert_within_the_accuracy_rule

DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5


def in_dtype(args, dtype):
    return [arg.to(dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]


def maps(batch=2, channels=48, frames=19, bins=7, change=lambda x: x):
    """x with its channels last in memory, weight, bias."""
    x = change(draw(batch, channels, frames, bins)).contiguous(memory_format=torch.channels_last)
    return x, draw(channels, seed=1), draw(channels, seed=2)


def rows(*shape, change=lambda x: x):
    """x, added, weight, bias."""
    return change(draw(*shape)), change(draw(*shape, seed=1)), draw(shape[-1], seed=2), draw(shape[-1], seed=3)


CHANGES = {
    "as it is": lambda x: x,
    "a large mean": lambda x: x + 1000,
    "means of channels": lambda x: x + 300 * draw(x.shape[1], seed=9).view(1, -1, *[1] * (x.dim() - 2)),
    "squares underflow": lambda x: x * 1e-25,
    "large": lambda x: x * 1e15,
    "equal": lambda x: torch.full_like(x, 3.0),
    "zeros after the first": lambda x: x * (torch.arange(len(x)) == 0).view(-1, *[1] * (x.dim() - 1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", CHANGES)
def test_normalization_is_as_exact_as_the_rule_asks(instruction_set, change, dtype):
    x, weight, bias = in_dtype(maps(change=CHANGES[change]), dtype)
    for groups in (1, 6, 16, 48):
        assert_within_the_accuracy_rule(ops.group_norm, (x, groups, weight, bias, EPS))
    for shift in (None, draw(1, 48).to(dtype), draw(2, 96).to(dtype)[:, ::2]):
        assert_within_the_accuracy_rule(ops.group_norm_silu, (x, 16, weight, bias, EPS, shift))
    x, added, weight, bias = in_dtype(rows(3, 37, 80, change=CHANGES[change]), dtype)
    assert_within_the_accuracy_rule(ops.layer_norm, (x, weight, bias, EPS))
    assert_within_the_accuracy_rule(ops.add_layer_norm, (x, added, weight, bias, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_count_as_nothing_or_as_they_are(instruction_set, dtype):
    x, weight, bias = in_dtype(maps(change=lambda x: x * 1e-40), dtype)
    torch.testing.assert_close(ops.group_norm(x, 6, weight, bias, EPS), bias.view(1, -1, 1, 1).expand_as(x))
    x, added, weight, bias = in_dtype(rows(3, 37, 80, change=lambda x: x * 1e-40), dtype)
    total, normal = ops.add_layer_norm(x, added, weight, bias, EPS)
    torch.testing.assert_close(normal, bias.expand_as(x))
    assert (total - (x + added)).abs().max() < 1e-38


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (1, 32, 1201, 8), (3, 640, 32, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_of_any_size_are_normalized_as_exactly(library, dtype, shape):
    x, weight, bias = in_dtype(maps(*shape), dtype)
    assert_within_the_accuracy_rule(ops.group_norm_silu, (x, 8, weight, bias, EPS))


def test_layouts_and_widths_that_the_kernels_do_not_take_are_left_to_pytorch(library):
    x, weight, bias = maps()
    flat, _, scale, shift = rows(3, 37, 20)
    with ops.backend("fused"):
        assert torch.equal(ops.group_norm(x.contiguous(), 6, weight, bias, EPS),
                           ops.group_norm.reference(x.contiguous(), 6, weight, bias, EPS))
        torch.testing.assert_close(ops.group_norm_silu(x.contiguous(), 6, weight, bias, EPS, draw(1, 48)),
                                   ops.group_norm_silu(x, 6, weight, bias, EPS, draw(1, 48)))
        assert torch.equal(ops.layer_norm(flat, scale, shift, EPS), ops.layer_norm.reference(flat, scale, shift, EPS))
        for got, plain in zip(ops.add_layer_norm(flat, flat, scale, shift, EPS),
                              ops.add_layer_norm.reference(flat, flat, scale, shift, EPS), strict=True):
            assert torch.equal(got, plain)


def test_the_number_of_threads_changes_no_normalization(library):
    x, weight, bias = maps(3, 64, 301, 9)
    flat = x.movedim(1, -1).flatten(1, 2)

    def results(threads):
        torch.set_num_threads(threads)
        return ops.group_norm_silu(x, 32, weight, bias, EPS), *ops.add_layer_norm(flat, flat, weight, bias, EPS)

    try:
        one, two = results(1), results(2)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_is_not_a_number_stays_in_its_group(library):
    x, weight, bias = maps()
    x[1, 20, 3, 3] = float("nan")
    groups = ops.group_norm_silu(x, 6, weight, bias, EPS).isnan().unflatten(1, (6, 8)).flatten(2)
    assert groups[1, 2].all() and groups.sum() == groups[1, 2].numel()


def test_operators_have_true_schemas_and_refuse_what_does_not_fit(library):
    x, weight, bias = maps()
    flat, added, scale, shift = rows(3, 37, 80)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(library.group_norm.default, (x, 6, weight, bias, EPS, draw(1, 48), True), test_utils=tests)
    torch.library.opcheck(library.layer_norm.default, (flat, scale, shift, EPS), test_utils=tests)
    torch.library.opcheck(library.add_layer_norm.default, (flat, added, scale, shift, EPS), test_utils=tests)
    with pytest.raises(RuntimeError, match="channels last"):
        library.group_norm(x.contiguous(), 6, weight, bias, EPS, None, False)
    with pytest.raises(RuntimeError, match="in 7 groups"):
        library.group_norm(x, 7, weight, bias, EPS, None, False)
    with pytest.raises(RuntimeError, match="the shift must be"):
        library.group_norm(x, 6, weight, bias, EPS, draw(3, 48), False)
    with pytest.raises(RuntimeError, match="weight and bias must be 80 numbers"):
        library.layer_norm(flat, weight, bias, EPS)
    with pytest.raises(RuntimeError, match="what is added must be as x"):
        library.add_layer_norm(flat, added[:2], scale, shift, EPS)

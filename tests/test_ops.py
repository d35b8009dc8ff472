"""Each operation against its formula written out in float64; strided inputs; gradients."""

import math
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import ldm2_kernels
import pytest
import torch
import torch.nn.functional as F
from ldm2_kernels.cases import cases

from ldm2 import ops
from tests.helpers import draw

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
CLOSE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


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


@pytest.mark.parametrize("dtype", FLOATS)
def test_add_layer_norm_returns_the_sum_and_its_normalisation(dtype):
    x, added = draw(2, 5, 6, dtype=dtype), draw(2, 5, 6, seed=3, dtype=dtype)
    weight, bias = draw(6, seed=1, dtype=dtype), draw(6, seed=2, dtype=dtype)
    expected = x.double() + added.double()
    total, normed = ops.add_layer_norm(x, added, weight, bias, 1e-5)
    assert_near(total, expected, dtype)
    assert_near(normed, normalised(expected, (-1,), 1e-5) * weight.double() + bias.double(), dtype)


@pytest.mark.parametrize("size", [(10, 12), (9, 11)])
def test_upsample_takes_the_nearest_position(size):
    x = draw(2, 3, 5, 6)
    rows, columns = (torch.arange(new) * old // new for new, old in zip(size, x.shape[2:]))
    assert torch.equal(ops.upsample(x, size), x[:, :, rows][..., columns])


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


@pytest.fixture
def kernel(monkeypatch):
    """kernel(name, function) makes `function` the fused form of an operation on the CPU, and the only one there."""
    monkeypatch.setattr(ops, "_kernels", {})
    monkeypatch.setitem(ldm2_kernels.MODULES, "cpu", {})
    monkeypatch.setattr("ldm2_kernels.cpu.load", lambda: True)

    def add(name, function):
        home = types.ModuleType(f"kernel_of_{name}")
        setattr(home, name, function)
        monkeypatch.setitem(sys.modules, home.__name__, home)
        ldm2_kernels.MODULES["cpu"][name] = home.__name__

    return add


def test_a_kernel_takes_the_place_of_its_operation(kernel):
    kernel("leaky_relu", lambda x, slope: x * 0 + slope)
    assert torch.equal(ops.leaky_relu(torch.ones(3), 0.1), torch.full((3,), 0.1))


def test_the_reference_backend_takes_no_kernel(kernel):
    kernel("leaky_relu", lambda x, slope: x * 0)
    with ops.backend("reference"):
        assert torch.equal(ops.leaky_relu(torch.ones(3), slope=0.1), torch.ones(3))
    assert torch.equal(ops.leaky_relu(torch.ones(3), slope=0.1), torch.zeros(3))


def test_backends_nest_and_end_with_their_block(kernel):
    kernel("leaky_relu", lambda x, slope: x * 0)
    with ops.backend("reference"):
        with ops.backend("auto"):
            assert not ops.leaky_relu(torch.ones(3), 0.1).any()
        assert ops.leaky_relu(torch.ones(3), 0.1).all()


@pytest.mark.parametrize("make, reason", [
    (lambda: torch.ones(3, requires_grad=True), "a gradient is needed"),
    (lambda: torch.ones(3, dtype=torch.float64), "it takes float32, float16 and bfloat16, not float64"),
    (lambda: torch.ones(0), "a tensor is empty"),
    (lambda: torch.ones(3, 1), r"it leaves float32 \(3, 1\) to plain PyTorch"),
])
def test_what_a_kernel_cannot_take_goes_to_pytorch_or_raises_where_fused_is_asked_for(kernel, make, reason):
    kernel("leaky_relu", lambda x, slope: NotImplemented if x.dim() == 2 else x * 0)
    x = make()
    assert torch.equal(ops.leaky_relu(x, 0.1), x)
    with ops.backend("fused"), pytest.raises(RuntimeError, match=f"on cpu cannot be used: {reason}"):
        ops.leaky_relu(x, 0.1)


def test_fused_raises_where_there_is_no_kernel(kernel):
    with ops.backend("fused"), pytest.raises(RuntimeError, match="no fused geglu on cpu"):
        ops.geglu(torch.ones(3), torch.ones(3))


def test_fused_holds_where_pytorchs_own_is_the_fused_one(kernel):
    ldm2_kernels.MODULES["cpu"]["attention"] = None
    q = draw(1, 2, 3, 4)
    with ops.backend("fused"):
        assert torch.equal(ops.attention(q, q, q), ops.attention.reference(q, q, q))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend 'fast'.*auto, fused, reference"), \
            ops.backend("fast"):
        pass


def test_a_compiled_function_calls_the_kernel(kernel):
    kernel("leaky_relu", lambda x, slope: x * 0)
    compiled = torch.compile(lambda x: ops.leaky_relu(x + 1, 0.1), backend="eager", fullgraph=True)
    assert not compiled(torch.ones(3)).any()


def raising(x, slope):
    raise RuntimeError("PTX compilation failed:\nline 3")


@pytest.fixture
def tried(kernel, monkeypatch):
    """As `kernel`; kernels of the CPU are tried at their first use, as those of CUDA are."""
    monkeypatch.setattr(ops, "_TRIED_FIRST", {"cpu"})
    monkeypatch.setattr(ops, "_faults", {})
    return kernel


@pytest.mark.parametrize("broken, reason", [
    (raising, "RuntimeError: PTX compilation failed:"),
    (lambda x, slope: ops.leaky_relu.reference(x, slope) * 1.001, "its error is .* times what the rule allows"),
    (lambda x, slope: ops.leaky_relu.reference(x, slope).double(), "torch.float64 .* instead of torch.float32"),
    (lambda x, slope: x * torch.nan, "its error is nan"),
])
def test_a_kernel_that_fails_when_first_tried_is_told_once_and_replaced(tried, broken, reason, caplog):
    tried("leaky_relu", broken)
    x = draw(3, 5)
    for _ in range(3):
        assert torch.equal(ops.leaky_relu(x, 0.1), ops.leaky_relu.reference(x, 0.1))
    [message] = caplog.messages
    assert re.search(f"the fused leaky_relu does not work on this cpu in float32 .*{reason}.*plain PyTorch", message)
    with ops.backend("fused"):                             # who insists gets what there is
        if broken is raising:
            with pytest.raises(RuntimeError, match="PTX compilation failed"):
                ops.leaky_relu(x, 0.1)


def test_a_kernel_that_works_is_tried_once_in_each_dtype(tried, caplog):
    calls = []
    tried("leaky_relu", lambda x, slope: calls.append(x.dtype) or ops.leaky_relu.reference(x, slope))
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16):
        ops.leaky_relu(draw(3, 5, dtype=dtype), 0.1)
    assert calls == [torch.float32] * 3 + [torch.bfloat16] * 3                # a trial and two uses
    assert caplog.messages == []


def test_trying_a_kernel_draws_no_random_numbers(tried):
    tried("leaky_relu", ops.leaky_relu.reference)
    state = torch.get_rng_state()
    ops.leaky_relu(draw(3, 5), 0.1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_kernel_made_of_other_operations_is_tried_against_plain_pytorch(tried):
    tried("leaky_relu", lambda x, slope: x * 0)
    tried("residual_blocks", lambda *args: args[0] * 0)
    args = cases(torch.device("cpu"), torch.float32)["residual_blocks"]()
    with ops.backend("reference"):
        expected = ops.residual_blocks(*args)
    torch.testing.assert_close(ops.residual_blocks(*args), expected)


@pytest.mark.parametrize("broken", [True, False])
def test_a_compiled_function_tries_the_kernel_too(tried, broken):
    torch.compiler.reset()                                 # what the other case compiled
    tried("leaky_relu", raising if broken else lambda x, slope: F.leaky_relu(x, slope))
    compiled = torch.compile(lambda x: ops.leaky_relu(x - 1, 0.1), backend="eager", fullgraph=True)
    x = draw(3, 5)
    torch.testing.assert_close(compiled(x), F.leaky_relu(x - 1, 0.1))
    assert (ops._faults["leaky_relu", torch.device("cpu"), torch.float32] is None) is not broken


def test_a_kernel_is_tried_on_numbers_where_tensors_have_none(tried):
    from torch._subclasses import FakeTensorMode

    tried("leaky_relu", lambda x, slope: F.leaky_relu(x, slope))
    with FakeTensorMode():
        assert ops.leaky_relu(torch.empty(3, 5), 0.1).shape == (3, 5)
    assert list(ops._faults.values()) == [None]


def test_threads_that_meet_a_kernel_at_once_try_it_once(tried):
    trials = []

    def kernel(x, slope):
        trials.append(x.shape)
        return F.leaky_relu(x, slope)

    tried("leaky_relu", kernel)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: ops.leaky_relu(draw(3, 5, seed=seed), 0.1), range(8)))
    assert len([shape for shape in trials if shape != (3, 5)]) == 1


def test_kernels_that_cannot_be_loaded_are_told_once(monkeypatch, caplog):
    def load(device_type):
        raise OSError("libtorch_cpu.so: undefined symbol")

    monkeypatch.setattr(ops, "_kernels", {})
    monkeypatch.setattr(ldm2_kernels, "load", load)
    for _ in range(2):
        assert torch.equal(ops.leaky_relu(torch.ones(3), 0.1), torch.ones(3))
    [message] = caplog.messages
    assert "kernels for cpu cannot be loaded (libtorch_cpu.so: undefined symbol)" in message


def test_constants_are_marked_as_pytorch_marks_them():
    def plain():
        pass

    assert vars(ops._constant(lambda: None)) == vars(torch.compiler.assume_constant_result(plain))
    assert vars(ops._choice) == vars(plain)

"""The Triton kernels: on the GPU where there is one, else in Triton's interpreter (see conftest).

A kernel's error against float64 is at most twice that of plain PyTorch at the same dtype, plus a small floor.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from ldm2_kernels import MODULES, check, convolution, geglu, group_norm, layer_norm, leaky_relu  # noqa: E402
from ldm2_kernels.cases import TALL, cases  # noqa: E402

from ldm2 import ops  # noqa: E402
from tests import helpers  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
FLOOR = 4                                                  # roundings of the largest result


def draw(*shape, seed=0, dtype=torch.float32):
    return helpers.draw(*shape, seed=seed, dtype=dtype).to(DEVICE)


def assert_as_exact_as_pytorch(kernel, reference, *args, formula=None):
    """Runs both at the dtype of `args` and the formula, the reference if None, in float64; returns the kernel's result.
    """
    def together(results):
        return results if isinstance(results, tuple) else (results,)

    def doubled(value):
        return value.double() if isinstance(value, torch.Tensor) else value

    kept = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    results, plain = together(kernel(*args)), together(reference(*args))
    exactly = together((formula or reference)(*map(doubled, args)))
    for got, other, exact in zip(results, plain, exactly, strict=True):
        assert (got.dtype, got.shape) == (other.dtype, other.shape)
        floor = FLOOR * torch.finfo(got.dtype).eps * exact.abs().max()
        assert (got.double() - exact).abs().max() <= 2 * (other.double() - exact).abs().max() + floor
    for arg, before in zip(args, kept):
        assert arg is before or not isinstance(arg, torch.Tensor) or torch.equal(arg, before)
    return results[0]


@pytest.mark.parametrize("dtype", FLOATS if DEVICE == "cuda" else FLOATS[:2])       # the interpreter cuts bfloat16 off
@pytest.mark.parametrize("name", [name for name, module in MODULES["cuda"].items() if module is not None])
def test_what_a_gpu_is_checked_with_holds_here(name, dtype):
    kernel = getattr(importlib.import_module(MODULES["cuda"][name]), name)
    with ops.backend("reference"):
        assert check.verdict(name, kernel, getattr(ops, name).reference, torch.device(DEVICE), dtype)[1] is None


def test_the_tall_maps_have_groups_that_no_program_holds():
    x, groups, *_ = cases(torch.device("meta"), torch.float32, TALL)["group_norm"]()
    assert x[0].numel() // groups > group_norm.WHOLE


def norm_inputs(*shape, dtype, rows=None, offset=0.0):
    channels = shape[1]
    shift = None if rows is None else draw(rows, channels + 3, seed=3, dtype=dtype)[:, 1:-2]
    weight, bias = draw(channels, seed=1, dtype=dtype), draw(channels, seed=2, dtype=dtype)
    return draw(*shape, dtype=dtype) + offset, weight, bias, shift


@pytest.fixture
def small_parts(monkeypatch):
    """Groups of more than 32 elements are shared by several programs, of 32 elements each."""
    monkeypatch.setattr(group_norm, "WHOLE", 32)
    monkeypatch.setattr(group_norm, "PART", 32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [None, 1, 2])
def test_group_norm_silu_of_groups_that_fit_a_program(dtype, rows):
    x, weight, bias, shift = norm_inputs(2, 6, 5, 3, dtype=dtype, rows=rows)
    kernel, reference = group_norm.group_norm_silu, ops.group_norm_silu.reference
    assert_as_exact_as_pytorch(kernel, reference, x, 3, weight, bias, 1e-5, shift)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape, rows", [((1, 6, 11, 3), None), ((2, 2, 11, 7), 1), ((2, 2, 8, 4), 2)])
def test_group_norm_silu_of_groups_in_parts(small_parts, dtype, shape, rows):
    x, weight, bias, shift = norm_inputs(*shape, dtype=dtype, rows=rows)
    kernel, reference = group_norm.group_norm_silu, ops.group_norm_silu.reference
    assert_as_exact_as_pytorch(kernel, reference, x, shape[1] // 2, weight, bias, 1e-5, shift)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 6, 5, 3), (1, 2, 50), (3, 4, 1, 1)])
def test_group_norm(small_parts, dtype, shape):
    x, weight, bias, _ = norm_inputs(*shape, dtype=dtype)
    assert_as_exact_as_pytorch(group_norm.group_norm, ops.group_norm.reference, x, 2, weight, bias, 1e-6)


@pytest.mark.parametrize("positions", [(5, 3), (9, 3)])
def test_group_norm_keeps_channels_last(small_parts, positions):
    x, weight, bias, shift = norm_inputs(2, 6, *positions, dtype=torch.float32, rows=2)
    x = x.to(memory_format=torch.channels_last)
    kernel, reference = group_norm.group_norm_silu, ops.group_norm_silu.reference
    y = assert_as_exact_as_pytorch(kernel, reference, x, 3, weight, bias, 1e-5, shift)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_group_norm_of_a_view_into_something_larger():
    x, weight, bias, _ = norm_inputs(2, 6, 9, 8, dtype=torch.float32)
    kernel, reference = group_norm.group_norm_silu, ops.group_norm_silu.reference
    assert_as_exact_as_pytorch(kernel, reference, x[:, :, ::2, 1:4], 3, weight, bias, 1e-5)


@pytest.mark.parametrize("dtype, offset", [(torch.float32, 3e3), (torch.float16, 300.0), (torch.bfloat16, 100.0)])
@pytest.mark.parametrize("positions", [(5, 3), (11, 7)])
def test_group_norm_survives_a_large_mean(small_parts, dtype, offset, positions):
    x, weight, bias, _ = norm_inputs(1, 4, *positions, dtype=dtype, offset=offset)
    assert_as_exact_as_pytorch(group_norm.group_norm, ops.group_norm.reference, x, 2, weight, bias, 1e-6)


def test_a_shift_may_be_much_larger_than_what_it_is_added_to(small_parts):
    x, weight, bias, shift = norm_inputs(1, 2, 11, 5, dtype=torch.float32, rows=1)
    kernel, reference = group_norm.group_norm_silu, ops.group_norm_silu.reference
    assert_as_exact_as_pytorch(kernel, reference, x, 2, weight, bias, 1e-5, shift + 1e3)


def last(x):
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels, size", [(6, (5, 3)), (640, (4, 2)), (48, (9, 7)), (1, (3, 5))])
@pytest.mark.parametrize("layouts", ["cc", "cl", "lc", "ll"])
def test_bias_and_residual_behind_a_convolution(dtype, channels, size, layouts):
    x, weight = draw(2, 4, *size, dtype=dtype), draw(channels, 4, 3, 3, seed=1, dtype=dtype)
    bias, residual = draw(channels, seed=2, dtype=dtype), draw(2, channels, *size, seed=3, dtype=dtype)
    x, residual = (last(tensor) if layout == "l" else tensor for layout, tensor in zip(layouts, (x, residual)))
    y = assert_as_exact_as_pytorch(convolution.conv3x3, ops.conv3x3.reference, x, weight, bias, residual)
    if layouts[0] == "l" and channels > 1:
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert_as_exact_as_pytorch(convolution.conv3x3, ops.conv3x3.reference, x, weight, bias)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_1x1_convolution_keeps_the_layout(dtype):
    x, weight, bias = draw(2, 6, 5, 3, dtype=dtype), draw(8, 6, 1, 1, seed=1, dtype=dtype), draw(8, seed=2, dtype=dtype)
    for given, layout in ((x, torch.contiguous_format), (last(x), torch.channels_last)):
        y = assert_as_exact_as_pytorch(convolution.conv1x1, ops.conv1x1.reference, given, weight, bias)
        assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 17, 130), (7, 8)])
def test_add_layer_norm(dtype, shape):
    sizes = [shape, shape, shape[-1:], shape[-1:]]
    x, added, weight, bias = (draw(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes))
    assert_as_exact_as_pytorch(layer_norm.add_layer_norm, ops.add_layer_norm.reference, x, added, weight, bias, 1e-5)


@pytest.mark.parametrize("dtype, offset", [(torch.float32, 3e3), (torch.float16, 300.0), (torch.bfloat16, 100.0)])
def test_add_layer_norm_survives_a_large_mean(dtype, offset):
    x, added = draw(3, 70, dtype=dtype) + offset, draw(3, 70, seed=1, dtype=dtype)
    weight, bias = torch.ones_like(x[0]), torch.zeros_like(x[0])
    assert_as_exact_as_pytorch(layer_norm.add_layer_norm, ops.add_layer_norm.reference, x, added, weight, bias, 1e-5)


def test_add_layer_norm_of_strided_rows():
    x, added = draw(5, 3, 8).transpose(0, 1), draw(3, 5, 16, seed=1)[..., ::2]
    weight, bias = draw(8, seed=2), draw(8, seed=3)
    assert_as_exact_as_pytorch(layer_norm.add_layer_norm, ops.add_layer_norm.reference, x, added, weight, bias, 1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 5, 14), (3, 700)])
def test_geglu_of_the_halves_of_a_layers_output(dtype, shape):
    value, gate = (3 * draw(*shape, dtype=dtype)).chunk(2, dim=-1)
    assert_as_exact_as_pytorch(geglu.geglu, ops.geglu.reference, value, gate)


def test_geglu_of_other_strides():
    value, gate = draw(4, 3, 5).transpose(0, 1), draw(3, 4, 10, seed=1)[..., ::2]
    assert_as_exact_as_pytorch(geglu.geglu, ops.geglu.reference, value, gate)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 2, 1025)])
def test_add_leaky_relu(dtype, shape):
    x, added = draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype)
    assert_as_exact_as_pytorch(leaky_relu.add_leaky_relu, ops.add_leaky_relu.reference, x, added, 0.1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("totalled", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_add_up(dtype, totalled, count):
    x, added = draw(2, 3, 7, dtype=dtype), draw(2, 7, 3, seed=1, dtype=dtype).mT
    total = draw(2, 3, 7, seed=2, dtype=dtype) if totalled else None
    assert_as_exact_as_pytorch(leaky_relu.add_up, ops.add_up.reference, x, added, total, count)


@pytest.mark.parametrize("kernel, args", [
    (layer_norm.add_layer_norm, (draw(2, 3), draw(3), draw(3), draw(3), 1e-5)),
    (geglu.geglu, (draw(2, 3), draw(1, 3))),
    (leaky_relu.add_leaky_relu, (draw(2, 3), draw(1, 3), 0.1)),
    (leaky_relu.add_up, (draw(2, 3), draw(2, 3), draw(1, 3))),
])
def test_shapes_that_pytorch_would_broadcast_are_left_to_it(kernel, args):
    assert kernel(*args) is NotImplemented


OPERATORS = [
    (group_norm._group_norm, lambda: (draw(2, 4, 5, 3), 2, draw(4), draw(4), 1e-5, draw(1, 4), True)),
    (group_norm._group_norm,
     lambda: (draw(2, 4, 5, 3).to(memory_format=torch.channels_last), 2, draw(4), draw(4), 1e-5, None, False)),
    (layer_norm._add_layer_norm, lambda: (draw(2, 6), draw(2, 6), draw(6), draw(6), 1e-5)),
    (geglu._geglu, lambda: draw(2, 6).chunk(2, dim=-1)),
    (leaky_relu._add_leaky_relu, lambda: (draw(2, 6), draw(2, 6), 0.1)),
    (leaky_relu._add_up, lambda: (draw(2, 6), draw(2, 6), None, 1)),
]


@pytest.mark.parametrize("operator, args", OPERATORS)
def test_operators_keep_what_they_promise_to_torch_compile(operator, args):
    torch.library.opcheck(operator, args())


@pytest.mark.slow
@pytest.mark.parametrize("capability, dtype", [(75, "fp32"), (80, "fp16"), (90, "bf16")])
def test_kernels_compile_for_gpus(capability, dtype, tmp_path):
    root = Path(__file__).parents[2]
    paths = [str(root / "kernels"), str(root), os.environ.get("PYTHONPATH", "")]
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tests.compile_kernels", str(capability), dtype]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

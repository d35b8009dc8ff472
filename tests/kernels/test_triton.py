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

from ldm2_kernels import (  # noqa: E402
    MODULES,
    attention,
    check,
    convolution,
    geglu,
    group_norm,
    layer_norm,
    residual_blocks,
    upsample,
)
from ldm2_kernels.cases import TALL, cases  # noqa: E402

from ldm2 import ops  # noqa: E402
from tests import helpers  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
MULTIPLIED = FLOATS if DEVICE == "cuda" else FLOATS[:2]    # the interpreter takes bfloat16 for integers in products
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


@pytest.mark.parametrize("dtype", MULTIPLIED)
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
    monkeypatch.setattr(group_norm, "TILE", 32)


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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("positions, offset", [((5, 3), 0), ((9, 3), 0), ((41, 2), 0), ((13, 5), 300.0)])
def test_group_norm_keeps_channels_last(small_parts, positions, offset, dtype, rows):
    x, weight, bias, shift = norm_inputs(2, 6, *positions, dtype=dtype, rows=rows, offset=offset)
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


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("queries, keys, width", [(70, 8, 32), (5, 33, 48), (64, 1, 80), (3, 200, 16), (1, 70, 6)])
@pytest.mark.parametrize("biased", [None, "keys", "all"])
def test_attention_to_few_keys(dtype, queries, keys, width, biased):
    q, k, v = (draw(2, length, 3 * width, seed=i, dtype=dtype).unflatten(-1, (3, -1)).transpose(1, 2)
               for i, length in enumerate((queries, keys, keys)))
    bias = {"keys": draw(2, 1, 1, keys, seed=4, dtype=dtype), "all": draw(2, 3, queries, keys, seed=5, dtype=dtype),
            None: None}[biased]
    y = assert_as_exact_as_pytorch(attention.attention, ops.attention.reference, q, k, v, bias)
    assert y.transpose(1, 2).is_contiguous()


def test_attention_to_what_is_dropped_for_good():
    q, k, v = draw(1, 1, 4, 16), draw(1, 1, 5, 16, seed=1), draw(1, 1, 5, 16, seed=2)
    bias = torch.zeros(1, 1, 4, 5, device=DEVICE)
    bias[..., 2:] = -torch.inf
    bias[..., 1, :] = -torch.inf
    y = attention.attention(q, k, v, bias)
    assert y[0, 0, 1].abs().max() == 0
    bias[..., 1, :] = 0
    expected = ops.attention.reference(q, k[:, :, :2], v[:, :, :2])
    torch.testing.assert_close(y[:, :, [0, 2, 3]], expected[:, :, [0, 2, 3]])


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("queries, heads, keys, channels",
                         [(70, 8, 8, 96), (5, 2, 13, 40), (17, 4, 1, 64), (3, 1, 32, 70), (20, 12, 5, 72)])
@pytest.mark.parametrize("biased", [None, "keys", "all"])
def test_attention_with_absorbed_projections(dtype, queries, heads, keys, channels, biased):
    x, offset = draw(2, queries, channels, dtype=dtype), draw(channels, seed=3, dtype=dtype)
    k = draw(2, heads, keys, channels, seed=1, dtype=dtype) * channels ** -0.5
    v = draw(2, channels, heads, keys, seed=2, dtype=dtype)
    bias = {"keys": draw(2, 1, 1, keys, seed=4, dtype=dtype), "all": draw(2, heads, queries, keys, seed=5, dtype=dtype),
            None: None}[biased]
    kernel, reference = attention.absorbed_attention, ops.absorbed_attention.reference
    assert_as_exact_as_pytorch(kernel, reference, x, k, v, bias, offset)


def test_attention_with_scores_that_no_program_holds_is_left_to_pytorch():
    x, k, v = draw(1, 5, 16), draw(1, 9, 33, 16), draw(1, 16, 9, 33)
    assert attention.absorbed_attention(x, k, v, None, draw(16)) is NotImplemented


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 17, 130), (7, 8)])
def test_layer_norm(dtype, shape):
    sizes = [shape, shape[-1:], shape[-1:]]
    x, weight, bias = (draw(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes))
    assert_as_exact_as_pytorch(layer_norm.layer_norm, ops.layer_norm.reference, x, weight, bias, 1e-5)


@pytest.mark.parametrize("laid", [last, torch.Tensor.contiguous])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 700, 3, 1)])
def test_upsample(laid, shape):
    x = laid(draw(*shape))
    size = (2 * shape[2], 2 * shape[3])
    y = upsample.upsample(x, size)
    assert torch.equal(y, ops.upsample.reference(x, size))
    assert y.stride() == ops.upsample.reference(x, size).stride()
    assert upsample.upsample(x, (size[0] - 1, size[1])) is NotImplemented


def tall(x):
    """Channels last of three axes."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def blocks(channels, dtype, laid):
    sizes = [size for size in (3, 5) for _ in range(4)]
    pairs = [(laid(draw(channels, channels, size, seed=i, dtype=dtype) / channels), draw(channels, seed=i, dtype=dtype))
             for i, size in enumerate(sizes)]
    return [tensor for pair in pairs for tensor in pair]


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("laid", [tall, torch.Tensor.contiguous])
@pytest.mark.parametrize("shape", [(2, 6, 45), (1, 1, 17), (1, 20, 301), (1, 40, 33)])
def test_residual_blocks(dtype, laid, shape):
    x, dilations = laid(draw(*shape, dtype=dtype)), ((1, 3), (2, 1))
    args = x, 0.1, dilations, *blocks(shape[1], dtype, laid)
    y = assert_as_exact_as_pytorch(residual_blocks.residual_blocks, ops.residual_blocks.reference, *args)
    assert y.stride() == x.stride() or 1 in shape


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("laid", [tall, torch.Tensor.contiguous])
@pytest.mark.parametrize("channels", [(6, 5), (6, 1), (33, 1), (1, 1)])
def test_convolutions_of_sequences(dtype, laid, channels):
    inside, outside = channels
    x, bias = laid(draw(2, inside, 150, dtype=dtype)), draw(outside, seed=2, dtype=dtype)
    weight = laid(draw(outside, inside, 7, seed=1, dtype=dtype))
    assert_as_exact_as_pytorch(residual_blocks.conv1d, ops.conv1d.reference, x, weight, bias)
    for taps, stride, padding in ((8, 4, 2), (16, 5, 5), (3, 2, 0), (2, 3, 0)):
        weight = laid(draw(inside, outside, taps, seed=1, dtype=dtype))
        kernel, reference = residual_blocks.conv_transpose1d, ops.conv_transpose1d.reference
        assert_as_exact_as_pytorch(kernel, reference, x, weight, bias, stride, padding)


@pytest.mark.parametrize("kernel, args", [
    (layer_norm.add_layer_norm, (draw(2, 3), draw(3), draw(3), draw(3), 1e-5)),
    (geglu.geglu, (draw(2, 3), draw(1, 3))),
])
def test_shapes_that_pytorch_would_broadcast_are_left_to_it(kernel, args):
    assert kernel(*args) is NotImplemented


OPERATORS = [
    (group_norm._group_norm, lambda: (draw(2, 4, 5, 3), 2, draw(4), draw(4), 1e-5, draw(1, 4), True)),
    (group_norm._group_norm,
     lambda: (draw(2, 4, 5, 3).to(memory_format=torch.channels_last), 2, draw(4), draw(4), 1e-5, None, False)),
    (layer_norm._add_layer_norm, lambda: (draw(2, 6), draw(2, 6), draw(6), draw(6), 1e-5)),
    (geglu._geglu, lambda: draw(2, 6).chunk(2, dim=-1)),
    (layer_norm._layer_norm, lambda: (draw(2, 6), draw(6), draw(6), 1e-5)),
    (attention._attention, lambda: (draw(1, 2, 5, 4), draw(1, 2, 3, 4), draw(1, 2, 3, 4), draw(1, 1, 1, 3))),
    (attention._absorbed_attention,
     lambda: (draw(1, 5, 4), draw(1, 2, 3, 4), draw(1, 4, 2, 3), draw(1, 1, 1, 3), draw(4))),
    (upsample._upsample, lambda: (last(draw(1, 2, 3, 4)),)),
    (residual_blocks._bias_leaky_relu, lambda: (draw(1, 2, 6), draw(2), 0.1)),
    (residual_blocks._add_leaky_relu, lambda: (draw(1, 2, 6), draw(2), draw(1, 2, 6), 0.1)),
    (residual_blocks._add_up, lambda: (draw(1, 2, 6), draw(2), draw(1, 2, 6), None, 1)),
    (residual_blocks._few_conv1d, lambda: (draw(1, 2, 6), draw(2, 2, 3), 1)),
    (residual_blocks._narrow_conv1d, lambda: (draw(1, 2, 6), draw(1, 2, 3), draw(1))),
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
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", str(capability), dtype]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

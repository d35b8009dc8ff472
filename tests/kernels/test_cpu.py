"""The CPU kernels against float64 and plain PyTorch."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import ldm2_kernels
import pytest
import torch
import torch.nn.functional as F
from ldm2_kernels import cpu
from ldm2_kernels.check import verdict

import ldm2
from ldm2 import ops
from tests.helpers import draw
from tests.kernels.inputs import (
    assert_within_the_accuracy_rule,
    attention_inputs,
    block_inputs,
    conv_inputs,
    doubled,
    linear_inputs,
    rms,
    transposed_inputs,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, module in ldm2_kernels.MODULES["cpu"].items() if module is not None])
def test_what_a_machine_is_checked_with_holds_here(library, name, dtype):
    kernel, reference = ldm2_kernels.load("cpu")[name], getattr(ops, name).reference
    with ops.backend("reference"):
        assert verdict(name, kernel, reference, torch.device("cpu"), dtype)[1] is None


@pytest.mark.parametrize("shape", [
    (1, 32, 32, 16, 16), (2, 48, 32, 9, 7), (1, 32, 80, 5, 2), (2, 64, 64, 32, 2), (3, 32, 32, 1, 1),
    (1, 512, 32, 3, 66),
])
def test_conv3x3_is_as_exact_as_the_rule_asks(library, shape):
    assert_within_the_accuracy_rule(ops.conv3x3, conv_inputs(*shape))


@pytest.mark.parametrize("length", [1, 256, 301])
@pytest.mark.parametrize("sizes", [(3,), (7,), (11,), (5,), (3, 7, 11)])
def test_residual_blocks_are_as_exact_as_the_rule_asks(library, sizes, length):
    assert_within_the_accuracy_rule(ops.residual_blocks, block_inputs(*sizes, length=length))


@pytest.mark.parametrize("taps", [3, 7, 9])
@pytest.mark.parametrize("ins, outs", [(32, 48), (32, 1), (20, 32)])
def test_conv1d_is_as_exact_as_the_rule_asks(library, ins, outs, taps):
    args = draw(2, ins, 301), draw(outs, ins, taps, seed=1) / (ins * taps) ** 0.5, draw(outs, seed=2)
    assert_within_the_accuracy_rule(ops.conv1d, args)


@pytest.mark.parametrize("taps", [3, 7, 11])
def test_the_error_of_conv1d_does_not_grow_with_channels(library, taps):
    args = draw(1, 1024, 256), draw(32, 1024, taps, seed=1) / (1024 * taps) ** 0.5, draw(32, seed=2)
    assert_within_the_accuracy_rule(ops.conv1d, args)


@pytest.mark.parametrize("taps, stride", [(16, 5), (16, 4), (8, 2), (4, 2), (7, 3), (3, 3), (12, 6)])
@pytest.mark.parametrize("ins, outs, length", [(64, 32, 50), (24, 12, 1), (10, 5, 33)])
def test_conv_transpose1d_is_as_exact_as_the_rule_asks(library, ins, outs, taps, length, stride):
    assert_within_the_accuracy_rule(ops.conv_transpose1d, transposed_inputs(ins, outs, taps, length, stride))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length, padding", [(1, 5), (3, 6), (4, 8), (31, 4), (70, 7), (20, 3), (20, 0)])
def test_conv_transpose1d_of_windows_of_four_takes_any_padding(instruction_set, length, padding, dtype):
    x, weight, bias = draw(2, 64, length), draw(64, 32, 16, seed=1) / 16, draw(32, seed=2)
    assert_within_the_accuracy_rule(ops.conv_transpose1d, [*(t.to(dtype) for t in (x, weight, bias)), 4, padding])


def test_the_taps_of_a_kernel_may_lie_before_its_channels(library):
    x, weight = draw(1, 32, 300).mT.contiguous().mT, draw(48, 32, 7, seed=1)
    expected = library.convolution(x, weight, None, None, 7, 1, 1.0)
    torch.testing.assert_close(library.convolution(x, weight.mT.contiguous().mT, None, None, 7, 1, 1.0), expected,
                               rtol=0, atol=0)
    longer = library.convolution(x, weight, None, None, 7, 1, 1.0, None, 5)
    expected = torch.nn.functional.conv1d(x.double(), weight.double(), padding=8)[:, :, 5:]
    torch.testing.assert_close(longer.double(), expected, rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="-1"):
        library.convolution(x, weight, None, None, 7, 1, 1.0, None, -1)


@pytest.mark.parametrize("outs", [1, 3])
def test_conv1d_to_few_channels_takes_any_memory(library, outs):
    x, weight, bias = draw(3, 64, 40), draw(outs, 64, 7, seed=1), draw(outs, seed=2)
    for given in (x, x.mT.contiguous().mT, draw(3, 64, 80)[..., ::2]):
        assert_within_the_accuracy_rule(ops.conv1d, [given, weight, bias])


@pytest.mark.parametrize("ins, outs", [(8, 32), (32, 8), (16, 16), (40, 40)])
def test_few_or_odd_channels_are_left_to_pytorch(library, ins, outs):
    x, weight, bias, residual = conv_inputs(2, ins, outs, 6, 4)
    expected = F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, padding=1) + residual
    with ops.backend("fused"):
        assert torch.equal(ops.conv3x3(x, weight, bias, residual), expected)


def test_every_instruction_set_of_this_machine_is_as_exact(library):
    best, *others = library.instruction_sets()
    try:
        for name in others:
            library.use_instruction_set(name)
            assert_within_the_accuracy_rule(ops.conv3x3, conv_inputs(1, 48, 80, 9, 6))
            assert_within_the_accuracy_rule(ops.residual_blocks, block_inputs(11))
            assert_within_the_accuracy_rule(ops.linear, linear_inputs(50, 70, 96))
            assert_within_the_accuracy_rule(ops.attention, attention_inputs(50, 300, 48))
    finally:
        library.use_instruction_set(best)


def test_an_instruction_set_that_the_machine_lacks_is_refused(library):
    with pytest.raises(RuntimeError, match="no instruction set mmx on this machine"):
        library.use_instruction_set("mmx")


# A process reads the variable once, so each value has a fork of its own: name, then what is left and for bfloat16.
MASKED = """
import os, sys
from pathlib import Path
import torch
from ldm2_kernels import cpu

cpu.folders = lambda: [Path(sys.argv[1])]
torch.cpu.get_capabilities = lambda: {"amx_bf16": True}
for name in ("", "baseline", "avx2", "avx512", "avx512_bf16", "zen4", "avx3"):
    if os.fork() == 0:
        os.environ["LDM2_CPU_ISA"] = name
        try:
            cpu.load()
            print(name, *torch.ops.ldm2_cpu.instruction_sets(), cpu._bfloat16(), sep=",", flush=True)
        except ValueError as error:
            print("refused", error, flush=True)
        os._exit(0)
    os.wait()
"""


def test_instruction_sets_are_masked_by_the_environment_and_never_added(library):
    done = subprocess.run(
        [sys.executable, "-c", MASKED, str(cpu.library().parent)], capture_output=True, text=True, check=True)
    *found, refused = done.stdout.splitlines()
    assert refused.startswith("refused LDM2_CPU_ISA must be") and refused.endswith("avx3")
    (_, *machine, _), *found = (line.split(",") for line in found)
    assert machine[-1] == "baseline"
    names = ["baseline", "avx2", "avx512", "avx512_bf16", "zen4"]
    assert [name for name, *_ in found] == names
    for name, *left, bfloat16 in found:
        assert left == [other for other in machine if names.index(other) <= names.index(name)]
        assert bfloat16 == ("products" if "avx512_bf16" in left else "")


def test_memory_layout_does_not_change_the_result(library):
    x, weight, bias, residual = conv_inputs(2, 32, 32, 9, 8)
    expected = ops.conv3x3(x, weight, bias, residual)
    spread = torch.stack([x, x], dim=-1)[..., 0]
    for other in (x.contiguous(memory_format=torch.channels_last), spread, x.mT.contiguous().mT):
        assert torch.equal(ops.conv3x3(other, weight, bias, residual), expected)
        assert torch.equal(ops.conv3x3(x, weight, bias, residual.mT.contiguous().mT), expected)


def test_inputs_are_left_alone(library):
    args = block_inputs(7)
    before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    ops.residual_blocks(*args)
    assert all(torch.equal(a, b) for a, b in zip(args, before) if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("side", [20, 140])
def test_threads_do_not_change_the_result(library, side):
    args = conv_inputs(1, 32, 32, side, side)
    one = ops.conv3x3(*args)
    torch.set_num_threads(2)
    try:
        two = ops.conv3x3(*args)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, two)


def test_each_row_of_a_batch_is_for_itself(library):
    x, weight, bias, residual = conv_inputs(3, 32, 32, 10, 6)
    rows = [ops.conv3x3(x[i : i + 1], weight, bias, residual[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(ops.conv3x3(x, weight, bias, residual), torch.cat(rows))


@pytest.mark.parametrize("write", [
    lambda weight: weight.mul_(2),
    lambda weight: weight.data.mul_(2),                    # which leaves no trace in the version
    lambda weight: torch._foreach_mul_([weight.data], 2),
    lambda weight: setattr(weight, "data", draw(32, 32, 3, 3, seed=9)),
])
def test_a_weight_that_is_written_to_counts_as_it_is(library, write):
    x, weight, bias, _ = conv_inputs(1, 32, 32, 4, 4)
    ops.conv3x3(x, weight, bias)
    write(weight)
    torch.testing.assert_close(ops.conv3x3(x, weight, bias), F.conv2d(x, weight, bias, padding=1), atol=1e-3, rtol=0)


def test_a_gradient_takes_the_reference(library):
    x, weight, bias, residual = conv_inputs(1, 32, 32, 4, 4)
    x.requires_grad_()
    grad, = torch.autograd.grad(ops.conv3x3(x, weight, bias, residual).sum(), x)
    expected, = torch.autograd.grad(F.conv2d(x, weight, padding=1).sum(), x)
    torch.testing.assert_close(grad, expected)


def test_other_dtypes_are_left_to_pytorch(library):
    args = [arg.half() for arg in conv_inputs(1, 32, 32, 4, 4)]
    assert torch.equal(ops.conv3x3(*args), ops.conv3x3.reference(*args))
    with ops.backend("fused"), pytest.raises(RuntimeError, match="it leaves float16"):
        ops.conv3x3(*args)


@pytest.mark.parametrize("has", ["", "products", "matrices"])
@pytest.mark.parametrize("operation, args", [
    (ops.conv3x3, conv_inputs(1, 32, 48, 9, 8)),
    (ops.conv1x1, (draw(1, 32, 5, 3), draw(48, 32, 1, 1, seed=1), draw(48, seed=2))),
    (ops.residual_blocks, block_inputs(7, 3)),
    (ops.conv1d, (draw(1, 32, 301), draw(48, 32, 7, seed=1), draw(48, seed=2))),
    (ops.conv_transpose1d, transposed_inputs(32, 16, 8, 50, 2)),
    (ops.linear, linear_inputs(30, 40, 48)),
    (ops.linear_geglu, linear_inputs(30, 40, 64)),
])
def test_bfloat16_is_left_to_pytorch_only_where_the_machine_has_matrices(library, monkeypatch, operation, args, has):
    args = [arg.bfloat16() if isinstance(arg, torch.Tensor) else arg for arg in args]
    monkeypatch.setattr(cpu, "_bfloat16", lambda: has)
    if has == "matrices":
        assert torch.equal(operation(*args), operation.reference(*args))
    else:
        assert operation(*args).dtype == torch.bfloat16
        assert_within_the_accuracy_rule(operation, args)


@pytest.mark.parametrize("instructions, capabilities, has", [
    ("avx512_bf16", {"amx_bf16": True}, "matrices"), ("avx512_bf16", {"amx_bf16": False}, "products"),
    ("avx512", {"amx_bf16": True}, ""), ("avx2", {}, ""), ("zen4", {}, "products"),
])
def test_what_a_machine_has_for_bfloat16(library, monkeypatch, instructions, capabilities, has):
    monkeypatch.delenv("LDM2_CPU_ISA", raising=False)
    monkeypatch.setattr(library, "instruction_sets", lambda: [instructions, "generic"])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu._bfloat16() == has


def test_derivatives_in_forward_mode_are_those_of_plain_pytorch(library):
    x, weight, bias, _ = conv_inputs(1, 32, 32, 8, 8)
    tangents = (draw(*x.shape, seed=3),)
    got = torch.func.jvp(lambda x: ops.conv3x3(x, weight, bias), (x,), tangents)[1]
    expected = torch.func.jvp(lambda x: ops.conv3x3.reference(x, weight, bias), (x,), tangents)[1]
    assert torch.equal(got, expected) and got.any()


def test_autocast_chooses_the_dtype(library):
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(draw(64, 32), draw(32, 32)).dtype == torch.bfloat16


def test_a_vocoder_is_exported_for_sounds_of_any_length(library):
    vocoder = ldm2.load("tiny", device="cpu").vocoder
    length = torch.export.Dim("length", min=2, max=4000)
    exported = torch.export.export(vocoder, (draw(1, 300, 64),), dynamic_shapes=({1: length},)).module()
    for frames in (3, 700):
        mel = draw(1, frames, 64)
        torch.testing.assert_close(exported(mel), vocoder(mel), atol=1e-4, rtol=0)


def test_operators_have_true_schemas_and_fake_forms(library):
    x, weight, bias, residual = conv_inputs(1, 32, 48, 5, 4)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(library.convolution.default, (x, weight, bias, residual, 0, 1, 1.0), test_utils=tests)
    for gated in (False, True):
        torch.library.opcheck(library.linear.default, (*linear_inputs(5, 7, 64), gated), test_utils=tests)
    for dtype in (torch.float32, torch.bfloat16):
        args = (*attention_inputs(5, 7, 16, dtype=dtype), draw(2, 1, 1, 7).to(dtype))
        torch.library.opcheck(library.attention.default, args, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_function_calls_the_kernels_and_serves_all_lengths(library, dtype):
    _, weight, bias, _ = (arg.to(dtype) for arg in conv_inputs(1, 32, 32, 8, 4))

    def run(x):
        x = ops.conv3x3(x, weight, bias).flatten(2).mT
        q = ops.linear(x, weight[:, :, 0, 0], bias).unflatten(-1, (2, 16)).transpose(1, 2)
        return ops.attention(q, q, q)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for frames in (7, 40, 90):
            x = draw(1, 32, frames, 4).to(dtype)
            assert torch.equal(compiled(x), run(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_weights_that_do_not_fit_are_refused(library):
    x, weight, bias, _ = conv_inputs(1, 32, 32, 4, 4)
    with pytest.raises(RuntimeError, match=r"\[32, 32, 3, 3\].*\[1, 16, 4, 4\]"):
        library.convolution(x[:, :16], weight, bias, None, 0, 1, 1.0)
    with pytest.raises(RuntimeError, match="variant 7 does not take"):
        library.convolution(x, weight, None, None, 7, 1, 1.0)


def test_fused_raises_without_the_library(monkeypatch):
    monkeypatch.setattr(cpu, "folders", lambda: [])
    monkeypatch.setattr(ops, "_kernels", {})
    args = conv_inputs(1, 32, 32, 4, 4)
    assert torch.equal(ops.conv3x3(*args), ops.conv3x3.reference(*args))
    with ops.backend("fused"), pytest.raises(RuntimeError, match="no fused conv3x3 on cpu: build it with python -m"):
        ops.conv3x3(*args)


def test_a_generation_is_that_of_plain_pytorch(library, tiny_checkpoint):
    pipe = ldm2.load(tiny_checkpoint)
    results = {}
    for name in ("reference", "fused"):
        with ops.backend(name):
            latents = pipe.generate("rain", seconds=1.0, steps=20, seed=3).latents
            results[name] = latents, pipe.vocoder(pipe.vae.decode(latents))
    for plain, fused in zip(*results.values()):
        assert not torch.equal(plain, fused)
        assert rms(plain - fused) <= 2e-4 * rms(plain)


def test_conv1x1_is_as_exact_as_the_rule_asks(library):
    x, weight, bias = draw(2, 24, 5, 3), draw(40, 24, 1, 1, seed=1), draw(40, seed=2)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_within_the_accuracy_rule(ops.conv1x1, (x.contiguous(memory_format=layout), weight, bias))


@pytest.mark.parametrize("rows, ins, outs", [(1, 5, 16), (24, 384, 48), (37, 7, 32), (250, 1000, 16), (300, 390, 80)])
def test_linear_layers_are_as_exact_as_the_rule_asks(library, rows, ins, outs):
    x, weight, bias = linear_inputs(rows, ins, outs)
    assert_within_the_accuracy_rule(ops.linear, (x, weight, bias))
    assert_within_the_accuracy_rule(ops.linear, (x, weight))
    if outs % 32 == 0:
        assert_within_the_accuracy_rule(ops.linear_geglu, (x, weight, bias))


def test_linear_layers_of_odd_widths_are_left_to_pytorch(library):
    x, weight, bias = linear_inputs(30, 8, 24)
    with ops.backend("fused"):
        assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(ops.linear_geglu(x, weight, bias), ops.linear_geglu.reference(x, weight, bias))


def test_linear_layers_take_any_strides(library):
    x, weight, bias = linear_inputs(40, 24, 32)
    expected = ops.linear(x, weight, bias)
    wide = torch.cat([x, x], dim=-1)[..., 24:]
    for other in (x.mT.contiguous().mT, wide, wide.unsqueeze(1).expand(-1, 3, -1, -1)[:, 1]):
        assert torch.equal(ops.linear(other, weight.T.contiguous().T, bias), expected)


def test_a_gate_is_right_where_erf_has_ended(library):
    gate = torch.tensor([-1e30, -100.0, -6.0, 0.0, 6.0, 100.0, 1e30]).repeat(4)
    weight = torch.cat([torch.zeros(16), torch.ones(16)])[:, None]           # values are 1, the bias; gates are x
    bias = torch.cat([torch.ones(16), torch.zeros(16)])
    got = library.linear(gate[:, None], weight, bias, True)
    torch.testing.assert_close(got, F.gelu(gate)[:, None].expand(-1, 16), atol=2e-7, rtol=1e-6)


@pytest.mark.parametrize("queries, keys, width", [
    (24, 1, 16), (49, 8, 32), (100, 256, 32), (64, 257, 48), (30, 700, 80), (145, 1024, 16),
])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_is_as_exact_as_the_rule_asks(library, queries, keys, width, with_bias):
    bias = [4 * draw(2, 1, 1, keys, seed=5)] if with_bias else []
    assert_within_the_accuracy_rule(ops.attention, [*attention_inputs(queries, keys, width), *bias])


def scaled_rows(x, *factors):
    """x (B, H, L, D) whose rows are multiplied with each of the factors in turn."""
    return x * torch.tensor(factors).repeat(x.shape[2])[: x.shape[2], None]


@pytest.mark.parametrize("change", [
    lambda q, k: (1e4 * q, 1e-4 * k), lambda q, k: (1e25 * q, 1e-25 * k), lambda q, k: (q, scaled_rows(k, 1, 0.01, 0)),
    lambda q, k: (scaled_rows(q, 1, 1e-3, 1e-30, 0), k), lambda q, k: (q.abs(), (k + 5) / 5),
], ids=["small keys", "tiny keys", "unequal keys", "unequal queries", "one sign"])
def test_attention_is_as_exact_whatever_the_sizes_of_queries_and_keys(instruction_set, change):
    q, k, v = attention_inputs(50, 300, 48)
    assert_within_the_accuracy_rule(ops.attention, [*change(q, k), v])


def test_a_query_that_is_not_a_number_spoils_no_other(library):
    q, k, v = attention_inputs(50, 300, 32)
    expected = ops.attention(q, k, v)
    q[0, 0, 7, 3], q[0, 0, 20, 5] = float("nan"), float("inf")
    got, spoiled = ops.attention(q, k, v), torch.zeros(2, 3, 50, 32, dtype=torch.bool)
    spoiled[0, 0, [7, 20]] = True
    assert got[spoiled].isnan().all() and torch.equal(got[~spoiled], expected[~spoiled])


@pytest.mark.parametrize("queries, keys, width", [(24, 1, 16), (49, 9, 32), (64, 257, 48), (30, 700, 80)])
@pytest.mark.parametrize("bias_rows", [0, 1, 2])
def test_attention_in_bfloat16_is_as_exact_as_the_rule_asks(library, queries, keys, width, bias_rows):
    args = attention_inputs(queries, keys, width, dtype=torch.bfloat16)
    args += [4 * draw(bias_rows, 1, 1, keys, seed=5).bfloat16()] if bias_rows else []
    assert_within_the_accuracy_rule(ops.attention, args)
    exact = ops.attention.reference(*doubled(args))                          # the operator, where ops would widen first
    got = library.attention(*args[:3], args[3] if bias_rows else None)
    assert got.dtype == torch.bfloat16
    assert rms(got - exact) <= 2 * rms(ops.attention.reference(*args) - exact) + 3e-6 * rms(exact)


def test_dropped_keys_have_no_weight(library):
    q, k, v = attention_inputs(30, 20, 16)
    bias = torch.zeros(2, 1, 1, 20)
    bias[..., 12:] = -10_000.0
    torch.testing.assert_close(ops.attention(q, k, v, bias), ops.attention(q, k[:, :, :12], v[:, :, :12]))
    bias[..., 12:] = -torch.inf
    torch.testing.assert_close(ops.attention(q, k, v, bias), ops.attention(q, k[:, :, :12], v[:, :, :12]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [20, 300, 600])
def test_a_row_whose_keys_are_all_masked_attends_to_nothing(library, dtype, keys):
    q, k, v = attention_inputs(30, keys, 16, dtype=dtype)
    bias = torch.zeros(2, 1, 1, keys, dtype=dtype)
    bias[1] = -torch.inf
    bias[0, ..., :-1] = -torch.inf                         # whole blocks of keys before the one that counts
    got = library.attention(q, k, v, bias)
    assert not got[1].any()
    torch.testing.assert_close(got[0], v[0, :, -1:].expand_as(got[0]))


def test_weights_of_attention_are_as_exact_as_float32(instruction_set):
    scores = -torch.cat([torch.linspace(0, 4, 14), torch.tensor([200.0, 1e30])])
    q, k = torch.zeros(1, 1, 24, 16), torch.zeros(1, 1, 16, 16)
    q[..., 0], k[..., 0] = 4, scores                       # divided by the root of the width
    got, expected = ops.attention(q, k, torch.eye(16)[None, None])[0, 0], scores.double().softmax(0)
    assert (got[:, :14] / expected[:14] - 1).abs().max() < 1e-6
    assert got[:, 14:].abs().max() < 1e-37


def test_attention_hides_no_nan(library):
    q, k, v = attention_inputs(30, 20, 16)
    q[0, 1, 7, 3] = torch.nan
    got = ops.attention(q, k, v)
    assert got[0, 1, 7].isnan().all()
    assert got.isnan().sum() == 16


def test_threads_do_not_change_attention_or_linear_layers(library):
    def run():
        return ops.attention(*attention_inputs(130, 40, 32, batch=1)), ops.linear(*linear_inputs(130, 40, 48))

    one = run()
    for threads in (2, 5):
        torch.set_num_threads(threads)
        try:
            several = run()
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(one, several))


def test_threads_that_help_each_other_leave_nothing_out(library):
    """More threads than cores: who computes what differs from call to call."""
    def run():
        return ops.linear(*linear_inputs(700, 64, 96)), ops.attention(*attention_inputs(200, 40, 32))

    one = run()
    torch.set_num_threads(7)
    try:
        several = [run() for _ in range(30)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for results in several for a, b in zip(one, results))


@pytest.mark.parametrize("change", [
    lambda q, k, v: (q[..., :8], k[..., :8], v[..., :8]),                    # no panel of 16
    lambda q, k, v: (q.half(), k.half(), v.half()),
    lambda q, k, v: (q, k, v, torch.zeros(2, 1, 30, 20)),                    # not one bias for all queries
    lambda q, k, v: (q, k.mT.contiguous().mT, v),
])
def test_attention_that_no_kernel_takes_is_left_to_pytorch(library, change):
    args = change(*attention_inputs(30, 20, 16))
    torch.testing.assert_close(ops.attention(*args), ops.attention.reference(*args))
    with ops.backend("fused"), pytest.raises(RuntimeError, match="the fused attention on cpu cannot be used"):
        ops.attention(*args)


@pytest.mark.slow
def test_code_for_sixteen_lanes_on_a_machine_of_eight(tmp_path):
    """AVX-512's sources, compiled for AVX2: all but the instructions themselves. In a process of its own: a process has
    one library."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *LDM2_SET=avx2*) set -- -DLDM2_LANES=16 "$@";; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    shutil.copytree(Path(cpu.__file__).parent.parent, tmp_path / "kernels", ignore=shutil.ignore_patterns("*.so"))
    env = os.environ | {"CXX": str(compiler), "PYTHONPATH": os.pathsep.join([str(tmp_path / "kernels"), *sys.path])}
    folder = str(tmp_path / "kernels" / "ldm2_kernels")
    for command in (["-m", "ldm2.build_kernels", "--folder", folder],
                    ["-m", "pytest", "-o", f"pythonpath={tmp_path / 'kernels'}", __file__,
                     str(Path(__file__).with_name("test_cpu_bfloat16.py"))]):
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

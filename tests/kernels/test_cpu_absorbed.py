"""Attention with the projections of queries and outputs within keys and values, on the CPU."""

import pytest
import torch
from ldm2_kernels import cpu

from ldm2 import ops
from ldm2.attention import AbsorbedKeyValue, Attention, KeyValue, mask_bias
from ldm2.checkpoints.int8 import quantize
from ldm2.runtime.int8_layers import install
from tests.helpers import draw
from tests.kernels.inputs import assert_within_the_accuracy_rule, doubled, rms

DTYPES = [torch.float32, torch.bfloat16]


def inputs(queries, heads, length, channels, batch=2, dtype=torch.float32):
    """x, keys, values, offset."""
    x, keys = draw(batch, queries, channels), draw(batch, heads, length, channels, seed=1) * 2 / channels**0.5
    values, offset = draw(batch, channels, heads, length, seed=2), draw(channels, seed=3)
    return [tensor.to(dtype) for tensor in (x, keys, values, offset)]


def masked(*kept, length, dtype=torch.float32):
    return mask_bias(torch.arange(length) < torch.tensor(kept)[:, None], draw(1).to(dtype))


@pytest.mark.parametrize("queries, heads, length, channels", [
    (5, 2, 7, 32), (45, 8, 20, 64), (64, 8, 8, 80), (33, 3, 2, 48), (100, 1, 32, 16), (32, 5, 64, 160), (40, 4, 1, 32),
])
@pytest.mark.parametrize("bias_rows", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_as_exact_as_the_rule_asks(instruction_set, queries, heads, length, channels, bias_rows, dtype):
    x, keys, values, offset = inputs(queries, heads, length, channels, dtype=dtype)
    bias = 4 * draw(bias_rows, 1, 1, length, seed=5).to(dtype) if bias_rows else None
    args = x, keys, values, bias, offset
    assert_within_the_accuracy_rule(ops.absorbed_attention, args)
    exact = ops.absorbed_attention.reference(*doubled(args))                 # the operator, where ops would widen first
    got, plain = torch.ops.ldm2_cpu.absorbed_attention(*args), ops.absorbed_attention.reference(*args)
    assert got.dtype == dtype and rms(got - exact) <= 2 * rms(plain - exact) + 3e-6 * rms(exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_positions_have_no_weight_wherever_they_are(library, dtype):
    x, keys, values, offset = inputs(45, 4, 9, 64, batch=4, dtype=dtype)
    bias = masked(9, 5, 1, 0, length=9, dtype=dtype)       # the last keeps nothing: as if not masked, but for rounding
    got = ops.absorbed_attention(x, keys, values, bias, offset)
    for row, count in enumerate((9, 5, 1, 9)):
        kept = x[row:row + 1], keys[row:row + 1, :, :count], values[row:row + 1, ..., :count], None, offset
        exact = ops.absorbed_attention.reference(*doubled(kept))
        allowed = 8e-3 if dtype == torch.bfloat16 else 2e-4 if row == 3 else 2e-6
        assert rms(got[row] - exact[0]) <= allowed * rms(exact)
    bias[1, ..., 2] = -10_000.0                            # one within those that count
    inner, keep = ops.absorbed_attention(x, keys, values, bias, offset)[1], [0, 1, 3, 4]
    shorter = ops.absorbed_attention(x[1:2], keys[1:2, :, keep], values[1:2, ..., keep], None, offset)[0]
    torch.testing.assert_close(inner, shorter, atol=2e-5 if dtype == torch.float32 else 0.05, rtol=0)


def test_what_is_masked_at_the_end_may_hold_anything(library):
    x, keys, values, offset = inputs(45, 4, 9, 64)
    bias = masked(9, 5, length=9)
    expected = ops.absorbed_attention(x, keys, values, bias, offset)
    keys[1, :, 5:], values[1, ..., 5:] = torch.nan, torch.inf
    assert torch.equal(ops.absorbed_attention(x, keys, values, bias, offset), expected)
    x[0, 7, 3] = torch.nan
    assert ops.absorbed_attention(x, keys, values, bias, offset).isnan().sum() == 64         # a NaN is not hidden


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("laid", ["heads first", "positions first"])
def test_neither_threads_nor_memory_change_the_result(library, threads, laid):
    x, keys, values, offset = inputs(170, 8, 6, 48, batch=3)
    bias = masked(6, 1, 3, length=6)
    expected = ops.absorbed_attention(x, keys, values, bias, offset)
    if laid == "positions first":
        keys, values = keys.transpose(1, 2).contiguous().transpose(1, 2), values.mT.contiguous().mT
    torch.set_num_threads(threads)
    try:
        got = ops.absorbed_attention(x.mT.contiguous().mT, keys, values, bias.expand(3, 1, 1, 6), offset)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("change", [
    lambda x, k, v, o: (x[..., :40], k[..., :40], v[:, :40], None, o[:40]),  # no panel of 16
    lambda x, k, v, o: (x.half(), k.half(), v.half(), None, o.half()),
    lambda x, k, v, o: (x, k, v, torch.zeros(2, 3, 1, 5), o),                # not one bias for all heads
    lambda x, k, v, o: (x.bfloat16(), k.bfloat16(), v.bfloat16(), None, o.bfloat16()),       # 15 scores
])
def test_what_the_kernel_does_not_take_is_left_to_pytorch(library, change):
    args = change(*inputs(30, 3, 5, 64))
    torch.testing.assert_close(ops.absorbed_attention(*args), ops.absorbed_attention.reference(*args))
    with ops.backend("fused"), pytest.raises(RuntimeError, match="fused absorbed_attention on cpu cannot be used"):
        ops.absorbed_attention(*args)


def test_the_operator_has_a_true_schema_and_refuses_what_does_not_fit(library):
    x, keys, values, offset = inputs(30, 4, 5, 64)
    for bias in (None, torch.zeros(2, 1, 1, 5)):
        torch.library.opcheck(library.absorbed_attention.default, (x, keys, values, bias, offset),
                              test_utils=("test_schema", "test_faketensor"))
    for args, match in {
        (x, keys, values[:, :, :3], None, offset): r"\[2, 64, 3, 5\]",
        (x, keys[..., :32], values, None, offset): r"\[2, 4, 5, 32\]",
        (x, keys, values, torch.zeros(2, 1, 1, 4), offset): r"bias must be \(B, 1, 1, L\)",
        (x, keys, values, None, offset[:9]): "does not take",
        (x.bfloat16(), keys, values, None, offset): "does not take",
        (torch.cat([x, x[:1]]), keys, values, None, offset): "does not take",
    }.items():
        with pytest.raises(RuntimeError, match=match):
            library.absorbed_attention(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bytes", [False, True])
@torch.no_grad()
def test_absorbed_keys_are_made_of_the_weights_and_rounded_once(library, dtype, with_bytes):
    layer = Attention(64, 2, 20).to(dtype)
    if with_bytes:
        for name in ("to_q.weight", "to_out.0.weight"):
            assert install(layer, name, quantize(name, layer.get_parameter(name).float()), dtype)
    kv = KeyValue(*(draw(2, 2, 7, 32, seed=i).to(dtype) for i in range(2)), masked(7, 3, length=7, dtype=dtype))
    asks, gives = (part.weight.double() * getattr(part, "weight_scale", 1.0)
                   for part in (layer.to_q, layer.to_out[0]))
    exact = AbsorbedKeyValue(torch.einsum("bhld,hdc->bhlc", kv.keys.double(), asks.view(2, 32, 64)) / 32**0.5,
                             torch.einsum("bhld,chd->bchl", kv.values.double(), gives.view(64, 2, 32)))
    got = layer.absorb(kv)
    assert isinstance(got, AbsorbedKeyValue) and got.bias is kv.bias
    for ours, right in ((got.keys, exact.keys), (got.values, exact.values)):
        assert ours.dtype == dtype and ours.shape == right.shape
        error = (ours.double() - right).abs() / right.abs().clamp_min(0.05)
        assert error.max() < (1e-4 if dtype == torch.float32 else 0.501 * torch.finfo(dtype).eps + 1e-5)


@torch.no_grad()
def test_projections_are_absorbed_where_that_is_less_work(library, monkeypatch):
    layer, wide = Attention(64, 2, 20), Attention(160, 2, 20)

    def is_absorbed(layer, length):
        return isinstance(layer.absorb(layer.project_kv(draw(1, length, 20))), AbsorbedKeyValue)

    assert is_absorbed(layer, 32) and not is_absorbed(layer, 33)             # the width of a head
    assert is_absorbed(wide, 64) and not is_absorbed(wide, 65)
    with torch.enable_grad():
        assert not is_absorbed(layer, 8)
    for part in (layer.to_q, layer.to_out[0]):
        hook = part.register_forward_hook(lambda *_: None)
        assert not is_absorbed(layer, 8)
        hook.remove()
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_kernels", {"cpu": {}})
        assert is_absorbed(layer, 8)                       # in plain PyTorch too
    assert is_absorbed(layer, 8) and cpu.library() is not None

"""Transformer blocks as one operator on the CPU, against float64 and their layers one by one."""

import pytest
import torch
from ldm2_kernels import cpu
from ldm2_kernels.check import excess

from ldm2 import ops
from ldm2.attention import AbsorbedKeyValue, TransformerBlock, mask_bias
from ldm2.checkpoints.int8 import quantize
from ldm2.runtime.int8_layers import install
from ldm2.training.lora import add_lora
from tests.helpers import draw
from tests.kernels.inputs import assert_neither_strides_nor_threads_change

DTYPES = (torch.float32, torch.bfloat16)
WIDTH = 20                                                 # of the context


def make_block(context=True, channels=64, heads=2, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = TransformerBlock(channels, heads, WIDTH if context else None)
        for norm in (block.norm1, block.norm2, block.norm3):
            torch.nn.init.normal_(norm.weight, 1.0, 0.2)
            torch.nn.init.normal_(norm.bias, 0.0, 0.2)
    return block.to(dtype).eval().requires_grad_(False)


def context_of(block, batch=2, dtype=torch.float32, absorbed=False):
    """Keys and values of 7 tokens, the last two of which one row does not have."""
    mask = torch.ones(batch, 7)
    mask[-1, 5:] = 0
    with torch.no_grad():
        kv = block.attn2.project_kv(draw(batch, 7, WIDTH, seed=5).to(dtype), mask_bias(mask, draw(1).to(dtype)))
        return block.attn2.absorb(kv) if absorbed else kv


def double(kv):
    return None if kv is None else type(kv)(*(None if part is None else part.double()
                                              for part in (kv.keys, kv.values, kv.bias)))


def is_one(monkeypatch, block, x, kv):
    """Whether a block runs as one operator."""
    calls, kernel = [], ops._kernels["cpu"]["transformer_block"]
    with monkeypatch.context() as patch:
        patch.setitem(ops._kernels["cpu"], "transformer_block", lambda *args: calls.append(kernel(*args)) or calls[-1])
        y = block(x, kv)
    return bool(calls) and y is calls[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", ["", "prompt", "absorbed prompt"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_is_as_exact_as_the_rule_asks(instruction_set, monkeypatch, batch, context, dtype):
    block, x = make_block(bool(context), dtype=dtype), draw(batch, 45, 64).to(dtype)
    kv = context_of(block, dtype=dtype, absorbed="absorbed" in context) if context else None
    assert isinstance(kv, AbsorbedKeyValue) == ("absorbed" in context)
    got = block(x, kv)
    assert is_one(monkeypatch, block, x, kv) == (dtype == torch.float32 or cpu._bfloat16() == "products")
    with ops.backend("reference"):
        plain, exact = block(x, kv), block.double()(x.double(), double(kv))
    assert got.shape == (2 if context else batch, 45, 64) and excess(got, plain, exact) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absorbed", [False, True])
def test_a_block_with_int8_weights_is_that_of_the_widened_ones(library, monkeypatch, dtype, absorbed):
    block, x = make_block(dtype=dtype), draw(2, 45, 64).to(dtype)
    for name, weight in list(block.named_parameters()):
        if weight.dim() == 2 and "attn2.to_k" not in name and "attn2.to_v" not in name:
            assert install(block, name, quantize(name, weight.float()), dtype)
    kv = context_of(block, dtype=dtype, absorbed=absorbed)
    got = block(x, kv)
    assert is_one(monkeypatch, block, x, kv) == (dtype == torch.float32 or cpu._bfloat16() == "products")
    with ops.backend("reference"):
        plain = block(x, kv)
    torch.testing.assert_close(got, plain, atol=2e-5 if dtype == torch.float32 else 0.05, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_that_rounds_inputs_is_that_of_its_layers_one_by_one(instruction_set, monkeypatch, dtype):
    """But for keys and values of the context, and one weight that is float, as a LoRA makes it."""
    block, x = make_block(dtype=dtype), draw(2, 45, 64).to(dtype)
    kv = context_of(block, dtype=dtype)
    for name, weight in list(block.named_parameters()):
        if weight.dim() == 2 and "attn2.to_k" not in name and "attn2.to_v" not in name and "attn1.to_out" not in name:
            assert install(block, name, quantize(name, weight.float()), dtype)
            block.get_submodule(name.removesuffix(".weight")).rounds_inputs = True
    got, alone = block(x, kv), is_one(monkeypatch, block, x, kv)
    assert alone == (dtype == torch.float32 or cpu._bfloat16() == "products")
    hook = block.norm1.register_forward_hook(lambda *_: None)
    assert not is_one(monkeypatch, block, x, kv)
    torch.testing.assert_close(got, block(x, kv), atol=1e-3 if dtype == torch.float32 else 0.05, rtol=0)
    hook.remove()
    for layer in block.modules():
        layer.rounds_inputs = False
    wider = block(x, kv)
    assert 1e-3 < (got - wider).float().norm() / wider.float().norm() < 0.02


@pytest.mark.parametrize("absorbed", [False, True])
def test_neither_strides_nor_threads_change_a_block(library, absorbed):
    block, x = make_block(), draw(2, 45, 64)
    kv = context_of(block, absorbed=absorbed)

    def results(strided):
        return [block(x.mT.contiguous().mT if strided else x, kv)]

    assert_neither_strides_nor_threads_change(results)


def test_a_block_with_absorbed_projections_is_that_without(library):
    block, x = make_block(), draw(1, 45, 64)
    torch.testing.assert_close(block(x, context_of(block, absorbed=True)), block(x, context_of(block)))
    before = block(x, context_of(block, absorbed=True))
    block.attn2.to_q.weight.mul_(2)                        # each generation absorbs anew
    torch.testing.assert_close(block(x, context_of(block, absorbed=True)), block(x, context_of(block)))
    assert (block(x, context_of(block, absorbed=True)) - before).abs().max() > 0.01


def test_layers_that_are_watched_or_replaced_are_called_one_by_one(library, monkeypatch):
    block, x = make_block(), draw(2, 45, 64)
    kv, seen = context_of(block), []
    assert is_one(monkeypatch, block, x, kv)
    for layer in (block.norm1, block.attn1, block.attn2.to_q, block.ff, block.ff.net[0], block.ff.net[2]):
        for watch in (layer.register_forward_hook, layer.register_forward_pre_hook):
            hook = watch(lambda *_: seen.append(1))
            assert not is_one(monkeypatch, block, x, kv)
            assert not is_one(monkeypatch, block, x, context_of(block, absorbed=layer is not block.attn2.to_q))
            hook.remove()
    assert len(seen) == 24 and is_one(monkeypatch, block, x, kv)

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block.attn1.to_v.__class__ = Doubled
    assert not is_one(monkeypatch, block, x, kv)
    assert not torch.equal(block(x, kv), make_block()(x, kv))


def test_a_lora_in_training_counts(library, monkeypatch):
    block, x = make_block(), draw(2, 45, 64)
    kv, before = context_of(block), block(x, context_of(block))
    lora = add_lora(block, rank=2, targets=["attention"])
    for part in lora.parts.values():
        torch.nn.init.normal_(part.up)
    with torch.no_grad():
        assert not is_one(monkeypatch, block, x, kv)
        assert (block(x, kv) - before).abs().max() > 0.01
    lora.remove()
    assert torch.equal(block(x, kv), before)


def test_gradients_autocast_and_few_rows_take_the_layers_one_by_one(library, monkeypatch):
    block, x = make_block(), draw(2, 45, 64)
    kv = context_of(block)
    assert not is_one(monkeypatch, block, x[:, :5], kv)
    odd = make_block(channels=40)
    assert not is_one(monkeypatch, odd, draw(2, 45, 40), context_of(odd))
    assert not is_one(monkeypatch, odd, draw(2, 45, 40), context_of(odd, absorbed=True))
    assert not is_one(monkeypatch, block, x[:, :5], context_of(block, absorbed=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_one(monkeypatch, block, x, kv)
    with ops.backend("reference"):
        assert not is_one(monkeypatch, block, x, kv)
    needed = x.clone().requires_grad_()
    assert not is_one(monkeypatch, block, needed, kv)
    block(needed, kv).sum().backward()
    assert needed.grad.isfinite().all() and needed.grad.any()


def test_weights_that_are_not_in_memory_are_refused(library):
    block, x = make_block(), draw(2, 45, 64)
    kv = context_of(block)
    block.ff.net[2].weight = torch.nn.Parameter(block.ff.net[2].weight.to("meta"), requires_grad=False)
    with pytest.raises(RuntimeError, match="weights are not in memory"):
        block(x, kv)


def test_the_operator_refuses_what_does_not_fit(library):
    block, x = make_block(), draw(2, 45, 64)
    with pytest.raises(RuntimeError, match="a block has 20 parameters, got 3"):
        library.transformer_block(x, [x] * 3, [None] * 3, None, None, None, False, 2, 1e-5)
    with pytest.raises(RuntimeError, match="of 20 parameters or of none, got 3"):
        library.transformer_block(x, block._parameters_in_order(), [None] * 20, None, None, None, False, 2, 1e-5,
                                  [True] * 3)
    with pytest.raises(RuntimeError, match="a block does not take"):
        library.transformer_block(x, block._parameters_in_order(), [None] * 20, None, None, None, False, 3, 1e-5)
    with pytest.raises(RuntimeError, match="what is absorbed needs keys"):
        library.transformer_block(x, block._parameters_in_order(), [None] * 20, None, None, None, True, 2, 1e-5)

"""Attention, feed-forward layer and transformers, each against diffusers' layer; masks; rows of several branches."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from benchmarks.checkpoints import randomise
from ldm2.attention import AbsorbedKeyValue, Attention, KeyValue, Transformer2D, TransformerBlock, mask_bias
from tests.helpers import draw


@pytest.mark.parametrize("context_dim", [None, 12])
def test_a_transformer_block_equals_diffusers(context_dim):
    ours = randomise(TransformerBlock(16, 4, context_dim), seed=1)
    theirs = BasicTransformerBlock(
        16, 4, 4, cross_attention_dim=context_dim, activation_fn="geglu", double_self_attention=context_dim is None
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    x, context = draw(2, 9, 16), None if context_dim is None else draw(2, 5, context_dim, seed=1)
    kv = None if context is None else ours.attn2.project_kv(context)
    torch.testing.assert_close(ours(x, kv), theirs(x, encoder_hidden_states=context), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("context_dim", [None, 12])
@pytest.mark.parametrize("grad", [True, False])
def test_a_transformer_over_positions_equals_diffusers(depth, context_dim, grad):
    ours = randomise(Transformer2D(16, 4, depth, context_dim, groups=8), seed=2)
    theirs = Transformer2DModel(
        4, 4, in_channels=16, num_layers=depth, cross_attention_dim=context_dim, norm_num_groups=8,
        double_self_attention=context_dim is None,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    x, context = draw(2, 16, 5, 3), None if context_dim is None else draw(2, 4, context_dim, seed=1)
    with torch.set_grad_enabled(grad):
        key_values = (None,) * depth if context is None else ours.project_kv(context, None)
        assert context is None or isinstance(key_values[0], KeyValue if grad else AbsorbedKeyValue)
        expected = theirs(x, encoder_hidden_states=context).sample
        torch.testing.assert_close(ours(x, key_values), expected, atol=2e-5, rtol=1e-5)


def test_dropped_tokens_do_not_matter():
    attention = randomise(Attention(16, 4, 12), seed=3)
    x, context = draw(2, 9, 16), draw(2, 5, 12, seed=1)
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]])
    changed = context.clone()
    changed[0, 2:4] = 100.0
    bias = mask_bias(mask, context)
    torch.testing.assert_close(
        attention(x, attention.project_kv(changed, bias)), attention(x, attention.project_kv(context, bias))
    )


def test_a_masked_row_equals_the_shorter_row():
    attention = randomise(Attention(16, 4, 12), seed=3)
    x, context = draw(1, 9, 16), draw(1, 5, 12, seed=1)
    masked = attention.project_kv(context, mask_bias(torch.tensor([[True, True, True, False, False]]), context))
    torch.testing.assert_close(attention(x, masked), attention(x, attention.project_kv(context[:, :3])))


def test_a_row_that_keeps_nothing_attends_as_if_not_masked():
    attention = randomise(Attention(16, 4, 12), seed=3)
    x, context = draw(1, 9, 16), draw(1, 5, 12, seed=1)
    kv = attention.project_kv(context, mask_bias(torch.zeros(1, 5), context))
    torch.testing.assert_close(attention(x, kv), attention(x, attention.project_kv(context)), atol=5e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_row_that_keeps_nothing_is_finite_in_half_precision(dtype):
    attention = randomise(Attention(16, 4, 12), seed=3).to(dtype)
    x, context = draw(1, 9, 16).to(dtype), draw(1, 5, 12, seed=1).to(dtype)
    assert attention(x, attention.project_kv(context, mask_bias(torch.zeros(1, 5), context))).isfinite().all()


@pytest.mark.parametrize("mask", [None, torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool)])
def test_a_mask_that_keeps_all_is_no_bias(mask):
    assert mask_bias(mask, draw(2, 5, 12)) is None


def test_rows_of_two_branches_attend_from_one_row_of_positions():
    block = randomise(TransformerBlock(16, 4, 12), seed=1)
    x, context = draw(2, 9, 16), draw(4, 5, 12, seed=1)
    both = block(x, block.attn2.project_kv(context))
    torch.testing.assert_close(both[:2], block(x, block.attn2.project_kv(context[:2])))
    torch.testing.assert_close(both[2:], block(x, block.attn2.project_kv(context[2:])))

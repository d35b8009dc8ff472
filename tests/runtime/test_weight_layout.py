"""Layouts of weights: what they are for happens, and no number changes."""

import copy

import pytest
import torch
import torch.nn.functional as F

from benchmarks import checkpoints
from ldm2 import ops
from ldm2.attention import Attention
from ldm2.runtime import weight_layout
from tests.helpers import UNETS, condition, draw, our_unet, our_vae


@pytest.fixture(scope="module")
def attention():
    attention = checkpoints.randomise(Attention(32, 4), seed=4)
    attention.fuse_qkv()
    return attention


@pytest.fixture(scope="module", params=sorted(UNETS))
def pair(request):
    """A UNet as it is loaded, and one laid out for tensor cores."""
    plain = our_unet(checkpoints.unet(**UNETS[request.param]))
    arranged = copy.deepcopy(plain)
    weight_layout.for_tensor_cores(arranged)
    return plain, arranged


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_the_layout_changes_no_number(pair, rows):
    plain, arranged = pair
    x_t, conditioning = draw(1, 4, 9, 8), condition(plain.config, rows)
    torch.testing.assert_close(
        arranged(x_t, 7, conditioning), plain(x_t, 7, conditioning), atol=1e-5, rtol=1e-5
    )
    laid_out = arranged.state_dict()
    assert all(torch.equal(laid_out[name], parameter) for name, parameter in plain.state_dict().items())


@torch.no_grad()
def test_a_decoder_is_the_same():
    plain = our_vae(checkpoints.vae())
    arranged = copy.deepcopy(plain)
    weight_layout.for_tensor_cores(arranged)
    latents = draw(1, plain.config.latent_channels, 9, 4)
    torch.testing.assert_close(arranged.decode(latents), plain.decode(latents), atol=1e-5, rtol=1e-5)


def _fit(x):
    """Whether a map lies with its channels last, or is the same either way."""
    return x.dim() != 4 or x.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_maps_keep_their_channels_last_from_the_first_convolution_on(pair, monkeypatch):
    seen = []
    for name in ("conv2d", "group_norm"):
        plain = getattr(F, name)
        monkeypatch.setattr(F, name, lambda x, *args, _name=name, _plain=plain, **named: (
            seen.append((_name, _fit(x))), _plain(x, *args, **named))[1])
    unet = pair[1]
    with ops.backend("reference"):
        unet(draw(1, 4, 16, 8), 7, condition(unet.config, 2))
    others = [name for name, fit in seen if not fit]
    assert len(seen) > 20
    assert others == ["conv2d"]                            # conv_in, of what the sampler gives


@torch.no_grad()
def test_a_self_attention_has_one_product_where_its_weights_lie_together(attention, monkeypatch):
    products = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: (
        products.append(tuple(weight.shape)), plain(x, weight, bias))[1])
    x = draw(2, 9, 32)
    parted = copy.deepcopy(attention).to(torch.float64).to(torch.float32)     # a part that is moved is parted
    torch.testing.assert_close(attention(x), parted(x), atol=1e-6, rtol=1e-6)
    assert products == [(96, 32), (32, 32), *[(32, 32)] * 4]


@torch.no_grad()
def test_weights_that_are_written_to_or_replaced_count(attention):
    x = draw(2, 9, 32)
    changed, plain = copy.deepcopy(attention), checkpoints.randomise(Attention(32, 4), seed=5)
    changed.fuse_qkv()
    changed.load_state_dict(plain.state_dict())
    assert changed._fused_qkv() is not None
    torch.testing.assert_close(changed(x), plain(x), atol=1e-6, rtol=1e-6)
    changed.to_k.weight = torch.nn.Parameter(attention.to_k.weight.clone())
    assert changed._fused_qkv() is None


def test_gradients_reach_all_three(attention):
    trained = copy.deepcopy(attention).requires_grad_(True)
    trained(draw(2, 9, 32)).square().sum().backward()
    assert all(layer.weight.grad.any() for layer in (trained.to_q, trained.to_k, trained.to_v))


def test_projections_of_a_context_stay_apart():
    attention = Attention(32, 4, 24)
    attention.fuse_qkv()
    assert not attention.qkv_fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cpu_keeps_the_layout_of_the_file(dtype):
    unet = our_unet(checkpoints.unet()).to(dtype)
    before = {name: parameter.stride() for name, parameter in unet.named_parameters()}
    assert weight_layout.arrange(unet) is unet
    assert before == {name: parameter.stride() for name, parameter in unet.named_parameters()}


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_an_arranged_unet_on_cuda_is_near_the_cpu(pair, dtype, tolerance):
    unet = pair[0]
    x_t, conditioning = draw(1, 4, 9, 8), condition(unet.config, 2)
    arranged = weight_layout.arrange(copy.deepcopy(unet).to("cuda", dtype))
    got = arranged(x_t.to("cuda", dtype), 7, conditioning.to("cuda", dtype)).cpu().float()
    expected = unet(x_t, 7, conditioning)
    assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())

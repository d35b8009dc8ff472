"""Weights of a byte a number: how they are made, and what damaged ones say."""

import re

import pytest
import torch

from ldm2.checkpoints.int8 import LEAST, paired, quantize, quantized, selects
from ldm2.ops import Int8
from tests.helpers import draw

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("shape", [(300, 70), (48, 32, 3, 3), (64, 40, 11), (1, 20_000), (20_000, 1)])
@pytest.mark.parametrize("name", ["x.weight", "h.0.attn.c_attn.weight", "upsampler.3.weight"])
def test_every_number_is_within_half_a_step_of_its_channel(shape, name):
    axis = 0 if name == "x.weight" else 1
    weight = draw(*shape) * torch.logspace(-3, 3, shape[axis]).view([-1 if i == axis else 1 for i in range(len(shape))])
    values, scale = quantize(name, weight)
    assert values.dtype == torch.int8 and values.shape == weight.shape and scale.dtype == torch.float32
    assert list(scale.shape) == [size if i == axis else 1 for i, size in enumerate(shape)]
    error = (values.double() * scale.double() - weight.double()).abs()
    assert (error <= 0.5001 * scale.double()).all()
    others = [i for i in range(len(shape)) if i != axis]
    assert (values.abs().amax(others) == 127).all()


def test_a_large_weight_is_quantized_in_pieces_as_in_one(monkeypatch):
    weight = draw(90, 300)
    whole = quantize("weight", weight)
    monkeypatch.setattr("ldm2.checkpoints.int8.PIECE", 700)
    for a, b in zip(whole, quantize("weight", weight), strict=True):
        assert torch.equal(a, b)


def test_zeros_stay_zeros_and_scales_are_positive():
    weight = draw(5, 4000)
    weight[1], weight[2], weight[3] = 0, 1e-43, -3e38
    values, scale = quantize("weight", weight)
    assert (scale > 0).all() and scale.isfinite().all()
    dense = Int8(values, scale).dense(torch.float32)
    assert (dense[1] == 0).all() and dense[2].abs().max() < 1e-37 and torch.allclose(dense[3], weight[3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_quantized_from_their_numbers(dtype):
    weight = draw(40, 500).to(dtype)
    for a, b in zip(quantize("weight", weight), quantize("weight", weight.float()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(value):
    weight = draw(40, 500)
    weight[7, 3] = value
    with pytest.raises(ValueError, match=r"up\.weight holds NaN or infinite"):
        quantize("up.weight", weight)


@pytest.mark.parametrize("name, shape, chosen", [
    ("a.weight", (128, LEAST // 128), True), ("weight", (LEAST, 1), True), ("a.weight", (1, LEAST - 1), False),
    ("a.weight", (2 * LEAST,), False), ("a.bias", (128, LEAST), False), ("a.emb_rel_k", (1, 128, LEAST), False),
])
def test_large_matrices_and_kernels_are_chosen_and_nothing_else(name, shape, chosen):
    assert selects(name, torch.empty(shape, device="meta")) == chosen
    assert not selects(name, torch.empty(shape, device="meta", dtype=torch.int64))


def in_file():
    """Tensors of a file with one int8 weight, a float one and a bias."""
    return quantized({"a.weight": draw(128, 256), "a.bias": draw(128), "b.weight": draw(8, 8)})


def test_a_file_holds_scales_beside_its_weights():
    tensors = in_file()
    assert list(tensors) == ["a.weight", "a.weight_scale", "a.bias", "b.weight"]
    assert tensors["a.weight"].dtype == torch.int8 and tensors["a.weight_scale"].shape == (128, 1)
    pairs = paired(tensors, "file")
    assert isinstance(pairs["a.weight"], Int8) and list(pairs) == ["a.weight", "a.bias", "b.weight"]
    assert torch.equal(pairs["a.weight"].values, tensors["a.weight"])


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("a.weight_scale"), "a.weight is int8 and has no a.weight_scale"),
    (lambda t: t["a.weight_scale"].__setitem__(5, torch.nan), "a.weight_scale must be positive and finite"),
    (lambda t: t["a.weight_scale"].__setitem__(5, torch.inf), "a.weight_scale must be positive and finite"),
    (lambda t: t["a.weight_scale"].__setitem__(5, 0), "a.weight_scale must be positive and finite"),
    (lambda t: t["a.weight_scale"].__setitem__(5, -1), "a.weight_scale must be positive and finite"),
    (lambda t: t.update({"a.weight_scale": draw(128)}), "a.weight_scale must be float32 (128, 1), got float32 (128,)"),
    (lambda t: t.update({"a.weight_scale": draw(1, 256)}), "must be float32 (128, 1), got float32 (1, 256)"),
    (lambda t: t.update({"a.weight_scale": draw(1, 1)}), "must be float32 (128, 1), got float32 (1, 1)"),
    (lambda t: t.update({"a.weight_scale": draw(128, 1).half()}), "must be float32 (128, 1), got float16"),
    (lambda t: t.update({"a.weight": draw(128, 256)}), "a.weight_scale belongs to an int8 weight, this one is float32"),
    (lambda t: t.update({"b.weight_scale": draw(8, 1)}), "b.weight_scale belongs to an int8 weight"),
])
def test_a_damaged_weight_is_named(change, message):
    tensors = in_file()
    change(tensors)
    with pytest.raises(ValueError, match=f"^file: .*{re.escape(message)}.*damaged"):
        paired(tensors, "file")


def test_the_weight_that_is_quantized_is_left_alone():
    weight = draw(40, 500)
    before = weight.clone()
    quantize("weight", weight)
    assert torch.equal(weight, before)

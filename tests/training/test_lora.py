"""Trainable low-rank parts: what they compute is peft's, and what the weights compute that they are added to."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import checkpoints
from ldm2.checkpoints import lora_files
from ldm2.checkpoints.adapter import combined
from ldm2.text.gpt2 import load_gpt2
from ldm2.training.lora import TARGETS, add_lora
from tests.helpers import condition, draw, our_unet, relative

OF_UNET = ("attention", "feed_forward", "convolution", "time")


@pytest.fixture(scope="module")
def theirs():
    return checkpoints.unet()


@pytest.fixture
def unet(theirs):
    return copy.deepcopy(our_unet(theirs))


def predict(unet):
    conditioning = condition(unet.config, 2)
    return unet(draw(2, unet.config.in_channels, 16, 8), 500, conditioning)


def stirred(lora):
    """Values as after some training, none of them zero."""
    with torch.no_grad():
        for number, parameter in enumerate(lora.parameters()):
            parameter.add_(0.05 * draw(*parameter.shape, seed=number))
    return lora


@torch.no_grad()
def test_nothing_is_added_at_first_and_nothing_stays_behind(unet):
    before, names = predict(unet), sorted(unet.state_dict())
    lora = add_lora(unet, 4, targets=OF_UNET)
    assert relative(predict(unet), before) < 1e-5          # projections that are watched are not absorbed: rounding
    assert relative(predict(stirred(lora).module), before) > 1e-2
    lora.remove()
    assert torch.equal(predict(unet), before) and sorted(unet.state_dict()) == names


@torch.no_grad()
def test_switched_off_the_module_predicts_what_it_did_before(unet):
    before, lora = predict(unet), stirred(add_lora(unet, 4, targets=OF_UNET))
    changed = predict(unet)
    with lora.off() as same:
        assert same is unet and relative(predict(unet), before) < 1e-5
    assert torch.equal(predict(unet), changed)
    with pytest.raises(KeyError), lora.off():
        raise KeyError
    assert torch.equal(predict(unet), changed)


@pytest.mark.parametrize("target", OF_UNET)
@torch.no_grad()
def test_the_adapter_merged_predicts_what_the_trained_model_does(unet, target):
    lora = stirred(add_lora(unet, 3, 5.0, (target,)))
    trained = predict(unet)
    lora.remove()
    weights = unet.state_dict()
    unet.load_state_dict(weights | combined(weights, "unet", [(lora.adapter(), 1.0)]))
    assert relative(predict(unet), trained) < 1e-5


@torch.no_grad()
def test_a_joined_product_of_q_k_and_v_is_not_used_past_the_parts(unet):
    from ldm2.runtime.weight_layout import for_tensor_cores

    for_tensor_cores(unet)
    before, lora = predict(unet), stirred(add_lora(unet, 4))
    changed = predict(unet)
    lora.remove()
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert attention.qkv_fused and torch.equal(predict(unet), before)
    assert relative(changed, before) > 1e-2


def test_gradients_reach_the_parts_alone_and_are_those_of_peft(theirs, unet):
    peft = pytest.importorskip("peft")
    lora = stirred(add_lora(unet, 4, 6.0, OF_UNET))
    config = peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=list(lora.parts))
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(theirs))
    state = {f"{name}.lora_{letter}.weight": tensor for name, part in lora.parts.items()
             for letter, tensor in (("A", part.down), ("B", part.up))}
    peft.set_peft_model_state_dict(theirs, state)
    given = condition(unet.config, 2)
    x = draw(2, unet.config.in_channels, 16, 8)
    unet(x, 500, given).square().sum().backward()
    (first, second), (_, mask) = given.contexts, given.masks
    theirs(x, 500, encoder_hidden_states=first, encoder_hidden_states_1=second,
           encoder_attention_mask_1=mask).sample.square().sum().backward()
    expected = {name.replace(".default", ""): value.grad for name, value in theirs.named_parameters()}
    for name, part in lora.parts.items():
        assert relative(part.down.grad, expected[f"{name}.lora_A.weight"]) < 1e-3, name
        assert relative(part.up.grad, expected[f"{name}.lora_B.weight"]) < 1e-3, name
    assert all(parameter.grad is None for name, parameter in unet.named_parameters() if "original" in name)


@torch.no_grad()
def test_gpt2_and_the_projection_take_parts_too():
    model = checkpoints.gpt2()
    gpt2, states = load_gpt2(model.config.to_dict(), model.state_dict()), draw(2, 5, model.config.n_embd)
    lora = stirred(add_lora(gpt2, 2, targets=("attention", "feed_forward")))
    trained, _ = gpt2(states)
    lora.remove()
    weights = gpt2.state_dict()
    changed = combined(weights, "language_model", [(lora.adapter("language_model"), 1.0)])
    model.load_state_dict(weights | changed)
    assert relative(model(inputs_embeds=states).last_hidden_state, trained) < 1e-5
    assert list(add_lora(checkpoints.projection(), 2, targets=["projection"]).parts) == ["projection", "projection_1"]


def test_training_goes_on_from_its_file(unet, tmp_path):
    first = stirred(add_lora(unet, 4, 2.0))
    path = first.adapter(about="kept").save(tmp_path / "x.safetensors")
    first.remove()
    second = add_lora(unet, 4, 2.0)
    second.load(lora_files.read(path))
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    second.remove()
    with pytest.raises(ValueError, match=r"x\.safetensors has other layers or ranks"):
        add_lora(unet, 5).load(lora_files.read(path))


def test_a_bfloat16_model_is_trained_in_float32(unet):
    lora = add_lora(unet.to(torch.bfloat16), 4, targets=OF_UNET)
    given = condition(unet.config, 1).to(dtype=torch.bfloat16)
    unet(draw(1, unet.config.in_channels, 8, 8, dtype=torch.bfloat16), 500, given).float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in lora.parameters())


@pytest.mark.parametrize("given, words", [
    ({"rank": 0}, "rank.*0"), ({"rank": 2.5}, "rank.*2.5"), ({"alpha": -1.0}, "alpha.*-1"),
    ({"alpha": float("nan")}, "alpha.*nan"), ({"targets": ("heads",)}, "targets.*attention.*heads"),
    ({"targets": ()}, "targets.*none"), ({"targets": ("projection",)}, "Sequential has no layer.*projection"),
])
def test_impossible_requests_are_refused(given, words):
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=words):
        add_lora(layer, **given)


def test_each_kind_is_known_by_its_name():
    assert set(OF_UNET) < set(TARGETS)

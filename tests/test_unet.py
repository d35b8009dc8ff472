"""The UNet: equal to diffusers' classes on random weights, the shortcuts equal to the plain path, shapes and errors."""

import copy

import diffusers
import pytest
import torch

from benchmarks import checkpoints
from ldm2.conditioning import Conditioning
from ldm2.config import UNetConfig
from ldm2.unet import UNet
from tests.helpers import FILM, UNETS, assert_near, condition, draw, our_unet


def published(theirs, x_t, t, conditioning):
    """What diffusers' module says."""
    names = ["encoder_hidden_states", "encoder_hidden_states_1"]
    arguments = {"encoder_hidden_states": None} | dict(zip(names, conditioning.contexts, strict=False))
    if len(conditioning.masks) == 2:
        arguments["encoder_attention_mask_1"] = conditioning.masks[1]
    with torch.no_grad():
        return theirs(x_t, t, class_labels=conditioning.film, **arguments).sample


@pytest.fixture(scope="module", params=sorted(UNETS))
def pair(request):
    theirs = checkpoints.unet(**UNETS[request.param])
    return theirs, our_unet(theirs)


@pytest.fixture(scope="module")
def base():
    theirs = checkpoints.unet()
    return theirs, our_unet(theirs)


@pytest.fixture(scope="module")
def film():
    theirs = checkpoints.unet(**UNETS["48 kHz"])
    return theirs, our_unet(theirs)


# Equal to the published implementations


@torch.no_grad()
def test_each_kind_of_unet_equals_diffusers(pair):
    theirs, unet = pair
    x_t, t, conditioning = draw(2, 4, 16, 8), torch.tensor([7, 901]), condition(unet.config, 2)
    assert_near(unet(x_t, t, conditioning), published(theirs, x_t, t, conditioning))


@torch.no_grad()
@pytest.mark.parametrize("size", [(17, 8), (13, 7), (3, 2), (1, 1), (30, 5)])
def test_any_number_of_frames_and_bins_equals_diffusers(base, size):
    theirs, unet = base
    x_t, conditioning = draw(1, 4, *size), condition(unet.config, 1)
    assert_near(unet(x_t, 500, conditioning), published(theirs, x_t, 500, conditioning))


@torch.no_grad()
@pytest.mark.parametrize("reference, heads", [("diffusers", 8), ("authors", (1, 2, 3))])
def test_the_reference_decides_what_one_number_of_heads_means(base, reference, heads):
    unet = UNet(UNetConfig.from_dict(dict(base[0].config), reference=reference))
    unet.load_state_dict(base[0].state_dict())
    theirs = checkpoints.unet(attention_head_dim=heads)
    x_t, conditioning = draw(1, 4, 8, 8), condition(unet.config, 1)
    assert_near(unet(x_t, 3, conditioning), published(theirs, x_t, 3, conditioning))


@torch.no_grad()
def test_audioldm_1_equals_diffusers_plain_unet():
    theirs = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(32, 64, 96), norm_num_groups=8, layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(32, 64, 96), **FILM,
    )
    checkpoints.randomise(theirs, seed=0)
    unet = our_unet(theirs)
    x_t, t, conditioning = draw(2, 4, 13, 4), torch.tensor([7, 901]), condition(unet.config, 2)
    assert conditioning.contexts == ()
    assert_near(unet(x_t, t, conditioning), published(theirs, x_t, t, conditioning))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["base", "48 kHz"])
def test_half_precision_is_as_near_to_float64_as_diffusers_is(kind, dtype):
    theirs = checkpoints.unet(**UNETS[kind])
    unet = our_unet(theirs)
    x_t, conditioning = draw(2, 4, 12, 8), condition(unet.config, 2)
    exact = copy.deepcopy(unet).double()(x_t.double(), 500, conditioning.to(dtype=torch.float64))
    half, cast = conditioning.to(dtype=dtype), copy.deepcopy(theirs).to(dtype)
    got = unet.to(dtype)(x_t.to(dtype), 500, half)
    error, baseline = (got - exact).abs().mean(), (published(cast, x_t.to(dtype), 500, half) - exact).abs().mean()
    assert got.dtype == dtype
    assert error <= 2 * baseline


# What the layers see


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 1])
def test_each_context_changes_the_result(base, place):
    unet, x_t = base[1], draw(1, 4, 8, 8)
    conditioning, other = condition(base[1].config, 1), condition(base[1].config, 1, seed=5)
    contexts = tuple((other if i == place else conditioning).contexts[i] for i in range(2))
    assert not torch.allclose(
        unet(x_t, 9, conditioning), unet(x_t, 9, Conditioning(contexts, conditioning.masks)), atol=1e-3
    )


@torch.no_grad()
def test_masked_tokens_do_not_matter(base):
    unet, x_t, conditioning = base[1], draw(2, 4, 8, 8), condition(base[1].config, 2)
    changed = conditioning.contexts[1].clone()
    changed[0, 3:] = 50.0
    other = Conditioning((conditioning.contexts[0], changed), conditioning.masks)
    assert_near(unet(x_t, 9, other), unet(x_t, 9, conditioning))


@torch.no_grad()
def test_boolean_masks_and_float_masks_are_the_same(base):
    unet, x_t, conditioning = base[1], draw(2, 4, 8, 8), condition(base[1].config, 2)
    other = Conditioning(conditioning.contexts, (None, conditioning.masks[1].bool()))
    assert torch.equal(unet(x_t, 9, other), unet(x_t, 9, conditioning))


@torch.no_grad()
def test_rows_do_not_see_each_other(pair):
    unet = pair[1]
    x_t, t, conditioning = draw(2, 4, 9, 8), torch.tensor([7, 901]), condition(unet.config, 2)
    both = unet(x_t, t, conditioning)
    for row in range(2):
        alone = unet(x_t[row : row + 1], t[row], conditioning.select([row]))
        assert_near(both[row : row + 1], alone)


# Work done once


@torch.no_grad()
@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("t", [500, torch.tensor([7, 901])])
def test_branches_share_their_latents_and_equal_separate_calls(pair, branches, t):
    unet = pair[1]
    x_t, conditioning = draw(2, 4, 9, 8), condition(unet.config, 2 * branches)
    together = unet(x_t, t, conditioning)
    apart = [unet(x_t, t, conditioning.select(slice(2 * i, 2 * i + 2))) for i in range(branches)]
    assert_near(together, torch.cat(apart))


@torch.no_grad()
def test_what_precedes_the_first_context_runs_once_for_both_branches(base):
    unet = copy.deepcopy(base[1])
    rows = {}

    def record(name, output):
        rows[name] = len(output)

    for name, module in unet.named_modules():
        module.register_forward_hook(lambda _, inputs, output, name=name: record(name, output))
    unet(draw(1, 4, 8, 8), 500, unet.prepare(condition(unet.config, 2)))
    shared = ["conv_in", "down_blocks.0.resnets.0", "down_blocks.1.attentions.0",
              "down_blocks.1.attentions.1.transformer_blocks.0.attn1"]
    assert [rows[name] for name in shared] == [1, 1, 1, 1]
    assert rows["down_blocks.1.attentions.1.transformer_blocks.0.attn2"] == 2
    assert rows["conv_out"] == 2


@torch.no_grad()
def test_a_prepared_conditioning_gives_the_same(pair):
    unet = pair[1]
    x_t, conditioning = draw(2, 4, 9, 8), condition(unet.config, 4)
    assert torch.equal(unet(x_t, 500, unet.prepare(conditioning)), unet(x_t, 500, conditioning))


@torch.no_grad()
def test_a_prepared_conditioning_leaves_keys_and_values_nothing_to_do(base):
    unet = copy.deepcopy(base[1])
    prepared = unet.prepare(condition(unet.config, 2))
    calls = []
    for name, module in unet.named_modules():
        if ".attn2.to_k" in name and module.in_features in unet.config.context_widths:
            module.register_forward_hook(lambda *_: calls.append(1))
    for t in (900, 500):
        unet(draw(2, 4, 8, 8), t, prepared)
    assert not calls


@torch.no_grad()
def test_time_embeddings_of_a_whole_schedule_give_the_same(pair):
    unet, schedule = pair[1], torch.tensor([901, 601, 301, 1])
    x_t, prepared = draw(2, 4, 9, 8), unet.prepare(condition(unet.config, 2))
    table = unet.embed_time(schedule)
    for i, t in enumerate(schedule):
        assert_near(unet(x_t, t, prepared, time=table[i : i + 1]), unet(x_t, t, prepared))


@torch.no_grad()
def test_time_embeddings_are_not_computed_again(base):
    unet = copy.deepcopy(base[1])
    time = unet.embed_time(500)
    calls = []
    unet.time_embedding.register_forward_hook(lambda *_: calls.append(1))
    unet(draw(1, 4, 8, 8), 500, condition(unet.config, 1), time=time)
    assert not calls


@torch.no_grad()
@pytest.mark.parametrize("t", [500, 500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500.0, 500.0])])
def test_a_time_step_may_be_a_number_or_a_tensor(base, t):
    unet, x_t, conditioning = base[1], draw(2, 4, 8, 8), condition(base[1].config, 2)
    assert_near(unet(x_t, t, conditioning), unet(x_t, 500, conditioning))


# As a module


def test_gradients_reach_every_parameter_and_input(film, base):
    for _, unet in (film, base):
        unet = copy.deepcopy(unet).train()
        x_t = draw(2, 4, 9, 8).requires_grad_()
        conditioning = condition(unet.config, 2)
        inputs = [x_t, *conditioning.contexts, *([] if conditioning.film is None else [conditioning.film])]
        for tensor in inputs:
            tensor.requires_grad_()
        unet(x_t, torch.tensor([7, 901]), conditioning).square().mean().backward()
        missing = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
        assert missing == []
        assert all(tensor.grad.any() for tensor in inputs)


def test_no_tensor_but_the_files_is_part_of_the_module(base):
    assert list(base[1].buffers()) == []


def test_a_missing_key_does_not_load(base):
    state = base[1].state_dict()
    state.pop("mid_block.resnets.1.conv2.bias")
    with pytest.raises(RuntimeError, match=r"mid_block\.resnets\.1\.conv2\.bias"):
        UNet(base[1].config).load_state_dict(state)


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_cuda_is_near_the_cpu(pair, dtype, tolerance):
    unet = pair[1]
    x_t, t, conditioning = draw(2, 4, 9, 8), torch.tensor([7, 901]), condition(unet.config, 4)
    expected = unet(x_t, t, conditioning)
    got = copy.deepcopy(unet).to("cuda", dtype)(x_t.to("cuda", dtype), t, conditioning.to("cuda", dtype))
    assert got.dtype == dtype
    assert_near(got.cpu().float(), expected, tolerance)


# Bad input


@pytest.mark.parametrize("x_t", [draw(1, 3, 8, 8), draw(4, 8, 8)])
def test_latents_of_another_shape_are_refused(base, x_t):
    with pytest.raises(ValueError, match=r"x_t must be \(B, 4, T, F\), got"):
        base[1](x_t, 1, condition(base[1].config, 1))


def test_a_number_of_time_steps_that_does_not_fit_is_refused(base):
    with pytest.raises(ValueError, match="one for each of 2 rows, got 3"):
        base[1](draw(2, 4, 8, 8), torch.tensor([1, 2, 3]), condition(base[1].config, 2))


def test_conditioning_rows_must_be_a_multiple_of_the_latents(base):
    with pytest.raises(ValueError, match="a multiple of 2 rows, got 3"):
        base[1](draw(2, 4, 8, 8), 1, condition(base[1].config, 3))


@pytest.mark.parametrize("widths", [(24,), (24, 32, 32), (32, 24), ()])
def test_contexts_of_another_number_or_width_are_refused(base, widths):
    contexts = tuple(draw(1, 5, width) for width in widths)
    conditioning = Conditioning(contexts, (None,) * len(widths), None if widths else draw(1, 20))
    with pytest.raises(ValueError, match=r"contexts must be \[24, 32\] wide"):
        base[1].prepare(conditioning)


def test_film_where_the_unet_has_none_is_refused(base):
    conditioning = Conditioning((draw(1, 8, 24), draw(1, 5, 32)), (None, None), draw(1, 20))
    with pytest.raises(ValueError, match="takes no FiLM condition, got one 20 wide"):
        base[1].prepare(conditioning)


@pytest.mark.parametrize("width, got", [(None, "none"), (21, "21")])
def test_a_film_condition_that_does_not_fit_is_refused(film, width, got):
    conditioning = Conditioning((), (), draw(1, width)) if width else Conditioning((draw(1, 2, 3),), (None,))
    with pytest.raises(ValueError, match=f"FiLM condition must be 20 wide, got {got}|contexts must be"):
        film[1].prepare(conditioning)

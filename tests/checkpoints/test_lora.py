"""LoRA files: ours in diffusers with peft, theirs in ours, and what is refused. Predictions are those of the UNet."""

from __future__ import annotations

import copy
import json
import os

import pytest
import safetensors.torch
import torch

from benchmarks import checkpoints
from ldm2.checkpoints import lora_files
from ldm2.checkpoints.adapter import CONFIG, Adapter, LowRank, combined
from tests.helpers import condition, draw, our_unet, relative

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
Q, OUT, CONV = f"{ATTENTION}.to_q", f"{ATTENTION}.to_out.0", "mid_block.resnets.0.conv1"
POINTWISE = "up_blocks.0.attentions.1.proj_in"
SIZES = {Q: (64, 64), OUT: (64, 64), CONV: (96, 96, 3, 3), POINTWISE: (96, 96, 1, 1)}


@pytest.fixture(scope="module")
def theirs():
    return checkpoints.unet()


@pytest.fixture(scope="module")
def unet(theirs):
    return our_unet(theirs).requires_grad_(False)


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def pair(name: str, rank: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The two matrices of a layer, drawn."""
    outs, *ins = SIZES[name]
    return 0.2 * draw(rank, *ins, seed=seed), 0.2 * draw(outs, rank, *[1] * (len(ins) - 1), seed=seed + 1)


def adapter(ranks: dict[str, int], alpha: float = 4.0) -> Adapter:
    pairs = {name: pair(name, rank, seed) for seed, (name, rank) in enumerate(ranks.items())}
    return Adapter({f"unet.{name}": LowRank(*both, alpha / ranks[name]) for name, both in pairs.items()})


@torch.no_grad()
def ours(unet, *adapters, scale=1.0):
    """What our UNet predicts with LoRAs."""
    changed = copy.deepcopy(unet)
    weights = unet.state_dict()
    changed.load_state_dict(weights | combined(weights, "unet", [(each, scale) for each in adapters]))
    return changed(draw(2, 4, 16, 8), 500, condition(unet.config, 2))


@torch.no_grad()
def published(theirs, unet):
    """What diffusers' UNet predicts from the same inputs."""
    given = condition(unet.config, 2)
    first, second = given.contexts
    return theirs(draw(2, 4, 16, 8), 500, encoder_hidden_states=first, encoder_hidden_states_1=second,
                  encoder_attention_mask_1=given.masks[1]).sample


def stirred(made):
    """A module with a LoRA of peft in which nothing is zero."""
    for number, (_, parameter) in enumerate(each for each in made.named_parameters() if "lora_" in each[0]):
        parameter.data = 0.2 * draw(*parameter.shape, seed=number)
    return made


def loader(theirs):
    """diffusers' UNet of AudioLDM 2 with diffusers' own reader of LoRA files."""
    from diffusers.loaders import PeftAdapterMixin

    made = copy.deepcopy(theirs)
    made.__class__ = type("Loader", (type(theirs), PeftAdapterMixin), {})
    return made


@pytest.mark.parametrize("ranks", [dict.fromkeys(SIZES, 4), {Q: 2, OUT: 4, CONV: 4, POINTWISE: 8}])
def test_diffusers_reads_our_file_as_we_do(theirs, unet, peft, tmp_path, ranks):
    mine = adapter(ranks, alpha=6.0)
    path = mine.save(tmp_path / "x.safetensors")
    made = loader(theirs)
    made.load_lora_adapter(str(tmp_path), weight_name=path.name, prefix="unet")
    expected = published(made, unet)
    assert relative(ours(unet, mine), expected) < 1e-5
    assert relative(ours(unet, lora_files.read(path)), expected) < 1e-5
    assert relative(ours(unet), expected) > 1e-2


PATTERNS = {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2, "conv1": 6},
            "alpha_pattern": {"to_out.0": 3, r".*\.conv\d": 9}}


@pytest.mark.parametrize("how, config", [
    ("peft", {"r": 3, "lora_alpha": 2.5}), ("peft", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    ("peft", PATTERNS), ("diffusers", PATTERNS),
])
def test_we_read_what_peft_and_diffusers_write(theirs, unet, peft, tmp_path, how, config):
    if how == "peft":
        made = stirred(peft.PeftModel(copy.deepcopy(theirs), peft.LoraConfig(target_modules=list(SIZES), **config)))
        made.save_pretrained(tmp_path)
    else:
        made = loader(theirs)
        made.add_adapter(peft.LoraConfig(target_modules=list(SIZES), **config))
        stirred(made).save_lora_adapter(tmp_path)
    read = lora_files.read(tmp_path)
    assert len(read.layers) == len(SIZES)
    assert relative(ours(unet, read), published(made, unet)) < 1e-5


def tensors_as(layout: str) -> dict[str, torch.Tensor]:
    """The same LoRA, with alpha 2 of rank 4 where the layout knows it, by the names of other programs."""
    tensors = {}
    for seed, name in enumerate(SIZES):
        down, up = pair(name, 4, seed)
        if layout == "kohya":
            flat = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up,
                        f"{flat}.alpha": torch.tensor(2.0)}
            continue
        stem, _, leaf = name.rpartition(".to_")
        old = f"unet.{stem}.processor.to_{leaf.removesuffix('.0')}_lora" if stem else f"unet.{name}.lora"
        first, second = {
            "old diffusers": (f"unet.{name}.lora.down", f"unet.{name}.lora.up"),
            "attention processors": (f"{old}.down", f"{old}.up"),
            "no part": (f"{name}.lora_A", f"{name}.lora_B"),
            "named adapter": (f"base_model.model.{name}.lora_A.style", f"base_model.model.{name}.lora_B.style"),
            "alpha beside": (f"unet.{name}.lora_A", f"unet.{name}.lora_B"),
        }[layout]
        tensors |= {f"{first}.weight": down, f"{second}.weight": up}
        if layout == "alpha beside":
            tensors[f"unet.{name}.alpha"] = torch.tensor([2.0])
    return tensors


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("layout", ["old diffusers", "attention processors", "kohya", "no part", "named adapter",
                                    "alpha beside"])
def test_each_layout_is_read(unet, tmp_path, layout, suffix):
    path, tensors = tmp_path / f"x{suffix}", tensors_as(layout)
    safetensors.torch.save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    read, alpha = lora_files.read(path), 2.0 if layout in ("kohya", "alpha beside") else 4.0
    changed = combined(unet.state_dict(), "unet", [(read, 0.5)])
    assert set(changed) == {f"{name}.weight" for name in SIZES}
    for seed, name in enumerate(SIZES):
        down, up = (each.double().flatten(1) for each in pair(name, 4, seed))
        weight = unet.get_parameter(f"{name}.weight").double()
        expected = weight + 0.5 * alpha / 4 * (up @ down).reshape(weight.shape)
        assert relative(changed[f"{name}.weight"], expected) < 1e-6, name


def test_a_change_of_gpt2_lies_as_its_matrices_do(peft):
    gpt2 = checkpoints.gpt2()
    states, names = draw(2, 5, 24), ["h.0.attn.c_attn", "h.1.mlp.c_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, fan_in_fan_out=True)
    made = stirred(peft.inject_adapter_in_model(config, copy.deepcopy(gpt2)))
    state = peft.get_peft_model_state_dict(made)
    layers = {f"language_model.{name}": LowRank(state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"], 2.0)
              for name in names}
    weights = gpt2.state_dict()
    gpt2.load_state_dict(weights | combined(weights, "language_model", [(Adapter(layers), 1.0)]))
    with torch.no_grad():
        assert relative(gpt2(inputs_embeds=states)[0], made(inputs_embeds=states)[0]) < 1e-5


def test_two_at_once_are_their_sum_and_a_scale_is_a_factor(unet):
    first, second = adapter({Q: 4, CONV: 2}), adapter({Q: 3})
    weights = unet.state_dict()
    both = combined(weights, "unet", [(first, 0.5), (second, -2.0)])
    for name in (Q, CONV):
        weight = weights[f"{name}.weight"].double()
        expected = weight + sum(
            scale * layer.scale * (layer.up.double().flatten(1) @ layer.down.double().flatten(1)).reshape(weight.shape)
            for each, scale in ((first, 0.5), (second, -2.0)) if (layer := each.layers.get(f"unet.{name}")))
        assert relative(both[f"{name}.weight"], expected) < 1e-6
    assert combined(weights, "unet", [(first, 0.0)]) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_is_rounded_once(unet, dtype):
    lora = adapter({Q: 4})
    weight = unet.get_parameter(f"{Q}.weight").to(dtype)
    [changed] = combined({f"{Q}.weight": weight}, "unet", [(lora, 1.0)]).values()
    layer = lora.layers[f"unet.{Q}"]
    exact = weight.double() + layer.scale * layer.up.double() @ layer.down.double()
    assert changed.dtype == dtype
    assert (changed.double() - exact).abs().max() <= torch.finfo(dtype).eps / 2 * exact.abs().max() * 1.01


def test_a_file_says_what_it_was_trained_on(tmp_path):
    mine = Adapter(adapter({Q: 4}).layers, about={"model": "tiny", "steps": 100})
    read = lora_files.read(mine.save(tmp_path))
    assert read.about == {"model": "tiny", "steps": "100"}
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()
    with pytest.raises(FileExistsError, match="pytorch_lora_weights"):
        mine.save(tmp_path)
    with pytest.raises(ValueError, match=r"\.safetensors.*x\.bin"):
        mine.save(tmp_path / "x.bin")


REFUSED = {
    "lokr": ({f"lora_unet_{Q}.lokr_w1": draw(2, 2)}, "LoKr"),
    "loha": ({f"lora_unet_{Q}.hada_w1_a": draw(2, 2)}, "LoHa"),
    "dora": ({f"unet.{Q}.lora_magnitude_vector": draw(2)}, "DoRA"),
    "dora of kohya": ({f"lora_unet_{Q}.dora_scale": draw(2)}, "DoRA"),
    "ia3": ({f"base_model.model.{Q}.ia3_l": draw(2)}, "IA3"),
    "oft": ({f"lora_unet_{Q}.oft_blocks": draw(2, 2, 2)}, "OFT"),
    "tucker": ({f"lora_unet_{Q}.lora_mid.weight": draw(2, 2, 3, 3)}, "Tucker"),
    "full": ({f"lora_unet_{Q}.diff": draw(2, 2)}, "whole differences"),
    "bias": ({f"unet.{Q}.lora_B.bias": draw(2)}, "biases"),
    "embedding": ({"language_model.wte.lora_embedding_A": draw(2, 2)}, "embedding"),
    "module": ({f"base_model.model.{CONV}.weight": draw(2, 2)}, "is not of a LoRA"),
    "checkpoint": ({"conv_in.weight": draw(2, 2), "conv_in.bias": draw(2)}, "conv_in"),
    "text encoder": ({"lora_te_text_model_layers_0.lora_down.weight": draw(2, 2)}, "another model.*lora_te_text"),
    "transformer": ({"transformer.single_blocks.0.lora_A.weight": draw(2, 2)}, "another model.*single_blocks"),
    "one side": ({f"unet.{Q}.lora_A.weight": draw(2, 2)}, f"{Q} has no up matrix"),
    "alpha alone": ({f"unet.{Q}.alpha": torch.tensor(1.0)}, f"{Q} has no down matrix"),
    "ranks": ({f"unet.{Q}.lora_A.weight": draw(2, 64), f"unet.{Q}.lora_B.weight": draw(64, 3)}, "do not fit each"),
    "integers": ({f"unet.{Q}.lora_A.weight": torch.ones(2, 2, dtype=torch.int32)}, "a down matrix of int32"),
    "infinite": ({f"unet.{Q}.lora_A.weight": draw(2, 64) / 0, f"unet.{Q}.lora_B.weight": draw(64, 2)}, "infinite"),
    "alpha": ({f"unet.{Q}.lora_A.weight": draw(2, 64), f"unet.{Q}.lora_B.weight": draw(64, 2),
               f"unet.{Q}.alpha": torch.tensor([1.0, 2.0])}, "alpha of.*one finite number"),
    "twice": ({f"unet.{Q}.lora_A.weight": draw(2, 64), f"{Q}.lora.down.weight": draw(2, 64)}, "a second down"),
    "empty": ({}, "empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_refused_by_its_name(tmp_path, case):
    tensors, words = REFUSED[case]
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match=words) as raised:
        lora_files.read(path)
    assert "x.safetensors" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("config, words", [
    ({"peft_type": "LOHA"}, "LOHA"), ({"use_dora": True}, "DoRA"), ({"bias": "all"}, "biases.*all"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"), ({"modules_to_save": ["conv_in"]}, "whole modules"),
    ({"alora_invocation_tokens": [1]}, "activated LoRA"), ({"lora_alpha": "8"}, "lora_alpha.*8"),
    ({"alpha_pattern": {"to_q": "x"}}, "alpha_pattern"), ({"alpha_pattern": {"(": 2}}, r"alpha_pattern.*\("),
    ({"alpha_pattern": {"(x)" * 200: 2}}, "alpha_pattern.*600 characters"),
])
def test_what_peft_makes_beside_plain_lora_is_refused_by_its_name(tmp_path, config, words):
    tensors = {f"base_model.model.{Q}.lora_{letter}.weight": side for letter, side in zip("AB", pair(Q))}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4} | config))
    with pytest.raises(ValueError, match=words) as raised:
        lora_files.read(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_lora_of_another_model_names_what_does_not_fit(unet):
    layers = adapter({Q: 4}).layers
    missing = Adapter({"unet.input_blocks_1_1_proj_in": layers[f"unet.{Q}"]}, "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors.*another model.*lacks \(unet\.input_blocks_1_1_proj_in\)"):
        combined(unet.state_dict(), "unet", [(missing, 1.0)])
    wide = Adapter({f"unet.{Q}": LowRank(draw(4, 128), draw(64, 4))}, "x.safetensors")
    with pytest.raises(ValueError, match=rf"1 misshapen \(unet\.{Q} \(64, 128\) instead of \(64, 64\)\)"):
        combined(unet.state_dict(), "unet", [(wide, 1.0)])


@pytest.mark.parametrize("damage", ["cut", "nothing", "text", "header"])
def test_damaged_files_are_named(tmp_path, damage):
    path = adapter({Q: 4}).save(tmp_path / "x.safetensors")
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-9], "nothing": b"", "text": b"<html>", "header": b"\xff" * 20}[damage])
    with pytest.raises(ValueError, match=r"x\.safetensors") as raised:
        lora_files.read(path)
    assert "\n" not in str(raised.value)


def test_a_pickle_that_asks_for_more_than_tensors_is_not_opened(tmp_path):
    class Sly:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"x.lora_A.weight": Sly()}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x\.bin.*nothing of it was run"):
        lora_files.read(tmp_path / "x.bin")


def test_a_broken_header_is_named(tmp_path):
    tensors = {f"unet.{Q}.lora_{letter}.weight": side for letter, side in zip("AB", pair(Q))}
    for number, text in enumerate(["[1]", "{", "[" * 100_000]):
        path = tmp_path / f"{number}.safetensors"
        safetensors.torch.save_file(tensors, path, metadata={CONFIG: text})
        with pytest.raises(ValueError, match=f"{CONFIG}.*JSON object"):
            lora_files.read(path)


def test_places_without_a_lora_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        lora_files.read(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no LoRA.*adapter_model\.safetensors"):
        lora_files.read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors is not a file"):
        lora_files.File.at(tmp_path / "x.safetensors")


def test_a_file_of_weights_is_told_from_one_of_an_adapter(tmp_path):
    for name, keys, expected in (("weights", ["conv_in.weight", "conv_in.bias", "norm.a1.weight"], False),
                                 ("lora", [f"unet.{Q}.lora_A.weight"], True), ("lokr", ["x.lokr_w1"], True)):
        safetensors.torch.save_file({key: draw(2, 2) for key in keys}, tmp_path / f"{name}.safetensors")
        assert lora_files.is_lora(tmp_path / f"{name}.safetensors") is expected
    assert not lora_files.is_lora("tiny") and not lora_files.is_lora(tmp_path / "none.bin")


def test_a_digest_changes_with_the_tensors_and_with_the_configuration(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(b"a")
    digests = {lora_files.File.at(tmp_path).digest()}
    for text in ("{}", "{ }"):
        (tmp_path / "adapter_config.json").write_text(text)
        digests |= {lora_files.File.at(tmp_path).digest(), lora_files.File.at(path).digest()}
    assert len(digests) == 3


def test_a_scale_that_leaves_the_range_is_refused(unet):
    weight = unet.get_parameter(f"{Q}.weight").to(torch.float16)
    with pytest.raises(ValueError, match=f"{Q}.weight leaves the range of float16"):
        combined({f"{Q}.weight": weight}, "unet", [(adapter({Q: 4}), 1e6)])


def test_integers_are_no_weights_to_add_to(unet):
    weight = torch.ones(64, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"added to int8 weights, such as {Q}.weight"):
        combined({f"{Q}.weight": weight}, "unet", [(adapter({Q: 4}), 1.0)])

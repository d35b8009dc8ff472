"""Models with int8 weights: loaded from float and from int8 files, with and without kernels, moved, copied, refused."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ldm2
from ldm2 import ops, weights
from ldm2.attention import Transformer2D
from ldm2.batch.job import Job
from ldm2.checkpoints import adapter, hub, random_models
from ldm2.checkpoints.convert import convert
from ldm2.checkpoints.describe import describe
from ldm2.checkpoints.int8 import LEAST, quantize, quantized, selects
from ldm2.cli.commands import main
from ldm2.layers import weight_of
from ldm2.runtime.device import choose_dtype
from ldm2.runtime.int8_layers import round_inputs
from ldm2.text.gpt2 import Conv1D
from tests.helpers import draw

TINY = hub.BUNDLED / "tiny"


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny, converted."""
    return convert(TINY, tmp_path_factory.mktemp("int8") / "tiny", "int8").folder


@pytest.fixture(scope="module")
def pipe():
    return ldm2.load("tiny", dtype="int8")


def parts(pipe):
    return {"unet": pipe.unet, "vae": pipe.vae, "vocoder": pipe.vocoder, "text": pipe.text}


def test_all_large_weights_of_all_parts_are_int8_and_nothing_else(pipe):
    plain = ldm2.load("tiny", dtype="float32")
    for name, part in parts(pipe).items():
        for key, weight in parts(plain)[name].named_parameters():
            got = part.get_parameter(key)
            assert got.shape == weight.shape
            assert got.dtype == (torch.int8 if selects(key, weight) else torch.float32), f"{name}.{key}"
    assert pipe.dtype == torch.float32 and "int8" in repr(pipe)


def test_a_converted_folder_is_smaller_loads_by_itself_and_is_the_same_model(pipe, folder):
    from_file = ldm2.load(folder)
    assert from_file.origin["dtype"] == "int8"
    for name, part in parts(pipe).items():
        ours, theirs = part.state_dict(), parts(from_file)[name].state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for part in ("unet", "vae", "vocoder", "text_encoder", "text_encoder_2", "language_model"):
        source = next((TINY / part).glob("*.safetensors"))
        tensors = load_file(folder / part / source.name)
        assert {str(tensor.dtype)[6:] for tensor in tensors.values() if tensor.ndim} >= {"int8", "float32"}, part
        assert json.loads((folder / part / "config.json").read_text())["dtype"] == "int8"
    held = describe(folder).parts
    assert sum(part.size for part in held) < 0.55 * 4 * sum(part.parameters for part in held)
    assert [part.parameters for part in held] == [part.parameters for part in describe(TINY).parts]


def test_latents_are_near_those_of_float32_and_alike_with_and_without_kernels_and_low_memory(pipe, folder):
    ask = {"prompt": "a rising sweep", "steps": 2, "seed": 1, "seconds": 1.0}
    exact = ldm2.load("tiny", dtype="float32").generate(**ask)
    made = pipe.generate(**ask)
    assert 1e-4 < relative(made.latents, exact.latents) < 2e-2
    assert made.settings["dtype"] == "int8"
    with ops.backend("reference"):
        assert relative(pipe.generate(**ask).latents, made.latents) < 1e-2
    sleeping = ldm2.load(folder, low_memory=True)
    assert torch.equal(sleeping.generate(**ask).latents, made.latents)
    assert all(parameter.is_meta for parameter in sleeping.unet.parameters())


def test_w8a8_is_int8_whose_transformers_round_their_inputs(pipe, folder):
    rounding = ldm2.load(folder, dtype="w8a8")
    assert rounding.origin["dtype"] == "w8a8" and "w8a8" in repr(rounding) and rounding.dtype == torch.float32
    ours, theirs = rounding.unet.state_dict(), pipe.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for name, part in parts(rounding).items():
        kinds = {each: type(weight_of(layer)) for each, layer in part.named_modules() if hasattr(layer, "weight_scale")}
        inside = {each for each in kinds if name == "unet" and ".attentions." in each}
        contexts = {each for each in inside if each.endswith(("attn2.to_k", "attn2.to_v"))}
        assert {each for each, kind in kinds.items() if kind is ops.W8A8} == inside - contexts
        assert {kinds[each] for each in kinds.keys() - inside | contexts} == {ops.Int8}
        assert name != "unet" or len(inside - contexts) > 10


@pytest.mark.parametrize("context", [None, 24])
def test_keys_and_values_of_a_context_are_made_of_inputs_as_they_are(context):
    transformer = Transformer2D(32, 2, 2, context, groups=8)
    round_inputs(nn.Sequential(transformer, nn.Linear(3, 3)))
    marked = {name for name, layer in transformer.named_modules() if getattr(layer, "rounds_inputs", False)}
    blocks = [f"transformer_blocks.{i}." for i in range(2)]
    layers = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0",
              "ff.net.0.proj", "ff.net.2", *([] if context else ["attn2.to_k", "attn2.to_v"])]
    assert marked == {"proj_in", "proj_out", *(block + layer for block in blocks for layer in layers)}


def test_w8a8_is_near_float32_and_alike_from_all_sources_with_and_without_kernels(pipe, folder):
    ask = {"prompt": "a rising sweep", "steps": 2, "seed": 1, "seconds": 1.0}
    exact = ldm2.load("tiny", dtype="float32").generate(**ask)
    rounding = ldm2.load("tiny", dtype="w8a8")
    made = rounding.generate(**ask)
    assert 1e-3 < relative(made.latents, exact.latents) < 3e-2
    assert made.settings["dtype"] == "w8a8" and not torch.equal(made.latents, pipe.generate(**ask).latents)
    with ops.backend("reference"):
        assert relative(rounding.generate(**ask).latents, made.latents) < 1e-2
    for other in (ldm2.load(folder, dtype="w8a8"), ldm2.load(folder, dtype="w8a8", low_memory=True),
                  copy.deepcopy(rounding), pickle.loads(pickle.dumps(rounding))):
        assert torch.equal(other.generate(**ask).latents, made.latents) and other.origin["dtype"] == "w8a8"


def test_a_lora_in_w8a8_is_of_float32_weights_and_leaves_no_trace(tmp_path):
    rounding = ldm2.load("tiny", dtype="w8a8")
    path = adapter.Adapter(changes(rounding.unet, "unet")).save(tmp_path / "x.safetensors")
    ask = {"prompt": "a siren", "seed": 0, "steps": 2, "seconds": 0.3}
    heard = rounding.generate(**ask).latents
    rounding.load_lora(path, 0.5)
    changed = rounding.generate(**ask).latents
    kinds = {type(weight_of(layer)) for layer in rounding.unet.modules() if hasattr(layer, "weight")}
    assert ops.W8A8 not in kinds and rounding.origin["dtype"] == "w8a8" and "w8a8" in repr(rounding)
    again = pickle.loads(pickle.dumps(rounding))
    assert "w8a8" in repr(again) and torch.equal(again.generate(**ask).latents, changed)
    rounding.unload_lora()
    assert torch.equal(rounding.generate(**ask).latents, heard) and not torch.allclose(changed, heard, atol=1e-3)


def test_w8a8_is_a_dtype_wherever_one_is_named(tmp_path, capsys):
    random = random_models.pipeline("tiny", device=torch.device("cpu"), dtype="w8a8")
    assert random.origin["dtype"] == "w8a8" and any(getattr(part, "rounds_inputs", 0) for part in random.unet.modules())
    prints = [Job(tmp_path / "rows.csv", str(tmp_path), "tiny", {"dtype": dtype}).fingerprint()["dtype"]
              for dtype in ("int8", "w8a8")]
    assert prints == ["int8", "w8a8"]
    arguments = ["generate", "a siren", "--model", "tiny", "--dtype", "w8a8", "--seconds", "0.2", "--steps", "1"]
    assert main([*arguments, "-o", str(tmp_path / "x.wav")]) == 0
    assert main(["info", str(tmp_path / "x.wav")]) == 0
    assert "w8a8" in capsys.readouterr().out
    with pytest.raises(ValueError, match="w8a8 is how int8 weights are computed with: convert to int8"):
        convert(TINY, tmp_path / "converted", "w8a8")
    assert not (tmp_path / "converted").exists()


def test_copies_and_pickles_stay_int8(pipe):
    x, state = draw(1, *pipe.latent_shape(1.0)), pipe.conditionings(ldm2.Settings("a siren").resolved())[0]
    expected = pipe.unet(x, 5.0, state)
    other = copy.deepcopy(pipe)
    assert torch.equal(other.unet(x, 5.0, state), expected)
    again = pickle.loads(pickle.dumps(pipe))
    assert again.origin["dtype"] == "int8" and torch.equal(again.unet(x, 5.0, state), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_in_int8_loads_and_converts_to_other_dtypes(folder, tmp_path, dtype):
    wide = ldm2.load(folder, dtype=dtype)
    weight = wide.unet.mid_block.resnets[0].conv1.weight
    table = load_file(next((folder / "unet").glob("*.safetensors")))
    name = "mid_block.resnets.0.conv1.weight"
    expected = (table[name].float() * table[f"{name}_scale"]).to(weight.dtype)
    assert torch.equal(weight, expected) and wide.origin["dtype"] == dtype
    back = convert(folder, tmp_path / "back", dtype).folder
    tensors = load_file(next((back / "unet").glob("*.safetensors")))
    assert torch.equal(tensors[name], expected) and not any("scale" in key for key in tensors)
    assert "dtype" not in json.loads((back / "unet/config.json").read_text())
    same = convert(folder, tmp_path / "same").folder
    assert load_file(next((same / "unet").glob("*.safetensors")))[name].dtype == torch.int8
    assert ldm2.load(same).origin["dtype"] == "int8"


def test_ranking_takes_the_audio_branch_of_an_int8_folder(folder):
    made = ldm2.load(folder).generate("a siren", steps=1, seconds=0.5, num_waveforms=2, seed=0)
    assert len(made.scores) == 2 and all(-1 <= score <= 1 for score in made.scores)


@pytest.mark.parametrize("change, message", [
    (lambda t, name: t.pop(f"{name}_scale"), "is int8 and has no"),
    (lambda t, name: t[f"{name}_scale"].fill_(0), "must be positive and finite"),
    (lambda t, name: t.update({name: t[name][1:].clone()}), "must be float32"),
    (lambda t, name: t.update({each: t[each][1:].clone() for each in (name, f"{name}_scale")}), "misshapen"),
    (lambda t, name: t.update({f"x.{each}": t[each].clone() for each in (name, f"{name}_scale")}), "unexpected"),
])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_damaged_int8_file_is_refused_in_one_line_that_names_it(folder, tmp_path, change, message, low_memory):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for item in folder.iterdir():
        if item.name != "unet":
            (damaged / item.name).symlink_to(item)
    (damaged / "unet").mkdir()
    (damaged / "unet/config.json").write_bytes((folder / "unet/config.json").read_bytes())
    file = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors, "mid_block.resnets.0.conv1.weight")
    save_file(tensors, damaged / "unet" / file.name)
    with pytest.raises(ValueError, match=rf"unet.*{message}") as caught:
        ldm2.load(damaged, dtype="float32" if low_memory else "auto", low_memory=low_memory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("name", ["int8", "w8a8"])
def test_int8_is_refused_elsewhere_than_on_a_cpu(kind, name):
    with pytest.raises(ValueError, match=f"{name} is for CPUs, choose float16 on {kind}"):
        choose_dtype(name, torch.device(kind))


def test_what_cannot_be_done_with_int8_weights_is_refused_by_name(pipe):
    with pytest.raises(ValueError, match="int8 weights are made as they are read"):
        pipe.move(torch.device("cpu"), torch.bfloat16, pipe.text)
    with pytest.raises(ValueError, match="int8 weights are made as they are read"):
        ldm2.load("tiny").move(torch.device("cpu"), torch.int8, pipe.text)
    weights = pipe.unet.state_dict()
    with pytest.raises(ValueError, match="my LoRA cannot be added to int8 weights"):
        adapter.combined(weights, "unet", [(adapter.Adapter(changes(pipe.unet, "unet"), "my LoRA"), 1.0)])


def changes(module, part) -> dict[str, adapter.LowRank]:
    """A LoRA of all layers of the UNet, or of GPT-2's blocks, that have int8 weights."""
    found = {}
    for number, (name, weight) in enumerate(module.named_parameters()):
        if weight.dtype == torch.int8 and (part == "unet" or name.startswith("h.")):
            outs, *ins = weight.T.shape if part == "language_model" else weight.shape
            down, up = draw(2, *ins, seed=number), draw(outs, 2, *[1] * (len(ins) - 1), seed=number)
            found[f"{part}.{name.removesuffix('.weight')}"] = adapter.LowRank(0.1 * down, 0.1 * up)
    return found


def test_a_lora_is_added_to_int8_weights_in_float32_and_taken_out(pipe, tmp_path):
    layers = changes(pipe.unet, "unet") | changes(pipe.text.gpt2, "language_model")
    path = adapter.Adapter(layers).save(tmp_path / "x.safetensors")
    parts = {"unet": pipe.unet, "language_model": pipe.text.gpt2}
    before = {part: {name: value.clone() for name, value in module.state_dict().items()}
              for part, module in parts.items()}
    heard = pipe.generate("a siren", seed=0, steps=2, seconds=0.3).latents
    pipe.load_lora(path, 0.5)
    changed = pipe.generate("a siren", seed=0, steps=2, seconds=0.3).latents
    assert all(weight.dtype == torch.float32 for weight in pipe.unet.parameters()) and "int8" in repr(pipe)
    with pytest.raises(ValueError, match="int8 weights are made as they are read"):
        pipe.move(torch.device("cpu"), torch.bfloat16, pipe.text)
    for name, layer in layers.items():
        part, _, module = name.partition(".")
        old = ops.Int8(before[part][f"{module}.weight"], before[part][f"{module}.weight_scale"]).dense(torch.float32)
        delta = 0.5 * (layer.up.flatten(1) @ layer.down.flatten(1))
        delta = delta.T if part == "language_model" else delta
        torch.testing.assert_close(parts[part].get_parameter(f"{module}.weight"), old + delta.reshape(old.shape))
    pipe.unload_lora()
    assert len(layers) > 50 and {name.partition(".")[0] for name in layers} == set(parts)
    for part, module in parts.items():
        now = module.state_dict()
        assert now.keys() == before[part].keys()
        assert all(torch.equal(value, before[part][name]) for name, value in now.items())
    assert torch.equal(pipe.generate("a siren", seed=0, steps=2, seconds=0.3).latents, heard)
    assert not torch.allclose(changed, heard, atol=1e-3)


class Layers(nn.Module):
    """One of each kind of layer, with sizes that are large enough."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv1d = nn.Linear(150, 130), nn.Conv1d(50, 130, 5)
        self.conv2d = nn.Conv2d(40, 60, 3, stride=2)
        self.table, self.c_fc = nn.Embedding(700, 30), Conv1D(150, 130)
        self.strange, self.small = nn.Bilinear(30, 30, 20), nn.Linear(100, 100)

    def forward(self):
        return [self.linear(draw(3, 150)), self.conv1d(draw(2, 50, 20)), self.conv2d(draw(1, 40, 9, 8)),
                self.table(torch.tensor([[3, 699, 0]])), self.c_fc(draw(2, 4, 150)), self.small(draw(2, 100)),
                self.strange(draw(2, 30), draw(2, 30, seed=1))]


def test_layers_of_all_kinds_compute_with_the_widened_weights():
    plain = Layers()
    tensors = {name: draw(*tensor.shape, seed=i) for i, (name, tensor) in enumerate(plain.state_dict().items())}
    assert sum(selects(name, tensor) for name, tensor in tensors.items()) == 6 and LEAST > 100 * 100
    pairs = {name: quantize(name, tensor) for name, tensor in tensors.items() if selects(name, tensor)}
    weights.load(plain, tensors | {name: pair.dense(torch.float32) for name, pair in pairs.items()})
    for given in (tensors, quantized(tensors)):
        packed = weights.load(Layers(), given, dtype=torch.int8)
        assert packed.strange.weight.dtype == torch.float32
        assert [layer.weight.dtype for layer in (packed.linear, packed.table, packed.c_fc)] == [torch.int8] * 3
        for got, expected in zip(packed(), plain(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)

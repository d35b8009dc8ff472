"""LoRAs in the weights of a pipeline: exact, taken out without a trace, whatever the pipeline does meanwhile."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import ldm2
from ldm2.checkpoints import lora_files
from ldm2.checkpoints.adapter import Adapter, LowRank, combined
from ldm2.runtime import graphs, lora
from ldm2.runtime.weight_layout import for_tensor_cores
from tests import authors
from tests.helpers import Tape, draw, noise, relative
from tests.loras import PARTS, make

SETTINGS = {"steps": 1, "seconds": 0.1, "seed": 4}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return ldm2.load(tiny_checkpoint, device="cpu")


@pytest.fixture(autouse=True)
def clean(pipe):
    yield
    pipe.unload_lora()


@pytest.fixture(scope="module")
def files(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return [make(pipe, folder / "one.safetensors"), make(pipe, folder / "two.safetensors", 100),
            make(pipe, folder / "text.safetensors", 200, tuple(PARTS))]


def sound(pipe, **more) -> np.ndarray:
    return pipe.generate("rain", **SETTINGS, **more).latents.numpy()


def state(pipe) -> dict[str, torch.Tensor]:
    tensors = {"unet": pipe.unet, "gpt2": pipe.text.gpt2, "projection": pipe.text.projection}
    return {f"{part}.{name}": value.clone() for part, module in tensors.items()
            for name, value in module.state_dict().items()}


def same(one, other) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_what_is_unloaded_leaves_the_very_same_bits(pipe, files):
    before, heard = state(pipe), sound(pipe)
    assert pipe.load_lora(files[0], 0.8) == "one"
    pipe.load_lora(files[2], 0.5, name="words")
    assert not np.allclose(sound(pipe), heard, atol=1e-3)
    pipe.set_lora_scale("words", 1.5)
    pipe.unload_lora("words")
    pipe.unload_lora()
    assert same(before, state(pipe)) and np.array_equal(sound(pipe), heard)


def test_several_add_up_in_float32_and_are_rounded_once(tiny_checkpoint, files):
    pipe = ldm2.load(tiny_checkpoint, device="cpu", dtype="bfloat16")
    plain = dict(pipe.unet.state_dict())
    pipe.load_lora(files[0], 0.8)
    pipe.load_lora(files[1], -0.5)
    both = [(lora_files.read(files[0]), 0.8), (lora_files.read(files[1]), -0.5)]
    expected = combined(plain, "unet", both)
    now = pipe.unet.state_dict()
    assert len(expected) > 50 and all(torch.equal(now[name], value) for name, value in expected.items())
    assert all(torch.equal(now[name], value) for name, value in plain.items() if name not in expected)
    pipe.unload_lora()
    assert same(plain, pipe.unet.state_dict())


def test_a_request_is_made_with_what_it_names_alone(pipe, files):
    plain = sound(pipe)
    alone = sound(pipe, lora=f"{files[1]}:0.5")
    pipe.load_lora(files[0])
    standing = sound(pipe)
    assert np.array_equal(sound(pipe, lora=[(files[1], 0.5)]), alone)
    assert np.array_equal(sound(pipe, lora=[]), plain)
    assert np.array_equal(sound(pipe), standing)
    for one, other in ((plain, alone), (plain, standing), (alone, standing)):
        assert not np.allclose(one, other, atol=1e-3)


def test_equal_requests_are_merged_once(pipe, files, monkeypatch):
    times = []
    monkeypatch.setattr(lora, "combined", lambda *given: times.append(given[1]) or combined(*given))
    for _ in range(3):
        sound(pipe, lora=files[0])
    assert times == ["unet"]


def test_the_text_side_follows_too(pipe, files):
    before = pipe.encode("rain").contexts[0]
    pipe.load_lora(files[2])
    assert relative(pipe.encode("rain").contexts[0], before) > 1e-2
    pipe.unload_lora()
    assert torch.equal(pipe.encode("rain").contexts[0], before)


@pytest.mark.parametrize("task, options", [
    ("transfer", {}), ("variations", {"num_waveforms": 1}), ("inpaint", {"times": [(0.05, 0.15)]}),
    ("extend", {"seconds": 0.1}), ("super_resolution", {"above": 3000}), ("reconstruct", {"stage": "diffusion"}),
])
def test_each_edit_takes_it(pipe, files, task, options):
    given = {"sample_rate": 16000, "steps": 2, "seed": 0} | options
    made = [getattr(pipe, task)(noise(3200), **given, **more) for more in ({}, {"lora": files[0]})]
    heard = [each.waveform if task == "reconstruct" else each.latents.numpy() for each in made]
    assert not np.allclose(*heard, atol=1e-4)
    if task != "reconstruct":
        assert made[1].settings["lora"][0][:2] == [files[0], 1.0]


def test_low_memory_sounds_alike(tiny_checkpoint, pipe, files):
    sparing = ldm2.load(tiny_checkpoint, device="cpu", low_memory=True)
    for each in (pipe, sparing):
        each.load_lora(files[2], 0.7)
    assert np.array_equal(sound(sparing), sound(pipe))
    for each in (pipe, sparing):
        each.unload_lora()
    assert np.array_equal(sound(sparing), sound(pipe))
    assert all(parameter.is_meta for parameter in sparing.unet.parameters())
    with sparing.stages["unet"], pytest.raises(ValueError, match=r"low_memory.*outside of the stages"):
        sparing.load_lora(files[0])


def test_a_file_of_the_authors_takes_it(tmp_path):
    file = authors.save(authors.whole_state(authors.modules("sound")), tmp_path / "file.pth")
    pipe = ldm2.load(file, device="cpu", tokenizers=authors.save_tokenizers(tmp_path / "tokenizers"))
    before, plain = state(pipe), sound(pipe)
    path = make(pipe, tmp_path / "x.safetensors", parts=tuple(PARTS))
    assert not np.allclose(sound(pipe, lora=path), plain, atol=1e-3)
    assert np.array_equal(sound(pipe), plain) and same(before, state(pipe))


def test_the_file_tells_what_it_was_made_with(pipe, files, tmp_path):
    shutil.copy(files[0], tmp_path / "x.safetensors")
    path = str(tmp_path / "x.safetensors")
    pipe.load_lora(path, 0.5)
    result = pipe.generate("rain", **SETTINGS)
    assert result.settings["lora"] == [[path, 0.5, lora_files.File.at(path).digest()]]
    [written] = result.save(tmp_path / "x.wav")
    told = ldm2.Settings.from_file(written)
    pipe.unload_lora()
    again = pipe.generate(**result.settings)
    assert told.lora == tuple(map(tuple, result.settings["lora"])) and torch.equal(again.latents, result.latents)
    shutil.copy(files[1], path)
    with pytest.raises(ValueError, match=r"x\.safetensors has changed.*SHA-256"):
        pipe.generate(**result.settings)


def test_a_name_stands_for_a_file(tiny_checkpoint, pipe, files, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / "lora").mkdir()
    shutil.copy(files[0], folder / "lora/soft.safetensors")
    other = ldm2.load(folder, device="cpu")
    assert list(other.loras) == ["soft"]
    assert np.array_equal(sound(other, lora="soft:0.5"), sound(pipe, lora=f"{files[0]}:0.5"))
    other.loras["second"] = files[1]
    assert np.array_equal(sound(other, lora="second"), sound(pipe, lora=files[1]))
    with pytest.raises(ValueError, match="no LoRA named 'hard': it has second, soft"):
        other.generate("rain", lora="hard")
    with pytest.raises(ValueError, match="no LoRA named 'hard': it has none"):
        pipe.load_lora("hard")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_keep_them_and_can_unload_them(tiny_checkpoint, files, copied):
    pipe = ldm2.load(tiny_checkpoint, device="cpu")
    plain = sound(pipe)
    pipe.load_lora(files[0], 0.5, name="x")
    pipe.loras["y"] = files[1]
    other = copied(pipe)
    np.testing.assert_allclose(sound(other), sound(pipe), rtol=0, atol=1e-5)
    other.unload_lora("x")
    np.testing.assert_allclose(sound(other), plain, rtol=0, atol=1e-5)
    assert not np.allclose(sound(pipe), plain, atol=1e-3) and "y" in other.loras


def test_moving_rounds_the_sum_once(tiny_checkpoint, files):
    pipe = ldm2.load(tiny_checkpoint, device="cpu")
    there = ldm2.load(tiny_checkpoint, device="cpu", dtype="bfloat16")
    pipe.load_lora(files[2])
    there.load_lora(files[2])
    pipe.move(torch.device("cpu"), torch.bfloat16, copy.deepcopy(pipe.text).to(torch.bfloat16))
    assert same(dict(there.unet.state_dict()), dict(pipe.unet.state_dict()))


def test_threads_with_other_loras_wait_for_each_other(pipe, files):
    asked = [[], files[0], [f"{files[0]}:0.3", files[1]]] * 2
    expected = [sound(pipe, lora=each) for each in asked[:3]] * 2
    with ThreadPoolExecutor(4) as pool:
        heard = list(pool.map(lambda each: sound(pipe, lora=each), asked))
    assert all(map(np.array_equal, heard, expected))


def test_nothing_changes_inside_a_request(pipe, files):
    def step(what):
        return lambda *_: what()

    for what in (lambda: pipe.load_lora(files[0]), lambda: pipe.generate("x", lora=files[0], **SETTINGS)):
        with pytest.raises(ValueError, match="inside a request"):
            pipe.generate("rain", callback=step(what), **SETTINGS)
    assert not pipe.adapters.standing


def test_graphs_follow_the_weights(pipe, files, monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", lambda device: Tape())
    before = graphs.graphs_of(pipe.unet, pipe.device)
    assert graphs.graphs_of(pipe.unet, pipe.device) is before
    pipe.load_lora(files[0])
    assert graphs.graphs_of(pipe.unet, pipe.device) is not before


def test_elsewhere_weights_stay_where_they_lie(tiny_checkpoint, files, monkeypatch):
    monkeypatch.setattr(lora, "_replaced", lambda parameter: False)
    monkeypatch.setattr(graphs, "CudaCapture", lambda device: Tape())
    one, other = (ldm2.load(tiny_checkpoint, device="cpu", dtype="bfloat16") for _ in range(2))
    for_tensor_cores(one.unet)
    before, recorded = state(one), graphs.graphs_of(one.unet, one.device)
    attention = one.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    for pipe in (one, other):
        pipe.load_lora(files[2])
    assert graphs.graphs_of(one.unet, one.device) is recorded
    joint = attention._fused_qkv()
    assert torch.equal(joint, torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]))
    assert same(state(one), state(other)) and not same(state(one), before)
    one.unload_lora()
    assert same(before, state(one)) and attention._fused_qkv() is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_recorded_graphs_replay_with_what_is_merged(tiny_checkpoint, files):
    pipe, fresh = (ldm2.load(tiny_checkpoint, device="cuda") for _ in range(2))
    plain = [sound(pipe) for _ in range(4)][-1]            # recorded by now
    fresh.load_lora(files[0])
    changed = sound(pipe, lora=files[0])
    assert relative(changed, sound(fresh)) < 1e-2 < relative(changed, plain)
    assert np.array_equal(sound(pipe), plain)


def test_a_merge_that_fails_leaves_nothing_behind(pipe, files, monkeypatch):
    before = state(pipe)

    def fail(weights, part, adapters):
        if part == "language_model":
            raise MemoryError
        return combined(weights, part, adapters)

    monkeypatch.setattr(lora, "combined", fail)
    with pytest.raises(MemoryError):
        pipe.load_lora(files[2])
    monkeypatch.undo()
    assert same(before, state(pipe)) and not pipe.adapters.standing
    sound(pipe)
    assert same(before, state(pipe))


@pytest.mark.parametrize("given, words", [
    ({"scale": float("nan")}, "scale.*nan"), ({"scale": "1"}, "scale.*'1'"), ({"name": ""}, "name.*empty"),
])
def test_impossible_loads_are_refused(pipe, files, given, words):
    with pytest.raises(ValueError, match=words):
        pipe.load_lora(files[0], **given)
    with pytest.raises(ValueError, match="no LoRA named 'one' is loaded, but none"):
        pipe.unload_lora("one")
    with pytest.raises(ValueError, match="path must be a string"):
        pipe.load_lora(3)


def test_names_are_unique(pipe, files):
    pipe.load_lora(files[0])
    with pytest.raises(ValueError, match="'one' is loaded"):
        pipe.load_lora(files[0])
    with pytest.raises(ValueError, match="no LoRA named 'two' is loaded, but one"):
        pipe.set_lora_scale("two", 1.0)


def test_a_lora_of_another_model_is_refused_before_anything_runs(pipe, tmp_path):
    layer = LowRank(draw(2, 5), draw(5, 2))
    path = Adapter({"unet.conv_in": layer}).save(tmp_path / "x.safetensors")
    for use in (pipe.load_lora, lambda path: pipe.generate("rain", lora=path)):
        with pytest.raises(ValueError, match=r"x\.safetensors is a LoRA of another model.*conv_in"):
            use(path)


def test_a_model_without_gpt2_says_so(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pipe.adapters, "text", types.SimpleNamespace(gpt2=None, projection=None))
    layer = LowRank(draw(2, 24), draw(72, 2))
    path = Adapter({"language_model.h.0.attn.c_attn": layer}).save(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="this one has no language_model"):
        pipe.load_lora(path)


@pytest.mark.parametrize("path, name", [
    ("a/b.safetensors", "b"), ("a/style/adapter_model.safetensors", "style"), ("a/style/", "style"),
    ("a/c/pytorch_lora_weights.safetensors", "c"),
])
def test_a_lora_is_called_after_its_file_or_folder(path, name):
    assert lora.name_of(path) == name


def test_waiting_requests_are_woken(pipe, files):
    inside, done = threading.Event(), threading.Event()

    def slow(*_):
        inside.set()
        done.wait(0.2)

    thread = threading.Thread(target=lambda: pipe.generate("rain", lora=files[0], callback=slow, **SETTINGS))
    thread.start()
    inside.wait()
    plain = sound(pipe)
    thread.join()
    assert np.array_equal(plain, sound(pipe, lora=[]))

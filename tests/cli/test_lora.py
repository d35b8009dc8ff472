"""LoRAs at the doors: the command line, files of sounds, converted folders, batches, the drop-in class, the server."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import soundfile
import torch

import ldm2
from benchmarks import checkpoints
from ldm2 import audio
from ldm2.batch.rows import Rules
from ldm2.batch.worker import Worker
from ldm2.checkpoints.adapter import Adapter, LowRank
from ldm2.checkpoints.lora_files import File
from ldm2.compat import AudioLDM2Pipeline
from ldm2.option_kinds import parse_lora
from ldm2.settings import PRESETS, Settings
from ldm2.training.lora import add_lora
from tests.helpers import condition, draw, relative

MADE = ("--steps", "1", "--seconds", "0.2", "--seed", "5", "-q")


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return ldm2.load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def source(pipe, tmp_path_factory) -> Path:
    """A LoRA of all kinds of layers of UNet and GPT-2."""
    layers = {}
    for part, module in (("unet", pipe.unet), ("language_model", pipe.text.gpt2)):
        kinds = ("attention", "feed_forward", "convolution") if part == "unet" else ("attention",)
        added = add_lora(copy.deepcopy(module), 2, 3.0, kinds).adapter(part)
        for number, (name, layer) in enumerate(added.layers.items()):
            layers[name] = LowRank(layer.down, 0.3 * draw(*layer.up.shape, seed=number), layer.scale)
    return Adapter(layers, about={"model": "random"}).save(tmp_path_factory.mktemp("lora") / "x.safetensors")


@pytest.fixture
def lora(source, tmp_path) -> Path:
    return Path(shutil.copy(source, tmp_path / "x.safetensors"))


def test_generate_replay_and_info_know_it(run, tiny_checkpoint, lora):
    model = ("--model", tiny_checkpoint)
    for name, more in (("plain.wav", ()), ("half.wav", ("--lora", "x.safetensors:0.5"))):
        assert run("generate", "rain", *model, *MADE, *more, "-o", name)[0] == 0
    half, plain = (soundfile.read(name)[0] for name in ("half.wav", "plain.wav"))
    assert not np.array_equal(half, plain)
    told = json.loads(audio.read_metadata("half.wav")["comment"])["lora"]
    assert told == [["x.safetensors", 0.5, File.at(lora).digest()]]
    assert "x.safetensors" in run("info", "half.wav")[1]
    assert run("replay", "half.wav", "-q", "--set", "lora=x.safetensors:0", "-o", "none.wav")[0] == 0
    assert np.array_equal(soundfile.read("none.wav")[0], plain)


def test_a_replay_finds_it_beside_the_sound_and_refuses_another_one(run, tiny_checkpoint, lora, tmp_path):
    assert run("generate", "rain", "--model", tiny_checkpoint, *MADE, "--lora", lora, "-o", "a.wav")[0] == 0
    (tmp_path / "sub").mkdir()
    for name in ("a.wav", "x.safetensors"):
        (tmp_path / name).rename(tmp_path / "sub" / name)
    assert run("replay", "sub/a.wav", "--check", "-q")[0] == 0
    content = (tmp_path / "sub/x.safetensors").read_bytes()
    (tmp_path / "sub/x.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, _, err = run("replay", "sub/a.wav", "--check", "-q")
    assert code == 2 and "has changed" in err and "SHA-256" in err
    (tmp_path / "sub/x.safetensors").unlink()
    code, _, err = run("replay", "sub/a.wav", "--check", "-q")
    assert code == 2 and "x.safetensors is missing" in err and "--set lora=" in err


@pytest.mark.parametrize("words, told", [
    (("--lora", "none.safetensors"), "none.safetensors does not exist"), (("--lora", "none"), "no LoRA named 'none'"),
    (("--lora", "x.safetensors:nan"), "scale of x.safetensors.*nan"),
])
def test_what_is_not_there_is_refused_in_a_line(run, tiny_checkpoint, lora, tmp_path, words, told):
    code, out, err = run("generate", "rain", "--model", tiny_checkpoint, *MADE, *words, "-o", "a.wav")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert re.search(told, err) and not (tmp_path / "a.wav").exists()


def test_info_describes_a_lora(run, lora):
    code, out, _ = run("info", lora)
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[1:] if " / " not in line)
    assert code == 0 and lines["kind"] == "LoRA" and lines["base"] == "random" and lines["rank"] == "2"
    assert "alpha / rank      1.5" in out
    assert "to_q (" in lines["unet"] and "ff.net.0.proj (" in lines["unet"] and "conv1 (" in lines["unet"]
    assert lines["language_model"] == "c_attn (2), c_proj (2)"


def test_a_converted_folder_has_it_in_its_weights(run, tiny_checkpoint, pipe, lora, tmp_path):
    assert run("convert", tiny_checkpoint, "whole", "--lora", f"{lora}:0.5")[0] == 0
    merged = ldm2.load(tmp_path / "whole", device="cpu")
    pipe.load_lora(lora, 0.5)
    theirs = diffusers.AudioLDM2UNet2DConditionModel.from_pretrained(tmp_path / "whole/unet")
    given = condition(pipe.unet.config, 1)
    x_t, (first, second) = draw(1, 4, 16, 8), given.contexts
    with torch.no_grad():
        ours = pipe.unet(x_t, 500, given)
        expected = theirs(x_t, 500, encoder_hidden_states=first, encoder_hidden_states_1=second,
                          encoder_attention_mask_1=given.masks[1]).sample
    for part in (("unet",), ("text", "gpt2")):
        one, other = merged, pipe
        for name in part:
            one, other = getattr(one, name), getattr(other, name)
        weights = other.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())
    pipe.unload_lora()
    merged_config = json.loads((tmp_path / "whole/unet/config.json").read_text())
    assert merged_config["attention_head_dim"] and relative(merged.unet(x_t, 500, given).detach(), ours) < 1e-5
    reference = ldm2.load(tmp_path / "whole", device="cpu", reference="diffusers")
    assert relative(reference.unet(x_t, 500, given).detach(), expected) < 1e-5


def test_a_lora_that_does_not_fit_is_not_converted(run, tiny_checkpoint, tmp_path):
    Adapter({"unet.conv_in": LowRank(draw(2, 5), draw(5, 2))}).save(tmp_path / "y.safetensors")
    code, _, err = run("convert", tiny_checkpoint, "whole", "--lora", "y.safetensors")
    assert code == 2 and "y.safetensors is a LoRA of another model" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["y.safetensors"]


def test_a_folder_keeps_the_loras_that_it_brings(run, tiny_checkpoint, lora, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / "lora").mkdir()
    shutil.copy(lora, folder / "lora/soft.safetensors")
    assert run("convert", folder, "copy")[0] == 0
    assert (tmp_path / "copy/lora/soft.safetensors").read_bytes() == lora.read_bytes()
    assert run("generate", "rain", "--model", "copy", *MADE, "--lora", "soft:0.5", "-o", "a.wav")[0] == 0


def test_rows_of_a_batch_have_their_own(tiny_checkpoint, pipe, lora, tmp_path):
    worker = Worker(str(tiny_checkpoint), str(tmp_path / "out"), format="wav", load={"device": "cpu"})
    form = {"prompt": "rain", "steps": 1, "seconds": 0.2, "seed": 1}
    rows = [worker.rules.row(number, form | more) for number, more in enumerate(
        ({}, {"lora": [str(lora)]}, {"lora": f"{lora}:0.5"}, {"lora": ["none.safetensors"]}, {"lora": "none"}), 1)]
    records = worker.run(rows)
    worker.close()
    assert [record["status"] for record in records] == ["ok", "ok", "ok", "error", "error"]
    assert "none.safetensors" in records[3]["error"] and "no LoRA named 'none'" in records[4]["error"]
    heard = [soundfile.read(tmp_path / "out" / record["path"])[0] for record in records[:3]]
    expected = [pipe.generate(**form, lora=each).waveforms[0] for each in ([], lora, f"{lora}:0.5")]
    assert all(np.abs(one - other).max() < 1e-4 for one, other in zip(heard, expected))
    assert not np.allclose(heard[0], heard[1], atol=1e-3)


def test_a_changed_file_makes_another_row(tmp_path):
    rules, path = Rules({}), tmp_path / "x.safetensors"
    path.write_bytes(b"one")
    first = rules.row(1, {"prompt": "rain", "lora": [str(path)]})
    path.write_bytes(b"other")
    assert Rules({}).row(1, {"prompt": "rain", "lora": [str(path)]}).asked != first.asked


def test_the_drop_in_class_has_the_names_of_diffusers(tiny_checkpoint, pipe, lora, tmp_path):
    other = AudioLDM2Pipeline.from_pretrained(tiny_checkpoint)
    plain = {name: value.clone() for name, value in other.unet.state_dict().items()}
    other.load_lora_weights(lora.parent, weight_name="x.safetensors", adapter_name="a")
    other.load_lora_weights(lora, adapter_name="b")
    other.set_adapters(["b"], 0.5)
    assert other.get_active_adapters() == ["b"]
    assert other.get_list_adapters() == {"unet": ["a", "b"], "language_model": ["a", "b"]}
    pipe.load_lora(lora, 0.5)
    for each in (other, pickle.loads(pickle.dumps(other))):
        now = each.unet.state_dict()
        assert all(torch.equal(value, now[name]) for name, value in pipe.unet.state_dict().items())
    pipe.unload_lora()
    other.delete_adapters("b")
    other.set_adapters("a", 2.0)
    other.fuse_lora(lora_scale=0.5)
    assert not torch.equal(other.unet.state_dict()["conv_in.weight"], plain["conv_in.weight"])
    other.unload_lora_weights()
    assert all(torch.equal(value, plain[name]) for name, value in other.unet.state_dict().items())
    for given, words in (({"x": 1}, "dict: save it"), ("someone/lora", "someone/lora does not exist")):
        with pytest.raises((ValueError, OSError), match=words):
            other.load_lora_weights(given)


def test_weights_that_are_replaced_lose_none_of_their_bits(tiny_checkpoint, lora):
    other = AudioLDM2Pipeline.from_pretrained(tiny_checkpoint)
    other.load_lora_weights(lora)
    other.unet = theirs = checkpoints.unet(seed=9)
    changed = other.unet.state_dict()["conv_in.weight"].clone()
    other.unload_lora_weights()
    assert torch.equal(other.unet.state_dict()["conv_in.weight"], theirs.state_dict()["conv_in.weight"])
    assert not torch.equal(changed, theirs.state_dict()["conv_in.weight"])


def test_clients_of_the_server_name_what_it_has():
    pytest.importorskip("fastapi")
    from ldm2.serve.asked import About, asked
    from ldm2.serve.errors import Refused
    from ldm2.serve.limits import Limits

    about = About({"model": "tiny"}, {}, 16000, False, False, 1000, loras=("soft",))
    body = {"kind": "generate", "prompt": "rain"}
    assert asked(body | {"lora": ["soft:0.5"]}, about, Limits()).options["lora"] == [["soft", 0.5]]
    for word in ("/etc/passwd", "x.safetensors", "hard", "../soft"):
        with pytest.raises(Refused, match=f"lora must be of soft here, got '{word}'"):
            asked(body | {"lora": [word]}, about, Limits())


@pytest.mark.parametrize("given, expected", [
    ("a.safetensors", (("a.safetensors", 1.0),)), ("a:0.5", (("a", 0.5),)), (["a", ("b", 2)], (("a", 1.0), ("b", 2.0))),
    (("a", -0.5), (("a", -0.5),)), ([], ()), ([["a", 1, "0" * 64]], (("a", 1.0, "0" * 64),)),
    (Path("a"), (("a", 1.0),)), (r"C:\a.safetensors", ((r"C:\a.safetensors", 1.0),)), ([["a"]], (("a", 1.0),)),
])
def test_settings_take_each_form(given, expected):
    settings = Settings("rain", lora=given)
    assert settings.lora == expected
    assert Settings(**json.loads(json.dumps(settings.plain()))).lora == expected


@pytest.mark.parametrize("given, words", [
    (3, "lora must be a list.*3"), ([3], "lora must hold FILE:SCALE.*3"), ([("a", "b")], "scale of a.*'b'"),
    ([("a", float("inf"))], "scale of a.*inf"), (["  "], "lora: the file must not be empty"), ({"a": 1}, "lora"),
    ([("a", 1, "zz")], "SHA-256 of a.*zz"), ([("a", 1, "0" * 64, 1)], "lora must hold"), (["a"] * 33, "at most 32"),
    ([(1, 1)], "lora: the file must be a string"),
])
def test_settings_refuse_what_is_none(given, words):
    with pytest.raises(ValueError, match=words):
        Settings("rain", lora=given)


def test_a_preset_may_bring_one(tiny_checkpoint, pipe, lora, monkeypatch):
    monkeypatch.setitem(PRESETS, "fast", {"steps": 1, "lora": ("soft:0.5",)})
    pipe.loras["soft"] = lora
    result = pipe.generate("rain", preset="fast", seconds=0.2, seed=1)
    assert result.settings["lora"] == [["soft", 0.5, File.at(lora).digest()]]
    other = pipe.generate("rain", steps=1, seconds=0.2, seed=1, lora=f"{lora}:0.5")
    assert np.array_equal(result.waveforms, other.waveforms)
    assert pipe.generate("rain", preset="fast", seconds=0.2, seed=1, lora=[]).settings["lora"] == []


def test_words_are_parsed_from_their_end():
    assert parse_lora("a:b:0.5") == ("a:b", 0.5) and parse_lora(":0.5") == (":0.5", 1.0)


def test_reconstruction_takes_none_where_nothing_is_sampled():
    with pytest.raises(ValueError, match="lora is for the stage diffusion"):
        Settings.create("reconstruct", lora="a").resolved(duration=1.0)

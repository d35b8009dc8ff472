"""Reading weight files, renaming, building without memory, loading strictly, describing."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shutil
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm2 import weights
from ldm2.checkpoints.describe import describe
from tests import authors

TENSORS = {"linear.weight": torch.arange(6.0).reshape(2, 3), "linear.bias": torch.tensor([7.0, 8.0])}


class Small(nn.Module):
    """A linear layer, a table that no file fills, and a counter that files do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


class Tied(nn.Module):
    """Two embeddings with one weight, as in T5."""

    def __init__(self):
        super().__init__()
        self.shared, self.embed = nn.Embedding(3, 2), nn.Embedding(3, 2)
        self.embed.weight = self.shared.weight


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def built(kind=Small):
    """A module without memory, its table filled."""
    with weights.on_meta():
        module = kind()
    if kind is Small:
        module.table = torch.arange(4.0)
    return module


def write_shards(folder, save, suffix):
    """TENSORS, one to a file, and the index."""
    names = {name: f"model-0000{i + 1}-of-00002{suffix}" for i, name in enumerate(TENSORS)}
    for name, file in names.items():
        save({name: TENSORS[name]}, folder / file)
    (folder / f"model{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


# Reading


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "model.safetensors"])
def test_safetensors_are_read_exactly(tmp_path, name):
    save_file(TENSORS, tmp_path / name)
    assert same(weights.read_tensors(tmp_path), TENSORS)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin"])
def test_pickles_are_read_exactly(tmp_path, name):
    torch.save(TENSORS, tmp_path / name)
    assert same(weights.read_tensors(tmp_path), TENSORS)


def test_pickles_of_old_torch_versions_are_read(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(weights.read_tensors(tmp_path), TENSORS)


def test_a_state_dict_inside_a_checkpoint_is_found(tmp_path):
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "model.pth")
    assert same(weights.read_tensors(tmp_path / "model.pth"), TENSORS)


@pytest.mark.parametrize(("save", "suffix"), [(save_file, ".safetensors"), (torch.save, ".bin")])
def test_shards_are_read_after_their_index(tmp_path, save, suffix):
    write_shards(tmp_path, save, suffix)
    assert same(weights.read_tensors(tmp_path), TENSORS)


def test_safetensors_go_before_pickles(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    assert same(weights.read_tensors(tmp_path), TENSORS)


def test_a_variant_has_its_own_files(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    half = {name: tensor.half() for name, tensor in TENSORS.items()}
    save_file(half, tmp_path / "model.fp16.safetensors")
    assert same(weights.read_tensors(tmp_path, variant="fp16"), half)
    assert same(weights.read_tensors(tmp_path), TENSORS)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize(("save", "name"), [(save_file, "model.safetensors"), (torch.save, "pytorch_model.bin")])
def test_tensors_are_memory_mapped(tmp_path, save, name):
    save({"big": torch.zeros(100_000)}, tmp_path / name)
    tensors = weights.read_tensors(tmp_path)
    place = tensors["big"].data_ptr()
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(tmp_path / name))]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    assert any(low <= place < high for low, high in ranges)


def test_writing_to_a_read_tensor_leaves_the_file_alone(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    weights.read_tensors(tmp_path)["linear.bias"].add_(1)
    assert same(weights.read_tensors(tmp_path), TENSORS)


# Files that cannot be read


def refused(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        weights.read_tensors(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    refused(tmp_path / "unet", f"{re.escape(str(tmp_path))}/unet is missing")


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, r"holds no weights: expected diffusion_pytorch_model.safetensors or .*, found config.json")


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-5])
    refused(tmp_path, "model.safetensors is damaged or of another kind, not a complete safetensors file")


@pytest.mark.parametrize(("content", "kind"), [
    (b"", "empty"),
    (b"\x80\x02}q\x00.", "damaged or of another kind"),
    (b"hello there, this is some text" * 9, "damaged or of another kind"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a git-lfs pointer"),
    (b"<!DOCTYPE html><html>not found</html>" * 9, "a web page"),
])
def test_a_foreign_file_says_what_it_seems_to_be(tmp_path, content, kind):
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, f"model.safetensors is {kind}")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    refused(tmp_path, f"model.bin is {kind}" if content[:1] != b"\x80" else "model.bin is")


def test_a_truncated_pickle_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-200])
    refused(tmp_path, "pytorch_model.bin is damaged")


class Runs:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, zipped):
    torch.save({"a": Runs(tmp_path / "ran")}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    message = refused(tmp_path, "not a pickle of plain tensors; nothing of it was run")
    assert str(tmp_path / "pytorch_model.bin") in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_bare_pickle_is_refused_and_not_run(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    refused(tmp_path, "nothing of it was run")
    assert not (tmp_path / "ran").exists()


def test_what_is_in_the_way_is_named_with_a_line_that_saves_the_tensors_alone(tmp_path, monkeypatch):
    path = tmp_path / "training.ckpt"
    torch.save({"state_dict": TENSORS, Fraction: Fraction(1, 2)}, path)
    message = refused(path, r"nothing of it was run. It asks for fractions\.Fraction; if you trust its maker")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*)"', message)[1], {})   # the advice, followed
    assert same(weights.read_tensors(tmp_path / "new.pth"), TENSORS)


class Settings(argparse.Namespace):
    """Called as a class of a training framework would be, in the test below."""


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_leaves_beside_the_tensors_is_not_read(tmp_path, zipped, monkeypatch):
    monkeypatch.setattr(Settings, "__module__", "pytorch_lightning.callbacks")
    framework = ModuleType("pytorch_lightning.callbacks")
    framework.Settings = Settings
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, framework)
    beside = {
        "hyper_parameters": argparse.Namespace(lr=np.float64(1e-4), path=Path("/data"), sizes=np.arange(3)),
        Settings: {"best": Settings(score=np.float32(1), at=datetime.now())}, "dtype": np.dtype("int16"), "kind": int,
    }
    path = tmp_path / "training.ckpt"
    torch.save({"state_dict": TENSORS} | beside, path, _use_new_zipfile_serialization=zipped)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.delitem(sys.modules, name)
    before = torch.serialization.get_safe_globals()
    assert same(weights.read_tensors(path), TENSORS)
    assert set(torch.serialization.get_safe_globals()) == set(before)        # nothing is left behind for others


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
def test_a_path_that_another_python_wrote_is_not_read(tmp_path, module):
    made, path = tmp_path / "made.pth", tmp_path / "x.pth"
    torch.save({"state_dict": TENSORS, "at": Path("/data")}, made)
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():                       # Python 3.13 calls the module of Path pathlib._local
            new.writestr(entry, re.sub(rb"cpathlib[.\w]*\n", b"c" + module + b"\n", old.read(entry)))
    assert same(weights.read_tensors(path), TENSORS)


# The tables of archives


def archive(path: Path, change: Callable[[list[tuple[zipfile.ZipInfo, bytes]]], None]) -> Path:
    """A file of torch.save whose records (info, content) were changed and packed anew, by tables that agree."""
    torch.save({"a": torch.arange(30.0), "b": torch.arange(50.0)}, path)
    with zipfile.ZipFile(path) as old:
        records = [(entry, old.read(entry)) for entry in old.infolist()]
    change(records)
    with zipfile.ZipFile(path, "w") as new:
        for entry, content in records:
            new.writestr(entry.filename, content, entry.compress_type)
    return path


def test_an_archive_packed_anew_is_read(tmp_path):
    tensors = weights.read_tensors(archive(tmp_path / "model.bin", lambda records: None))
    assert tensors["b"].tolist() == list(range(50))


def test_a_record_shorter_than_its_tensor_is_refused(tmp_path):
    def shorten(records):
        for i, (entry, content) in enumerate(records):
            if entry.filename.endswith("/data/0"):
                records[i] = entry, content[:-4]

    refused(archive(tmp_path / "model.bin", shorten), "need 120 bytes where the archive has no record of that size")


def test_a_compressed_archive_is_refused(tmp_path):
    def deflate(records):
        for entry, _ in records:
            entry.compress_type = zipfile.ZIP_DEFLATED

    refused(archive(tmp_path / "model.bin", deflate), "is compressed")


def test_a_large_table_is_refused_before_it_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.bin", "w") as file, file.open("x/data.pkl", "w") as record:
        for _ in range(257):
            record.write(bytes(2**20))
    refused(tmp_path / "model.bin", "data.pkl has 269484032 bytes, at most 268435456")


@pytest.mark.parametrize("at", ["signature", "method", "size", "name length", "extra length", "name"])
def test_a_flip_in_the_header_of_a_record_is_refused(tmp_path, at):
    path = tmp_path / "model.bin"
    torch.save({"a": torch.arange(30.0), "b": torch.arange(50.0)}, path)
    with zipfile.ZipFile(path) as file:
        start = next(entry.header_offset for entry in file.infolist() if entry.filename.endswith("/data/0"))
    place = {"signature": 0, "method": 8, "size": 18, "name length": 26, "extra length": 28, "name": 30}[at]
    content = bytearray(path.read_bytes())
    content[start + place] ^= 1
    path.write_bytes(content)
    if at == "size":                                       # flag 8 says that it follows, no matter what is here
        assert weights.read_tensors(path)["a"].tolist() == list(range(30))
    else:
        refused(path, "record|BadZipFile|header|Overlap")


def test_a_pickle_of_other_things_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "pytorch_model.bin")
    refused(tmp_path, "is not a dict of named tensors")


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, save_file, ".safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors is missing: model.safetensors.index.json names it")


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_a_broken_index_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(tmp_path, "model.safetensors.index.json is not an index of weight files")


def test_an_index_cannot_point_elsewhere(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    refused(tmp_path, "which is outside its folder")


def test_shards_do_not_overlap(tmp_path):
    write_shards(tmp_path, save_file, ".safetensors")
    save_file(TENSORS, tmp_path / "model-00002-of-00002.safetensors")
    refused(tmp_path, "repeats linear.weight of another shard")


# Names


def test_the_first_matching_row_renames():
    table = {r"old\.(\w+)": r"new.\1", r"old\.b": "unreachable"}
    renamed = weights.rename({"old.a": TENSORS["linear.bias"], "old.b": TENSORS["linear.weight"]}, table, source="x")
    assert list(renamed) == ["new.a", "new.b"]


def test_a_row_of_none_drops():
    assert weights.rename(TENSORS, {r".*bias": None, r".*weight": r"\g<0>"}, source="x").keys() == {"linear.weight"}


def test_a_name_without_a_row_is_an_error_unless_it_may_stay():
    with pytest.raises(ValueError, match=r"file.pth: 1 unknown keys \(linear.bias\)"):
        weights.rename(TENSORS, {r".*weight": r"\g<0>"}, source="file.pth")
    assert same(weights.rename(TENSORS, {}, source="x", keep_others=True), TENSORS)


def test_two_tensors_cannot_end_under_one_name():
    with pytest.raises(ValueError, match=r"x: linear.bias would be a second w"):
        weights.rename(TENSORS, {r".*": "w"}, source="x")


@pytest.mark.parametrize(("old", "new"), [
    ("encoder.mid_block.attentions.0.query.weight", "encoder.mid_block.attentions.0.to_q.weight"),
    ("decoder.mid_block.attentions.0.proj_attn.bias", "decoder.mid_block.attentions.0.to_out.0.bias"),
    ("text_model.embeddings.position_ids", None),
    ("position_ids", None),
    ("h.11.attn.masked_bias", None),
    ("h.0.attn.bias", None),
])
def test_names_of_older_libraries(old, new):
    renamed = weights.rename({old: torch.zeros(1)}, weights.OLD_NAMES, source="x", keep_others=True)
    assert list(renamed) == ([] if new is None else [new])


@pytest.mark.parametrize("name", [
    "h.0.attn.c_attn.bias", "text_model.encoder.layer.0.attention.self.query.weight",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
])
def test_names_of_today_stay(name):
    assert list(weights.rename({name: torch.zeros(1)}, weights.OLD_NAMES, source="x", keep_others=True)) == [name]


# Building and loading


def test_what_is_built_takes_no_memory():
    with weights.on_meta():
        module = Small()
    assert all(value.is_meta for value in [*module.parameters(), *module.buffers()])


def test_building_draws_no_random_numbers():
    state = torch.get_rng_state()
    built()
    assert torch.equal(torch.get_rng_state(), state)


def test_modules_built_later_or_in_other_threads_are_as_ever():
    found = []
    with weights.on_meta():
        thread = threading.Thread(target=lambda: found.append(Small().linear.weight))
        thread.start()
        thread.join()
    found.append(Small().linear.weight)
    assert not any(parameter.is_meta or bool((parameter == 0).all()) for parameter in found)


def test_modules_are_built_in_many_threads_at_once():
    def build(_):
        with weights.on_meta():
            built = [Small() for _ in range(50)]
        return all(parameter.is_meta for module in built for parameter in module.parameters())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(build, range(32)))
    assert not Small().linear.weight.is_meta


def test_an_error_inside_ends_the_building():
    with pytest.raises(KeyError), weights.on_meta():
        raise KeyError
    assert not Small().linear.weight.is_meta


def test_loading_assigns_the_tensors_themselves():
    module = weights.load(built(), TENSORS)
    assert same(module.state_dict(), TENSORS)
    assert module.linear.weight.data_ptr() == TENSORS["linear.weight"].data_ptr()
    assert torch.equal(module.table, torch.arange(4.0))


def test_a_loaded_module_is_for_inference():
    module = weights.load(built(), TENSORS)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_only_floating_tensors_are_cast():
    module = nn.BatchNorm1d(2)
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    weights.load(module, tensors, dtype=torch.bfloat16)
    assert module.weight.dtype == module.running_mean.dtype == torch.bfloat16
    assert module.num_batches_tracked.dtype == torch.int64


def test_without_a_dtype_the_file_decides():
    half = {name: tensor.half() for name, tensor in TENSORS.items()}
    assert weights.load(built(), half).linear.weight.dtype == torch.float16
    assert weights.load(built(), half, dtype=torch.float32).linear.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["shared.weight", "embed.weight"])
def test_tied_parameters_load_from_either_name_and_stay_tied(name):
    module = weights.load(built(Tied), {name: torch.ones(3, 2)})
    assert module.shared.weight is module.embed.weight
    assert torch.equal(module.embed.weight, torch.ones(3, 2))


def test_loading_is_silent(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights.load(built(), weights.read_tensors(tmp_path), dtype=torch.float16)


def test_what_does_not_fit_is_listed_and_nothing_is_assigned():
    module = built()
    tensors = {"linear.weight": torch.zeros(3, 2), "other": torch.zeros(1)}
    message = (r"vae does not fit the model: 1 missing \(linear.bias\), 1 unexpected \(other\), "
               r"1 misshapen \(linear.weight \(3, 2\) instead of \(2, 3\)\)$")
    with pytest.raises(ValueError, match=message):
        weights.load(module, tensors, source="vae")
    assert module.linear.weight.is_meta


def test_only_the_first_few_of_many_are_listed():
    tensors = TENSORS | {f"extra.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(ValueError, match=r"9 unexpected \(extra.0, extra.1, extra.2, \.\.\.\)"):
        weights.load(built(), tensors)


def test_a_dropped_key_is_neither_expected_nor_taken():
    module = nn.BatchNorm1d(2)
    tensors = dict(module.state_dict()) | {"running_mean": torch.full((2,), 9.0)}
    weights.load(module, tensors, table={"running_mean": None})
    assert torch.equal(module.running_mean, torch.zeros(2))
    del tensors["running_mean"]
    weights.load(module, tensors, table={"running_mean": None})


def test_a_parameter_cannot_be_dropped():
    with pytest.raises(ValueError, match=r"1 missing \(linear.bias\)"):
        weights.load(built(), TENSORS, table={r"linear\.bias": None})


def test_a_buffer_on_meta_that_no_file_fills_is_a_mistake_of_the_caller():
    with torch.device("meta"):
        module = Small()
    with pytest.raises(RuntimeError, match="no file fills the buffer table"):
        weights.load(module, TENSORS)


# Describing


def test_a_description_names_parts_sizes_and_heads(tiny_checkpoint):
    found = describe(tiny_checkpoint)
    parts = {part.name: part for part in found.parts}
    assert parts.keys() == {
        "language_model", "projection_model", "text_encoder", "text_encoder_2", "unet", "vae", "vocoder"
    }
    assert parts["unet"].kind == "AudioLDM2UNet2DConditionModel"
    assert parts["unet"].dtypes == ("float32",)
    numbers = weights.read_tensors(tiny_checkpoint / "unet").values()
    assert parts["unet"].parameters == sum(tensor.numel() for tensor in numbers)
    assert found.heads == {"authors": (None, 2, 3), "diffusers": (None, 8, 8)}
    assert found.sample_rate == 16_000


def test_a_description_prints_a_line_for_each_part_and_reference(tiny_checkpoint):
    text = str(describe(tiny_checkpoint))
    assert re.search(r"^vae +AutoencoderKL +\d+\.\d+ M +float32 +\d+\.\d+ MB$", text, re.M)
    assert "heads per level of the UNet, reference authors: - 2 3 (-: no attention)\n" in text
    assert text.endswith("sample rate: 16000 Hz")


def test_an_authors_file_is_described_by_its_parts(tmp_path):
    path = authors.save(authors.golden_state("base"), tmp_path / "model.pth")
    found = describe(path)
    assert {"unet", "vae", "vocoder"} <= {part.name for part in found.parts}
    assert found.heads["authors"] == found.heads["diffusers"]


def test_tied_tensors_count_once(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    tensors = weights.read_tensors(folder / "text_encoder_2")
    torch.save(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}, folder / "text_encoder_2/model.bin")
    (folder / "text_encoder_2/model.safetensors").unlink()
    assert describe(folder).parts == describe(tiny_checkpoint).parts


def test_a_broken_config_is_named(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "vocoder/config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vocoder/config\.json"):
        describe(folder)

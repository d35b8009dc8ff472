"""Ways to damage a checkpoint. Each takes the path of a copy and somebody who chooses, and says what it did."""

from __future__ import annotations

import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file, save_file

T = TypeVar("T")

# Values that no field of any config may have.
WRONG = [
    "nonsense", "", -1, -3.5, 1e30, 10**9, 10**30, float("nan"), float("inf"), [], {}, [[]], ["x"], [-1, 0], True,
    {"a": [1]}, "os.system", [None, None], 0.5,
]
DTYPES = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


class Chooser(Protocol):
    """Makes the choices of a case: by a seed, or by hypothesis."""

    def integer(self, low: int, high: int) -> int:
        """A number from low to high, both included."""

    def choose(self, values: Sequence[T]) -> T:
        """One of the values."""


class Seeded:
    """Choices by a seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def choose(self, values: Sequence[T]) -> T:
        return values[self.integer(0, len(values) - 1)]


Damage = Callable[[Path, Chooser], str]


# JSON


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The path of every field and entry inside a value of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inside in items for place in ((*at, key), *places(inside, (*at, key)))]


def configs(folder: Path) -> list[Path]:
    """The small JSON files of a folder."""
    return sorted(file for file in folder.rglob("*.json") if file.stat().st_size < 20_000)


def set_field(file: Path, place: tuple, value: Any) -> None:
    """Change one field of a JSON file."""
    fields = json.loads(file.read_text())
    inside = fields
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    file.write_text(json.dumps(fields))


def wrong_field(folder: Path, pick: Chooser) -> str:
    file = pick.choose(configs(folder))
    place = pick.choose(places(json.loads(file.read_text())))
    value = pick.choose(WRONG)
    set_field(file, place, value)
    return f"{file.relative_to(folder)}: {'.'.join(map(str, place))} = {value!r}"


def missing_field(folder: Path, pick: Chooser) -> str:
    file = pick.choose(configs(folder))
    fields = json.loads(file.read_text())
    name = pick.choose(sorted(fields))
    del fields[name]
    file.write_text(json.dumps(fields))
    return f"{file.relative_to(folder)}: without {name}"


def foreign_class(folder: Path, pick: Chooser) -> str:
    kinds = ["TCDScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "os.system",
             "StableDiffusionPipeline", "VQModel", "BertModel", "../x", ""]
    name = pick.choose(kinds)
    if pick.integer(0, 1):
        set_field(folder / "scheduler/scheduler_config.json", ("_class_name",), name)
        return f"scheduler_config.json: _class_name = {name!r}"
    part = pick.choose(["unet", "vae", "vocoder", "scheduler", "text_encoder", "text_encoder_2", "language_model"])
    set_field(folder / "model_index.json", (part, 1), name)
    return f"model_index.json: {part} = {name!r}"


# Files


def files(path: Path) -> list[Path]:
    """The files of a checkpoint."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def truncated(path: Path, pick: Chooser) -> str:
    file = pick.choose(files(path))
    size = file.stat().st_size
    kept = pick.choose([0, 1, 4, 100, size // 2, size - 1])
    file.write_bytes(file.read_bytes()[:kept])
    return f"{file.name} cut to {kept} of {size} bytes"


def replaced(path: Path, pick: Chooser) -> str:
    content = pick.choose([
        b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        b"\x00" * 64, b"[" * 100_000, b"PK\x03\x04" + b"\x00" * 60, b"\x80\x02}q\x00.", b"null", b"\xff\xfe{}", b"{}",
    ])
    file = pick.choose(files(path))
    file.write_bytes(content)
    return f"{file.name} is {content[:30]!r}"


def removed(path: Path, pick: Chooser) -> str:
    if path.is_dir() and pick.integer(0, 1):
        part = pick.choose(sorted(folder for folder in path.iterdir() if folder.is_dir()))
        shutil.rmtree(part)
        return f"{part.name}/ removed"
    file = pick.choose(files(path))
    file.unlink()
    return f"{file.name} removed"


def flipped_header(folder: Path, pick: Chooser) -> str:
    """A bit of the table of contents of a safetensors file."""
    file = pick.choose(sorted(folder.rglob("*.safetensors")))
    content = bytearray(file.read_bytes())
    place = pick.integer(0, 7 + struct.unpack("<Q", content[:8])[0])
    content[place] ^= 1 << pick.integer(0, 7)
    file.write_bytes(content)
    return f"{file.relative_to(folder)}: bit of byte {place} in the header"


# Tensors


def change(tensors: dict[str, torch.Tensor], pick: Chooser) -> str:
    """Damage one tensor, in place."""
    name = pick.choose(sorted(tensors))
    tensor = tensors[name]
    kind = pick.choose(["drop", "dtype", "shape", "rename", "add", "number", "index", "empty"])
    if kind == "drop":
        del tensors[name]
    elif kind == "dtype":
        tensors[name] = tensor.to(pick.choose(DTYPES))
        kind = f"as {tensors[name].dtype}"
    elif kind == "shape":
        wide = tensor.repeat([2] * tensor.ndim or [2])
        tensors[name] = pick.choose([tensor[None].clone(), wide, torch.zeros(3, 5, 7)])
    elif kind == "rename":
        tensors[f"{name}x"] = tensors.pop(name)
    elif kind == "add":
        tensors["decoder.extra.weight"] = torch.zeros(3)
    elif kind == "index":
        tensors[f"{name}.999999999.weight"] = torch.zeros(3)
    elif kind == "empty":
        tensors[name] = tensor.new_zeros(0)
    elif tensor.is_floating_point() and tensor.numel():
        number = pick.choose([float("nan"), float("inf"), -float("inf")])
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[pick.integer(0, tensor.numel() - 1)] = number
        kind = f"{number}"
    return f"{name} {kind}"


def tensor_of_a_folder(folder: Path, pick: Chooser) -> str:
    file = pick.choose(sorted(folder.rglob("*.safetensors")))
    tensors = load_file(file)
    done = change(tensors, pick)
    save_file(tensors, file)
    return f"{file.relative_to(folder)}: {done}"


def tensor_of_a_pickle(path: Path, pick: Chooser) -> str:
    content = torch.load(path, weights_only=True)
    done = change(content["state_dict"], pick)
    torch.save(content, path)
    return done


def lost_layer(path: Path, pick: Chooser) -> str:
    """Of one of the copies of an encoder, or of the UNet, the last layer is gone."""
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    marks = ["cond_stage_models.0.cond_stage_models.1.model.encoder.block.1.",
             "cond_stage_models.1.model.encoder.block.1.", "clap.model.text_branch.encoder.layer.1.",
             "cond_stage_models.0.cond_stage_models.0.model.audio_branch.layers.1.blocks.1.",
             "cond_stage_models.0.cond_stage_models.0.model.text_branch.encoder.layer.1.",
             "model.diffusion_model.output_blocks.", "first_stage_model.decoder.up.0."]
    mark = pick.choose(marks)
    content["state_dict"] = {name: tensor for name, tensor in state.items() if not name.startswith(mark)}
    torch.save(content, path)
    return f"without {mark}*"


# Archives


def flipped_archive(path: Path, pick: Chooser) -> str:
    """A bit outside of the tensors' bytes."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        headers = [(entry.header_offset, entry.header_offset + 30 + len(entry.filename)) for entry in entries]
        pickles = [e.header_offset for e in entries if e.filename.endswith(("data.pkl", "byteorder", "version"))]
        tail = archive.start_dir
    low, high = pick.choose([*headers, (tail, len(content) - 1), *[(start + 64, start + 90) for start in pickles]])
    place = min(pick.integer(low, high), len(content) - 1)
    content[place] ^= 1 << pick.integer(0, 7)
    path.write_bytes(content)
    return f"bit of byte {place} of {len(content)}"


def packed_anew(path: Path, pick: Chooser) -> str:
    """Records compressed, cut, or lost, with tables that agree."""
    with zipfile.ZipFile(path) as archive:
        records = [[entry.filename, archive.read(entry), zipfile.ZIP_STORED] for entry in archive.infolist()]
    data = [record for record in records if "/data/" in record[0] and record[1]]
    record = pick.choose(data)
    kind = pick.choose(["compressed", "cut", "lost", "longer", "all compressed"])
    if kind == "compressed":
        record[2] = zipfile.ZIP_DEFLATED
    elif kind == "cut":
        record[1] = record[1][: -pick.integer(1, len(record[1]))]
    elif kind == "longer":
        record[1] += b"\x00" * 4
    elif kind == "lost":
        records.remove(record)
    else:
        for each in records:
            each[2] = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w") as archive:
        for name, content, method in records:
            archive.writestr(name, content, method)
    return f"{record[0]} {kind}"


FOLDER: tuple[Damage, ...] = (
    wrong_field, wrong_field, wrong_field, missing_field, foreign_class, truncated, replaced, removed, flipped_header,
    tensor_of_a_folder, tensor_of_a_folder,
)
AUTHORS: tuple[Damage, ...] = (
    tensor_of_a_pickle, tensor_of_a_pickle, lost_layer, truncated, replaced, flipped_archive, packed_anew,
)

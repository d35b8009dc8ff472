"""A checkpoint of any kind -> a folder in the published layout, in safetensors.

    convert("audioldm2-full.pth", "audioldm2-full")             # an authors' file
    convert("anhnct/audioldm2_ljspeech", "ljspeech")            # pickles in the hub's layout

The UNet's config lists the heads of each level, so that ldm2 and diffusers compute the function that was trained. The
folder grows as FOLDER.partial, part by part, and gets its name when it is complete: a second call takes up what a first
one left.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm2.checkpoints import hub, hub_folder, int8, known, reading
from ldm2.checkpoints.adapter import Adapter, combined
from ldm2.checkpoints.build import config_of
from ldm2.checkpoints.lora_files import find
from ldm2.checkpoints.original import configuration
from ldm2.checkpoints.parts import Checkpoint, Part
from ldm2.checkpoints.writer import write_safetensors
from ldm2.config import UNetConfig
from ldm2.fields import check_folder, read_json
from ldm2.ops import dense
from ldm2.option_kinds import loras
from ldm2.options import check_flag
from ldm2.runtime.device import DTYPES, W8A8, dtype_name
from ldm2.text.tokenizers import SOURCES, save_tokenizer

JOB = "conversion.json"                                    # in FOLDER.partial: what it is made from

# Library and class of each part, in the words of model_index.json. GPT-2 is published as GPT2Model, with which
# diffusers' pipeline fails in transformers 5; the class with a word head computes the same vectors.
CLASSES = {
    "unet": ("audioldm2", "AudioLDM2UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "vocoder": ("transformers", "SpeechT5HifiGan"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "text_encoder": ("transformers", "ClapModel"),
    "projection_model": ("audioldm2", "AudioLDM2ProjectionModel"),
    "language_model": ("transformers", "GPT2LMHeadModel"),
}
TEXT_ENCODERS_2 = {"t5": ("transformers", "T5EncoderModel"), "vits": ("transformers", "VitsModel")}
DIFFUSERS_PARTS = ("unet", "vae", "projection_model")      # whose weights have diffusers' file name


@dataclass(frozen=True)
class Converted:
    """A finished conversion: the folder, and what its user must know of the licence and of what is missing."""

    folder: Path
    notice: str


def convert(
    source: str | Path,
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    tokenizers: str | Path | None = None,
    reference: str = "authors",
    revision: str | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    lora: Sequence[Any] = (),
) -> Converted:
    """Write the checkpoint `source` as a folder in the published layout.

    source:     an authors' file, a folder in the hub's layout, or a name that `ldm2.load` knows
    folder:     where to; must not exist, unless `overwrite` and it is a checkpoint, which is replaced at the end
    dtype:      "float32", "float16", "bfloat16" or "int8" (large weights; the others become float32); None keeps what
                the source has
    config, tokenizers: as in `ldm2.original.components`, for authors' files
    reference:  what a single number of heads in a hub folder means: "authors" heads of 32 channels, as trained;
                "diffusers" that number at each level
    revision:   branch, tag or commit on the hub
    local_files_only: use the hub's cache and never the network
    variant:    word in the names of the weight files to read, such as "fp16"
    lora:       LoRAs to merge into the weights, each "FILE", "FILE:SCALE" or (file, scale)

    Raises ValueError or OSError, one line; what is complete by then is kept in FOLDER.partial for the next call.
    """
    dtype = _dtype(dtype)
    path = hub.resolve(source, revision, local_files_only, variant=variant)
    folder = hub.home(str(folder)).absolute()
    _check_target(folder, path, overwrite)
    if path.is_dir() and (config is not None or tokenizers is not None):
        raise ValueError(f"config and tokenizers belong to authors' files, {path} is a folder that has its own")
    partial = folder.with_name(f"{folder.name}.partial")
    lacking: list[str] = []
    with hub.opened(path, source):
        checkpoint = reading.read(path, variant=variant, config=config)
        adapters, digests = _adapters(lora, checkpoint)
        _begin(partial, _job(path, dtype, config, reference, variant) | {"lora": digests})
        if path.is_file() and "unet" not in checkpoint:
            raise ValueError(f"the file holds no UNet, only {', '.join(checkpoint)}: nothing to make a checkpoint of")
        for name in checkpoint:
            _write_part(partial, name, checkpoint, reference, dtype, adapters)
        if path.is_dir():
            index = _copy_rest(path, partial)
        else:
            index, lacking = _write_rest(checkpoint, partial, tokenizers, local_files_only)
    licence = license_of(source, path)
    _write_readme(partial, path, licence, dtype)
    _write_json(partial / "model_index.json", index)
    _finish(partial, folder)
    return Converted(folder, " ".join([*license_notice(licence), *lacking]))


def _adapters(lora: Sequence[Any], checkpoint: Checkpoint) -> tuple[list[tuple[Adapter, float]], list[list[Any]]]:
    """The LoRAs to merge with their scales, held against the checkpoint, and their digests. Raises ValueError."""
    adapters, digests = [], []
    for word, scale, *_ in loras().check("lora", lora):
        file = find(word, checkpoint.loras)
        adapter = file.read()
        for part in adapter.parts:
            if part not in checkpoint:
                raise ValueError(f"{adapter.source} is a LoRA of another model: this one has no {part}")
            adapter.fitted(part, checkpoint[part].tensors)
        adapters.append((adapter, scale))
        digests.append([file.digest(), scale])
    return adapters, digests


def license_notice(licence: str | None) -> list[str]:
    """What a licence tag means for the converted files, in sentences."""
    if licence is None:
        return ["The licence of the source is not known here: look it up before you share the folder."]
    sentences = [f"The licence of the source, {licence}, holds for the folder too."]
    tag = licence.lower()
    if "-nd" in tag:
        sentences.append("It forbids sharing adaptations: do not redistribute this folder.")
    if "-nc" in tag:
        sentences.append("It forbids commercial use.")
    if "openrail" in tag:
        sentences.append("The authors publish the model for non-commercial use: the stricter terms count.")
    return sentences


# What a file lacks, and what a folder has beside its parts


def _write_rest(
    checkpoint: Checkpoint, partial: Path, tokenizers: str | Path | None, local_files_only: bool
) -> tuple[dict[str, Any], list[str]]:
    """Write what an authors' file lacks. Returns the model_index.json, and a sentence for each tokenizer that could
    not be had."""
    index: dict[str, Any] = {"_class_name": "AudioLDM2Pipeline"}
    lacking = []
    for name, part in checkpoint.items():
        index[name] = list(CLASSES.get(name) or TEXT_ENCODERS_2[part.fields["model_type"]])
    if checkpoint.extractor is not None:
        checkpoint.extractor().save_pretrained(partial / "feature_extractor")
        index["feature_extractor"] = ["transformers", "ClapFeatureExtractor"]
    for encoder in _encoders(checkpoint):
        place = SOURCES[encoder]
        index[place.folder] = ["transformers", place.kind]
        try:
            save_tokenizer(encoder, tokenizers, local_files_only, partial / place.folder)
        except OSError as error:
            lacking.append(f"It lacks {place.folder}/ ({error}).")
    return dict(sorted(index.items())), lacking


def _encoders(checkpoint: Checkpoint) -> Iterator[str]:
    """The encoders of a checkpoint that need a tokenizer."""
    if "text_encoder" in checkpoint:
        yield "clap"
    if "text_encoder_2" in checkpoint:
        yield {"t5": "t5", "vits": "phonemes"}[checkpoint["text_encoder_2"].fields["model_type"]]


def _copy_rest(path: Path, partial: Path) -> dict[str, Any]:
    """Copy what a folder has beside its parts. Returns the model_index.json."""
    kept = [file for file in _files(path) if file.name.upper().startswith(("README", "LICENSE", "NOTICE", "LDM2.JSON"))]
    for file in [*kept, *_files_of_loras(path)]:
        target = partial / file.relative_to(path)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    index = read_json(path / "model_index.json")
    if index.get("language_model") == ["transformers", "GPT2Model"]:
        index["language_model"] = list(CLASSES["language_model"])
    return index


def _files_of_loras(path: Path) -> list[Path]:
    """The LoRAs that a folder brings."""
    folder = path / "lora"
    return [file for file in _files(folder) if file.suffix == ".safetensors"] if folder.is_dir() else []


def _files(folder: Path) -> list[Path]:
    """The files in a folder, by their names.

    Raises ValueError for a link that leads out of the checkpoint: what it points to would be copied. In the hub's cache
    every file is a link into the folder of its repository.
    """
    check_folder(folder)
    whole = folder if (folder / "model_index.json").exists() else folder.parent
    root = whole.resolve()
    if root.parent.name == "snapshots":
        root = root.parents[1]
    for file in (folder, *folder.iterdir()):
        if root not in (target := file.resolve(), *target.parents):
            raise ValueError(f"{file} is a link to {target}, outside of the checkpoint: not converted")
    return sorted(file for file in folder.iterdir() if file.is_file())


def _heads(config: UNetConfig) -> list[int]:
    """Heads of each level; a level without attention, whose number nobody uses, counts heads of 32 channels."""
    return [
        heads if heads is not None else max(channels // 32, 1)
        for heads, channels in zip(config.num_heads, config.channels, strict=True)
    ]


# Writing


def _write_part(
    partial: Path, name: str, checkpoint: Checkpoint, reference: str, dtype: torch.dtype | None,
    adapters: Sequence[tuple[Adapter, float]],
) -> None:
    """Write one part unless it is there: the config goes last, so a part that has one is complete."""
    part, folder = checkpoint[name], partial / name
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = [] if part.folder is None else _files(part.folder)
    tensors = _published(part)
    if not tensors:
        for file in files:
            shutil.copyfile(file, folder / file.name)
        if part.folder is None:
            _write_json(folder / f"{name}_config.json", part.fields)
        return
    kind = dtype if dtype is not None and dtype.is_floating_point else None
    tensors |= combined(tensors, name, [pair for pair in adapters if name in pair[0].parts], kind)
    fields = _fields(name, checkpoint, reference)
    for file in files:
        if file.suffix in hub_folder.SMALL and ".index." not in file.name and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    stem = "diffusion_pytorch_model" if name in DIFFUSERS_PARTS else "model"
    _write_tensors(folder / f"{stem}.safetensors", tensors, dtype, part.source)
    stored = _stored_dtype(tensors, dtype)
    fields.pop("torch_dtype", None)
    fields.pop(int8.FIELD, None)
    if name not in DIFFUSERS_PARTS or stored == "int8":
        fields[int8.FIELD] = stored
    _write_json(folder / "config.json", fields)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, source: str) -> None:
    """Write the tensors of a part in `dtype`, None as they are. Raises ValueError for damaged int8 weights."""
    held = int8.paired(tensors, source)
    if dtype == torch.int8:
        write_safetensors(path, int8.quantized(tensors), torch.float32)
    elif dtype is None:
        write_safetensors(path, tensors)
    else:
        write_safetensors(path, {name: dense(weight, torch.float32) for name, weight in held.items()}, dtype)


def _published(part: Part) -> dict[str, Tensor]:
    """The tensors of a part under the names that published folders have."""
    tensors = dict(part.tensors)
    if "shared.weight" in tensors:
        tensors.pop("encoder.embed_tokens.weight", None)   # T5's table under its second name
    if part.folder is None and part.fields.get("model_type") == "vits":          # there inside of a VitsModel
        tensors = {f"text_encoder.{name}": tensor for name, tensor in tensors.items()}
    return tensors


def _fields(name: str, checkpoint: Checkpoint, reference: str) -> dict[str, Any]:
    """The config.json of a part, saying what the authors' own code computes."""
    part = checkpoint[name]
    fields = dict(part.fields)
    if part.folder is None:
        return fields
    if name == "unet":
        heads = _heads(config_of(part, name, reference))
        fields |= {"attention_head_dim": heads, "num_attention_heads": None}     # the second is refused by diffusers
    is_speech_model = "text_encoder_2" in checkpoint and checkpoint["text_encoder_2"].fields.get("model_type") == "vits"
    if name == "language_model" and fields.get("max_new_tokens") == 8 and is_speech_model:
        fields["max_new_tokens"] = 512                     # as the authors generate; see TextEncoder
    return fields


def _stored_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> str:
    kinds = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point() or tensor.dtype == torch.int8]
    stored = dtype or (torch.int8 if torch.int8 in kinds else kinds[0])
    return dtype_name(stored)


def _check_target(folder: Path, source: Path, overwrite: bool) -> None:
    """Raise ValueError or OSError if `folder` may not be written."""
    if folder.is_symlink() or folder.with_name(f"{folder.name}.partial").is_symlink():
        raise ValueError(f"{folder} or its .partial is a link: write to a folder")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder.parent} is not a folder")
    here = source.resolve()
    if folder.resolve() == here or folder.resolve() in here.parents:
        raise ValueError(f"{folder} holds the source: write to another folder")
    if folder.exists():
        if not check_flag("overwrite", overwrite):
            raise FileExistsError(f"{folder} exists: choose another name, or --overwrite")
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} is not a checkpoint, it is not overwritten")


def _job(
    path: Path, dtype: torch.dtype | None, config: Any, reference: str, variant: str | None
) -> dict[str, Any]:
    """What the parts are made from: only a conversion of the same may take them up."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stamps = [[str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {
        "source": str(path.resolve()), "files": stamps, "dtype": str(dtype), "reference": reference,
        "config": repr(configuration.read(config)), "variant": variant,
    }


def _begin(partial: Path, job: dict[str, Any]) -> None:
    """An empty folder for the parts, or that of an earlier call if it did the same."""
    path = partial / JOB
    if partial.exists() and not (path.is_file() and read_json(path) == job):
        if any(partial.iterdir()) and not path.is_file():
            raise ValueError(f"{partial} is in the way, and no conversion made it")
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    _write_json(path, job)


def _finish(partial: Path, folder: Path) -> None:
    """Give the folder its name; an older one of that name goes when this one is in its place."""
    if folder.exists():
        os.replace(folder, folder.with_name(f"{folder.name}.old-{os.getpid()}"))
    os.replace(partial, folder)
    (folder / JOB).unlink()                                # not before: a call that was stopped here goes on with it
    for old in folder.parent.glob(f"{glob.escape(folder.name)}.old-*"):
        shutil.rmtree(old, ignore_errors=True)


# Licence


def license_of(source: str | Path, path: Path) -> str | None:
    """The licence tag of the source: what its README says, else the table of models; None if neither knows it."""
    readme = path / "README.md"
    if readme.is_file():
        for line in readme.read_text(encoding="utf-8", errors="replace").partition("\n---")[0].splitlines():
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()
    model = known.find(str(source)) or next((model for model in known.MODELS if model.file == path.name), None)
    return None if model is None else model.license


def _write_readme(partial: Path, path: Path, licence: str | None, dtype: torch.dtype | None) -> None:
    """A README with the licence, for sources that bring none."""
    readme = partial / "README.md"
    if readme.is_file():
        return
    head = "" if licence is None else f"---\nlicense: {licence.lower()}\n---\n\n"
    precision = "" if dtype is None else f" in {dtype_name(dtype)}"
    text = f"Converted from {path.name} by ldm2{precision}, in the layout of diffusers."
    readme.write_text(f"{head}{' '.join([text, *license_notice(licence)])}\n", encoding="utf-8")


# JSON and dtypes


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype
    if dtype == W8A8:
        raise ValueError(f"{W8A8} is how int8 weights are computed with: convert to int8, and load that as {W8A8}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}, choose from {', '.join(DTYPES)}")
    return DTYPES[dtype]

"""The files of a checkpoint in the hub's layout: its parts, their weights, which of all are needed. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ldm2.fields import check_folder, one_line, read_json, short
from ldm2.schedules import CLASSES as SCHEDULERS

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SUFFIXES = (".safetensors", ".bin")                        # in order of preference
WITHOUT_WEIGHTS = re.compile(r".*(Scheduler|Tokenizer|TokenizerFast|FeatureExtractor|Processor)")
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
SMALL = (".json", ".txt", ".model")                        # configs and tokenizers
PIPELINES = ("AudioLDM2Pipeline", "AudioLDMPipeline", "MusicLDMPipeline")
# What each part may be, by the class names of model_index.json; parts of other names are nothing that sound is made of.
CLASSES = {
    "unet": re.compile(r"AudioLDM2UNet2DConditionModel|UNet2DConditionModel"),
    "vae": re.compile(r"AutoencoderKL"),
    "vocoder": re.compile(r"SpeechT5HifiGan"),
    "scheduler": re.compile(rf"{'|'.join(SCHEDULERS)}"),
    "text_encoder": re.compile(r"ClapModel|ClapTextModelWithProjection"),
    "text_encoder_2": re.compile(r"T5EncoderModel|T5ForConditionalGeneration|VitsModel"),
    "projection_model": re.compile(r"AudioLDM2ProjectionModel"),
    "language_model": re.compile(r"GPT2Model|GPT2LMHeadModel"),
    "tokenizer": re.compile(r"(Roberta|PreTrained)Tokenizer(Fast)?|TokenizersBackend"),
    "tokenizer_2": re.compile(r"(T5|Vits|PreTrained)Tokenizer(Fast)?|TokenizersBackend"),
    "feature_extractor": re.compile(r"ClapFeatureExtractor|ClapProcessor"),
}
_PLAIN_NAME = re.compile(r"\w[\w-]{0,99}", re.ASCII)
_PLAIN_FILE = re.compile(r"\w[\w.-]{0,199}", re.ASCII)


def weight_files(folder: str | Path, variant: str | None = None) -> list[Path]:
    """Weight files of one part of a checkpoint, safetensors before pickles, shards in the order of their index.

    `variant` is the word in names such as model.fp16.safetensors; a part without such a file gives its plain one.
    Raises ValueError if there is none of both, if a shard is missing, or if the index cannot be read.
    """
    folder = Path(folder)
    check_folder(folder)
    names = [path.name for path in folder.iterdir()]
    chosen = choose_weights(names, variant)
    if not chosen:
        wanted = " or ".join(f"{stem}{_infix(variant)}.safetensors" for stem in STEMS[:2])
        found = ", ".join(sorted(names)) or "nothing"
        others = variants(names)
        hint = f"; load its variant {others[0]!r}" if others else ""
        raise ValueError(f"{folder} holds no weights: expected {wanted} (or .bin), found {found}{hint}")
    if chosen[0].endswith(".json"):
        return _shards(folder / chosen[0])
    return [folder / chosen[0]]


def choose_weights(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Of the file names in one folder those of its weights, each tensor once: one file, or an index and its shards.

    Those of the variant, or the plain ones where it has none.
    """
    names, infix = sorted(names), _infix(variant)
    for suffix in SUFFIXES:
        for stem in STEMS:
            if f"{stem}{infix}{suffix}" in names:
                return [f"{stem}{infix}{suffix}"]
            index = f"{stem}{suffix}.index{infix}.json"
            if index in names:
                # The variant stands before or after the number, depending on the version that wrote the shards.
                shard = re.compile(rf"{stem}({re.escape(infix)})?-\d+-of-\d+({re.escape(infix)})?{re.escape(suffix)}")
                return [index, *filter(shard.fullmatch, names)]
    return choose_weights(names) if variant else []


def variants(names: Iterable[str]) -> list[str]:
    """The variants of which there are weights under these file names, in their order: "fp16" of model.fp16.bin."""
    stems, suffixes = "|".join(STEMS), "|".join(map(re.escape, SUFFIXES))
    pattern = re.compile(rf"(?:{stems})(?:\.([\w-]+)(?:{suffixes})|(?:{suffixes})\.index\.([\w-]+)\.json)")
    found = (match.group(1) or match.group(2) for match in map(pattern.fullmatch, sorted(names)) if match)
    return list(dict.fromkeys(found))


def _infix(variant: str | None) -> str:
    return f".{variant}" if variant else ""


def _shards(index: Path) -> list[Path]:
    """Files named by `*.index.json`, each once."""
    try:
        table = read_json(index).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{index} is not an index of weight files ({one_line(error)})") from error
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"{index} is not an index of weight files: it needs an object 'weight_map'")
    paths = [index.parent / name for name in dict.fromkeys(table.values())]
    for path in paths:
        if not _PLAIN_FILE.fullmatch(path.name) or path.parent != index.parent:
            raise ValueError(f"{index} names {path}, which is outside its folder")
        if not path.is_file():
            raise ValueError(f"{path} is missing: {index.name} names it as one of {len(paths)} shards")
    return paths


def parts(folder: str | Path) -> dict[str, str]:
    """Parts of a checkpoint and their class names, after its model_index.json. Raises ValueError if that is not one."""
    path = Path(folder) / "model_index.json"
    if not path.exists():
        raise ValueError(f"{path.parent} has no model_index.json: not a checkpoint in the hub's layout")
    index = read_json(path)
    kind = index.get("_class_name", PIPELINES[0])
    if kind not in PIPELINES:
        raise ValueError(f"{path}: _class_name must be one of {', '.join(PIPELINES)}, got {short(kind)}")
    kinds = {}
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list) and entry != [None, None]:
            if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
                raise ValueError(f"{path}: {short(name)} must be a list of library and class, got {short(entry)}")
            if not _PLAIN_NAME.fullmatch(name):
                raise ValueError(f"{path}: {short(name)} is not the name of a folder in it")
            if name in CLASSES and not CLASSES[name].fullmatch(entry[1]):
                raise ValueError(f"{path}: ldm2 has no {entry[1][:80]!r} for the part {name}")
            kinds[name] = entry[1]
    return kinds


def missing(folder: str | Path, variant: str | None = None) -> str | None:
    """The first thing that a checkpoint lacks, in words; None if it is complete."""
    try:
        kinds = parts(folder)
        if variant and not has_variant(Path(folder), variant):
            return f"weights of the variant {variant!r}"
        for name, kind in kinds.items():
            part = Path(folder) / name
            if not any(part.glob("*.json")):
                return f"{name}/"
            if not WITHOUT_WEIGHTS.fullmatch(kind):
                weight_files(part, variant)
            elif "Tokenizer" in kind and not any((part / vocabulary).is_file() for vocabulary in VOCABULARIES):
                return f"the vocabulary of {name}/"
    except ValueError as error:
        return str(error)
    return None


def has_variant(folder: Path, variant: str) -> bool:
    """Whether any part of a checkpoint has weights of this variant."""
    return any(variant in variants(path.name for path in (folder / name).glob("*")) for name in parts(folder))


def needed(files: Iterable[str], kinds: dict[str, str], variant: str | None = None) -> tuple[list[str], list[str]]:
    """Of the paths in a repository those that a checkpoint of these parts needs: (small files, weights).

    `kinds`: class name of each part. No duplicates in other formats or precisions, nothing of other folders.
    """
    small, weights = ["model_index.json", "ldm2.json"], []
    for part, kind in kinds.items():
        names = [path.removeprefix(f"{part}/") for path in files if path.startswith(f"{part}/")]
        names = [name for name in names if "/" not in name]
        small += [f"{part}/{name}" for name in names if name.endswith(SMALL) and ".index." not in name]
        if not WITHOUT_WEIGHTS.fullmatch(kind):
            weights += [f"{part}/{name}" for name in choose_weights(names, variant)]
    return small, weights

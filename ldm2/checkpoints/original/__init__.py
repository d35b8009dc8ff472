"""The authors' checkpoints: one `.pth` file that holds everything, read directly.

    parts = original.components("audioldm2-full.pth")
    parts.unet, parts.vae, parts.vocoder, parts.text, parts.scale_factor

Read are the published files, those of AudioLDM 1, and checkpoints of the authors' own training code. As the authors do,
the raw weights of the UNet are run, not their moving average (model_ema). The file is memory-mapped and no tensor is
copied: what the parts do not use (the moving average, optimizer, losses, AudioMAE, a second CLAP and T5) is never read
from disk. `read` gives each part as a published hub folder would hold it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm2 import weights
from ldm2.checkpoints import build
from ldm2.checkpoints.original import configs as configs
from ldm2.checkpoints.original import configuration
from ldm2.checkpoints.original import keys as keys
from ldm2.checkpoints.parts import Checkpoint, Part
from ldm2.fields import few, named
from ldm2.schedules import Schedule
from ldm2.text.encoder import TextEncoder
from ldm2.text.encoders import ClapText
from ldm2.text.ranking import Ranker, published_extractor
from ldm2.text.tokenizers import tokenizer
from ldm2.unet import UNet
from ldm2.vae import VAE
from ldm2.vocoder import Vocoder

EXPECTED = "an authors' checkpoint with names such as model.diffusion_model.*, first_stage_model.*, cond_stage_models.*"

_UNET = "model.diffusion_model."
_VOCODER = "first_stage_model.vocoder."
_VAE = "first_stage_model."
_AVERAGE = "model_ema.diffusion_model"                     # of the UNet, its names without dots
_FAR = re.compile(r"\.\d{4,}(?:\.|$)")                    # a number in a name that no layer of any model has
MOST_TENSORS = 100_000
_TABLES = re.compile(r"(?:.*\.)?(?:position_ids|token_type_ids|attn_mask|embed_tokens\.weight)|mel_transform\..*")
_RANKING = "clap."                                         # CLAP once more, to rank candidates with
_STAGE = re.compile(r"(cond_stage_models\.\d+\.(?:cond_stage_models\.\d+\.)?|cond_stage_model\.).*")

# What a stage of the conditioning is, told by one of its names: its number means something else in each variant.
_KINDS = {
    "gpt2": r"model\.wte\.weight",
    "clap": r"model\.text_branch\..*",
    "t5": r"model\.encoder\.block\..*",
    "phonemes": r"text_encoder\.emb\.weight",
}

_TEXT = {"text_encoder", "text_encoder_2", "language_model"}

Tensors = dict[str, Tensor]
Contents = dict[str, tuple[dict[str, Any], Tensors]]       # of each part the fields of its config.json, and its tensors


@dataclass(frozen=True)
class Components:
    """The parts of one file as loaded modules; None for what the file does not hold.

    scale_factor: scaled latents = scale_factor * VAE latents; None without VAE.
    text: the text encoders that the file holds, without CLAP's audio branch, which is in parts["text_encoder"].
    schedule: the noise schedule of the training.
    parts: the same (and what else was kept) as fields and tensors, by the names of a hub folder.
    """

    unet: UNet | None
    vae: VAE | None
    vocoder: Vocoder | None
    text: TextEncoder | None
    scale_factor: float | None
    schedule: Schedule
    parts: Checkpoint


def components(
    path: str | Path,
    config: Mapping[str, Any] | str | Path | None = None,
    *,
    tokenizers: str | Path | None = None,
    reference: str = "authors",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    local_files_only: bool = False,
) -> Components:
    """The parts of an authors' checkpoint, loaded.

    path:       the `.pth` or `.ckpt` file (or the same tensors as safetensors)
    config:     the authors' configuration: a mapping, or a YAML or JSON file. Without it, the variant is recognised
                from names and shapes, and the UNet has heads of 32 channels, as all seven published checkpoints do.
    tokenizers: folder with the sub-folders `tokenizer` and `tokenizer_2`; None takes them from their own hub
                repositories when the first prompt is encoded
    reference:  "authors" or "diffusers", for the text side; the heads of the UNet are those of the file in both
    device, dtype: where the parts go and in which precision; None leaves the tensors mapped in the file
    local_files_only: take tokenizers from the hub's cache and never from the network

    Raises ValueError, one line, for a file that is not such a checkpoint, or not complete, or holds anything unknown.
    """
    parts = read(path, config, tokenizers=tokenizers, local_files_only=local_files_only)
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    models = {name: build.model(parts[name], name, **where) if name in parts else None for name in build.MODELS}
    text = build.text_encoder(parts, reference, whole=False, **where) if _TEXT & parts.keys() else None
    scale_factor = parts["vae"].fields["scaling_factor"] if "vae" in parts else None
    scheduler = parts["scheduler"]
    schedule = Schedule.from_dict(scheduler.fields, scheduler.config)
    return Components(**models, text=text, scale_factor=scale_factor, schedule=schedule, parts=parts)


def ranker(
    parts: Checkpoint, text: ClapText | None = None, *, tokenizers: str | Path | None = None,
    device: torch.device | str | None = None, local_files_only: bool = False,
) -> Ranker:
    """What ranks candidates, from the CLAP of a file. Raises ValueError if it holds none.

    parts: those of `Components`; text: its text branch if that is loaded, else it is loaded here; the rest as for
    `components`.
    """
    words = partial(tokenizer, folder=tokenizers, local_files_only=local_files_only)
    return build.ranker(replace(parts, tokenizer=words), text, device=device)


def read(
    path: str | Path, config: Mapping[str, Any] | str | Path | None = None, *, tokenizers: str | Path | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """The parts of an authors' checkpoint by the names of a hub folder: `unet`, `vae`, `vocoder`, `text_encoder`
    (CLAP), `text_encoder_2` (T5 or phonemes), `projection_model`, `language_model` (GPT-2), and `scheduler` without
    tensors.

    Each tensor of the file is used in exactly one part, or dropped by one of the tables in `keys`, or belongs
    to the second copy of an encoder. Raises ValueError, one line, as `components` does.
    """
    parts = split(_open(path), configuration.read(config), str(path))
    words = partial(tokenizer, folder=tokenizers, local_files_only=local_files_only)
    extractor = published_extractor if "text_encoder" in parts else None
    return Checkpoint(str(path), parts, words, extractor)


def split(tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> dict[str, Part]:
    """The parts, as in `read`, from the tensors of a file; `source` is its name, for errors."""
    with named(source):
        groups = _groups(tensors, source)
        _check_average(tensors, groups, source)
        try:
            contents = _models(groups, config, source) | _texts(groups, source)
        except KeyError as error:
            raise ValueError(f"{source} is not complete: {error.args[0]} is missing") from error
        if "unet" in contents:
            configs.check_layers({name: fields for name, (fields, _) in contents.items()}, source)
        contents["scheduler"] = (configs.scheduler(config, tensors.get("betas"), source), {})
    return {name: Part.of(f"{source}: {name}", *content) for name, content in contents.items()}


def _open(path: str | Path) -> Tensors:
    """All tensors of the file, memory-mapped. Raises ValueError that says what was found and what was expected."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, expected a file: {EXPECTED}")
    try:
        return dict(weights.read_tensors(path))
    except ValueError as error:
        raise ValueError(f"{error}; expected {EXPECTED}") from error


def _groups(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensors]:
    """Tensors by the prefix of their names, which is cut off. Raises ValueError for a prefix that is not known."""
    if len(tensors) > MOST_TENSORS:
        raise ValueError(f"{source} holds {len(tensors)} tensors, at most {MOST_TENSORS} make sense")
    dropped = re.compile("|".join(keys.DROPPED))
    groups: dict[str, Tensors] = {}
    unknown = []
    for name, tensor in tensors.items():
        if name == "scale_factor":
            groups[name] = {name: tensor}
        elif not dropped.fullmatch(name):
            stage = _STAGE.fullmatch(name)
            known = (_UNET, _VOCODER, _VAE, _RANKING)
            prefix = stage[1] if stage else next((prefix for prefix in known if name.startswith(prefix)), None)
            if prefix is None or _FAR.search(name):
                unknown.append(name)
            else:
                groups.setdefault(prefix, {})[name.removeprefix(prefix)] = tensor
    if not groups:
        kind = "a LoRA" if any("lora" in name.lower() for name in tensors) else "no checkpoint of the authors"
        raise ValueError(f"{source} is {kind}: found {len(tensors)} tensors ({few(tensors)}), expected {EXPECTED}")
    if unknown:
        raise ValueError(f"{source} holds {len(unknown)} unknown tensors ({few(unknown)}), expected {EXPECTED}")
    return groups


def _check_average(tensors: Mapping[str, Tensor], groups: Mapping[str, Tensors], source: str) -> None:
    """Raise ValueError if the moving average has tensors that the UNet, which is run, has lost."""
    there = {name.replace(".", "") for name in groups.get(_UNET, ())}
    lost = [name for name in tensors if name.startswith(_AVERAGE) and name.removeprefix(_AVERAGE) not in there]
    if there and lost:
        raise ValueError(f"{source} is not complete: its UNet lacks what {few(lost)} is the moving average of")


def _models(groups: Mapping[str, Tensors], config: Mapping[str, Any], source: str) -> Contents:
    """UNet, VAE and vocoder."""
    parts: Contents = {}
    vae = keys.vae(groups.get(_VAE, {}), source)
    if _UNET in groups:
        tensors = keys.unet(groups[_UNET], source)
        parts["unet"] = (configs.unet(tensors, config, configs.latent_frames(vae)), tensors)
    if vae:
        parts["vae"] = (configs.vae(vae, _scale_factor(groups, config, source)), vae)
    if _VOCODER in groups:
        tensors = keys.vocoder(groups[_VOCODER], source)
        parts["vocoder"] = (configs.vocoder(tensors, config, source), tensors)
    return parts


def _scale_factor(groups: Mapping[str, Tensors], config: Mapping[str, Any], source: str) -> float:
    if "scale_factor" not in groups and "scale_factor" not in config:
        raise ValueError(f"{source} holds a VAE but no scale_factor: pass the authors' configuration (config=) with it")
    value = groups["scale_factor"]["scale_factor"] if "scale_factor" in groups else config["scale_factor"]
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        found = f"of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else repr(value)[:100]
        raise ValueError(f"{source}: scale_factor must be one positive number, got {found}")
    return float(value)


def _texts(groups: Mapping[str, Tensors], source: str) -> Contents:
    """The text encoders. A CLAP that conditions goes before the one that only ranks; two T5s must be the same."""
    stages = _stages(groups, source)
    parts: Contents = {}
    projection: Tensors = {}
    places = None
    claps = stages["clap"] + ([groups[_RANKING]] if _RANKING in groups else [])
    _check_names(claps, source, "CLAPs")
    if claps:
        tensors = keys.clap(_inside(claps[0], "model."), source)
        parts["text_encoder"] = (configs.clap(tensors), tensors)
    if stages["t5"]:
        _check_copies(stages["t5"], source)
        tensors = weights.rename(_inside(stages["t5"][0], "model."), keys.T5, source=source)
        parts["text_encoder_2"] = (configs.t5(tensors), tensors)
    for stage in stages["phonemes"]:
        tensors = keys.phonemes(_inside(stage, "text_encoder."), source)
        parts["text_encoder_2"] = (configs.vits(tensors), tensors)
        projection |= _outside(stage, "text_encoder.")
        places = projection["learnable_positional_embedding"].shape[2]
    for stage in stages["gpt2"]:
        tensors = weights.rename(_inside(stage, "model."), keys.GPT2, source=source)
        parts["language_model"] = (configs.gpt2(tensors, places), tensors)
        projection |= _outside(stage, "model.")
    if projection:
        tensors = keys.projection(projection, source)
        parts["projection_model"] = (configs.projection(tensors), tensors)
    return parts


def _stages(groups: Mapping[str, Tensors], source: str) -> dict[str, list[Tensors]]:
    """The stages of the conditioning by their kind."""
    stages: dict[str, list[Tensors]] = {kind: [] for kind in _KINDS}
    for prefix, tensors in groups.items():
        if _STAGE.fullmatch(prefix):
            kinds = [kind for kind, pattern in _KINDS.items() if any(re.fullmatch(pattern, name) for name in tensors)]
            if len(kinds) != 1:
                raise ValueError(f"{source}: {prefix}* is none of {', '.join(_KINDS)} ({few(tensors)})")
            stages[kinds[0]].append(tensors)
    return stages


def _check_names(copies: list[Tensors], source: str, kind: str) -> None:
    """Raise ValueError unless the copies of an encoder have the same tensors: one that lost a layer is told by it."""
    for copy in copies[1:]:
        shapes, others = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (copies[0], copy))
        differing = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
        differing = [name for name in differing if not _TABLES.fullmatch(name)]
        if differing:
            raise ValueError(f"{source} is not complete: its {len(copies)} {kind} differ in {few(differing)}")


def _check_copies(copies: list[Tensors], source: str) -> None:
    """Raise ValueError unless the copies of T5, which no training changed, agree (in names and all their norms)."""
    _check_names(copies, source, "T5 encoders")
    for name, tensor in copies[0].items():
        if name.endswith("norm.weight") and not all(torch.equal(tensor, copy[name]) for copy in copies[1:]):
            raise ValueError(f"{source}: its {len(copies)} T5 encoders differ, which ldm2 cannot run")


def _inside(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors below `prefix`, which is cut off."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _outside(tensors: Tensors, prefix: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
